import itertools

import pytest
import torch

from pyro_gs.ops.arborescences import _eliminated, log_arborescences

pytestmark = pytest.mark.usefixtures("float64_only")


def laplacian_minor(t):
    t = t - torch.diag(t.diagonal())
    return (torch.diag(t.sum(-1)) - t)[:-1, :-1]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_matrix_tree_theorem(n):
    log_t = torch.randn(2, n, n)
    want = torch.stack([torch.linalg.det(laplacian_minor(t)) for t in log_t.exp()]).log()
    assert torch.allclose(log_arborescences(log_t), want, atol=1e-12)


def test_against_all_trees():
    log_t = 20 * torch.randn(4, 4)
    log_t[0, 2] = log_t[1, 3] = -torch.inf
    trees = []
    for parents in itertools.product(range(4), repeat=3):
        ends = []
        for node in range(3):
            for _ in range(4):
                node = parents[node] if node < 3 else 3
            ends.append(node)
        if ends == [3, 3, 3]:
            trees.append(log_t[range(3), list(parents)].sum())
    assert float(log_arborescences(log_t)) == pytest.approx(float(torch.logsumexp(torch.stack(trees), 0)), abs=1e-12)


def test_factorization_and_elimination_agree():
    """Clusters that are tied by e^-1 to e^-60: the one or the other is taken."""
    gap = torch.linspace(0.0, 60.0, 30)[:, None, None] * (1 - torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)))
    log_t = torch.randn(30, 8, 8) - gap
    log_t[:, 1, 2] = -torch.inf
    found = log_arborescences(log_t.requires_grad_())
    plain = _eliminated(torch.where((log_t > -torch.inf) & ~torch.eye(8).bool(), log_t, -1e30))
    assert torch.allclose(found, plain, atol=1e-8)
    grads = [torch.autograd.grad(x.sum(), log_t, retain_graph=True)[0] for x in (found, plain)]
    assert torch.allclose(*grads, atol=1e-7)


def test_any_range_and_gradients():
    for n in (5, 9):
        assert log_arborescences(3000 * torch.randn(n, n)).isfinite()
    for n in (4, 7):
        free = torch.randn(3, n, n, requires_grad=True)
        mask = torch.rand(3, n, n) < 0.2
        mask[..., -1] = False
        assert torch.autograd.gradcheck(lambda x, mask=mask: log_arborescences(x.masked_fill(mask, -torch.inf)), free)


def test_no_tree():
    for n in (3, 8):
        log_t = torch.zeros(n, n)
        log_t[:, -1] = -torch.inf
        assert float(log_arborescences(log_t)) < -1e29

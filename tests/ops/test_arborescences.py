import itertools

import pytest
import torch

from pyro_gs.ops.arborescences import log_arborescences

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


def test_any_range_and_gradients():
    log_t = 3000 * torch.randn(5, 5)
    assert log_arborescences(log_t).isfinite()
    free = torch.randn(3, 4, 4, requires_grad=True)
    mask = torch.rand(3, 4, 4) < 0.2
    mask[..., -1] = False
    assert torch.autograd.gradcheck(lambda x: log_arborescences(x.masked_fill(mask, -torch.inf)), free)


def test_no_tree():
    log_t = torch.zeros(3, 3)
    log_t[:, 2] = -torch.inf
    assert float(log_arborescences(log_t)) < -1e29

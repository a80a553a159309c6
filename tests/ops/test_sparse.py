import pytest
import torch
from logit_families import make

from pyro_gs import sinkhorn
from pyro_gs.ops.sparse import sparse_solution

pytestmark = pytest.mark.usefixtures("float64_only")


def test_direction_is_that_of_the_dense_matrix():
    n, damping = 600, 1e-6
    p = sinkhorn(make("noisy", n, 0), temperature=0.01)
    right = torch.randn(2, n)
    right = right - right.mean(-1, keepdim=True)
    x = sparse_solution(p, None, right, damping)
    weights = p.mT @ p
    weights.fill_diagonal_(0.0)
    dense = torch.diag(weights.sum(-1) + damping) - weights
    want = torch.linalg.solve(dense, right.mT).mT
    assert float((x - want).abs().max()) < 0.01 * float(want.abs().max())
    r = torch.rand(n) + 0.5
    x = sparse_solution(p * r[:, None], r, right, damping)
    weights = p.mT @ (r[:, None] * p)
    weights.fill_diagonal_(0.0)
    want = torch.linalg.solve(torch.diag(weights.sum(-1) + damping) - weights, right.mT).mT
    assert float((x - want).abs().max()) < 0.01 * float(want.abs().max())


def test_dense_and_small_matrices_are_left_to_others():
    assert sparse_solution(torch.eye(10), None, torch.zeros(1, 10), 1e-6) is None
    assert sparse_solution(torch.full((600, 600), 1 / 600), None, torch.zeros(1, 600), 1e-6) is None


def test_the_operator_does_not_depend_on_it(monkeypatch):
    x = make("noisy", 600, 1)
    with_it = sinkhorn(x, temperature=0.02)
    monkeypatch.setattr("pyro_gs.ops.sparse.SMALLEST", 10_000)
    assert torch.allclose(with_it, sinkhorn(x, temperature=0.02), atol=1e-6)
    assert float((with_it.sum(-2) - 1).abs().max()) <= 1e-10

"""Sums over candidates against those over the matrix."""

import pytest
import torch

from pyro_gs import sparse_sinkhorn, to_sparse
from pyro_gs.ops.layout import DENSE, Sparse

pytestmark = pytest.mark.usefixtures("float64_only")


@pytest.fixture
def entries():
    """Entries of two matrices (2, 6, 3), with padding, their matrices and their layout."""
    allowed = torch.eye(6).bool() | (torch.rand(2, 6, 6) < 0.3)
    allowed = allowed & (allowed.cumsum(-1) <= 3) | torch.eye(6).bool()
    z = torch.randn(2, 6, 6).masked_fill(~allowed, -torch.inf)
    logits, columns = to_sparse(z)
    assert (logits == -torch.inf).any()
    return z, logits, Sparse(columns)


def test_sums_are_those_of_the_matrix(entries):
    z, logits, layout = entries
    p, q = z.exp(), logits.exp()
    x, r = torch.randn(2, 4, 6), 0.5 + torch.rand(2, 6)
    for mine, want in [
        (layout.by_row(q, x), DENSE.by_row(p, x)),
        (layout.by_column(q, x), DENSE.by_column(p, x)),
        (layout.column_sums(q), DENSE.column_sums(p)),
        (layout.column_logsumexp(logits), DENSE.column_logsumexp(z)),
        (layout.column_max(q)[0], DENSE.column_max(p)[0]),
        (layout.column_max(q)[1], DENSE.column_max(p)[1]),
        (layout.dense(q), p),
        (layout.dense(logits, -torch.inf), z),
        (layout.gather(p), q),
    ]:
        assert torch.allclose(mine, want, atol=1e-14)
    for sums in (p.sum(-1), None if r is None else p.sum(-1)):
        assert torch.allclose(layout.laplacian(q, sums)(x), DENSE.laplacian(p, sums)(x), atol=1e-13)
        diagonal = DENSE.diagonal(p, sums)
        tied = diagonal > 1e-12
        assert torch.allclose(layout.diagonal(q, sums)[tied], diagonal[tied], atol=1e-13)
        assert (layout.diagonal(q, sums)[~tied] == torch.inf).all()


def test_weak_ties_keep_their_digits():
    """Two columns that a weight of 1e-20 ties: nothing is left of it where ones are subtracted."""
    q = torch.tensor([[[1.0, 1e-20], [1.0, 1e-20]]])
    layout = Sparse(torch.tensor([[[0, 1], [1, 0]]]))
    x = torch.tensor([[[3.0, 1.0]]])
    want = torch.tensor([[[4e-20, -4e-20]]])
    assert torch.allclose(layout.laplacian(q, None)(x), want, rtol=1e-12, atol=0)
    assert torch.allclose(layout.diagonal(q, None), torch.tensor([2e-20]), rtol=1e-12, atol=0)
    assert not torch.allclose(DENSE.laplacian(layout.dense(q), None)(x), want, rtol=0.1, atol=0)


def test_a_batch_may_share_candidates():
    logits, columns = torch.randn(3, 5, 2), torch.stack([torch.arange(5), torch.arange(1, 6) % 5], -1)
    shared = sparse_sinkhorn(logits, columns)
    assert torch.equal(shared, sparse_sinkhorn(logits, columns.expand(3, 5, 2).contiguous()))

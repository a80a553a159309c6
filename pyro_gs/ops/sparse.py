r"""Large matrices of which nearly nothing is left, at low temperatures, by sparse factorizations on the processor.

Entries of ``P`` that are small beside the damping tie columns by less than the damping does, so leaving them out changes a
direction by no more than their share of it (Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao and Ying 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags
from torch import Tensor

SMALLEST = 512  # size from which this is worth the change of format
_SHARE = 1e-4  # of the damping below which an entry is left out
_ENTRIES, _TIES = 4, 16  # per row at most, so that the factors stay sparse
_CANDIDATE_TIES = 200  # the same on candidates, where the other way is through a dense matrix
_NEGLIGIBLE = 1e-12  # share of both its columns' ties below which one is left out
_SHIFT = 1e-14  # of a diagonal, so that no pivot is lost to rounding


def sparse_solution(
    p: Tensor, r: Tensor | None, right: Tensor, damping: float, columns: Tensor | None = None
) -> Tensor | None:
    """Solve ``(L + damping) x = right`` for one matrix, or None if it is not sparse enough or not on the processor.

    Args:
        p: (n, n), or (n, k) with ``columns``.
        r: its row sums (n,), None for ones.
        right: (k, n).
        damping: added to the diagonal.
        columns: long (n, k), the column of each entry.

    Returns:
        Tensor of shape (k, n).
    """
    n = len(p)
    if (columns is None and n < SMALLEST) or p.device.type != "cpu":
        return None
    kept = p > _SHARE * damping
    if columns is None and int(kept.sum()) > _ENTRIES * n:
        return None
    row, column = kept.nonzero(as_tuple=True)
    column = column if columns is None else columns[kept]
    value = (p if r is None else p * r.rsqrt()[:, None])[kept].numpy()
    entries = csr_matrix((value, (row.numpy(), column.numpy())), shape=(n, n))
    ties = (entries.T @ entries).tocsc()
    if ties.nnz > (_TIES if columns is None else _CANDIDATE_TIES) * n:
        return None
    ties.setdiag(0.0)
    total = np.asarray(ties.sum(0)).ravel() + damping
    return torch.from_numpy(_factored(ties, total).solve(right.T.numpy().copy())).T


def nearly_inverse(p: Tensor, r: Tensor | None, columns: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Nearly the inverse of the Laplacian of candidates of one item, or None if that is not sparse enough.

    Ties that are nothing beside the others of both their columns are left out, and every diagonal is raised by 1e-14 of
    itself: a few steps with exact products make up for both.

    Args:
        p: (n, k).
        r: its row sums (n,), None for ones.
        columns: long (n, k).

    Returns:
        A function of tensors (m, n).
    """
    n, device = len(p), p.device
    kept = p > 0
    row, column = kept.nonzero(as_tuple=True)[0], columns[kept]
    value = (p if r is None else p * r.rsqrt()[:, None])[kept]
    entries = csr_matrix((value.cpu().numpy(), (row.cpu().numpy(), column.cpu().numpy())), shape=(n, n))
    ties = (entries.T @ entries).tocoo()
    between = (ties.row != ties.col) & (ties.data > 0)
    one, other, weight = ties.row[between], ties.col[between], ties.data[between]
    total = np.bincount(one, weight, minlength=n)
    strong = weight > _NEGLIGIBLE * np.minimum(total[one], total[other])
    one, other, weight = one[strong], other[strong], weight[strong]
    if len(weight) > _CANDIDATE_TIES * n:
        return None
    diagonal = np.bincount(one, weight, minlength=n) * (1 + _SHIFT)
    diagonal[diagonal == 0] = 1.0  # tied to no other, and right sides are zero there
    factor = _factored(csr_matrix((weight, (one, other)), shape=(n, n)), diagonal)

    def solve(right: Tensor) -> Tensor:
        return torch.from_numpy(factor.solve(right.T.cpu().numpy().copy())).T.to(device)

    return solve


def _factored(ties: csr_matrix, total: np.ndarray) -> Any:
    """Factors of the matrix with this diagonal and minus the ties."""
    from scipy.sparse.linalg import splu  # slow to load, so not with the package

    return splu((diags(total) - ties).tocsc(), "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})

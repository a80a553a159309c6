r"""The Newton direction of a large matrix of which nearly nothing is left: at low temperatures, by a sparse factorization.

Entries of ``P`` that are small beside the damping tie columns by less than the damping does, so leaving them out changes a
direction by no more than their share of it (Tang, Shavlovsky, Rahmanian, Tardini, Thekumparampil, Xiao and Ying 2024).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags
from torch import Tensor

SMALLEST = 512  # size from which this is worth the change of format
_SHARE = 1e-4  # of the damping below which an entry is left out
_ENTRIES, _TIES = 4, 16  # per row at most, so that the factors stay sparse


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
    if n < SMALLEST or p.device.type != "cpu":
        return None
    kept = p > _SHARE * damping
    if int(kept.sum()) > _ENTRIES * n:
        return None
    row, column = kept.nonzero(as_tuple=True)
    column = column if columns is None else columns[kept]
    value = (p if r is None else p * r.rsqrt()[:, None])[kept].numpy()
    entries = csr_matrix((value, (row.numpy(), column.numpy())), shape=(n, n))
    ties = (entries.T @ entries).tocsc()
    if ties.nnz > _TIES * n:
        return None
    ties.setdiag(0.0)
    total = np.asarray(ties.sum(0)).ravel() + damping
    from scipy.sparse.linalg import splu  # slow to load, so not with the package

    factor = splu((diags(total) - ties).tocsc(), "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    return torch.from_numpy(factor.solve(right.T.numpy().copy())).T

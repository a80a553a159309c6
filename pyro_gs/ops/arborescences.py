"""Weighted in-trees of a directed graph, without subtraction."""

from __future__ import annotations

import torch
from torch import Tensor

_ABSENT = -1e30  # for the logarithm of a missing edge, so that no gradient is NaN


def log_arborescences(log_t: Tensor) -> Tensor:
    r"""Logarithm of the sum over all trees directed to the last node of the product of their edges' weights.

    By the matrix-tree theorem (Tutte 1948) that is the determinant of ``diag(row sums) - T`` without its last row and
    column. Nodes are eliminated one after the other (Grassmann, Taksar and Heyman 1985), in logarithms: nothing
    subtracts, overflows or underflows.

    Args:
        log_t: logarithms of the weights ``T[i, j]`` of the edges from i to j, shape (..., n, n); ``-inf`` for none. The
            diagonal does not matter.

    Returns:
        Tensor of shape (...); below -1e29 where no tree exists.
    """
    n = log_t.shape[-1]
    t = torch.where(log_t.detach() > -torch.inf, log_t, _ABSENT)
    t = torch.where(torch.eye(n, dtype=torch.bool, device=t.device), _ABSENT, t)
    total = torch.zeros_like(t[..., 0, 0])
    for _ in range(n - 1):
        out, back, rest = t[..., 0, 1:], t[..., 1:, 0], t[..., 1:, 1:]
        pivot = torch.logsumexp(out, -1)
        total = total + pivot
        # What returns to its own node is not looked at again: later pivots leave the diagonal out.
        through = back[..., :, None] + out[..., None, :] - pivot[..., None, None]
        t = torch.logaddexp(rest, through)
        if t.shape[-1] > 1:
            t = torch.where(torch.eye(t.shape[-1], dtype=torch.bool, device=t.device), _ABSENT, t)
    return total

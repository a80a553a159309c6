"""Weighted in-trees of a directed graph, with all their digits."""

from __future__ import annotations

import torch
from torch import Tensor

_ABSENT = -1e30  # for the logarithm of a missing edge, so that no gradient is NaN
_CANCELLED = -16.0  # nats by which subtraction may shrink the product of the diagonal; nine digits are left
_FACTORED = 6  # nodes from which a factorization is the faster way


def log_arborescences(log_t: Tensor) -> Tensor:
    r"""Logarithm of the sum over all trees directed to the last node of the product of their edges' weights.

    By the matrix-tree theorem (Tutte 1948) that is the determinant of ``diag(row sums) - T`` without its last row and
    column. Where that loses digits, nodes are eliminated one after the other in logarithms (Grassmann, Taksar and Heyman
    1985): nothing subtracts, overflows or underflows.

    Args:
        log_t: logarithms of the weights ``T[i, j]`` of the edges from i to j, shape (..., n, n); ``-inf`` for none. The
            diagonal does not matter.

    Returns:
        Tensor of shape (...); below -1e29 where no tree exists.
    """
    n = log_t.shape[-1]
    t = torch.where(log_t.detach() > -torch.inf, log_t, _ABSENT)
    t = torch.where(torch.eye(n, dtype=torch.bool, device=t.device), _ABSENT, t)
    if n < _FACTORED:
        return _eliminated(t)
    flat = t.reshape(-1, n, n)
    with torch.no_grad():
        value = _factored(flat)
        good = value > _CANCELLED
    if bool(good.all()):
        out = _factored(flat) if torch.is_grad_enabled() and t.requires_grad else value
        return (out + _largest(flat)).reshape(t.shape[:-2])
    out = torch.zeros_like(flat[:, 0, 0])
    for where, function in ((good.nonzero()[:, 0], _factored), ((~good).nonzero()[:, 0], _eliminated)):
        part = flat[where]
        found = function(part) + _largest(part) if function is _factored else function(part)
        out = out.index_add(0, where, found)
    return out.reshape(t.shape[:-2])


def _largest(t: Tensor) -> Tensor:
    """Sum of the logarithms of all nodes' outgoing weights but the last's, (b,)."""
    return t[:, :-1].logsumexp(-1).sum(-1)


def _factored(t: Tensor) -> Tensor:
    """:func:`log_arborescences` (b,) less :func:`_largest`, by a factorization; -inf where that fails."""
    p = t[:, :-1].softmax(-1)[..., :-1]
    out: Tensor = torch.linalg.slogdet(torch.eye(p.shape[-1], dtype=p.dtype, device=p.device) - p)[1]
    return out


def _eliminated(t: Tensor) -> Tensor:
    """:func:`log_arborescences`, node by node; the diagonal is absent."""
    total = torch.zeros_like(t[..., 0, 0])
    for _ in range(t.shape[-1] - 1):
        out, back, rest = t[..., 0, 1:], t[..., 1:, 0], t[..., 1:, 1:]
        pivot = torch.logsumexp(out, -1)
        total = total + pivot
        # What returns to its own node is not looked at again: later pivots leave the diagonal out.
        t = torch.logaddexp(rest, back[..., :, None] + out[..., None, :] - pivot[..., None, None])
        if t.shape[-1] > 1:
            t = torch.where(torch.eye(t.shape[-1], dtype=torch.bool, device=t.device), _ABSENT, t)
    return total

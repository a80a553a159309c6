"""Closed forms of the Mallows law: normalizer, distances, marginals, pairs.

With ``q = exp(-theta)`` all of them come from the partial sums ``S_k = 1 + q + ... + q^(k-1)``, of non-negative terms only,
so that no digit is lost near ``theta = 0`` or far from it, and gradients are right there too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def powers(theta: Tensor, n: int) -> Tensor:
    """``q^j`` for j from 0 to n - 1, float64 (..., n)."""
    return (-theta.double()[..., None] * torch.arange(n, dtype=torch.float64, device=theta.device)).exp()


def log_normalizer(theta: Tensor, n: int) -> Tensor:
    """``sum_k log S_k`` (...), the logarithm of the sum of ``q^d(P, center)`` over all permutations."""
    return torch.log1p(powers(theta, n)[..., 1:].cumsum(-1)).sum(-1)


def mean_distance(theta: Tensor, n: int) -> Tensor:
    """Expected distance to the center (...), minus the derivative of :func:`log_normalizer`."""
    q = powers(theta, n)
    j = torch.arange(n, dtype=torch.float64, device=theta.device)
    return ((j * q).cumsum(-1) / q.cumsum(-1)).sum(-1)


def swap_probabilities(theta: Tensor, n: int) -> Tensor:
    r"""Probability (..., n - 1) that two items, 1 to n - 1 places apart in the center, are ranked in reverse.

    ``q^k (S_1 + ... + S_k) / (S_k S_{k+1})``, which equals ``1 - h(k + 1) + h(k)`` with ``h(k) = k / (1 - q^k)`` (Mallows,
    'Non-null ranking models', 1957).
    """
    q = powers(theta, n)
    sums = q.cumsum(-1)
    return q[..., 1:] * sums[..., :-1].cumsum(-1) / (sums[..., :-1] * sums[..., 1:])


def rank_probabilities(theta: Tensor, n: int) -> Tensor:
    """Probability (..., n, n) that position ``i`` holds the item of rank ``k`` in the center.

    Follows all items through the insertions. Item ``m`` (from 0) passes ``j`` of the earlier ones with probability
    ``q^j / S_{m+1}``, so it moves the one at position ``i`` with probability ``q^(m-i) S_{i+1} / S_{m+1}``.
    """
    q = powers(theta, n)
    sums = q.cumsum(-1)
    at = torch.ones_like(q[..., :1, None])  # (..., item, position)
    for m in range(1, n):
        total = sums[..., m, None]
        moved = at * (q[..., 1 : m + 1].flip(-1) * sums[..., :m] / total)[..., None, :]
        stayed = at * (sums[..., :m].flip(-1) / total)[..., None, :]
        earlier = torch.nn.functional.pad(stayed, (0, 1)) + torch.nn.functional.pad(moved, (1, 0))
        new = q[..., : m + 1].flip(-1) / total
        at = torch.cat([earlier, new[..., None, :]], -2)
    return at.mT

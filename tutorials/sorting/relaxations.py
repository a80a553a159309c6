"""Sorting made smooth by other means than Sinkhorn's: NeuralSort, SoftSort and sorting networks.

Each takes a number of every item, scores (..., n), and returns log P, (..., n, n): rows items as they come, columns
positions in ascending order, as everywhere in `pyro_gs`. The papers of the first two have positions as rows, in descending
order.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from diffsort import DiffSortNet
from torch import Tensor

from pyro_gs.ops.logits import check_floating, check_temperature, describe, first_position

__all__ = ["NetworkKind", "diff_sort", "neural_sort", "soft_sort"]

NetworkKind = Literal["odd_even", "bitonic"]


def neural_sort(scores: Tensor, temperature: float) -> Tensor:
    """NeuralSort (Grover et al. 2019, 'Stochastic optimization of sorting networks via continuous relaxations').

    Position j, from 1, takes item i with weight ``softmax_i(((2 j - n - 1) s_i - sum_k |s_i - s_k|) / temperature)``:
    columns sum to one, rows do not.

    Args:
        scores: shape (..., n).
        temperature: positive.

    Returns:
        log P, shape (..., n, n).

    Raises:
        TypeError: ``scores`` not floating.
        ValueError: ``scores`` without items, NaN or infinite; ``temperature`` not positive.

    Example:
        >>> neural_sort(torch.tensor([3.0, 1.0, 2.0]), 0.1).exp().round()
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]])
    """
    _check(scores, temperature)
    n = scores.shape[-1]
    distances = (scores[..., :, None] - scores[..., None, :]).abs().sum(-1)
    slopes = 2.0 * torch.arange(n, dtype=scores.dtype, device=scores.device) - (n - 1)
    return ((scores[..., :, None] * slopes - distances[..., None]) / temperature).log_softmax(-2)


def soft_sort(scores: Tensor, temperature: float) -> Tensor:
    """SoftSort (Prillo and Eisenschlos 2020, 'SoftSort: a continuous relaxation for the argsort operator').

    Position j takes item i with weight ``softmax_i(-|sorted(s)_j - s_i| / temperature)``, the paper's ``d`` the absolute
    difference: columns sum to one, rows do not.

    Args:
        scores: as `neural_sort`.
        temperature: positive.

    Returns:
        log P, shape (..., n, n).

    Raises:
        TypeError: as `neural_sort`.
        ValueError: as `neural_sort`.
    """
    _check(scores, temperature)
    ordered = scores.sort(-1).values
    return (-(scores[..., :, None] - ordered[..., None, :]).abs() / temperature).log_softmax(-2)


def diff_sort(scores: Tensor, temperature: float, kind: NetworkKind = "odd_even") -> Tensor:
    """A sorting network with soft swaps (Petersen et al. 2022, 'Monotonic differentiable sorting networks').

    Of the package diffsort, with the Cauchy distribution's swaps, its default, of steepness ``1 / temperature``. Rows and
    columns sum to one. Entries that underflow count as the least normal number of the dtype, so that logarithms are finite.

    Args:
        scores: as `neural_sort`.
        temperature: positive.
        kind: ``"odd_even"`` or ``"bitonic"``.

    Returns:
        log P, shape (..., n, n).

    Raises:
        TypeError: as `neural_sort`.
        ValueError: as `neural_sort`, or another ``kind``.
    """
    _check(scores, temperature)
    if kind not in get_args(NetworkKind):
        raise ValueError(f"kind={kind!r}: expected one of {get_args(NetworkKind)}")
    n = scores.shape[-1]
    if n == 1:  # the package has no network of one wire
        return torch.zeros(*scores.shape, 1, dtype=scores.dtype, device=scores.device)
    _, P = _network(kind, n, str(scores.device), 1 / temperature)(scores.reshape(-1, n))
    least = torch.finfo(P.dtype).tiny
    out: Tensor = P.clamp_min(least).log().reshape(*scores.shape, n)
    return out


@functools.lru_cache
def _network(kind: NetworkKind, n: int, device: str, steepness: float) -> DiffSortNet:
    return DiffSortNet(kind, n, device=device, steepness=steepness)


def _check(scores: Tensor, temperature: float) -> None:
    if not isinstance(scores, Tensor) or scores.dim() == 0 or scores.shape[-1] == 0:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"scores must have shape (..., n) with n >= 1, but are {found}")
    check_floating(scores, "scores")
    check_temperature(temperature)
    bad = ~scores.detach().isfinite()
    if bool(bad.any()):
        *batch, item = at = first_position(bad)
        raise ValueError(f"scores{describe(tuple(batch))} is {float(scores.detach()[at])} at item {item}, expected finite")

"""Permutations as rankings: row ``i`` of the matrix is the position, its column the item that stands there."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gs.ops.logits import check_floating, check_magnitude, check_square, describe, first_position
from pyro_gs.ops.matching import to_index


def check_scores(scores: Tensor, name: str = "scores") -> None:
    """Raise unless ``scores`` is a finite float32 or float64 tensor of shape (..., n) with n >= 1.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: no items, or an entry that is not finite; the message names its position and batch item.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (..., n), but is {type(scores).__name__}")
    check_floating(scores, name, half=False)
    if scores.dim() < 1 or scores.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., n) with n >= 1, but has shape {tuple(scores.shape)}")
    bad = ~scores.detach().isfinite()
    if bool(bad.any()):
        *item, position = index = first_position(bad)
        raise ValueError(
            f"{name}{describe(tuple(item))} has the entry {float(scores.detach()[index])} at position {position}; entries "
            "must be finite, since every item has a place in the ranking"
        )
    check_magnitude(scores, name)


def centered(scores: Tensor) -> Tensor:
    """Scores in float64 less their largest, on which no ranking law depends; the shift has no gradient."""
    return scores.double() - scores.detach().amax(-1, keepdim=True).double()


def broadcast_parameter(value: Tensor, name: str, batch: torch.Size, owner: str) -> torch.Size:
    """Joint batch shape of a parameter without event dimensions and the one named ``owner``.

    Raises:
        ValueError: the two do not broadcast.
    """
    try:
        return torch.Size(torch.broadcast_shapes(value.shape, batch))
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not broadcast with {tuple(batch)}, the batch shape of {owner}"
        ) from None


def permutation_index(P: Tensor, name: str) -> Tensor:
    """:func:`pyro_gs.to_index` of an argument that messages call ``name``."""
    check_square(P, name)
    try:
        return to_index(P)
    except ValueError as error:
        raise ValueError(f"{name}{str(error).removeprefix('P')}") from None


def inversions(index: Tensor) -> Tensor:
    """Number of pairs ``i < k`` with ``index[i] > index[k]``, long (...) from (..., n)."""
    n = index.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool, device=index.device).triu(1)
    return ((index[..., :, None] > index[..., None, :]) & later).sum((-2, -1))


def kendall_distance(P: Tensor, Q: Tensor) -> Tensor:
    """Kendall's tau distance of two rankings: the number of pairs of items that they order differently.

    Row ``i`` of a matrix is position ``i`` and its column the item there, so the distance is the number of inversions of
    ``P Q^T``, from 0 to n (n - 1) / 2. It does not change when both have their columns (items) permuted alike
    (Kendall, 'A new measure of rank correlation', 1938). Counted by n^2 comparisons.

    Args:
        P: permutation matrices, shape (..., n, n), any dtype.
        Q: permutation matrices, shape (..., n, n), whose batch broadcasts with that of ``P``.

    Returns:
        Tensor of the broadcast batch shape, dtype long: pairs of items.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an item is not a permutation matrix (the message names it), or shapes do not fit.

    Example:
        >>> import torch
        >>> kendall_distance(torch.eye(3), torch.eye(3).flip(0))
        tensor(3)
    """
    first, second = permutation_index(P, "P"), permutation_index(Q, "Q")
    try:
        shape = torch.broadcast_shapes(first.shape, second.shape)
        if shape[-1] != first.shape[-1] or shape[-1] != second.shape[-1]:  # a single item would broadcast
            raise RuntimeError
    except RuntimeError:
        raise ValueError(
            f"P and Q must have the same n and batches that broadcast, but have shapes {tuple(P.shape)} and {tuple(Q.shape)}"
        ) from None
    return inversions(second.argsort(-1).expand(shape).gather(-1, first.expand(shape)))


def log_neural_sort(scores: Tensor) -> Tensor:
    r"""Logarithm of NeuralSort at temperature one, the relaxed matrix that sorts in descending order.

    Row ``i``, counted from 1, is ``softmax((n + 1 - 2 i) s - A 1)`` with ``A_jk = |s_j - s_k|`` (Grover, Wang, Zweig and
    Ermon, 'Stochastic optimization of sorting networks via continuous relaxations', ICLR 2019, equation 5).

    Args:
        scores: shape (..., n).

    Returns:
        Tensor of shape (..., n, n).
    """
    n = scores.shape[-1]
    slope = torch.arange(n - 1, -n, -2, dtype=scores.dtype, device=scores.device)
    spread = (scores[..., :, None] - scores[..., None, :]).abs().sum(-1)
    return torch.log_softmax(slope[:, None] * scores[..., None, :] - spread[..., None, :], -1)


def neural_sort_scores(log_p: Tensor) -> Tensor:
    """Scores (..., n) whose :func:`log_neural_sort` is ``log_p`` (..., n, n), up to a common shift.

    Between two rows only the slope changes, so the first less the last row is ``2 (n - 1) s`` up to a shift. Of a matrix
    that is not from NeuralSort, the scores that its first and last row imply.
    """
    n = log_p.shape[-1]
    return (log_p[..., 0, :] - log_p[..., -1, :]) / max(2 * (n - 1), 1)

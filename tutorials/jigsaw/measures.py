"""How wrong an answer to a puzzle is: by its pieces, and by its picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor

from pyro_gs import nn as gsnn
from pyro_gs import to_matrix
from tutorials.jigsaw.puzzle import Puzzles

__all__ = ["Measures", "assembled", "mean", "measure"]


@dataclass(frozen=True)
class Measures:
    """Measures of answers, one value a puzzle, each of shape (batch,).

    ``wrong`` is the proportion of positions with another piece than the one that belongs there, ``any_wrong`` 1 if there is
    one and else 0, ``kendall`` Kendall's tau of the positions of the pieces against their right ones (of a single piece 1).
    These tell identical pieces apart. The ``equal_`` ones do not: a position is wrong if the piece there looks different,
    and tau is that of the answer with identical pieces exchanged among each other so that right ones count as right and the
    others are in order. ``l1`` and ``l2`` are the mean absolute and the mean squared difference between the joined picture
    and the right one, over pixels and channels, of values from 0 to 1; they are the same for identical pieces.
    """

    wrong: Tensor
    any_wrong: Tensor
    kendall: Tensor
    equal_wrong: Tensor
    equal_any_wrong: Tensor
    equal_kendall: Tensor
    l1: Tensor
    l2: Tensor


def assembled(puzzles: Puzzles, answer: Tensor) -> Tensor:
    """Pieces where an answer puts them, shape (batch, n, channels, height, width).

    Args:
        puzzles: The puzzles.
        answer: The position of each piece, integers of shape (batch, n).

    Raises:
        ValueError: If an answer is no permutation, or of another shape.
    """
    if answer.shape != puzzles.index.shape:
        raise ValueError(f"answer: expected the shape {tuple(puzzles.index.shape)}, got {tuple(answer.shape)}")
    return gsnn.assemble(to_matrix(answer, dtype=puzzles.pieces.dtype), puzzles.pieces, item_dim=3)


def measure(puzzles: Puzzles, answer: Tensor) -> Measures:
    """Measure answers.

    Args:
        puzzles: The puzzles.
        answer: As `assembled`.

    Raises:
        ValueError: As `assembled`.
    """
    joined = assembled(puzzles, answer)
    # the right position of the piece that lies at each position
    lying = puzzles.index.gather(-1, answer.argsort(-1)).cpu().numpy()
    exchanged = np.stack(
        [_exchanged(order, _kinds(pieces)) for order, pieces in zip(lying, puzzles.ordered.flatten(2).cpu(), strict=True)]
    )
    difference = (joined - puzzles.ordered).flatten(1)
    wrong, equal_wrong = (torch.from_numpy((order != np.arange(order.shape[1])).mean(1)) for order in (lying, exchanged))
    return Measures(
        wrong=wrong,
        any_wrong=(wrong > 0).double(),
        kendall=_kendall(lying),
        equal_wrong=equal_wrong,
        equal_any_wrong=(equal_wrong > 0).double(),
        equal_kendall=_kendall(exchanged),
        l1=difference.abs().mean(1).double().cpu(),
        l2=difference.square().mean(1).double().cpu(),
    )


def mean(measures: Measures) -> dict[str, float]:
    """Means over puzzles, by name."""
    return {name: float(values.mean()) for name, values in vars(measures).items()}


def _kinds(pieces: Tensor) -> NDArray[np.int64]:
    """A number for each piece in reading order, the same for identical ones."""
    return np.unique(pieces.numpy(), axis=0, return_inverse=True)[1].reshape(-1)


def _exchanged(lying: NDArray[np.int64], kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """An answer with identical pieces exchanged: right where it looks right, the rest of a kind in ascending order."""
    right = kinds[lying] == kinds
    out = np.where(right, np.arange(len(lying)), -1)
    for kind in np.unique(kinds):
        places = np.flatnonzero(~right & (kinds[lying] == kind))
        out[places] = np.setdiff1d(np.flatnonzero(kinds == kind), out[right & (kinds == kind)])
    return out


def _kendall(orders: NDArray[np.int64]) -> Tensor:
    n = orders.shape[1]
    if n == 1:
        return torch.ones(len(orders), dtype=torch.float64)
    return torch.tensor([float(kendalltau(order, np.arange(n)).statistic) for order in orders], dtype=torch.float64)

"""Methods of sorting: what a network says of every item, how that becomes a matrix, and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_gs.nn import EachItem, PositionScores, RankScores, RowScores, SinkhornLayer, cross_entropy, reconstruction_loss
from pyro_gs.ops.matching import matching
from tutorials.sorting.relaxations import diff_sort, neural_sort, soft_sort

__all__ = ["Method", "Sorter", "Standardized", "ordering", "right_positions"]

Relaxation = Literal["sinkhorn", "neural_sort", "soft_sort", "odd_even", "bitonic"]


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        title: Its name in tables.
        scores: What the network gives of an item: ``"row"`` a score for each of n positions (the paper's form),
            ``"position"`` features that are multiplied with those of the position, ``"rank"`` one number that is multiplied
            with the position. One number is all that relaxations other than Sinkhorn's take.
        relaxation: How scores become a matrix.
        sweeps: Of Sinkhorn; None runs it to convergence.
        noise: Factor of the Gumbel noise.
        samples: Draws of the noise for every set; None for one.
        loss: Of the sorted items against the right ones (the paper's), or of log P.
        encoder: Of numbers: two layers of 32 ReLU units, or the number itself.
        standardized: Whether numbers are first given mean 0 and variance 1 in their list.
        inverse: Whether the matrix is compared with that of the inverse permutation; see `tutorials.sorting.digits`.
    """

    title: str
    scores: Literal["row", "position", "rank"] = "rank"
    relaxation: Relaxation = "sinkhorn"
    sweeps: int | None = None
    noise: float = 0.0
    samples: int | None = None
    loss: Literal["squared error", "cross entropy"] = "cross entropy"
    encoder: Literal["linear", "mlp"] = "mlp"
    standardized: bool = False
    inverse: bool = False

    @property
    def any_size(self) -> bool:
        """Whether a network that was trained on sets of one size sorts sets of any."""
        return self.scores != "row"


class Sorter(nn.Module):
    """A network that sorts sets, by a method.

    Args:
        items: From items ``(..., n, *item)`` to features (..., n, features).
        features: Their size.
        n: Size of the sets it is trained on.
        method: The method.
        temperature: Of the relaxation, positive.

    Raises:
        ValueError: If ``method`` is contradictory: a sorting relaxation of more than one number.
    """

    def __init__(self, items: nn.Module, features: int, n: int, method: Method, temperature: float) -> None:
        super().__init__()
        if method.relaxation != "sinkhorn" and method.scores != "rank":
            raise ValueError(f"scores={method.scores!r}: {method.relaxation} takes one number, expected 'rank'")
        self.items = items
        self.method = method
        self.temperature = temperature
        self.scores: nn.Module
        if method.relaxation != "sinkhorn":
            self.scores = nn.Linear(features, 1)
        elif method.scores == "row":
            self.scores = RowScores(features, n)
        elif method.scores == "position":
            self.scores = PositionScores(features)
        else:
            self.scores = RankScores(features)
        self.layer = SinkhornLayer(temperature, method.noise, method.samples, num_iters=method.sweeps)

    def log_p(self, items: Tensor) -> Tensor:
        """Log of the relaxed matrix, (..., n, n), rows items, columns positions; draws of the noise lead."""
        out = self.scores(self.items(items))
        relaxation = self.method.relaxation
        if relaxation == "neural_sort":
            return neural_sort(out.squeeze(-1), self.temperature)
        if relaxation == "soft_sort":
            return soft_sort(out.squeeze(-1), self.temperature)
        if relaxation != "sinkhorn":
            return diff_sort(out.squeeze(-1), self.temperature, relaxation)
        log_p = self.layer.log_p(out)
        return log_p.mT if self.method.inverse else log_p

    def loss(self, items: Tensor, target: Tensor, item_dim: int) -> Tensor:
        """Loss of a batch, against permutation matrices ``target`` (..., n, n); a scalar."""
        log_p = self.log_p(items)
        if self.method.loss == "cross entropy":
            return cross_entropy(log_p, target).mean()
        ordered = (target.mT @ items.flatten(-item_dim)).reshape(items.shape)
        return reconstruction_loss(log_p.exp(), items, ordered, item_dim=item_dim).mean()

    @torch.no_grad()
    def solve(self, items: Tensor) -> Tensor:
        """The answer, permutation matrices (..., n, n): the matching of the scores, or the order of one number an item."""
        out = self.scores(self.items(items))
        if self.method.relaxation != "sinkhorn":
            return ordering(out.squeeze(-1)).to(out.dtype)
        P = matching(out).to(out.dtype)
        return P.mT if self.method.inverse else P


class Standardized(nn.Module):
    """Numbers (..., n, 1) with mean 0 and variance 1 in their list, then a module of them."""

    def __init__(self, items: EachItem) -> None:
        super().__init__()
        self.items = items

    def forward(self, items: Tensor) -> Tensor:
        """Features, of the standardized numbers."""
        centred = items - items.mean(-2, keepdim=True)
        out: Tensor = self.items(centred / centred.square().mean(-2, keepdim=True).sqrt())
        return out


def ordering(values: Tensor) -> Tensor:
    """Matrices that put values (..., n) in ascending order, int64 (..., n, n); equal ones as they come."""
    return functional.one_hot(values.argsort(stable=True, dim=-1), values.shape[-1]).mT


def right_positions(P: Tensor, values: Tensor) -> Tensor:
    """Where the answer has the value that belongs there; equal values are exchangeable.

    Args:
        P: Permutation matrices (..., n, n).
        values: Of the items as they come, (..., n).

    Returns:
        Bool, (..., n), by position.
    """
    return values.gather(-1, P.argmax(-2)) == values.sort(-1).values

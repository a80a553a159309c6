"""The methods: networks of pieces, their losses and their noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_gs import nn as gsnn
from pyro_gs import to_index
from pyro_gs.ops.matching import matching
from tutorials.jigsaw.dense import DensePermutation
from tutorials.jigsaw.neighbours import NeighbourScores
from tutorials.jigsaw.puzzle import scrambled
from tutorials.pictures import Pictures

__all__ = ["NETWORKS", "Kind", "Training", "answers", "build", "encoder"]

_FEATURES = 128

Seen = Literal["none", "deepsets", "attention", "neighbours", "dense"]
Loss = Literal["picture", "order"]


@dataclass(frozen=True)
class Kind:
    """A method that is trained.

    Attributes:
        title: In tables.
        seen: What pieces see of each other before the Sinkhorn layer: nothing (the paper's form), each other through
            `pyro_gs.nn.DeepSets` or `pyro_gs.nn.SetAttention`, that and their borders through `NeighbourScores`, or
            everything in a network that is not equivariant.
        loss: ``"picture"``, squared error of the joined picture (the paper's), or ``"order"``, cross entropy of log P, to
            which that of the neighbours comes where borders are seen.
        noise: Factor of the Gumbel noise in training.
        temperature: Of the Sinkhorn layer in training.
        learning_rate: The highest of a one-cycle schedule.
    """

    title: str
    seen: Seen
    loss: Loss
    noise: float
    temperature: float
    learning_rate: float


NETWORKS: dict[str, Kind] = {
    "dense": Kind("dense (DeepPermNet-like)", "dense", "order", 0.0, 1.0, 4e-3),
    "sinkhorn": Kind("Sinkhorn (paper)", "none", "picture", 0.0, 0.3, 4e-3),
    "gumbel": Kind("Gumbel-Sinkhorn (paper)", "none", "picture", 1.0, 1.0, 4e-3),
    "row-order": Kind("rows, cross entropy", "none", "order", 0.0, 1.0, 4e-3),
    "row-order-gumbel": Kind("rows, cross entropy, Gumbel", "none", "order", 1.0, 1.0, 4e-3),
    "deepsets": Kind("DeepSets, cross entropy", "deepsets", "order", 0.0, 1.0, 2e-3),
    "neighbours": Kind("neighbours, cross entropy", "neighbours", "order", 0.0, 1.0, 2e-3),
    "attention-picture": Kind("attention, squared error", "attention", "picture", 0.0, 0.3, 2e-3),
    "attention": Kind("attention, cross entropy", "attention", "order", 0.0, 1.0, 2e-3),
    "attention-gumbel": Kind("attention, cross entropy, Gumbel", "attention", "order", 1.0, 1.0, 2e-3),
}
"""Methods that are trained, by the name that ``--methods`` takes.

Temperatures of ``sinkhorn`` and ``gumbel`` (0.1 to 3) and learning rates of these and of ``dense`` (0.001 and 0.004) were
compared on validation digits in 3 x 3 pieces, those of ``attention`` (0.001 and 0.002) there and on validation photographs
in 2 x 2; methods like them take theirs, ``neighbours`` that of ``attention``.
"""


def encoder(channels: int, height: int, width: int, features: int = _FEATURES) -> gsnn.EachItem:
    """A small convolutional network of single pieces.

    Args:
        channels: Of a piece.
        height: Of a piece in pixels.
        width: As ``height``.
        features: Numbers that it returns of each piece.
    """
    stride = 2 if min(height, width) >= 12 else 1  # of a large piece at half its size, for time
    pool = 2 if min(height, width) >= 6 else 1
    layers = [nn.Conv2d(channels, 32, 1 + 2 * stride, stride, padding=stride), nn.ReLU(), nn.MaxPool2d(pool)]
    height, width = ((size + stride - 1) // stride // pool for size in (height, width))
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * height * width, features), nn.ReLU()]
    return gsnn.EachItem(nn.Sequential(*layers), item_dim=3)


def build(kind: Kind, n: int, piece: tuple[int, int, int]) -> gsnn.SinkhornNetwork:
    """A new network of a method.

    Args:
        kind: The method.
        n: Number of pieces.
        piece: Channels, height and width of one.
    """
    items = encoder(*piece)
    scores: nn.Module
    if kind.seen == "dense":
        scores = DensePermutation(items, _FEATURES, n)
    elif kind.seen == "neighbours":
        scores = NeighbourScores(items, _FEATURES, n, piece[0], gsnn.SetAttention(_FEATURES, _FEATURES, width=_FEATURES))
    else:
        sets: dict[Seen, nn.Module | None] = {
            "none": None,
            "deepsets": gsnn.DeepSets(_FEATURES, _FEATURES, width=_FEATURES, depth=3),
            "attention": gsnn.SetAttention(_FEATURES, _FEATURES, width=_FEATURES),
        }
        scores = gsnn.ScoreNetwork(items, gsnn.RowScores(_FEATURES, n), sets=sets[kind.seen])
    return gsnn.SinkhornNetwork(scores, gsnn.SinkhornLayer(kind.temperature, kind.noise))


class Training(nn.Module):
    """The objective of a method: its loss on puzzles of fresh batches.

    Args:
        network: See `build`.
        loss: See `Kind`.
        pictures: Where training pictures come from.
        k: Pieces along each side.
        batch: Puzzles a step.
    """

    def __init__(self, network: gsnn.SinkhornNetwork, loss: Loss, pictures: Pictures, k: int, batch: int) -> None:
        super().__init__()
        self.network = network
        self._loss = loss
        self._pictures = pictures
        self._k = k
        self._batch = batch

    def forward(self, generator: torch.Generator, share: float) -> Tensor:
        """The loss of a new batch."""
        device = next(self.network.parameters()).device
        puzzles = scrambled(self._pictures.draw(self._batch, generator).to(device), self._k, generator)
        scores = self.network.scores
        if isinstance(scores, NeighbourScores):
            alone, neighbours = scores.compared(puzzles.pieces)
            log_p = self.network.layer.log_p(scores.arranged(alone, neighbours))
            return (gsnn.cross_entropy(log_p, puzzles.target) + scores.loss(neighbours, puzzles.target)).mean()
        if self._loss == "order":
            return gsnn.cross_entropy(self.network.log_p(puzzles.pieces), puzzles.target).mean()
        matrices = self.network(puzzles.pieces)
        return gsnn.reconstruction_loss(matrices, puzzles.pieces, puzzles.ordered, item_dim=3).mean()


@torch.no_grad()
def answers(network: gsnn.SinkhornNetwork, pieces: Tensor) -> Tensor:
    """The position of each piece by the matching of the logits, without noise, shape (batch, n)."""
    return torch.cat([to_index(matching(network.scores(part))) for part in pieces.split(100)])

"""Networks that arrange pieces into a digit of a given label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_gs import nn as gsnn
from pyro_gs import to_index
from pyro_gs.ops.matching import matching
from tutorials.assemble.tasks import Digits, Tasks
from tutorials.jigsaw.networks import encoder

__all__ = ["NETWORKS", "Kind", "LabelScores", "Training", "answers", "build"]

_FEATURES = 128
_LABELS = 10


@dataclass(frozen=True)
class Kind:
    """A method that is trained.

    Attributes:
        title: In tables.
        attention: Whether pieces see each other before the Sinkhorn layer; the paper's do not.
        noise: Factor of the Gumbel noise in training.
        hard: Whether the picture in the loss is of the matching, with the gradient of the relaxed matrix.
    """

    title: str
    attention: bool = False
    noise: float = 0.0
    hard: bool = False


NETWORKS: dict[str, Kind] = {
    "sinkhorn": Kind("Sinkhorn (paper)"),
    "gumbel": Kind("Gumbel-Sinkhorn (paper)", noise=1.0),
    "attention": Kind("attention", attention=True),
    "attention-gumbel": Kind("attention, Gumbel", attention=True, noise=1.0),
    "attention-hard": Kind("attention, Gumbel, straight-through", attention=True, noise=1.0, hard=True),
}
"""Methods that are trained, by the name that ``--methods`` takes."""


class LabelScores(nn.Module):
    """Scores of every piece at every position, for a label: ten networks, one for each label, that share the encoder.

    Args:
        n: Number of pieces.
        piece: Channels, height and width of one.
        attention: See `Kind`.

    Shapes:
        pieces ``(batch, n, *piece)`` and labels (batch,) to logits (batch, n, n); permuting the pieces permutes the rows.

    Raises:
        ValueError: At a call, if labels are not integers from 0 to 9, one for each set.
    """

    def __init__(self, n: int, piece: tuple[int, int, int], *, attention: bool) -> None:
        super().__init__()
        self.items = encoder(*piece)
        self.sets = gsnn.SetAttention(_FEATURES, _FEATURES, width=_FEATURES) if attention else None
        self.rows = nn.Linear(_FEATURES, _LABELS * n)
        self.n = n

    def forward(self, pieces: Tensor, labels: Tensor) -> Tensor:
        """Logits."""
        if labels.shape != pieces.shape[:1] or labels.is_floating_point() or not bool(((labels >= 0) & (labels < 10)).all()):
            raise ValueError(f"labels: expected {len(pieces)} integers from 0 to 9, got {labels.tolist()}")
        features = self.items(pieces)
        if self.sets is not None:
            features = self.sets(features)
        scores = self.rows(features).reshape(len(pieces), -1, _LABELS, self.n)
        chosen: Tensor = scores[torch.arange(len(pieces), device=pieces.device), :, labels]
        return chosen


def build(kind: Kind, k: int) -> tuple[LabelScores, gsnn.SinkhornLayer]:
    """A new network of a method, and the layer of its training.

    Args:
        kind: The method.
        k: Pieces along each side of a padded digit.
    """
    side = math.ceil(28 / k)
    return LabelScores(k * k, (1, side, side), attention=kind.attention), gsnn.SinkhornLayer(1.0, kind.noise, hard=kind.hard)


class Training(nn.Module):
    """Squared error of the assembled picture against a random training picture of the label.

    Args:
        scores: From pieces and labels to logits.
        layer: From logits to matrices.
        digits: Training digits.
        batch: Tasks a step.
    """

    def __init__(self, scores: LabelScores, layer: gsnn.SinkhornLayer, digits: Digits, batch: int) -> None:
        super().__init__()
        self.scores = scores
        self.layer = layer
        self._digits = digits
        self._batch = batch

    def forward(self, generator: torch.Generator, share: float) -> Tensor:
        """The loss of a new batch."""
        tasks = self._digits.draw(self._batch, generator).to(next(self.scores.parameters()).device)
        matrices = self.layer(self.scores(tasks.pieces, tasks.labels))
        return gsnn.reconstruction_loss(matrices, tasks.pieces, tasks.targets, item_dim=3).mean()


@torch.no_grad()
def answers(scores: LabelScores, tasks: Tasks) -> Tensor:
    """The position of each piece by the matching of the logits, without noise, shape (batch, n)."""
    parts = zip(tasks.pieces.split(100), tasks.labels.split(100), strict=True)
    return torch.cat([to_index(matching(scores(pieces, labels))) for pieces, labels in parts])

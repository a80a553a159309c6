"""Scores of pieces from the pieces that may be beside them, by rounds of the Sinkhorn operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_gs.nn import RowScores
from pyro_gs.ops.logits import check_count
from pyro_gs.ops.sinkhorn import sinkhorn
from tutorials.jigsaw.dense import refuse_mask

__all__ = ["NeighbourScores"]

_DEPTH = 2  # pixels from a border that are read
_SWEEPS = 5  # of a round; the answer's own are to convergence
_SMALL = 0.1  # differences of features above it count by their logarithm
_FLOOR = 1e-6  # of the probability to be neighbours, for its logarithm


class NeighbourScores(nn.Module):
    """Logits of pieces at positions, by how a piece looks and by how it fits to what may be beside it.

    Every two borders are compared: how likely is each other piece, or none, to the right of a piece, to its left, below and
    above? Then come rounds. In each, a piece is as likely at a position as what the last round's Sinkhorn matrix has at the
    neighbouring positions is likely beside it, and at the frame as it is likely to have none there. These are sweeps towards
    the quadratic assignment that `tutorials.jigsaw.border` searches for, with misfits that are learned: messages between
    neighbouring positions, each the logarithm of a mean over the last round's doubly stochastic matrix.

    Args:
        items: From pieces to ``features`` numbers each.
        features: See ``items``.
        n: Number of pieces, a square.
        channels: Of a piece.
        sets: From features to features that know of the other pieces; None where they shall not.
        width: Features at each pixel of a border.

    Shapes:
        ``(..., n, channels, height, width)`` to logits (..., n, n). Equivariant: permuting the pieces permutes the rows.

    Raises:
        ValueError: If n is no square number, or ``channels`` or ``width`` none of at least 1; at a call, with a mask.
    """

    beside: Tensor

    def __init__(
        self, items: nn.Module, features: int, n: int, channels: int, sets: nn.Module | None = None, width: int = 16
    ) -> None:
        super().__init__()
        for name, value in (("n", n), ("channels", channels), ("width", width)):
            check_count(value, name, least=1)
        k = round(n**0.5)
        if k * k != n:
            raise ValueError(f"n={n!r}: expected a square number")
        self.items = items
        self.sets = sets
        self.alone = RowScores(features, n)
        self.nothing = nn.Linear(features, 4)
        self.borders = nn.ModuleList(_Border(channels, width) for _ in range(2))  # vertical ones, horizontal ones
        self.weight = nn.Parameter(torch.ones(()))
        self.rounds = 2 * k
        place = torch.arange(n).reshape(k, k)
        after = torch.zeros(2, n, n)
        after[0, place[:, :-1].flatten(), place[:, 1:].flatten()] = 1
        after[1, place[:-1].flatten(), place[1:].flatten()] = 1
        # [d, p, q]: position q is to the right of, to the left of, below, above p
        self.register_buffer("beside", torch.stack([after[0], after[0].mT, after[1], after[1].mT]), persistent=False)

    def forward(self, pieces: Tensor, mask: None = None) -> Tensor:
        """Logits."""
        refuse_mask(self, mask)
        return self.arranged(*self.compared(pieces))

    def compared(self, pieces: Tensor) -> tuple[Tensor, Tensor]:
        """What the rounds start from.

        Args:
            pieces: Shape (..., n, channels, height, width).

        Returns:
            Scores of the pieces for themselves, shape (..., n, n), and log-probabilities of each piece j, or of none (the
            last column), to be to the right of, to the left of, below and above piece i, shape (..., 4, n, n + 1).
        """
        features = self.items(pieces)
        if self.sets is not None:
            features = self.sets(features)
        pairs = [border(pieces.transpose(-1, -2) if turned else pieces) for turned, border in enumerate(self.borders)]
        fits = torch.stack([fit for pair in pairs for fit in (pair, pair.mT)], -3)
        none = self.nothing(features).mT[..., None]
        return self.alone(features), torch.cat([fits, none], -1).log_softmax(-1)

    def arranged(self, alone: Tensor, neighbours: Tensor) -> Tensor:
        """The rounds, 2k of them.

        Args:
            alone: As `compared` returns.
            neighbours: As `compared` returns.

        Returns:
            Logits, shape (..., n, n).
        """
        inside = self.beside.sum(-1)[:, None]  # whether there is a position beside p
        alone = alone + (neighbours[..., -1:] * (1 - inside)).sum(-3)
        seen = neighbours[..., :-1]
        fits = ((seen + seen[..., [1, 0, 3, 2], :, :].mT) / 2).exp()  # as both pieces see it
        logits = alone
        for _ in range(self.rounds):
            P = sinkhorn(logits, num_iters=_SWEEPS)
            there = (fits @ (P[..., None, :, :] @ self.beside.mT) + _FLOOR).log()  # piece i at p, with what is beside p
            logits = alone + self.weight * (there * inside).sum(-3)
        return logits

    def loss(self, neighbours: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of the neighbours, without which training may stay at a plateau of the rounds.

        Args:
            neighbours: As `compared` returns.
            target: The right matchings, shape (..., n, n).

        Returns:
            Means over pieces and directions, shape (...).
        """
        place = target[..., None, :, :]
        right = place @ self.beside @ place.mT  # [d, i, j]: piece j is beside i
        right = torch.cat([right, 1 - right.sum(-1, keepdim=True)], -1)
        return -neighbours.masked_fill(right == 0, 0.0).sum(-1).mean((-2, -1))


class _Border(nn.Module):
    """How well pieces fit to the right of others: minus how much features along the two borders differ.

    Args:
        channels: Of a piece.
        width: Features at each pixel of a border.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        size = channels * _DEPTH
        self.nonlinear = nn.Sequential(nn.Conv1d(size, 64, 3, padding=1), nn.ReLU(), nn.Conv1d(64, width, 3, padding=1))
        self.linear = nn.Conv1d(size, width, 1, bias=False)
        self.sharpness = nn.Parameter(torch.tensor(0.1))

    def forward(self, pieces: Tensor) -> Tensor:
        """Log-potentials, [i, j] of j to the right of i; -inf for a piece and itself."""
        last, first = self._features(pieces.flip(-1)), self._features(pieces)
        apart = (last[..., :, None, :] - first[..., None, :, :]).abs()
        fit = -self.sharpness * (apart / _SMALL).log1p().sum(-1)
        return fit.masked_fill(torch.eye(fit.shape[-1], dtype=torch.bool, device=fit.device), -torch.inf)

    def _features(self, pieces: Tensor) -> Tensor:
        """Along the left border, from the outermost pixels inwards."""
        *batch, channels, height, width = pieces.shape
        columns = F.pad(pieces[..., :_DEPTH], (0, max(0, _DEPTH - width)))
        lines = columns.movedim(-1, -2).reshape(math.prod(batch), channels * _DEPTH, height)
        out: Tensor = self.nonlinear(lines) + self.linear(lines)
        return out.reshape(*batch, out.shape[-2] * out.shape[-1])

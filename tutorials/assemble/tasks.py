"""Digits to take apart, and the label to assemble from their pieces."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tutorials.jigsaw.puzzle import cut, padded, scrambled
from tutorials.pictures import Split, mnist

__all__ = ["Digits", "Tasks"]

_LABELS = 10


@dataclass(frozen=True)
class Tasks:
    """A batch of tasks.

    Attributes:
        pieces: Of one digit each, scrambled, shape (batch, n, 1, height, width).
        labels: What to assemble, never the label of that digit, shape (batch,).
        targets: A picture of that label, in pieces in reading order, of the shape of ``pieces``. Networks do not see it: it
            is what their loss compares with in training, and a measure in the test.
    """

    pieces: Tensor
    labels: Tensor
    targets: Tensor

    def to(self, device: str | torch.device) -> Tasks:
        """On another device."""
        return Tasks(self.pieces.to(device), self.labels.to(device), self.targets.to(device))


class Digits:
    """Digits of MNIST in pieces; see `tutorials.pictures.mnist`.

    Args:
        split: Which part.
        k: Pieces along each side; pictures are padded to a multiple of it.

    Attributes:
        images: The pictures, not padded, shape (N, 1, 28, 28), sorted by label.
        labels: Sorted, shape (N,).

    Raises:
        ValueError: If ``k`` is not within 1 to 28.
    """

    def __init__(self, split: Split, k: int) -> None:
        images, labels = mnist(split)
        order = labels.argsort(stable=True)
        self.images, self.labels = images[order][:, None], labels[order]
        self._k = k
        self._pieces = cut(padded(self.images, k), k)
        self._counts = self.labels.bincount(minlength=_LABELS)
        self._starts = self._counts.cumsum(0) - self._counts

    def draw(self, count: int, generator: torch.Generator) -> Tasks:
        """Draw digits, labels other than theirs, and pictures of these, all uniformly.

        Args:
            count: How many.
            generator: On the processor.
        """
        rows = torch.randint(len(self.images), (count,), generator=generator)
        shift = torch.randint(1, _LABELS, (count,), generator=generator)
        labels = (self.labels[rows] + shift) % _LABELS
        place = torch.rand(count, generator=generator, dtype=torch.float64) * self._counts[labels]
        targets = self._pieces[self._starts[labels] + place.long()]
        return Tasks(scrambled(self.images[rows], self._k, generator).pieces, labels, targets)

    def pieces_of(self, label: int) -> Tensor:
        """All pictures of a label in pieces, in reading order, shape (N, n, 1, height, width)."""
        return self._pieces[self.labels == label]

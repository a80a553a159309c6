"""Pictures cut into k x k pieces, scrambled, and joined again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_gs import nn as gsnn
from pyro_gs import to_matrix

__all__ = ["Puzzles", "cut", "join", "padded", "scrambled"]


def padded(images: Tensor, k: int) -> Tensor:
    """Pictures with zeros around them, so that their sides are multiples of k.

    Where an odd number is missing, one more comes at the bottom and at the right.

    Args:
        images: Shape (..., height, width).
        k: At least 1.

    Returns:
        The pictures, as they are where the sides are multiples already.

    Raises:
        ValueError: If ``k`` is below 1 or above a side.
    """
    height, width = images.shape[-2:]
    if not 1 <= k <= min(height, width):
        raise ValueError(f"k={k!r}: expected an integer from 1 to the shorter side of the pictures, {min(height, width)}")
    down, right = -height % k, -width % k
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def cut(images: Tensor, k: int) -> Tensor:
    """Cut pictures into pieces, in reading order.

    Args:
        images: Shape (..., channels, height, width).
        k: Pieces along each side.

    Returns:
        Pieces, shape (..., k * k, channels, height / k, width / k).

    Raises:
        ValueError: If a side is no multiple of ``k``; see `padded`.
    """
    *batch, channels, height, width = images.shape
    if k < 1 or height % k or width % k:
        raise ValueError(f"k={k!r}: expected a divisor of the sides of the pictures, {height} and {width}; pad them")
    parts = images.reshape(*batch, channels, k, height // k, k, width // k)
    return parts.movedim((-4, -2), (-5, -4)).reshape(*batch, k * k, channels, height // k, width // k)


def join(pieces: Tensor) -> Tensor:
    """Join pieces in reading order, the inverse of `cut`.

    Args:
        pieces: Shape (..., k * k, channels, height, width).

    Returns:
        Pictures, shape (..., channels, k * height, k * width).

    Raises:
        ValueError: If the number of pieces is no square.
    """
    *batch, n, channels, height, width = pieces.shape
    k = round(n**0.5)
    if k * k != n:
        raise ValueError(f"pieces: expected a square number of them, got {n}")
    parts = pieces.reshape(*batch, k, k, channels, height, width).movedim((-5, -4), (-4, -2))
    return parts.reshape(*batch, channels, k * height, k * width)


@dataclass(frozen=True)
class Puzzles:
    """A batch of puzzles.

    Attributes:
        pieces: As they come, shape (batch, n, channels, height, width).
        ordered: In reading order, of the same shape.
        index: The position at which each piece belongs, shape (batch, n).
    """

    pieces: Tensor
    ordered: Tensor
    index: Tensor

    @property
    def target(self) -> Tensor:
        """Permutation matrices, rows pieces, columns positions, shape (batch, n, n)."""
        return to_matrix(self.index, dtype=self.pieces.dtype)


def scrambled(images: Tensor, k: int, generator: torch.Generator) -> Puzzles:
    """Make a puzzle of every picture: pad, cut, and scramble uniformly at random.

    Args:
        images: Shape (batch, channels, height, width), on any device.
        k: Pieces along each side.
        generator: On the processor, so that puzzles are the same on every device.

    Raises:
        ValueError: As `padded`.
    """
    ordered = cut(padded(images, k), k)
    index = torch.rand(ordered.shape[:2], generator=generator, dtype=torch.float64).argsort(-1).to(images.device)
    matrices = to_matrix(index, dtype=images.dtype)
    return Puzzles(gsnn.scramble(matrices, ordered, item_dim=3), ordered, index)

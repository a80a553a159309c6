"""How much the command runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tutorials.jigsaw.jobs import METHODS

__all__ = ["SIZES", "Size"]


@dataclass(frozen=True)
class Size:
    """Defaults of the command's options.

    Attributes:
        small: Pieces along each side of digits.
        large: Pieces along each side of other pictures.
        methods: Of `METHODS`.
        seeds: One run each.
        steps: Of training.
        puzzles: Of the test.
    """

    small: Sequence[int]
    large: Sequence[int]
    methods: Sequence[str]
    seeds: Sequence[int]
    steps: int
    puzzles: int

    def grids_of(self, data: str) -> Sequence[int]:
        """Pieces along each side for a data set."""
        return {"digits": (2, 4), "mnist": self.small, "full-mnist": self.small}.get(data, self.large)


_SHOWN = ("chance", "border", "dense", "sinkhorn", "gumbel", "attention", "neighbours")

SIZES: dict[str, Size] = {
    # without the last, which after so few steps still puts blank borders together
    "quick": Size((2,), (2,), _SHOWN[:-1], (0,), 20, 50),
    "default": Size((2, 3, 4), (3,), _SHOWN, (0, 1, 2), 400, 1000),
    "full": Size((2, 3, 4, 5, 6), (2, 3, 4), tuple(METHODS), (0, 1, 2), 4000, 1000),
}
"""By the name of the option; ``default`` without one."""

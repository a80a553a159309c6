"""How much the command runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tutorials.assemble.jobs import METHODS

__all__ = ["SIZES", "Size"]


@dataclass(frozen=True)
class Size:
    """Defaults of the command's options.

    Attributes:
        grids: Pieces along each side.
        methods: Of `METHODS`.
        seeds: One run each.
        steps: Of training.
        tasks: Of the test.
        classifier_steps: Of training of the classifier.
    """

    grids: Sequence[int]
    methods: Sequence[str]
    seeds: Sequence[int]
    steps: int
    tasks: int
    classifier_steps: int


_SHOWN = ("chance", "sinkhorn", "gumbel", "attention-gumbel", "mean", "target", "nearest")

SIZES: dict[str, Size] = {
    "quick": Size((4,), _SHOWN, (0,), 20, 50, 50),
    "default": Size((4, 7), _SHOWN, (0, 1, 2), 400, 500, 1000),
    "full": Size((2, 4, 7, 14), tuple(METHODS), (0, 1, 2), 4000, 1000, 4000),
}
"""By the name of the option; ``default`` without one."""

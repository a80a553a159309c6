"""Tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["spread", "table"]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and lowest and highest where there are several; empty for none."""
    if not values:
        return ""
    median, low, high = (
        f"{round(x, digits) + 0.0:.{digits}f}" for x in (statistics.median(values), min(values), max(values))
    )  # + 0.0: no minus before a zero
    return median if len(values) == 1 else f"{median} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table.

    Args:
        header: Titles of the columns.
        rows: As long as the header each.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

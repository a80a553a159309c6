"""Figures and tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["spread", "table"]


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and lowest and highest where there are several; empty where there is none.

    Example:
        >>> spread([0.2, 0.1, 0.4], 2), spread([0.25], 1), spread([], 2)
        ('0.20 (0.10 to 0.40)', '0.2', '')
    """
    if not values:
        return ""
    median, low, high = (
        f"{round(x, digits) + 0.0:.{digits}f}" for x in (statistics.median(values), min(values), max(values))
    )  # + 0.0: no minus before a zero
    return median if len(values) == 1 else f"{median} ({low} to {high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table.

    Example:
        >>> print(table(["n", "share"], [["3", "0.5"]]))
        | n | share |
        | --- | --- |
        | 3 | 0.5 |
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

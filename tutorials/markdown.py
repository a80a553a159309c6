"""Figures and tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["methods_table", "spread", "table"]


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


def methods_table(records: Sequence[Mapping[str, Any]], titles: Mapping[str, str], columns: Mapping[str, str]) -> str:
    """A table of methods and their measures, to three digits, as `spread` over the records of each.

    Args:
        records: With ``method`` and the measures.
        titles: Of methods, by their names.
        columns: Titles of the columns, by the names of the measures.
    """
    rows = []
    for method in dict.fromkeys(record["method"] for record in records):
        found = [record for record in records if record["method"] == method]
        rows.append([titles[method], *(spread([record[name] for record in found], 3) for name in columns)])
    return table(["method", *columns.values()], rows)

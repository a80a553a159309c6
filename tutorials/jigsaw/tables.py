"""Tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tutorials.jigsaw.data import DATA
from tutorials.jigsaw.jobs import METHODS
from tutorials.markdown import methods_table

__all__ = ["COLUMNS", "markdown"]

COLUMNS = {
    "wrong": "wrong",
    "any_wrong": "any wrong",
    "kendall": "Kendall's tau",
    "equal_wrong": "wrong, as pictures",
    "equal_any_wrong": "any wrong, as pictures",
    "equal_kendall": "tau, as pictures",
    "l1": "l1",
    "l2": "l2",
}
"""Titles of the columns by the name of the measure."""


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """A section for each data set and grid: methods and their measures, median (lowest to highest) of the seeds."""
    parts = []
    done = [record for record in records if record["status"] == "done"]
    for data, k in dict.fromkeys((record["data"], record["k"]) for record in done):
        of_grid = [record for record in done if (record["data"], record["k"]) == (data, k)]
        steps = max(record["steps"] for record in of_grid)
        about = f"{k} x {k} pieces; {DATA[data].about}; {of_grid[0]['puzzles']} test puzzles" + (
            f"; {steps} steps of training" if steps else ""
        )
        parts.append(f"### {data}, {k} x {k}\n\n{about}.\n\n{methods_table(of_grid, METHODS, COLUMNS)}\n")
    return "\n".join(parts)

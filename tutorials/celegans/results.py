"""The results of a sweep on disk: a log that a kill cannot harm, and the tables that are derived from it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from tutorials.celegans.cells import TABLES, Cell
from tutorials.celegans.jobs import SETTINGS
from tutorials.records import Records, replace_csv

__all__ = ["COLUMNS", "RELIABILITY_COLUMNS", "Results"]

COLUMNS = (
    *("key", "tables", *Cell().settings, "seed", "method", "objective", "status", "accuracy", "accuracy_unknown"),
    *("calibration_error", "log_evidence", "log_evidence_truth", "mean_candidates", "chance", "seconds", "budget", "clock"),
    *("updates", "proposals", "version", "commit", "torch", "processor", "error"),
)
"""Of ``results.csv``, one row a job. Evidences of answer and truth in nats; ``tables`` are the names of all that its cell
belongs to, ``updates`` the steps of an optimizer and ``proposals`` those of a chain."""

RELIABILITY_COLUMNS = ("key", "bin", "count", "confidence", "right")
"""Of ``reliability.csv``, one row for each job and bin of width .1: how many answers about observed unknown neurons
have a probability in it, the sum of these probabilities, and how many answers are right."""


class Results(Records):
    """The folder of a sweep: `Records` with ``results.csv`` in the columns above, and ``reliability.csv`` beside it."""

    required = ("commit", *SETTINGS)

    def write_tables(self) -> None:
        """Write both CSVs anew."""
        records = list(self.records.values())
        chance = {_data(r): r["accuracy"] for r in records if r["method"] == "chance" and r["status"] == "done"}
        rows = []
        for record in records:
            row = {name: record.get(name) for name in COLUMNS}
            row |= {"tables": " ".join(_tables().get(_cell(record), [])), "chance": chance.get(_data(record))}
            rows.append(row)
        replace_csv(self.folder / "results.csv", COLUMNS, rows)
        bins = [
            {"key": record["key"], "bin": i, "count": count, "confidence": confidence, "right": right}
            for record in records
            for i, (count, confidence, right) in enumerate(record.get("bins", ()))
        ]
        replace_csv(self.folder / "reliability.csv", RELIABILITY_COLUMNS, bins)


def _data(record: Mapping[str, Any]) -> tuple[Cell, int]:
    """What the data of a record depend on."""
    return _cell(record), record["seed"]


def _cell(record: Mapping[str, Any]) -> Cell:
    return Cell(**{name: record[name] for name in Cell().settings})


@functools.cache
def _tables() -> dict[Cell, list[str]]:
    """Names of the tables that hold a cell, at full or at small size."""
    names: dict[Cell, list[str]] = {}
    for name, table in TABLES.items():
        for cell in (*table.cells, *table.quick().cells):
            names.setdefault(cell, []).append(name)
    return names

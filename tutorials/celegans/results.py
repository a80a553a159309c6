"""The results of a sweep on disk: a log that a kill cannot harm, and the tables that are derived from it."""

from __future__ import annotations

import csv
import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from tutorials.celegans.cells import TABLES, Cell
from tutorials.celegans.jobs import SETTINGS

__all__ = ["COLUMNS", "RELIABILITY_COLUMNS", "Results", "read_log"]

LOG = "jobs.jsonl"

_REQUIRED = ("key", "status", "commit", *SETTINGS)
"""What every record has."""

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


def read_log(path: Path) -> dict[str, dict[str, Any]]:
    """Read a log.

    Args:
        path: The file; it need not exist.

    Returns:
        Records by key, the last of each; one that is done stays where a later one failed. A last line that was torn by
        a kill is left out.

    Raises:
        ValueError: If another line is no record.
    """
    records: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return records
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    for number, line in enumerate(whole.split("\n") if whole else [], 1):
        try:
            record = json.loads(line)
            missing = [name for name in _REQUIRED if name not in record]
            key, status = record["key"], record["status"]
        except (ValueError, TypeError, KeyError):
            expected = "expected a record in JSON with key and status"
            raise ValueError(f"{path}, line {number}: {expected}, got {line[:80]!r}") from None
        if missing:
            raise ValueError(f"{path}, line {number}: expected a record with {', '.join(missing)}, got {line[:80]!r}")
        if status == "done" or records.get(key, record)["status"] != "done":
            records[key] = record
    return records


class Results:
    """A folder of results, locked while it is open.

    Each job is one line of ``jobs.jsonl``, written at once and synced. ``results.csv`` and ``reliability.csv`` are written
    anew from it, and replaced as a whole.

    Args:
        folder: Made where it does not exist.

    Attributes:
        records: What the log holds, by key.

    Raises:
        ValueError: If the folder cannot be made or written to, another sweep has it open, or the log is damaged before its
            last line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"out={str(folder)!r}: another sweep is writing there, expected a folder of its own") from None
        except OSError as error:
            raise ValueError(f"out={str(folder)!r}: expected a folder that can be written to, got {error}") from None
        try:
            self._log = folder / LOG
            self.records = read_log(self._log)
            self._drop_torn_line()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Results:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Release the lock."""
        self._lock.release()

    def _drop_torn_line(self) -> None:
        if not self._log.exists():
            return
        content = self._log.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(self._log, content.rfind(b"\n") + 1)

    def append(self, record: Mapping[str, Any]) -> None:
        """Put a record into the log, for good when this returns, and into the tables."""
        line = (json.dumps(record) + "\n").encode()
        file = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)
        if written != len(line):
            raise OSError(f"{self._log}: {written} of {len(line)} bytes were written; is the disk full?")
        self.records[record["key"]] = dict(record)
        self.write_tables()

    def write_tables(self) -> None:
        """Write both CSVs anew."""
        records = list(self.records.values())
        chance = {_data(r): r["accuracy"] for r in records if r["method"] == "chance" and r["status"] == "done"}
        rows = []
        for record in records:
            row = {name: record.get(name) for name in COLUMNS}
            row |= {"tables": " ".join(_tables().get(_cell(record), [])), "chance": chance.get(_data(record))}
            rows.append({name: f"{x:.8g}" if isinstance(x, float) else x for name, x in row.items()})
        _replace(self.folder / "results.csv", COLUMNS, rows)
        bins = [
            {"key": record["key"], "bin": i, "count": count, "confidence": f"{confidence:.8g}", "right": right}
            for record in records
            for i, (count, confidence, right) in enumerate(record.get("bins", ()))
        ]
        _replace(self.folder / "reliability.csv", RELIABILITY_COLUMNS, bins)


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


def _replace(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)

"""Results on disk: a log that a kill cannot harm, and tables that are derived from it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from tutorials.file_sizes import check_size

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LOG", "Records", "read_log", "replace_csv"]

LOG = "jobs.jsonl"
"""Name of the log in its folder."""


def read_log(path: Path, required: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Read a log.

    Args:
        path: The file; it need not exist.
        required: What a record must have besides ``key`` and ``status``.

    Returns:
        Records by key, the last of each; one that is done stays where a later one failed. A last line that was torn by
        a kill is left out.

    Raises:
        ValueError: If another line is no record in strict JSON, where numbers are finite.
    """
    records: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return records
    check_size(path)
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, content in enumerate(whole.split(b"\n") if whole else [], 1):
        line = content.decode("utf-8", errors="replace")
        try:
            record = json.loads(content.decode(), parse_constant=_refuse_constant)
            missing = [name for name in required if name not in record]
            key, status = record["key"], record["status"]
            if not isinstance(key, str) or not isinstance(status, str):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            expected = "expected a record in JSON with key and status"
            raise ValueError(f"{path}, line {number}: {expected}, got {line[:80]!r}") from None
        if missing:
            raise ValueError(f"{path}, line {number}: expected a record with {', '.join(missing)}, got {line[:80]!r}")
        if status == "done" or records.get(key, record)["status"] != "done":
            records[key] = record
    return records


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class Records:
    """A folder of results, locked while it is open.

    Each job is one line of ``jobs.jsonl``, written at once and synced. ``results.csv``, a row for each, is written anew
    from it and replaced as a whole.

    Args:
        folder: Made where it does not exist.

    Attributes:
        records: What the log holds, by key.
        required: What every record has besides ``key`` and ``status``.

    Raises:
        ValueError: If the folder cannot be made or written to, another run has it open, or the log is damaged before its
            last line.
    """

    required: Sequence[str] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"out={str(folder)!r}: another run is writing there, expected a folder of its own") from None
        except OSError as error:
            raise ValueError(f"out={str(folder)!r}: expected a folder that can be written to, got {error}") from None
        try:
            self._log = folder / LOG
            self.records = read_log(self._log, self.required)
            self._drop_torn_line()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
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
        """Put a record into the log, for good when this returns, and into the tables.

        Raises:
            ValueError: If a number is not finite, which `read_log` would refuse.
        """
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
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
        """Write the table anew: columns are all that records hold, but lists."""
        rows = [{name: x for name, x in r.items() if not isinstance(x, list)} for r in self.records.values()]
        replace_csv(self.folder / "results.csv", list(dict.fromkeys(name for row in rows for name in row)), rows)


def replace_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV in place of what is there, at once; real numbers with 8 digits, what a row lacks as an empty field."""
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows({name: f"{x:.8g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows)
    os.replace(part, path)

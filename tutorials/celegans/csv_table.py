"""CSV files with a header: rows and numbers, with errors that name file, row and column."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tutorials.file_sizes import check_size

__all__ = ["read_table", "refuse_repeated", "table_number"]

_LARGEST = 2**28  # bytes; as text in lists they take ten times as many


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Read a CSV with a header.

    Args:
        path: The file, in UTF-8.

    Returns:
        The columns, each once, and the other rows with their line numbers; all rows have a value a column.

    Raises:
        ValueError: If the file is empty, no such table, or has more than 256 MiB.
        FileNotFoundError: If there is none.
    """
    check_size(path, _LARGEST)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path.name}: no CSV in UTF-8 ({error}); save it as one") from None
    if any("\0" in cell for _, row in lines for cell in row):
        raise ValueError(f"{path.name}: no CSV in UTF-8 (it holds zero bytes); save it as one")
    if not lines:
        raise ValueError(f"{path.name}: the file is empty, expected a header of labels and a row a time step or neuron")
    (_, header), *rows = lines
    if len(header) == 1 and re.search("[;\t]", header[0]):
        raise ValueError(f"{path.name}: the header {header[0][:40]!r} has no commas, expected columns separated by commas")
    if all(re.fullmatch(r"[-+]?\d*\.\d*(e[-+]?\d+)?", cell, re.IGNORECASE) for cell in header):
        raise ValueError(f"{path.name}: the first row holds numbers ({header[0]}, ...), expected a header of labels")
    refuse_repeated(f"{path.name}: the header", [cell for cell in header if cell])
    if not rows:
        raise ValueError(f"{path.name}: a header and no rows, expected a row a time step or neuron")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path.name}: row {line} has {len(row)} values, expected {len(header)}, one for each column")
    return header, rows


def table_number(path: Path, line: int, column: str, text: str) -> float:
    """A cell of `read_table` as a finite number.

    Raises:
        ValueError: If it is none; the message names file, row and column.
    """
    try:
        value = math.nan if "_" in text else float(text)  # Python takes 1_0 for 10
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path.name}: row {line}, column {column!r} holds {text[:40]!r}, expected a finite number")
    return value


def refuse_repeated(where: str, names: Iterable[str]) -> None:
    """Refuse labels that come twice.

    Args:
        where: The beginning of the message.
        names: The labels.

    Raises:
        ValueError: If one does; the message names all of them.
    """
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        shown = ", ".join(name or "an empty label" for name in repeated)
        raise ValueError(
            f"{where}: {shown} given more than once, expected each once; neurons without a name can be ?1, ?2, ..."
        )

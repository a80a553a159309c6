"""The results of a sweep, read from its CSVs and sorted into the tables that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pyro_gs.calibration import Reliability
from tutorials.celegans.__main__ import METHODS
from tutorials.celegans.cells import BASE, TABLES, Cell, Table
from tutorials.celegans.connectome import DATA
from tutorials.celegans.jobs import BINS
from tutorials.celegans.results import COLUMNS, RELIABILITY_COLUMNS

__all__ = ["CORRECTED", "GAIN", "Line", "Shown", "corrected_errors", "load", "published", "show"]

GAIN = "log_evidence_gain"
"""Column: evidence of the answer less that of the truth, in nats."""

CORRECTED = "calibration_error_corrected"
"""Column: calibration error after correction by the other seeds, see `corrected_errors`; missing below three seeds."""


@dataclass(frozen=True)
class Line:
    """One line of a table: a method, or one of its objectives.

    Attributes:
        method: As in the CSV.
        objective: None where there is none.
        title: What is printed.
    """

    method: str
    objective: str | None
    title: str


@dataclass(frozen=True, eq=False)
class Shown:
    """What there is of a table.

    Attributes:
        name: Of the table.
        table: With the cells that there are results of.
        labels: One for each cell.
        lines: In the order of the table: chance, methods, ceiling.
        rows: Results by cell and line; an empty frame where there are none.
        paper: Published accuracies by cell and method.
        quick: Whether the cells are the small ones.
    """

    name: str
    table: Table
    labels: list[str]
    lines: list[Line]
    rows: dict[tuple[Cell, Line], pd.DataFrame]
    paper: dict[tuple[Cell, str], float]
    quick: bool

    @property
    def methods(self) -> list[Line]:
        """Lines without chance and ceiling."""
        return self.lines[1:-1]

    def values(self, cell: Cell, line: Line, column: str = "accuracy") -> list[float]:
        """Figures of a line in a cell, one a seed."""
        return [float(x) for x in self.rows[cell, line][column].dropna()]

    @property
    def seeds(self) -> str:
        """How many seeds the lines have."""
        counts = {len(values) for key in self.rows if (values := self.values(*key))}
        least, most = min(counts), max(counts)
        return f"{most} seed{'s' * (most > 1)}" if least == most else f"{least} to {most} seeds"


_FILLED = {"seed", "budget", *RELIABILITY_COLUMNS[1:]}
"""Columns with a number in each row."""

_NUMBERS = _FILLED | {"accuracy", "accuracy_unknown", "calibration_error", "log_evidence", "log_evidence_truth"}
"""Columns of numbers that are read."""


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    if not path.exists():
        raise ValueError(f"{path}: no such file, expected the results of python -m tutorials.celegans.sweep")
    # settings as they are written: cells are compared, and pandas may be off in the last digit
    texts = ("key", "commit", "method", "objective", "status", "clock", *BASE.settings)
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(texts, str))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: expected a CSV that the sweep wrote, got {error}") from None
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ValueError(f"{path}: columns {', '.join(missing)} are missing, expected those that the sweep writes")
    for name in _NUMBERS.intersection(columns):
        values = pd.to_numeric(frame[name], errors="coerce")
        bad = values.isna() & (frame[name].notna() | (name in _FILLED))
        if bad.any():
            row = int(bad.to_numpy().argmax())
            text = frame[name].iloc[row]
            shown = "missing" if pd.isna(text) else repr(str(text))
            raise ValueError(f"{path}, line {row + 2}: {name} is {shown}, expected a number")
        frame[name] = values
    return frame


def load(folder: Path, budget: float | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the results of a sweep.

    Args:
        folder: With ``results.csv`` and ``reliability.csv``.
        budget: Only results with this budget, and chance.

    Returns:
        Jobs that are done, with columns ``cell`` of `Cell`, `GAIN` and `CORRECTED`, each seed once: the last where
        several versions of the code ran it. And the reliability of all jobs.

    Raises:
        ValueError: If a file or a column is missing or damaged, no method is done, ``budget`` is no positive number, or a
            cell has results of several budgets or clocks and ``budget`` does not choose.
    """
    if budget is not None and not 0 < budget < float("inf"):
        raise ValueError(f"budget={budget!r}: expected a positive finite number of seconds")
    frame = _read(folder / "results.csv", COLUMNS)
    bad = ~frame["status"].isin(("done", "failed"))
    if bad.any():
        row = int(bad.to_numpy().argmax())
        value = frame["status"].iloc[row]
        raise ValueError(f"{folder / 'results.csv'}, line {row + 2}: status is {value!r}, expected done or failed")
    frame = frame[frame["status"] == "done"]
    if budget is not None:
        frame = frame[(frame["budget"] == budget) | (frame["method"] == "chance")]
    if frame.empty or (budget is not None and (frame["method"] == "chance").all()):
        raise ValueError(f"{folder / 'results.csv'}: no job is done{'' if budget is None else f' with budget {budget:g}'}")
    cells = []
    for place, settings in zip(frame.index, zip(*(frame[name] for name in BASE.settings), strict=True), strict=True):
        try:
            cells.append(_cell(settings))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / 'results.csv'}, line {place + 2}: {error}") from None
    frame = frame.assign(cell=cells)
    frame[GAIN] = frame["log_evidence"] - frame["log_evidence_truth"]
    for found, rows in frame[frame["method"] != "chance"].groupby("cell", sort=False):
        kinds = rows[["budget", "clock"]].drop_duplicates()
        if len(kinds) > 1:
            listed = ", ".join(f"{seconds:g} s ({clock})" for seconds, clock in kinds.itertuples(index=False))
            raise ValueError(f"{folder}: {found} has results of {listed}; choose with --budget, or keep clocks apart")
    frame = frame.drop_duplicates(["cell", "seed", "method", "objective"], keep="last")
    bins = _read(folder / "reliability.csv", RELIABILITY_COLUMNS)
    return frame.assign(**{CORRECTED: corrected_errors(frame, bins)}), bins


def corrected_errors(frame: pd.DataFrame, bins: pd.DataFrame) -> pd.Series[float]:
    """Calibration errors of jobs after their probabilities were corrected by jobs of other seeds.

    Data of other seeds are simulated from the same model with the same settings, as a user can do whose data have no truth
    (``recalibration.py``), from an answer in its place: the reliability of the same method on them, made monotone, maps the
    mean probability of each bin. Bins stay those of the probabilities before.

    Args:
        frame: From `load`, before or after this column is there.
        bins: Reliability of all jobs.

    Returns:
        One number a row of the frame; NaN where fewer than two other seeds are there, or no bins.
    """
    kept = bins[bins["count"] > 0].set_index("key")
    known = frame.set_index("key").index.intersection(kept.index)
    parts = {key: kept.loc[[key]] for key in known}
    errors = pd.Series(float("nan"), index=frame.index)
    for _, rows in frame.groupby(["cell", "method", "objective", "budget"], sort=False, dropna=False):
        there = rows[rows["key"].isin(known)]
        for place, key in there["key"].items():
            others = [parts[other] for other in there["key"] if other != key]
            if len(others) < 2:
                continue
            pooled = pd.concat(others).groupby("bin")[["count", "confidence", "right"]].sum()
            curve, own = _curve(pooled), _curve(parts[key])
            gap = (curve.corrected(own.confidence) - own.accuracy).abs()
            errors[place] = float((own.count * gap).sum() / own.count.sum())
    return errors


def _curve(rows: pd.DataFrame) -> Reliability:
    """Rows of ``reliability.csv``, bins that are not empty."""
    count, confidence, right = (torch.tensor(rows[name].to_numpy()) for name in ("count", "confidence", "right"))
    lower = torch.tensor(rows.reset_index()["bin"].to_numpy() / BINS)
    return Reliability(lower, 1 / BINS, count, confidence / count, right / count)


def _cell(row: Sequence[Any]) -> Cell:
    """The cell of settings as they are in the CSV."""
    settings: dict[str, Any] = {}
    for (name, default), text in zip(BASE.settings.items(), row, strict=True):
        kind = float if default is None else type(default)
        try:
            settings[name] = None if pd.isna(text) else kind(text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}, expected {kind.__name__}") from None
    return Cell(**settings)


def published(table: str) -> pd.DataFrame:
    """Accuracies of the paper in one of its tables."""
    frame = pd.read_csv(DATA / "published.csv")
    return frame[frame["table"] == table]


def _paper(name: str, pairs: Sequence[tuple[Cell, Cell]]) -> dict[tuple[Cell, str], float]:
    """Published accuracies of cells; looked up by the full cell of each pair."""
    frame = published(name)
    found: dict[tuple[Cell, str], float] = {}
    for full, cell in pairs:
        match = frame
        for column in ("candidates", "worms", "known", "eta"):
            match = match[match[column].isna() | (match[column] == getattr(full, column))]
        found |= {(cell, method): x for method, x in match[["method", "accuracy"]].itertuples(index=False)}
    return found


def _label(name: str, full: Cell) -> str:
    if name == "table1":
        return f"{full.candidates:g}, J={full.worms}"
    if name == "table2":
        return f"{full.known:.0%}, {full.eta:g}".replace("%", " %")
    axis = TABLES[name].axis
    if axis is not None:
        return f"{getattr(full, axis):g}"
    if name == "objectives":
        return _label("table2" if full.candidates is None else "table1", full)
    base = BASE.settings
    changed = [f"{key} {value}".replace("_", " ") for key, value in full.settings.items() if value != base[key]]
    return ", ".join(changed) or "base"


def show(name: str, frame: pd.DataFrame) -> Shown | None:
    """What there is of a table: of its full cells, or, where none has run, of its quick ones.

    Args:
        name: Of the table.
        frame: From `load`.

    Returns:
        None where nothing is, or nothing but what other tables share: the base cell, the usual objective.
    """
    full = TABLES[name]
    present = set(frame["cell"])
    quick = not any(cell in present for cell in full.cells)
    pairs = list(zip(full.cells, (full.quick() if quick else full).cells, strict=True))
    pairs = [(large, cell) for large, cell in pairs if cell in present]
    if not pairs or ([large for large, _ in pairs] == [BASE] and name != "base"):
        return None
    cells = tuple(cell for _, cell in pairs)
    ours = frame[frame["cell"].isin(cells)]
    lines = [Line("chance", None, "chance"), *_lines(full, ours), Line("ceiling", None, "ceiling")]
    if len(full.objectives) > 1 and len(lines) < 4:
        return None
    rows = {}
    for cell in cells:
        of_cell = ours[ours["cell"] == cell]
        for line in lines:
            match = of_cell[of_cell["method"] == line.method]
            rows[cell, line] = match if line.objective is None else match[match["objective"] == line.objective]
    labels = [_label(name, large) for large, _ in pairs]
    return Shown(name, replace(full, cells=cells), labels, lines, rows, {} if quick else _paper(name, pairs), quick)


def _lines(full: Table, rows: pd.DataFrame) -> list[Line]:
    """The methods of a table. Cells that it shares with others hold more; these do not make a line."""
    lines = []
    for method, (title, _) in METHODS.items():
        found = rows[rows["method"] == method]
        own = not full.methods or method in full.methods
        asked = len(full.objectives) == 1 and found["cell"].nunique() > 1  # not only in the cell that others share
        if found.empty or not (own or asked):
            continue
        if found["objective"].isna().all():
            lines.append(Line(method, None, title))
            continue
        for objective in full.objectives:
            if (found["objective"] == objective).any():
                lines.append(Line(method, objective, title if len(full.objectives) == 1 else objective))
    return lines

"""Tables and pictures of a sweep, drawn from its CSVs; nothing is computed anew.

python -m tutorials.celegans.tables results/celegans-sweep
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tutorials.celegans.cells import TABLES
from tutorials.celegans.summaries import CORRECTED, GAIN, Shown, load, show
from tutorials.celegans.sweep_figures import draw_all
from tutorials.markdown import spread, table

__all__ = ["main", "markdown"]


def _accuracy_table(shown: Shown) -> str:
    cells = shown.table.cells
    rows = []
    for line in shown.lines:
        published = [shown.paper.get((cell, line.method)) for cell in cells]
        if any(x is not None for x in published):
            rows.append([f"{line.title}, published", *("" if x is None else f"{x:.2f}" for x in published)])
        rows.append([line.title, *(spread(shown.values(cell, line), 3) for cell in cells)])
    return table(["accuracy", *shown.labels], rows)


def _column_table(shown: Shown, title: str, column: str, digits: int) -> str:
    """A table of a column; empty where it has no figures."""
    lines = shown.lines[1:]
    if not any(shown.values(cell, line, column) for cell in shown.table.cells for line in lines):
        return ""
    rows = [[x.title, *(spread(shown.values(cell, x, column), digits) for cell in shown.table.cells)] for x in lines]
    return table([title, *shown.labels], rows)


def _against_paper(shown: Shown) -> str:
    """Cells in which the median of the Gumbel-Sinkhorn guide is above the published one."""
    line = next((x for x in shown.methods if x.method == "gumbel-sinkhorn"), None)
    if line is None or not shown.paper:
        return ""
    above: list[str] = []
    below: list[str] = []
    for label, cell in zip(shown.labels, shown.table.cells, strict=True):
        values = shown.values(cell, line)
        if values:
            (above if statistics.median(values) > shown.paper[cell, line.method] else below).append(label)
    total = len(above) + len(below)
    return f"{line.title}: above the published figure in {len(above)} of {total} cells" + (
        f", not in {'; '.join(below)}.\n" if below else ".\n"
    )


def _above_the_guide(shown: Shown) -> str:
    """Methods whose median is above that of the Gumbel-Sinkhorn guide, cell by cell."""
    guide = next((x for x in shown.methods if x.method == "gumbel-sinkhorn"), None)
    if guide is None or len(shown.methods) < 2 or len(shown.table.objectives) > 1:
        return ""
    found = []
    for label, cell in zip(shown.labels, shown.table.cells, strict=True):
        ours = shown.values(cell, guide)
        others = {x.title: statistics.median(v) for x in shown.methods if x is not guide and (v := shown.values(cell, x))}
        if ours and others:
            level = statistics.median(ours)
            better = [f"{title} {x:.3f}" for title, x in sorted(others.items(), key=lambda y: -y[1]) if x > level + 5e-4]
            if better:
                found.append(f"{label} ({level:.3f}): {', '.join(better)}")
    if not found:
        return f"No method is above {guide.title} in any cell.\n"
    return f"Above {guide.title} (its median): {'; '.join(found)}.\n"


def markdown(shown: Shown) -> str:
    """A section with what there is of a table: accuracy, calibration, evidence."""
    frame = [rows for rows in shown.rows.values() if len(rows)]
    budgets = sorted({float(x) for rows in frame for x in rows["budget"] if x})
    commits = sorted({str(x) for rows in frame for x in rows["commit"].dropna()})
    clocks = sorted({str(x) for rows in frame for x in rows["clock"].dropna()})
    seconds = " or ".join(f"{x:g}" for x in budgets) or "no"
    about = (
        f"{shown.table.about} {seconds} seconds ({' and '.join(clocks)} clock) for each method; median, lowest and highest "
        f"over {shown.seeds}; code of {', '.join(commits) or 'no commit'}."
    )
    parts = [
        f"## {shown.name}{' (small cells: no figures to compare)' if shown.quick else ''}",
        about,
        _accuracy_table(shown),
        _against_paper(shown),
        _above_the_guide(shown),
        _column_table(shown, "expected calibration error, unknown neurons", "calibration_error", 3),
        _column_table(shown, "the same, probabilities corrected by the other seeds", CORRECTED, 3),
        _column_table(shown, "log evidence of the answer less that of the truth, nats", GAIN, 0),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _images(paths: Sequence[Path], about: str) -> list[str]:
    return [f"![{path.stem.replace('_', ' ')}: {about}]({path.name})\n" for path in paths]


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``tables.md`` and the pictures beside the CSVs; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tutorials.celegans.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="with the CSVs of a sweep")
    parser.add_argument("--budget", type=float, help="only results with this budget, where a cell has several")
    args = parser.parse_args(argv)
    try:
        frame, bins = load(args.folder, args.budget)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = [shown for name in TABLES if (shown := show(name, frame)) is not None]
    if len(found) > 1:
        found = [shown for shown in found if shown.name != "base"]  # its cell is in others
    try:
        pictures = draw_all(args.folder, found, bins)
        parts = ["# Methods of identification, cell by cell\n", *_images(pictures.get("", []), "all settings")]
        for shown in found:
            parts += [markdown(shown), *_images(pictures[shown.name], shown.name)]
        text = "\n".join(parts)
        (args.folder / "tables.md").write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"error: folder={str(args.folder)!r}: expected one that can be written to, got {error}", file=sys.stderr)
        return 2
    print(text)
    print(f"tables.md, {', '.join(path.name for paths in pictures.values() for path in paths)} in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

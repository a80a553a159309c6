"""Pictures of a sweep."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tutorials.celegans.report import COLORS
from tutorials.celegans.summaries import Line, Shown

__all__ = ["draw_all", "draw_curves", "draw_panels", "draw_reliability"]

_PANELS_A_ROW = 4

_AXES = {
    "worms": "worms",
    "steps": "time steps of a recording",
    "measurement_noise": "standard deviation of the measurement noise",
    "unseen": "share of neurons not shown",
    "dropped": "share of connections missing",
    "added": "share of connections in excess",
}
"""Labels of the axes of curves."""


def _color(line: Line, shown: Shown) -> Any:
    """A method keeps its color in all pictures; objectives, where there are several, have one each."""
    if len(shown.table.objectives) > 1:
        return mpl.colormaps["Dark2"](shown.methods.index(line))
    return COLORS[line.title]


def draw_all(folder: Path, found: Sequence[Shown], bins: pd.DataFrame) -> dict[str, list[Path]]:
    """Draw everything that there is results of; the paths of the pictures by table, ``""`` for what several share."""
    with plt.rc_context({"figure.dpi": 120, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        paths: dict[str, list[Path]] = {}
        curves = [shown for shown in found if shown.table.axis is not None]
        if curves:
            paths[""] = [draw_curves(folder / "curves.png", curves)]
        for shown in found:
            own = paths.setdefault(shown.name, [])
            if shown.table.axis is None:
                own.append(draw_panels(folder / f"{shown.name}.png", shown))
            if shown.name != "objectives":
                own.append(draw_reliability(folder / f"reliability_{shown.name}.png", shown, bins))
    return paths


def _grid(count: int, width: float, height: float, columns: int = _PANELS_A_ROW) -> tuple[Any, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns + 1.5, height * rows + 0.6), squeeze=False, sharey=True, layout="constrained"
    )
    for ax in axes.flat[count:]:
        ax.axis("off")
    return figure, list(axes.flat[:count])


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path


def draw_panels(path: Path, shown: Shown) -> Path:
    """Accuracy of every method, a panel a cell: median, range over seeds, published figure, chance and ceiling."""
    lines = shown.methods[::-1]
    figure, axes = _grid(len(shown.labels), 2.4, 0.24 * len(lines) + 0.7)
    for ax, label, cell in zip(axes, shown.labels, shown.table.cells, strict=True):
        for reference, style in ((shown.lines[0], ":"), (shown.lines[-1], "--")):
            values = shown.values(cell, reference)
            if values:
                ax.axvline(statistics.median(values), color="black", ls=style, lw=0.9)
        for place, line in enumerate(lines):
            ax.axhline(place, color="#eeeeee", lw=0.8, zorder=0)
            values, color = shown.values(cell, line), _color(line, shown)
            if values:
                ax.plot([min(values), max(values)], [place, place], color=color, lw=2)
                ax.plot(statistics.median(values), place, "o", color=color, ms=6)
            published = shown.paper.get((cell, line.method))
            if published is not None:
                ax.plot(published, place, "D", mfc="white", mec=color, ms=5, zorder=3)
        ax.set(title=label, xlim=(-0.02, 1.03), ylim=(-0.6, len(lines) - 0.4))
        ax.set_yticks(range(len(lines)), [line.title for line in lines])
        ax.tick_params(axis="y", length=0)
    for ax in axes[-_PANELS_A_ROW:]:
        ax.set_xlabel("accuracy")
    marks = "dot: median, bar: range over seeds, dotted: chance, dashed: ceiling"
    figure.suptitle(f"{_title(shown)}\n{marks}{', diamond: published' if shown.paper else ''}", fontsize=9)
    return _save(figure, path)


def _title(shown: Shown) -> str:
    return shown.table.about + (" Small cells." if shown.quick else "")


def draw_curves(path: Path, found: Sequence[Shown]) -> Path:
    """Accuracy against what a table varies: median and range over seeds, chance and ceiling."""
    figure, axes = _grid(len(found), 3.6, 2.8, columns=3)
    handles: dict[str, Any] = {}
    for ax, shown in zip(axes, found, strict=True):
        assert shown.table.axis is not None
        x = np.array([getattr(cell, shown.table.axis) for cell in shown.table.cells], dtype=float)
        for line in shown.lines:
            values = [shown.values(cell, line) for cell in shown.table.cells]
            there = np.array([bool(v) for v in values])
            if not there.any():
                continue
            kept = [v for v in values if v]
            median = [statistics.median(v) for v in kept]
            if line in (shown.lines[0], shown.lines[-1]):
                style = ":" if line is shown.lines[0] else "--"
                (handle,) = ax.plot(x[there], median, color="black", ls=style, lw=1)
            else:
                color = _color(line, shown)
                (handle,) = ax.plot(x[there], median, "o-", color=color, ms=4)
                ax.fill_between(x[there], [min(v) for v in kept], [max(v) for v in kept], color=color, alpha=0.15, lw=0)
            handles.setdefault(line.title, handle)
        ax.set(xlabel=_AXES[shown.table.axis], ylim=(0, 1.03), xticks=x)
        if shown.table.axis == "steps":
            ax.set_xscale("log")
            ax.set_xticks(x, [f"{value:g}" for value in x])
            ax.minorticks_off()
    for ax in axes[::3]:
        ax.set_ylabel("accuracy")
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)
    if any(shown.quick for shown in found):
        figure.suptitle("Small cells.", fontsize=9)
    return _save(figure, path)


def draw_reliability(path: Path, shown: Shown, bins: pd.DataFrame) -> Path:
    """Share of right answers against the probability they were given, pooled over cells and seeds, a panel a method."""
    lines = [*shown.methods, shown.lines[-1]]
    rows = -(-len(lines) // 5)
    columns = -(-len(lines) // rows)
    figure, axes = plt.subplots(
        2 * rows,
        columns,
        figsize=(2.3 * columns + 0.8, 3.1 * rows + 0.6),
        squeeze=False,
        sharex=True,
        sharey="row",
        height_ratios=[3, 1] * rows,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.axis("off")
    for place, line in enumerate(lines):
        row, column = divmod(place, columns)
        curve, counts = axes[2 * row, column], axes[2 * row + 1, column]
        curve.axis("on")
        counts.axis("on")
        keys = pd.concat([shown.rows[cell, line]["key"] for cell in shown.table.cells])
        pooled = bins[bins["key"].isin(keys)].groupby("bin")[["count", "confidence", "right"]].sum()
        used = pooled[pooled["count"] > 0]
        sure, right = used["confidence"] / used["count"], used["right"] / used["count"]
        total = int(used["count"].sum())
        error = float((used["count"] * (sure - right).abs()).sum() / total) if total else float("nan")
        color = COLORS["ceiling"] if line is shown.lines[-1] else _color(line, shown)
        curve.plot([0, 1], [0, 1], color="black", lw=0.7, ls=":")
        curve.plot(sure, right, "o-", color=color, ms=4)
        curve.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.03))
        curve.set_title(f"{line.title}\nerror {error:.3f}", fontsize=8)
        counts.bar(used.index / 10 + 0.05, used["count"], width=0.09, color=color)
        counts.set_yscale("log")
        counts.set_ylim(0.5, None)
        if column == 0:
            curve.set_ylabel("share right")
            counts.set_ylabel("answers")
        if place + columns >= len(lines):
            counts.set_xlabel("probability")
            counts.tick_params(labelbottom=True)
    figure.suptitle(f"{_title(shown)} Unknown neurons, all cells and seeds pooled", fontsize=9)
    return _save(figure, path)

"""Tables and pictures of what was measured."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from tutorials.markdown import spread, table
from tutorials.records import replace_csv
from tutorials.sorting import digits, numbers
from tutorials.sorting.methods import Sorter

__all__ = [
    "digits_markdown",
    "draw_numbers",
    "draw_sorted",
    "numbers_markdown",
    "numbers_rows",
    "numbers_summary",
    "write_numbers",
]

Record = Mapping[str, Any]

_MEASURES = {"any": "lists with any error", "wrong": "wrong positions"}


def numbers_rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """A row for each network, interval and length of the lists."""
    rows = []
    for record in records:
        for n in numbers.SIZES:
            for low, high in numbers.INTERVALS:
                where = f"{low}_{high}_{n}"
                if record["status"] == "done" and f"any_{where}" in record:
                    about = {"method": record["method"], "seed": record["seed"], "trained": record["n"], "n": n}
                    found = {"interval": f"U({low}, {high})", "any": record[f"any_{where}"]}
                    rows.append({**about, **found, "wrong": record[f"wrong_{where}"]})
    return rows


def write_numbers(path: Path, records: Iterable[Record]) -> None:
    """`numbers_rows` as a CSV."""
    columns = ["method", "seed", "trained", "n", "interval", "any", "wrong"]
    replace_csv(path, columns, numbers_rows(records))


def numbers_markdown(records: Sequence[Record], measure: str) -> str:
    """Tables of the share of lists with any error (``"any"``) or of wrong positions (``"wrong"``), one for each length."""
    rows = numbers_rows(records)
    parts = []
    intervals = [f"U({low}, {high})" for low, high in numbers.INTERVALS]
    for n in numbers.SIZES:
        lines = []
        for name, method in numbers.METHODS.items():
            own = [row for row in rows if row["method"] == name and row["n"] == n]
            if own:
                cells = [spread([row[measure] for row in own if row["interval"] == interval], 3) for interval in intervals]
                lines.append([method.title, *cells])
        if lines:
            parts.append(table([f"{_MEASURES[measure]}, n = {n}", *intervals], lines))
    return "\n\n".join(parts)


def numbers_summary(records: Sequence[Record]) -> str:
    """The share of lists with any error by length: on U(0, 1), and on that of the other intervals where it is largest."""
    rows = numbers_rows(records)
    sizes = sorted({row["n"] for row in rows})
    parts = []
    for title, trained_on in (("on U(0, 1)", True), ("on the worst other interval", False)):
        lines = []
        for name, method in numbers.METHODS.items():
            worst: dict[int, dict[int, float]] = {n: {} for n in sizes}
            for row in rows:
                if row["method"] == name and (row["interval"] == "U(0, 1)") == trained_on:
                    of_size = worst[row["n"]]
                    of_size[row["seed"]] = max(row["any"], of_size.get(row["seed"], 0.0))
            if any(worst.values()):
                lines.append([method.title, *(spread(list(worst[n].values()), 3) for n in sizes)])
        parts.append(table([f"{_MEASURES['any']} {title}", *(f"n = {n}" for n in sizes)], lines))
    return "\n\n".join(parts)


def digits_markdown(records: Sequence[Record]) -> str:
    """Tables of the shares of fully right test sets and of right positions, with the temperatures that were chosen."""
    done = [record for record in records if record["status"] == "done"]
    sizes = sorted({record["n"] for record in done})
    parts = []
    for column, title in (("test_sets", "fully right sets"), ("test_positions", "right positions")):
        lines = []
        for name, method in digits.METHODS.items():
            own = [record for record in done if record["method"] == name]
            if own:
                temperature = f"{own[0]['temperature']:g}"
                cells = [spread([record[column] for record in own if record["n"] == n], 3) for n in sizes]
                lines.append([method.title, temperature, *cells])
        if column == "test_sets":
            ceiling = [f"{digits.inverse_ceiling(n):.3f}" for n in sizes]
            lines.append(["(the most against the inverse target)", "", *ceiling])
        parts.append(table([title, "temperature", *(f"n = {n}" for n in sizes)], lines))
    return "\n\n".join(parts)


def draw_numbers(path: Path, records: Sequence[Record]) -> None:
    """Median share of lists with any error, methods by intervals, a panel for each length."""
    rows = numbers_rows(records)
    sizes = sorted({row["n"] for row in rows})
    names = [name for name in numbers.METHODS if any(row["method"] == name for row in rows)]
    intervals = [f"U({low}, {high})" for low, high in numbers.INTERVALS]
    figure = Figure(figsize=(3.5 + 2.6 * len(sizes), 1.6 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for n, panel in zip(sizes, panels, strict=True):
        shares = np.full((len(names), len(intervals)), np.nan)
        for i, name in enumerate(names):
            for j, interval in enumerate(intervals):
                own = [r["any"] for r in rows if (r["method"], r["n"], r["interval"]) == (name, n, interval)]
                if own:
                    shares[i, j] = statistics.median(own)
        image = panel.imshow(shares, vmin=0, vmax=1, cmap="magma_r", aspect="auto")
        panel.set_title(f"n = {n}")
        panel.set_facecolor("lightgray")  # not trained for
        panel.set_xticks(range(len(intervals)), intervals, rotation=90)
        panel.set_yticks(range(len(names)), [numbers.METHODS[name].title for name in names])
    figure.colorbar(image, ax=list(panels), label="lists with any error")
    figure.savefig(path, dpi=120)


def draw_sorted(path: Path, sorters: Mapping[str, Sorter], n: int, scale: int, seed: int) -> None:
    """A test set as it comes; each method's soft matrix, and the images in its order, wrong ones in a red frame."""
    images, values = digits.draw_sets("test", 1, n, scale, torch.Generator().manual_seed(seed))
    truth = values[0].sort().values.tolist()
    columns = 1 + 2 * len(sorters)
    figure = Figure(figsize=(1.9 * columns, 0.6 * n + 0.9), layout="constrained")
    grid = figure.add_gridspec(n, columns)

    def column(place: int, order: Sequence[int], title: str, expected: Sequence[int]) -> None:
        for row, item in enumerate(order):
            panel = figure.add_subplot(grid[row, place])
            panel.imshow(images[0, item, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
            if int(values[0, item]) != expected[row]:
                panel.spines[:].set(color="red", linewidth=2)
            if row == 0:
                panel.set_title(title, fontsize=8)

    column(0, range(n), "as they come", values[0].tolist())
    for k, (name, sorter) in enumerate(sorters.items()):
        device = next(sorter.parameters()).device
        with torch.no_grad():
            log_p = sorter.log_p(images.to(device)).cpu()
        soft = log_p.exp().reshape(-1, n, n)[0]
        panel = figure.add_subplot(grid[:, 1 + 2 * k])
        panel.imshow(soft.numpy(), vmin=0, vmax=1, cmap="magma_r")
        panel.set_title(textwrap.fill(digits.METHODS[name].title, 28), fontsize=8)
        panel.set_xlabel("position", fontsize=8)
        panel.set_xticks([])
        panel.set_yticks([])
        order = sorter.solve(images.to(device))[0].argmax(-2).tolist()
        column(2 + 2 * k, order, "sorted", truth)
    figure.savefig(path, dpi=120)

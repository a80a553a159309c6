"""The tables and the figure of ``benchmarks/sinkhorn.py``, from the rows of its csv."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import peers
from PIL import Image  # matplotlib needs it

mpl.use("Agg")

import matplotlib.pyplot as plt

LIMITS = ("exp", "P^T P", "Cholesky")
KINDS = {"forward": "forward", "backward": "forward + backward"}
BAD_GRADIENT = 1e-2  # a gradient that is off by more, relative to its largest entry, is printed with its error
MEMORY_LIMIT = 12.0

Cells = dict[tuple[int, float, str, str, str], Any]  # n, temperature, dtype, kind, method -> row


def timed(rows: Iterable[Any]) -> Cells:
    """The rows that have a time in the grid."""
    return {(r.n, r.temperature, r.dtype, r.kind, r.method): r for r in rows if r.kind in KINDS}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _error(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if math.isfinite(value) else str(value)


def _cell(row: Any, ours: Any) -> str:
    """``median ms, ratio to ours, marginal error``; see :func:`time_tables` for the marks."""
    if row is None:
        return "-"
    if row.median_ms == "":
        return row.remark
    if not math.isfinite(row.marginal_error):
        return "failed: NaN"
    parts = [_number(row.median_ms)]
    if ours is not None and ours.median_ms != "":
        parts.append(f"{_number(row.median_ms / ours.median_ms)}x")
    parts.append(_error(row.marginal_error))
    if row.gradient_gap != "" and not row.gradient_gap <= BAD_GRADIENT:
        parts.append(f"gradient off {_error(row.gradient_gap)}")
    fixed = row.method in (peers.SWEEPS, "geomloss")
    return (">" if not row.converged and not fixed else "") + ", ".join(parts) + ("" if row.converged else " *")


def time_tables(cells: Cells) -> str:
    """One table per dtype and pass."""
    text = []
    for dtype in sorted({key[2] for key in cells}, reverse=True):
        for kind, title in KINDS.items():
            here = {key: row for key, row in cells.items() if key[2] == dtype and key[3] == kind}
            names = [name for name in peers.NAMES if any(key[4] == name for key in here)]
            if not names:
                continue
            table = [["n x batch", "tau", *names]]
            for n, t in sorted({key[:2] for key in here}, key=lambda nt: (nt[0], -nt[1])):
                row = [here.get((n, t, dtype, kind, name)) for name in names]
                batch = next(r.batch for r in row if r is not None)
                ours = here.get((n, t, dtype, kind, peers.OURS))
                table.append([f"{n} x {batch}", f"{t:g}", *(_cell(r, ours) for r in row)])
            text.append(f"### {title}, {dtype}\n\n{markdown(table)}")
    spreads = [r.max_ms / r.min_ms for r in cells.values() if r.calls != "" and r.calls > 1]
    spread = f" The slowest call took {median(spreads):.2f} times the fastest in the median cell." if spreads else ""
    legend = (
        f"A cell: median ms of the batch, ratio to `{peers.OURS}`, marginal error. `*`: the error is above the target "
        "(1e-6 in float64, 1e-5 in float32). `>`: stopped at its cap, so that time and ratio are lower bounds." + spread
    )
    return "\n\n".join([legend, *text])


def limits_table(rows: Sequence[Any], cells: Cells) -> str:
    """What the machine needs for the operations that this library is made of, and how many Cholesky times ours takes."""
    found = {(r.n, r.method): r for r in rows if r.kind == "limits" and r.median_ms != ""}
    ours = {key: row for key, row in cells.items() if key[2:] == ("float64", "backward", peers.DEFAULT)}
    temperatures = sorted({key[1] for key in ours}, reverse=True)
    table = [["n x batch", *(f"{name} ms" for name in LIMITS), *(f"`{peers.DEFAULT}` at tau = {t:g}" for t in temperatures)]]
    for n in sorted({n for n, _ in found}):
        limits = [found.get((n, name)) for name in LIMITS]
        row = [f"{n} x {next(r.batch for r in limits if r is not None)}"]
        row += ["-" if r is None else _number(r.median_ms) for r in limits]
        for t in temperatures:
            cell, unit = ours.get((n, t, "float64", "backward", peers.DEFAULT)), found.get((n, "Cholesky"))
            there = cell is not None and cell.median_ms != "" and unit is not None
            row.append(f"{_number(cell.median_ms / unit.median_ms)}" if there else "-")
        table.append(row)
    note = "Float64, the whole batch; the last columns are forward + backward over the time of one Cholesky factorization."
    return f"### Limits of the machine\n\n{note}\n\n{markdown(table)}"


def memory_table(rows: Sequence[Any]) -> str:
    """Peak memory per entry of the input."""
    found = {(r.n, r.dtype, r.method): r for r in rows if r.kind == "memory"}
    names = [name for name in peers.NAMES if any(key[2] == name for key in found)]
    table = [["n", "dtype", *names]]
    for n, dtype in sorted({key[:2] for key in found}, key=lambda key: (key[1] == "float32", key[0])):
        row = [f"{n}", dtype]
        for name in names:
            cell = found.get((n, dtype, name))
            values = [] if cell is None else [x for x in (cell.memory, cell.memory_torch) if x != ""]
            row.append(" / ".join(_number(max(x, 0)) for x in values) or ("-" if cell is None else cell.remark))
        table.append(row)
    note = (
        "Forward + backward, beyond the input, in numbers of the input's dtype per entry of the input: growth of the "
        "process / of what torch allocates. The first has noise of about one, and is all there is for jax."
    )
    return f"### Peak memory\n\n{note}\n\n{markdown(table)}"


def _ratios(cells: Cells, over: str, under: str, kind: str, where: Callable[[int, float], bool]) -> list[tuple[float, bool]]:
    """Time of one method over that of another where both have one, and whether it is only a lower bound."""
    found = []
    for (n, t, dtype, k, name), row in cells.items():
        other = cells.get((n, t, dtype, k, under))
        if (name, k) != (over, kind) or not where(n, t) or other is None or "" in (row.median_ms, other.median_ms):
            continue
        if math.isfinite(row.marginal_error):
            found.append((row.median_ms / other.median_ms, not row.converged))
    return found


def _at_least(ratios: Sequence[tuple[float, bool]], least: float) -> str:
    """Reached in how many cells; a lower bound below the least decides nothing."""
    reached = sum(ratio >= least for ratio, _ in ratios)
    if reached == len(ratios):
        return "reached"
    open_ = sum(bound and ratio < least for ratio, bound in ratios)
    verdict = "not reached" if reached + open_ < len(ratios) else "undecided"
    return f"{verdict}: {reached} of {len(ratios)} cells" + (f", {open_} stopped at the cap below it" if open_ else "")


def summary_table(rows: Sequence[Any], cells: Cells) -> str:
    """The ratios that are to be reached, over all sizes and both dtypes."""
    table = [["against", "pass", "where", "to reach", "worst [median, best]", "verdict"]]

    def add(against: str, kind: str, where: str, goal: str, values: Sequence[float], verdict: str) -> None:
        values = sorted(values)
        spread = f"{_number(values[0])} [{_number(median(values))}, {_number(values[-1])}]"
        table.append([against, KINDS[kind], where, goal, spread, verdict])

    for where, most, inside in (
        ("tau >= .5, n >= 30", 1.0, lambda n, t: t >= 0.5 and n >= 30),
        ("tau = .1, n <= 30", 1.5, lambda n, t: t == 0.1 and n <= 30),
    ):
        for ours in (peers.DEFAULT, peers.OURS):
            values = [-ratio for ratio, _ in _ratios(cells, ours, peers.SWEEPS, "backward", inside)]
            if values:
                shown = sorted((-v for v in values), reverse=True)
                met = sum(v <= most for v in shown)
                verdict = "reached" if met == len(shown) else f"not reached: {met} of {len(shown)} cells"
                spread = f"{_number(shown[0])} [{_number(median(shown))}, {_number(shown[-1])}]"
                goal = f"`{ours}` at most {most:g}x"
                table.append([peers.SWEEPS, KINDS["backward"], where, goal, spread, verdict])
    goals = dict.fromkeys(peers.POT, (4.0, 30.0, 300.0)) | {peers.OTT: (2.0, 20.0, 100.0)}
    for name, least in goals.items():
        for kind in KINDS:
            for i, where in enumerate(("tau = 1", "tau = .5", "tau <= .2")):
                ratios = _ratios(cells, name, peers.OURS, kind, lambda _, t, i=i: (t == 1, t == 0.5, t <= 0.2)[i])
                if ratios:
                    verdict = _at_least(ratios, least[i])
                    add(name, kind, where, f"at least {least[i]:g}x", [ratio for ratio, _ in ratios], verdict)
    for kind in KINDS:
        exponents = []
        for (n, t, dtype, k, name), large in cells.items():
            small = cells.get((279, t, dtype, k, name))
            if (n, name, k) != (1000, peers.DEFAULT, kind) or small is None or "" in (small.median_ms, large.median_ms):
                continue
            growth = large.median_ms / large.batch / (small.median_ms / small.batch)
            exponents.append(math.log(growth) / math.log(1000 / 279))
        if exponents:
            met = sum(exponent <= 3 for exponent in exponents)
            verdict = "reached" if met == len(exponents) else f"not reached: {met} of {len(exponents)} cells"
            spread = f"{max(exponents):.2f} [{median(exponents):.2f}, {min(exponents):.2f}]"
            table.append(["itself", KINDS[kind], "n = 279 to 1000", "exponent at most 3", spread, verdict])
    for dtype in ("float64", "float32"):
        seen = [max(x for x in (r.memory, r.memory_torch) if x != "") for r in rows if _has_memory(r, dtype)]
        if seen:
            verdict, goal = "reached" if max(seen) <= MEMORY_LIMIT else "not reached", f"at most {MEMORY_LIMIT:g} numbers"
            spread = f"{max(seen):.1f} [{median(seen):.1f}, {min(seen):.1f}]"
            table.append(["memory", KINDS["backward"], f"{dtype}, all n", goal, spread, verdict])
    return f"### To reach\n\n{markdown(table)}"


def _has_memory(row: Any, dtype: str) -> bool:
    found = row.kind == "memory" and row.method == peers.DEFAULT and row.dtype == dtype
    return found and (row.memory != "" or row.memory_torch != "")


def full(rows: Sequence[Any]) -> str:
    """Everything that there are rows for."""
    cells = timed(rows)
    text = [time_tables(cells), summary_table(rows, cells)] if cells else []
    kinds = {r.kind for r in rows}
    text += [limits_table(rows, cells)] if "limits" in kinds else []
    text += [memory_table(rows)] if "memory" in kinds else []
    return "\n\n".join(text) + "\n"


STYLES = dict(
    zip(
        peers.NAMES,
        (
            *(("#08519c", "o", 2.4), ("#3182bd", "s", 1.8), ("#6baed6", "D", 1.4), ("#525252", "X", 1.6)),
            *(("#a63603", "^", 1.2), ("#e6550d", "v", 1.2), ("#fd8d3c", "<", 1.2), ("#fdae6b", ">", 1.2)),
            *(("#31a354", "P", 1.2), ("#756bb1", "*", 1.4), ("#c51b8a", "h", 1.2)),
        ),
        strict=True,
    )
)


def draw(rows: Sequence[Any], path: Path) -> None:
    """Time against temperature, a panel for each n: float64 and forward + backward where there are such cells."""
    cells = {key: row for key, row in timed(rows).items() if row.median_ms != "" and math.isfinite(row.marginal_error)}
    if not cells:
        return
    dtype = max(key[2] for key in cells)
    kind = min(key[3] for key in cells)  # "backward" before "forward"
    here = {(key[0], key[1], key[4]): row for key, row in cells.items() if key[2:4] == (dtype, kind)}
    sizes = sorted({key[0] for key in here})
    temperatures = sorted({key[1] for key in here})
    lines = -(-len(sizes) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(12, 3.1 * lines + 1), sharex=True, squeeze=False)
    drawn: dict[str, None] = {}  # names, in order
    for axis, n in zip(axes.flat, sizes, strict=False):
        for name, (color, marker, width) in STYLES.items():
            points = sorted((key[1], row) for key, row in here.items() if (key[0], key[2]) == (n, name))
            if not points:
                continue
            x, y = [t for t, _ in points], [row.median_ms for _, row in points]
            axis.plot(x, y, color=color, lw=width, zorder=2 + width)
            drawn[name] = None
            for (t, row), ms in zip(points, y, strict=True):
                fill = color if row.converged else "white"
                axis.plot(t, ms, marker, mfc=fill, mec=color, ms=5.5, zorder=3 + width)
        axis.set(
            xscale="log", yscale="log", title=f"n = {n}, batch of {next(r.batch for k, r in here.items() if k[0] == n)}"
        )
        axis.grid(alpha=0.3, which="major")
        axis.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
        axis.minorticks_off()
        axis.xaxis.set_tick_params(labelbottom=True)
    for axis in axes.flat[len(sizes) :]:
        axis.set_axis_off()
    for axis in axes.flat[: len(sizes)]:
        axis.set_xlabel("temperature")
    for axis in axes[:, 0]:
        axis.set_ylabel("ms, whole batch")
    handles = [plt.Line2D([], [], c=STYLES[k][0], marker=STYLES[k][1], lw=STYLES[k][2]) for k in drawn]
    figure.suptitle(f"{KINDS[kind]}, {dtype}; hollow: marginal error above the target, often a lower bound of the time")
    figure.legend(handles, list(drawn), loc="lower center", ncols=min(6, len(drawn)), frameon=False)
    figure.tight_layout(rect=(0, 0.07 if lines > 1 else 0.14, 1, 1))
    figure.savefig(path, dpi=90)
    plt.close(figure)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a quarter of the size

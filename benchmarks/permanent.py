"""Times the exact log-permanent, its gradient, marginals and samples, with memory, beside Ryser's formula and Pyro.

Standard normal logits in float64, seed 0. The recursion of ``pyro_gs`` takes n 2^n / 2 multiplications for a permanent, so
the last table fits time to a power of n 2^n. Rivals: Ryser's inclusion-exclusion (as many additions and multiplications,
but with signs), with its error, and ``OneOneMatching`` of Pyro, which lists all permutations. Memory is that of a process
for each cell. Run ``python benchmarks/permanent.py --help`` for the options and see ``benchmarks/README.md`` for figures.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from matching import describe_machine, table
from memory import peak_of_process, run_apart
from torch import Tensor

from pyro_gs import GibbsPermutation, log_permanent, log_sinkhorn
from pyro_gs.ops.subsets import levels, moves

SIZES, BATCHES = [5, 10, 15, 20], [1, 100]
LISTED = [5, 8]  # rows, where all permutations are listed
RYSER_FROM = 10
SLOW_S = 5.0  # a call that takes longer is not repeated
SHORT_S = 0.2  # spent on the repetitions of a short call
AT_ONCE = 2**18  # sums of Ryser's formula at once
WIDTH = 50.0  # nats between the smallest and the largest of the hard logits
SEEDS = 5  # for errors


def with_gradient(logits: Tensor) -> Tensor:
    """The gradient of the log-permanents."""
    x = logits.clone().requires_grad_()
    log_permanent(x).sum().backward()
    assert x.grad is not None
    return x.grad


def ryser(logits: Tensor) -> Tensor:
    """Permanents of ``exp(logits)``, shape (b,), by inclusion-exclusion over the sets of columns.

    Sums over sets are made by doubling, which subtracts nothing, unlike a Gray code; only the last sum has signs.
    """
    n = logits.shape[-1]
    sign = torch.tensor([(-1.0) ** n], dtype=logits.dtype)
    for _ in range(n):
        sign = torch.cat([sign, -sign])
    found = []
    for part in logits.exp().split(max(1, AT_ONCE >> n)):
        product = part.new_ones(len(part), len(sign))
        for row in part.unbind(1):
            sums = part.new_zeros(len(part), 1)
            for entry in row.unbind(-1):
                sums = torch.cat([sums, sums + entry[:, None]], 1)
            product *= sums
        found.append(product @ sign)
    return torch.cat(found)


def listed(logits: Tensor) -> Tensor:
    """Log-permanents by ``OneOneMatching``, item by item."""
    return torch.stack([dist.OneOneMatching(x).log_partition_function for x in logits])


OURS: dict[str, Callable[[Tensor], Tensor]] = {
    "log_permanent": log_permanent,
    "log_permanent + gradient": with_gradient,
    "marginals": lambda x: GibbsPermutation(x).marginals(),
    "sample": lambda x: GibbsPermutation(x).sample(),
}
RIVALS: dict[str, Callable[[Tensor], Tensor]] = {"Ryser": ryser, "OneOneMatching": listed}
METHODS = OURS | RIVALS


@dataclass
class Row:
    """One line of the csv; empty where a column does not apply."""

    n: int
    batch: int
    method: str
    median_ms: float = 0.0
    min_ms: float = 0.0
    max_ms: float = 0.0
    timings: int = 0
    first_mb: float | str = ""
    later_mb: float | str = ""
    ratio: float = 1.0  # to log_permanent
    error: float | str = ""  # of the permanent, relative to ours, the largest of SEEDS matrices
    error_wide: float | str = ""  # the same for logits over WIDTH nats
    error_scaled: float | str = ""  # the same for those, scaled to be doubly stochastic first


def draw(n: int, batch: int) -> Tensor:
    """Standard normal logits."""
    return torch.from_numpy(np.random.default_rng(0).normal(size=(batch, n, n)))


def measure(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of calls after a warm-up call."""
    call()
    times: list[float] = []
    while not times or ((len(times) < repeats or sum(times) < 1e3 * SHORT_S) and times[0] < 1e3 * SLOW_S):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def ryser_error(logits: Tensor) -> float:
    """Largest error of Ryser's permanents relative to ours."""
    return float((ryser(logits) * (-log_permanent(logits)).exp() - 1).abs().max())


def time_cell(row: Row, repeats: int) -> None:
    """Fill in times and errors."""
    logits = draw(row.n, row.batch)
    times = measure(lambda: METHODS[row.method](logits), repeats)
    row.median_ms, row.min_ms, row.max_ms, row.timings = median(times), min(times), max(times), len(times)
    if row.method == "OneOneMatching":
        row.error = float((listed(logits) - log_permanent(logits)).expm1().abs().max())
    elif row.method == "Ryser" and row.batch == 1:
        rng = np.random.default_rng(1)
        row.error = ryser_error(torch.from_numpy(rng.normal(size=(SEEDS, row.n, row.n))))
        wide = torch.from_numpy(rng.uniform(-WIDTH / 2, WIDTH / 2, size=(SEEDS, row.n, row.n)))
        row.error_wide = ryser_error(wide)
        row.error_scaled = ryser_error(log_sinkhorn(wide))


def memory_of(method: str, n: int, batch: int) -> dict[str, float | None]:
    """Growth of the peak of this process in MB: by a first call, which builds its index tables, and by a later one."""
    call, logits = METHODS[method], draw(n, batch)
    call(logits[:, :2, :2])  # loads what is loaded late
    found: list[float] = []
    for _ in range(2):
        base = peak_of_process(reset=True)
        result = call(logits)
        found.append(max(0, peak_of_process() - base) / 1e6)
        del result
    return {"first": found[0], "later": found[1]}


def build_tables(n: int) -> tuple[float, float, float]:
    """Seconds to build the index tables of the recursion, seconds for those that marginals add, and MB of both."""
    levels.cache_clear()
    moves.cache_clear()
    start = time.perf_counter()
    one = levels((1,) * n, n)
    middle = time.perf_counter()
    two = moves(n)
    end = time.perf_counter()
    numbers = [t for step in (*one, *two) for t in step]
    return middle - start, end - middle, sum(t.numel() * t.element_size() for t in numbers) / 1e6


def growth(times: dict[int, float], sizes: Sequence[int]) -> float:
    """Exponent p of the least-squares fit of times to a multiple of ``(n 2^n)^p``."""
    work = [math.log(n * 2.0**n) for n in sizes]
    return float(np.polyfit(work, [math.log(times[n]) for n in sizes], 1)[0])


def cells(sizes: Sequence[int], batches: Sequence[int]) -> list[Row]:
    """What is measured, in order; ``log_permanent`` comes before its rivals."""
    rows = []
    for n in sizes:
        for batch in batches:
            rows += [Row(n, batch, method) for method in OURS]
            if n >= RYSER_FROM:
                rows.append(Row(n, batch, "Ryser"))
    for n in LISTED:
        if n not in sizes or 1 not in batches:
            rows.append(Row(n, 1, "log_permanent"))
        rows.append(Row(n, 1, "OneOneMatching"))
    return rows


def report(rows: Sequence[Row], sizes: Sequence[int], batches: Sequence[int]) -> str:
    """The tables."""
    found = {(row.n, row.batch, row.method): row for row in rows}
    parts = []
    for title, figures in {
        "ms of a call": "{median_ms:.3g}",
        "MB of a first call and of a later one": "{first_mb:.3g}, {later_mb:.3g}",
    }.items():
        lines = []
        for n, batch in itertools.product(sizes, batches):
            lines.append([str(n), str(batch), *(figures.format(**asdict(found[n, batch, method])) for method in OURS)])
        parts.append(f"{title}:\n\n" + table(["n", "batch", *OURS], lines))
    parts.append(rivals_table(rows))
    large = [n for n in sizes if n >= RYSER_FROM]
    if len(large) > 1:
        parts.append(growth_table(rows, large, batches))
    return "\n\n".join(parts)


def rivals_table(rows: Sequence[Row]) -> str:
    """Times of the rivals beside ours, and their errors."""
    ours = {(row.n, row.batch): row.median_ms for row in rows if row.method == "log_permanent"}
    lines = []
    for row in rows:
        if row.method in RIVALS:
            errors = [f"{x:.0e}" if isinstance(x, float) else "" for x in (row.error, row.error_wide, row.error_scaled)]
            figures = [f"{x:.3g}" for x in (row.median_ms, ours[row.n, row.batch], row.ratio)]
            lines.append([row.method, str(row.n), str(row.batch), *figures, *errors])
    head = ["rival", "n", "batch", "rival, ms", "log_permanent, ms", "ratio"]
    return table([*head, "error, N(0, 1)", f"error, {WIDTH:g} nats", f"error, {WIDTH:g} nats, scaled first"], lines)


def growth_table(rows: Sequence[Row], sizes: Sequence[int], batches: Sequence[int]) -> str:
    """Powers of n 2^n that times grow as, from size to size and over all."""
    ranges = [*itertools.pairwise(sizes), *([tuple(sizes)] if len(sizes) > 2 else [])]
    lines = []
    for method, batch in itertools.product(METHODS, batches):
        times = {row.n: row.median_ms for row in rows if (row.method, row.batch) == (method, batch)}
        if times.keys() >= set(sizes):
            lines.append([method, str(batch), *(f"{growth(times, part):.2f}" for part in ranges)])
    return table(["power of n 2^n", "batch", *("n = " + ", ".join(map(str, part)) for part in ranges)], lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="rows, at most 20 (default: 5 10 15 20)")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="matrices (default: 1 100)")
    parser.add_argument("--repeats", type=int, default=7, help="timings per cell (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "permanent.csv", help="the csv")
    parser.add_argument("--memory", nargs=3, metavar=("METHOD", "N", "BATCH"), help="one cell's memory, as json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        method, n, batch = args.memory
        print(json.dumps(memory_of(method, int(n), int(batch))))
        return 0
    lines = []
    for n in args.n:
        first, second, size = build_tables(n)
        lines.append([str(n), f"{1e3 * first:.3g}", f"{1e3 * second:.3g}", f"{size:.3g}"])
    print(table(["n", "index tables, ms", "those of marginals, ms", "both, MB"], lines) + "\n")
    rows = cells(args.n, args.batch)
    ours: dict[tuple[int, int], float] = {}
    for row in rows:
        time_cell(row, args.repeats)
        if row.method == "log_permanent":
            ours[row.n, row.batch] = row.median_ms
        row.ratio = row.median_ms / ours[row.n, row.batch]
        seen = run_apart(__file__, ["--threads", args.threads, "--memory", row.method, row.n, row.batch])
        row.first_mb, row.later_mb = float(seen["first"] or 0), float(seen["later"] or 0)
    print(report(rows, args.n, args.batch) + "\n")
    once = [f"{row.method}, n = {row.n}, batch {row.batch}" for row in rows if row.timings == 1]
    print(f"medians of {args.repeats} timings or more; run once, over {SLOW_S:g} s: {'; '.join(once) or 'none'}")
    print(describe_machine())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(field.name for field in fields(Row)), "threads", "torch"])
        for row in rows:
            values = [f"{x:.4g}" if isinstance(x, float) else x for x in asdict(row).values()]
            writer.writerow([*values, args.threads, torch.__version__])
    print(f"wrote {args.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

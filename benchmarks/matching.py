"""Times ``pyro_gs.matching`` beside a loop over scipy, lapx (or lap) and torch-linear-assignment, in one run.

Batches of square logits in float64, fixed seed: standard normal plus Gumbel noise, the same rounded to integers (ties),
and the same with 70% of the pairs forbidden. Every call starts from a tensor of logits on the host. The calls of a row
take turns, so that a busy machine slows all of them; a cell is the median with the fastest and the slowest. A second
table says how often a solver was wrong on inputs that are hard for one. Run ``python benchmarks/matching.py --help`` for
the options and see ``benchmarks/README.md`` for figures.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import pyro_gs

LOOP = "loop over scipy"
INPUTS = ("normal + Gumbel", "ties", "masked")
SHAPES = [(1, 5), (1024, 5), (1024, 20), (1, 100), (400, 100), (1, 279), (16, 279), (1, 1000)]
QUICK = [(1, 5), (6, 12)]
HARD = ("infeasible mask", "values of 1e300", "magnitudes 1e-10 to 1e10", "differences of 2e-16", "masked")
HARD_ITEMS = 50
SAMPLE_MS = 2.0  # a shorter call is repeated within one timing

Method = Callable[[Tensor], Tensor]  # logits (batch, n, n) -> column of every row, or permutation matrices


def scipy_loop(logits: Tensor) -> Tensor:
    """What one writes by hand."""
    return torch.stack([torch.from_numpy(linear_sum_assignment(x.numpy(), maximize=True)[1]) for x in logits])


def make_ours(lapx: bool) -> Method:
    """The public function, with its checks and the matrix that it returns; without lapx if so told."""
    module: Any = importlib.import_module("pyro_gs.ops.matching")

    def without(logits: Tensor) -> Tensor:
        saved, module._lapx_solver = module._lapx_solver, lambda: None
        try:
            return pyro_gs.matching(logits)
        finally:
            module._lapx_solver = saved

    return pyro_gs.matching if lapx else without


def make_batch(solver: Callable[..., Any], **options: Any) -> Method:
    """A batch function of lapx; they minimise and return a list of rows and a list of columns."""

    def call(logits: Tensor) -> Tensor:
        _, columns = solver(-logits.numpy(), return_cost=False, **options)
        return torch.from_numpy(np.stack(columns)).long()

    return call


def make_loop(solver: Callable[..., Any]) -> Method:
    """``lapjv`` of lap or lapx, item by item."""

    def call(logits: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([solver(cost, return_cost=False)[0] for cost in -logits.numpy()])).long()

    return call


def methods(threads: int) -> dict[str, Method]:
    """The columns of the table; prints a line for every peer that is left out."""
    found: dict[str, Method] = {LOOP: scipy_loop, "matching, scipy": make_ours(False)}
    lap: Any = importlib.import_module("lap") if find_spec("lap") else None
    if hasattr(lap, "lapjvr_batch"):
        found["matching, lapx"] = make_ours(True)
        found["lapx lapjvr_batch"] = make_batch(lap.lapjvr_batch, n_threads=threads)
        found["lapx lapjvs_batch"] = make_batch(lap.lapjvs_batch, n_threads=threads, prefer_float32=False)
        found["lapx lapjvx_batch"] = make_batch(lap.lapjvx_batch, n_threads=threads)
        print("skipped lap: lapx is installed in its place")
    elif lap is not None:
        found["lap lapjv"] = make_loop(lap.lapjv)
        print("skipped lapx: lap is installed in its place")
    else:
        print("skipped lapx: not installed; pip install 'pyro-gs[bench]'")
    if find_spec("torch_linear_assignment"):
        solver = importlib.import_module("torch_linear_assignment").batch_linear_assignment
        found["torch-linear-assignment"] = lambda logits: solver(-logits)
    else:
        print("skipped torch-linear-assignment: not installed; pip install 'pyro-gs[bench]'")
    return found


def draw(kind: str, batch: int, n: int, rng: np.random.Generator) -> Tensor:
    """Logits of one of the kinds in ``INPUTS`` and ``HARD``."""
    x: np.ndarray = rng.normal(size=(batch, n, n))
    allowed = rng.random(x.shape) < 0.3
    for item in allowed:
        item[np.arange(n), rng.permutation(n)] = True
    if kind in INPUTS:
        x += rng.gumbel(size=x.shape)
    if kind == "ties":
        x = np.round(x)
    elif kind == "masked":
        x[~allowed] = -np.inf
    elif kind == "infeasible mask":
        x[:, : n // 2 + 1, n // 2 :] = -np.inf  # n // 2 + 1 rows share n // 2 columns
    elif kind == "values of 1e300":
        x *= 1e300
    elif kind == "magnitudes 1e-10 to 1e10":
        x *= 10.0 ** rng.integers(-10, 11, x.shape)
    elif kind == "differences of 2e-16":
        x = 1 + rng.integers(0, 5, x.shape) * 2.0**-52
    return torch.from_numpy(x)


def weights(logits: Tensor, result: Tensor) -> list[Fraction | None]:
    """Total weight of every item, without rounding; None for a forbidden pair and for what is no permutation."""
    index = result.argmax(-1) if result.dim() == logits.dim() else result
    picked = logits.gather(-1, index.clamp_min(0)[..., None])[..., 0]
    good = (index.sort(-1).values == torch.arange(index.shape[-1])).all(-1) & picked.isfinite().all(-1)
    rows = zip(picked.tolist(), good.tolist(), strict=True)
    return [sum(map(Fraction, row), Fraction()) if ok else None for row, ok in rows]


def agree(found: list[Fraction | None], best: list[Fraction | None]) -> bool:
    """Whether the weights are equal but for rounding."""
    return all(a is not None and b is not None and abs(a - b) <= 1e-12 * abs(b) for a, b in zip(found, best, strict=True))


def verdicts(found: dict[str, Method], kind: str) -> list[str]:
    """How the methods do on hard input; the best weight of an item is the largest that one of them finds."""
    rng = np.random.default_rng(1)
    counts = {name: Counter[str]() for name in found}
    for number in range(HARD_ITEMS):
        logits = draw(kind, 1, 4 + number % 20, rng)
        totals: dict[str, Fraction] = {}
        for name, method in found.items():
            try:
                weight = weights(logits, method(logits))[0]
            except ValueError:
                counts[name]["raised"] += 1
                continue
            if weight is None:
                counts[name]["forbidden pair or no permutation"] += 1
            else:
                totals[name] = weight
        for name, weight in totals.items():
            counts[name]["not the best"] += weight < max(totals.values())
    return ["; ".join(f"{text} {count}" for text, count in c.items() if count) or "best" for c in counts.values()]


def measure(found: dict[str, Method], logits: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of a call of every method, ``repeats`` times; the methods take turns."""
    number = {}
    for name, method in found.items():
        method(logits)
        start = time.perf_counter()
        method(logits)
        number[name] = max(1, min(500, int(SAMPLE_MS / 1e3 / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, method in found.items():
            start = time.perf_counter()
            for _ in range(number[name]):
                method(logits)
            times[name].append(1e3 * (time.perf_counter() - start) / number[name])
    return times


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows as a markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def describe_machine() -> str:
    """Processor, cores, threads and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = [f"{name} {version(name)}" for name in ("torch", "numpy", "scipy")]
    if find_spec("lap"):
        lap = importlib.import_module("lap")  # a module of lap and of lapx
        packages.append(f"{'lapx' if hasattr(lap, 'lapjvr_batch') else 'lap'} {lap.__version__}")
    if find_spec("torch_linear_assignment"):
        packages.append(f"torch-linear-assignment {version('torch-linear-assignment')}")
    return (
        f"machine: {model or platform.machine()}; {os.cpu_count()} cores, {usable} usable by this run; "
        f"{torch.get_num_threads()} threads\n"
        f"versions: pyro_gs {pyro_gs.__version__}, Python {platform.python_version()}, {', '.join(packages)}"
    )


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, but is {text!r}")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=_positive, help="timings per cell (default: 7, with --quick 2)")
    parser.add_argument("--threads", type=_positive, help="threads and cores for every library (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="smoke test; writes figures only where --out says")
    parser.add_argument("--out", type=Path, help="where the csv goes (default: results/matching.csv beside the script)")
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (2 if args.quick else 7)
    if args.out is None and not args.quick:
        args.out = Path(__file__).parent / "results" / "matching.csv"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    found = methods(torch.get_num_threads())
    rng = np.random.default_rng(0)
    lines, rows = [], []
    for kind in INPUTS:
        for batch, n in QUICK if args.quick else SHAPES:
            logits = draw(kind, batch, n, rng)
            best = weights(logits, scipy_loop(logits))
            times = measure(found, logits, args.repeats)
            cells = []
            for name, method in found.items():
                agrees = agree(weights(logits, method(logits)), best)
                ms = median(times[name])
                ratio = ms / median(times[LOOP])
                figures = [ms, min(times[name]), max(times[name]), ratio]
                rows.append([kind, batch, n, name, *(f"{x:.4g}" for x in figures), len(times[name]), agrees])
                span = f"{ms:.3g} [{figures[1]:.3g}, {figures[2]:.3g}]"
                cells.append(span + ("" if name == LOOP else f" x{1 / ratio:.1f}") + ("" if agrees else " (not the best)"))
            lines.append([kind, str(batch), str(n), *cells])
    print(f"ms, {args.repeats} timings per cell: median [fastest, slowest] x times as fast as the loop; float64, seed 0\n")
    print(table(["logits", "batch", "n", *found], lines) + "\n")
    print(f"hard input, {HARD_ITEMS} matrices of each kind, n from 4 to 23:\n")
    print(table(["input", *found], [[kind, *verdicts(found, kind)] for kind in HARD]) + "\n")
    print(describe_machine())
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            header = "logits batch n method median_ms min_ms max_ms ratio timings agrees threads torch"
            writer.writerow(header.split())
            writer.writerows([*row, torch.get_num_threads(), torch.__version__] for row in rows)
        print(f"wrote {args.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Times the converged Sinkhorn operator of ``pyro_gs`` beside 20 unrolled sweeps, POT, geomloss, ott-jax and pygmtools.

A grid of sizes, temperatures and dtypes, forward alone and forward + backward, with the peak memory of each method in a
process of its own and the time of the operations that bound this library. Run ``python benchmarks/sinkhorn.py --help``
for the options and see ``benchmarks/README.md`` for what the columns are, and for figures.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import packages_distributions, version
from pathlib import Path
from statistics import median
from typing import Any

import memory
import peers
import report
import torch
from torch import Tensor

import pyro_gs

SIZES, TEMPERATURES = [5, 10, 30, 100, 279, 1000], [1.0, 0.5, 0.2, 0.1, 0.05, 0.01]
ENTRIES, QUICK_ENTRIES = 2e5, 2e3  # of a batch, as near as a whole number of matrices comes
SLOW_S, SLOW_UNCONVERGED_S = 5.0, 1.0  # a call that takes longer is not repeated
PASSES = ("forward", "backward", "memory", "limits")


@dataclass
class Row:
    """One line of the csv; empty where a column does not apply."""

    n: int
    batch: int
    temperature: float | str
    dtype: str
    kind: str  # one of PASSES; "backward" is forward + backward
    method: str
    median_ms: float | str = ""
    min_ms: float | str = ""
    max_ms: float | str = ""
    calls: int | str = ""
    items: int | str = ""  # matrices that a call did; times are scaled to the batch
    marginal_error: float | str = ""
    converged: bool | str = ""
    gradient_gap: float | str = ""
    memory: float | str = ""  # numbers per entry of the input, seen by the process
    memory_torch: float | str = ""  # the same, seen by torch
    remark: str = ""
    device: str = ""
    threads: int | str = ""

    def key(self) -> tuple[str, ...]:
        """What a resumed run compares."""
        return tuple(str(x) for x in (self.n, self.batch, self.temperature, self.dtype, self.kind, self.method))


def measure(call: Callable[[], Any], repeats: int, device: str, converged: Callable[[Any], bool]) -> tuple[list[float], Any]:
    """Milliseconds of every call after a warm-up, and the result; a slow warm-up is the only call and counts."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def timed() -> tuple[float, Any]:
        synchronize()
        start = time.perf_counter()
        result = call()
        synchronize()
        return time.perf_counter() - start, result

    first, result = timed()
    if first > (SLOW_S if converged(result) else SLOW_UNCONVERGED_S):
        return [1e3 * first], result
    return [1e3 * timed()[0] for _ in range(repeats)], result


def marginal_error(p: Tensor) -> float:
    """Largest error of a row or column sum; NaN if there is one."""
    return max(float((p.double().sum(dim) - 1).abs().max()) for dim in (-1, -2))


def time_method(row: Row, method: peers.Method, problem: peers.Problem, repeats: int, reference: Tensor | None) -> None:
    """Fill a row with the times and the errors of a method."""

    def is_converged(result: peers.Result) -> bool:
        return marginal_error(result[0]) <= problem.target

    times, (p, grad) = measure(method(problem), repeats, row.device, is_converged)
    scale = row.batch / len(p)
    row.median_ms, row.min_ms, row.max_ms = (float(f"{scale * f(times):.4g}") for f in (median, min, max))
    row.calls, row.items = len(times), len(p)
    row.marginal_error, row.converged = float(f"{marginal_error(p):.2e}"), is_converged((p, grad))
    if grad is not None and reference is not None:
        exact = reference[: len(grad)]
        row.gradient_gap = float(f"{float((grad.double() - exact).abs().max() / exact.abs().max()):.1e}")


def exact_gradient(problem: peers.Problem) -> Tensor:
    """The gradient in float64 at the tightest tolerance, to compare with; not timed."""
    x = problem.logits.double().clone().requires_grad_()
    p = pyro_gs.sinkhorn(x, temperature=problem.temperature)
    return torch.autograd.grad((p * problem.weights.double()).sum(), x)[0]


def time_limit(row: Row, problem: peers.Problem, repeats: int) -> None:
    """Fill a row with the time of one operation over the batch, in float64."""
    p = problem.logits.softmax(-1)
    definite = torch.eye(problem.n, dtype=p.dtype, device=p.device) + p.mT @ p
    operations = {
        "exp": lambda: problem.logits.exp(),
        "P^T P": lambda: p.mT @ p,
        "Cholesky": lambda: torch.linalg.cholesky_ex(definite),
    }
    times, _ = measure(operations[row.method], repeats, row.device, lambda _: True)
    row.median_ms, row.min_ms, row.max_ms = (float(f"{f(times):.4g}") for f in (median, min, max))
    row.calls = len(times)


def planned(args: argparse.Namespace, names: Sequence[str]) -> Iterator[Row]:
    """The rows of the run, in order, with nothing measured yet."""
    for n in args.n:
        batch = max(1, round(args.entries / n**2))
        about = {"device": args.device, "threads": torch.get_num_threads()}
        if "limits" in args.passes:
            yield from (Row(n, batch, "", "float64", "limits", name, **about) for name in report.LIMITS)
        for dtype in args.dtypes:
            if "memory" in args.passes:
                yield from (Row(n, batch, memory.TEMPERATURE, dtype, "memory", name, **about) for name in names)
            for temperature in args.temperatures:
                for kind in PASSES[:2]:
                    for name in names if kind in args.passes else ():
                        if kind == "backward" or name not in peers.ONLY_BACKWARD:
                            yield Row(n, batch, temperature, dtype, kind, name, **about)


def run(args: argparse.Namespace, methods: dict[str, peers.Method], rows: list[Row], save: Callable[[Row], None]) -> None:
    """Measure every planned row that is not there yet."""
    done = {row.key() for row in rows}
    problem, cell, reference = None, None, None
    for row in planned(args, list(methods)):
        if row.key() in done:
            continue
        print(f"n {row.n}, temperature {row.temperature}, {row.dtype}, {row.kind}: {row.method}", file=sys.stderr)
        if cell != (row.n, row.dtype, row.temperature, row.kind):
            cell, backward = (row.n, row.dtype, row.temperature, row.kind), row.kind == "backward"
            options = {"backward": backward, "max_sweeps": max(10, int(args.max_work / (row.n**2 * row.batch)) // 10 * 10)}
            dtype = getattr(torch, row.dtype)
            problem = peers.make_problem(row.n, row.batch, dtype, row.device, row.temperature or 1.0, **options)
            reference = exact_gradient(problem) if backward else None
        try:
            if row.kind == "memory":
                seen = memory.in_own_process(row.method, row.n, row.batch, row.dtype, row.device)
                row.memory, row.memory_torch = ("" if x is None else round(x, 2) for x in (seen["process"], seen["torch"]))
            elif row.kind == "limits":
                time_limit(row, problem, args.repeats)
            else:
                time_method(row, methods[row.method], problem, args.repeats, reference)
        except Exception as error:  # one peer that fails must not end a run of hours
            row.remark = f"failed: {type(error).__name__}"
            print(f"{row.remark}: {str(error)[:200]}", file=sys.stderr)
        rows.append(row)
        save(row)


def read_csv(path: Path) -> list[Row]:
    """The rows of an earlier run."""
    if not path.exists():
        return []

    def convert(name: str, text: str) -> Any:
        if name in ("dtype", "kind", "method", "remark", "device") or not text:
            return text
        return text == "True" if name == "converged" else int(text) if name in ("n", "batch", "items") else float(text)

    with path.open(encoding="utf-8") as file:
        return [Row(**{k: convert(k, v) for k, v in row.items()}) for row in csv.DictReader(file)]


def append_csv(path: Path, row: Row) -> None:
    """One more line, with the header before the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def describe_machine(device: str) -> str:
    """Processor, cores, threads and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    installed = {name.lower() for names in packages_distributions().values() for name in names}
    wanted = ("torch", "numpy", "scipy", "POT", "geomloss", "pygmtools", "jax", "jaxlib", "ott-jax", "lineax")
    packages = [f"{name} {version(name)}" for name in wanted if name.lower() in installed]
    gpu = f"; {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return (
        f"machine: {model or platform.machine()}{gpu}; {os.cpu_count()} cores, {usable} usable by this run; "
        f"{torch.get_num_threads()} torch threads; device {device}\n"
        f"versions: pyro_gs {pyro_gs.__version__}, Python {platform.python_version()}, {', '.join(packages)}"
    )


def _at_least(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.lstrip("+-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, but is {text!r}")
        return int(text)

    return convert


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive finite number, but is {text!r}")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; exits with argparse's message on a bad one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--n", type=_at_least(2), nargs="+", metavar="N", help="rows and columns (default: 5 to 1000)")
    parser.add_argument("--temperatures", type=_positive, nargs="+", metavar="T", help="default: 1 to .01")
    parser.add_argument("--dtypes", nargs="+", choices=["float64", "float32"], help="default: both")
    parser.add_argument("--methods", nargs="+", choices=peers.NAMES, default=list(peers.NAMES), help="default: all")
    parser.add_argument("--passes", nargs="+", choices=PASSES, help="'backward' is forward + backward (default: all)")
    parser.add_argument("--repeats", type=_at_least(1), help="timed calls per cell (default: 7, with --quick 2)")
    parser.add_argument("--max-work", type=_positive, default=3e9, help="cap of a peer: n * n * batch * iterations")
    parser.add_argument("--threads", type=_at_least(1), help="cores for every library (default: as the system gives)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="small batches and no files but those asked for")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the csv and measure the others")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, help="the csv (default: results/sinkhorn.csv beside the script)")
    parser.add_argument("--figure", type=Path, help="the figure (default: results/sinkhorn.png beside the script)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device; use --device cpu")
    quick = args.quick
    args.n = args.n or ([5, 30] if quick else SIZES)
    args.temperatures = args.temperatures or ([1.0, 0.2] if quick else TEMPERATURES)
    args.dtypes = args.dtypes or (["float64"] if quick else ["float64", "float32"])
    args.passes = args.passes or (["forward", "backward", "limits"] if quick else list(PASSES))
    args.repeats = args.repeats or (2 if quick else 7)
    args.entries = QUICK_ENTRIES if quick else ENTRIES
    args.out = args.out or (None if quick else results / "sinkhorn.csv")
    args.figure = args.figure or (None if quick else results / "sinkhorn.png")
    if args.resume and args.out is None:
        parser.error("argument --resume: needs --out here, because --quick writes no csv by itself")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
        if hasattr(os, "sched_setaffinity"):  # the only limit that every library here obeys
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    rows = read_csv(args.out) if args.resume else []
    if args.out is not None and not args.resume:
        args.out.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the errors are in the table
        methods, skipped = peers.find_methods(args.methods, args.device)
        print("\n".join(skipped))
        run(args, methods, rows, lambda row: None if args.out is None else append_csv(args.out, row))
    print(report.full(rows))
    print(describe_machine(args.device))
    if args.figure is not None:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        report.draw(rows, args.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

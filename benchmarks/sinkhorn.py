"""Times the converged Sinkhorn operator of ``pyro_gs`` beside 20 unrolled sweeps, POT and ott-jax, in one run.

One matrix of logits (standard normal plus Gumbel noise, float64, fixed seed) per run, several temperatures. Every cell
is the median of some calls after a warm-up call, with the fastest and the slowest, and comes with the largest error of
a row or column sum of the matrix that the call returned. Run ``python benchmarks/sinkhorn.py --help`` for the options
and see ``benchmarks/README.md`` for figures.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import pyro_gs

TARGET = 1e-6  # largest error of a row or column sum that the compared solvers are asked for
SLOW_MS = 20_000.0  # a call that takes longer is not repeated
OURS, DEFAULT = "sinkhorn tol=1e-6", "sinkhorn default tol"
SKIPPED = "skipped {}: not installed; pip install 'pyro-gs[bench]'"

Result = tuple[Tensor, Tensor | None]  # the doubly stochastic matrix, and the gradient of the loss in the logits
Call = Callable[[], Result]
Maker = Callable[[Tensor, Tensor, float], tuple[Call, str]]  # logits, weights, temperature -> call and a remark


@dataclass
class Cell:
    """What was measured of one method at one temperature."""

    times: list[float]  # milliseconds of every timed call
    error: float  # largest of a row or column sum
    remark: str
    grad: Tensor | None  # None for a method that is timed forward only

    @property
    def median(self) -> float:
        """Median time in milliseconds."""
        return median(self.times)


def make_ours(operator: Callable[..., Tensor], *, log: bool = False, backward: bool = True, **options: Any) -> Maker:
    """A method of this library; the loss is ``(P * weights).sum()`` for every method that has a backward pass."""

    def make(logits: Tensor, weights: Tensor, temperature: float) -> tuple[Call, str]:
        def call() -> Result:
            x = logits.clone().requires_grad_(backward)
            p = operator(x, temperature=temperature, **options)
            p = p.exp() if log else p
            return p.detach(), torch.autograd.grad((p * weights).sum(), x)[0] if backward else None

        return call, ""

    return make


def make_pot(max_iterations: int) -> Maker:
    """POT in the log domain, forward only; on torch tensors, which take a quarter of the time of numpy arrays."""
    bregman = importlib.import_module("ot.bregman")

    def make(logits: Tensor, weights: Tensor, temperature: float) -> tuple[Call, str]:
        n = len(logits)
        uniform = torch.full_like(logits[0], 1 / n)
        # POT stops on the Euclidean norm of the column sums' errors, which bounds the largest one.
        options = {"stopThr": TARGET / n, "numItermax": max_iterations, "warn": False}
        return lambda: (n * bregman.sinkhorn_log(uniform, uniform, -logits, temperature, **options), None), "forward only"

    return make


def make_ott(max_iterations: int, device: str) -> Maker:
    """ott-jax in ``lse_mode`` with implicit differentiation, compiled before anything is timed.

    Raises:
        RuntimeError: jax has no such device.
    """
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_device", jax.devices({"cuda": "gpu"}.get(device, device))[0])
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)  # a failed linear solve is reported below
    geometry = importlib.import_module("ott.geometry.geometry").Geometry
    problem = importlib.import_module("ott.problems.linear.linear_problem").LinearProblem
    solver = importlib.import_module("ott.solvers.linear.sinkhorn").Sinkhorn

    def loss(x: Any, weights: Any, temperature: Any) -> tuple[Any, Any]:
        n = len(x)
        # Stops on the Euclidean norm of the errors, as POT does.
        solve = solver(lse_mode=True, threshold=TARGET / n, norm_error=2, max_iterations=max_iterations)
        p = n * solve(problem(geometry(cost_matrix=-x, epsilon=temperature))).matrix
        return (p * weights).sum(), p

    def to_torch(array: Any) -> Tensor:
        return torch.as_tensor(jax.device_get(array).copy(), device=device)

    def make(logits: Tensor, weights: Tensor, temperature: float) -> tuple[Call, str]:
        inputs = [jax.numpy.asarray(x.cpu().numpy()) for x in (logits, weights)] + [jax.numpy.asarray(temperature)]
        both = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*inputs).compile()
        forward = jax.jit(loss).lower(*inputs).compile()

        def call() -> Result:
            (_, p), grad = jax.block_until_ready(both(*inputs))
            return to_torch(p), to_torch(grad)

        def call_forward() -> Result:
            return to_torch(jax.block_until_ready(forward(*inputs))[1]), None

        try:
            call()
        except (RuntimeError, ValueError):
            return call_forward, "forward only: its implicit gradient failed"
        return call, ""

    return make


def methods(args: argparse.Namespace) -> dict[str, Maker]:
    """The columns of the table; prints a line for every peer that is left out."""
    found = {
        DEFAULT: make_ours(pyro_gs.sinkhorn),
        OURS: make_ours(pyro_gs.sinkhorn, tol=TARGET),
        f"{OURS}, forward": make_ours(pyro_gs.sinkhorn, tol=TARGET, backward=False),
        "log_sinkhorn default tol": make_ours(pyro_gs.log_sinkhorn, log=True),
        "20 unrolled sweeps": make_ours(pyro_gs.sinkhorn, num_iters=20),
    }
    if find_spec("ot"):
        found["POT sinkhorn_log"] = make_pot(args.max_iterations)
    else:
        print(SKIPPED.format("POT"))
    if find_spec("ott") and find_spec("jax"):
        try:
            found["ott-jax Sinkhorn"] = make_ott(args.max_iterations, args.device)
        except RuntimeError as error:
            print(f"skipped ott-jax: {error}")
    else:
        print(SKIPPED.format("ott-jax"))
    return found


def measure(call: Call, remark: str, repeats: int, device: str) -> Cell:
    """Times a call after a warm-up; a warm-up of over 20 s is the only call and counts."""
    synchronize: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def timed() -> tuple[float, Result]:
        synchronize()
        start = time.perf_counter()
        result = call()
        synchronize()
        return 1e3 * (time.perf_counter() - start), result

    first, (p, grad) = timed()
    slow = first > SLOW_MS
    times = [first] if slow else [timed()[0] for _ in range(repeats)]
    error = max(float((p.double().sum(dim) - 1).abs().max()) for dim in (0, 1))
    return Cell(times, error, "; ".join(filter(None, (remark, "run once" if slow else ""))), grad)


def gradient_gap(cell: Cell, reference: Cell) -> float:
    """Largest difference of two gradients over the largest entry of the reference; NaN without a gradient."""
    if cell.grad is None or reference.grad is None:
        return math.nan
    return float((cell.grad - reference.grad).abs().max() / reference.grad.abs().max())


def table(results: dict[tuple[float, str], Cell], temperatures: Sequence[float], names: Sequence[str]) -> str:
    """The figures as a markdown table: four rows per temperature, one column per method."""
    rows = [["temperature", "", *names], ["---"] * (len(names) + 2)]
    for t in temperatures:
        cells = [results[t, name] for name in names]
        spans = [f"{c.median:.1f} [{min(c.times):.1f}, {max(c.times):.1f}]" for c in cells]
        rows.append([f"{t:g}", "ms", *(f"{s} ({c.remark})" if c.remark else s for s, c in zip(spans, cells, strict=True))])
        rows.append(["", f"time / ({OURS})", *(f"{c.median / results[t, OURS].median:.2f}" for c in cells)])
        errors = (f"{c.error:.1e}" + (" (not converged)" if c.error > TARGET else "") for c in cells)
        rows.append(["", "marginal error", *errors])
        gaps = (gradient_gap(c, results[t, DEFAULT]) for c in cells)
        rows.append(["", "gradient off by", *("-" if math.isnan(gap) else f"{gap:.1e}" for gap in gaps)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_csv(path: Path, results: dict[tuple[float, str], Cell], args: argparse.Namespace) -> None:
    """One line per temperature and method."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = "n temperature method median_ms min_ms max_ms calls ratio marginal_error converged gradient_gap remark"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*header.split(), "device", "threads", "torch"])
        for (t, name), c in results.items():
            ratio = c.median / results[t, OURS].median
            times = [f"{ms:.4g}" for ms in (c.median, min(c.times), max(c.times))]
            gap = gradient_gap(c, results[t, DEFAULT])
            quality = [f"{c.error:.3e}", c.error <= TARGET, "" if math.isnan(gap) else f"{gap:.3e}", c.remark]
            about = [args.device, torch.get_num_threads(), torch.__version__]
            writer.writerow([args.n, t, name, *times, len(c.times), f"{ratio:.4g}", *quality, *about])


def describe_machine(device: str) -> str:
    """Processor, cores, threads and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    installed = {name.lower() for names in packages_distributions().values() for name in names}
    wanted = ("torch", "numpy", "scipy", "POT", "jax", "jaxlib", "ott-jax", "lineax")
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


def _temperature(text: str) -> float:
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
    parser.add_argument("--n", type=_at_least(2), help="rows and columns (default: 279, with --quick 60)")
    parser.add_argument("--temperatures", type=_temperature, nargs="+", default=[1.0, 0.5, 0.2, 0.1], metavar="T")
    parser.add_argument("--repeats", type=_at_least(1), help="timed calls per cell (default: 7, with --quick 2)")
    parser.add_argument("--threads", type=_at_least(1), help="cores for every library (default: as the system gives)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--max-iterations", type=_at_least(10), default=100_000, help="cap on the peers' sweeps")
    parser.add_argument("--quick", action="store_true", help="smoke test; writes figures only where --out says")
    parser.add_argument("--out", type=Path, help="where the csv goes (default: results/sinkhorn.csv beside the script)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device; use --device cpu")
    if args.max_iterations % 10:
        parser.error(f"argument --max-iterations: must be a multiple of 10, but is {args.max_iterations}")
    args.n = args.n or (60 if args.quick else 279)
    args.repeats = args.repeats or (2 if args.quick else 7)
    if args.out is None and not args.quick:
        args.out = Path(__file__).parent / "results" / "sinkhorn.csv"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
        if hasattr(os, "sched_setaffinity"):  # the only limit that every library here obeys
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    generator = torch.Generator().manual_seed(0)
    normal, weights = torch.randn(2, args.n, args.n, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(torch.rand(args.n, args.n, generator=generator, dtype=torch.float64)))
    logits, weights = (normal + gumbel).to(args.device), weights.to(args.device)
    makers = methods(args)
    results: dict[tuple[float, str], Cell] = {}
    for t in args.temperatures:
        for name, make in makers.items():
            print(f"temperature {t:g}: {name}", file=sys.stderr)
            results[t, name] = measure(*make(logits, weights, t), args.repeats, args.device)
    print(f"n = {args.n}, float64, {args.repeats} calls per cell: median [fastest, slowest]; seed 0\n")
    print(table(results, args.temperatures, list(makers)) + "\n")
    print(describe_machine(args.device))
    if args.out is not None:
        write_csv(args.out, results, args)
        print(f"wrote {args.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

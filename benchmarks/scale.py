"""How the main operations grow with n, with the number of matrices J, and with the length T of recordings.

PYTHONPATH=. python benchmarks/scale.py

Every series is timed at a few sizes (processor time of one thread, float64, fastest of the repeats); its exponent is
the slope of a least-squares line through the logarithms of the upper half of the sizes and one more. Exponents and the
times at the largest sizes are carried on to n = 10,000, J = 1,000 and T = 10^6. The evidence is that of the C. elegans
tutorial with W integrated out, on a random network of eight parents a neuron. A guide step is a draw of J matrices, the
evidence, the KL to the prior and the backward pass.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sparse import Scene

import pyro_gs as pgs
from tutorials.celegans.evidence import CollapsedEvidence, Statistics

TEMPERATURE = 0.5
K, PARENTS = 30, 8
NEURONS, WORMS, STEPS = 139, 4, 50
TARGETS = {"n": 10_000, "J": 1_000, "T": 10**6}
FIELDS = ("operation", "grows in", "size", "seconds")


def noisy(*shape: int) -> torch.Tensor:
    """Standard normal logits with Gumbel noise."""
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64) - torch.empty(shape, dtype=torch.float64).exponential_().log()


def dense_draw(n: int) -> Callable[[], object]:
    x = noisy(n, n)
    return lambda: pgs.sinkhorn(x, temperature=TEMPERATURE)


def batch_draw(worms: int) -> Callable[[], object]:
    x = noisy(worms, NEURONS, NEURONS)
    return lambda: pgs.sinkhorn(x, temperature=TEMPERATURE)


def dense_gradient(n: int) -> Callable[[], object]:
    x = noisy(n, n).requires_grad_()
    loss = pgs.sinkhorn(x, temperature=TEMPERATURE).square().sum()
    return lambda: torch.autograd.grad(loss, x, retain_graph=True)


def dense_matching(n: int) -> Callable[[], object]:
    x = noisy(n, n)
    return lambda: pgs.matching(x)


def sparse_draw(n: int) -> Callable[[], object]:
    scene = Scene(n, K)
    x = scene.logits + scene.noise
    return lambda: pgs.sparse_sinkhorn(x, scene.candidates, temperature=TEMPERATURE)


def sparse_gradient(n: int) -> Callable[[], object]:
    scene = Scene(n, K)
    x = (scene.logits + scene.noise).requires_grad_()
    p = pgs.sparse_sinkhorn(x, scene.candidates, temperature=TEMPERATURE)
    loss = p.square().sum()
    return lambda: torch.autograd.grad(loss, x, retain_graph=True)


def sparse_matching(n: int) -> Callable[[], object]:
    scene = Scene(n, K)
    x = scene.logits + scene.noise
    return lambda: pgs.sparse_matching(x, scene.candidates)


def evidence_of(worms: int, n: int) -> CollapsedEvidence:
    """Of noise on a random network."""
    torch.manual_seed(0)
    adjacency = torch.zeros(n, n, dtype=torch.bool).scatter_(1, torch.rand(n, n).topk(PARENTS).indices, True)
    traces = torch.randn(worms, STEPS + 1, n, dtype=torch.float64)
    return CollapsedEvidence(adjacency, Statistics.from_traces(traces), 0.5, 0.3)


def evidence(worms: int, n: int) -> Callable[[], object]:
    score = evidence_of(worms, n)
    p = noisy(worms, n, n).softmax(-1).requires_grad_()
    return lambda: torch.autograd.grad(score(p), p)


def guide_step(worms: int, n: int) -> Callable[[], object]:
    score = evidence_of(worms, n)
    x = (0.1 * noisy(worms, n, n)).requires_grad_()
    prior = pgs.GumbelSinkhorn(1.0, torch.zeros(worms, n, n, dtype=torch.float64))

    def step() -> object:
        q = pgs.GumbelSinkhorn(TEMPERATURE, x)
        loss = pgs.tightened_kl(q, prior).sum() - score(q.rsample())
        return torch.autograd.grad(loss, x)

    return step


def sums(steps: int) -> Callable[[], object]:
    traces = torch.randn(1, steps + 1, NEURONS, dtype=torch.float64)
    return lambda: Statistics.from_traces(traces)


@dataclass(frozen=True)
class Series:
    """An operation, what it grows in, and the sizes that it is timed at."""

    operation: str
    axis: str
    make: Callable[[int], Callable[[], object]]
    sizes: tuple[int, ...]


SERIES = (
    Series("Sinkhorn, dense", "n", dense_draw, (250, 500, 1000, 2000)),
    Series("gradient, dense", "n", dense_gradient, (250, 500, 1000, 2000)),
    Series("matching, dense", "n", dense_matching, (250, 500, 1000, 2000)),
    Series("Sinkhorn, 30 candidates", "n", sparse_draw, (1000, 2000, 5000, 10_000)),
    Series("gradient, 30 candidates", "n", sparse_gradient, (1000, 2000, 5000, 10_000)),
    Series("matching, 30 candidates", "n", sparse_matching, (1000, 2000, 5000, 10_000)),
    Series(f"Sinkhorn, dense, n = {NEURONS}", "J", batch_draw, (2, 8, 32)),
    Series(f"evidence, J = {WORMS}", "n", lambda n: evidence(WORMS, n), (139, 279, 558, 1116)),
    Series(f"evidence, n = {NEURONS}", "J", lambda worms: evidence(worms, NEURONS), (4, 16, 64)),
    Series(f"guide step, J = {WORMS}", "n", lambda n: guide_step(WORMS, n), (139, 279, 558)),
    Series(f"guide step, n = {NEURONS}", "J", lambda worms: guide_step(worms, NEURONS), (2, 8, 32)),
    Series(f"sums over time, J = 1, n = {NEURONS}", "T", sums, (1000, 10_000, 100_000)),
)


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Fastest processor time; the first call is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Slope through the logarithms of the upper half of the sizes and one more."""
    kept = len(sizes) // 2 + 1
    x, y = ([math.log(v) for v in values[-kept:]] for values in (sizes, times))
    mean_x, mean_y = sum(x) / kept, sum(y) / kept
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def typeset(row: str) -> str:
    """Sizes as the page's formulas, ``n = 1,000`` for one."""
    return re.sub(r"\b([nJT]) = (\d[\d,]*\d|\d)", lambda size: f"${size[1]} = {size[2].replace(',', '{,}')}$", row)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=2, help="timings a size (default: 2)")
    parser.add_argument("--quick", action="store_true", help="smoke test: two small sizes of each")
    parser.add_argument("--out", type=Path, help="where the csv goes (default: results/scale.csv beside the script)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    print(f"float64, one thread, torch {torch.__version__}, temperature {TEMPERATURE}\n")
    print("| operation | timed at | seconds | exponent | carried on to | seconds there |")
    print("| --- " * 6 + "|")
    for series in SERIES:
        small = max(10, series.sizes[0] // 20)
        sizes = (small, 2 * small) if args.quick else series.sizes
        if args.quick and "candidates" in series.operation:
            sizes = (60, 90)
        times = [seconds(series.make(size), args.repeats) for size in sizes]
        slope, target = exponent(sizes, times), TARGETS[series.axis]
        there = times[-1] * (target / sizes[-1]) ** slope
        rows += [[series.operation, series.axis, size, f"{t:.4g}"] for size, t in zip(sizes, times, strict=True)]
        at = f"{series.axis} = {', '.join(f'{size:,}' for size in sizes)}"
        how = "timed" if sizes[-1] == target else f"{series.axis} = {target:,}"
        spent = ", ".join(f"{t:.3g}" for t in times)
        print(typeset(f"| {series.operation} | {at} | {spent} | {slope:.2f} | {how} | {there:.3g} |"), flush=True)
    if args.out is None and not args.quick:
        args.out = Path(__file__).parent / "results" / "scale.csv"
    if args.out is not None:
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([FIELDS, *rows])
        print(f"\nwrote {args.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

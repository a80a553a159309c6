"""How much ``log_prob`` of ``GumbelMatching`` varies, what it costs, whether it is right, and how tight its bounds are.

Logits are ``scale * N(0, 1)`` in float64. For each size and scale, a few matrices and a draw of the law of each; the
density of every draw is estimated again and again. The same estimates summed over all permutations have to give one, and
at scale 0 every permutation has probability 1 / n!. Prints the tables of ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median, stdev

import torch
from matching import describe_machine, table

from pyro_gs import GumbelMatching

SIZES, SCALES = [4, 5, 6, 8, 10, 15, 20, 30], [0.0, 1.0, 3.0, 10.0]
LISTED = [4, 5]  # rows, where all permutations are summed


@dataclass
class Row:
    """One line of the csv; log-probabilities in nats, empty where a column does not apply."""

    n: int
    scale: float
    draws: int
    calls: int
    num_particles: int
    sd: float = 0.0  # over calls, the median over draws
    sd_largest: float = 0.0
    ms: float = 0.0  # median of all calls, for one value
    below: float = 0.0  # mean distance from the lower bound up to the estimate
    above: float = 0.0  # from the estimate up to the upper bound
    uniform_error: float | str = ""  # of the mean of p n! at scale 0
    uniform_se: float | str = ""
    mass: float | str = ""  # mean over calls of the sum over all permutations
    mass_sd: float | str = ""  # of that sum from call to call


def law_of(n: int, scale: float, num_particles: int, seed: int) -> GumbelMatching:
    """The law of a matrix of logits."""
    noise = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return GumbelMatching(scale * noise, num_particles)


def measure(row: Row) -> None:
    """Fill in a row; the number of a draw is the seed of its logits."""
    sds, times, below, above, relative = [], [], [], [], []
    for seed in range(row.draws):
        law = law_of(row.n, row.scale, row.num_particles, seed)
        torch.manual_seed(seed)
        value = law.sample()
        law.log_prob(value)  # warm-up
        found = []
        for _ in range(row.calls):
            start = time.perf_counter()
            found.append(float(law.log_prob(value)))
            times.append(1e3 * (time.perf_counter() - start))
        sds.append(stdev(found))
        relative += [math.expm1(x + math.lgamma(row.n + 1)) for x in found]
        best = float(torch.tensor(found, dtype=torch.float64).logsumexp(0)) - math.log(row.calls)
        lower, upper = law.log_prob_bounds(value)
        below.append(best - float(lower))
        above.append(float(upper) - best)
    row.sd, row.sd_largest, row.ms = median(sds), max(sds), median(times)
    row.below, row.above = mean(below), mean(above)
    if row.scale == 0:
        row.uniform_error, row.uniform_se = mean(relative), stdev(relative) / math.sqrt(len(relative))
    if row.n in LISTED:
        law = law_of(row.n, row.scale, row.num_particles, 0)
        everything = law.enumerate_support()
        masses = [float(law.log_prob(everything).exp().sum()) for _ in range(row.calls)]
        row.mass, row.mass_sd = mean(masses), stdev(masses)


def report(rows: Sequence[Row]) -> str:
    """The tables."""
    scales = list(dict.fromkeys(row.scale for row in rows))
    found = {(row.n, row.scale): row for row in rows}
    sizes = list(dict.fromkeys(row.n for row in rows))
    headers = [f"scale {scale:g}" for scale in scales]

    def grid(title: str, cell: str) -> str:
        lines = [[str(n), *(cell.format(**asdict(found[n, scale])) for scale in scales)] for n in sizes]
        return f"{title}:\n\n" + table(["n", *headers], lines)

    parts = [
        grid("sd of log_prob from call to call, nats: median over draws (largest)", "{sd:.2g} ({sd_largest:.2g})"),
        grid("ms of one value", "{ms:.3g}"),
        grid("mean distance to log_prob_bounds, nats: below, above", "{below:.2f}, {above:.2f}"),
    ]
    uniform = [[str(r.n), f"{r.uniform_error:+.1e}", f"{r.uniform_se:.0e}"] for r in rows if r.uniform_error != ""]
    if uniform:
        parts.append(table(["n, at scale 0", "mean of p n! - 1", "standard error"], uniform))
    masses = [
        [str(r.n), f"{r.scale:g}", f"{r.mass:.4f}", f"{r.mass_sd / math.sqrt(r.calls):.0e}"] for r in rows if r.mass != ""
    ]
    if masses:
        parts.append(table(["n", "scale", "total mass", "standard error"], masses))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="rows (default: 4 5 6 8 10 15 20 30)")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="of the logits (default: 0 1 3 10)")
    parser.add_argument("--draws", type=int, default=5, help="matrices, with a draw each (default: 5)")
    parser.add_argument("--calls", type=int, default=20, help="estimates of each density (default: 20)")
    parser.add_argument("--num-particles", type=int, default=1000, help="default: 1000")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "matching_law.csv", help="the csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = [Row(n, scale, args.draws, args.calls, args.num_particles) for n in args.n for scale in args.scales]
    for row in rows:
        measure(row)
    print(f"{args.draws} draws, {args.calls} calls of {args.num_particles} particles each\n")
    print(report(rows) + "\n")
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

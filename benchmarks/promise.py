"""Holds ``sinkhorn`` to the promise of its docstring on every family of logits, and prints how close it comes.

The families are those of ``tests/ops/logit_families.py``, where the same is tested for small matrices. A row of the table
is one size over all families, temperatures, seeds and both dtypes.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

import pyro_gs
from pyro_gs.ops.implicit import scale
from pyro_gs.ops.sinkhorn import scaled_logits
from pyro_gs.ops.support import find_support

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "ops"))
from logit_families import FAMILIES, make

TEMPERATURES = (100.0, 1.0, 0.1, 0.01, 0.001)
PROMISE = {"float64": 1e-10, "float32": 2e-6}


def marginal_error(P: torch.Tensor) -> float:
    """Largest error of a row or column sum."""
    return max(float((P.double().sum(dim) - 1).abs().max()) for dim in (-2, -1))


def mixed_difference(P: torch.Tensor, z: torch.Tensor) -> float:
    """Largest mixed second difference of ``log P - Z`` on 10,000 quadruples, in units of rounding of the logits."""
    i, k, j, m = torch.randint(0, len(z), (4, 10_000))
    d = (P.log() - z).masked_fill(P < 1e-250, torch.nan)
    value = (d[i, j] - d[i, m] - d[k, j] + d[k, m]).nan_to_num(0.0).abs().max()
    return float(value) / (1e-14 + torch.finfo(z.dtype).eps * float(z.masked_fill(z == -torch.inf, 0.0).abs().max()))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--n", type=int, nargs="+", default=[2, 10, 100, 279], help="sizes (default: 2 10 100 279)")
    parser.add_argument("--seeds", type=int, default=20, help="default: 20")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", pyro_gs.SupportWarning)
    print("| n | matrices | error float64 | error float32 | mixed difference (ulp) | steps, median and most | ms, median |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    failed = 0
    for n in args.n:
        errors, mixed, steps, times = {"float64": 0.0, "float32": 0.0}, 0.0, [], []
        for family in FAMILIES:
            for seed in range(args.seeds):
                x = make(family, n, seed)
                for tau in TEMPERATURES:
                    support = find_support(x > -torch.inf)
                    z = scaled_logits(x, tau)
                    z = z if support.allowed is None else z.masked_fill(~support.allowed, -torch.inf)
                    start = time.perf_counter()
                    found = scale(z, support, tol=PROMISE["float64"], max_iter=500, relative=False)
                    times.append(1e3 * (time.perf_counter() - start))
                    P = found.log_p.exp()
                    steps.append(int(found.iterations))
                    error = marginal_error(P)
                    single = marginal_error(pyro_gs.sinkhorn(x.float(), temperature=tau))
                    good = bool(found.converged) and error <= PROMISE["float64"] and single <= PROMISE["float32"]
                    if not good:  # also for NaN
                        failed += 1
                        print(f"missed: {family}, n = {n}, seed {seed}, temperature {tau}: {error:.1e}, {single:.1e}")
                    errors["float64"], errors["float32"] = max(errors["float64"], error), max(errors["float32"], single)
                    mixed = max(mixed, mixed_difference(P, x / tau))
        times, steps = sorted(times), sorted(steps)
        print(
            f"| {n} | {len(steps)} | {errors['float64']:.1e} | {errors['float32']:.1e} | {mixed:.1f} "
            f"| {steps[len(steps) // 2]}, {steps[-1]} | {times[len(times) // 2]:.1f} |",
            flush=True,
        )
    print(f"missed: {failed}")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

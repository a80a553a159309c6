"""Does ``check_temperature_effect`` warn where it should? And the gradients' variance against temperature.

The fits of ``temperature.py`` (true densities): noisy points matched to their originals, several instances and
temperatures. Each is judged by the check, from the fit alone, and by the enumerated posterior.

python benchmarks/temperature_check.py             prints both tables, writes benchmarks/results/temperature_check.csv
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Sequence
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from temperature import TEMPERATURES, make_instance, model

import pyro_gs as pgs
from pyro_gs.infer.autoguide_matching import AutoGumbelMatching
from pyro_gs.infer.diagnostics import check_temperature_effect, gradient_variance

FIELDS = ("points", "seed", "temperature", "error", "shift", "effective_draws", "corrected_error", "verdict")


def judge(points: int, seed: int, tau: float, steps: int, num_draws: int) -> dict[str, float | str]:
    """Fit at temperature ``tau``; errors of the hard and of the corrected marginals, and what the check says."""
    x, y, exact = make_instance(points, seed)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide, relaxed = pgs.AutoGumbelSinkhorn(model, temperature=tau), pgs.relax(model, temperature=tau)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(relaxed, guide, ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / steps)}), elbo)
    for _ in range(steps):
        svi.step(x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = check_temperature_effect(relaxed, guide, x, y, num_draws=num_draws, max_plate_nesting=0)
    text = " ".join(str(item.message) for item in caught)
    hard = guide.hard_sample((20_000,))["P"].mean(0)
    return {
        "points": points,
        "seed": seed,
        "temperature": tau,
        "error": round(float((hard - exact).abs().max()), 3),
        "shift": round(found.shift["P"], 3),
        "effective_draws": round(found.effective_draws["P"], 1),
        "corrected_error": round(float((found.corrected["P"] - exact).abs().max()), 3),
        "verdict": "cannot tell" if "cannot be told" in text else "warns" if text else "silent",
    }


def print_variances(points: int) -> None:
    """Total variance of one particle's gradient at the start of a fit."""
    x, y, _ = make_instance(points, 0)
    print(f"\nTotal variance (signal to noise) of the gradient of one particle at the start, {points} points")
    for tau in TEMPERATURES:
        pyro.clear_param_store()
        guide = pgs.AutoGumbelSinkhorn(model, temperature=tau)
        found = gradient_variance(Trace_ELBO(), pgs.relax(model, temperature=tau), guide, x, y, num_draws=400)
        print(f"AutoGumbelSinkhorn at {tau:g}: {found.total:.0f} ({found.signal_to_noise:.3f})")
    for name, guide in (
        ("score", AutoGumbelMatching(model)),
        ("score without a baseline", AutoGumbelMatching(model, baseline_decay=None)),
        ("perturb_and_map", AutoGumbelMatching(model, gradient="perturb_and_map")),
    ):
        pyro.clear_param_store()
        found = gradient_variance(Trace_ELBO(), model, guide, x, y, num_draws=400)
        print(f"AutoGumbelMatching, {name}: {found.total:.0f} ({found.signal_to_noise:.3f})")


def main(argv: Sequence[str] | None = None) -> int:
    """Fit everything, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", type=int, nargs="+", default=[4, 5])
    parser.add_argument("--instances", type=int, default=4, help="seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rows = []
    for points in args.points:
        for seed in range(args.instances):
            for tau in TEMPERATURES:
                rows.append(judge(points, seed, tau, args.steps, args.draws))
                print(*(f"{field} {value}" for field, value in rows[-1].items()), sep="  ", flush=True)
    print("\n| verdict | fits | error of hard marginals |\n| --- | --- | --- |")
    for verdict in ("warns", "silent", "cannot tell"):
        errors = [float(row["error"]) for row in rows if row["verdict"] == verdict]
        span = f"{min(errors):.2f} to {max(errors):.2f}" if errors else ""
        print(f"| {verdict} | {len(errors)} | {span} |")
    print_variances(max(args.points))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "temperature_check.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

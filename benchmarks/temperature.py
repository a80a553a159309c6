"""What temperature does to a posterior: errors of hard marginals on enumerable matchings, and a picture.

Matches five noisy points to their originals, several instances, and compares the marginals of hard samples from a fitted
``AutoGumbelSinkhorn`` guide with the enumerated posterior. Guide and relaxed prior have the same temperature.

python benchmarks/temperature.py                   prints the table of docs/temperature.md, draws docs/temperature.png
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro.infer import Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm import tqdm

import pyro_gs as pgs
from pyro_gs.infer.objective import Objective

TEMPERATURES = (1.0, 0.5, 0.25, 0.1)
VARIANTS: dict[str, tuple[Objective, bool]] = {
    "true densities": ("density", False),
    "true densities, annealed from 1": ("density", True),
    "tightened KL": ("tightened_kl", False),
    "noise KL (paper)": ("noise_kl", False),
}
SCALE = 0.5


def model(x: Tensor, y: Tensor) -> None:
    """Points ``y`` are the points ``x`` in another order, with noise."""
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P.to(x) @ x, SCALE).to_event(2), obs=y)


def make_instance(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points, noisy points, and the exact marginals (n, n)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    y = x[torch.randperm(n, generator=generator)] + SCALE * torch.randn(n, 2, generator=generator)
    perms = pgs.to_matrix(torch.tensor(list(itertools.permutations(range(n)))))
    weight = torch.softmax(dist.Normal(perms @ x, SCALE).log_prob(y).sum((-2, -1)), 0)
    return x, y, torch.einsum("k,kij->ij", weight, perms)


def fit_error(instance: tuple[Tensor, Tensor, Tensor], tau: float, objective: Objective, anneal: bool, steps: int) -> float:
    """Largest error of a marginal after a fit at temperature ``tau``."""
    x, y, exact = instance
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = pgs.AutoGumbelSinkhorn(model, temperature=tau, objective=objective)
    relaxed = pgs.relax(model, temperature=lambda: guide.temperature)
    schedule: Callable[[int], float] = pgs.ExponentialSchedule(1.0, tau, steps // 2) if anneal else pgs.ConstantSchedule(tau)
    adam = {"lr": 0.1}
    optimizer = PyroOptim(torch.optim.Adam, adam)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = pgs.AnnealedSVI(relaxed, guide, optimizer, elbo, schedule=schedule)
    for step in range(steps):
        for inner in optimizer.optim_objs.values():
            for group in inner.param_groups:
                group["lr"] = 0.1 * 0.05 ** (step / steps)
        svi.step(x, y)
    return float((guide.hard_sample((20_000,))["P"].mean(0) - exact).abs().max())


def main(argv: Sequence[str] | None = None) -> int:
    """Fit everything, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", type=int, default=5)
    parser.add_argument("--instances", type=int, default=6, help="seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of temperature.png")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    instances = [make_instance(args.points, seed) for seed in range(args.instances)]
    jobs = list(itertools.product(VARIANTS, TEMPERATURES, range(args.instances)))
    errors: dict[tuple[str, float], list[float]] = {}
    for variant, tau, seed in tqdm(jobs):
        objective, anneal = VARIANTS[variant]
        errors.setdefault((variant, tau), []).append(fit_error(instances[seed], tau, objective, anneal, args.steps))
    print("| objective | " + " | ".join(rf"$\tau = {tau:g}$" for tau in TEMPERATURES) + " |")
    print("| --- |" + " --- |" * len(TEMPERATURES))
    figure, ax = plt.subplots(figsize=(6.5, 3.6), dpi=120)
    for place, variant in enumerate(VARIANTS):
        found = [errors[variant, tau] for tau in TEMPERATURES]
        print(
            f"| {variant} | " + " | ".join(f"{statistics.median(e):.2f} ({min(e):.2f}-{max(e):.2f})" for e in found) + " |"
        )
        ax.plot(TEMPERATURES, [statistics.median(e) for e in found], "o-", color=f"C{place}", label=variant)
        ax.fill_between(TEMPERATURES, [min(e) for e in found], [max(e) for e in found], color=f"C{place}", alpha=0.08)
    ax.set(xscale="log", xticks=TEMPERATURES, xticklabels=[f"{tau:g}" for tau in TEMPERATURES], ylim=(0, None))
    ax.minorticks_off()
    ax.set(
        xlabel="temperature of guide and prior",
        ylabel="largest error of a marginal",
        title="median and range over instances",
    )
    ax.invert_xaxis()
    ax.legend(frameon=False, fontsize=8)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "temperature.png", bbox_inches="tight")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

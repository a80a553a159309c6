"""What each objective of a Gumbel-Sinkhorn guide bounds: the fitted bounds against temperature, the truth as a line.

Matches four noisy points to their originals, several instances. The log evidence of the plain model is enumerated; that of
the relaxed one is estimated by importance sampling from an equal mixture of its prior and a fitted guide. Guide and relaxed
prior have the same temperature.

python benchmarks/objectives.py         writes benchmarks/results/objectives.csv, prints the table of docs/objectives.md and
                                        draws docs/objectives.png; --resume takes what the csv has
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib import pyplot as plt
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm import tqdm

import pyro_gs as pgs
from pyro_gs.infer.objective import GuideGumbelSinkhorn, Objective

TEMPERATURES = (2.0, 1.0, 0.5, 0.25, 0.1)
POINTS, SCALE, WEIGHTED = 4, 0.5, 16
# label: objective, hard likelihood, particles that the guide is fitted with and that the bound has (1: plain ELBO)
VARIANTS: dict[str, tuple[Objective, bool, int, int]] = {
    "hard, noise KL (paper)": ("noise_kl", True, 1, 1),
    "hard, tightened KL": ("tightened_kl", True, 1, 1),
    "hard, true densities": ("density", True, 1, 1),
    f"hard, weighted K = {WEIGHTED}": ("density", True, 1, WEIGHTED),
    f"hard, weighted K = {WEIGHTED}, fitted so": ("density", True, WEIGHTED, WEIGHTED),
    "relaxed, true densities": ("density", False, 1, 1),
    f"relaxed, weighted K = {WEIGHTED}, fitted so": ("density", False, WEIGHTED, WEIGHTED),
}
COLUMNS = ("objective", "temperature", "instance", "bound", "bound_error", "evidence", "evidence_error")
Instance = tuple[Tensor, Tensor]


def model(x: Tensor, y: Tensor) -> None:
    """Points ``y`` are the points ``x`` in another order, with noise."""
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P.to(x) @ x, SCALE).to_event(2), obs=y)


def make_instance(seed: int) -> Instance:
    """Points and noisy points, (n, 2) each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(POINTS, 2, generator=generator)
    return x, x[torch.randperm(POINTS, generator=generator)] + SCALE * torch.randn(POINTS, 2, generator=generator)


def log_likelihood(P: Tensor, instance: Instance) -> Tensor:
    x, y = instance
    return dist.Normal(torch.as_tensor(P) @ x, SCALE).log_prob(y).sum((-2, -1))


def exact_evidence(instance: Instance) -> float:
    """Log evidence of the plain model, by enumeration."""
    P = pgs.to_matrix(torch.tensor(list(itertools.permutations(range(POINTS))))).to(instance[0])
    return float(torch.logsumexp(log_likelihood(P, instance), 0)) - math.lgamma(POINTS + 1)


def log_mean(log_w: Tensor) -> tuple[float, float]:
    """Logarithm of a mean of weights, and its standard error."""
    w = (log_w - log_w.max()).exp()
    return float(w.mean().log() + log_w.max()), float(w.std() / w.mean()) / len(w) ** 0.5


def fit(instance: Instance, tau: float, objective: Objective, hard: bool, particles: int, steps: int) -> Tensor:
    """Logits of a guide that was fitted to one objective."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = pgs.AutoGumbelSinkhorn(model, temperature=tau, objective=objective, hard=hard)
    settings = {"num_particles": max(particles, 8), "vectorize_particles": True, "max_plate_nesting": 0}
    elbo = RenyiELBO(alpha=0, **settings) if particles > 1 else Trace_ELBO(**settings)
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(pgs.relax(model, temperature=tau), guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(*instance)
    return guide.logits("P").detach()


@torch.no_grad()
def measure(
    instance: Instance, tau: float, objective: Objective, hard: bool, particles: int, logits: Tensor, draws: int
) -> tuple[float, float]:
    """The bound at fitted logits and its standard error, from fresh draws."""
    q = GuideGumbelSinkhorn(objective, tau, logits, hard=hard)
    P = q.rsample(torch.Size((draws, particles)))
    prior = pgs.GumbelSinkhorn(tau, torch.zeros_like(logits))
    log_w = log_likelihood(P, instance) + prior.log_prob(P) - q.log_prob(P)
    bound = torch.logsumexp(log_w, -1) - math.log(particles)
    return float(bound.mean()), float(bound.std()) / draws**0.5


@torch.no_grad()
def relaxed_evidence(instance: Instance, tau: float, logits: Tensor, draws: int) -> tuple[float, float]:
    """Log evidence of the relaxed model and its standard error, from the prior and a guide in equal shares."""
    laws = [pgs.GumbelSinkhorn(tau, logits), pgs.GumbelSinkhorn(tau, torch.zeros_like(logits))]
    log_w = []
    for law in laws:
        P = law.sample(torch.Size((draws // 2,)))
        q, p = (each.log_prob(P) for each in laws)
        log_w.append(log_likelihood(P, instance) + p - torch.logaddexp(q, p) + math.log(2))
    return log_mean(torch.cat(log_w))


def run(instances: Sequence[Instance], steps: int, draws: int, out: Path, resume: bool) -> list[dict[str, str]]:
    """Rows of the csv: one a variant, temperature and instance."""
    rows = list(csv.DictReader(out.open())) if resume and out.exists() else []
    done = {(row["objective"], float(row["temperature"]), int(row["instance"])) for row in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    for (number, instance), tau in tqdm(list(itertools.product(enumerate(instances), TEMPERATURES))):
        for label, (objective, hard, fitted, particles) in reversed(VARIANTS.items()):
            if (label, tau, number) in done:
                continue
            logits = fit(instance, tau, objective, hard, fitted, steps)
            if hard:
                evidence = (exact_evidence(instance), 0.0)
            elif particles > 1:
                evidence = relaxed_evidence(instance, tau, logits, 20 * draws)
            else:  # the weighted one came before
                row = next(r for r in rows if r["objective"].startswith("relaxed, w") and _key(r) == (tau, number))
                evidence = (float(row["evidence"]), float(row["evidence_error"]))
            bound = measure(instance, tau, objective, hard, particles, logits, draws)
            values = (label, tau, number, *(f"{value:.4f}" for value in (*bound, *evidence)))
            rows.append({column: str(value) for column, value in zip(COLUMNS, values, strict=True)})
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    return rows


def _key(row: dict[str, str]) -> tuple[float, int]:
    return float(row["temperature"]), int(row["instance"])


def print_table(rows: Sequence[dict[str, str]]) -> None:
    """Evidence less bound, median over the instances."""
    print("| objective | " + " | ".join(rf"$\tau = {tau:g}$" for tau in TEMPERATURES) + " |")
    print("| --- |" + " --- |" * len(TEMPERATURES))
    for label in VARIANTS:
        cells = []
        for tau in TEMPERATURES:
            gaps = [
                float(row["evidence"]) - float(row["bound"])
                for row in rows
                if row["objective"] == label and float(row["temperature"]) == tau
            ]
            cells.append(f"{statistics.median(gaps):.2f} ({min(gaps):.2f}-{max(gaps):.2f})")
        name = label.replace(f"K = {WEIGHTED}", f"$K = {WEIGHTED}$")
        print(f"| {name} | " + " | ".join(cells) + " |")


def draw(rows: Sequence[dict[str, str]], out: Path) -> None:
    """Bounds of the first instance against temperature: hard likelihood to the left, relaxed to the right."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), dpi=120, sharey=True)
    discrete = next(float(row["evidence"]) for row in rows if row["objective"].startswith("hard") and row["instance"] == "0")
    for color, label in enumerate(VARIANTS):
        chosen = sorted((r for r in rows if r["objective"] == label and r["instance"] == "0"), key=_key)
        tau = [float(row["temperature"]) for row in chosen]
        side, name = label.split(", ", 1)
        ax = axes[int(side == "relaxed")]
        ax.plot(tau, [float(row["bound"]) for row in chosen], "o-", color=f"C{color}", label=name, markersize=4)
        if label.startswith("relaxed, w"):
            ax.plot(tau, [float(row["evidence"]) for row in chosen], "k-", lw=1.5, label="relaxed log evidence")
    axes[0].axhline(discrete, color="k", lw=1.5, label="log evidence, enumerated")
    axes[1].axhline(discrete, color="k", lw=1, ls=":", label="log evidence of the plain model")
    axes[0].set(title="likelihood at hard permutations", ylabel="nats")
    axes[1].set(title="likelihood at relaxed permutations")
    for ax in axes:
        ax.set(xscale="log", xticks=TEMPERATURES, xticklabels=[f"{tau:g}" for tau in TEMPERATURES])
        ax.set(xlabel="temperature of guide and prior")
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.legend(frameon=False, fontsize=8)
    out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out / "objectives.png", bbox_inches="tight")


def main(argv: Sequence[str] | None = None) -> int:
    """Fit everything, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--instances", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--draws", type=int, default=2000, help="of the bound; the relaxed evidence takes 20 times as many")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of objectives.csv")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of objectives.png")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    instances = [make_instance(seed) for seed in range(args.instances)]
    rows = run(instances, args.steps, args.draws, args.results / "objectives.csv", args.resume)
    print_table(rows)
    draw(rows, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How far the Laplace form of the density is from the truth, and how far the bounds are from the true divergence.

python benchmarks/density.py                       prints the tables of docs/density.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import pyro_gs as pgs


def laplace_errors(particles: int, draws: int) -> None:
    """Laplace minus a long importance-sampling estimate, at the law's own samples.

    There the dual point is ``S(-eps)``, so that neither the logits nor the temperature matter.
    """
    print("| n | mean error | sd | largest | noise of the reference |\n| --- | --- | --- | --- | --- |")
    for n in (4, 5, 6, 8, 10, 20, 40):
        torch.manual_seed(n)
        logits = torch.randn(n, n)
        laplace = pgs.GumbelSinkhorn(0.5, logits)
        sampled = pgs.GumbelSinkhorn(0.5, logits, num_particles=particles)
        value = laplace.sample(torch.Size((draws,)))
        runs = torch.stack([sampled.log_prob(value) for _ in range(2)])
        error = laplace.log_prob(value) - runs.mean(0)
        noise = float((runs[0] - runs[1]).std()) / 2
        row = (float(error.mean()), float(error.std()), float(error.abs().max()), noise)
        print(f"| {n} | " + " | ".join(f"{x:.4f}" for x in row) + " |", flush=True)


def sparse_masks(particles: int, draws: int) -> None:
    """The same where most pairs are forbidden."""
    print("\n| n | allowed pairs a row | mean error | sd |\n| --- | --- | --- | --- |")
    for n, width in ((10, 2), (20, 2), (40, 2), (20, 5), (40, 10)):
        torch.manual_seed(n)
        column = (torch.arange(n)[None, :] - torch.arange(n)[:, None]) % n
        logits = torch.zeros(n, n).masked_fill(column >= width, -torch.inf)
        laplace = pgs.GumbelSinkhorn(1.0, logits)
        sampled = pgs.GumbelSinkhorn(1.0, logits, num_particles=particles)
        value = laplace.sample(torch.Size((draws,)))
        error = laplace.log_prob(value) - sampled.log_prob(value)
        print(f"| {n} | {width} | {float(error.mean()):.3f} | {float(error.std()):.3f} |", flush=True)


def divergences(draws: int) -> None:
    """Noise KL, tightened KL and a Monte Carlo estimate of the true one, in nats."""
    print("\n| n | logits | tau, tau_0 | noise KL | tightened | true KL |\n| --- | --- | --- | --- | --- | --- |")
    for n, scale, tau, tau_0 in ((8, 1.0, 0.5, 1.0), (20, 1.0, 1.0, 1.0), (20, 3.0, 1.0, 1.0)):
        torch.manual_seed(0)
        q = pgs.GumbelSinkhorn(tau, scale * torch.randn(n, n))
        p = pgs.GumbelSinkhorn(tau_0, torch.zeros(n, n))
        value = q.sample(torch.Size((draws,)))
        ratio = q.log_prob(value) - p.log_prob(value)
        true = f"{float(ratio.mean()):.0f} +- {float(ratio.std()) / draws**0.5:.0f}"
        noise, tight = float(pgs.gumbel_noise_kl(q, p)), float(pgs.tightened_kl(q, p))
        print(f"| {n} | {scale:g} N(0, 1) | {tau:g}, {tau_0:g} | {noise:,.0f} | {tight:,.0f} | {true} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--particles", type=int, default=20_000, help="importance sample of the reference")
    parser.add_argument("--draws", type=int, default=100, help="samples at which the density is compared")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    laplace_errors(args.particles, args.draws)
    sparse_masks(args.particles, args.draws)
    divergences(4 * args.draws)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""How far the computed density is from the truth, and how far the bounds are from the true divergence.

python benchmarks/density.py                       prints the tables of docs/density.md
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import pyro_gs as pgs
from pyro_gs.distributions.gauge import log_integral
from pyro_gs.distributions.relaxed import log_of
from pyro_gs.distributions.spherical import by_sampling, sampled_weights
from pyro_gs.ops.laplacian import component_logdet, log_tie_weights
from pyro_gs.ops.support import Support
from pyro_gs.ops.tree import CutBasis


class Gauge:
    """The gauge integral that a law's density needs at some values, three ways; one component, or nothing forbidden.

    Args:
        law: scores.
        value: samples of a law of the same support, (draws, n, n).
    """

    def __init__(self, law: pgs.GumbelSinkhorn, value: Tensor) -> None:
        allowed = law.logits.expand(value.shape) > -torch.inf
        z = law.logits - law.temperature * torch.where(allowed, log_of(value), 0.0)
        self.counts = allowed.sum(-1).double(), allowed.sum(-2).double()
        solution = pgs.solve_sinkhorn(z, row_sums=self.counts[0], column_sums=self.counts[1])
        self.log_q = solution.log_p - self.counts[0].log()[..., None]
        self.support = Support(self.log_q.shape)
        self.logdet = component_logdet(self.log_q + 0.5 * self.counts[0].log()[..., None], self.support)

    def laplace(self) -> Tensor:
        """Laplace's approximation with the error that it has at the flat matrix taken off."""
        n = self.log_q.shape[-1]
        flat = n * math.lgamma(n) - math.lgamma(n * n) + n * n * math.log(n)
        flat += 0.5 * (n - 2) * math.log(n) - 0.5 * (n - 1) * math.log(2 * math.pi)
        return 0.5 * (n - 1) * math.log(2 * math.pi) - 0.5 * self.logdet + flat

    def corrected(self) -> Tensor:
        """What ``log_prob`` takes."""
        return log_integral(self.log_q, self.support, self.logdet, 0, self.counts)

    def sampled(self, particles: int) -> Tensor:
        """Logarithm of an unbiased estimate."""
        return by_sampling(self.log_q, *self.counts, particles)

    def shares(self, particles: int) -> tuple[Tensor, Tensor]:
        """Effective share of particles: of the Gaussian of Laplace's approximation, and of random directions."""
        n_i, m_j = self.counts
        grounded = torch.zeros_like(n_i, dtype=torch.bool)
        grounded[:, 0] = True
        basis = CutBasis(log_tie_weights(self.log_q + 0.5 * n_i.log()[..., None]), grounded)
        noise = torch.randn(particles, *n_i.shape).masked_fill(grounded, 0.0)
        beta = basis.gaussian(noise)
        rows = torch.stack([torch.logsumexp(self.log_q + x[:, None], -1) for x in beta])
        log_w = ((m_j * beta) - n_i * rows + 0.5 * noise.square()).sum(-1).mT
        both = log_w, sampled_weights(self.log_q, n_i, m_j, particles)
        out = [(2 * torch.logsumexp(w, -1) - torch.logsumexp(2 * w, -1)).exp() / particles for w in both]
        return out[0], out[1]


def errors(label: str, gauge: Gauge, particles: int) -> None:
    """Print one row: mean and largest error of both forms, and the noise of the reference."""
    runs = torch.stack([gauge.sampled(particles) for _ in range(2)])
    row = []
    for form in (gauge.laplace(), gauge.corrected()):
        error = form - runs.mean(0)
        row += [f"{float(error.mean()):.4f}", f"{float(error.abs().max()):.3f}"]
    print(f"{label} | {' | '.join(row)} | {float((runs[0] - runs[1]).std()) / 2:.4f} |", flush=True)


def own_samples(particles: int, draws: int) -> None:
    """Errors at the law's own samples: the dual point is ``S(-eps)``, so that neither logits nor temperature matter."""
    print("| $n$ | Laplace: mean error | largest | corrected: mean error | largest | noise of the reference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n in (4, 5, 6, 7, 8, 9, 10, 20, 40):
        torch.manual_seed(n)
        law = pgs.GumbelSinkhorn(0.5, torch.randn(n, n))
        errors(f"| {n}", Gauge(law, law.sample(torch.Size((draws,)))), particles)


TAILS = ((1.0, 1.0, 0.2), (1.0, 0.5, 1.0), (3.0, 1.0, 1.0), (3.0, 0.5, 1.0), (3.0, 0.2, 1.0))  # logits, tau, tau_0


def tails(particles: int, draws: int) -> None:
    """Errors where a law without logits scores the sample of another."""
    print("\n| $n$ | logits | $\\tau, \\tau_0$ | Laplace: mean error | largest | corrected: mean error | largest | noise |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for n in (4, 5, 6, 7, 8, 9, 10, 20, 100):
        for scale, tau, tau_0 in TAILS:
            gauge = elsewhere(n, scale, tau, tau_0, draws)
            errors(f"| {n} | ${scale:g} N(0, 1)$ | ${tau:g}, {tau_0:g}$", gauge, particles if n < 100 else particles // 5)


def elsewhere(n: int, scale: float, tau: float, tau_0: float, draws: int) -> Gauge:
    """What the law without logits needs at draws of laws with random ones."""
    torch.manual_seed(n)
    law = pgs.GumbelSinkhorn(tau, scale * torch.randn(draws, n, n))
    return Gauge(pgs.GumbelSinkhorn(tau_0, torch.zeros(n, n)), law.sample())


def sparse_masks(particles: int, draws: int) -> None:
    """Errors at the law's own samples where most pairs are forbidden."""
    print("\n| $n$ | allowed a row | Laplace: mean error | largest | corrected: mean error | largest | noise |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for n, width in ((5, 2), (9, 2), (9, 4), (10, 2), (20, 2), (40, 2), (20, 5), (40, 10), (100, 5)):
        torch.manual_seed(n)
        column = (torch.arange(n)[None, :] - torch.arange(n)[:, None]) % n
        law = pgs.GumbelSinkhorn(1.0, torch.zeros(n, n).masked_fill(column >= width, -torch.inf))
        errors(f"| {n} | {width}", Gauge(law, law.sample(torch.Size((draws,)))), particles)


def effective_shares(particles: int, draws: int) -> None:
    """Effective share of the particles of both importance samplers."""
    print("\n| $n$ | logits | $\\tau, \\tau_0$ | Gaussian: mean | smallest | directions: mean | smallest |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for n in (5, 9, 20, 40):
        for scale, tau, tau_0 in ((0.0, 1.0, 1.0), *TAILS):
            shares = elsewhere(n, scale, tau, tau_0, draws).shares(particles)
            row = " | ".join(f"{float(x.mean()):.3f} | {float(x.min()):.4f}" for x in shares)
            print(f"| {n} | ${scale:g} N(0, 1)$ | ${tau:g}, {tau_0:g}$ | {row} |", flush=True)


def divergences(draws: int) -> None:
    """Noise KL, tightened KL and a Monte Carlo estimate of the true one, in nats."""
    print("\n| $n$ | logits | $\\tau, \\tau_0$ | noise KL | tightened | true KL |\n| --- | --- | --- | --- | --- | --- |")
    for n, scale, tau, tau_0 in ((8, 1.0, 0.5, 1.0), (20, 1.0, 1.0, 1.0), (20, 3.0, 1.0, 1.0)):
        torch.manual_seed(0)
        q = pgs.GumbelSinkhorn(tau, scale * torch.randn(n, n))
        p = pgs.GumbelSinkhorn(tau_0, torch.zeros(n, n))
        value = q.sample(torch.Size((draws,)))
        ratio = q.log_prob(value) - p.log_prob(value)
        true = f"{float(ratio.mean()):.0f} $\\pm$ {float(ratio.std()) / draws**0.5:.0f}"
        noise, tight = float(pgs.gumbel_noise_kl(q, p)), float(pgs.tightened_kl(q, p))
        print(f"| {n} | ${scale:g} N(0, 1)$ | ${tau:g}, {tau_0:g}$ | {noise:,.0f} | {tight:,.0f} | {true} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--particles", type=int, default=10_000, help="importance sample of the reference")
    parser.add_argument("--draws", type=int, default=50, help="samples at which the density is compared")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    own_samples(args.particles, args.draws)
    tails(args.particles // 2, args.draws // 2)
    sparse_masks(args.particles // 2, args.draws // 2)
    effective_shares(2_000, args.draws // 2)
    divergences(8 * args.draws)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

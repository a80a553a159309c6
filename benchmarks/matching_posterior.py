"""The yardstick of Linderman et al. (2018), Table 1: how far approximate posteriors of a matching are from the exact one.

Six points in the plane and the same with noise in an unknown order; the posterior over the 720 permutations is enumerated,
and every method has the same time to draw from its own. Reported is the mean over instances of the Bhattacharyya distance
between the exact law and the frequencies of the draws, and of the total variation distance of the rows' marginals.

What the paper leaves open is set here: points are ``N(0, 1)`` in two dimensions, noise has the standard deviation that is
given, the prior is uniform and the noise known; guides run for nine tenths of the time with Adam, step size .3 falling to
.005, four draws a step, temperature .25 where they have one that is not their own default; guides give 10,000 hard draws,
chains all of theirs after a fifth of the time. Mallows laws
are centred at the best matching, as in the paper. "Bethe" stands for the marginals by belief propagation and has no joint
law; "perturb and MAP" is the matching of the log-likelihoods with Gumbel noise, which is not fitted.

Prints the table of ``docs/choosing.md``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean

import pyro
import pyro.distributions as dist
import torch
from matching import describe_machine, table
from torch import Tensor
from tqdm import tqdm

import pyro_gs as pgs
from pyro_gs.infer.compare import bhattacharyya, total_variation
from pyro_gs.infer.runners import RUNNERS, MethodResult, Task, run_exact

N = 6
SIGMAS = (0.1, 0.25, 0.5, 0.75)
PUBLISHED = {
    "stick-breaking (paper)": (0.09, 0.23, 0.41, 0.55),
    "rounding (paper)": (0.06, 0.21, 0.32, 0.38),
    "Mallows, theta 2 (paper)": (0.23, 0.33, 0.53, 0.69),
    "Mallows, theta 10 (paper)": (0.08, 0.27, 0.54, 0.72),
}
DRAWS = 10_000
TEMPERATURE = 0.25


@dataclass
class Row:
    """One line of the csv: a method on an instance; NaN where a method has no joint law."""

    sigma: float
    seed: int
    method: str
    bhattacharyya: float
    total_variation: float
    seconds: float


def model(x: Tensor, y: Tensor, sigma: float) -> None:
    """Noisy points in an order of their own."""
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P.to(x) @ x, sigma).to_event(2), obs=y)


def instance(sigma: float, seed: int) -> tuple[Tensor, Tensor]:
    """Points (N, 2), and the same with noise in another order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 2, generator=generator)
    return x, x[torch.randperm(N, generator=generator)] + sigma * torch.randn(N, 2, generator=generator)


def _drawn(name: str, law: pgs.Mallows | pgs.GumbelMatching) -> MethodResult:
    draws = law.sample((DRAWS,)).double()
    return MethodResult(name, "variational", 0.0, {"P": draws}, None, {"P": draws.mean(0)}, None, "", None, [])


def fixed_laws(x: Tensor, y: Tensor, sigma: float) -> dict[str, MethodResult]:
    """Laws that need no fit."""
    scores = -torch.cdist(y, x).square() / (2 * sigma**2)
    best = pgs.matching(scores)
    return {
        "Mallows, theta 2": _drawn("Mallows, theta 2", pgs.Mallows(best, torch.tensor(2.0))),
        "Mallows, theta 10": _drawn("Mallows, theta 10", pgs.Mallows(best, torch.tensor(10.0))),
        "perturb and MAP": _drawn("perturb and MAP", pgs.GumbelMatching(scores)),
    }


def bethe_marginals(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """Marginals of the Bethe approximation: the gradient of its log-permanent."""
    scores = (-torch.cdist(y, x).square() / (2 * sigma**2)).requires_grad_()
    return torch.autograd.grad(pgs.log_permanent(scores, method="bethe"), scores)[0]


def measure(sigma: float, seed: int, methods: Sequence[str], seconds: float) -> list[Row]:
    """All methods on an instance."""
    x, y = instance(sigma, seed)
    task = Task(model, (x, y, sigma), {}, seconds, seed, TEMPERATURE, 1)
    exact = run_exact("exact", task)
    pyro.set_rng_seed(seed)
    results = fixed_laws(x, y, sigma)
    for name in methods:
        pyro.set_rng_seed(seed)
        results[name] = RUNNERS[name](name, task)
    rows = [
        Row(
            sigma,
            seed,
            name,
            bhattacharyya(exact, result),
            total_variation(exact.marginals, result.marginals),
            result.seconds,
        )
        for name, result in results.items()
    ]
    bethe = total_variation(exact.marginals, {"P": bethe_marginals(x, y, sigma)})
    return [*rows, Row(sigma, seed, "Bethe", float("nan"), bethe, 0.0)]


def report(rows: Sequence[Row]) -> None:
    """Print the two tables."""
    print(f"\n{describe_machine()}\n")
    names = list(dict.fromkeys(row.method for row in rows))
    sigmas = sorted({row.sigma for row in rows})
    head = ["method", *(f"sigma {sigma:g}" for sigma in sigmas)]

    def line(name: str, value: Callable[[Row], float]) -> list[str]:
        return [name, *(f"{mean(value(r) for r in rows if r.method == name and r.sigma == sigma):.3f}" for sigma in sigmas)]

    published = [
        [name, *(f"{dict(zip(SIGMAS, values, strict=True)).get(sigma, float('nan')):.2f}" for sigma in sigmas)]
        for name, values in PUBLISHED.items()
    ]
    print("Bhattacharyya distance to the exact posterior\n")
    print(table(head, [line(name, lambda row: row.bhattacharyya) for name in names if name != "Bethe"] + published))
    print("\nTotal variation of the rows' marginals\n")
    print(table(head, [line(name, lambda row: row.total_variation) for name in names]))


def main(argv: Sequence[str] | None = None) -> int:
    fitted = [name for name in RUNNERS if name != "exact"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each method (default: 5)")
    parser.add_argument("--instances", type=int, default=10, help="for each sigma (default: 10)")
    parser.add_argument("--sigmas", type=float, nargs="+", default=list(SIGMAS))
    parser.add_argument("--methods", nargs="+", choices=fitted, default=fitted)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "matching_posterior.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows: list[Row] = []
    for sigma in args.sigmas:
        for seed in tqdm(range(args.instances), desc=f"sigma {sigma:g}"):
            rows += measure(sigma, seed, args.methods, args.seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    report(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

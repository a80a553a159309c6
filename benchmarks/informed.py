"""When gradients can score the exchanges of an informed proposal, and when they cannot.

``LocallyBalanced`` with exact scores and with gradient scores, beside ``SwapMetropolis`` with one proposal a step, on noisy
points in another order, scored by logits (linear in the matrix) and by a Gaussian about ``P @ x`` (the same posterior), and
on an observed matrix ``P W P^T`` with noise (quadratic in P at permutations too). For n = 5 the total variation distance
between the enumerated posterior and the states of 5,000 replicas 30 steps after all of them were drawn uniformly;
'posterior draws' is what the replicas' number leaves. For n = 12 acceptance and effective draws of the log density, from
the truth. Means of 5 and 3 data sets.

python benchmarks/informed.py                      prints the table, in about two minutes
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC
from pyro.ops.stats import effective_sample_size
from torch import Tensor

import pyro_gs as pgs
from pyro_gs.infer.log_joint import LogJoint
from pyro_gs.infer.mcmc.chain import Chain
from pyro_gs.infer.mcmc.locally_balanced import LocallyBalanced
from pyro_gs.infer.mcmc.swap_metropolis import SwapMetropolis

REPLICAS, STEPS, DRAWS = 5000, 30, 1000
Model = Callable[[Tensor, Tensor], None]


def logits(x: Tensor, y: Tensor) -> None:
    """Noisy points in another order, scored pair by pair: linear in the matrix."""
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pairs = dist.Normal(x, 1.0).log_prob(y[:, None]).sum(-1)
    pyro.factor("y", (P * pairs).sum((-1, -2)))


def points(x: Tensor, y: Tensor) -> None:
    """The same, scored as a Gaussian about ``P @ x``: the same at permutations, and quadratic between them."""
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P @ x, 1.0).to_event(2), obs=y)


def network(x: Tensor, y: Tensor) -> None:
    """A noisy weight matrix with its rows and columns in another order."""
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P @ x @ P.mT, 0.35 * len(x)).to_event(2), obs=y)


def sharp(x: Tensor, y: Tensor) -> None:
    """The same with less noise."""
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P @ x @ P.mT, 0.2 * len(x)).to_event(2), obs=y)


TARGETS = {"points by logits": logits, "points": points, "network": network, "network, sharp": sharp}
"""Models by name."""


def data(model: Model, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """The original and its noisy version; the permutation that made it is the identity."""
    generator = torch.Generator().manual_seed(seed)
    columns, noise = {network: (n, 0.35 * n), sharp: (n, 0.2 * n)}.get(model, (2, 1.0))
    x = torch.randn(n, columns, generator=generator)
    return x, x + noise * torch.randn(x.shape, generator=generator)


METHODS: dict[str, Callable[..., Any]] = {
    "SwapMetropolis": lambda *model: SwapMetropolis(*model, num_steps=1),
    "exact": lambda *model: LocallyBalanced(*model, score="exact"),
    "gradient": lambda *model: LocallyBalanced(*model, score="gradient"),
}


def distances(model: Model, args: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Total variation distance from the posterior by method."""
    joint = LogJoint(model, args)
    states = torch.tensor(list(itertools.permutations(range(len(args[0])))))
    score = joint.evaluate({"P": pgs.to_matrix(states).to(args[0])}, {}, len(states)).total.sum(0)
    probability = score.softmax(0)
    code = len(args[0]) ** torch.arange(len(args[0]))
    keys, order = (states * code).sum(-1).sort()

    def distance(index: Tensor) -> float:
        cells = order[torch.searchsorted(keys, (index * code).sum(-1))]
        share = torch.bincount(cells, minlength=len(states)) / len(index)
        return float((share - probability).abs().sum() / 2)

    found = {}
    for name, make in METHODS.items():
        chain = Chain(joint, {"P": states[torch.randint(len(states), (REPLICAS, 1))]})
        kernel = make()
        kernel.bind(chain, 0)
        for _ in range(STEPS):
            kernel.step()
        found[name] = distance(chain.index["P"][:, 0])
    found["posterior draws"] = distance(states[probability.multinomial(REPLICAS, replacement=True)])
    return found


def efficiency(model: Model, args: tuple[Tensor, Tensor], name: str) -> tuple[float, float, float]:
    """Acceptance, effective draws a second and their number, of the log density in one chain from the truth."""
    n = len(args[0])
    mcmc = MCMC(
        METHODS[name](model),
        num_samples=DRAWS,
        warmup_steps=100,
        initial_params={"P": torch.eye(n)},
        disable_progbar=True,
    )
    start = time.perf_counter()
    mcmc.run(*args)
    seconds = time.perf_counter() - start
    P = mcmc.get_samples()["P"]
    log_p = LogJoint(model, args).evaluate({"P": P}, {}, len(P)).total.sum(0)
    size = float(effective_sample_size(log_p[None], chain_dim=0, sample_dim=1)) if float(log_p.std()) > 0 else 0.0
    return mcmc.diagnostics()["acceptance rate"]["chain 0"], size / seconds, size


def main() -> None:
    """Print the table."""
    print("| target | method | distance, n = 5 | acceptance, n = 12 | effective draws of 1,000 | a second |")
    print("| --- | --- | --- | --- | --- | --- |")
    for label, model in TARGETS.items():
        pyro.set_rng_seed(0)
        found: dict[str, list[float]] = {}
        for seed in range(5):
            for name, value in distances(model, data(model, 5, seed)).items():
                found.setdefault(name, []).append(value)
        for name, values in found.items():
            line = f"| {label} | {name} | {sum(values) / len(values):.3f} |"
            if name in METHODS:
                runs = [efficiency(model, data(model, 12, seed), name) for seed in range(3)]
                acceptance, rate, size = (sum(column) / len(column) for column in zip(*runs, strict=True))
                line += f" {acceptance:.3f} | {size:.0f} | {rate:.0f} |"
            else:
                line += " | | |"
            print(line)


if __name__ == "__main__":
    main()

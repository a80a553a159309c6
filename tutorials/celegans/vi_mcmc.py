"""Variational inference, then Monte Carlo from its mode."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tutorials.celegans import gumbel_sinkhorn
from tutorials.celegans.collapsed_chain import ExchangeChain
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.identification import Identification, Run, match_allowed, onehot
from tutorials.celegans.worms import Worms

__all__ = ["fit"]

VARIATIONAL = 0.5
"""Share of the run that is variational; the rest is the chain."""

PROPOSALS = 2
"""Proposals in a step of the chain, in multiples of n."""


def fit(
    worms: Worms,
    connectome: Connectome,
    *,
    seed: int = 0,
    budget: float | None = None,
    steps: int | None = None,
    progress: bool = False,
    initial: Tensor | None = None,
) -> Identification:
    """Fit the Gumbel-Sinkhorn guide, exchanges included, then run the exchange chain from the guide's mode.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None; half for each part.
        steps: Number of steps of both parts together, Adam's and then those of `PROPOSALS` n proposals, or None.
        progress: Whether to draw progress bars.
        initial: As of the guide's fit.

    Returns:
        Marginals are averaged over the second half of the chain. The objective is the guide's ELBO, then the log evidence
        of the chain's state, W integrated out, plus ``<logits, P>``.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    Run("VI, then MCMC", budget=budget, steps=steps)  # checks the limits
    first_steps = None if steps is None else steps - int((1 - VARIATIONAL) * steps)
    first_budget = None if budget is None else VARIATIONAL * budget
    first = gumbel_sinkhorn.fit(
        worms, connectome, seed=seed, budget=first_budget, steps=first_steps, progress=progress, initial=initial
    )
    rest = None if steps is None or first_steps is None else steps - first_steps
    left = None if budget is None else budget - first.seconds
    if rest == 0 or (left is not None and left <= 0):
        return dataclasses.replace(first, method="VI, then MCMC")
    run = Run("VI, then MCMC", budget=left, steps=rest, progress=progress)
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    chain = ExchangeChain(evidence, worms.allowed, first.index, seed, worms.logits)
    total = torch.zeros_like(worms.allowed, dtype=torch.float64)
    draws = 0
    for _ in run:
        chain.exchange(PROPOSALS * worms.num_neurons)
        state = torch.from_numpy(chain.index)
        if run.fraction > 0.5:
            total += onehot(state)
            draws += 1
        if run.due:
            run.record(chain.log_evidence, state)
    marginals = total / draws if draws else onehot(torch.from_numpy(chain.index))
    before = int(first.extra["steps"])
    later = [dataclasses.replace(s, seconds=first.seconds + s.seconds, step=before + s.step) for s in run.history]
    extra = first.extra | {"proposals": float(chain.proposed), "acceptance": chain.accepted / max(chain.proposed, 1)}
    seconds = first.seconds + run.seconds
    index = match_allowed(marginals, worms.allowed)
    return Identification("VI, then MCMC", marginals, index, first.history + later, seconds, extra)

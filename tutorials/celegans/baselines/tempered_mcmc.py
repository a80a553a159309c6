"""Annealed Monte Carlo: swaps given the weights and exchanges without them, while the likelihood's power rises to one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tutorials.celegans.baselines.gibbs_mcmc import GibbsSwapChain
from tutorials.celegans.collapsed_chain import ExchangeChain
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.identification import (
    Identification,
    Run,
    check_initial,
    match_allowed,
    onehot,
    random_allowed,
)
from tutorials.celegans.worms import Worms

__all__ = ["fit"]

HOTTEST, COOLEST = 40, 120
"""Transitions of each worm that the likelihood counts for at the start and the end of the annealing: with 1,000 recorded,
powers .04 and .12. Below, identities are as good as random; above, they hardly move. After it all count."""

ANNEALED = 0.6
"""Share of the run that is annealing; the rest samples the posterior."""

RUNGS = 48
"""Different powers on the way."""

SWEEPS = 3
"""Swap proposals given W for each worm and step, in multiples of n."""

EXCHANGES = 2
"""Exchanges proposed in a step with W integrated out, in multiples of n."""


class _Anneal:
    """One state moved by both kinds of moves at any power of the likelihood.

    The likelihood to a power is that with the variance of the noise divided by it, up to a constant.
    """

    def __init__(self, worms: Worms, evidence: CollapsedEvidence, index: Tensor, seed: int) -> None:
        self._worms, self._target = worms, evidence
        self.index = index
        self._seeds = np.random.default_rng(seed)
        self.power = 0.0
        self.counts = np.zeros(3)  # proposed, valid, accepted exchanges

    def set_power(self, power: float) -> None:
        """Of the likelihood, positive."""
        if power == self.power:
            return
        self.power = power
        worms = self._worms
        sigma = worms.sigma / power**0.5
        self._evidence = CollapsedEvidence(self._target.adjacency, self._target.statistics, sigma, worms.weight_scale)
        self._gibbs = GibbsSwapChain(
            self._evidence,
            worms.allowed,
            self.index,
            self._seed(),
            proposals=SWEEPS * worms.num_neurons,
            logits=worms.logits,
        )

    def _seed(self) -> int:
        return int(self._seeds.integers(2**62))

    def step(self) -> None:
        """Draw W, propose swaps given W, then exchanges without it."""
        self._gibbs.index[:] = self.index.numpy()
        self._gibbs.step()
        state = torch.from_numpy(self._gibbs.index)
        chain = ExchangeChain(self._evidence, self._worms.allowed, state, self._seed(), self._worms.logits)
        chain.exchange(EXCHANGES * self._worms.num_neurons)
        self.counts += chain.proposed, chain.valid, chain.accepted
        self.index = torch.from_numpy(chain.index)


def _power(fraction: float, longest: int) -> float:
    """Power of the likelihood at a share of the run, for recordings of a length."""
    if fraction >= ANNEALED:
        return 1.0
    rung = int(RUNGS * fraction / ANNEALED) / RUNGS
    counted: float = HOTTEST * (COOLEST / HOTTEST) ** rung
    return min(1.0, counted / longest)


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
    """Sample permutations by Metropolis moves while the likelihood is slowly switched on, then from the posterior.

    A step draws W given P, proposes `SWEEPS` n swaps in each worm given W, and then `EXCHANGES` n exchanges of identities in
    sets of worms with W integrated out. Each of these leaves the tempered posterior invariant, so the part after the
    annealing is a chain on the posterior itself.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of steps, or None. The run ends at whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation to start from, without annealing; None draws one.

    Returns:
        Marginals are averaged over the second half of what follows the annealing; the objective is the log evidence of the
        state, W integrated out, plus the log prior's part that places and colours make.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("tempered MCMC", budget=budget, steps=steps, progress=progress)
    annealed = 0.0 if initial is not None else ANNEALED
    if initial is None:
        initial = random_allowed(worms.allowed, torch.Generator().manual_seed(seed))
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    state = _Anneal(worms, evidence, initial, seed)
    total = torch.zeros_like(worms.allowed, dtype=torch.float64)
    draws, longest = 0, int(worms.lengths.max())
    for _ in run:
        state.set_power(1.0 if run.fraction >= annealed else _power(run.fraction, longest))
        state.step()
        if run.fraction > (1 + annealed) / 2:
            total += onehot(state.index)
            draws += 1
        if run.due:
            P = onehot(state.index)
            run.record(float(evidence(P) + (P * worms.logits).sum()), state.index, power=state.power)
    marginals = total / draws if draws else onehot(state.index)
    proposed, valid, accepted = state.counts.tolist()
    extra = {"exchanges": proposed, "valid": valid / max(proposed, 1.0), "acceptance": accepted / max(proposed, 1.0)}
    return Identification(
        "tempered MCMC", marginals, match_allowed(marginals, worms.allowed), run.history, run.seconds, extra
    )

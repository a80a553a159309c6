"""Metropolis swaps scored with the weights integrated out."""

from __future__ import annotations

import torch
from torch import Tensor

from tutorials.celegans.collapsed_chain import CollapsedSwapChain
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

PROPOSALS = 200
"""Proposals in a step of `fit`."""


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
    """Sample permutations by Metropolis swaps, with W integrated out.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of steps of `PROPOSALS` proposals, or None. The run ends at whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation to start from; None draws one.

    Returns:
        Marginals are averaged over the second half of the run; the objective is the log evidence of the
        state.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("collapsed MCMC", budget=budget, steps=steps, progress=progress)
    if initial is None:
        initial = random_allowed(worms.allowed, torch.Generator().manual_seed(seed))
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    chain = CollapsedSwapChain(evidence, worms.allowed, initial, seed, worms.logits)
    total = torch.zeros_like(worms.allowed, dtype=torch.float64)
    draws = 0
    for _ in run:
        chain.step(PROPOSALS)
        state = torch.from_numpy(chain.index)
        if run.fraction > 0.5:
            total += onehot(state)
            draws += 1
        if run.due:
            run.record(chain.log_evidence, state, acceptance=chain.accepted / max(chain.proposed, 1))
    marginals = total / draws if draws else onehot(torch.from_numpy(chain.index))
    extra = {
        "proposals": float(chain.proposed),
        "proposals per second": chain.proposed / run.seconds,
        "valid": chain.valid / max(chain.proposed, 1),
        "acceptance": chain.accepted / max(chain.proposed, 1),
    }
    return Identification(
        "collapsed MCMC", marginals, match_allowed(marginals, worms.allowed), run.history, run.seconds, extra
    )

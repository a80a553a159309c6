"""Are the probabilities of a method too high on data like these? Told by worms that are simulated from its own answer.

A parametric bootstrap: weights are drawn from their prior, recordings simulated with the answer as the truth, and fitted in
the same way. How often answers of such a fit are right, by the probability they are given, corrects the probabilities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_gs.calibration import Reliability, recalibrate, reliability
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.identification import Identification, onehot
from tutorials.celegans.identities import best_matching
from tutorials.celegans.worms import BURN_IN, Worms

__all__ = ["recalibrated", "simulate_like", "simulated_reliability"]

_STABLE = 0.98
"""Largest absolute eigenvalue of the simulated dynamics; weights that exceed it are scaled down."""


def simulate_like(worms: Worms, connectome: Connectome, index: Tensor, *, seed: int = 0) -> Worms:
    """Worms with the same candidates, known neurons, lengths and noise, whose truth is a given answer.

    The weights are a draw from the prior: given an answer that is partly wrong they would be too small. Neurons that a worm
    does not show are simulated too, and hidden. Places and colours are not simulated: ``logits`` stay, and an answer agrees
    with them more than a truth does. The more they tell, the more a correction by these worms leaves uncorrected.

    Args:
        worms: What the answer is of.
        connectome: The network behind them.
        index: Shape (J, n), long: the answer, allowed permutations.
        seed: Of all random numbers.

    Returns:
        The same worms with other ``traces``, and with ``truth`` and ``weights``.
    """
    generator = torch.Generator().manual_seed(seed)
    P, n = onehot(index), worms.num_neurons
    own = torch.diag_embed(worms.persistence)
    W = worms.weight_scale * torch.randn(n, n, generator=generator, dtype=torch.float64) * connectome.adjacency
    while float(torch.linalg.eigvals(P @ W @ P.mT + own).abs().max()) > _STABLE:  # ends: persistence alone is stable
        W = 0.9 * W
    dynamics = P @ W @ P.mT + own
    steps = worms.traces.shape[1]
    state = torch.zeros(worms.num_worms, n, dtype=torch.float64)
    traces = torch.zeros_like(worms.traces)
    for step in range(-BURN_IN, steps):
        noise = torch.randn(state.shape, generator=generator, dtype=torch.float64)
        state = (dynamics @ state.unsqueeze(-1)).squeeze(-1) + worms.sigma * noise
        if step >= 0:
            traces[:, step] = state
    recorded = (torch.arange(steps) <= worms.lengths.unsqueeze(-1)).unsqueeze(-1) & worms.observed.unsqueeze(1)
    return dataclasses.replace(worms, traces=traces * recorded, truth=index, weights=W)


def _have_a_choice(worms: Worms) -> Tensor:
    """Observed neurons with several candidates, bool (J, n); to be right about others says nothing about these."""
    return worms.observed & (worms.allowed.sum(-1) > 1)


def simulated_reliability(
    fit: Callable[..., Identification],
    worms: Worms,
    connectome: Connectome,
    index: Tensor,
    *,
    seeds: Sequence[int] = (1,),
    bins: int = 10,
    **options: Any,
) -> Reliability | None:
    """How often a method's answers are right on worms like these, by the probability that it gives them.

    Answers are those of the tables, `best_matching`.

    Args:
        fit: The method.
        worms: The recordings.
        connectome: The network behind them.
        index: Shape (J, n), long: its answer, the truth of the simulated worms.
        seeds: One simulation and one fit each.
        bins: Of the curve.
        **options: Of the fit, such as its ``budget``.

    Returns:
        The curve over observed neurons that have a choice; None if there are none.
    """
    unknown = _have_a_choice(worms)
    if not unknown.any():
        return None
    marginals, answers = [], []
    for seed in seeds:
        again = simulate_like(worms, connectome, index, seed=seed)
        result = fit(again, connectome, seed=seed, **options)
        marginals.append(result.marginals)
        answers.append(best_matching(result, again))
    count = len(answers)
    truth, rows = onehot(index).repeat(count, 1, 1), unknown.repeat(count, 1)
    return reliability(torch.cat(marginals), truth, bins, answer=onehot(torch.cat(answers)), rows=rows)


def recalibrated(result: Identification, worms: Worms, curve: Reliability | None) -> Identification:
    """The result with the probabilities of its answers corrected; neurons with one candidate keep theirs.

    Args:
        result: Of a method.
        worms: What it is of.
        curve: From `simulated_reliability`; None leaves the result as it is.
    """
    if curve is None:
        return result
    corrected = recalibrate(result.marginals, curve, answer=onehot(best_matching(result, worms)), allowed=worms.allowed)
    unknown = _have_a_choice(worms)
    return dataclasses.replace(result, marginals=torch.where(unknown.unsqueeze(-1), corrected, result.marginals))

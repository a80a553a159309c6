"""Maximum a posteriori by turns: regression for the weights, quadratic assignment for permutations."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from scipy.optimize import quadratic_assignment
from torch import Tensor

from pyro_gs.ops.sinkhorn import sinkhorn
from pyro_gs.ops.support import SupportWarning
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence, Statistics
from tutorials.celegans.exchange import ExchangeSearch
from tutorials.celegans.identification import (
    Identification,
    Run,
    check_initial,
    match_allowed,
    onehot,
    random_allowed,
)
from tutorials.celegans.twins import with_exchanges
from tutorials.celegans.worms import Worms

__all__ = ["fit", "mask_center", "regressions"]

POSITION = 2.0
"""Size of the positions on the diagonals, in multiples of the weights' scale; the best of 0 to 5."""

LONGEST_EXCHANGE = 0.2
"""Share of the budget that one search for exchanges may take."""


def regressions(worms: Worms, statistics: Statistics) -> Tensor:
    """Each worm's own estimate of ``P W P'``: ridge regression of its activity on that one step before.

    Args:
        worms: The recordings and scales.
        statistics: Their sums.

    Returns:
        Shape (J, n, n), in the worm's own order.
    """
    ridge = (worms.sigma / worms.weight_scale) ** 2 * torch.eye(statistics.size, dtype=torch.float64)
    estimate: Tensor = torch.linalg.solve(statistics.gram + ridge, statistics.cross.mT)
    return estimate.mT


def mask_center(allowed: Tensor) -> Tensor:
    """The doubly stochastic matrix of largest entropy on a mask: its Sinkhorn scaling, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SupportWarning)  # candidates that lie on no permutation get zero
        return sinkhorn(torch.where(allowed, 0.0, -torch.inf).to(torch.float64))


class _Assignment:
    """FAQ's answer to ``max tr(M' P W P')`` for one worm; pairs without a choice are held fixed.

    FAQ knows no mask. It starts from the middle of this one, and positions on both diagonals (those of
    observed neurons are the means over their candidates) draw it there. Nor does it know a term that is linear in ``P``:
    logits enter as edges to as many more nodes, which are matched to themselves. Rows that were not observed are zero, as
    Fishkind et al. (2019) pad the smaller graph.

    Args:
        M: The worm's own estimate of ``P W P'``, shape (n, n).
        allowed: Its candidates, bool, shape (n, n).
        observed: Its neurons, bool, shape (n,).
        logits: What speaks for each candidate beside M, in the units of the objective, shape (n, n).
        connectome: The network.
        position: Size of the positions.
    """

    def __init__(
        self, M: Tensor, allowed: Tensor, observed: Tensor, logits: Tensor, connectome: Connectome, position: float
    ) -> None:
        body = connectome.body - 0.5
        place = observed * (allowed * body).sum(-1) / allowed.sum(-1)
        self._M = (M + position * place.diag()).numpy()
        self._shift = (position * body.diag()).numpy()
        self._logits = logits.numpy() if bool(logits.any()) else None
        rows = (allowed.sum(1) == 1).nonzero().squeeze(1)
        columns = allowed[rows].double().argmax(1)
        self._fixed = torch.stack([rows, columns], 1).numpy()
        keep_rows, keep_columns = (np.delete(np.arange(len(M)), taken) for taken in self._fixed.T)
        self._start = mask_center(allowed).numpy()[keep_rows][:, keep_columns]

    def __call__(self, W: Tensor) -> Tensor:
        """The identities of the observed neurons, not always allowed ones: (n, n) to (n,) long."""
        if not self._start.size:
            return torch.from_numpy(self._fixed[self._fixed[:, 0].argsort(), 1])
        rng = np.random.default_rng(0)  # not used from a given P0, but scipy would look at the global one
        M, network, fixed, n = self._M, W.numpy() + self._shift, self._fixed, len(self._M)
        if self._logits is not None:
            nodes = np.arange(n, 2 * n)
            M = np.block([[M, self._logits], [np.zeros((n, 2 * n))]])
            network = np.block([[network, np.eye(n)], [np.zeros((n, 2 * n))]])
            fixed = np.concatenate([fixed, np.stack([nodes, nodes], 1)])
        options = {"maximize": True, "partial_match": fixed, "P0": self._start, "rng": rng}
        result = quadratic_assignment(M, network, method="faq", options=options)
        return torch.from_numpy(np.asarray(result.col_ind[:n], dtype=np.int64))


def fit(
    worms: Worms,
    connectome: Connectome,
    *,
    seed: int = 0,
    budget: float | None = None,
    steps: int | None = None,
    progress: bool = False,
    initial: Tensor | None = None,
    exchange: bool = False,
) -> Identification:
    """Climb from random allowed permutations, over and over, and return the best of all summits.

    A step takes the conditional mean of W, solves one quadratic assignment in each worm by FAQ (Vogelstein et
    al. 2015), moves to the allowed permutation that agrees most with its answer, and keeps that if the
    log joint of Y and P rises. A climb ends when no worm moves.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of steps, over all climbs, or None. The run ends at whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation where the first climb starts; None draws one.
        exchange: Whether a climb that ends exchanges identities in several worms at once, as the Gumbel-Sinkhorn guide
            does, and goes on if that helps.

    Returns:
        Marginals are the best permutation itself, with ``exchange`` those of the posterior over it and exchanges of two
        identities, see :func:`~tutorials.celegans.twins.with_exchanges`; the objective is its log joint with Y, W
        integrated out.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("MAP", budget=budget, steps=steps, progress=progress)
    generator = torch.Generator().manual_seed(seed)
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    search = ExchangeSearch(evidence, worms.allowed, worms.logits) if exchange else None
    position = POSITION * worms.weight_scale
    # FAQ's tr(M' P W P') is worth gram's diagonal, in nats
    statistics = evidence.statistics
    worth = statistics.gram.diagonal(dim1=1, dim2=2).sum(1) / worms.observed.sum(1) / worms.sigma**2
    scaled = worms.logits / worth[:, None, None]
    assignments = [
        _Assignment(M, mask, seen, logits, connectome, position)
        for M, mask, seen, logits in zip(regressions(worms, statistics), worms.allowed, worms.observed, scaled, strict=True)
    ]

    def log_joint(index: Tensor) -> float:
        P = onehot(index)
        return float(evidence(P) + (P * worms.logits).sum())

    index = random_allowed(worms.allowed, generator) if initial is None else initial.clone()
    value = log_joint(index)
    best, best_value, climbs, moves = index, value, 1, 0
    for _ in run:
        W = evidence.posterior_weights(onehot(index))
        moved = False
        for worm, assign in enumerate(assignments):
            trial = index.clone()
            trial[worm] = match_allowed(onehot(assign(W)), worms.allowed[worm])
            trial_value = log_joint(trial)
            if trial_value > value:
                index, value, moved, moves = trial, trial_value, True, moves + 1
        if search is not None and not moved:
            left = math.inf if budget is None else min(LONGEST_EXCHANGE * budget, budget - run.seconds)
            index, gain = search.improve(index, seconds=left)
            value, moved = value + gain, gain > 0
        if value > best_value:
            best, best_value = index, value
        if run.due:
            run.record(best_value, best, climbs=climbs)
        if not moved:
            index = random_allowed(worms.allowed, generator)
            value, climbs = log_joint(index), climbs + 1
    extra = {"climbs": float(climbs), "acceptance": moves / (run.step * worms.num_worms)}
    marginals = onehot(best) if search is None else with_exchanges(onehot(best), best, search, worms)
    return Identification("MAP", marginals, best, run.history, run.seconds, extra)

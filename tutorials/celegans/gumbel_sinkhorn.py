"""Variational inference with a Gumbel-Sinkhorn guide."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

import pyro_gs as pgs
from pyro_gs.infer.objective import Objective
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.exchange import ExchangeSearch
from tutorials.celegans.identification import Identification, Run, check_initial, match_allowed, onehot
from tutorials.celegans.model import collapsed_model
from tutorials.celegans.svi import Ascent, falling
from tutorials.celegans.twins import with_exchanges
from tutorials.celegans.worms import Worms

__all__ = ["fit"]

SAMPLES = 1
"""Samples of the permutations in a step."""

STEP_SIZES = (0.1, 0.01)
"""Adam's step size at the start and the end of the first stretch, geometric in between."""

ALONE = 0.3
"""Share of the run for one worm alone, where there are several and nobody is known."""

FIRST = 0.4
"""Share of the run, after that, which is the first stretch, at the most."""

FIRST_STEPS = 1000
"""Adam steps of the first stretch, at the most."""

SHARES = (0.4, 0.2, 0.1)
"""Of the labels that restarts set free, in turn."""

RESTART_STEPS = 80
"""Adam steps of a restart."""

RESTART_SIZES = (0.1, 0.02)
"""Adam's step size at the start and the end of a restart."""

LAST = 0.8
"""Share of the same after which there are no more restarts: the guide is fitted around the best matching."""

LAST_SIZES = (0.1, 0.01)
"""Adam's step size at the start and the end of that."""

LAST_LOGITS = (3.0, 4.5, 6.0, 8.0, 11.0)
"""By how much the best matching's pairs are above the others at its start: that of them which has the highest ELBO."""

LAST_ESTIMATES = 4
"""Estimates of each such ELBO."""

LONGEST_SEARCH = 0.15
"""Share of the budget that one search for exchanges may take, but for the first, and none goes on after `LAST`."""

MARGINAL_SAMPLES = 200
"""Hard samples behind the posterior marginals."""

INITIAL_LOGIT = 3.0
"""Logit that an initial assignment gets above the others."""


def fit(
    worms: Worms,
    connectome: Connectome,
    *,
    seed: int = 0,
    budget: float | None = None,
    steps: int | None = None,
    progress: bool = False,
    initial: Tensor | None = None,
    objective: Objective = "noise_kl",
    temperature: float = 1.0,
    samples: int = SAMPLES,
    exchange: bool = True,
    restarts: bool = True,
) -> Identification:
    """Fit an ``AutoGumbelSinkhorn`` guide to the model with W integrated out.

    Stochastic gradient steps lead into optima where labels are confused, some in all worms at once, some along long cycles.
    So after a first stretch of steps come restarts (:class:`pyro_gs.PartialRestarts`): a random part of the labels is set
    free, steps are taken, identities are exchanged by :class:`~tutorials.celegans.exchange.ExchangeSearch` where the log
    joint of the guide's mode rises, and the result is kept if it is higher than all before. Where places or colours are
    given, the best matching by them alone is among those. The last stretch fits the guide around the best: from logits that
    prefer it by as much as has the highest ELBO. Where its mode ends below the best, the best is the answer all the same.

    Several worms of which no neuron is known have little but each other to go by. There one of them, the one that shows
    most, is fitted alone before, and the others are matched to it.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of Adam steps, or None. The run ends at whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation that starts `INITIAL_LOGIT` above the rest. None
            starts flat.
        objective: As in ``AutoGumbelSinkhorn``.
        temperature: Of the guide and of the relaxed prior.
        samples: Of the permutations in a step.
        exchange: Whether to exchange identities.
        restarts: Whether to restart parts; with neither this is plain SVI.

    Returns:
        Marginals are averages of hard samples of the guide, with ``exchange`` after a random exchange of two identities,
        see :func:`~tutorials.celegans.twins.with_exchanges`; the objective is the ELBO, averaged since the last snapshot.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("Gumbel-Sinkhorn VI", budget=budget, steps=steps, progress=progress)
    allowed = worms.allowed
    taken = iter(run)
    first = torch.zeros(allowed.shape, dtype=torch.float64) if initial is None else INITIAL_LOGIT * onehot(initial)
    few = None if steps is None else round(ALONE * steps)
    if initial is None and restarts and len(allowed) > 1 and few != 0 and not bool(worms.known.any()):
        worm = int((worms.lengths * worms.observed.sum(-1)).argmax())
        for _ in range(few or 0):
            next(taken)  # they are taken there
        alone = fit(
            worms.take([worm]),
            connectome,
            seed=seed,
            budget=None if budget is None else ALONE * budget,
            steps=few,
            progress=progress,
            objective=objective,
            temperature=temperature,
            samples=samples,
            exchange=exchange,
        )
        first[worm] = INITIAL_LOGIT * onehot(alone.index)[0]
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    search = ExchangeSearch(evidence, allowed, worms.logits) if exchange else None
    guide = pgs.AutoGumbelSinkhorn(collapsed_model, temperature=temperature, init_scale=0.0, objective=objective)
    ascent = Ascent(pgs.relax(collapsed_model, temperature=temperature), guide, seed=seed, samples=samples)
    data = (evidence, allowed, worms.logits)
    guide(*data)
    guide.set_logits("P", torch.where(allowed, first, -torch.inf))
    start = run.fraction

    def at(share: float) -> float:
        """A share of what comes now, as one of the run."""
        return start + (1 - start) * share

    def log_joint(P: dict[str, Tensor]) -> float:
        return float(evidence(P["P"].double()) + (P["P"] * worms.logits).sum())

    parts: pgs.PartialRestarts | None = None

    def climb(sizes: tuple[float, float], *, until: float, longest: int | None = None) -> None:
        """Take Adam steps of falling size until a share of the run is over, or so many were taken."""
        ascent.forget()  # Adam's moments belong to other logits
        began = run.fraction
        for count in itertools.count(1):
            if next(taken, None) is None:
                return
            share = (run.fraction - began) / max(1e-9, until - began)
            ascent.step(falling(*sizes, share if longest is None else max(share, count / longest)), *data)
            if run.due:
                answer = guide.median() if parts is None or until == 1.0 else parts.best
                run.record(ascent.elbo(), pgs.to_index(answer["P"]))
            if run.fraction >= until or count == longest:
                return

    def improved(share: float) -> dict[str, Tensor]:
        """The guide's mode after exchanges, the search for which may take a share of the budget."""
        mode = guide.median()
        if search is None:
            return mode
        share = min(share, at(LAST) - run.fraction)
        index, _ = search.improve(pgs.to_index(mode["P"]), seconds=math.inf if budget is None else share * budget)
        return {"P": pgs.to_matrix(index)}

    if exchange or restarts:
        climb(STEP_SIZES, until=at(FIRST), longest=FIRST_STEPS)
        parts = pgs.PartialRestarts(guide, log_joint, generator=torch.Generator().manual_seed(seed))
        parts.end(improved(LAST))
        if bool(worms.logits.any()):  # what places and colours say alone, which a short run does not reach
            parts.end({"P": pgs.to_matrix(match_allowed(worms.logits, allowed))})
        while restarts and run.fraction < at(LAST):
            parts.begin(SHARES[parts.count % len(SHARES)])
            climb(RESTART_SIZES, until=at(LAST), longest=RESTART_STEPS)
            parts.end(improved(LONGEST_SEARCH))
        parts.finish(LAST_LOGITS, lambda: -ascent.evaluate(LAST_ESTIMATES, *data))
    climb(STEP_SIZES if parts is None else LAST_SIZES, until=1.0)
    marginals = guide.hard_sample((MARGINAL_SAMPLES,))["P"].double().mean(0)
    answer = guide.median()
    extra = {"steps": float(run.step)}
    if parts is not None:
        extra |= {"restarts": float(parts.count), "restarts that rose": float(parts.accepted)}
        parts.end(answer)  # the relaxed objective is not the log joint: the guide may have left the best
        answer = parts.best
    index = pgs.to_index(answer["P"])
    if search is not None:
        marginals = with_exchanges(marginals, index, search, worms)
    return Identification("Gumbel-Sinkhorn VI", marginals, index, run.history, run.seconds, extra)

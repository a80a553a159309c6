"""Variational inference with a Gumbel-Sinkhorn guide."""

from __future__ import annotations

import torch
from torch import Tensor

import pyro_gs as pgs
from pyro_gs.infer.objective import Objective
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence, Statistics
from tutorials.celegans.exchange import ExchangeSearch
from tutorials.celegans.identification import Identification, Run, check_initial, onehot
from tutorials.celegans.model import collapsed_model
from tutorials.celegans.svi import Ascent, falling
from tutorials.celegans.worms import Worms

__all__ = ["fit", "relabel"]

SAMPLES = 1
"""Samples of the permutations in a step."""

STEP_SIZES = (0.1, 0.01)
"""Adam's step size at the start and the end of each stretch between exchanges, geometric in between."""

RESTART = 0.5
"""Step size at the start of later stretches, as a share of the first's."""

EXCHANGES = (0.45, 0.7, 0.88)
"""Shares of the run after which identities are exchanged between worms."""

LONGEST_EXCHANGE = 0.2
"""Share of the budget that one search for exchanges may take."""

MARGINAL_SAMPLES = 200
"""Hard samples behind the posterior marginals."""

INITIAL_LOGIT = 3.0
"""Logit that an initial assignment gets above the others."""


def relabel(logits: Tensor, old: Tensor, new: Tensor, allowed: Tensor) -> Tensor:
    """Logits of the same law after identities were exchanged.

    Args:
        logits: Shape (J, n, n), ``-inf`` where not allowed.
        old: Shape (J, n), long: permutations before the exchanges.
        new: Shape (J, n), long: and after them.
        allowed: Shape (J, n, n), bool.

    Returns:
        Shape (J, n, n): each column moved to its new label. A candidate that the old label did not have gets
        the lowest logit of its worm.
    """
    source = torch.empty_like(old).scatter_(1, new, old)  # the old label of each new one
    moved = logits.gather(2, source[:, None, :].expand_as(logits))
    lowest = torch.where(logits > -torch.inf, logits, torch.inf).amin((1, 2), keepdim=True)
    return torch.where(allowed, torch.maximum(moved, lowest), -torch.inf)


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
) -> Identification:
    """Fit an ``AutoGumbelSinkhorn`` guide to the model with W integrated out.

    Stochastic gradient steps lead into optima where some labels are confused in all worms at once. So now and then the
    identities are exchanged by :class:`~tutorials.celegans.exchange.ExchangeSearch` where the evidence of the guide's
    mode rises, the guide's logits are relabelled, and the steps go on from there.

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
        exchange: Whether to exchange identities; without, this is plain SVI.

    Returns:
        Marginals are averages of hard samples of the guide; the objective is the ELBO, averaged since the last snapshot.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("Gumbel-Sinkhorn VI", budget=budget, steps=steps, progress=progress)
    allowed = worms.allowed
    evidence = CollapsedEvidence(connectome.adjacency, Statistics.from_worms(worms), worms.sigma, worms.weight_scale)
    search = ExchangeSearch(evidence, allowed, worms.logits) if exchange else None
    guide = pgs.AutoGumbelSinkhorn(collapsed_model, temperature=temperature, init_scale=0.0, objective=objective)
    ascent = Ascent(pgs.relax(collapsed_model, temperature=temperature), guide, seed=seed, samples=samples)
    data = (evidence, allowed, worms.logits)
    guide(*data)
    if initial is not None:
        guide.set_logits("P", torch.where(allowed, INITIAL_LOGIT * onehot(initial), -torch.inf))

    due, gained = list(EXCHANGES) if exchange else [], 0.0
    began, first = 0.0, STEP_SIZES[0]
    for _ in run:
        if search is not None and due and run.fraction > due[0]:
            due.pop(0)
            old = pgs.to_index(guide.median()["P"])
            new, gain = search.improve(old, seconds=float("inf") if budget is None else LONGEST_EXCHANGE * budget)
            guide.set_logits("P", relabel(guide.logits("P").detach(), old, new, allowed))
            ascent.forget()  # Adam's moments belong to the old labels
            gained += gain
            began, first = run.fraction, RESTART * STEP_SIZES[0]
        ends = due[0] if due else 1.0
        share = (run.fraction - began) / max(1e-9, ends - began)
        ascent.step(falling(first, STEP_SIZES[1], share), *data)
        if run.due:
            run.record(ascent.elbo(), pgs.to_index(guide.median()["P"]))
    marginals = guide.hard_sample((MARGINAL_SAMPLES,))["P"].double().mean(0)
    index = pgs.to_index(guide.median()["P"])
    extra = {"steps": float(run.step), "gained by exchanges": gained}
    return Identification("Gumbel-Sinkhorn VI", marginals, index, run.history, run.seconds, extra)

"""Naive variational inference: each row of the permutation on its own, with no constraint on the columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.identification import Identification, Run, check_initial, match_allowed, onehot
from tutorials.celegans.worms import Worms

__all__ = ["fit", "relaxed_rows", "row_kl"]

SAMPLES = 4
"""Samples of P in a step."""

STEP_SIZES = (0.1, 0.01)
"""Adam's step size at the start and the end of the run, geometric in between."""

INITIAL_LOGIT = 3.0
"""Logit that an initial assignment gets above the others."""


def relaxed_rows(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Sample independent relaxed rows, ``softmax((logits + Gumbel) / temperature)``.

    Args:
        logits: Shape (..., n, n), ``-inf`` where not allowed.
        temperature: Of the relaxation.
        generator: Where the random numbers come from.

    Returns:
        The same shape; rows sum to one, columns need not.
    """
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    return ((logits - exponential.log()) / temperature).softmax(-1)


def row_kl(logits: Tensor, prior: Tensor) -> Tensor:
    """KL of independent rows from independent rows: (..., n, n) to (...).

    Args:
        logits: Shape (..., n, n), ``-inf`` where not allowed.
        prior: The same, with the same support.
    """
    log_q, log_p = logits.log_softmax(-1), prior.log_softmax(-1)
    allowed = logits > -math.inf
    ratio = log_q.masked_fill(~allowed, 0.0) - log_p.masked_fill(~allowed, 0.0)
    return torch.where(allowed, log_q.exp() * ratio, 0.0).sum((-2, -1))


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
    """Fit independent rows by the relaxed evidence with W integrated out, less their KL from the prior's rows.

    Temperature 1, four samples a step, Adam with a step size that falls from .1 to .01 over the run.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of Adam steps, or None. The run ends at whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation that starts `INITIAL_LOGIT` above the rest. None
            starts flat.

    Returns:
        Marginals are the row laws, so that columns need not sum to one; the objective is the ELBO, averaged
        since the last snapshot.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("naive VI", budget=budget, steps=steps, progress=progress)
    generator = torch.Generator().manual_seed(seed)
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    free = torch.zeros_like(worms.allowed, dtype=torch.float64) if initial is None else INITIAL_LOGIT * onehot(initial)
    free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=STEP_SIZES[0])

    prior = torch.where(worms.allowed, worms.logits, -math.inf)

    def logits() -> Tensor:
        return torch.where(worms.allowed, free, -math.inf)

    elbos: list[float] = []
    for _ in run:
        optimizer.param_groups[0]["lr"] = STEP_SIZES[0] * (STEP_SIZES[1] / STEP_SIZES[0]) ** run.fraction
        optimizer.zero_grad()
        current = logits()
        P = relaxed_rows(current.expand(SAMPLES, *current.shape), 1.0, generator)
        elbo = evidence(P).mean() - row_kl(current, prior).sum()
        torch.autograd.backward(-elbo)
        optimizer.step()
        elbos.append(elbo.item())
        if run.due:
            run.record(sum(elbos) / len(elbos), match_allowed(logits().detach().softmax(-1), worms.allowed))
            elbos.clear()
    marginals = logits().detach().softmax(-1)
    index = match_allowed(marginals, worms.allowed)
    return Identification("naive VI", marginals, index, run.history, run.seconds, {"steps": float(run.step)})

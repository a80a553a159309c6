"""Variational inference with the stick-breaking law of Linderman et al. (2018), on the neurons that have a choice."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_gs.distributions.transforms import StickBreakingTransform
from tutorials.celegans.baselines.map_faq import mask_center
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.identification import Identification, Run, check_initial, match_allowed, onehot
from tutorials.celegans.svi import Ascent, falling
from tutorials.celegans.worms import Worms

__all__ = ["StickGuide", "Sticks", "fit", "stick_model"]

TEMPERATURE = 1.0
"""Divides the normal variables."""

STEP_SIZES = (0.1, 0.01)
"""Adam's step size at the start and the end of the run, geometric in between."""

SPREADS = (0.1, 1.0)
"""Standard deviations of the normal variables in the guide at the start, and in the prior."""

LEAK = 0.01
"""Share of the uniform matrix in the start, whose logarithms would be infinite on the mask alone."""

PENALTY = 10.0
"""Nats that a forbidden pair costs."""

MARGINAL_SAMPLES = 50
"""Hard samples behind the posterior marginals."""

INITIAL_SHARE = 0.95
"""Share of an initial assignment in the start."""


class Sticks:
    """The order in which sticks are broken, and the way from normal variables to matrices.

    Neurons without a choice are left out, with their identities. The others are sorted along the body, observed neurons by
    the middle of their candidates: then what is left of a row's stick falls to late columns, near the end of its candidates.

    Args:
        allowed: candidates, bool, shape (J, n, n).
        body: places of the identities along the body, shape (n,).
    """

    def __init__(self, allowed: Tensor, body: Tensor) -> None:
        self.allowed = allowed
        middle = (allowed * body).sum(-1) / allowed.sum(-1)
        free = allowed.sum(-1) > 1
        order = body.argsort(stable=True)
        self._blocks = []
        for worm, mask in enumerate(allowed):
            rows = middle[worm].argsort(stable=True)
            taken = mask[~free[worm]].any(0)
            self._blocks.append((rows[free[worm][rows]], order[~taken[order]]))
        self._transform = StickBreakingTransform(TEMPERATURE)
        self.sizes = [max(0, len(rows) - 1) ** 2 for rows, _ in self._blocks]

    def matrix(self, psi: Tensor) -> Tensor:
        """Shape (K,) to doubly stochastic matrices (J, n, n), some of their mass where not allowed."""
        out = (self.allowed & (self.allowed.sum(-1, keepdim=True) == 1)).to(psi.dtype)
        for worm, ((rows, columns), part) in enumerate(zip(self._blocks, psi.split(self.sizes), strict=True)):
            if len(rows):
                side = len(rows) - 1
                block = torch.as_tensor(self._transform(part.reshape(side, side)))
                out = out.index_put((torch.tensor(worm), rows[:, None], columns), block)
        return out

    def inverse(self, P: Tensor) -> Tensor:
        """Shape (J, n, n), positive on the blocks, to (K,)."""
        parts = [
            self._transform.inv(P[worm, rows[:, None], columns]).flatten()
            for worm, (rows, columns) in enumerate(self._blocks)
            if len(rows)
        ]
        return torch.cat(parts) if parts else P.new_zeros(0)

    def softened(self, P: Tensor) -> Tensor:
        """Mixed with the uniform matrix on the blocks."""
        out = P.clone()
        for worm, (rows, columns) in enumerate(self._blocks):
            if len(rows):
                at = (torch.tensor(worm), rows[:, None], columns)
                out[at] = (1 - LEAK) * P[at] + LEAK / len(rows)
        return out


def stick_model(evidence: CollapsedEvidence, sticks: Sticks, center: Tensor, logits: Tensor) -> Tensor:
    """The collapsed model over the normal variables that break the sticks.

    Site ``psi``, shape (K,); the factors ``place`` and ``Y`` of ``collapsed_model`` at the matrices; the factor
    ``forbidden``, `PENALTY` times the mass where not allowed.

    Args:
        evidence: of the recordings, as a function of the permutations.
        sticks: their order.
        center: mean of ``psi``, shape (K,).
        logits: log-potentials of the prior of ``P``, shape (J, n, n).

    Returns:
        The matrices, shape (J, n, n).
    """
    psi: Tensor = pyro.sample("psi", dist.Normal(center, SPREADS[1]).to_event(1))
    P = sticks.matrix(psi)
    pyro.factor("place", (P * logits).sum())
    pyro.factor("forbidden", -PENALTY * P[~sticks.allowed].sum())
    pyro.factor("Y", evidence(P))
    return P


class StickGuide(PyroModule):
    """Independent normal variables.

    Args:
        start: their means, shape (K,).
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.mean: Any = PyroParam(start.clone())
        self.spread: Any = PyroParam(torch.full_like(start, SPREADS[0]), dist.constraints.positive)

    def law(self) -> dist.TorchDistribution:
        """Their law."""
        law: dist.TorchDistribution = dist.Normal(self.mean, self.spread).to_event(1)
        return law

    def forward(self, *args: object) -> Tensor:
        """Draw them."""
        psi: Tensor = pyro.sample("psi", self.law())
        return psi


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
    """Fit the stick-breaking law to the model with W integrated out.

    The law knows no masks: the paper calls them hard to build in, and its authors used rounding on worms. Here neurons
    without a choice are left out, as they say; prior and guide start at the middle of the mask, forbidden mass is penalized,
    and hard answers are the best allowed matchings of the logarithms. As in rounding, the prior is a law of the same kind
    and the KL closed form.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of Adam steps, or None. The run ends at whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation that has `INITIAL_SHARE` of the start. None starts in the middle
            of the mask.

    Returns:
        Marginals are averages of matchings of draws; the objective is the ELBO, averaged since the last snapshot.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("stick-breaking VI", budget=budget, steps=steps, progress=progress)
    allowed = worms.allowed
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    sticks = Sticks(allowed, connectome.body)
    middle = mask_center(allowed)
    center = sticks.inverse(sticks.softened(middle))
    start = center
    if initial is not None:
        start = sticks.inverse(sticks.softened(INITIAL_SHARE * onehot(initial) + (1 - INITIAL_SHARE) * middle))
    guide = StickGuide(start)

    def hard(psi: Tensor) -> Tensor:
        with torch.no_grad():
            return match_allowed(sticks.matrix(psi).log().clamp(min=-math.log(1e300)), allowed)

    ascent = Ascent(stick_model, guide, seed=seed, loss=TraceMeanField_ELBO())
    for _ in run:
        ascent.step(falling(*STEP_SIZES, run.fraction), evidence, sticks, center, worms.logits)
        if run.due:
            run.record(ascent.elbo(), hard(guide.mean))
    draws = guide.law().sample((MARGINAL_SAMPLES,))
    marginals = torch.stack([onehot(hard(psi)) for psi in draws]).mean(0)
    index = match_allowed(marginals, allowed)
    extra = {"steps": float(run.step)}
    return Identification("stick-breaking VI", marginals, index, run.history, run.seconds, extra)

"""Variational inference with the rounding law of Linderman et al. (2018), on the candidates of each neuron."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_gs.ops.matching import matching, to_index
from pyro_gs.ops.sinkhorn import sinkhorn
from tutorials.celegans.baselines.map_faq import mask_center
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.identification import Identification, Run, check_initial, match_allowed, onehot
from tutorials.celegans.svi import Ascent, falling
from tutorials.celegans.worms import Worms

__all__ = ["RoundingGuide", "fit", "rounded", "rounding_model"]

TEMPERATURE = 0.1
"""Share of the normal matrix in what the likelihood sees; the rest is its matching. The authors' script has .1 too; at .5
the evidence of matrices far from the polytope runs away."""

STEP_SIZES = (0.1, 0.01)
"""Adam's step size at the start and the end of the run, geometric in between."""

SPREADS = (0.25, 0.5)
"""Standard deviations of the normal entries in the guide at the start, and in the prior."""

MARGINAL_SAMPLES = 200
"""Hard samples behind the posterior marginals."""

INITIAL_LOGIT = 3.0
"""Logit that an initial assignment gets above the others."""


def _open(allowed: Tensor) -> Tensor:
    """Candidates of neurons that have a choice."""
    return allowed & (allowed.sum(-1, keepdim=True) > 1)


def _matrix(entries: Tensor, allowed: Tensor) -> Tensor:
    """Entries of neurons with a choice, one for the others, zero elsewhere: (K,) to (J, n, n)."""
    return allowed.to(entries.dtype).masked_scatter(_open(allowed), entries)


def _match(Z: Tensor, allowed: Tensor) -> Tensor:
    return matching(torch.where(allowed, Z.detach(), -math.inf))


def rounded(entries: Tensor, allowed: Tensor) -> Tensor:
    """``temperature Z + (1 - temperature) M(Z)`` with the matching ``M`` on the mask.

    Args:
        entries: of ``Z`` where a neuron has a choice, shape (K,).
        allowed: bool, shape (J, n, n).

    Returns:
        Shape (J, n, n), zero where not allowed.
    """
    Z = _matrix(entries, allowed)
    return TEMPERATURE * Z + (1 - TEMPERATURE) * _match(Z, allowed)


def rounding_model(evidence: CollapsedEvidence, allowed: Tensor, center: Tensor, logits: Tensor) -> Tensor:
    """The collapsed model over the normal entries that rounding starts from.

    Site ``Z``, shape (K,); the factors ``place`` and ``Y`` of ``collapsed_model`` at the rounded matrices.

    Args:
        evidence: of the recordings, as a function of the permutations.
        allowed: candidates, bool, shape (J, n, n).
        center: mean of the entries, the middle of the mask, shape (J, n, n).
        logits: log-potentials of the prior of ``P``, shape (J, n, n).

    Returns:
        The rounded matrices, shape (J, n, n).
    """
    Z: Tensor = pyro.sample("Z", dist.Normal(center[_open(allowed)], SPREADS[1]).to_event(1))
    P = rounded(Z, allowed)
    if evidence.statistics.observed is not None:
        P = P.relu()  # sums over the rows that a worm shows are weights there, and must not be negative
    pyro.factor("place", (P * logits).sum())
    pyro.factor("Y", evidence(P))
    return P


class RoundingGuide(PyroModule):
    """Normal entries, independent, around the Sinkhorn limit of free logits.

    Args:
        allowed: candidates, bool, shape (J, n, n).
        logits: initial ones, shape (J, n, n).
    """

    def __init__(self, allowed: Tensor, logits: Tensor) -> None:
        super().__init__()
        self._allowed = allowed
        self.logits: Any = PyroParam(logits.clone())
        spread = torch.full((int(_open(allowed).sum()),), SPREADS[0], dtype=logits.dtype)
        self.spread: Any = PyroParam(spread, dist.constraints.positive)

    def law(self) -> dist.TorchDistribution:
        """The normal law of the entries."""
        mean = sinkhorn(torch.where(self._allowed, self.logits, -math.inf))
        law: dist.TorchDistribution = dist.Normal(mean[_open(self._allowed)], self.spread).to_event(1)
        return law

    def forward(self, *args: object) -> Tensor:
        """Draw the entries."""
        entries: Tensor = pyro.sample("Z", self.law())
        return entries

    @torch.no_grad()
    def hard(self, samples: int) -> Tensor:
        """Matchings of draws, shape (samples, J, n, n)."""
        return torch.stack([_match(_matrix(Z, self._allowed), self._allowed) for Z in self.law().sample((samples,))])

    @torch.no_grad()
    def mode(self) -> Tensor:
        """The matching of the mean, as identities, shape (J, n)."""
        return to_index(_match(sinkhorn(torch.where(self._allowed, self.logits, -math.inf)), self._allowed))


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
    """Fit the rounding law to the model with W integrated out.

    As the authors' published script does, the law lives on the candidates alone: the Sinkhorn operator, the noise and the
    matching know no other entries, and a neuron without a choice is fixed. The library's ``AutoRounding`` has no mask. As
    there, the prior is a law of the same kind, whose mean is the middle of the mask here, and the KL is closed form.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of Adam steps, or None. The run ends at whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation that starts `INITIAL_LOGIT` above the rest. None starts flat.

    Returns:
        Marginals are averages of matchings of draws; the objective is the ELBO, averaged since the last snapshot. Where
        draws have left the polytope so far that the evidence cannot be computed, the run ends with what it has;
        ``extra["diverged"]`` says so.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("rounding VI", budget=budget, steps=steps, progress=progress)
    allowed = worms.allowed
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    start = torch.zeros_like(worms.logits) if initial is None else INITIAL_LOGIT * onehot(initial)
    guide = RoundingGuide(allowed, start)
    ascent = Ascent(rounding_model, guide, seed=seed, loss=TraceMeanField_ELBO())
    center = mask_center(allowed)
    diverged = False
    for _ in run:
        try:
            ascent.step(falling(*STEP_SIZES, run.fraction), evidence, allowed, center, worms.logits)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            diverged = True
            break
        if run.due:
            run.record(ascent.elbo(), guide.mode())
    marginals = guide.hard(MARGINAL_SAMPLES).double().mean(0)
    index = match_allowed(marginals, allowed)
    extra = {"steps": float(run.step), "diverged": float(diverged)}
    return Identification("rounding VI", marginals, index, run.history, run.seconds, extra)

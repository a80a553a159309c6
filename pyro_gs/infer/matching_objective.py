r"""The law, the bound and the two gradients of a guide over hard permutations ``M(X + eps)``.

Above three rows the probability of ``M(X + eps)`` has no closed form, but its KL divergence to ``M(X_0 + eps)`` is at most
that of the Gumbel noise, minimised over the gauge or not (:func:`pyro_gs.tightened_kl`, :func:`pyro_gs.gumbel_noise_kl`).
So what stands beside the likelihood depends on the prior:

- ``GumbelMatching(X_0)``, and ``UniformPermutation`` without forbidden pairs, are laws ``M(X_0 + eps)``: minus the bound.
- Any other prior ``p`` of which ``log_prob`` is known, with the reference ``r = M(eps)`` over the same pairs:
  ``KL(q || p) = KL(q || r) + E_q[log r(P) - log p(P)]``, so minus the bound of the first plus ``log p(P) - log r(P)`` at the
  draw. ``r`` is uniform where nothing is forbidden, and known for components of at most three rows; else there is no such
  bound, and none is made up.

Each makes an ELBO that bounds the evidence of the very model that ``SVI`` is given.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import register_kl

from pyro_gs.distributions.gibbs_permutation import GibbsPermutation
from pyro_gs.distributions.gumbel_matching import GumbelMatching
from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.distributions.kl import gumbel_noise_kl, tightened_kl
from pyro_gs.distributions.permutation_law import PermutationLaw
from pyro_gs.distributions.relaxed import RelaxedPermutation, plain
from pyro_gs.distributions.uniform_permutation import UniformPermutation
from pyro_gs.ops.batching import unexpanded
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.matching import matching
from pyro_gs.ops.sinkhorn import log_sinkhorn

Gradient = Literal["score", "perturb_and_map"]
Bound = Literal["tightened_kl", "noise_kl"]
GRADIENTS: tuple[Gradient, ...] = ("score", "perturb_and_map")
BOUNDS: tuple[Bound, ...] = ("tightened_kl", "noise_kl")


def centred(weight: Tensor, allowed: Tensor) -> Tensor:
    """A matrix whose rows, then columns, are shifted to sum to zero over the allowed pairs.

    A gradient with respect to the logits of ``M(X + eps)`` has rows and columns that sum to zero already, as shifts of them
    change nothing. So an estimate of it keeps its mean, and loses the variance in these directions.
    """
    weight = torch.where(allowed, weight, 0.0)
    for dim in (-1, -2):
        mean = weight.sum(dim, keepdim=True) / allowed.sum(dim, keepdim=True)
        weight = torch.where(allowed, weight - mean, 0.0)
    return weight


class DecayingAverage(torch.nn.Module):
    """Decaying averages of what score functions were multiplied by, one for each item of a site's plates.

    Buffers hold them, so that a guide's ``state_dict`` does.

    Args:
        shape: of the items.
        decay: of the weight of past steps, at least 0 and below 1.
    """

    def __init__(self, shape: torch.Size, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.sums: Tensor
        self.weights: Tensor
        zeros = torch.zeros(math.prod(shape), dtype=torch.float64, device="cpu")  # they go where the gradients are
        self.register_buffer("sums", zeros)
        self.register_buffer("weights", zeros.clone())

    def subtract(self, grad: Tensor, item: Tensor) -> Tensor:
        """Less the average of earlier calls, which it then joins.

        Args:
            grad: shape (..., items of the call).
            item: numbers of the items, long, broadcasts with ``grad``.
        """
        self.sums, self.weights = self.sums.to(grad.device), self.weights.to(grad.device)
        place = item.expand(grad.shape).reshape(-1)
        flat = grad.reshape(-1).to(self.sums.dtype)
        average = self.sums[place] / self.weights[place].clamp(min=torch.finfo(flat.dtype).tiny)
        total = torch.zeros_like(self.sums).index_add(0, place, flat)
        count = torch.zeros_like(self.sums).index_add(0, place, torch.ones_like(flat))
        seen = count > 0
        self.sums = torch.where(seen, self.decay * self.sums + (1 - self.decay) * total / count.clamp(min=1), self.sums)
        self.weights = torch.where(seen, self.decay * self.weights + 1 - self.decay, self.weights)
        return (flat - average).reshape(grad.shape).to(grad.dtype)


class _PerturbAndMap(torch.autograd.Function):
    """``M(Z)`` with the gradient of :class:`GuideGumbelMatching`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, strength: float) -> Tensor:
        hard = matching(z)
        ctx.save_for_backward(z, hard)
        ctx.strength = strength
        return hard

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        z, hard = ctx.saved_tensors
        allowed = z > -torch.inf
        slope = centred(grad, allowed)
        size = (slope.square().sum((-2, -1), keepdim=True) / allowed.sum((-2, -1), keepdim=True)).sqrt()
        step = ctx.strength * slope / torch.where(size > 0, size, 1.0)
        return (hard - matching(z - step)) * (size / ctx.strength), None


class GuideGumbelMatching(GumbelMatching):
    r"""The law ``M(X + eps)`` in a guide, with the bound that it takes part in and its gradient.

    The ``log_prob`` of its own draws is zero, and the prior's is minus the bound (above): their difference is what an ELBO
    needs, whichever class computes it.

    - ``"score"``: the ``log_prob`` of its own draws, zero in value, has the score function ``1 - exp(-eps)`` of the noise as
      its gradient, :func:`centred`. Pyro's ELBOs multiply it by the rest; less a decaying average of earlier ones, in the
      backward pass. Unbiased.
    - ``"perturb_and_map"``: draws have the gradient ``(M(Z) - M(Z - s g / |g|)) |g| / s`` with ``Z = X + eps``, the gradient
      ``g`` of the loss at the draw, centred, its root mean square ``|g|`` and the strength ``s`` (implicit MLE of Niepert,
      Minervini and Franceschi 2021 with the noise shared, which is the interpolation of Vlastelica et al. 2020; here the
      size of the step is in units of the noise, whatever the scale of the loss). Unbiased in the limit of a small strength
      for a log-likelihood that is linear in the matrix, else biased.

    Args:
        logits: as in :class:`GumbelMatching`.
        objective: ``"tightened_kl"`` or ``"noise_kl"``.
        gradient: ``"score"`` or ``"perturb_and_map"``.
        strength: of the perturbation, positive.
        baseline: for ``"score"``; None for none.
        item: number of every batch item in the baseline, long, of the batch shape.
    """

    _kept = (*GumbelMatching._kept, "objective", "gradient", "strength", "baseline")  # type: ignore[assignment]
    _expanded = {**GumbelMatching._expanded, "item": 0}  # noqa: RUF012

    def __init__(
        self,
        logits: Tensor,
        objective: Bound = "tightened_kl",
        gradient: Gradient = "score",
        strength: float = 0.25,
        baseline: DecayingAverage | None = None,
        item: Tensor | None = None,
    ) -> None:
        self.objective = objective
        self.gradient = gradient
        self.strength = strength
        self.baseline = baseline
        self.item = torch.zeros(logits.shape[:-2], dtype=torch.long, device=logits.device) if item is None else item
        super().__init__(logits)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws carry a gradient."""
        return self.gradient == "perturb_and_map"

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws that know the bound, shape sample_shape + batch_shape + (n, n)."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws that know the bound, with the perturb-and-MAP gradient."""
        noise = gumbel_noise(self._extended_shape(torch.Size(sample_shape)), self.logits)
        z = self.logits.double() + noise
        hard = _PerturbAndMap.apply(z, self.strength).to(self.logits.dtype)
        relaxed = z.detach()
        return RelaxedPermutation.wrap(hard, lambda: log_sinkhorn(relaxed), _Draw(self, noise, hard))

    def score(self, noise: Tensor) -> Tensor:
        """Zero with the gradient of the log density of the noise, of the batch shape of the noise."""
        allowed = self.logits.detach() > -torch.inf
        weight = centred(1 - (-noise).exp(), allowed).to(self.logits.dtype)
        total = (weight * torch.where(allowed, self.logits, 0.0)).sum((-2, -1))
        if total.requires_grad and self.baseline is not None:
            baseline, item = self.baseline, self.item
            total.register_hook(lambda grad: baseline.subtract(grad, item))
        return total - total.detach()

    def kl_bound(self, prior: PermutationLaw) -> Tensor:
        """The part of the bound that does not depend on the draw, of the broadcast batch shape."""
        kl = tightened_kl if self.objective == "tightened_kl" else gumbel_noise_kl
        start = prior.logits if isinstance(prior, GumbelMatching) else _flat_logits(prior, self.logits)
        return kl(GumbelSinkhorn(1.0, self.logits), GumbelSinkhorn(1.0, start))


class _Draw:
    """What a prior, or the guide's law itself, says in place of the log-probability of a draw, with its sign changed."""

    def __init__(self, law: GuideGumbelMatching, noise: Tensor, hard: Tensor) -> None:
        self.law, self.noise, self.hard = law, noise, hard

    def __call__(self, p: Any) -> Tensor:
        q, batch = self.law, self.hard.shape[:-2]
        if p is q:
            if q.has_rsample:
                return torch.zeros(batch, dtype=q.logits.dtype, device=q.logits.device)
            score: Tensor = -q.score(self.noise)
            return score
        if not isinstance(p, PermutationLaw):
            raise ValueError(
                f"AutoGumbelMatching draws hard permutations, which {type(p).__name__} does not score; give SVI the plain "
                "model, without pyro_gs.relax"
            )
        bound = q.kl_bound(p)
        if not is_noise_law(p):
            hard = plain(self.hard)
            bound = bound + _log_reference(p, hard) - p.log_prob(hard)
        return bound.expand(torch.broadcast_shapes(batch, bound.shape))


def is_noise_law(prior: PermutationLaw) -> bool:
    """Whether a prior is ``M(X_0 + eps)`` for known logits."""
    uniform = isinstance(prior, UniformPermutation) and prior._support.full
    return uniform or isinstance(prior, GumbelMatching)


def has_gradient(prior: PermutationLaw) -> bool:
    """Whether a prior's part of the bound has the right gradient with respect to the draw."""
    return is_noise_law(prior) or isinstance(prior, GibbsPermutation)


def _flat_logits(prior: PermutationLaw, like: Tensor) -> Tensor:
    """Logits of ``M(eps)`` over the pairs of a prior, of a shape that broadcasts to the prior's."""
    allowed = prior._support.allowed
    if allowed is None:
        return like.new_zeros(prior.event_shape)
    small = unexpanded(allowed, 2)
    return like.new_zeros(small.shape).masked_fill(~small, -torch.inf)


def _log_reference(prior: PermutationLaw, hard: Tensor) -> Tensor:
    """Log-probability of a permutation under ``M(eps)`` over the pairs of the prior."""
    if prior._support.full:
        return hard.new_full((), -math.lgamma(prior.n + 1))
    reference = GumbelMatching(_flat_logits(prior, hard))
    if not bool(reference.is_exact.all()):
        raise NotImplementedError(no_bound(prior, "P"))
    hard = hard.detach()
    if reference.batch_shape.numel() > 1:
        return reference.log_prob(hard)
    reference = GumbelMatching(reference.logits.reshape(hard.shape[-2:]))
    seen, place = hard.reshape(-1, *hard.shape[-2:]).unique(dim=0, return_inverse=True)  # a quadrature each
    return reference.log_prob(seen)[place].reshape(hard.shape[:-2])


def no_bound(prior: PermutationLaw, name: str) -> str:
    """Message for a prior that no bound is known for."""
    kind = type(prior).__name__
    logits = "law.logits" if isinstance(prior, GibbsPermutation) else "law.log_weights"
    text = (
        f"AutoGumbelMatching has no bound for the law {kind} with forbidden pairs and more than three connected rows, as "
        "the probabilities of M(eps) over its pairs are not known; use AutoGumbelSinkhorn with pyro_gs.relax"
    )
    if isinstance(prior, (GibbsPermutation, UniformPermutation)):
        text += (
            f", or take M(X + eps) itself as the prior: with law = the {kind} of site '{name}', "
            f"pyro.sample('{name}', pyro_gs.GumbelMatching({logits}))"
        )
    return text


def _guide_kl(q: GuideGumbelMatching, p: PermutationLaw) -> Tensor:
    if not q.has_rsample:
        raise ValueError(
            "TraceMeanField_ELBO has no score-function gradients: it would train nothing; use Trace_ELBO, or "
            "AutoGumbelMatching(model, gradient='perturb_and_map')"
        )
    if not is_noise_law(p):
        raise NotImplementedError("part of the bound depends on the draw: sampled terms take its place")
    return q.kl_bound(p)


register_kl(GuideGumbelMatching, GumbelMatching)(_guide_kl)
register_kl(GuideGumbelMatching, UniformPermutation)(_guide_kl)
register_kl(GuideGumbelMatching, PermutationLaw)(_guide_kl)

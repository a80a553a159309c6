r"""What stands beside the likelihood in the objective of a guide over relaxed permutations, and what it bounds.

- ``"density"``: ``log p(P) - log q(P)``, the true relaxed densities. With the likelihood at relaxed permutations the ELBO
  bounds the evidence of the relaxed model. With the likelihood at hard ones (``hard=True``) it bounds the evidence under
  the prior ``M(X_0 + eps)``: the hard permutation is a function of the relaxed one (the matching of its logarithm), so
  this is the ELBO of a model with the relaxed prior and that likelihood, whose evidence is the discrete one at any
  temperature. Importance weighting (``RenyiELBO(alpha=0)``) tends to either evidence.
- ``"tightened_kl"``: minus the KL of the Gumbel noise, minimised over the gauge. With ``hard=True`` the ELBO bounds the
  evidence under the prior ``M(X_0 + eps)``, less tightly. ``RenyiELBO`` bounds nothing with a KL: its particles share it.
- ``"noise_kl"``: minus the KL of the Gumbel noise, as in the paper. The same, less tightly again.

A KL with the likelihood at relaxed permutations bounds the evidence of the relaxed model too, as both KLs are at least that
of the relaxed laws. ``docs/objectives.md`` has pictures. ``M(X_0 + eps)`` is ``GumbelMatching(X_0)``; it is the uniform law
only without forbidden pairs.

The choice holds under every ELBO class: the guide's law carries it, its values take it to the model's prior, and the
KL that ``TraceMeanField_ELBO`` looks up obeys it too. With a KL objective the very tensor that the guide sampled scores as
minus the KL under any ``GumbelSinkhorn``; its ``detach()`` or ``clone()`` has the density again.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import register_kl

from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.distributions.kl import gumbel_noise_kl, tightened_kl
from pyro_gs.distributions.relaxed import RelaxedPermutation, plain
from pyro_gs.distributions.straight_through import straight_through

Objective = Literal["density", "tightened_kl", "noise_kl"]
OBJECTIVES: tuple[Objective, ...] = ("density", "tightened_kl", "noise_kl")


def check_objective(objective: str) -> None:
    """Raise unless ``objective`` is one of :data:`OBJECTIVES`."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, but is {objective!r}")


class GuideGumbelSinkhorn(GumbelSinkhorn):
    """A Gumbel-Sinkhorn law in a guide, with the objective that it takes part in.

    With a KL objective its own ``log_prob`` of its own values is zero, and the prior's is minus the KL: their
    difference is what an ELBO needs, whichever class computes it.

    Args:
        objective: one of ``"density"``, ``"tightened_kl"``, ``"noise_kl"``.
        temperature: as in :class:`GumbelSinkhorn`.
        logits: as in :class:`GumbelSinkhorn`.
        num_particles: as in :class:`GumbelSinkhorn`.
        validate_args: as in :class:`GumbelSinkhorn`.
        hard: draw permutation matrices with the relaxed draws' gradients, as :class:`GumbelSinkhornStraightThrough`.
    """

    def __init__(
        self,
        objective: Objective,
        temperature: float | Tensor,
        logits: Tensor,
        num_particles: int = 0,
        validate_args: bool | None = None,
        *,
        hard: bool = False,
    ) -> None:
        check_objective(objective)
        self.objective = objective
        self.hard = hard
        super().__init__(temperature, logits, num_particles, validate_args)

    def expand(self, batch_shape: Any, _instance: GumbelSinkhorn | None = None) -> GuideGumbelSinkhorn:
        """The same law with a larger batch shape."""
        new: GuideGumbelSinkhorn = self._get_checked_instance(GuideGumbelSinkhorn, _instance)
        new.objective = self.objective
        new.hard = self.hard
        super().expand(batch_shape, _instance=new)
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`GumbelSinkhorn.rsample`, or hard with its gradient; the values know the objective."""
        value = straight_through(self, sample_shape) if self.hard else super().rsample(sample_shape)
        if not isinstance(value, RelaxedPermutation):
            return value
        if self.objective != "density":
            value.bound = functools.partial(self._bound, self, value.shape[:-2])
        elif (
            self.hard
        ):  # an unrelaxed prior would score it as well, but not as what the guide's density is to be set against
            scored = functools.partial(self._minus_density, value)
            return RelaxedPermutation.wrap(plain(value), value.log_source, scored)
        return value

    @staticmethod
    def _minus_density(value: Tensor, p: GumbelSinkhorn) -> Tensor:
        _check_relaxed(p)
        return -p.log_prob(value)

    @staticmethod
    def _bound(q: GuideGumbelSinkhorn, batch: torch.Size, p: GumbelSinkhorn) -> Tensor:
        _check_relaxed(p)
        if p is q:
            return torch.zeros(batch, dtype=q.logits.dtype, device=q.logits.device)
        kl = tightened_kl if q.objective == "tightened_kl" else gumbel_noise_kl
        return kl(q, p).expand(torch.broadcast_shapes(batch, p.batch_shape))


def _check_relaxed(p: Any) -> None:
    if not isinstance(p, GumbelSinkhorn):
        raise ValueError(
            f"a draw of AutoGumbelSinkhorn meets {type(p).__name__} in the model, which is not relaxed; write "
            "SVI(pyro_gs.relax(model), guide, ...)"
        )


def _guide_kl(q: GuideGumbelSinkhorn, p: GumbelSinkhorn) -> Tensor:
    if q.objective == "density":
        raise NotImplementedError("the true KL has no closed form: sampled log densities take its place")
    return q._bound(q, q.batch_shape, p)


register_kl(GuideGumbelSinkhorn, GumbelSinkhorn)(_guide_kl)

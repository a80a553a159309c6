r"""Kullback-Leibler divergences between laws of permutations, each with its status.

| function | pair | status |
| --- | --- | --- |
| :func:`gumbel_noise_kl` | GumbelSinkhorn, GumbelSinkhorn | upper bound (the paper's) |
| ``kl_divergence`` (:func:`tightened_kl`) | GumbelSinkhorn, GumbelSinkhorn | upper bound, minimised over the gauge |

The exact divergence has no closed form; estimate it by averaging ``q.log_prob(P) - p.log_prob(P)``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import register_kl

from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn, allowed_counts
from pyro_gs.ops.batching import unexpanded
from pyro_gs.ops.implicit import scale
from pyro_gs.ops.sinkhorn import default_tol

_EULER = 0.5772156649015329


def _pair(q: GumbelSinkhorn, p: GumbelSinkhorn) -> tuple[Tensor, Tensor, Tensor, GumbelSinkhorn, torch.Size]:
    """Difference of logits, both temperatures, the smallest law with their support, and the full batch shape."""
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"q and p must have the same event_shape, but have {tuple(q.event_shape)} and {tuple(p.event_shape)}"
        )
    batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    t, t0 = (unexpanded(law.temperature.double(), 0) for law in (q, p))
    x, x0 = (unexpanded(law.logits.double(), 2) for law in (q, p))
    small = torch.broadcast_shapes(t.shape, t0.shape, x.shape[:-2], x0.shape[:-2])
    t, t0 = t.expand(small), t0.expand(small)
    x, x0 = x.expand(small + x.shape[-2:]), x0.expand(small + x0.shape[-2:])
    finite = x > -torch.inf
    law = GumbelSinkhorn(1.0, torch.where(finite, 0.0, -torch.inf), validate_args=False)
    d = (t0 / t)[..., None, None] * torch.where(finite, x, 0.0) - torch.where(finite & (x0 > -torch.inf), x0, 0.0)
    return d, t, t0, law, batch


def _same_support(q: GumbelSinkhorn, p: GumbelSinkhorn) -> Tensor:
    allowed = [unexpanded(law.logits.detach() > -torch.inf, 2) for law in (q, p)]
    return (allowed[0] == allowed[1]).all(-1).all(-1)


def gumbel_noise_kl(q: GumbelSinkhorn, p: GumbelSinkhorn) -> Tensor:
    r"""KL divergence of the Gumbel noise behind two Gumbel-Sinkhorn laws, an upper bound of theirs.

    The paper's term (Mena et al. 2018, Section 4). An entry of ``(X + eps) / tau`` against ``(X_0 + eps) / tau_0``
    adds ``log(tau / tau_0) + gamma (tau_0 / tau - 1) + D + Gamma(1 + tau_0 / tau) exp(-D) - 1`` with
    ``D = (tau_0 / tau) X - X_0``; forbidden pairs add nothing. It charges for adding a number to a row or column of
    the logits, which does not change the law: ``kl_divergence`` does not.

    Args:
        q: with logits X and temperature tau.
        p: with logits X_0 and temperature tau_0.

    Returns:
        Tensor of the broadcast batch shape, in nats; ``inf`` where the allowed pairs of ``q`` and ``p`` differ, or where
        ``exp(-D)`` overflows.

    Raises:
        ValueError: the event shapes differ.
    """
    d, t, t0, law, batch = _pair(q, p)
    ratio = t0 / t
    entry = (
        (-ratio.log() + _EULER * (ratio - 1) - 1)[..., None, None]
        + d
        + ((-d) + torch.lgamma(1 + ratio)[..., None, None]).exp()
    )
    allowed = law._support.allowed
    total = (entry if allowed is None else torch.where(allowed, entry, 0.0)).sum((-2, -1))
    total = torch.where(_same_support(q, p), total, torch.inf)
    return total.expand(batch).to(q.logits.dtype)


def tightened_kl(q: GumbelSinkhorn, p: GumbelSinkhorn) -> Tensor:
    r"""Upper bound of the KL divergence of two Gumbel-Sinkhorn laws; registered as their ``kl_divergence``.

    The KL of the noise, minimised over everything that can be added to rows and columns of ``q``'s logits without
    changing its law. With ``R`` the scaling of ``exp(-D)`` whose row and column sums are the numbers of allowed
    entries,

    ``|S| (log(tau / tau_0) + gamma (tau_0 / tau - 1) + log Gamma(1 + tau_0 / tau)) - sum log R``

    over the allowed entries ``S`` (``docs/density.md``). By data processing it bounds the divergence of the hard
    laws ``M(X + eps)`` and ``M(X_0 + eps)`` too. It never exceeds :func:`gumbel_noise_kl`.

    Args:
        q: with logits X and temperature tau.
        p: with logits X_0 and temperature tau_0.

    Returns:
        Tensor of the broadcast batch shape, in nats, non-negative; ``inf`` where the allowed pairs differ.

    Raises:
        ValueError: the event shapes differ.
    """
    d, t, t0, law, batch = _pair(q, p)
    rows, columns = allowed_counts(law._support, d)
    allowed = law._support.allowed
    z = -d if allowed is None else torch.where(allowed, -d, -torch.inf)
    tol = default_tol(torch.float64)
    full = allowed is None
    marginals = (None, None) if full else (rows, columns)
    log_r = scale(z, law._support, *marginals, tol=tol * d.shape[-1], max_iter=500, relative=False).log_p
    if full:
        log_r = log_r + rows.log()[..., None]
    ratio = t0 / t
    entry = -ratio.log() + _EULER * (ratio - 1) + torch.lgamma(1 + ratio)
    total = (rows.sum(-1) * entry - torch.where(z > -torch.inf, log_r, 0.0).sum((-2, -1))).clamp(min=0.0)  # of rounding
    total = torch.where(_same_support(q, p), total, torch.inf)
    return total.expand(batch).to(q.logits.dtype)


register_kl(GumbelSinkhorn, GumbelSinkhorn)(tightened_kl)

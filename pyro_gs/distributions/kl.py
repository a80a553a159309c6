r"""Kullback-Leibler divergences between laws of permutations, each with its status (``docs/laws.md`` has all of them).

| pair | function | status |
| --- | --- | --- |
| GumbelSinkhorn, GumbelSinkhorn | :func:`tightened_kl`, registered | upper bound, minimised over the gauge |
| GumbelSinkhorn, GumbelSinkhorn | :func:`gumbel_noise_kl` | upper bound (the paper's) |
| SparseGumbelSinkhorn, SparseGumbelSinkhorn | both, the first registered | the same |
| GumbelMatching, GumbelMatching or uniform | :func:`gumbel_matching_kl`, registered | upper bound |
| Gibbs or uniform, Gibbs or uniform | :func:`gibbs_kl`, registered | exact up to 20 rows in a component |
| Plackett-Luce, Mallows | :mod:`pyro_gs.distributions.ranking_kl`, registered | exact (Plackett-Luce to 16 items) |
| any two laws over the same matrices | :func:`monte_carlo_kl` | estimate with its standard error |
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import register_kl

from pyro_gs.distributions.gibbs_permutation import GibbsPermutation
from pyro_gs.distributions.gumbel_matching import GumbelMatching
from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn, allowed_counts
from pyro_gs.distributions.ranking_kl import joint_batch
from pyro_gs.distributions.sparse_gumbel_sinkhorn import SparseGumbelSinkhorn
from pyro_gs.distributions.uniform_permutation import UniformPermutation
from pyro_gs.ops.batching import unexpanded
from pyro_gs.ops.implicit import check_resolved, scale
from pyro_gs.ops.layout import DENSE, Dense, Sparse
from pyro_gs.ops.logits import check_count
from pyro_gs.ops.permanent import balanced_normalizer, marginals
from pyro_gs.ops.sinkhorn import default_tol
from pyro_gs.ops.support import Support, find_candidate_support, find_support

_EULER = 0.5772156649015329


_RELAXED = (GumbelSinkhorn, SparseGumbelSinkhorn)
_Relaxed = TypeVar("_Relaxed", GumbelSinkhorn, SparseGumbelSinkhorn)


class _Pair(NamedTuple):
    """Two laws over the same entries.

    Attributes:
        d: difference of logits in units of the noise of ``p``, (..., n, w); of no meaning outside the support.
        t, t0: temperatures of ``q`` and ``p``, (...).
        support: of both, at the smallest batch shape.
        layout: of the entries.
        batch: the full batch shape.
    """

    d: Tensor
    t: Tensor
    t0: Tensor
    support: Support
    layout: Dense
    batch: torch.Size


def _pair(q: _Relaxed, p: _Relaxed) -> _Pair:
    for name, law in (("q", q), ("p", p)):
        if not isinstance(law, _RELAXED):
            raise TypeError(f"{name} must be a Gumbel-Sinkhorn law, but is {type(law).__name__}")
    batch = joint_batch(q, p)
    if isinstance(q, SparseGumbelSinkhorn) != isinstance(p, SparseGumbelSinkhorn):
        raise TypeError(f"q and p must both be dense or both sparse, but are {type(q).__name__} and {type(p).__name__}")
    t, t0 = (unexpanded(law.temperature.double(), 0) for law in (q, p))
    x, x0 = (unexpanded(law.logits.double(), 2) for law in (q, p))
    small = torch.broadcast_shapes(t.shape, t0.shape, x.shape[:-2], x0.shape[:-2])
    t, t0 = t.expand(small), t0.expand(small)
    x, x0 = x.expand(small + x.shape[-2:]), x0.expand(small + x0.shape[-2:])
    finite = x > -torch.inf
    d = (t0 / t)[..., None, None] * torch.where(finite, x, 0.0) - torch.where(finite & (x0 > -torch.inf), x0, 0.0)
    if isinstance(q, SparseGumbelSinkhorn) and isinstance(p, SparseGumbelSinkhorn):
        candidates, other = (unexpanded(law.candidates, 2) for law in (q, p))
        if bool(((candidates != other) & (finite | (x0 > -torch.inf))).any()):
            raise ValueError("q and p must have the same candidates, in the same order")
        candidates, finite = candidates.expand(x.shape), finite.expand(x.shape)
        return _Pair(d, t, t0, find_candidate_support(finite, candidates, warn=False), Sparse(candidates), batch)
    return _Pair(d, t, t0, find_support(finite, warn=False), DENSE, batch)


def _same_support(q: _Relaxed, p: _Relaxed) -> Tensor:
    allowed = [unexpanded(law.logits.detach() > -torch.inf, 2) for law in (q, p)]
    return (allowed[0] == allowed[1]).all(-1).all(-1)


def gumbel_noise_kl(q: _Relaxed, p: _Relaxed) -> Tensor:
    r"""KL divergence of the Gumbel noise behind two Gumbel-Sinkhorn laws, an upper bound of theirs.

    The paper's term (Mena et al. 2018, Section 4). An entry of ``(X + eps) / tau`` against ``(X_0 + eps) / tau_0``
    adds ``log(tau / tau_0) + gamma (tau_0 / tau - 1) + D + Gamma(1 + tau_0 / tau) exp(-D) - 1`` with
    ``D = (tau_0 / tau) X - X_0``; forbidden pairs add nothing. It charges for adding a number to a row or column of
    the logits, which does not change the law: ``kl_divergence`` does not.

    Args:
        q: with logits X and temperature tau.
        p: with logits X_0 and temperature tau_0; of the same class, and of the same candidates if that is
            :class:`SparseGumbelSinkhorn`.

    Returns:
        Tensor of the broadcast batch shape, in nats; ``inf`` where the allowed pairs of ``q`` and ``p`` differ, or where
        ``exp(-D)`` overflows.

    Raises:
        TypeError: one is dense and the other sparse.
        ValueError: the event shapes or the candidates differ.

    Example:
        >>> import torch
        >>> q, p = GumbelSinkhorn(1.0, torch.tensor([[2.0, 0.0], [0.0, 0.0]])), GumbelSinkhorn(1.0, torch.zeros(2, 2))
        >>> gumbel_noise_kl(q, p)
        tensor(1.1353)
    """
    d, t, t0, support, _, batch = _pair(q, p)
    ratio = t0 / t
    entry = (
        (-ratio.log() + _EULER * (ratio - 1) - 1)[..., None, None]
        + d
        + ((-d) + torch.lgamma(1 + ratio)[..., None, None]).exp()
    )
    allowed = support.allowed
    total = (entry if allowed is None else torch.where(allowed, entry, 0.0)).sum((-2, -1))
    total = torch.where(_same_support(q, p), total, torch.inf)
    return total.expand(batch).to(q.logits.dtype)


def tightened_kl(q: _Relaxed, p: _Relaxed) -> Tensor:
    r"""Upper bound of the KL divergence of two Gumbel-Sinkhorn laws; registered as their ``kl_divergence``.

    The KL of the noise, minimised over everything that can be added to rows and columns of ``q``'s logits without
    changing its law. With ``R`` the scaling of ``exp(-D)`` whose row and column sums are the numbers of allowed
    entries,

    ``|S| (log(tau / tau_0) + gamma (tau_0 / tau - 1) + log Gamma(1 + tau_0 / tau)) - sum log R``

    over the allowed entries ``S`` (``docs/density.md``). By data processing it bounds the divergence of the hard
    laws ``M(X + eps)`` and ``M(X_0 + eps)`` too. It never exceeds :func:`gumbel_noise_kl`.

    Args:
        q: with logits X and temperature tau.
        p: with logits X_0 and temperature tau_0; of the same class, and of the same candidates if that is
            :class:`SparseGumbelSinkhorn`.

    Returns:
        Tensor of the broadcast batch shape, in nats, non-negative; ``inf`` where the allowed pairs differ, or where it is
        larger than the dtype holds.

    Raises:
        TypeError: one is dense and the other sparse.
        ValueError: the event shapes or the candidates differ, or logits differ by so much that rounding is all that is left
            of them.

    Example:
        >>> import torch
        >>> q, p = GumbelSinkhorn(1.0, torch.tensor([[2.0, 0.0], [0.0, 0.0]])), GumbelSinkhorn(1.0, torch.zeros(2, 2))
        >>> tightened_kl(q, p)
        tensor(0.4805)
    """
    d, t, t0, support, layout, batch = _pair(q, p)
    rows, columns = allowed_counts(support, d, layout)
    allowed = support.allowed
    z = -d if allowed is None else torch.where(allowed, -d, -torch.inf)
    tol = default_tol(torch.float64)
    full = allowed is None
    marginals = (None, None) if full else (rows, columns)
    n = d.shape[-2]
    log_r = scale(z, support, *marginals, tol=tol * n, max_iter=500, relative=False, layout=layout).log_p
    check_resolved(log_r - n, "logits of q and p, over their temperatures,")  # logs of counts at most
    if full:
        log_r = log_r + rows.log()[..., None]
    ratio = t0 / t
    entry = -ratio.log() + _EULER * (ratio - 1) + torch.lgamma(1 + ratio)
    total = (rows.sum(-1) * entry - torch.where(z > -torch.inf, log_r, 0.0).sum((-2, -1))).clamp(min=0.0)  # of rounding
    total = torch.where(_same_support(q, p), total, torch.inf)
    return total.expand(batch).to(q.logits.dtype)


register_kl(GumbelSinkhorn, GumbelSinkhorn)(tightened_kl)
register_kl(SparseGumbelSinkhorn, SparseGumbelSinkhorn)(tightened_kl)


def gumbel_matching_kl(q: GumbelMatching, p: GumbelMatching | UniformPermutation) -> Tensor:
    """Upper bound of the KL divergence of two laws ``M(X + eps)``; registered as their ``kl_divergence``.

    :func:`tightened_kl` of the relaxed laws at one temperature, which bounds it by data processing. The uniform law is
    ``M(eps)`` where nothing is forbidden.

    Args:
        q: with logits X.
        p: with logits X_0, or uniform over all permutations.

    Returns:
        Tensor of the broadcast batch shape, in nats; ``inf`` where the allowed pairs differ.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: ``p`` is uniform with forbidden pairs.
    """
    joint_batch(q, p)
    if isinstance(p, UniformPermutation):
        if p._support.allowed is not None:
            raise NotImplementedError(
                "a bound of the KL divergence of GumbelMatching to UniformPermutation exists only where nothing is "
                "forbidden; estimate it by pyro_gs.monte_carlo_kl(q, p)"
            )
        prior = q.logits.new_zeros(p.event_shape).expand(p.batch_shape + p.event_shape)
    else:
        prior = p.logits
    return tightened_kl(GumbelSinkhorn(1.0, q.logits), GumbelSinkhorn(1.0, prior))


def gibbs_kl(q: GibbsPermutation | UniformPermutation, p: GibbsPermutation | UniformPermutation) -> Tensor:
    """Exact KL divergence of Gibbs and uniform laws; registered as their ``kl_divergence``.

    ``<X - X_0, marginals of q> - log perm(exp X) + log perm(exp X_0)``; the uniform law has logits zero.

    Args:
        q: with logits X.
        p: with logits X_0.

    Returns:
        Tensor of the broadcast batch shape, in nats, differentiable once; ``inf`` where ``q`` allows a pair that ``p``
        forbids.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: a component of more than 20 rows, or a normalizer other than ``"exact"``.
    """
    joint_batch(q, p)
    for law in (q, p):
        if isinstance(law, GibbsPermutation) and law.normalizer != "exact":
            raise NotImplementedError(f"the KL divergence is exact, but the normalizer of a law is {law.normalizer!r}")
        if not bool(law.is_exact.all()):
            raise NotImplementedError(
                f"{type(law).__name__} with n={law.n} has a component of more than 20 rows, whose log-permanent is not exact"
            )
    (x, log_q, _), (x0, log_p, _) = (balanced_normalizer(law.log_weights, law._support) for law in (q, p))
    allowed, allowed0 = x > -torch.inf, x0 > -torch.inf
    gap = torch.where(allowed, x, 0.0) - torch.where(allowed0, x0, 0.0)
    total = (marginals(x, q._support) * gap).sum((-2, -1)) - log_q + log_p
    inside = (allowed0 | ~allowed).all(-1).all(-1)
    return torch.where(inside, total.clamp(min=0.0), torch.inf).to(q.log_weights.dtype)  # clamp: of rounding


def monte_carlo_kl(q: TorchDistribution, p: TorchDistribution, num_samples: int = 1000) -> tuple[Tensor, Tensor]:
    """Monte Carlo estimate of a KL divergence, the mean of ``q.log_prob(P) - p.log_prob(P)``, and its standard error.

    Of relaxed laws it uses their true densities, and is differentiable through ``rsample``; of laws without ``rsample``
    it carries no gradient. Where a ``log_prob`` is an estimate itself (:class:`GumbelMatching` above three rows,
    ``num_particles``) its noise is in the standard error, and half its variance in the mean: of ``q`` downward, of ``p``
    upward.

    Args:
        q: to draw from.
        p: of the same event shape.
        num_samples: number of draws, at least 2.

    Returns:
        Estimate and standard error, each of the broadcast batch shape, in nats; both ``inf`` where a draw of ``q`` has no
        density under ``p``.

    Raises:
        TypeError: ``q`` or ``p`` is no distribution.
        ValueError: the event shapes differ, batch shapes do not broadcast, or ``num_samples`` is below 2.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> q, p = GumbelSinkhorn(1.0, torch.tensor([[2.0, 0.0], [0.0, 0.0]])), GumbelSinkhorn(1.0, torch.zeros(2, 2))
        >>> estimate, standard_error = monte_carlo_kl(q, p, 10_000)
        >>> bool(abs(estimate - 0.31) < 3 * standard_error + 0.005)
        True
    """
    batch = joint_batch(q, p)
    check_count(num_samples, "num_samples", least=2)
    shape = torch.Size((num_samples,))
    same = torch.ones((), dtype=torch.bool, device="cpu")
    if isinstance(q, GumbelSinkhorn) and isinstance(p, GumbelSinkhorn):
        same = _same_support(q, p)
        if not bool(same.all()):  # densities on different faces: draws of the one have none under the other
            kept = torch.where(q.logits > -torch.inf, 0.0, -torch.inf)
            kept = torch.where(same[..., None, None], p.logits, kept).expand(*batch, *p.event_shape)
            p = GumbelSinkhorn(p.temperature, kept, p.num_particles)
    q = q.expand(batch)
    with torch.set_grad_enabled(torch.is_grad_enabled() and q.has_rsample):
        value = q.rsample(shape) if q.has_rsample else q.sample(shape)
        ratio = q.log_prob(value) - p.log_prob(value)
        ratio = torch.where(same, ratio, torch.inf)
        estimate = ratio.mean(0)
        return estimate, torch.where(estimate.isinf(), torch.inf, ratio.std(0) / num_samples**0.5)


register_kl(GumbelMatching, GumbelMatching)(gumbel_matching_kl)
register_kl(GumbelMatching, UniformPermutation)(gumbel_matching_kl)
for _left in (GibbsPermutation, UniformPermutation):
    for _right in (GibbsPermutation, UniformPermutation):
        register_kl(_left, _right)(gibbs_kl)

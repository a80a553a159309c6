r"""``P(M(X + eps) = P)`` as an integral over dual potentials of the assignment.

Relabel the columns so that the permutation is the identity. It is the best one exactly if no cycle of rows gains by
passing its columns on, that is, if there are potentials ``b`` with ``Y_ij + b_j <= Y_ii + b_i`` for ``Y = X + eps``. The
smallest ones with ``b_n = 0`` are lengths of longest paths to row n, and make one inequality of every other row an equation;
those equations form a tree directed to n. Row i meets its inequalities with probability ``Q_ii``, ``Q = softmax_j(X_ij +
b_j)``, with density ``Q_ii Q_ij`` for an equation at j; and the sum over trees is a determinant (``docs/matching_law.md``):

    p(identity) = integral over b in R^(n-1) of prod_i Q_ii(b) det(I - Q(b))'.

``sum_i log Q_ii`` is the dual of the Sinkhorn problem up to a constant, so the integrand has its bulk at ``Q = S(X)``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_gs.distributions.edgeworth import laplacian
from pyro_gs.distributions.spherical import bent_ties
from pyro_gs.ops.arborescences import log_arborescences
from pyro_gs.ops.implicit import scale
from pyro_gs.ops.logits import warn_user
from pyro_gs.ops.quadrature import log_plane_integral
from pyro_gs.ops.support import Support, blocks

EXACT_ROWS = 3
"""Largest component whose probabilities are exact."""

ESTIMATE_ROWS = 32
"""Largest component whose probabilities are estimated; beyond, too few draws count."""

DEEPEST = 90.0
"""Nats below one of the smallest entry of ``S(X)`` that the integral is taken for; the integrand's plateau is as wide."""

_DEGREES = 10.0  # of freedom of the proposal
_PILOTS = 3
_PER_DIMENSION = 3  # effective draws for each dimension, before a covariance is believed
_TEMPERINGS = 20
_FEW = 8.0  # effective draws
_STEP = 0.6  # the integrand is analytic in a strip of width pi
_TAIL = 28.0  # beyond its flat part it falls by a factor of e a unit or faster
_SERIES = 0.05


def log_matching_probability(logits: Tensor, support: Support, index: Tensor, num_particles: int) -> Tensor:
    """Log-probability that ``M(logits + eps)`` is the permutation ``index``, float64 of the batch shape.

    Exact for components of at most :data:`EXACT_ROWS` rows; else an importance-sampling estimate.

    Args:
        logits: shape (..., n, n), checked.
        support: of them.
        index: an allowed permutation, shape (..., n).
        num_particles: size of the importance sample.
    """
    n, batch = logits.shape[-1], index.shape[:-1]
    law = torch.arange(math.prod(logits.shape[:-2]), device=logits.device).reshape(logits.shape[:-2]).expand(batch)
    # Each permutation once for each law: draws repeat themselves.
    pairs = torch.cat([law[..., None], index], -1).reshape(-1, n + 1)
    pairs, inverse = pairs.unique(dim=0, return_inverse=True)
    law, index = pairs[:, 0], pairs[:, 1:]
    x = logits.double().reshape(-1, n, n)[law]
    support = support.reshape((-1, n, n)).select(law)
    # A row that is a component by itself is certain; its logits have a gradient of zero.
    out = 0.0 * x.gather(-1, index[..., None])[..., 0].sum(-1)
    for block in blocks(support, x.device):
        if block.size == 1:
            continue
        columns = index[block.item].gather(-1, block.rows)  # the permutation becomes the identity
        part = x[block.item[:, None, None], block.rows[:, :, None], columns[:, None, :]]
        out = out.index_add(0, block.item, _log_identity(part, num_particles))
    return out[inverse].reshape(batch)


def _depth(log_s: Tensor) -> Tensor:
    """Minus the smallest of the logarithms of entries (..., n, n) that are not zero."""
    return torch.where(log_s > -torch.inf, -log_s, 0.0).detach().amax((-2, -1))


def _log_identity(x: Tensor, num_particles: int) -> Tensor:
    """Log-probability of the identity for connected matrices (g, s, s) with s > 1, shape (g,)."""
    size = x.shape[-1]
    if size == 2:
        return log_pair_probability(x[:, 0, 0] + x[:, 1, 1] - x[:, 0, 1] - x[:, 1, 0])
    support = Support(x.shape)
    log_q = scale(x, support, tol=1e-10, max_iter=500, relative=True).log_p
    deepest = float(_depth(log_q).max()) if len(x) else 0.0
    if not deepest <= DEEPEST:  # NaN, where logits are so far apart that rounding is all that is left
        found = f"one of e^-{deepest:.0f}" if deepest < torch.inf else "one that float64 cannot tell"
        raise NotImplementedError(
            f"the law of M(X + eps) is integrated where entries of S(X) are above e^-{DEEPEST:g}, but logits have {found} "
            f"in a component of {size} rows; take log_prob_bounds, or smaller logits"
        )
    if size == EXACT_ROWS:
        z = _constant_potentials(log_q, x)
        return log_plane_integral(_on_plane, (z,), _depth(log_q) + _TAIL, _STEP)
    return _importance(log_q.detach(), x, num_particles)


def _constant_potentials(log_q: Tensor, x: Tensor) -> Tensor:
    """``log Q`` as a function of the logits alone: the integral does not depend on where it is centred."""
    return torch.where(log_q > -torch.inf, log_q.detach() + (x - x.detach()), -torch.inf)


def _log_integrand(z: Tensor, b: Tensor) -> Tensor:
    """Logarithm of ``prod_i Q_ii det(I - Q)'`` at potentials ``b`` (k, g, s), the first zero: (k, g)."""
    log_q = (z + b[..., None, :]).log_softmax(-1)
    return log_q.diagonal(dim1=-2, dim2=-1).sum(-1) + log_arborescences(log_q.flip(-1, -2))


def _on_plane(nodes: Tensor, z: Tensor) -> Tensor:
    b = torch.cat([torch.zeros_like(nodes[:, :1]), nodes], -1)
    return _log_integrand(z, b[:, None]).T


class EstimateWarning(UserWarning):
    """An importance-sampling estimate rests on a few draws.

    Of :class:`GumbelMatching` and of :func:`round_samples`; messages say how many there are.

    Example:
        >>> import warnings
        >>> import torch
        >>> import pyro_gs as pgs
        >>> _ = torch.manual_seed(0)
        >>> law = pgs.GumbelMatching(torch.randn(20, 20), num_particles=10)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", pgs.EstimateWarning)
        ...     law.log_prob(torch.eye(20))
        Traceback (most recent call last):
            ...
        pyro_gs.distributions.matching_integral.EstimateWarning: an estimate of a probability of GumbelMatching ...
    """


class _Student(NamedTuple):
    """Multivariate t laws of potentials: shapes (g, k) and (g, k, k), the first potential being zero and left out."""

    center: Tensor
    factor: Tensor

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Potentials (count, g, k + 1) and their log densities (count, g)."""
        k = self.center.shape[-1]
        noise = torch.randn(count, *self.center.shape, dtype=self.center.dtype, device=self.center.device)
        half = torch.full(noise.shape[:-1], 0.5 * _DEGREES, dtype=noise.dtype, device=noise.device)
        noise = noise / (torch._standard_gamma(half) / half).sqrt()[..., None]
        b = self.center + (self.factor @ noise[..., None])[..., 0]
        constant = math.lgamma(0.5 * (_DEGREES + k)) - math.lgamma(0.5 * _DEGREES) - 0.5 * k * math.log(_DEGREES * math.pi)
        volume = self.factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        density = constant - volume - 0.5 * (_DEGREES + k) * torch.log1p(noise.square().sum(-1) / _DEGREES)
        return torch.nn.functional.pad(b, (1, 0)), density

    @staticmethod
    def fitted(b: Tensor, log_weight: Tensor) -> _Student:
        """The law with the mean and covariance of weighted potentials; weights are tempered until enough of them count."""
        k = b.shape[-1] - 1
        for _ in range(_TEMPERINGS):
            p = log_weight.softmax(0)
            poor = p.square().sum(0) * _PER_DIMENSION * k > 1
            if not bool(poor.any()):
                break
            log_weight = torch.where(poor, 0.7 * log_weight, log_weight)
        p = log_weight.softmax(0)
        center = torch.einsum("pg,pgi->gi", p, b[..., 1:])
        off = b[..., 1:] - center
        covariance = torch.einsum("pg,pgi,pgj->gij", p, off, off) * (_DEGREES - 2) / _DEGREES
        spread = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-12)
        covariance = covariance + torch.diag_embed(1e-6 * spread)
        return _Student(center, torch.linalg.cholesky(covariance))


def _importance(log_q: Tensor, x: Tensor, num_particles: int) -> Tensor:
    """Importance-sampling estimate with a multivariate t proposal, whose tails are heavier than the integrand's.

    It starts at the mode of the dual alone, with a Laplacian of ties that are pulled up where they vanish (as the density's
    rule has it); pilot runs of the same size, not used for the estimate, bring its mean and covariance to those of the
    integrand.
    """
    z = _constant_potentials(log_q, x)
    with torch.no_grad():
        ties = bent_ties(log_q, torch.ones_like(log_q[..., 0]))
        root = torch.linalg.cholesky(laplacian(ties)[:, 1:, 1:])
        proposal = _Student(torch.zeros_like(root[..., 0]), torch.linalg.cholesky(torch.cholesky_inverse(root)))
        for _ in range(_PILOTS):
            b, density = proposal.draw(num_particles)
            proposal = _Student.fitted(b, _log_integrand(z, b) - density)
        b, density = proposal.draw(num_particles)
    weight = _log_integrand(z, b) - density
    share = 1 / weight.detach().softmax(0).square().sum(0)
    if bool((share < _FEW).any()):
        warn_user(
            f"an estimate of a probability of GumbelMatching (component of {x.shape[-1]} rows) rests on fewer than {_FEW:g} "
            f"effective draws of {num_particles}; raise num_particles, or take log_prob_bounds",
            EstimateWarning,
        )
    return torch.logsumexp(weight, 0) - math.log(num_particles)


def log_pair_probability(d: Tensor) -> Tensor:
    """Log-probability that a sum of two logistic variables exceeds ``-d``: the exact law of two rows.

    ``e^d (e^d - 1 - d) / (e^d - 1)^2``.
    """
    t = d.abs().clamp(max=1e300)
    near = t < _SERIES
    u = torch.where(near, d, 0.0)
    series = 0.5 + u / 6 - u**3 / 180 + u**5 / 5040 - u**7 / 151200
    # The less probable side: e^-t (t - 1 + e^-t) / (1 - e^-t)^2.
    s = torch.where(near, 1.0, t)
    e = (-s).exp()
    low = -s + (s - 1 + e).log() - 2 * (-torch.expm1(-s)).log()
    return torch.where(near, series.log(), torch.where(d > 0, torch.log1p(-low.exp()), low))

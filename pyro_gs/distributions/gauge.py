r"""The integral over the gauge in the Gumbel-Sinkhorn density.

For a row-normalised matrix ``q`` on allowed entries, ``n_i`` of them in row ``i`` and ``m_j`` in column ``j``,

    I(q) = integral over beta of prod_j exp(m_j beta_j) prod_i (sum_j q_ij exp(beta_j))^(-n_i),    beta_ground = 0,

is log-concave with its mode at zero when ``n_i q_ij`` has the column sums ``m_j``. It is computed for every component
apart: exactly for two and three columns, else to second order (:mod:`pyro_gs.distributions.edgeworth`), up to nine columns
in polar coordinates where that falls short (:mod:`pyro_gs.distributions.spherical`); or estimated. See ``docs/density.md``.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from pyro_gs.distributions.edgeworth import second_order
from pyro_gs.distributions.spherical import LARGEST, by_rule, by_sampling
from pyro_gs.ops.laplacian import component_logdet
from pyro_gs.ops.quadrature import log_plane_integral
from pyro_gs.ops.support import Support, blocks

_STEP = 0.5  # of the trapezoid rule; its error is below 1e-10, the integrand being analytic in a strip of width pi
_TAIL = 14.0  # how far beyond the flat part the rule goes: the integrand falls by e^-2 a unit or faster
_NODES = 240  # along each axis at the most
_WHOLE = 64  # columns up to which the second-order term follows the matrix; it takes as long as the rest
_BLEND = (0.03, 0.06)  # nats below the flat matrix's term: up to the first second order, from the second on the rule


def log_integral(
    log_q: Tensor, support: Support, logdet: Tensor, num_particles: int, counts: tuple[Tensor, Tensor]
) -> Tensor:
    """Logarithm of the gauge integral, all components together.

    Args:
        log_q: row-normalised, float64, (..., n, n), with its mode at zero.
        support: of the same shape.
        logdet: log-determinant of the Hessian of minus the log integrand at the mode, shape (...).
        num_particles: 0 for deterministic, else the number of directions of the estimate.
        counts: allowed entries of every row and of every column, (..., n) each.

    Returns:
        Tensor of shape (...): exact for components of at most three columns; above, with ``num_particles`` unbiased (the
        integral, not its logarithm), and without it to second order or by the rule.
    """
    n = log_q.shape[-1]
    out = torch.zeros_like(logdet).reshape(-1)
    for part in blocks(support, log_q.device):
        size, item, block = part.size, part.item, part.of(log_q)
        if size < 2:
            continue
        n_i = counts[0].reshape(-1, n)[item[:, None], part.rows]
        m_j = counts[1].reshape(-1, n)[item[:, None], part.columns]
        if size == 2:
            value = _pair_integral(block)
        elif size == 3:
            value = _triple_integral(block, n_i, m_j)
        elif num_particles:
            value = by_sampling(block, n_i, m_j, num_particles)
        else:
            alone = Support(block.shape)  # connected, which is all that counts
            own = logdet.reshape(-1)[item] if size == n else component_logdet(block + 0.5 * n_i.log()[..., None], alone)
            value = 0.5 * (size - 1) * math.log(2 * math.pi) - 0.5 * own
            if size > _WHOLE:
                value = value + _flat_expansions(block, n_i)
            else:
                term = second_order(block, n_i)
                value = value + term
                if size <= LARGEST:
                    value = _with_rule(value, term, block, n_i, m_j)
        out = out.index_add(0, item, value)
    return out.reshape(logdet.shape)


def _with_rule(value: Tensor, term: Tensor, block: Tensor, n_i: Tensor, m_j: Tensor) -> Tensor:
    """Integrals (b,) to second order, of which that is ``term``, with the rule where they fall short; it costs far more.

    What tells is by how much the term is below that of the flat matrix; between two such gaps both are blended, so that
    the result has a continuous gradient.
    """
    low, high = _BLEND
    gap = _flat_expansions(block, n_i) - term
    where = (gap.detach() > low).nonzero()[:, 0]
    if not len(where):
        return value
    share = ((gap[where] - low) / (high - low)).clamp(0.0, 1.0)
    share = share.square() * (3 - 2 * share)
    kept = value[where]
    return value.index_copy(0, where, kept + share * (by_rule(block[where], n_i[where], m_j[where]) - kept))


def _flat_expansions(block: Tensor, n_i: Tensor) -> Tensor:
    """The second-order terms (b,) of the flat matrices on the same allowed pairs."""
    allowed = block.detach() > -torch.inf
    if bool(allowed.all()):
        allowed = allowed[:1]
    found = [_flat_expansion(np.packbits(mask).tobytes(), len(mask)) for mask in allowed.cpu().numpy()]
    return torch.tensor(found, dtype=n_i.dtype, device=n_i.device).expand(len(block))


@functools.lru_cache(maxsize=4096)
def _flat_expansion(packed: bytes, size: int) -> float:
    """The second-order term of the matrix with equal entries in every row, remembered by its mask."""
    allowed = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=size * size).reshape(size, size)
    n_i = torch.from_numpy(allowed.sum(-1)).double()
    log_q = torch.from_numpy(allowed).double().log() - n_i.log()[:, None]
    return float(second_order(log_q[None], n_i[None]))


def _pair_integral(block: Tensor) -> Tensor:
    """Closed form for two columns: ``cosh(t/2) (t cosh t - sinh t) / sinh(t/2)^3`` with ``t = logit q``."""
    t = 0.5 * (block[:, 0, 0] + block[:, 1, 1] - block[:, 0, 1] - block[:, 1, 0])
    tiny = t.abs() < 0.3
    # Series in t^2 of (t cosh t - sinh t) / t^3, cosh(t/2) and sinh(t/2) / (t/2), to 1e-15 below 0.3; smooth at zero.
    x = torch.where(tiny, t, 0.0).square()
    y = x / 4
    top = 1 / 3 + x / 30 + x**2 / 840 + x**3 / 45360 + x**4 / 3991680 + x**5 / 518918400
    cosh = 1 + y / 2 + y**2 / 24 + y**3 / 720 + y**4 / 40320 + y**5 / 3628800
    sinhc = 1 + y / 6 + y**2 / 120 + y**3 / 5040 + y**4 / 362880 + y**5 / 39916800
    near = top.log() + cosh.log() - 3 * (sinhc / 2).log()
    u = torch.where(tiny, 1.0, t.abs())
    e = (-u).exp()
    # numerator times e^-t, and cosh(t/2) / sinh(t/2)^3 times e^t
    top = 0.5 * (u * (1 + e * e) - (1 - e * e))
    far = top.log() + (4 * (1 + e)).log() - 3 * torch.log1p(-e)
    return torch.where(tiny, near, far)


def _triple_integral(block: Tensor, n_i: Tensor, m_j: Tensor) -> Tensor:
    """Three columns by the trapezoid rule over the plane.

    Exact to about 1e-9 while the entries of ``block`` are above e^-40; for values further out in the tails the step grows
    with the flat part of the integrand, so that the number of nodes does not.
    """
    flat = torch.where(block > -torch.inf, -block, 0.0).detach().amax((-2, -1))
    return log_plane_integral(_on_plane, (block, n_i, m_j), flat + _TAIL, _STEP, _NODES)


def _on_plane(nodes: Tensor, block: Tensor, n_i: Tensor, m_j: Tensor) -> Tensor:
    """Logarithm of the integrand at nodes (k, 2), of items (b, 3, 3): (b, k)."""
    beta = torch.cat([torch.zeros_like(nodes[:, :1]), nodes], -1)
    rows = torch.logsumexp(block[:, None] + beta[:, None, :], -1)
    return (m_j[:, None] * beta).sum(-1) - (n_i[:, None] * rows).sum(-1)

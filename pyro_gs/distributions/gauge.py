r"""The integral over the gauge in the Gumbel-Sinkhorn density.

For a row-normalised matrix ``q`` on allowed entries, ``n_i`` of them in row ``i`` and ``m_j`` in column ``j``,

    I(q) = integral over beta of prod_j exp(m_j beta_j) prod_i (sum_j q_ij exp(beta_j))^(-n_i),    beta_ground = 0,

is log-concave with its mode at zero when ``n_i q_ij`` has the column sums ``m_j``. Its Laplace approximation,
the exact value for components of two and three columns, and an importance-sampling estimate, as in
``docs/density.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_gs.ops.laplacian import grounded_nodes, log_tie_weights
from pyro_gs.ops.support import Support, component_sums
from pyro_gs.ops.tree import CutBasis

_STEP = 0.75  # of the trapezoid rule; its error is below 1e-11, the integrand being analytic in a strip of width pi
_TAIL = 14.0  # how far beyond the flat part the rule goes: the integrand falls by e^-2 a unit or faster
_NODES = 160  # along each axis at the most
_CHUNK = 4_000_000


def laplace_constant(size: Tensor) -> Tensor:
    r"""Exact minus Laplace for the flat matrix of each component size; it tends to 1/12.

    ``n lgamma(n) - lgamma(n^2) + n^2 log n - (n - 1)/2 log(2 pi) + (n - 2)/2 log n``, and 0 for n = 1 and for
    unused components (n = 0).
    """
    n = size.clamp(min=1).double()
    exact = n * torch.lgamma(n) - torch.lgamma(n * n)
    value = exact + n * n * n.log() - 0.5 * (n - 1) * math.log(2 * math.pi) + 0.5 * (n - 2) * n.log()
    return torch.where(size > 1, value, 0.0)


def log_integral(
    log_q: Tensor, support: Support, logdet: Tensor, num_particles: int, counts: tuple[Tensor, Tensor]
) -> Tensor:
    """Logarithm of the gauge integral, all components together.

    Args:
        log_q: row-normalised, float64, (..., n, n), with its mode at zero.
        support: of the same shape.
        logdet: log-determinant of the Hessian of minus the log integrand at the mode, shape (...).
        num_particles: 0 for Laplace, else the size of the importance sample.
        counts: allowed entries of every row and of every column, (..., n) each.

    Returns:
        Tensor of shape (...): exact where all components have at most three columns.
    """
    sizes = component_sums(torch.ones_like(log_q[..., 0]), support)
    if num_particles:
        logdet = logdet.detach()
    out = 0.5 * math.log(2 * math.pi) * (sizes - 1).clamp(min=0).sum(-1) - 0.5 * logdet
    constant = laplace_constant(sizes)
    if num_particles:
        small = (sizes <= 3) & (sizes > 0)
        estimate = _importance(log_q, support, num_particles, counts)
        out = out + torch.where(sizes > 3, estimate, 0.0).sum(-1)
        constant = torch.where(small, constant, 0.0)
    out = out + constant.sum(-1)
    for size in (2, 3):
        if bool((sizes == size).any()):
            out = out + _exact_correction(log_q, support, sizes, size, counts, detach=bool(num_particles))
    return out


def _exact_correction(
    log_q: Tensor, support: Support, sizes: Tensor, size: int, counts: tuple[Tensor, Tensor], *, detach: bool
) -> Tensor:
    """Exact minus Laplace, summed over the components of ``size`` columns, shape (...)."""
    n = log_q.shape[-1]
    flat = log_q.reshape(-1, n, n)
    where = (sizes.reshape(-1, n) == size).nonzero()
    item, label = where[:, 0], where[:, 1]
    if support.component is None or support.row_component is None:
        rows = columns = torch.arange(n, device=log_q.device).expand(len(item), n)
    else:
        pick = support.component.reshape(-1, n)[item] == label[:, None]
        columns = pick.nonzero()[:, 1].reshape(-1, size)
        pick = support.row_component.reshape(-1, n)[item] == label[:, None]
        rows = pick.nonzero()[:, 1].reshape(-1, size)
    block = flat[item[:, None, None], rows[:, :, None], columns[:, None, :]]
    n_i = counts[0].reshape(-1, n)[item[:, None], rows]
    m_j = counts[1].reshape(-1, n)[item[:, None], columns]
    log_w = log_tie_weights(block + 0.5 * n_i.log()[..., None])
    if size == 2:
        logdet = log_w[:, 0, 1]
        exact = _pair_integral(block)
    else:
        a, b, c = log_w[:, 0, 1], log_w[:, 0, 2], log_w[:, 1, 2]
        logdet = torch.logsumexp(torch.stack([a + b, a + c, b + c]), 0)  # spanning trees of a triangle
        exact = _triple_integral(block, n_i, m_j)
    if detach:
        logdet = logdet.detach()
    laplace = 0.5 * (size - 1) * math.log(2 * math.pi) - 0.5 * logdet + laplace_constant(sizes.new_full((), size))
    out = torch.zeros_like(flat[:, 0, 0]).index_add(0, item, exact - laplace)
    return out.reshape(log_q.shape[:-2])


def _pair_integral(block: Tensor) -> Tensor:
    """Closed form for two columns: ``cosh(t/2) (t cosh t - sinh t) / sinh(t/2)^3`` with ``t = logit q``."""
    t = (0.5 * (block[:, 0, 0] + block[:, 1, 1] - block[:, 0, 1] - block[:, 1, 0])).abs()
    tiny = t < 0.3
    s = torch.where(tiny, t, 0.1)
    # (s cosh s - sinh s) / s^3 and sinh(s/2) / (s/2) by their series, to 1e-15 below 0.3
    x = s * s
    top = 1 / 3 + x / 30 + x**2 / 840 + x**3 / 45360 + x**4 / 3991680 + x**5 / 518918400
    near = (
        top.log() + (s / 2).cosh().log() - 3 * ((s / 2).sinh() / torch.where(s == 0, 1.0, s)).where(s > 0, s * 0 + 0.5).log()
    )
    u = torch.where(tiny, 1.0, t)
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
    out = []
    order = flat.argsort()
    start = 0
    while start < len(order):
        radius = float(flat[order[start]]) + _TAIL
        nodes = min(2 * radius / _STEP, _NODES) + 3
        part = order[start : start + max(1, int(_CHUNK / (9 * nodes**2)))]
        radius = float(flat[part[-1]]) + _TAIL
        step = max(_STEP, 2 * radius / _NODES)
        arguments = (block[part], n_i[part], m_j[part], step, math.ceil(radius / step))
        if block.requires_grad:  # keep nothing of the nodes for the backward pass
            out.append(checkpoint(_trapezoid, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(_trapezoid(*arguments))
        start += len(part)
    return torch.cat(out)[order.argsort()]


def _trapezoid(block: Tensor, n_i: Tensor, m_j: Tensor, step: float, count: int) -> Tensor:
    axis = step * torch.arange(-count, count + 1, dtype=block.dtype, device=block.device)
    beta = torch.cartesian_prod(axis, axis)
    beta = torch.cat([torch.zeros_like(beta[:, :1]), beta], -1)
    rows = torch.logsumexp(block[:, None] + beta[:, None, :], -1)
    value = (m_j[:, None] * beta).sum(-1) - (n_i[:, None] * rows).sum(-1)
    return torch.logsumexp(value, -1) + 2 * math.log(step)


def _importance(log_q: Tensor, support: Support, num_particles: int, counts: tuple[Tensor, Tensor]) -> Tensor:
    """Log of the mean importance weight of every component, relative to the Laplace approximation, (..., n).

    The proposal is the Laplace Gaussian; its scale is held fixed under differentiation.
    """
    n = log_q.shape[-1]
    flat = log_q.reshape(-1, n, n)
    n_i, m_j = counts[0].reshape(-1, n), counts[1].reshape(-1, n)
    with torch.no_grad():
        grounded = grounded_nodes(support, log_q).reshape(-1, n)
        found = CutBasis(log_tie_weights(flat + 0.5 * n_i.log()[..., None]), grounded)
        noise = torch.randn(num_particles, *m_j.shape, dtype=log_q.dtype, device=log_q.device)
        noise = noise.masked_fill(grounded, 0.0)
        beta = found.gaussian(noise)
        top = beta.amax(-1, keepdim=True)
        weight = (beta - top).exp()
        far = bool(
            (top - beta.amin(-1, keepdim=True) > 300).any() | (torch.where(flat > -torch.inf, flat, 0.0) < -300).any()
        )
    if far:  # products would underflow
        rows = torch.stack([torch.logsumexp(flat + b[:, None, :], -1) for b in beta])
    else:
        rows = torch.einsum("bij,kbj->kbi", flat.exp(), weight).log() + top
    by_column = component_sums((m_j * beta + 0.5 * noise.square()).reshape(num_particles, *log_q.shape[:-1]), support)
    by_row = component_sums((n_i * rows).reshape(num_particles, *log_q.shape[:-1]), support, rows=True)
    return torch.logsumexp(by_column - by_row, 0) - math.log(num_particles)

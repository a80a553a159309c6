"""The solver behind the Sinkhorn operator: damped Newton on the dual, and potentials exact in relative terms.

Everything works on float64 and on a flat batch (b, n, n); ``-inf`` is forbidden. :func:`scale` is the way in.

1. :class:`_Newton` maximises the concave dual from high temperature down until the marginals are right.
2. :func:`_refine`, where logarithms are wanted, makes small entries right too: by one more step where the Hessian is well
   conditioned, else by :func:`_polish`.
3. :class:`_LogSinkhorn` attaches the implicit gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_gs.ops.laplacian import (
    Elimination,
    LaplacianSolve,
    assemble,
    grounded_nodes,
    log_tie_weights,
    solve_differences,
    tie_weights,
    trusted_cholesky,
)
from pyro_gs.ops.matching import solve_assignment
from pyro_gs.ops.support import Support

_LEVEL_TOL = 0.05  # marginal error at which a higher temperature hands over to the next
_LEVEL_RATIO = 4.0
_SMALL_PIVOT = 1e-8  # of the dual's Hessian; below it rounding of the marginals reaches the potentials
_NEGLIGIBLE = 1e-150  # an entry whose product with another is nothing
_LEVEL_STEP = 0.3  # Newton step of a potential at which a higher temperature hands over to the next
_DIRECT_STEPS = 5
_LONGEST_STEP = 30.0  # of a potential in one Newton step, so that exp() of it is harmless


class SinkhornSolution(NamedTuple):
    """What :func:`solve_sinkhorn` returns.

    Attributes:
        log_p: logarithm of the scaled matrix, shape (..., n, n); carries the gradient.
        u: row potentials, shape (..., n); no gradient.
        v: column potentials, shape (..., n), zero at the first column of every component; no gradient.
        residual: largest error of a marginal, shape (...).
        iterations: Newton steps taken, shape (...), dtype long.
        converged: whether ``residual <= tol``, shape (...), dtype bool.
    """

    log_p: Tensor
    u: Tensor
    v: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor


def _rows_exact(z: Tensor, v: Tensor, log_r: Tensor) -> Tensor:
    """Row potentials that give exact row sums."""
    return log_r - torch.logsumexp(z + v[:, None, :], -1)


class _Newton:
    """Newton's method for a flat batch; every item has its own temperature level and stops by itself."""

    def __init__(self, z: Tensor, r: Tensor, c: Tensor, tol: float, max_iter: int) -> None:
        self.z, self.r, self.c, self.tol, self.max_iter = z, r, c, tol, max_iter
        size, n = z.shape[0], z.shape[-1]
        centred = z - z.amax(-1, keepdim=True)
        count = (z > -torch.inf).sum((-2, -1))
        centred.masked_fill_(centred == -torch.inf, 0.0)
        mean = centred.sum((-2, -1)) / count
        spread = ((centred.square().sum((-2, -1)) / count) - mean.square()).clamp(min=0.0).sqrt()
        levels = (spread / 2).clamp(min=1.0).log2().div(math.log2(_LEVEL_RATIO)).floor()
        self.scale = _LEVEL_RATIO ** (-levels)
        self.u, self.v = torch.zeros_like(z[..., 0]), torch.zeros_like(z[..., 0])
        self.residual = z.new_full((size,), torch.inf)
        self.iterations = torch.zeros(size, dtype=torch.long, device=z.device)
        self.eps = torch.finfo(z.dtype).eps
        self.eye = torch.eye(n, dtype=torch.bool, device=z.device)
        # Products of tiny entries are subnormal, which processors multiply many times slower; they add nothing.
        self.cold = bool((spread > 30).any())

    def sweep(self, items: Tensor) -> None:
        """A plain sweep in the log domain."""
        z = self.z[items] * self.scale[items, None, None]
        log_r, log_c, v = self.r[items].log(), self.c[items].log(), self.v[items]
        u = _rows_exact(z, v, log_r)
        v = log_c - torch.logsumexp(z + u[:, :, None], -2)
        self.u[items], self.v[items] = _rows_exact(z, v, log_r), v

    def run(self) -> None:
        active = torch.arange(self.z.shape[0], device=self.z.device)
        self.sweep(active)
        best = torch.full_like(self.residual, torch.inf)
        stalled = torch.zeros_like(self.iterations)
        for _ in range(self.max_iter + 1):
            every = len(active) == len(self.z)
            z, scale, u, v, r, c = (
                part if every else part[active] for part in (self.z, self.scale, self.u, self.v, self.r, self.c)
            )
            p = torch.addcmul(u[:, :, None], z, scale[:, None, None])
            p.add_(v[:, None, :]).exp_()
            correction = r / p.sum(-1)
            p.mul_(correction[:, :, None])
            u = u + correction.log()
            if self.cold:
                p.masked_fill_(p < _NEGLIGIBLE, 0.0)
            g = c - p.sum(-2)
            error = g.abs().amax(-1)
            self.u[active] = u
            last = scale == 1
            self.residual[active] = torch.where(last, error, torch.inf)
            # An item that no longer improves has met the rounding of its own logits.
            better = error < 0.5 * best[active]
            stalled[active] = torch.where(better, 0, stalled[active] + 1)
            best[active] = torch.minimum(best[active], error)
            rise = ~last & ((error < _LEVEL_TOL) | (stalled[active] > 40))
            done = last & ((error <= self.tol) | ((stalled[active] > 40) & (error < 1e3 * self.tol)))
            done |= self.iterations[active] >= self.max_iter
            if bool(rise.any()):
                items = active[rise]
                ratio = (1.0 / self.scale[items]).clamp(max=_LEVEL_RATIO)
                self.scale[items] *= ratio
                self.v[items] *= ratio[:, None]
                self.sweep(items)
                best[items], stalled[items] = torch.inf, 0
            go = ~(rise | done)
            keep = ~done
            if bool(go.any()):
                pick = slice(None) if bool(go.all()) else go
                self.step(active[pick], p[pick], u[pick], v[pick], r[pick], c[pick], g[pick], error[pick])
            active = active[keep]
            if not len(active):
                break
        self.finish()

    def finish(self) -> None:
        """Bring items that the cap left at a high temperature to their own, so that their residual is the result's."""
        items = (self.scale < 1).nonzero()[:, 0]
        if len(items):
            self.v[items] /= self.scale[items, None]
            self.scale[items] = 1.0
            self.sweep(items)
            p = (self.z[items] + self.u[items][:, :, None] + self.v[items][:, None, :]).exp()
            self.residual[items] = (self.c[items] - p.sum(-2)).abs().amax(-1)

    def step(self, items: Tensor, p: Tensor, u: Tensor, v: Tensor, r: Tensor, c: Tensor, g: Tensor, error: Tensor) -> None:
        """One damped Newton step with a line search, then one sweep; ``p`` has exact row sums ``r``."""
        scaled = p if bool((r == 1).all()) else p * r.rsqrt()[:, :, None]
        weights = scaled.mT @ scaled
        damping = (1e-3 * error).clamp(min=self.eps)
        lap = assemble(weights, self.eye[0], damping)
        factor, _ = torch.linalg.cholesky_ex(lap)
        d = torch.cholesky_solve(g[..., None], factor)[..., 0]
        d = torch.where(d.isfinite().all(-1, keepdim=True), d, g / lap.diagonal(0, -2, -1))
        longest = d.abs().amax(-1, keepdim=True)
        d = d * (_LONGEST_STEP / longest).clamp(max=1.0)
        slope = (g * d).sum(-1)
        size = torch.ones_like(slope)
        slack = 8 * self.eps * (1 + (c * v).sum(-1).abs())
        for _ in range(25):
            e = (size[:, None] * d).exp()
            rows = (p @ e[..., None])[..., 0] / r
            rise = size * (c * d).sum(-1) - (r * rows.log()).sum(-1)
            bad = ~(rise >= 1e-4 * size * slope - slack)
            if not bool(bad.any()):
                break
            size = torch.where(bad, size / 2, size)
        a = 1 / rows
        columns = (a[:, None, :] @ p)[:, 0] * e
        correction = c / columns
        self.v[items] = v + size[:, None] * d + correction.log()
        e = e * correction
        self.u[items] = u - ((p @ e[..., None])[..., 0] / r).log()
        self.iterations[items] += 1


def _matched_flow(log_p: Tensor, row_of: Tensor) -> Tensor:
    """Logarithms (b, n, n) of ``P[s(j), k]``, with ``s(j)`` the row matched with column ``j``."""
    return log_p.gather(-2, row_of[:, :, None].expand_as(log_p))


def _normalise(z: Tensor, v: Tensor) -> Tensor:
    t = z + v[:, None, :]
    return t - torch.logsumexp(t, -1, keepdim=True)


def _polish(z: Tensor, v: Tensor, grounded: Tensor, max_steps: int = 150) -> Tensor:
    """Column potentials (b, n) so exact that the smallest entries of ``P`` have them right, unit marginals.

    A marginal error says nothing of entries below it: with ``P = [[1, e^-40], [e^-80, 1]]`` all marginals are right
    to seventeen digits and both small entries are wrong. Newton steps whose residual is the antisymmetric flow
    ``F_jk = P[s(j), k] - P[s(k), j]``, with ``s`` the best matching, see them: row ``j`` of ``F`` sums to one minus
    the ``j``-th column sum, but no term of it is rounded at the scale of one.

    Potentials that are far off move by one unit a step, so items that a few steps do not bring near are solved again
    from high temperature down, where every level starts near its solution.
    """
    row_of = solve_assignment(z + v[:, None, :]).argsort(-1)
    v = v.clone()
    level = torch.ones_like(v[:, 0])
    active = torch.arange(z.shape[0], device=z.device)
    for number in range(max_steps):
        now, rows, v_now = level[active], row_of[active], v[active]
        z_now = z[active] * now[:, None, None]
        d = _flow_step(_normalise(z_now, v_now), rows, grounded[active])
        large = d.abs().amax(-1)
        v_now = v_now + d * _step_length(z_now, v_now, d, rows)[:, None]
        v[active] = v_now
        last = now == 1
        rise = active[~last & (large < _LEVEL_STEP)]
        if number == _DIRECT_STEPS:
            far = active[large > _LEVEL_STEP]
            size = torch.where(z[far] > -torch.inf, (z[far] - z[far].amax(-1, keepdim=True)).abs(), 0.0).amax((-2, -1))
            level[far] = 0.5 ** (size / 8).clamp(min=1.0).log2().ceil()
            v[far] = 0.0
            _column_sweeps(z, v, level, far, 4)
        elif len(rise):
            level[rise] *= 2
            v[rise] *= 2
            _column_sweeps(z, v, level, rise, 1)
        active = active[~last | (large > 1e-9)]
        if not len(active):
            break
    return v


def _column_sweeps(z: Tensor, v: Tensor, level: Tensor, items: Tensor, count: int) -> None:
    """Plain sweeps of some items at their levels, in place on ``v``."""
    z_now = z[items] * level[items, None, None]
    for _ in range(count):
        log_p = _normalise(z_now, v[items])
        v[items] -= torch.logsumexp(log_p, -2)


def _flow_step(log_p: Tensor, row_of: Tensor, grounded: Tensor) -> Tensor:
    """Newton step (b, n) of the column potentials from the flows."""
    log_f = _matched_flow(log_p, row_of)
    weights, f = tie_weights(log_p), log_f.exp()
    found = Elimination(weights, grounded, (f - f.mT) / weights.clamp(min=1e-300))
    d = found.potentials()
    low = found.failed
    if bool(low.any()):
        log_w = log_tie_weights(log_p[low])
        below, log_f = log_w.clamp(min=-1e300), log_f[low]
        drops = (log_f - below).exp() - (log_f.mT - below).exp()
        d[low] = Elimination(log_w, grounded[low], drops, log=True).potentials()
    return d


def _step_length(z: Tensor, v: Tensor, d: Tensor, row_of: Tensor) -> Tensor:
    """How far to follow ``d`` on the concave dual: 1 near the maximum, else 2 or a half, a quarter, ...."""
    step = torch.ones_like(d[:, 0])
    if not bool((d.abs() > 0.1).any()):
        return step
    pull = d[:, :, None] - d[:, None, :]

    def climbs(length: Tensor) -> Tensor:
        log_f = _matched_flow(_normalise(z, v + length[:, None] * d), row_of)
        peak = torch.where(pull == 0, -torch.inf, torch.maximum(log_f, log_f.mT)).amax((-2, -1), keepdim=True)
        peak = peak.clamp(min=-1e300)
        return (((log_f - peak).exp() - (log_f.mT - peak).exp()) * pull).sum((-2, -1)) >= 0

    step = torch.where(climbs(2 * step), 2.0, step)
    for _ in range(30):
        down = ~climbs(step) & (step * d.abs().amax(-1) > 0.1)
        if not bool(down.any()):
            break
        step = torch.where(down, step / 2, step)
    return step


def _refine(
    z: Tensor, u: Tensor, v: Tensor, r: Tensor, c: Tensor, grounded: Tensor, unit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials exact in relative terms, and the residual: a Newton step where that is enough, else :func:`_polish`."""
    n = z.shape[-1]
    for _ in range(3):
        p = (z + u[:, :, None] + v[:, None, :]).exp()
        g = c - p.sum(-2)
        scaled = p * r.rsqrt()[:, :, None]
        factor, good = trusted_cholesky(scaled.mT @ scaled, grounded)
        pivots = factor.diagonal(0, -2, -1).square().masked_fill(grounded, 1.0)
        good = good & (pivots > _SMALL_PIVOT).all(-1)
        d = torch.cholesky_solve(g.masked_fill(grounded, 0.0)[..., None], factor)[..., 0]
        large = d.abs().amax(-1)
        step = good & (large < 0.5) & (large > 1e-12)
        if not bool(step.any()):
            break
        v = v + torch.where(step[:, None], d, 0.0)
        u = _rows_exact(z, v, r.log())
        g = torch.where(step[:, None], 0.0, g)  # the step is quadratic: what is left is below its square
        if not bool((step & (large > 1e-6)).any()):
            break
    if unit and n > 1 and not bool(good.all()):
        bad = ~good
        v = v.clone()
        v[bad] = _polish(z[bad], v[bad], grounded[bad])
        u = _rows_exact(z, v, r.log())
        g[bad] = c[bad] - (z[bad] + u[bad][:, :, None] + v[bad][:, None, :]).exp().sum(-2)
    return u, v, g.abs().amax(-1)


class _LogSinkhorn(torch.autograd.Function):
    """``log P`` of scaled potentials as a function of ``Z``: the implicit gradient.

    Forward only assembles ``Z + u + v``; the potentials are given and held to be the solution at ``Z``.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, u: Tensor, v: Tensor, log_r: Tensor | None, grounded: Tensor) -> Tensor:
        log_p = (z + u[:, :, None]).add_(v[:, None, :])
        ctx.save_for_backward(log_p)
        ctx.log_r, ctx.grounded = log_r, grounded
        return log_p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (log_p,) = ctx.saved_tensors
        grad = grad.masked_fill(log_p == -torch.inf, 0.0)
        # Adjoint potentials: (diag(c) - P' diag(1/r) P) b = g_c - P' diag(1/r) g_r, the right side as a flow.
        if ctx.log_r is None:
            scaled, p = log_p, log_p.exp()
            q, cross = p, p.mT @ grad
        else:
            half = 0.5 * ctx.log_r[:, :, None]
            scaled, p = log_p - half, log_p.exp()
            q = scaled.exp()
            cross = q.mT @ (grad * (-half).exp())
        flow = cross.mT - cross
        if torch.is_grad_enabled():  # a second derivative is wanted
            b = LaplacianSolve.apply(q, scaled.detach(), ctx.grounded, flow, None)
            apart = b[:, :, None] - b[:, None, :]
        else:
            apart = solve_differences(q, scaled, ctx.grounded, flow)
        # a_i + b_j with a = (g_r - P b) / r, as differences of b: near a permutation a_i and -b_j nearly agree.
        both = grad.sum(-1, keepdim=True) - p @ apart
        if ctx.log_r is not None:
            both = both * (-ctx.log_r).exp()[:, :, None]
        return grad - p * both, None, None, None, None


def scale(
    z: Tensor,
    support: Support,
    row_sums: Tensor | None = None,
    column_sums: Tensor | None = None,
    *,
    tol: float,
    max_iter: int,
    relative: bool,
    start: Tensor | None = None,
) -> SinkhornSolution:
    """The solver behind every public function: float64 ``z`` (..., n, n) with ``-inf`` outside ``support``.

    With ``relative`` the smallest entries are made exact too, which a density needs and an average does not. Column
    potentials that are right to ``tol`` already may be given as ``start``.
    """
    n, batch = z.shape[-1], z.shape[:-2]
    flat = z.reshape(-1, n, n)
    ones = torch.ones_like(flat[..., 0])
    r = ones if row_sums is None else row_sums.to(z).expand(z.shape[:-1]).reshape(-1, n)
    c = ones if column_sums is None else column_sums.to(z).expand(z.shape[:-1]).reshape(-1, n)
    grounded = grounded_nodes(support, z).expand(z.shape[:-1]).reshape(-1, n)
    unit = row_sums is None and column_sums is None
    log_r = None if row_sums is None else r.log()
    with torch.no_grad():
        data = flat.detach()
        iterations = torch.zeros(len(data), dtype=torch.long, device=data.device)
        if start is None:
            newton = _Newton(data, r, c, tol, max_iter)
            newton.run()
            u, v, residual, iterations = newton.u, newton.v, newton.residual, newton.iterations
        else:
            v = start.reshape(-1, n)
            u, residual = _rows_exact(data, v, r.log()), torch.zeros_like(v[:, 0])
        near = residual <= tol
        if relative and bool(near.all()):
            u, v, residual = _refine(data, u, v, r, c, grounded, unit)
        elif relative and bool(near.any()):
            u, v, residual = u.clone(), v.clone(), residual.clone()
            u[near], v[near], residual[near] = _refine(data[near], u[near], v[near], r[near], c[near], grounded[near], unit)
        rows, columns = _gauge(v, support, grounded)
        u, v = u + rows, v - columns
    log_p = _LogSinkhorn.apply(flat, u, v, log_r, grounded)
    return SinkhornSolution(
        log_p.reshape(z.shape),
        u.reshape(z.shape[:-1]),
        v.reshape(z.shape[:-1]),
        residual.reshape(batch),
        iterations.reshape(batch),
        (residual <= tol).reshape(batch),
    )


def _gauge(v: Tensor, support: Support, grounded: Tensor) -> tuple[Tensor, Tensor]:
    """The column potential at the ground of every row's and of every column's component."""
    if support.component is None or support.row_component is None:
        return v[:, :1], v[:, :1]
    label = support.component.reshape(v.shape)
    at_ground = torch.zeros_like(v).scatter_add_(-1, label, torch.where(grounded, v, 0.0))
    return at_ground.gather(-1, support.row_component.reshape(v.shape)), at_ground.gather(-1, label)

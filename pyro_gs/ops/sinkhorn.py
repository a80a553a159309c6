r"""The Sinkhorn operator ``S``, converged, with its implicit gradient.

``S(X / tau)`` is the doubly stochastic matrix ``exp(X / tau + u 1' + 1 v')``. Its potentials maximise the concave dual

    f(v) = sum_j c_j v_j - sum_i r_i logsumexp_j(Z_ij + v_j),        Z = X / tau,

which :func:`solve_sinkhorn` does by damped Newton steps, each followed by one plain sweep, from high temperature down
(Sinkhorn and Knopp 1967 for the operator; Brauer, Clason, Lorenz and Wirth 2017 for Newton on the dual). The Hessian
is the graph Laplacian of :mod:`pyro_gs.ops.laplacian`; the gradient of the result is one more solve with it, so memory
does not depend on the number of iterations. All of it happens in float64, whatever the dtype of the input.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_gs.ops.laplacian import (
    Elimination,
    LaplacianSolve,
    assemble,
    grounded_nodes,
    log_tie_weights,
    tie_weights,
    trusted_cholesky,
)
from pyro_gs.ops.logits import check_floating, check_logits, first_position
from pyro_gs.ops.matching import solve_assignment
from pyro_gs.ops.support import Support, component_sums, find_support

_DEFAULT_TOL = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
_LEVEL_TOL = 0.05  # marginal error at which a higher temperature hands over to the next
_LEVEL_RATIO = 4.0
_SMALL_PIVOT = 1e-8  # of the dual's Hessian; below it rounding of the marginals reaches the potentials
_LEVEL_STEP = 0.3  # Newton step of a potential at which a higher temperature hands over to the next
_DIRECT_STEPS = 5
_LONGEST_STEP = 30.0  # of a potential in one Newton step, so that exp() of it is harmless


class SinkhornWarning(UserWarning):
    """The Sinkhorn operator did not reach its tolerance."""


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
                return

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
        b = LaplacianSolve.apply(q, scaled.detach(), ctx.grounded, flow, None)
        # a_i + b_j with a = (g_r - P b) / r, as differences of b: near a permutation a_i and -b_j nearly agree.
        both = grad.sum(-1, keepdim=True) - p @ (b[:, :, None] - b[:, None, :])
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
        newton = _Newton(data, r, c, tol, max_iter)
        if start is None:
            newton.run()
            u, v, residual = newton.u, newton.v, newton.residual
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
        newton.iterations.reshape(batch),
        (residual <= tol).reshape(batch),
    )


def _gauge(v: Tensor, support: Support, grounded: Tensor) -> tuple[Tensor, Tensor]:
    """The column potential at the ground of every row's and of every column's component."""
    if support.component is None or support.row_component is None:
        return v[:, :1], v[:, :1]
    label = support.component.reshape(v.shape)
    at_ground = torch.zeros_like(v).scatter_add_(-1, label, torch.where(grounded, v, 0.0))
    return at_ground.gather(-1, support.row_component.reshape(v.shape)), at_ground.gather(-1, label)


def scaled_logits(logits: Tensor, temperature: float | Tensor, support: Support, noise: Tensor | None = None) -> Tensor:
    """``(logits + noise) / temperature`` in float64, ``-inf`` where forbidden, without NaN in any gradient.

    ``noise`` may have more batch dimensions than ``logits`` and ``support``.
    """
    z = logits.double()
    allowed = support.allowed
    if allowed is not None:
        z = z.masked_fill(~allowed, 0.0)
    if noise is not None:
        z = z + noise
    t = temperature.double()[..., None, None] if isinstance(temperature, Tensor) else temperature
    z = z / t
    return z if allowed is None else z.masked_fill(~allowed, -torch.inf)


def check_temperature(temperature: float | Tensor, name: str = "temperature") -> None:
    """Raise unless a temperature is a positive finite number or a floating tensor of such."""
    if isinstance(temperature, Tensor):
        check_floating(temperature, name)
        bad = ~((temperature > 0) & (temperature < torch.inf))
        if bool(bad.any()):
            where = first_position(bad) if bad.dim() else ()
            at = f" at {where}" if where else ""
            raise ValueError(f"{name} must be positive and finite, but is {float(temperature[where].detach())}{at}")
    elif isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, but is {type(temperature).__name__}")
    elif not 0 < float(temperature) < math.inf:
        raise ValueError(f"{name} must be positive and finite, but is {temperature}")


def _check_options(tol: float | None, max_iter: int | None, num_iters: int | None = None) -> None:
    if tol is not None and not 0 < tol < math.inf:
        raise ValueError(f"tol must be positive and finite, but is {tol}")
    for name, value in (("max_iter", max_iter), ("num_iters", num_iters)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, but is {value!r}")
    if num_iters is not None and not (tol is None and max_iter is None):
        raise ValueError(
            f"num_iters={num_iters} asks for a fixed number of sweeps, so tol and max_iter must be None, "
            f"but are tol={tol}, max_iter={max_iter}"
        )


def default_tol(dtype: torch.dtype) -> float:
    """Marginal error that a dtype is solved to: 1e-10 in float64, 2e-6 in float32."""
    return _DEFAULT_TOL[dtype]


def warn_unconverged(solution: SinkhornSolution, tol: float, temperature: float | Tensor | None) -> None:
    """Issue a :class:`SinkhornWarning` if an item of a solution missed its tolerance."""
    if bool(solution.converged.all()):
        return
    worst = float(solution.residual.max())
    count = int((~solution.converged).sum())
    about = "logits as given" if temperature is None else _temperature_range(temperature)
    warnings.warn(
        f"Sinkhorn stopped after {int(solution.iterations.max())} Newton steps with a marginal error of {worst:.2e}, "
        f"above tol={tol:.1e}, for {count} of {solution.converged.numel()} matrices ({about}); raise max_iter, tol or "
        "the temperature",
        SinkhornWarning,
        stacklevel=3,
    )


def _temperature_range(temperature: float | Tensor) -> str:
    if not isinstance(temperature, Tensor):
        return f"temperature {temperature:g}"
    temperature = temperature.detach()
    low, high = float(temperature.min()), float(temperature.max())
    return f"temperature {low:g}" if low == high else f"temperatures {low:g} to {high:g}"


def solve_sinkhorn(
    logits: Tensor,
    *,
    row_sums: Tensor | None = None,
    column_sums: Tensor | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    throw: bool = False,
) -> SinkhornSolution:
    r"""Scale ``exp(logits)`` to given row and column sums, and say how well that went.

    Finds potentials with ``log P = logits + u[:, None] + v[None, :]``. Entries of ``-inf`` stay forbidden; allowed
    entries that lie on no permutation are forbidden too, with a :class:`SupportWarning`.

    Differentiation: ``log_p`` carries the implicit gradient of the solution (one linear solve, nothing is unrolled,
    twice differentiable); ``u`` and ``v`` carry none.

    Args:
        logits: shape (..., n, n), without NaN and +inf.
        row_sums: positive, shape (..., n), by default ones.
        column_sums: positive, shape (..., n), by default ones; must have the total of ``row_sums``, in every
            component of the allowed entries.
        tol: largest error of a marginal, by default 1e-10 in float64 and 2e-6 in float32.
        max_iter: cap on Newton steps, by default 500.
        throw: raise instead of warn when the cap is met.

    Returns:
        A :class:`SinkhornSolution`; ``converged`` is honest also where no warning is wanted.

    Raises:
        TypeError: not a floating tensor.
        ValueError: bad logits, no permutation allowed, sums that are not positive or do not agree, bad options.
        RuntimeError: with ``throw=True``, not converged.

    Warns:
        SinkhornWarning: not converged, with the residual.

    Example:
        >>> import torch
        >>> solution = solve_sinkhorn(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        >>> solution.log_p.exp()
        tensor([[0.2689, 0.7311],
                [0.7311, 0.2689]])
        >>> bool(solution.converged)
        True
    """
    check_logits(logits)
    _check_options(tol, max_iter)
    support = find_support(logits.detach() > -torch.inf)
    for name, sums in (("row_sums", row_sums), ("column_sums", column_sums)):
        if sums is not None:
            _check_sums(sums, name, logits)
    if row_sums is not None or column_sums is not None:
        _check_totals(row_sums, column_sums, logits, support)
    tol = default_tol(logits.dtype) if tol is None else tol
    z = scaled_logits(logits, 1.0, support)
    found = scale(z, support, row_sums, column_sums, tol=tol, max_iter=max_iter or 500, relative=True)
    if throw and not bool(found.converged.all()):
        raise RuntimeError(
            f"solve_sinkhorn did not converge: marginal error {float(found.residual.max()):.2e} > tol={tol:.1e}"
        )
    warn_unconverged(found, tol, None)
    dtype = logits.dtype
    return found._replace(
        log_p=found.log_p.to(dtype), u=found.u.to(dtype), v=found.v.to(dtype), residual=found.residual.to(dtype)
    )


def _check_sums(sums: Tensor, name: str, logits: Tensor) -> None:
    n = logits.shape[-1]
    check_floating(sums, name)
    if sums.dim() < 1 or sums.shape[-1] != n:
        raise ValueError(f"{name} must have shape (..., {n}) to fit logits, but has shape {tuple(sums.shape)}")
    try:
        torch.broadcast_to(sums, logits.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(sums.shape)} does not broadcast to {tuple(logits.shape[:-1])}, the batch of logits"
        ) from None
    bad = ~((sums > 0) & (sums < torch.inf))
    if bool(bad.any()):
        where = first_position(bad)
        raise ValueError(f"{name} must be positive and finite, but is {float(sums[where])} at {where}")


def _check_totals(rows: Tensor | None, columns: Tensor | None, logits: Tensor, support: Support) -> None:
    ones = torch.ones(logits.shape[:-1], dtype=torch.float64, device=logits.device)
    r = ones if rows is None else rows.double().expand(ones.shape)
    c = ones if columns is None else columns.double().expand(ones.shape)
    gap = component_sums(r, support, rows=True) - component_sums(c, support)
    slack = 1e-5 if torch.float32 in {s.dtype for s in (rows, columns) if s is not None} else 1e-9
    bad = gap.abs() > slack * r.sum(-1, keepdim=True)
    if bool(bad.any()):
        where = first_position(bad)
        raise ValueError(
            "row_sums and column_sums must have the same total in every component of the allowed entries, but differ by "
            f"{float(gap[where]):g} in item {where[:-1]}"
        )


def log_sinkhorn(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    tol: float | None = None,
    max_iter: int | None = None,
    num_iters: int | None = None,
) -> Tensor:
    r"""Logarithm of the Sinkhorn operator, ``log S(logits / temperature)``.

    ``S`` scales ``exp(logits / temperature)`` to row and column sums of one (Mena et al. 2018, equation 1). Exact in
    relative terms: entries far below the marginal error, and below what ``exp`` can hold, have right logarithms.
    ``S`` does not change under ``logits + r[:, None] + c[None, :]``.

    Differentiation: implicit, one linear solve, twice differentiable; exactly zero at forbidden entries. With
    ``num_iters`` the sweeps are unrolled.

    Args:
        logits: log-potentials (not probabilities), shape (..., n, n), larger is better; ``-inf`` forbids a pair.
        temperature: positive; a number or a tensor that broadcasts to the batch shape.
        tol: largest error of a marginal, by default 1e-10 in float64 and 2e-6 in float32 (half precision is computed
            in float64 inside and cast back).
        max_iter: cap on Newton steps, by default 500.
        num_iters: instead of converging, take exactly this many sweeps (a row and a column normalisation each), the
            paper's truncated operator; its rows do not sum to one.

    Returns:
        Tensor of the shape, dtype and device of ``logits``; ``-inf`` where forbidden.

    Raises:
        TypeError: not a floating tensor.
        ValueError: bad logits or temperature, or a mask that allows no permutation.

    Warns:
        SinkhornWarning: the cap was met before the tolerance.
        SupportWarning: allowed entries lie on no permutation; they come out as ``-inf``.
    """
    return _operator(logits, temperature, tol, max_iter, num_iters, relative=True)


def sinkhorn(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    tol: float | None = None,
    max_iter: int | None = None,
    num_iters: int | None = None,
) -> Tensor:
    """The Sinkhorn operator ``S(logits / temperature)``: a doubly stochastic matrix.

    See :func:`log_sinkhorn` for arguments, gradient, errors and warnings. Entries are right to ``tol``.

    Returns:
        Tensor of the shape, dtype and device of ``logits``; exactly zero where forbidden.

    Example:
        >>> import torch
        >>> X = -torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> sinkhorn(X, temperature=0.005)
        tensor([[1., 0.],
                [0., 1.]])
    """
    return _operator(logits, temperature, tol, max_iter, num_iters, relative=False).exp()


def _operator(
    logits: Tensor,
    temperature: float | Tensor,
    tol: float | None,
    max_iter: int | None,
    num_iters: int | None,
    *,
    relative: bool,
) -> Tensor:
    check_logits(logits)
    check_temperature(temperature)
    _check_options(tol, max_iter, num_iters)
    if isinstance(temperature, Tensor) and temperature.dim():
        try:
            batch = torch.broadcast_shapes(temperature.shape, logits.shape[:-2])
        except RuntimeError:
            raise ValueError(
                f"temperature of shape {tuple(temperature.shape)} does not broadcast with {tuple(logits.shape[:-2])}, "
                "the batch shape of logits"
            ) from None
        logits = logits.expand(*batch, *logits.shape[-2:])
    support = find_support(logits.detach() > -torch.inf)
    z = scaled_logits(logits, temperature, support)
    if num_iters is not None:
        for _ in range(num_iters):
            z = z - torch.logsumexp(z, -1, keepdim=True)
            z = z - torch.logsumexp(z, -2, keepdim=True)
        return z.to(logits.dtype)
    tol = default_tol(logits.dtype) if tol is None else tol
    found = scale(z, support, tol=tol, max_iter=max_iter or 500, relative=relative)
    warn_unconverged(found, tol, temperature)
    return found.log_p.to(logits.dtype)

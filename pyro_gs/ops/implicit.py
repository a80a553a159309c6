r"""The converged operator as a differentiable function: implicit derivatives of every order, in both modes, under vmap.

For ``log P = Z + u + v`` with fixed row and column sums let ``A G`` be the matrix ``a_i + b_j`` for which
``P * (A G)`` has the row and column sums of ``G``: one solve with the Laplacian of :mod:`pyro_gs.ops.laplacian`. With
``E T = A (P * T)`` and ``B G = P * (A G)``, which are each other's adjoints and neither of which leaves the scale of its
argument,

    d log P = dZ - E dZ,        d<G, log P> / dZ = G - B G,
    d(E T) = E (dT + (T - E T) * d log P),        d(B G) = C * d log P + B (dG - C * d log P),    C = B G,

so :class:`Fitted`, which is ``E``, and :class:`Carried`, which is ``B``, are closed under derivatives of any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_gs.ops.batching import apply_batched, refuse_nested_forward_mode, refuse_tracing
from pyro_gs.ops.conjugate import accurate_candidates, accurate_solution
from pyro_gs.ops.laplacian import OVERFLOW, across_overflow, grounded_nodes, solve_differences
from pyro_gs.ops.layout import DENSE, Dense, Sparse
from pyro_gs.ops.logits import warn_user
from pyro_gs.ops.newton import Newton, rows_exact
from pyro_gs.ops.polish import refine
from pyro_gs.ops.support import Support

# The implicit gradient holds at fixed points; an item whose marginals are further off than this has none.
FIXED_POINT = 2e-6
_RELATIVE_TOL = 1e-8  # error of a marginal from which small entries are balanced
_CARRIED_GAP = 1e-9  # of a column sum, over the largest entry
_NEARLY_ONE = -1e-3  # logarithm of the largest entry of every row of what is nearly a permutation
_SMALL = 64  # rows up to which a whole matrix may be nearly one without the temperature being out of all proportion
_NOTHING = -200.0  # logarithm of an entry whose gradient nobody can look at
_DEPTH = 40.0  # nats below the strongest tie at which the others no longer show in a gradient


ROUNDING = 1e-4
"""Nats that rounding of large logits may cost."""


class SinkhornWarning(UserWarning):
    """The Sinkhorn operator did not reach its tolerance.

    A message says by how much and for how many matrices. To stop there instead:

    Example:
        >>> import warnings
        >>> import torch
        >>> import pyro_gs as pgs
        >>> logits = torch.tensor([[0.0, 9.0, 4.0], [5.0, 0.0, 3.0], [1.0, 7.0, 0.0]])
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", pgs.SinkhornWarning)
        ...     pgs.sinkhorn(logits, max_iter=1)
        Traceback (most recent call last):
            ...
        pyro_gs.ops.implicit.SinkhornWarning: Sinkhorn stopped after 1 Newton steps with a marginal error of ...
    """


class SinkhornSolution(NamedTuple):
    """What :func:`solve_sinkhorn` returns.

    Attributes:
        log_p: logarithm of the scaled matrix, shape (..., n, n); carries the gradient.
        u: row potentials, shape (..., n); no gradient.
        v: column potentials, shape (..., n), zero at the first column of every component; no gradient.
        residual: largest error of a marginal, shape (...).
        iterations: Newton steps taken, shape (...), dtype long.
        converged: whether ``residual <= tol``, shape (...), dtype bool.

    Example:
        >>> import torch
        >>> from pyro_gs import solve_sinkhorn
        >>> solution = solve_sinkhorn(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        >>> solution.log_p.exp()
        tensor([[0.6225, 0.3775],
                [0.3775, 0.6225]])
        >>> bool(solution.converged)
        True
    """

    log_p: Tensor
    u: Tensor
    v: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor


class Settings(NamedTuple):
    """How to solve.

    Attributes:
        support: of the logits; None to have ``prepare`` find it.
        prepare: checks of values, which under a transformation see the values only inside the function.
        tol: largest error of a marginal.
        max_iter: cap on Newton steps.
        relative: whether the smallest entries have to be right too.
        report: told of the solution, and the temperature, before it is returned.
        layout: of the entries; shapes (..., n, n) are (..., n, k) with that of candidates.
    """

    support: Support | None
    tol: float
    max_iter: int
    relative: bool
    prepare: Callable[..., Support] | None = None
    report: Callable[[SinkhornSolution, Any], None] | None = None
    layout: Dense = DENSE


class Solve(torch.autograd.Function):
    """``log P`` (..., n, n) as a function of ``Z``, with what there is to say of it.

    Sums and start have the batch shape of ``Z`` or are None; logits and temperature are for ``prepare``.
    """

    @staticmethod
    def forward(
        z: Tensor,
        row_sums: Tensor | None,
        column_sums: Tensor | None,
        start: Tensor | None,
        logits: Tensor | None,
        temperature: Any,
        settings: Settings,
    ) -> tuple[Tensor, ...]:
        """Solve; outputs are those of :class:`SinkhornSolution`, the grounded columns, and where no gradient exists."""
        support = settings.support
        if support is None:
            assert settings.prepare is not None
            support = settings.prepare(z, logits, temperature, row_sums, column_sums)
            if support.allowed is not None:  # pruned
                z = z.masked_fill(~support.allowed, -torch.inf)
        elif support.shape != z.shape:
            support = support.expand(z.shape[:-2])
        found, grounded = _solve(z, support, row_sums, column_sums, start, settings)
        if settings.report is not None:
            settings.report(found, temperature)
        return (*found, grounded, found.residual > FIXED_POINT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the solution."""
        log_p, *rest = output
        ctx.mark_non_differentiable(*rest)
        kept = (log_p, rest[-2], rest[-1], inputs[1])
        ctx.layout = inputs[-1].layout
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """``G - P * (A G)``."""
        log_p, grounded, refused, row_sums = ctx.saved_tensors
        grad = torch.where(log_p == -torch.inf, 0.0, grad)
        carried = Carried.apply(log_p, grounded, refused, row_sums, grad, ctx.layout)
        # Rows sum to zero; an entry that fills its row is what the others leave, where the difference would be rounding.
        full = _fills_row(log_p, row_sums)
        out = torch.where(full, 0.0, grad - carried)
        return (torch.where(full, -out.sum(-1, keepdim=True), out), None, None, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """``dZ - A (P * dZ)``."""
        log_p, grounded, refused, row_sums = ctx.saved_tensors
        forbidden = log_p == -torch.inf
        tangent = torch.where(forbidden, 0.0, tangent)
        p = log_p.exp()
        fit = Fitted.apply(log_p, grounded, refused, row_sums, tangent, ctx.layout)
        full = _fills_row(log_p, row_sums)
        out = torch.where(forbidden | full, 0.0, tangent - fit)
        rest = -(p * out).sum(-1, keepdim=True) / p.amax(-1, keepdim=True)
        return (torch.where(full, rest, out), None, None, None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """One more batch dimension."""
        return apply_batched(Solve, info, in_dims, args)


class Fitted(torch.autograd.Function):
    """``E T = A (P * T)``, (..., n, n): the matrix ``a_i + b_j`` nearest to ``T`` in the mean weighted by ``P``.

    Its adjoint is ``B``, and ``d(E T) = E (dT + (T - E T) * d log P)``.
    """

    @staticmethod
    def forward(
        log_p: Tensor, grounded: Tensor, refused: Tensor, row_sums: Tensor | None, t: Tensor, layout: Dense
    ) -> Tensor:
        """Solve."""
        g = log_p.exp() * t
        if isinstance(layout, Sparse):
            return _on_candidates(log_p, grounded, refused, row_sums, g, layout.flat(log_p.shape[:-2]), tangent=t)
        return _fit(log_p, grounded, refused, row_sums, g, tangent=t)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep inputs and output."""
        ctx.layout = inputs[-1]
        ctx.save_for_backward(*inputs[:-1], output)
        ctx.save_for_forward(*inputs[:-1], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The adjoint."""
        log_p, grounded, refused, row_sums, t, fit = ctx.saved_tensors
        grad = torch.where(log_p == -torch.inf, 0.0, grad)
        back = Carried.apply(log_p, grounded, refused, row_sums, grad, ctx.layout)
        return back * (t - fit), None, None, None, back, None

    @staticmethod
    def jvp(ctx: Any, log_t: Tensor | None, _1: Any, _2: Any, _3: Any, t_t: Tensor | None, _4: Any) -> Tensor:
        """``E (dT + (T - E T) * d log P)``."""
        log_p, grounded, refused, row_sums, t, fit = ctx.saved_tensors
        change = torch.zeros_like(t) if t_t is None else t_t
        if log_t is not None:
            change = change + torch.where(log_p == -torch.inf, 0.0, (t - fit) * log_t)
        return Fitted.apply(log_p, grounded, refused, row_sums, change, ctx.layout)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """One more batch dimension."""
        return apply_batched(Fitted, info, in_dims, args)


class Carried(torch.autograd.Function):
    """``B G = P * (A G)``, (..., n, n), also where ``A G`` is beyond floating point.

    Its adjoint is ``E``, and ``d(B G) = C * d log P + B (dG - C * d log P)`` with ``C = B G``.
    """

    @staticmethod
    def forward(
        log_p: Tensor, grounded: Tensor, refused: Tensor, row_sums: Tensor | None, g: Tensor, layout: Dense
    ) -> Tensor:
        """Solve."""
        if isinstance(layout, Sparse):
            layout = layout.flat(log_p.shape[:-2])
            return _on_candidates(log_p, grounded, refused, row_sums, g, layout)
        out = _carried(log_p, grounded, refused, row_sums, g)
        # A loss of digits that the factorization did not show shows here.
        gap = (out.sum(-2) - g.sum(-2)).abs().amax(-1)
        wrong = ~(gap <= _CARRIED_GAP * g.abs().amax((-2, -1)))
        if bool(wrong.any()):
            sums = None if row_sums is None else row_sums[wrong]
            out[wrong] = _carried(log_p[wrong], grounded[wrong], refused[wrong], sums, g[wrong], direct=True)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep inputs and output."""
        log_p, grounded, refused, row_sums, _, ctx.layout = inputs
        kept = (log_p, grounded, refused, row_sums, output)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The adjoint."""
        log_p, grounded, refused, row_sums, carried = ctx.saved_tensors
        grad = torch.where(log_p == -torch.inf, 0.0, grad)
        back = Fitted.apply(log_p, grounded, refused, row_sums, grad, ctx.layout)
        return carried * (grad - back), None, None, None, back, None

    @staticmethod
    def jvp(ctx: Any, log_t: Tensor | None, _1: Any, _2: Any, _3: Any, g_t: Tensor | None, _4: Any) -> Tensor:
        """``C * d log P + B (dG - C * d log P)``."""
        log_p, grounded, refused, row_sums, carried = ctx.saved_tensors
        moved = torch.zeros_like(carried) if log_t is None else torch.where(log_p == -torch.inf, 0.0, carried * log_t)
        change = -moved if g_t is None else g_t - moved
        return moved + Carried.apply(log_p, grounded, refused, row_sums, change, ctx.layout)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """One more batch dimension."""
        return apply_batched(Carried, info, in_dims, args)


def _check_solved(refused: Tensor, g: Tensor) -> None:
    """Raise where a gradient is asked of what is no solution."""
    lost = refused & (g != 0).any(-1).any(-1)
    if bool(lost.any()):
        raise RuntimeError(
            f"no gradient: Sinkhorn stopped before its tolerance for {int(lost.sum())} of {lost.numel()} matrices, and "
            "the implicit gradient holds at a solution only; raise max_iter, or ask for num_iters to differentiate "
            "through sweeps"
        )


def _on_candidates(
    log_p: Tensor,
    grounded: Tensor,
    refused: Tensor,
    row_sums: Tensor | None,
    g: Tensor,
    layout: Sparse,
    tangent: Tensor | None = None,
) -> Tensor:
    """``B G``, or with ``tangent`` ``E T``, on candidates (..., n, k).

    Where conjugate gradients do not end, the matrix is made a dense one.
    """
    _check_solved(refused, g)
    shape, (n, k) = log_p.shape, log_p.shape[-2:]
    log_p, g, ground = log_p.reshape(-1, n, k), g.reshape(-1, n, k), grounded.reshape(-1, n)
    r = None if row_sums is None else row_sums.reshape(-1, n)
    p, forbidden = log_p.exp(), log_p == -torch.inf
    g = g.masked_fill(forbidden, 0.0)
    by_row = g.sum(-1) if r is None else g.sum(-1) / r
    gained, lost = layout.column_sums(g), layout.by_column(p, by_row[:, None, :])[:, 0]
    b, good = accurate_candidates(p, r, gained, lost, layout)
    fit = by_row[:, :, None] + layout.apart(p, r)(b[:, None, :])[:, 0]
    out = fit if tangent is not None else p * fit
    bad = ~good
    if bool(bad.any()):
        part = layout.take(bad)
        parts = (part.dense(log_p[bad], -torch.inf), ground[bad], refused.reshape(-1)[bad], None if r is None else r[bad])
        if tangent is None:
            matrix = Carried.forward(*parts, part.dense(g[bad]), DENSE)
        else:
            t = tangent.reshape(-1, n, k).masked_fill(forbidden, 0.0)
            matrix = Fitted.forward(*parts, part.dense(t[bad]), DENSE)
        out[bad] = part.gather(matrix)
    return out.masked_fill(forbidden, 0.0).reshape(shape)


def _fit(
    log_p: Tensor,
    grounded: Tensor,
    refused: Tensor,
    row_sums: Tensor | None,
    g: Tensor,
    *,
    scaled: bool = False,
    tangent: Tensor | None = None,
    direct: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``A G``; or, with ``scaled`` where potentials may overflow, their differences and the logarithms of their units.

    ``tangent`` is ``T`` where ``G = P * T``, for what of it underflows. With ``scaled`` a result may be wrong that shows it
    in its column sums; with ``direct`` it is not.
    """
    _check_solved(refused, g)
    shape, n = log_p.shape, log_p.shape[-1]
    log_p, g, ground = log_p.reshape(-1, n, n), g.reshape(-1, n, n), grounded.reshape(-1, n)
    r = None if row_sums is None else row_sums.reshape(-1, n)
    p = log_p.exp()
    by_row = g.sum(-1) if r is None else g.sum(-1) / r
    # (diag(c) - P' diag(1/r) P) b = g_c - P' diag(1/r) g_r
    right = g.sum(-2) - (by_row[:, None, :] @ p)[:, 0]
    b, good = (right, torch.zeros_like(ground[:, 0])) if direct else accurate_solution(p, r, right, ground)
    if bool(good.any()):
        out = _add_up(p, r, by_row, b)
        if bool(good.all()):
            return out.reshape(shape), None
    bad: Tensor | slice = ~good if bool(good.any()) else slice(None)
    log_q, q, weighted = log_p[bad], p[bad], g[bad]
    if r is not None:
        half = 0.5 * r[bad].log()[:, :, None]
        log_q, weighted = log_q - half, weighted * (-half).exp()
        q = log_q.exp()
    cross = q.mT @ weighted
    t = None if tangent is None or r is not None else tangent.reshape(-1, n, n)[bad]
    strict = direct or not scaled
    apart, unit = solve_differences(q, log_q, ground[bad], cross.mT - cross, t, strict=strict)
    if unit is not None and scaled and r is None:
        if bool(good.any()):
            value, units = b[:, :, None] - b[:, None, :], torch.zeros_like(out)
            value[bad], units[bad] = apart, unit
            return value.reshape(shape), units.reshape(shape)
        return apart.reshape(shape), unit.reshape(shape)
    if unit is not None:
        apart = apart * unit.clamp(max=OVERFLOW).exp()
    fit = g[bad].sum(-1, keepdim=True) - p[bad] @ apart
    fit = fit if r is None else fit / r[bad][:, :, None]
    if not bool(good.any()):
        return fit.reshape(shape), None
    out[bad] = fit
    return out.reshape(shape), None


def _carried(
    log_p: Tensor, grounded: Tensor, refused: Tensor, row_sums: Tensor | None, g: Tensor, *, direct: bool = False
) -> Tensor:
    """``P * (A G)``."""
    fit, unit = _fit(log_p, grounded, refused, row_sums, g, scaled=True, direct=direct)
    return log_p.exp() * fit if unit is None else _carry(log_p, g, fit, unit)


def _carry(log_p: Tensor, g: Tensor, apart: Tensor, unit: Tensor) -> Tensor:
    """``P_ij (g_i - sum_k P_ik (x_k - x_j))``, ``g_i`` the sum of row ``i``, from differences ``x_k - x_j`` with units."""
    p = log_p.exp()
    over = unit > OVERFLOW
    out = p * (g.sum(-1, keepdim=True) - p @ torch.where(over, 0.0, apart * unit.clamp(max=OVERFLOW).exp()))
    far, share = across_overflow(log_p, apart, unit)
    return out - far + share * far.sum(-1, keepdim=True)


def _fills_row(log_p: Tensor, row_sums: Tensor | None) -> Tensor:
    """Where an entry is most of its row, (..., n, n); at most one is, ties and their rounding included."""
    most = math.log(0.75)
    return log_p > (most if row_sums is None else most + row_sums[..., None].log())


def _needs_small_entries(log_p: Tensor, r: Tensor) -> Tensor:
    """Whether a small matrix (b,) is a permutation up to entries that are small, and not nothing."""
    n = log_p.shape[-1]
    if not 1 < n <= _SMALL:
        return torch.zeros_like(r[:, 0], dtype=torch.bool)
    first, second = log_p.topk(2, -1).values.unbind(-1)
    return (first - r.log() > _NEARLY_ONE).all(-1) & (second.amax(-1) > _NOTHING)


def _add_up(p: Tensor, r: Tensor | None, by_row: Tensor, b: Tensor) -> Tensor:
    """``a_i + b_j`` with ``a = (g_r - P b) / r``."""
    pb = (b[:, None, :] @ p.mT)[:, 0]
    return (by_row - (pb if r is None else pb / r))[:, :, None] + b[:, None, :]


def _solve(
    z: Tensor,
    support: Support,
    row_sums: Tensor | None,
    column_sums: Tensor | None,
    start: Tensor | None,
    settings: Settings,
) -> tuple[SinkhornSolution, Tensor]:
    """The solution, and the grounded columns (..., n)."""
    n, batch = z.shape[-2], z.shape[:-2]
    flat = z.reshape(-1, *z.shape[-2:])
    layout = settings.layout.flat(batch)
    ones = torch.ones_like(flat[..., 0])
    r, c = (ones if sums is None else sums.reshape(-1, n) for sums in (row_sums, column_sums))
    ground = grounded_nodes(support, z)
    grounded = ground.reshape(-1, n)
    iterations = torch.zeros(len(flat), dtype=torch.long, device=z.device)
    moved = None
    if start is None:
        tol = min(settings.tol, _RELATIVE_TOL if settings.relative else FIXED_POINT)
        newton = Newton(flat, r, c, tol, settings.max_iter, layout)
        newton.run()
        flat, u, v, residual, iterations = newton.z, newton.u, newton.v, newton.residual, newton.iterations
        moved = newton.moved
    else:
        v = start.reshape(-1, n)
        u, residual = rows_exact(flat, v, r.log()), torch.zeros_like(v[:, 0])
    log_p = torch.add(flat, u[:, :, None]).add_(layout.at_entries(v))
    fit = (residual <= settings.tol) & (layout is DENSE)
    if not settings.relative:
        # Where P is a permutation up to small entries these are all there is to a gradient, and have to be right.
        fit = fit & _needs_small_entries(log_p, r)
    exact = torch.ones_like(fit)
    if n > 1 and bool(fit.any()):
        pick: Tensor | slice = slice(None) if bool(fit.all()) else fit
        u, v, residual = u.clone(), v.clone(), residual.clone()
        u[pick], v[pick], residual[pick], exact[pick] = refine(
            flat[pick], u[pick], v[pick], r[pick], c[pick], grounded[pick], math.inf if settings.relative else _DEPTH
        )
        log_p[pick] = (flat[pick] + u[pick][:, :, None]).add_(v[pick][:, None, :])
    if moved is not None:
        u, v = u + moved[0], v + moved[1]
    if settings.relative and bool((fit & ~exact).any()):
        warn_user(
            f"the smallest entries of log P may be wrong for {int((fit & ~exact).sum())} of {len(fit)} matrices, because "
            "balancing them did not end; their marginals are right. Raise the temperature",
            SinkhornWarning,
        )
    rows, columns = _gauge(v, support, grounded)
    found = SinkhornSolution(
        log_p.reshape(z.shape),
        (u + rows).reshape(z.shape[:-1]),
        (v - columns).reshape(z.shape[:-1]),
        residual.reshape(batch),
        iterations.reshape(batch),
        (residual <= settings.tol).reshape(batch),
    )
    return found, ground


def _gauge(v: Tensor, support: Support, grounded: Tensor) -> tuple[Tensor, Tensor]:
    """The column potential at the ground of every row's and of every column's component."""
    if support.component is None or support.row_component is None:
        return v[:, :1], v[:, :1]
    label = support.component.reshape(v.shape)
    at_ground = torch.zeros_like(v).scatter_add_(-1, label, torch.where(grounded, v, 0.0))
    return at_ground.gather(-1, support.row_component.reshape(v.shape)), at_ground.gather(-1, label)


def _solve_eagerly(*args: Any) -> Any:
    """``Solve.apply``, which looks at values, so that ``torch.compile`` leaves it as it is."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(Solve.apply)(*args)  # not at import, where it would load the whole compiler
    return Solve.apply(*args)


def check_resolved(log_p: Tensor, name: str = "logits") -> None:
    """Raise ``ValueError`` where scaled logits (..., n, n) are above zero or NaN: rounding is all that is left of them."""
    if log_p.numel() and not bool(log_p.detach().amax() < 1):
        raise unresolved(name)


def unresolved(name: str = "logits") -> ValueError:
    """The error for logits of which rounding leaves nothing."""
    return ValueError(
        f"{name} differ by so much that float64 cannot tell what is left; forbid pairs by -inf, not by large numbers"
    )


def check_potentials(z: Tensor, u: Tensor, v: Tensor, *, certain: bool = True) -> None:
    """Raise ``ValueError`` where rounding of large potentials leaves nothing of balanced logits ``z = x + u + v``.

    Args:
        z: (..., n, n).
        u: potentials of rows, (..., n).
        v: of columns, (..., n).
        certain: let pass pairs that all permutations that count have, whatever is lost to rounding.
    """
    check_resolved(z)
    if not z.numel():
        return
    z = z.detach()
    noise = 8 * torch.finfo(z.dtype).eps * (u.abs()[..., None] + v.abs()[..., None, :])
    near = z > -(40 + z.shape[-1] * noise)  # e^-40 of others is nothing
    rough = near & (noise > ROUNDING)
    if not bool(rough.any()):
        return
    alone = (near.sum(-1, keepdim=True) == 1) & (near.sum(-2, keepdim=True) == 1) & (z.abs() < 1e-6)
    if not certain or bool((rough & ~alone).any()):
        raise unresolved()


def scale(
    z: Tensor,
    support: Support | None,
    row_sums: Tensor | None = None,
    column_sums: Tensor | None = None,
    *,
    tol: float,
    max_iter: int,
    relative: bool,
    start: Tensor | None = None,
    checks: tuple[Callable[..., Support], Tensor, Any] | None = None,
    report: Callable[[SinkhornSolution, Any], None] | None = None,
    layout: Dense = DENSE,
) -> SinkhornSolution:
    """The way in for every public function: float64 ``z`` (..., n, n) with ``-inf`` outside ``support``.

    With ``relative`` the smallest entries are made exact too, which a density needs and an average does not. Column
    potentials that are right to ``tol`` already may be given as ``start``. Instead of a support, ``checks`` gives a
    function that makes one, with the logits and the temperature that it looks at.
    ``relative`` is not to be had with candidates.
    """
    refuse_nested_forward_mode()
    if support is not None:  # found before, from values
        refuse_tracing("the Sinkhorn solve of a law, a transform or a permanent")
    prepare, logits, temperature = checks or (None, None, None)
    row_sums, column_sums = (None if sums is None else sums.to(z).expand(z.shape[:-1]) for sums in (row_sums, column_sums))
    settings = Settings(support, tol, max_iter, relative, prepare, report, layout)
    out = _solve_eagerly(z, row_sums, column_sums, start, logits, temperature, settings)
    return SinkhornSolution(*out[:6])

r"""The graph Laplacian behind every Sinkhorn matrix: its determinant and its solves, without cancellation.

For ``P`` with row sums ``r`` and column sums ``c`` the matrix ``diag(c) - P^T diag(1/r) P`` is the Laplacian of a
graph on the columns with weights ``W = P^T diag(1/r) P``. It is the Hessian of the Sinkhorn dual, the matrix of the
implicit gradient, and, grounded at one column of every component, the determinant in the density
(``I - P'^T P'``, where a prime drops a column; by the matrix-tree theorem it does not matter which).

Near a permutation the weights span hundreds of orders of magnitude, and a Cholesky factorization of the assembled
matrix subtracts nearly equal numbers. It is used for the items whose pivots show that this cannot have cost more than a
few digits; the others are solved in the basis of cuts (:mod:`pyro_gs.ops.tree`), where nothing is subtracted.
Right-hand sides are given as antisymmetric flows ``F`` (node ``j`` receives ``sum_k F_jk``), so that a flow between two
tight clusters is not drowned by rounding inside them.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from pyro_gs.ops.batching import apply_batched, refuse_nested_forward_mode
from pyro_gs.ops.logits import check_floating, check_logits, check_square, first_position
from pyro_gs.ops.matching import solve_assignment
from pyro_gs.ops.support import Support, find_support
from pyro_gs.ops.tree import CutBasis, Forest, spanning_forest

# A pivot above this share of its diagonal has lost at most five of sixteen digits to subtraction.
_TRUSTED_PIVOT = 1e-5
_STRICT_PIVOT = 1e-8  # and this share of the largest diagonal, seven digits of it
# A pivot below this cannot be told from an underflow.
_TINY = 1e-280
_LOWEST = math.log(_TINY)
_DEEP = _LOWEST / 2
_ALL_IN_ONE = 1e-12  # of a row's mass outside one column is nothing
OVERFLOW = 600.0  # logarithm of what is kept in a unit of its own


def assemble(weights: Tensor, grounded: Tensor, damping: Tensor | None = None) -> Tensor:
    """Laplacian (b, n, n) of weights; the rows and columns of grounded nodes are those of the identity.

    With ``damping`` (b,) no node is grounded, and that much is added to the diagonal.
    """
    lap = -weights
    diagonal = lap.diagonal(0, -2, -1)
    diagonal.zero_()
    diagonal.copy_(-lap.sum(-1))
    if damping is not None:
        diagonal.add_(damping[:, None])
        return lap
    lap.masked_fill_(grounded[..., :, None] | grounded[..., None, :], 0.0)
    lap.diagonal(0, -2, -1).masked_fill_(grounded, 1.0)
    return lap


def trusted_cholesky(weights: Tensor, grounded: Tensor, *, strict: bool = True) -> tuple[Tensor, Tensor]:
    """Cholesky factors (b, n, n) of grounded Laplacians, and which of them (b,) are accurate.

    An inaccurate factor is replaced by the identity. Losses may add up along chains of ties that pass one by one; with
    ``strict`` no pivot may be small beside the largest diagonal either, without it the caller checks what comes out.
    """
    lap = assemble(weights, grounded)
    factor, info = torch.linalg.cholesky_ex(lap)
    pivots = factor.diagonal(0, -2, -1).square()
    good = (info == 0) & ((pivots > _TRUSTED_PIVOT * lap.diagonal(0, -2, -1)) & (pivots > _TINY)).all(-1)
    if strict:
        largest = lap.diagonal(0, -2, -1).masked_fill(grounded, 0.0).amax(-1, keepdim=True)
        good = good & (pivots > _STRICT_PIVOT * largest).all(-1)
    if not bool(good.all()):
        eye = torch.eye(lap.shape[-1], dtype=lap.dtype, device=lap.device)
        factor = torch.where(good[:, None, None], factor, eye)
    return factor, good


def grounded_nodes(support: Support, like: Tensor) -> Tensor:
    """Bool (..., n): the first column of every component."""
    if support.grounded is not None:
        return support.grounded
    out = torch.zeros(like.shape[:-1], dtype=torch.bool, device=like.device)
    out[..., 0] = True
    return out


def tie_weights(log_p: Tensor) -> Tensor:
    """Weights ``P^T P`` of the ties between columns, (..., n, n)."""
    p = log_p.exp()
    return p.mT @ p


def log_tie_weights(log_p: Tensor) -> Tensor:
    """Logarithms of :func:`tie_weights`, for ties that underflow; one column at a time to bound memory."""
    return torch.stack([torch.logsumexp(log_p[..., j, None] + log_p, -2) for j in range(log_p.shape[-1])], -2)


def matched_flows(log_p: Tensor, row_of: Tensor) -> Tensor:
    """Logarithms (b, n, n) of the flows ``P[s(j), k]`` from column ``j`` to ``k``, with ``s(j)`` the row matched to ``j``.

    Row and column sums of one mean that as much flows out of every set of columns as flows in.
    """
    return log_p.gather(-2, row_of[:, :, None].expand_as(log_p))


def cut_basis(
    log_p: Tensor,
    log_w: Tensor,
    grounded: Tensor,
    row_of: Tensor | None = None,
    forest: Forest | None = None,
    *,
    spread: bool = True,
) -> CutBasis:
    """The Laplacians with ties ``P^T P`` in the basis of cuts.

    Where ties have underflowed, all that an entry ``P[s(j), k]`` below 1e-140 ties column ``k`` to is tied to ``j`` alone.
    For a row that has all but 1e-12 of its mass in one column that is what it does; for the others it moves an end of a
    tie within groups beside whose own ties it does not count, which changes the weight of no cut by more than 1e-140 of
    itself. Only what flows through the ties of such a group notices, and with ``spread`` such rows are summed in logarithms.

    Args:
        log_p: (b, n, n).
        log_w: logarithms of ``P^T P``; written to where they have underflowed.
        grounded: bool (b, n).
        row_of: the row matched to every column, (b, n), if it is known.
        forest: of weights that are not far from these, if one is known.
        spread: whether ends of underflowed ties matter.
    """
    if forest is None:
        forest = spanning_forest(log_w, grounded)
    tie = log_w.gather(-1, forest[0][..., None])[..., 0].masked_fill(grounded, 0.0)
    deep = tie.amin(-1) < _LOWEST
    if bool(deep.any()):
        log_p = log_p[deep]
        rows = solve_assignment(log_p).argsort(-1) if row_of is None else row_of[deep]
        warm = log_p.masked_fill(log_p < _DEEP, -torch.inf)
        total = torch.logsumexp(log_p, -1, keepdim=True)
        cold = log_p.masked_fill(log_p >= _DEEP, -torch.inf)
        several = (log_p.amax(-1) - total[..., 0] < -_ALL_IN_ONE) & (spread & (cold > -torch.inf).any(-1))
        log_f = matched_flows((cold + total).masked_fill(several[..., None], -torch.inf), rows)
        ties = torch.logaddexp(tie_weights(warm).log(), torch.logaddexp(log_f, log_f.mT))
        for row in several.any(0).nonzero()[:, 0].tolist():
            pair = (warm[:, row, :, None] + cold[:, row, None, :]).masked_fill(~several[:, row, None, None], -torch.inf)
            ties = torch.logaddexp(ties, torch.logaddexp(pair, pair.mT))
        log_w[deep] = ties
        forest = spanning_forest(log_w, grounded)
    return CutBasis(log_w, grounded, forest)


class _Plan:
    """How the Laplacians of a flat batch were factored: Cholesky, or in the basis of cuts."""

    def __init__(self, log_p: Tensor, grounded: Tensor) -> None:
        weights = tie_weights(log_p)
        self.log_p, self.grounded = log_p, grounded
        self.factor, self.good = trusted_cholesky(weights, grounded)
        self.logdet = 2 * self.factor.diagonal(0, -2, -1).log().sum(-1)
        self.cuts: CutBasis | None = None
        if not bool(self.good.all()):
            bad = ~self.good
            self.cuts = cut_basis(log_p[bad], weights[bad].log_(), grounded[bad])
            self.logdet[bad] = self.cuts.logdet

    def gradient(self) -> Tensor:
        """``P * (P R)``, ``R`` the effective resistances: the gradient (b, n, n) of the log-determinants in ``log P``."""
        p = self.log_p.exp()
        resistance = resistances_of(torch.cholesky_inverse(self.factor), self.grounded)
        if self.cuts is None:
            return p * (p @ resistance)
        bad = ~self.good
        log_r = self.cuts.log_resistances()
        over = log_r > OVERFLOW
        resistance[bad] = torch.where(over, 0.0, log_r.clamp(max=OVERFLOW).exp())
        out = p * (p @ resistance)
        if bool(over.any()):
            far, share = across_overflow(self.log_p[bad], torch.ones_like(log_r), log_r)
            out[bad] += far + share * far.sum(-1, keepdim=True)
        return out


def across_overflow(log_p: Tensor, value: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """``P_ij sum_k P_ik d_kj`` over those ``d_kj = value * exp(unit)`` that overflow, and the share of each entry in a row.

    Beyond a cut that weak, all columns that row ``i`` has its mass in are as far from ``j`` as the one matched to it.

    Args:
        log_p: (b, n, n).
        value: of the differences or distances of columns, (b, n, n).
        unit: logarithms of their units, (b, n, n).
    """
    total = torch.logsumexp(log_p, -1, keepdim=True)
    column = solve_assignment(log_p)[..., None].expand_as(log_p)
    unit = unit.gather(-2, column)
    far = torch.where(unit > OVERFLOW, value.gather(-2, column) * (log_p + total + unit).exp(), 0.0)
    return far, (log_p - total).exp()


def resistances_of(inverse: Tensor, grounded: Tensor) -> Tensor:
    """Effective resistances (b, n, n) from the inverse of a grounded Laplacian."""
    inverse = inverse.masked_fill(grounded[..., :, None] | grounded[..., None, :], 0.0)
    diagonal = inverse.diagonal(0, -2, -1)
    return diagonal[..., :, None] + diagonal[..., None, :] - 2 * inverse


class _Logdet(torch.autograd.Function):
    """Log-determinants (...) of grounded Laplacians from ``log P`` (..., n, n)."""

    @staticmethod
    def forward(log_p: Tensor, grounded: Tensor, plans: list[_Plan]) -> Tensor:
        """Factor; the plan is left in the list."""
        n = log_p.shape[-1]
        plans[:] = [_Plan(log_p.reshape(-1, n, n), grounded.reshape(-1, n))]
        return plans[0].logdet.reshape(log_p.shape[:-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep inputs and the plan."""
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.plans = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """``P * (P R)``."""
        return grad[..., None, None] * _LogdetGradient.apply(*ctx.saved_tensors, ctx.plans), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """The same gradient."""
        gradient = _LogdetGradient.apply(*ctx.saved_tensors, ctx.plans)
        return torch.where(gradient == 0, 0.0, gradient * tangent).sum((-2, -1))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """One more batch dimension."""
        return apply_batched(_Logdet, info, in_dims, args)


class _LogdetGradient(torch.autograd.Function):
    """``P * (P R)`` (..., n, n) from ``log P``; its own derivatives are those of plain operations."""

    @staticmethod
    def forward(log_p: Tensor, grounded: Tensor, plans: list[_Plan]) -> Tensor:
        """By the plan, if it is that of these values."""
        n = log_p.shape[-1]
        flat = log_p.reshape(-1, n, n)
        if not (plans and torch.equal(plans[0].log_p, flat)):
            plans[:] = [_Plan(flat, grounded.reshape(-1, n))]
        return plans[0].gradient().reshape(log_p.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep inputs."""
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Through an inverse."""
        log_p, grounded = ctx.saved_tensors
        return torch.func.vjp(lambda x: _plain_gradient(x, grounded), log_p)[1](grad)[0], None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """Through an inverse."""
        log_p, grounded = ctx.saved_tensors
        out: Tensor = torch.func.jvp(lambda x: _plain_gradient(x, grounded), (log_p,), (tangent,))[1]
        return out

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """One more batch dimension."""
        return apply_batched(_LogdetGradient, info, in_dims, args)


def _plain_gradient(log_p: Tensor, grounded: Tensor) -> Tensor:
    p = log_p.exp()
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    weights = (p.mT @ p) * (1 - eye)
    lap = torch.diag_embed(weights.sum(-1)) - weights
    ground = grounded[..., :, None] | grounded[..., None, :]
    lap = torch.where(ground, 0.0, lap) + torch.diag_embed(grounded.to(p.dtype))
    return p * (p @ resistances_of(torch.linalg.inv(lap), grounded))


class _Grounded(torch.autograd.Function):
    """The first column of every component (..., n), of matrices whose allowed entries must all lie on permutations."""

    @staticmethod
    def forward(log_p: Tensor) -> Tensor:
        """Look at the entries that are not ``-inf``."""
        check_logits(log_p, "log_p", half=False)
        high = log_p > 0.1  # beyond rounding, whatever the sums are
        if bool(high.any()):
            at = first_position(high)
            raise ValueError(
                "log_p must hold logarithms of doubly stochastic matrices, none above 0, but is "
                f"{float(log_p[at]):g} at {at}"
            )
        support = find_support(log_p > -torch.inf, "log_p", prune=False)
        least = -math.log(max(1, log_p.shape[-1])) - 0.1  # of n entries that sum to one the largest is 1 / n or more
        for dim, name in ((-1, "row"), (-2, "column")) if log_p.numel() else ():
            low = log_p.amax(dim) < least
            if bool(low.any()):
                at = first_position(low)
                raise ValueError(
                    f"log_p must hold logarithms of doubly stochastic matrices, but the largest entry of {name} {at} is "
                    f"{float(log_p.amax(dim)[at]):g}, and the sum not one"
                )
        return grounded_nodes(support, log_p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to keep."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        """No gradient."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """One more batch dimension."""
        return apply_batched(_Grounded, info, in_dims, args)


def component_logdet(log_p: Tensor, support: Support) -> Tensor:
    """Log-determinant of the Laplacian with weights ``P^T P``, grounded in every component of ``support``.

    Args:
        log_p: float64, (..., n, n), -inf where forbidden. For row sums ``r`` other than one pass
            ``log P - log(r) / 2``.
        support: of the same shape.

    Returns:
        Tensor of shape (...), differentiable in ``log_p``.
    """
    return _logdet(log_p, grounded_nodes(support, log_p))


def _logdet(log_p: Tensor, grounded: Tensor) -> Tensor:
    refuse_nested_forward_mode()
    if log_p.shape[-1] == 1:
        return torch.zeros_like(log_p[..., 0, 0])
    out: Tensor = _Logdet.apply(log_p, grounded, [])
    return out


def _solve(p: Tensor, log_p: Tensor, grounded: Tensor, right: Tensor) -> Tensor:
    """Solutions (b, n) of ``L x = right``.

    Args:
        p: (b, n, n), the ties are ``P^T P``.
        log_p: its logarithm, -inf where forbidden; used where ties underflow.
        grounded: bool (b, n).
        right: (b, n).
    """
    weights = p.mT @ p
    factor, good = trusted_cholesky(weights, grounded)
    out: Tensor = torch.cholesky_solve(right.masked_fill(grounded, 0.0)[..., None], factor)[..., 0]
    if not bool(good.all()):
        bad = ~good
        cuts = cut_basis(log_p[bad], weights[bad].log_(), grounded[bad])
        out[bad] = cuts.potentials(cuts.drops(cuts.received(None, right[bad])))
    return out


def solve_differences(
    p: Tensor, log_p: Tensor, grounded: Tensor, flow: Tensor, tangent: Tensor | None = None, *, strict: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Differences ``x_k - x_j`` (b, n, n) of the solution of ``L x = sum_k F_jk``, meaningful within components.

    Near a permutation the potentials may be huge and nearly alike inside a cluster; their differences are computed as such.

    Args:
        p: (b, n, n), the ties are ``P^T P``.
        log_p: its logarithm, -inf where forbidden.
        grounded: bool (b, n).
        flow: antisymmetric flows (b, n, n).
        strict: as for :func:`trusted_cholesky`.
        tangent: if the flow is that of ``P * tangent`` and row sums are one; then flows below floating point count too.

    Returns:
        The differences, and None; or, if some may be beyond floating point, their values in units of their own, and the
        logarithms of these.
    """
    weights = p.mT @ p
    factor, good = trusted_cholesky(weights, grounded, strict=strict)
    x = torch.cholesky_solve(flow.sum(-1).masked_fill(grounded, 0.0)[..., None], factor)[..., 0]
    out = x[:, :, None] - x[:, None, :]
    if bool(good.all()):
        return out, None
    bad = ~good
    cuts = cut_basis(log_p[bad], weights[bad].log_(), grounded[bad])
    deep = float(cuts.log_cut.min()) <= -OVERFLOW
    if deep and tangent is None:
        unit = torch.zeros_like(out)
        out[bad], unit[bad] = cuts.scaled_differences(flow[bad])
        return out, unit
    share = cuts.received(flow[bad], None)
    if deep and tangent is not None:
        log_p, t = log_p[bad], tangent[bad]
        rows = solve_assignment(log_p).argsort(-1)
        value = matched_flows((p[bad] * t).sum(-1, keepdim=True) - t, rows)
        share = torch.where(cuts.log_cut < -OVERFLOW, cuts.received_scaled(matched_flows(log_p, rows), value), share)
    out[bad] = cuts.differences(cuts.drops(share))
    return out, None


class LaplacianSolve(torch.autograd.Function):
    """Solution (..., n) of ``L x = right``, differentiable in ``P`` and ``right`` any number of times."""

    @staticmethod
    def forward(p: Tensor, log_p: Tensor, grounded: Tensor, right: Tensor) -> Tensor:
        """Solve; ``log_p`` is used where ties underflow, and has no gradient."""
        n = p.shape[-1]
        flat = (p.reshape(-1, n, n), log_p.reshape(-1, n, n), grounded.reshape(-1, n), right.reshape(-1, n))
        return _solve(*flat).reshape(right.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep inputs and output."""
        ctx.save_for_backward(*inputs[:3], output)
        ctx.save_for_forward(*inputs[:3], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor]:
        """Solve again with the cotangent."""
        p, log_p, grounded, x = ctx.saved_tensors
        y = LaplacianSolve.apply(p, log_p, grounded, grad.masked_fill(grounded, 0.0))
        # -y' dL x with (L x)_j = sum_k W_jk (x_j - x_k) and W = P'P.
        py, px, pxy = (p @ column[..., None] for column in (y, x, x * y))
        row, a, b = p.sum(-1, keepdim=True), x[..., None, :], y[..., None, :]
        slope = a * py + b * px - pxy - row * a * b
        with contextlib.suppress(RuntimeError):  # vmap hides values
            if not bool(slope.isfinite().all()):
                size = float(x.abs().max())
                raise OverflowError(
                    f"the gradient at solutions of up to {size:.3g} overflows in {p.dtype}; divide b by a constant"
                )
        return slope, None, None, y

    @staticmethod
    def jvp(ctx: Any, p_t: Tensor | None, _1: Any, _2: Any, right_t: Tensor | None) -> Tensor:
        """Solve again for the tangent less what the change of ``L`` does to ``x``."""
        p, log_p, grounded, x = ctx.saved_tensors
        change = torch.zeros_like(x) if right_t is None else right_t.masked_fill(grounded, 0.0)
        if p_t is not None:
            one = torch.ones_like(x)[..., None]
            total = (p_t.mT @ (p @ one) + p.mT @ (p_t @ one))[..., 0] * x
            mixed = (p_t.mT @ (p @ x[..., None]) + p.mT @ (p_t @ x[..., None]))[..., 0]
            change = change - (total - mixed).masked_fill(grounded, 0.0)
        return LaplacianSolve.apply(p, log_p, grounded, change)  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """One more batch dimension."""
        return apply_batched(LaplacianSolve, info, in_dims, args)


def laplacian_logdet(log_p: Tensor) -> Tensor:
    r"""``logdet(I - P'^T P')`` of doubly stochastic matrices, accurate arbitrarily close to a permutation.

    A prime drops one column of every connected component of the entries that are not ``-inf`` (of the whole matrix
    where nothing is forbidden). This is the determinant in the Jacobian of ``P``; see ``docs/density.md``.

    Args:
        log_p: logarithms of doubly stochastic matrices, shape (..., n, n); ``-inf`` where forbidden.

    Returns:
        Tensor of shape (...), differentiable in ``log_p`` (twice away from a permutation).

    Raises:
        TypeError: not a float32 or float64 tensor.
        ValueError: not square, an entry is NaN or above zero (a tenth is let pass as rounding), a row or column has no entry
            that is large enough for a sum of one, or the allowed entries hold no permutation or lack total support.

    Example:
        >>> import torch
        >>> P = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
        >>> laplacian_logdet(P.log())  # the upper left entry of I - P^T P is 1 - .52
        tensor(-0.7340)
    """
    check_square(log_p, "log_p")
    check_floating(log_p, "log_p", half=False)
    grounded = _Grounded.apply(log_p.detach())
    return _logdet(log_p.double(), grounded).to(log_p.dtype)


def laplacian_solve(log_p: Tensor, b: Tensor) -> Tensor:
    """Solve ``(I - P^T P) x = b`` in the space where ``x`` is zero at the first column of every component.

    Args:
        log_p: logarithms of doubly stochastic matrices, shape (..., n, n); ``-inf`` where forbidden.
        b: right-hand sides, shape (..., n); the entries of every component sum to zero (what a sum leaves over is
            taken by the grounded column).

    Returns:
        Tensor of shape (..., n), differentiable in both arguments.

    Raises:
        TypeError: not float32 or float64 tensors.
        ValueError: shapes do not fit, an entry of ``b`` is not finite, one of ``log_p`` is NaN or above zero (a tenth is let
            pass as rounding), a row or column of it has no entry that is large enough, the allowed entries of ``log_p`` lack
            total support, or the solution overflows.
        OverflowError: in the backward pass, the gradient in ``log_p`` overflows.

    Example:
        >>> import torch
        >>> P = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
        >>> laplacian_solve(P.log(), torch.tensor([-0.48, 0.48])).round(decimals=4)
        tensor([0., 1.])
    """
    check_square(log_p, "log_p")
    check_floating(log_p, "log_p", half=False)
    if not isinstance(b, Tensor):
        raise TypeError(f"b must be a torch.Tensor of shape (..., {log_p.shape[-1]}), but is {type(b).__name__}")
    check_floating(b, "b", half=False)
    if b.shape[-1:] != log_p.shape[-1:]:
        raise ValueError(f"b must have shape (..., {log_p.shape[-1]}) to fit log_p, but has shape {tuple(b.shape)}")
    with contextlib.suppress(RuntimeError):  # vmap hides values
        if not bool(b.isfinite().all()):
            at = first_position(~b.isfinite())
            raise ValueError(f"b must be finite, but is {float(b[at])} at {at}")
    n = log_p.shape[-1]
    try:
        batch = torch.broadcast_shapes(log_p.shape[:-2], b.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"b of shape {tuple(b.shape)} does not broadcast with {tuple(log_p.shape[:-2])}, the batch of log_p"
        ) from None
    grounded = _Grounded.apply(log_p.detach()).expand(*batch, n)
    log_p = log_p.double().expand(*batch, n, n)
    right = b.double().expand(*batch, n).masked_fill(grounded, 0.0)
    refuse_nested_forward_mode()
    x = LaplacianSolve.apply(log_p.exp(), log_p.detach(), grounded, right).to(b.dtype)
    with contextlib.suppress(RuntimeError):
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"b of up to {float(b.abs().max()):.3g} makes the solution overflow in {b.dtype}; divide b by a constant"
            )
    return x  # type: ignore[no-any-return]

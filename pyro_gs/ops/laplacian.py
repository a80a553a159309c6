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

import math
from typing import Any

import torch
from torch import Tensor

from pyro_gs.ops.logits import check_floating, check_square
from pyro_gs.ops.matching import solve_assignment
from pyro_gs.ops.support import Support, find_support
from pyro_gs.ops.tree import CutBasis, spanning_forest

# A pivot above this share of its diagonal has lost at most five of sixteen digits to subtraction.
_TRUSTED_PIVOT = 1e-5
# A pivot below this cannot be told from an underflow.
_TINY = 1e-280
_LOWEST = math.log(_TINY)


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


def trusted_cholesky(weights: Tensor, grounded: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors (b, n, n) of grounded Laplacians, and which of them (b,) are accurate.

    An inaccurate factor is replaced by the identity.
    """
    lap = assemble(weights, grounded)
    factor, info = torch.linalg.cholesky_ex(lap)
    pivots = factor.diagonal(0, -2, -1).square()
    good = (info == 0) & ((pivots > _TRUSTED_PIVOT * lap.diagonal(0, -2, -1)) & (pivots > _TINY)).all(-1)
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
    weights: Tensor,
    grounded: Tensor,
    row_of: Tensor | None = None,
    forest: tuple[Tensor, Tensor, Tensor] | None = None,
) -> CutBasis:
    """The Laplacians with ties ``P^T P`` in the basis of cuts.

    Ties that have underflowed are replaced by ``P[s(j), k] + P[s(k), j]`` (for other row sums, times those of ``P``):
    what row ``s(j)`` ties to ``k`` is then all tied to ``j`` instead of being spread over the columns that ``s(j)`` is
    tied to. That moves ends of a tie only within groups beside whose own ties it does not count.

    Args:
        log_p: (b, n, n).
        weights: ``P^T P``.
        grounded: bool (b, n).
        row_of: the row matched to every column, (b, n), if it is known.
        forest: of weights that are not far from these, if one is known.
    """
    log_w = weights.log()
    if forest is None:
        forest = spanning_forest(log_w, grounded)
    tie = log_w.gather(-1, forest[0][..., None])[..., 0].masked_fill(grounded, 0.0)
    deep = tie.amin(-1) < _LOWEST
    if bool(deep.any()):
        rows = solve_assignment(log_p[deep]).argsort(-1) if row_of is None else row_of[deep]
        log_f = matched_flows(log_p[deep] + torch.logsumexp(log_p[deep], -1, keepdim=True), rows)
        log_w[deep] = torch.where(log_w[deep] > _LOWEST, log_w[deep], torch.logaddexp(log_f, log_f.mT))
        forest = spanning_forest(log_w, grounded)
    return CutBasis(log_w, grounded, forest)


class _Plan:
    """How the Laplacians of a flat batch were factored: Cholesky, or in the basis of cuts."""

    def __init__(self, log_p: Tensor, grounded: Tensor) -> None:
        weights = tie_weights(log_p)
        self.grounded = grounded
        self.factor, self.good = trusted_cholesky(weights, grounded)
        self.logdet = 2 * self.factor.diagonal(0, -2, -1).log().sum(-1)
        self.cuts: CutBasis | None = None
        self.deep = torch.zeros_like(self.good)
        if not bool(self.good.all()):
            bad = ~self.good
            self.cuts = cut_basis(log_p[bad], weights[bad], grounded[bad])
            self.logdet[bad] = self.cuts.logdet
            self.deep[bad] = self.cuts.weakest < _LOWEST

    def resistances(self) -> Tensor:
        """Effective resistances (b, n, n), without gradients."""
        out = resistances_of(torch.cholesky_inverse(self.factor), self.grounded)
        if self.cuts is not None:
            out[~self.good] = self.cuts.resistances()
            out[self.deep] = 0.0  # they are differentiated in logarithms
        return out


def resistances_of(inverse: Tensor, grounded: Tensor) -> Tensor:
    """Effective resistances (b, n, n) from the inverse of a grounded Laplacian."""
    inverse = inverse.masked_fill(grounded[..., :, None] | grounded[..., None, :], 0.0)
    diagonal = inverse.diagonal(0, -2, -1)
    return diagonal[..., :, None] + diagonal[..., None, :] - 2 * inverse


class _Logdet(torch.autograd.Function):
    """Log-determinants (b,) of grounded Laplacians from ``log P`` (b, n, n) and its plan."""

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(log_p)
        ctx.plan = plan
        return plan.logdet.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (log_p,) = ctx.saved_tensors
        p = log_p.exp()
        if torch.is_grad_enabled():  # a second derivative is wanted
            inverse = torch.linalg.inv(_differentiable_laplacian(p, ctx.plan.grounded))
            resistance = resistances_of(inverse, ctx.plan.grounded)
        else:
            resistance = ctx.plan.resistances()
        return grad[:, None, None] * p * (p @ resistance), None


def _differentiable_laplacian(p: Tensor, grounded: Tensor) -> Tensor:
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    weights = (p.mT @ p) * (1 - eye)
    lap = torch.diag_embed(weights.sum(-1)) - weights
    ground = grounded[..., :, None] | grounded[..., None, :]
    return lap.masked_fill(ground, 0.0) + torch.diag_embed(grounded.to(p.dtype))


def _log_logdet(log_w: Tensor, grounded: Tensor) -> Tensor:
    """Log-determinant (b,) from log weights by operations that autograd can follow."""
    n = log_w.shape[-1]
    off = torch.eye(n, dtype=torch.bool, device=log_w.device)
    lowest = -1e300
    w = log_w.clamp(min=lowest).masked_fill(off, lowest)
    total = log_w.new_zeros(log_w.shape[0])
    for k in range(n - 1, 0, -1):
        row = w[:, k, :k]
        pivot = torch.logsumexp(row, -1).masked_fill(grounded[:, k], 0.0)
        total = total + pivot
        mesh = (row[:, :, None] + (row - pivot[:, None])[:, None, :]).clamp(min=lowest)
        w = torch.logaddexp(w[:, :k, :k], mesh).masked_fill(off[:k, :k], lowest)
    return total


def component_logdet(log_p: Tensor, support: Support) -> Tensor:
    """Log-determinant of the Laplacian with weights ``P^T P``, grounded in every component of ``support``.

    Args:
        log_p: float64, (..., n, n), -inf where forbidden. For row sums ``r`` other than one pass
            ``log P - log(r) / 2``.
        support: of the same shape.

    Returns:
        Tensor of shape (...), differentiable in ``log_p``.
    """
    n = log_p.shape[-1]
    if n == 1:
        return torch.zeros_like(log_p[..., 0, 0])
    flat = log_p.reshape(-1, n, n)
    grounded = grounded_nodes(support, log_p).reshape(-1, n)
    with torch.no_grad():
        plan = _Plan(flat.detach(), grounded)
    out: Tensor = _Logdet.apply(flat, plan)
    if bool(plan.deep.any()):
        items = plan.deep.nonzero()[:, 0]
        low = _log_logdet(log_tie_weights(flat[items].clamp(min=-1e300)), grounded[items])
        out = torch.where(plan.deep, out.detach(), out).index_put((items,), low)
    return out.reshape(log_p.shape[:-2])


def _solve(
    p: Tensor, log_p: Tensor, grounded: Tensor, flow: Tensor | None, right: Tensor | None, *, differences: bool
) -> Tensor:
    """:func:`solve_laplacian`, or all differences ``x_k - x_j`` of its solution, (b, n, n)."""
    weights = p.mT @ p
    factor, good = trusted_cholesky(weights, grounded)
    total = 0.0 if flow is None else flow.sum(-1)
    total = total if right is None else total + right
    assert isinstance(total, Tensor)
    out = torch.cholesky_solve(total.masked_fill(grounded, 0.0)[..., None], factor)[..., 0]
    if differences:
        out = out[:, :, None] - out[:, None, :]
    if not bool(good.all()):
        bad = ~good
        cuts = cut_basis(log_p[bad], weights[bad], grounded[bad])
        y = cuts.drops(cuts.received(*(None if part is None else part[bad] for part in (flow, right))))
        out[bad] = cuts.differences(y) if differences else cuts.potentials(y)
    return out


def solve_laplacian(
    p: Tensor, log_p: Tensor, grounded: Tensor, flow: Tensor | None = None, right: Tensor | None = None
) -> Tensor:
    """Solve ``L x = right + sum_k F_jk`` for a flat batch, ``x`` zero at the grounded nodes.

    Args:
        p: (b, n, n), the ties are ``P^T P``.
        log_p: its logarithm, -inf where forbidden; used where ties underflow.
        grounded: bool (b, n).
        flow: antisymmetric flows (b, n, n).
        right: (b, n).

    Returns:
        Tensor of shape (b, n); no gradient.
    """
    return _solve(p, log_p, grounded, flow, right, differences=False)


def solve_differences(p: Tensor, log_p: Tensor, grounded: Tensor, flow: Tensor) -> Tensor:
    """Differences ``x_k - x_j`` (b, n, n) of the solution of ``L x = sum_k F_jk``, meaningful within components.

    Near a permutation the potentials may be huge and nearly alike inside a cluster; their differences are computed as such.
    """
    return _solve(p, log_p, grounded, flow, None, differences=True)


class LaplacianSolve(torch.autograd.Function):
    """:func:`solve_laplacian` with gradients in ``p``, ``flow`` and ``right``, itself differentiable."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, log_p: Tensor, grounded: Tensor, flow: Tensor | None, right: Tensor | None) -> Tensor:
        """Solve."""
        x = solve_laplacian(p, log_p, grounded, flow, right)
        ctx.save_for_backward(p, x)
        ctx.log_p, ctx.grounded = log_p.detach(), grounded
        ctx.kinds = (flow is not None, right is not None)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, Tensor | None, Tensor | None]:
        """Solve again with the cotangent."""
        p, x = ctx.saved_tensors
        y = LaplacianSolve.apply(p, ctx.log_p, ctx.grounded, None, grad.masked_fill(ctx.grounded, 0.0))
        # -y' dL x with (L x)_j = sum_k W_jk (x_j - x_k) and W = P'P.
        py, px, pxy = (p @ column[..., None] for column in (y, x, x * y))
        row, a, b = p.sum(-1, keepdim=True), x[..., None, :], y[..., None, :]
        by_p = a * py + b * px - pxy - row * a * b
        by_flow = y[..., :, None].expand_as(p) if ctx.kinds[0] else None
        return by_p, None, None, by_flow, y if ctx.kinds[1] else None


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
        ValueError: not square, or the allowed entries hold no permutation or lack total support.
    """
    check_square(log_p, "log_p")
    check_floating(log_p, "log_p", half=False)
    support = find_support(log_p.detach() > -torch.inf, "log_p", prune=False)
    return component_logdet(log_p.double(), support).to(log_p.dtype)


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
        ValueError: shapes do not fit, or the allowed entries of ``log_p`` lack total support.
    """
    check_square(log_p, "log_p")
    check_floating(log_p, "log_p", half=False)
    check_floating(b, "b", half=False)
    if b.shape[-1:] != log_p.shape[-1:]:
        raise ValueError(f"b must have shape (..., {log_p.shape[-1]}) to fit log_p, but has shape {tuple(b.shape)}")
    support = find_support(log_p.detach() > -torch.inf, "log_p", prune=False)
    n = log_p.shape[-1]
    batch = torch.broadcast_shapes(log_p.shape[:-2], b.shape[:-1])
    grounded = grounded_nodes(support, log_p).expand(*batch, n).reshape(-1, n)
    flat = log_p.double().expand(*batch, n, n).reshape(-1, n, n)
    right = b.double().expand(*batch, n).reshape(-1, n)
    x = LaplacianSolve.apply(flat.exp(), flat.detach(), grounded, None, right.masked_fill(grounded, 0.0))
    return x.reshape(*batch, n).to(b.dtype)  # type: ignore[no-any-return]

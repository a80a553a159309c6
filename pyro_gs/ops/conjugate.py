r"""Conjugate gradients for the Laplacian ``diag(c) - P^T diag(1/r) P`` of a flat batch, by products with ``P`` alone.

For large matrices that are not close to a permutation a dozen products with ``P`` and its transpose solve what takes a
product of two matrices and a factorization otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_gs.ops.layout import DENSE, Dense, Sparse
from pyro_gs.ops.sparse import nearly_inverse

SMALLEST = 192  # size from which iterations are cheaper than a factorization
_EXACT = 1e-13  # residual of an accurate solution
_EXACT_ITERATIONS = 40
_LOWEST_RITZ, _LOWEST_DIAGONAL = 1e-2, 1e-4  # of a Laplacian on whose solution rounding leaves ten digits or more
_CANDIDATE_ITERATIONS = 200
_REFINEMENTS, _REFINED_ERROR = 5, 100.0  # steps, and how much more is left after them than after conjugate gradients
_ROUNDED = 1e-15  # of a right side that is the difference of two
_LOWEST_CANDIDATE_RITZ = 1e-7  # products by differences keep the digits of weak ties
_LONG = 64  # iterations from which a solver of tridiagonal matrices is quicker
_CHECK_EVERY = 8  # iterations between looks of the host at a device


class Solution(NamedTuple):
    """What :func:`conjugate_gradients` found.

    Attributes:
        x: (b, k, n).
        converged: bool (b,), all columns reached the tolerance.
        lowest: (b,), the smallest Ritz value of the preconditioned operator, from its Lanczos coefficients; infinite if
            not asked for.
    """

    x: Tensor
    converged: Tensor
    lowest: Tensor


def look_every(device: torch.device, count: int) -> int:
    """After how many steps the host looks at what a device has done: at every one of its own, where a look costs nothing."""
    return 1 if device.type == "cpu" else count


def conjugate_gradients(
    p: Tensor,
    r: Tensor | None,
    right: Tensor,
    tol: Tensor,
    max_iter: int,
    damping: Tensor | None = None,
    factor: Tensor | None = None,
    ritz: bool = False,
    layout: Dense = DENSE,
) -> Solution:
    """Solve ``L x = right`` for right sides that sum to zero in every component.

    Args:
        p: entries (b, n, w) of ``layout``.
        r: its row sums (b, n), None for ones.
        right: (b, k, n), as rows: a product with a few rows is several times faster than one with a few columns.
        tol: norm of the residual over that of the right side at which to stop, (b,).
        max_iter: iterations at most.
        damping: added to the diagonal, (b,).
        factor: Cholesky factor (b, n, n) of a similar Laplacian to precondition with, instead of the diagonal.
        ritz: whether the smallest Ritz value is wanted.
        layout: of ``p``.
    """
    laplacian = layout.laplacian(p, r)
    inverse = torch.ones_like(right[:, :1])
    if factor is None:
        diagonal = layout.diagonal(p, r)[:, None, :]
        inverse = 1 / (diagonal if damping is None else diagonal + damping[:, None, None]).clamp(min=1e-300)
    every = look_every(p.device, _CHECK_EVERY)
    x = torch.zeros_like(right)
    residual = right
    goal = tol[:, None] * torch.linalg.vector_norm(right, dim=-1)
    direction, rho = None, None
    alphas, betas = [], []
    done = torch.zeros_like(tol, dtype=torch.bool)
    for number in range(max_iter):
        z = inverse * residual if factor is None else torch.cholesky_solve(residual.mT, factor).mT.contiguous()
        new = (residual * z).sum(-1, keepdim=True)
        beta = torch.zeros_like(new) if rho is None else new / rho.clamp(min=1e-300)
        direction = z if direction is None else torch.addcmul(z, beta, direction)
        rho = new
        applied = laplacian(direction)
        if damping is not None:
            applied = torch.addcmul(applied, damping[:, None, None], direction)
        curvature = (direction * applied).sum(-1, keepdim=True)
        alpha = torch.where(curvature > 0, rho / curvature.clamp(min=1e-300), 0.0)
        x = torch.addcmul(x, alpha, direction)
        residual = torch.addcmul(residual, alpha, applied, value=-1)
        if ritz:
            alphas.append(alpha[..., 0])
            betas.append(beta[..., 0])
        if (number + 1) % every == 0:
            done = (torch.linalg.vector_norm(residual, dim=-1) <= goal).all(-1)
            if bool(done.all()):
                break
    lowest = _ritz(torch.stack(alphas, -1), torch.stack(betas, -1)) if ritz else torch.full_like(tol, torch.inf)
    return Solution(x, done & x.isfinite().all(-1).all(-1), lowest)


def accurate_solution(p: Tensor, r: Tensor | None, right: Tensor, grounded: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``L x = right`` where few products with ``P`` do that to ten digits or more.

    A probe with something of everything is solved along, so that no weak tie is missed because ``right`` has nothing to do
    with it. Matrices of several components are left to others.

    Args:
        p: (b, n, n).
        r: its row sums (b, n), None for ones.
        right: (b, n).
        grounded: bool (b, n), one node of every component.

    Returns:
        Solutions (b, n), and where they are accurate, bool (b,): nowhere for matrices that are better factored at once.
    """
    size, n = right.shape
    if n < SMALLEST:
        return right, torch.zeros(size, dtype=torch.bool, device=right.device)
    diagonal = p.sum(-2) - torch.linalg.vecdot(p, p if r is None else p / r[..., None], dim=-2)
    whole = (grounded.sum(-1) == 1) & (diagonal.amin(-1) > _LOWEST_DIAGONAL)
    if not bool(whole.any()):
        return right, torch.zeros(size, dtype=torch.bool, device=right.device)
    probe = torch.cos(torch.arange(n, dtype=p.dtype, device=p.device).square())
    probe = (probe - probe.mean()).expand(size, 1, n)
    tol = torch.full_like(right[:, 0], _EXACT)
    found = conjugate_gradients(p, r, torch.cat([right[:, None, :], probe], -2), tol, _EXACT_ITERATIONS, ritz=True)
    return found.x[:, 0], whole & found.converged & (found.lowest > _LOWEST_RITZ)


def accurate_candidates(p: Tensor, r: Tensor | None, gained: Tensor, lost: Tensor, layout: Sparse) -> tuple[Tensor, Tensor]:
    """As :func:`accurate_solution`, on the candidates of rows, where iterations are cheap and components may be many.

    Items on which the diagonal does not precondition well enough are factored.

    Args:
        p: (b, n, k).
        r: its row sums (b, n), None for ones.
        gained: (b, n); the right side is its difference to ``lost``.
        lost: (b, n); a residual that is the rounding of both is none.
        layout: of ``p``.

    Returns:
        Solutions (b, n), and where they are accurate, bool (b,): nowhere for matrices that are better factored at once.
    """
    right = gained - lost
    if p.shape[1] < SMALLEST:
        return right, torch.zeros(len(p), dtype=torch.bool, device=p.device)
    probe = torch.cos(torch.arange(p.shape[1], dtype=p.dtype, device=p.device).square()).expand_as(right)[:, None, :]
    probe = layout.laplacian(p, r)(probe)  # in the range of the operator, whatever the components
    both = torch.cat([right[:, None, :], probe], -2).masked_fill(layout.diagonal(p, r)[:, None, :].isinf(), 0.0)
    size, of_right = (torch.linalg.vector_norm(x, dim=-1) for x in (gained.abs() + lost.abs(), right))
    tol = (_ROUNDED * size / of_right.clamp(min=1e-300)).clamp(min=_EXACT)
    found = conjugate_gradients(p, r, both, tol, _CANDIDATE_ITERATIONS, ritz=True, layout=layout)
    x, good = found.x[:, 0], found.converged & (found.lowest > _LOWEST_CANDIDATE_RITZ)
    for item in (~good).nonzero()[:, 0].tolist():
        here = slice(item, item + 1)
        sums = None if r is None else r[here]
        solve = nearly_inverse(p[item], None if sums is None else sums[0], layout.columns[item])
        if solve is not None:
            part = layout.take(torch.tensor([item], device=p.device))
            found_here, error = _refined(part.laplacian(p[here], sums), solve, both[here])
            x[here], good[here] = found_here[:, 0], error <= _REFINED_ERROR * tol[item]
    return x, good


def _refined(
    laplacian: Callable[[Tensor], Tensor], solve: Callable[[Tensor], Tensor], right: Tensor
) -> tuple[Tensor, Tensor]:
    """Solutions (1, k, n) by steps with what is nearly the inverse, and the largest residual over its right side.

    Steps end where the residual stops falling: on weak ties solutions are large, and their rounding is the floor.
    """
    x, residual = torch.zeros_like(right), right
    error = torch.ones_like(right[..., :1])
    size = torch.linalg.vector_norm(right, dim=-1, keepdim=True).clamp(min=1e-300)
    for _ in range(_REFINEMENTS):
        new = x + solve(residual[0])[None]
        left = right - laplacian(new)
        new_error = torch.linalg.vector_norm(left, dim=-1, keepdim=True) / size
        better = new_error < error
        x, residual, error = (torch.where(better, a, b) for a, b in ((new, x), (left, residual), (new_error, error)))
    return x, error.amax()


def _ritz(alpha: Tensor, beta: Tensor) -> Tensor:
    """The smallest eigenvalue (b,) of the Lanczos matrices of coefficients (b, k, iterations)."""
    stopped = alpha <= 0  # of a column that was solved before the others
    inverse = torch.where(stopped, 1.0, 1 / torch.where(stopped, 1.0, alpha))
    diagonal = inverse.clone()
    diagonal[..., 1:] += torch.where(stopped[..., 1:], 0.0, beta[..., 1:] * inverse[..., :-1])
    off = torch.where(stopped[..., 1:], 0.0, beta[..., 1:].clamp(min=0.0).sqrt() * inverse[..., :-1])
    if alpha.shape[-1] > _LONG:
        from scipy.linalg import eigvalsh_tridiagonal  # slow to load, so not with the package

        pairs = zip(*(part.cpu().flatten(0, -2).numpy() for part in (diagonal, off)), strict=True)
        found = [eigvalsh_tridiagonal(d, e, select="i", select_range=(0, 0))[0] for d, e in pairs]
        return alpha.new_tensor(found).reshape(alpha.shape[:-1]).amin(-1)
    lanczos = torch.diag_embed(diagonal) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    lowest: Tensor = torch.linalg.eigvalsh(lanczos)[..., 0].amin(-1)
    return lowest

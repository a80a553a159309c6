r"""Newton's method on the dual of the Sinkhorn operator, from high temperature down, item by item.

The potentials of ``S`` maximise the concave dual

    f(v) = sum_j c_j v_j - sum_i r_i logsumexp_j(Z_ij + v_j),

whose Hessian is minus the Laplacian of :mod:`pyro_gs.ops.laplacian`. Potentials are found at a temperature high enough
for Newton's method to be at home and then at temperatures lower by a factor of four each (Schmitzer 2019 for scaling by
temperature; Brauer, Clason, Lorenz and Wirth 2017 for Newton on the dual). Every step picks the best of a few points on
two lines, and a plain Sinkhorn sweep follows:

- the Newton direction ``L d = g``;
- the same with the pull ``g_j = out_j - in_j`` on a column that one row nearly fills replaced by
  ``(out_j + in_j) log(out_j / in_j) / 2``, ``out_j`` being what that row gives to other columns and ``in_j`` what the
  column takes from other rows. A column that is hardly tied to others then moves to its balance at once, as in Osborne's
  balancing of matrices (1960), where Newton's method moves by one unit a step.

Potentials are float64 throughout. Only the weights of the Laplacian are multiplied out in float32: relative errors of
weights are relative errors of the quadratic form, so the direction keeps seven digits whatever its condition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import threshold

from pyro_gs.ops.conjugate import SMALLEST, conjugate_gradients, look_every
from pyro_gs.ops.laplacian import assemble
from pyro_gs.ops.layout import DENSE, Dense, Sparse
from pyro_gs.ops.sparse import sparse_solution

_LEVEL_TOL = 0.2  # marginal error at which a higher temperature hands over to the next
_LEVEL_RATIO = 4.0
_NEGLIGIBLE = 1e-150  # an entry whose product with another is nothing, and slow to multiply where it is subnormal
_NO_WEIGHT = 1e-18  # of an entry of P, beside the damping
_REUSE = 512  # size from which an old factorization is tried as a preconditioner, once
_REUSE_ERROR = 0.05  # the error is below this,
_REUSE_ITERATIONS = 8  # for so many iterations
_SINGLE = 16  # size from which weights are multiplied out in float32
_SHARE_OF_TOL = 0.9  # what is left is for rounding of the result to its dtype
_LONGEST_STEP = 30.0  # of a potential in one step, so that exp() of it is harmless
_SPARSE_ITERATIONS = 100  # of conjugate gradients on candidates
_PATIENCE = 40  # steps without progress that show the rounding of an item's own logits
_PATIENCE_ROUNDED = 5  # and that of potentials that may be it
# Points that are tried: on the Newton direction, and on the balanced one.
_NEWTON, _BALANCED = (1.0, 0.5, 0.25, 1 / 16, 3.0, 8.0), (1.0, 0.5)
_FEW_NEWTON, _FEW_BALANCED = (1.0, 0.25, 4.0), (1.0,)  # for small matrices, where points cost as much as factorizations
_SMALL = 64
_RETREAT = 1 / 64
_CHECK_EVERY = 4  # steps between looks of the host at a device


class Newton:
    """A flat batch of problems; every item has its own temperature level and stops by itself.

    Args:
        z: float64 entries (b, n, w) of ``layout``, -inf where forbidden, every allowed entry on a permutation.
        r: row sums (b, n).
        c: column sums (b, n), of the same total in every component.
        tol: largest error of a marginal.
        max_iter: cap on the steps of an item.
        layout: of the entries.

    Attributes:
        z: as given, but where potentials are so large that sums with them are rounded above ``tol``: there ``Z + u + v``
            of an earlier ``u`` and ``v``, which ``moved`` holds.
        u, v: potentials (b, n) for this ``z``; rows are exact.
        moved: potentials that ``z`` contains, two of (b, n).
        residual: largest error of a column sum (b,).
        iterations: steps taken (b,).
    """

    def __init__(self, z: Tensor, r: Tensor, c: Tensor, tol: float, max_iter: int, layout: Dense = DENSE) -> None:
        self.layout = layout
        self.z, self.r, self.c, self.tol, self.max_iter = z, r, c, _SHARE_OF_TOL * tol, max_iter
        self.unit = bool((r == 1).all())
        self.doubly = self.unit and bool((c == 1).all())
        size, n = z.shape[0], z.shape[1]
        centred = z - z.amax(-1, keepdim=True)
        count = (z > -torch.inf).sum((-2, -1))
        centred.masked_fill_(centred == -torch.inf, 0.0)
        mean = centred.sum((-2, -1)) / count
        spread = ((centred.square().sum((-2, -1)) / count) - mean.square()).clamp(min=0.0).sqrt()
        levels = (spread / 2).clamp(min=1.0).log2().div(math.log2(_LEVEL_RATIO)).floor()
        self.scale = _LEVEL_RATIO ** (-levels)
        self.u, self.v = torch.zeros_like(z[..., 0]), torch.zeros_like(z[..., 0])
        self.moved: tuple[Tensor, Tensor] | None = None
        self.residual = z.new_full((size,), torch.inf)
        self.iterations = torch.zeros(size, dtype=torch.long, device=z.device)
        self.eps = torch.finfo(z.dtype).eps
        self.ground = torch.zeros(n, dtype=torch.bool, device=z.device)
        self.cold = bool((spread > 30).any())
        self.hard = torch.zeros(size, dtype=torch.bool, device=z.device)  # too much for plain conjugate gradients
        self.has_factor = torch.zeros_like(self.hard)
        self.factor: Tensor | None = None
        self.retreat = torch.ones_like(self.residual)
        self.points = (_FEW_NEWTON, _FEW_BALANCED) if n < _SMALL else (_NEWTON, _BALANCED)
        self.ladder = z.new_tensor([*self.points[0], *self.points[1]])

    def take(self, items: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        """These items of some tensors; the tensors themselves for all items, since a copy of ``z`` is dear."""
        return parts if len(items) == len(self.z) else tuple(part[items] for part in parts)

    def layout_of(self, items: Tensor) -> Dense:
        """The layout of these items."""
        return self.layout if len(items) == len(self.z) else self.layout.take(items)

    def sweep(self, items: Tensor) -> None:
        """A plain sweep in the log domain."""
        z, scale, r, c, v = self.take(items, self.z, self.scale, self.r, self.c, self.v)
        z = z if bool((scale == 1).all()) else z * scale[:, None, None]
        log_r, log_c = r.log(), c.log()
        layout = self.layout_of(items)
        u = rows_exact(z, v, log_r, layout)
        v = log_c - layout.column_logsumexp(z + u[:, :, None])
        self.u[items], self.v[items] = rows_exact(z, v, log_r, layout), v

    def run(self) -> None:
        """Solve all items."""
        active = torch.arange(self.z.shape[0], device=self.z.device)
        self.sweep(active)
        best = torch.full_like(self.residual, torch.inf)
        stalled = torch.zeros_like(self.iterations)
        every = look_every(self.z.device, _CHECK_EVERY)
        number = 0
        while len(active):
            p, u, error, g = self.matrix(active)
            v, scale = self.v[active], self.scale[active]
            if number % every == 0 or number >= self.max_iter:
                last = scale == 1
                self.residual[active] = torch.where(last, error, torch.inf)
                better = error < 0.5 * best[active]
                stalled[active] = torch.where(better, 0, stalled[active] + every)
                best[active] = torch.minimum(best[active], error)
                stuck = stalled[active] > (_PATIENCE if self.doubly else 3 * _PATIENCE)
                capped = self.iterations[active] >= self.max_iter
                rise = ~last & ((error < _LEVEL_TOL) | stuck) & ~capped
                done = last & ((error <= self.tol) | (stuck & (error < 1e3 * self.tol)))
                again = (done | (last & (stalled[active] > _PATIENCE_ROUNDED))) & self.rounded(u, v) & ~capped
                done = (done & ~again) | capped
                if bool(again.any()):
                    items = active[again]
                    self.absorb(items)
                    best[items], stalled[items] = torch.inf, 0
                if bool(rise.any()):
                    items = active[rise]
                    ratio = (1.0 / self.scale[items]).clamp(max=_LEVEL_RATIO)
                    self.scale[items] *= ratio
                    self.v[items] *= ratio[:, None]
                    self.sweep(items)
                    best[items], stalled[items], self.retreat[items] = torch.inf, 0, 1.0
                    self.has_factor[items] = False
                go = ~(rise | done | again)
                if not bool(go.all()):
                    p, u, v, g, error = p[go], u[go], v[go], g[go], error[go]
                items, active = active[go], active[~done]
            else:
                items = active
            if len(items):
                self.step(items, p, u, v, g, error)
            number += 1
        self.finish()

    def matrix(self, items: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``P`` with exact row sums, its row potentials, the error of its column sums and their gap."""
        z, scale, r, c, u, v = self.take(items, self.z, self.scale, self.r, self.c, self.u, self.v)
        layout = self.layout_of(items)
        p = torch.addcmul(u[:, :, None], z, scale[:, None, None])
        p.add_(layout.at_entries(v)).exp_()
        correction = r / p.sum(-1)
        p.mul_(correction[:, :, None])
        u = u + correction.log()
        self.u[items] = u
        if self.cold:
            threshold(p, _NEGLIGIBLE, 0.0, inplace=True)
        g = c - layout.column_sums(p)
        return p, u, g.abs().amax(-1), g

    def rounded(self, u: Tensor, v: Tensor) -> Tensor:
        """Whether sums with potentials of this size are rounded at the tolerance, (b,)."""
        return (u.abs().amax(-1) + v.abs().amax(-1)) * self.eps > self.tol / 16

    def absorb(self, items: Tensor) -> None:
        """Put the potentials of items into ``z``."""
        if self.moved is None:
            self.z = self.z.clone()
            self.moved = (torch.zeros_like(self.u), torch.zeros_like(self.v))
        for total, part in zip(self.moved, (self.u, self.v), strict=True):
            total[items] += part[items]
        moved = self.layout_of(items).at_entries(self.v[items])
        self.z[items] = (self.z[items] + self.u[items][:, :, None]) + moved
        self.u[items], self.v[items] = 0.0, 0.0

    def finish(self) -> None:
        """Bring items that the cap left at a high temperature to their own, so that their residual is the result's."""
        items = (self.scale < 1).nonzero()[:, 0]
        if len(items):
            self.v[items] /= self.scale[items, None]
            self.scale[items] = 1.0
            self.sweep(items)
            _, _, self.residual[items], _ = self.matrix(items)

    def step(self, items: Tensor, p: Tensor, u: Tensor, v: Tensor, g: Tensor, error: Tensor) -> None:
        """One damped Newton step and one sweep; ``p`` has exact row sums."""
        r, c, layout = self.r[items], self.c[items], self.layout_of(items)
        found = self.directions(items, p, g, error)
        found = found * (_LONGEST_STEP / found.abs().amax(-1, keepdim=True)).clamp(max=1.0)
        points = torch.cat([found[:, i : i + 1].expand(-1, len(line), -1) for i, line in enumerate(self.points)], -2)
        points = points * (self.ladder * self.retreat[items, None])[..., None]
        e = points.exp()
        rows = layout.by_row(p, e) / r[:, None, :]
        gain = (c[:, None, :] * points).sum(-1) - (r[:, None, :] * rows.log()).sum(-1)
        slack = 8 * self.eps * (1 + (c * v).abs().sum(-1))
        best, choice = gain.max(-1)
        choice = torch.where(gain[:, 0] >= best - slack, 0, choice)
        ahead = best > -slack
        self.retreat[items] = torch.where(ahead, 1.0, self.retreat[items] * _RETREAT).clamp(min=1e-12)
        pick = choice[:, None, None].expand(-1, 1, p.shape[1])
        d = torch.where(ahead[:, None], points.gather(-2, pick)[:, 0], 0.0)
        e = torch.where(ahead[:, None], e.gather(-2, pick)[:, 0], 1.0)
        rows = torch.where(ahead[:, None], rows.gather(-2, pick)[:, 0], 1.0)
        correction = c / layout.by_column(p, (1 / rows)[:, None, :])[:, 0] / e
        self.v[items] = v + d + correction.log()
        self.u[items] = u - (layout.by_row(p, (e * correction)[:, None, :])[:, 0] / r).log()
        self.iterations[items] += 1

    def directions(self, items: Tensor, p: Tensor, g: Tensor, error: Tensor) -> Tensor:
        """The two directions of a step, (b, 2, n)."""
        layout, n = self.layout_of(items), p.shape[1]
        right = torch.stack([g, self.balance(p, self.r[items], self.c[items], g, layout)], -2)
        damping = (1e-3 * error).clamp(min=self.eps)
        if n < SMALLEST:
            return self.factored(items, p, right, damping)[0]
        exact = error.clamp(min=1e-6, max=0.03)
        r = None if self.unit else self.r[items]
        hard = self.hard[items]
        out = right
        if not bool(hard.all()):
            found = conjugate_gradients(p, r, right, exact, self.patience(n), damping, layout=layout)
            out = found.x
            self.hard[items] = hard = hard | ~found.converged
        if not bool(hard.any()):
            return out
        every = bool(hard.all())
        pick: Tensor | slice = slice(None) if every else hard
        items, p, right, damping = items[pick], p[pick], right[pick], damping[pick]
        layout = layout if every else layout.take(hard)
        r = None if r is None else r[pick]
        old = self.has_factor[items] & (error[pick] < _REUSE_ERROR) & (n >= _REUSE)
        solved = torch.zeros_like(old)
        x = right.clone()
        if bool(old.any()):
            assert self.factor is not None
            (factor,) = self.take(items, self.factor)
            found = conjugate_gradients(p, r, right, exact[pick], _REUSE_ITERATIONS, damping, factor, layout=layout)
            solved = found.converged & old
            x = torch.where(solved[:, None, None], found.x, x)
        for k in (~solved).nonzero()[:, 0].tolist():
            columns = layout.columns[k] if isinstance(layout, Sparse) else None
            sparse = sparse_solution(p[k], None if r is None else r[k], right[k], float(damping[k]), columns)
            if sparse is not None and bool(sparse.isfinite().all()):
                x[k], solved[k] = sparse, True
        if not bool(solved.all()):
            new: Tensor | slice = ~solved if bool(solved.any()) else slice(None)
            x[new], factor = self.factored(items[new], p[new], right[new], damping[new])
            if self.factor is None:
                self.factor = factor.new_zeros(len(self.z), n, n)
            self.factor[items[new]] = factor
            self.has_factor[items[new]] = True
        if every:
            return x
        out = out.clone()
        out[hard] = x
        return out

    def patience(self, n: int) -> int:
        """Iterations of conjugate gradients that are quicker than a factorization."""
        return 8 + n // 60 if self.layout is DENSE else _SPARSE_ITERATIONS

    def factored(self, items: Tensor, p: Tensor, right: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Solutions (b, k, n) by a factorization, and its factors."""
        scaled = self.layout_of(items).dense(p if self.unit else p * self.r[items].rsqrt()[:, :, None])
        if p.shape[1] >= _SINGLE:
            single = threshold(scaled.float(), _NO_WEIGHT, 0.0, inplace=True)
            weights = (single.mT @ single).double()
        else:
            weights = scaled.mT @ scaled
        lap = assemble(weights, self.ground, damping)
        factor, _ = torch.linalg.cholesky_ex(lap)
        x = torch.cholesky_solve(right.mT, factor).mT
        plain = right / lap.diagonal(0, -2, -1)[:, None, :]
        return torch.where(x.isfinite().all(-1, keepdim=True), x, plain).contiguous(), factor

    def balance(self, p: Tensor, r: Tensor, c: Tensor, g: Tensor, layout: Dense) -> Tensor:
        """The gap of column sums with columns that one row nearly fills pulled all the way to their balance."""
        if not self.doubly:
            return g
        top, row = layout.column_max(p)
        total = (c - g - top) + (r.gather(-1, row) - top)
        share = (g / total).clamp(min=-1 + 1e-9, max=1 - 1e-9)
        return torch.where((2 * top > c) & (total > 1e-13), total * share.atanh(), g)


def rows_exact(z: Tensor, v: Tensor, log_r: Tensor, layout: Dense = DENSE) -> Tensor:
    """Row potentials that give exact row sums."""
    return log_r - torch.logsumexp(z + layout.at_entries(v), -1)

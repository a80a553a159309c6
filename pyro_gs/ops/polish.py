r"""Potentials so exact that the smallest entries of a Sinkhorn matrix have theirs right.

A marginal error says nothing of entries below it: with ``P = [[1, e^-40], [e^-80, 1]]`` all marginals are right to
seventeen digits and both small entries are wrong. What sees them is the balance of flows: with ``s`` the best matching,
as much mass ``P[s(j), k]`` leaves any set of columns ``j`` for columns ``k`` outside it as enters, and no term of that is
rounded at the scale of one. Newton's method for the balance of the cuts of a maximum spanning tree
(:mod:`pyro_gs.ops.tree`) has each of them right in relative terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_gs.ops.conjugate import accurate_solution
from pyro_gs.ops.laplacian import cut_basis, matched_flows, tie_weights, trusted_cholesky
from pyro_gs.ops.matching import solve_assignment
from pyro_gs.ops.newton import rows_exact

_SMALL_PIVOT = 1e-6  # of the dual's Hessian; below it rounding of the marginals reaches the potentials
_DIRECT_STEPS = 15
_MAX_STEPS = 60
_MILD = 500.0  # largest logit over temperature at which the balance is sought from anywhere
_SAME_FOREST = 2.0  # step of a potential after which a spanning tree is still nearly a maximum one
_SAME_CUTS = 0.02  # and after which the cuts still weigh nearly the same
_SPOILT = 0.3  # error of a marginal that no step near the solution makes
_HALVINGS = 60
_NO_WORSE = 1e-10  # error of a marginal that the result may have whatever it was before
_EXACT = 1e-9  # last step of a potential; what is left is of the order of its square


def refine(
    z: Tensor, u: Tensor, v: Tensor, r: Tensor, c: Tensor, grounded: Tensor, depth: float = math.inf
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials exact in relative terms, the residual, and where that succeeded, from ones that fit the marginals.

    With other sums than one it is not tried where it takes more than Newton steps, and counts as a success.

    A Newton step does where the Hessian is well conditioned. Elsewhere, if all sums are one, :func:`balance_cuts` does.

    Args:
        z: (b, n, n), -inf where forbidden.
        u: row potentials (b, n).
        v: column potentials (b, n).
        r: row sums (b, n).
        c: column sums (b, n).
        grounded: bool (b, n).
        depth: only ties within so many nats of the strongest between two columns have to be right.
    """
    p = (z + u[:, :, None] + v[:, None, :]).exp()
    g = c - p.sum(-2)
    unit = bool((r == 1).all())
    d, good = accurate_solution(p, None if unit else r, g, grounded)
    v = v + torch.where(good[:, None], d, 0.0)
    u = torch.where(good[:, None], rows_exact(z, v, r.log()), u) if bool(good.any()) else u
    g = torch.where(good[:, None], 0.0, g)  # the step is quadratic: what is left is below its square
    del p
    if not bool(good.all()):
        rest = ~good
        u[rest], v[rest], g[rest], good[rest] = _factored_steps(*(part[rest] for part in (z, u, v, r, c, grounded)))
    exact = torch.ones_like(good)
    if unit and not bool(good.all()) and bool((c == 1).all()):
        bad = ~good
        new, done = balance_cuts(z[bad], v[bad], grounded[bad], depth)
        rows = rows_exact(z[bad], new, r[bad].log())
        gap = c[bad] - (z[bad] + rows[:, :, None] + new[:, None, :]).exp().sum(-2)
        fits = gap.abs().amax(-1) <= g[bad].abs().amax(-1).clamp(min=_NO_WORSE)  # False for NaN
        exact[bad] = done & fits
        v[bad], u[bad], g[bad] = (torch.where(fits[:, None], a, b[bad]) for a, b in ((new, v), (rows, u), (gap, g)))
    return u, v, g.abs().amax(-1), exact


def _factored_steps(
    z: Tensor, u: Tensor, v: Tensor, r: Tensor, c: Tensor, grounded: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials as in :func:`refine` by factorizations, the gap of the column sums, and where that is enough (b,)."""
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
        u = rows_exact(z, v, r.log())
        g = torch.where(step[:, None], 0.0, g)
        if not bool((step & (large > 1e-6)).any()):
            break
    return u, v, g, good


def balance_cuts(z: Tensor, v: Tensor, grounded: Tensor, depth: float = math.inf) -> tuple[Tensor, Tensor]:
    """Column potentials (b, n) that balance all cuts within ``depth`` nats of the strongest to about 1e-9, and where.

    Sums are one. For a cut ``e`` that is tied to nothing else, the drop that balances it is half the logarithm of the ratio
    of what flows out and in (Osborne 1960 for single columns); Newton's step is the first term of its series. So the
    step solves ``K y = h`` with ``h_e = (out_e + in_e) log(out_e / in_e) / 2`` in place of ``out_e - in_e``: near
    the solution the two agree to third order, and far away potentials move by as much as they have to.
    """
    row_of = solve_assignment(z + v[:, None, :]).argsort(-1)
    # Below this a difference of potentials is rounding of the logits.
    size = torch.where(z > -torch.inf, z.abs(), 0.0).amax((-2, -1))
    floor = _EXACT + 64 * z.shape[-1] * torch.finfo(z.dtype).eps * size
    done = torch.ones_like(v[:, 0], dtype=torch.bool)
    v, left = _iterate(z, v, grounded, row_of, floor, _DIRECT_STEPS, depth)
    if len(left):  # far off, where what balances one cut unbalances others: from higher temperatures down
        z, now, ground, rows, floor = z[left], v[left], grounded[left], row_of[left], floor[left]
        levels = math.ceil(float(size[left].max()) / _MILD).bit_length()
        for level in range(levels, -1, -1):
            cold = z * 2.0**-level
            now = now * (2.0**-level if level == levels else 2.0)
            log_p = _normalised(cold, now)
            now = now - torch.logsumexp(log_p, -2)
            limit = floor if level == 0 else (floor * 2.0**-level).clamp(min=0.5)  # rounding may be above a half
            now, unfinished = _iterate(cold, now, ground, rows, limit, _MAX_STEPS, depth)
        v[left] = now
        done[left[unfinished]] = False
    return v, done


def _iterate(
    z: Tensor, v: Tensor, grounded: Tensor, row_of: Tensor, floor: Tensor, steps: int, depth: float
) -> tuple[Tensor, Tensor]:
    """Potentials after at most so many steps, and the items (k,) whose last step was above its floor."""
    v = v.clone()
    active = torch.arange(z.shape[0], device=z.device)
    log_p = _normalised(z, v)
    cuts, forest = None, None
    for _ in range(steps):
        rows = row_of[active]
        if cuts is None:
            cuts = cut_basis(log_p, tie_weights(log_p).log_(), grounded[active], rows, forest, spread=False)
        out, into = cuts.log_cut_sums(matched_flows(log_p, rows))
        both = (torch.logaddexp(out, into) - cuts.log_cut).exp()
        y = cuts.drops(0.5 * both * (out - into))
        d = cuts.potentials(y)
        every = len(active) == len(z)
        d, log_p = _step(z if every else z[active], v[active], d, log_p)
        v[active] += d
        weight = cuts.log_cut.masked_fill(cuts.grounded, -torch.inf)
        large = torch.where(weight > weight.amax(-1, keepdim=True) - depth, y.abs(), 0.0).amax(-1)
        go = large > floor[active]
        active = active[go]
        if not len(active):
            break
        near = float(y.abs().max())
        parent, order, below = cuts.forest
        forest = None if near > _SAME_FOREST else (parent[go], order[go], below[go])
        if not bool(go.all()):
            cuts, log_p = None, log_p[go]
        elif near > _SAME_CUTS:
            cuts = None
    return v, active


def _normalised(z: Tensor, v: Tensor) -> Tensor:
    t = z + v[:, None, :]
    return t - torch.logsumexp(t, -1, keepdim=True)


def _step(z: Tensor, v: Tensor, d: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The step, shortened for items whose marginals it would spoil, and ``log P`` after it."""
    allowed = _error(log_p).clamp(min=_SPOILT)
    log_p = _normalised(z, v + d)
    for _ in range(_HALVINGS):
        spoilt = _error(log_p) > allowed
        if not bool(spoilt.any()):
            break
        d = torch.where(spoilt[:, None], d / 2, d)
        log_p = _normalised(z, v + d)
    return d, log_p


def _error(log_p: Tensor) -> Tensor:
    """Largest error of a column sum (b,)."""
    return (torch.logsumexp(log_p, -2).exp() - 1).abs().amax(-1)

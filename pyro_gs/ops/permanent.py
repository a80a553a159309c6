r"""Permanents of non-negative matrices given by their logarithms: exact, approximate, bounds, and marginals.

``perm(A) = sum over permutations of prod_i A[i, s(i)]``; for a 0/1 mask it counts the allowed permutations. The
recursion over subsets of columns, row by row, adds non-negative terms only, so unlike inclusion-exclusion (Ryser 1963)
it loses no digit; it takes ``n 2^n / 2`` multiplications. The matrix is first scaled to be doubly stochastic: its
permanent is then at least ``n! / n^n`` (Egorychev 1981; Falikman 1981) and no partial sum exceeds one, so that nothing
that matters can underflow, whatever the range of the entries.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_gs.ops.assignment_sums import log_assignment_sum
from pyro_gs.ops.batching import own_memory, unexpanded
from pyro_gs.ops.implicit import SinkhornSolution, check_potentials, scale
from pyro_gs.ops.logits import check_logits, check_magnitude, describe, without_offsets
from pyro_gs.ops.padding import Assignment, Capacities
from pyro_gs.ops.subsets import levels, moves
from pyro_gs.ops.support import Support, blocks, component_sizes, find_support, rows_of_component, unravel

EXACT_LIMIT = 20
"""Largest number of rows of a component for the exact recursion (2^20 sums)."""

Method = Literal["exact", "bethe", "sinkhorn_bethe", "sinkhorn_lower", "sinkhorn_upper", "bethe_upper"]
METHODS: tuple[Method, ...] = get_args(Method)
_TABLE = 2**24  # numbers in the tables of what is computed at once
_AT_ONCE = 2**18  # products of minors at once
_TOL = 1e-10
_NOTHING = -1e5  # for the logarithm of zero where gradients pass by


def log_permanent(
    logits: Tensor,
    *,
    method: Method = "exact",
    unmatched: float | Tensor | None = None,
    capacities: Capacities | None = None,
) -> Tensor:
    r"""Log-permanent of ``exp(logits)``: the log-normalizer of ``p(P) ~ exp <logits, P>`` over permutations.

    ====================  ======  =========================================================================
    method                status  what it is
    ====================  ======  =========================================================================
    ``"exact"``           exact   recursion over subsets, for components of at most 20 rows
    ``"bethe"``           lower   Bethe permanent (Vontobel 2013; a lower bound by Gurvits 2011)
    ``"sinkhorn_bethe"``  lower   Bethe free energy at the Sinkhorn marginals, as in Pyro's ``OneOneMatching``
    ``"sinkhorn_lower"``  lower   van der Waerden's bound ``n! / n^n`` of the scaled matrix
    ``"bethe_upper"``     upper   ``"bethe"`` plus ``n / 2 log 2`` (Anari and Rezaei 2019)
    ``"sinkhorn_upper"``  upper   a doubly stochastic matrix has a permanent of at most one
    ====================  ======  =========================================================================

    The components of the allowed entries multiply, and each is treated alone.

    **Partial and one-to-many.** With ``unmatched`` a row may stay unmatched at a score, with ``capacities`` a column may
    take several rows; then logits may be rectangular, columns may stay free, and the value is the log-sum of
    ``exp(<logits, P> + scores of unmatched rows)`` over all assignments (``ops/assignment_sums.py``): exact only.

    **Differentiation.** The gradient of the exact value is the matrix of marginals ``P(row i is matched to column j)``;
    it can be differentiated once more. That of ``"bethe"`` are its beliefs, that of ``"sinkhorn_lower"`` and
    ``"sinkhorn_upper"`` is ``S(logits)``, each differentiable once.

    Args:
        logits: shape (..., n, n), larger is better; ``-inf`` forbids a pair. With ``unmatched`` or ``capacities``,
            shape (..., n, m).
        method: see above.
        unmatched: score of a row that stays unmatched, a number or a tensor that broadcasts to (..., n).
        capacities: how many rows a column may take, an integer for all or one for each of the m columns.

    Returns:
        Tensor of the batch shape, in nats, with the dtype of ``logits``; computed in float64.

    Raises:
        TypeError: ``logits`` is no floating tensor.
        ValueError: bad logits, no permutation allowed, an unknown method, or ``"exact"`` with a component of more than
            20 rows; the message names the number and the alternatives. With ``unmatched`` or ``capacities``, another
            method, or more than 2^20 states. Logits of which rounding leaves nothing.
        OverflowError: the value is too large for the dtype of ``logits``.
        RuntimeError: under a transform of ``torch.func``; take ``torch.autograd``, and batch dimensions.

    Example:
        >>> import torch
        >>> log_permanent(torch.zeros(20, 20)), torch.lgamma(torch.tensor(21.0))
        (tensor(42.3356), tensor(42.3356))
        >>> log_permanent(torch.zeros(30, 30), method="sinkhorn_lower")
        tensor(74.6582)
    """
    check_method(method)
    if unmatched is not None or capacities is not None:
        if method != "exact":
            raise ValueError(f"method must be 'exact' with unmatched or capacities, but is {method!r}")
        total = log_assignment_sum(Assignment(logits, unmatched, capacities))
        return in_dtype(total, logits.dtype, "the log-sum over assignments")
    n, m = logits.shape[-2:] if isinstance(logits, Tensor) and logits.dim() >= 2 else (0, 0)
    if n != m:
        raise ValueError(
            f"logits must be square in its last two dimensions, but has shape {tuple(logits.shape)}; for the sum over "
            "matchings that leave columns free give capacities=1, where rows may stay unmatched their score, unmatched=..."
        )
    check_logits(logits)
    check_magnitude(logits, "logits")
    support = find_support(logits.detach() > -torch.inf, warn=False)
    total = log_normalizer(own_memory(logits, 2), support, method)
    return in_dtype(total, logits.dtype, "the log-permanent")


def in_dtype(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A float64 result in the dtype of what it comes from.

    Raises:
        OverflowError: it is finite, and too large for the dtype.
    """
    out = value.to(dtype)
    lost = out.detach().isinf() & value.detach().isfinite()
    if bool(lost.any()):
        raise OverflowError(f"{what} is {float(value[lost].reshape(-1)[0]):g}, beyond {dtype}; give logits in float64")
    return out


def log_permanent_bounds(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The best lower and upper bound of :func:`log_permanent` among its methods, for any size.

    Args:
        logits: as there.

    Returns:
        Two tensors of the batch shape, in nats, ``log_permanent`` between them.

    Raises:
        TypeError: as there.
        ValueError: as there, but for sizes.
        OverflowError: as there.
        RuntimeError: as there.

    Example:
        >>> import torch
        >>> log_permanent_bounds(torch.zeros(40, 40))  # log 40! is 110.32
        (tensor(110.3206), tensor(121.9223))
    """
    check_logits(logits)
    check_magnitude(logits, "logits")
    support = find_support(logits.detach() > -torch.inf, warn=False)
    logits = own_memory(logits, 2)

    bethe, sinkhorn = (log_normalizer(logits, support, method) for method in ("bethe", "sinkhorn_upper"))
    low = torch.maximum(bethe, sinkhorn - _sinkhorn_gap(support).to(sinkhorn))
    high = torch.minimum(bethe + _bethe_gap(support).to(bethe), sinkhorn)
    return in_dtype(low, logits.dtype, "a bound"), in_dtype(high, logits.dtype, "a bound")


def check_method(method: str, name: str = "method") -> None:
    """Raise ``ValueError`` unless ``method`` is one of :data:`METHODS`."""
    if method not in METHODS:
        raise ValueError(f"{name} must be one of {', '.join(METHODS)}, but is {method!r}")


def check_exact(support: Support, what: str) -> None:
    """Raise ``ValueError`` if a component has more rows than the exact recursion can take."""
    sizes = component_sizes(support)
    large = sizes.amax(-1) > EXACT_LIMIT
    if bool(large.any()):
        item = int(large.reshape(-1).nonzero()[0])
        size = int(sizes.reshape(-1, sizes.shape[-1])[item].max())
        place = describe(unravel(item, support.shape[:-2])) if support.allowed is not None else ""
        raise ValueError(
            f"{what} is exact for components of at most {EXACT_LIMIT} rows, but logits{place} have one of {size}; the "
            f"alternatives by name are {', '.join(METHODS[1:])}"
        )


def log_normalizer(logits: Tensor, support: Support, method: Method = "exact") -> Tensor:
    """:func:`log_permanent` of logits that are checked, of their support; float64."""
    _, value, shift = balanced_normalizer(logits, support, method)
    return value + shift


def balanced_normalizer(logits: Tensor, support: Support, method: Method = "exact") -> tuple[Tensor, Tensor, Tensor]:
    """:func:`log_normalizer` without what is lost to rounding where logits are large.

    Returns:
        Logits whose rows and columns have had constants added, so that their exponentials are doubly stochastic, float64
        (..., n, n); the log-normalizer of these, (...); what is to be added to it for that of ``logits``.
    """
    if method == "bethe_upper":
        z, bethe, shift = balanced_normalizer(logits, support, "bethe")
        return z, bethe + _bethe_gap(support).to(bethe), shift
    if method == "sinkhorn_lower":
        z, sinkhorn, shift = balanced_normalizer(logits, support, "sinkhorn_upper")
        return z, sinkhorn - _sinkhorn_gap(support).to(sinkhorn), shift
    if method == "exact":
        check_exact(support, "log_permanent")
    x, support, batch = distinct(logits, support)
    z, balanced = _balance(x, support)
    shift = (-balanced.u.sum(-1) - balanced.v.sum(-1)).expand(batch)
    whole = z.expand(batch + x.shape[-2:])
    if method == "sinkhorn_upper":
        # By the envelope theorem the potentials may be held fixed, with sum P dX as the differential of the shift.
        p = balanced.log_p.exp()
        value = (p * torch.where(p > 0, x - x.detach(), 0.0)).sum((-2, -1))
        return whole, value.expand(batch), shift
    if method == "exact":
        value = torch.zeros(x.shape[:-2], dtype=x.dtype, device=x.device).reshape(-1)
        for block in blocks(support, x.device):
            value = value.index_add(0, block.item, _LogPermanent.apply(block.of(z)))
        value = value.reshape(x.shape[:-2])
    elif method == "sinkhorn_bethe":
        log_b = scale(z, support, tol=_TOL, max_iter=500, relative=False).log_p
        log_b = torch.where(log_b > -torch.inf, log_b, _NOTHING)
        value = _bethe_energy(z, log_b, log_others(log_b, -1))
    else:
        value = _bethe_energy(z, *_beliefs(x.detach(), z.detach(), support))
    return whole, value.expand(batch), shift


def _sinkhorn_gap(support: Support) -> Tensor:
    """Nats between the two Sinkhorn bounds: ``log n^n / n!`` of every component, float64 (...)."""
    sizes = component_sizes(support).double()
    gap: Tensor = torch.special.xlogy(sizes, sizes) - torch.lgamma(sizes + 1)
    return gap.sum(-1)


def _bethe_gap(support: Support) -> Tensor:
    """Nats between the two Bethe bounds: ``n / 2 log 2`` of every component but single entries, float64 (...)."""
    sizes = component_sizes(support).double()
    return 0.5 * math.log(2) * torch.where(sizes > 1, sizes, 0.0).sum(-1)


def distinct(logits: Tensor, support: Support) -> tuple[Tensor, Support, torch.Size]:
    """Logits in float64 without expanded batch dimensions and what is not in their support; so the support; the batch."""
    batch = logits.shape[:-2]
    x = unexpanded(logits, 2)
    if support.allowed is not None:
        for dim, size in enumerate(x.shape[:-2]):
            if size == 1 and batch[dim] > 1:
                support = support.first(dim)
        x = x.masked_fill(~support.allowed, -torch.inf)  # type: ignore[operator]
    else:
        support = Support(x.shape)
    return x.double(), support, batch


def subset_tables(a: Tensor, count: int | None = None) -> list[Tensor]:
    """Permanents of the first k rows against all subsets of k columns, for k from 0 to ``count``.

    Args:
        a: non-negative, scaled so that nothing overflows, shape (b, n, n).
        count: number of levels, by default n.

    Returns:
        Tensors of shape (subsets, b), in the order of :mod:`pyro_gs.ops.subsets`.
    """
    n = a.shape[-1]
    tables = [torch.ones_like(a[:, 0, 0])[None]]
    for row, level in enumerate(levels((1,) * n, n)[:count]):
        level = level.to(a.device)
        weights = a[:, row].T.contiguous()
        table = tables[-1]
        total = weights.new_zeros(level.states, len(a))
        for before, column in zip(level.before, level.column, strict=True):
            total = total + table.index_select(0, before) * weights.index_select(0, column)
        tables.append(total)
    return tables


def _marginals(a: Tensor) -> Tensor:
    """``a_ij perm(A without row i and column j) / perm(A)``, (b, n, n), differentiable in forward mode."""
    n = a.shape[-1]
    above, below = subset_tables(a, n - 1), subset_tables(a.flip(-2), n - 1)
    out = []
    for row, steps in enumerate(moves(n)):
        before, after = steps.to(a.device)
        rest = below[n - 1 - row].flip(0)  # the complements of a level's states, in its order
        columns = max(1, _AT_ONCE // max(1, before.shape[1] * len(a)))
        found = []
        for first, then in zip(before.split(columns), after.split(columns), strict=True):
            products = above[row].index_select(0, first.flatten()) * rest.index_select(0, then.flatten())
            found.append(products.reshape(*first.shape, len(a)).sum(1))
        out.append(torch.cat(found).T)
    minors = torch.stack(out, -2) * a
    return minors / minors.sum(-1, keepdim=True)


class _LogPermanent(torch.autograd.Function):
    """Log-permanents of scaled matrices (b, n, n)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.cat([subset_tables(part.exp())[-1][0].log() for part in in_chunks(z)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        marginal: Tensor = _Marginals.apply(z)
        return grad[:, None, None] * marginal


class _Marginals(torch.autograd.Function):
    """Marginals of scaled matrices (b, n, n). Their derivative is symmetric, so its adjoint is a tangent."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.cat([_marginals(part.exp()) for part in in_chunks(z)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors

        def tangent(part: Tensor, direction: Tensor) -> Tensor:
            out: Tensor = torch.func.jvp(lambda x: _marginals(x.exp()), (part,), (direction,))[1]
            return out

        parts = zip(in_chunks(z), in_chunks(grad), strict=True)
        return torch.cat([tangent(part, direction) for part, direction in parts])


def in_chunks(z: Tensor) -> tuple[Tensor, ...]:
    """Parts of a batch (b, n, n) that are small enough for their tables."""
    return z.split(max(1, _TABLE >> (z.shape[-1] + 1))) if len(z) else (z,)


def marginals(logits: Tensor, support: Support, method: Method = "exact") -> Tensor:
    r"""Marginals of ``p(P) ~ exp <logits, P>``, float64 (..., n, n), differentiable once.

    Exact; with a Bethe method the beliefs, with a Sinkhorn method ``S(logits)``.

    Raises:
        ValueError: the method is ``"exact"`` and a component has more than 20 rows.
    """
    if method == "exact":
        check_exact(support, "the matrix of marginals")
    x, support, batch = distinct(logits, support)
    if method.startswith("sinkhorn"):
        out = scale(x, support, tol=_TOL, max_iter=500, relative=False).log_p.exp()
    elif method.startswith("bethe"):
        log_b, _ = _beliefs(x.detach(), balance(x.detach(), support), support)
        out = log_b.exp()
    else:
        z = balance(x, support)
        out = torch.zeros_like(x).reshape(-1, *x.shape[-2:])
        for block in blocks(support, x.device):
            where = (block.item[:, None, None], block.rows[:, :, None], block.columns[:, None, :])
            out = out.index_put(where, _Marginals.apply(block.of(z)))
        out = out.reshape(x.shape)
    return out.expand(batch + x.shape[-2:])


def balance(x: Tensor, support: Support) -> Tensor:
    """Logits plus row and column potentials that make their exponentials doubly stochastic; the potentials are constants.

    Raises:
        ValueError: logits so far apart that rounding is all that is left of what they differ by.
    """
    return _balance(x, support)[0]


def _balance(x: Tensor, support: Support) -> tuple[Tensor, SinkhornSolution]:
    """Balanced logits, and the solution that has the potentials."""
    x, rows, columns = without_offsets(x)
    found = scale(x.detach(), support, tol=_TOL, max_iter=500, relative=False)
    z = x + found.u[..., None] + found.v[..., None, :]
    check_potentials(z, found.u, found.v)
    return z, found._replace(u=found.u - rows, v=found.v - columns)


def log_others(x: Tensor, dim: int) -> Tensor:
    """Log-sum of all other entries along a dimension, without subtraction; finite entries only."""
    nothing = torch.full_like(x.narrow(dim, 0, 1), 10 * _NOTHING)
    count = x.shape[dim] - 1

    def earlier(y: Tensor) -> Tensor:
        return torch.cat([nothing, y.narrow(dim, 0, count).logcumsumexp(dim)], dim)

    return torch.logaddexp(earlier(x), earlier(x.flip(dim)).flip(dim))


def _bethe_energy(z: Tensor, log_b: Tensor, log_rest: Tensor) -> Tensor:
    """Minus the Bethe free energy at beliefs ``b``: ``sum b (z - log b) + (1 - b) log(1 - b)`` (Vontobel 2013)."""
    inside = log_b.detach() > _NOTHING
    energy = torch.where(inside, log_b, -torch.inf).exp() * torch.where(inside, z - log_b, 0.0)
    return (energy + log_rest.exp() * log_rest).sum((-2, -1))


def _beliefs(x: Tensor, z: Tensor, support: Support, *, tol: float = 1e-9, max_iter: int = 10_000) -> tuple[Tensor, Tensor]:
    """Logarithms of the Bethe beliefs and of what they leave, by message passing from a scaled matrix ``z`` of ``x``.

    In components of one and two rows the Bethe permanent is the largest product, and no message says more.
    """
    size = rows_of_component(support, z)[..., None]
    allowed = z > -torch.inf
    ahead = _ahead(x, allowed & (size == 2))
    certain = allowed & ((size == 1) | (ahead > 0))
    out = ~allowed | (ahead < 0)
    active = allowed & (size > 2)
    z = torch.where(allowed, z, _NOTHING)
    across = down = torch.zeros_like(z)
    for _ in range(max_iter):
        across = torch.where(active, -log_others(z + down, -1), 0.0)
        new = torch.where(active, -log_others(z + across, -2), 0.0)
        settled = ((new - down).abs() < tol).all()
        down = new
        if bool(settled):
            break
    log_odds = torch.where(active, z + across + down, 0.0)
    log_b = torch.nn.functional.logsigmoid(log_odds).masked_fill(certain, 0.0).masked_fill(out, _NOTHING)
    log_rest = torch.nn.functional.logsigmoid(-log_odds).masked_fill(certain, _NOTHING).masked_fill(out, 0.0)
    return log_b, log_rest


def _ahead(x: Tensor, pairs: Tensor) -> Tensor:
    """By how much the product with an entry is larger than the other one, in components of two rows; else zero.

    By differences within rows, so that all four entries say the same whatever is lost to rounding.

    Args:
        x: logits, (..., n, n).
        pairs: bool (..., n, n), the entries of components of two rows, two in a row.
    """
    mask, last = pairs.byte(), x.shape[-1] - 1
    column, other = mask.argmax(-1, keepdim=True), last - mask.flip(-1).argmax(-1, keepdim=True)
    lead = x.gather(-1, column) - x.gather(-1, other)
    rows = mask.argmax(-2, keepdim=True) + last - mask.flip(-2).argmax(-2, keepdim=True)  # the sum of the two, by column
    partner = rows.mT.gather(-2, column) - torch.arange(last + 1, device=x.device)[:, None]
    lead = torch.where(pairs.any(-1, keepdim=True), lead, 0.0)
    ahead = lead - lead.gather(-2, partner.clamp(0, last))
    first = torch.arange(last + 1, device=x.device) == column
    return torch.where(pairs, torch.where(first, ahead, -ahead), 0.0)


def log_count(support: Support, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Log-number of the permutations that masks allow, and whether it is exact, float64 and bool of the batch shape.

    Exact where every component has at most 20 rows or no forbidden entry, else a lower bound (Bethe).
    """
    n, batch = support.shape[-1], support.shape[:-2]
    if support.allowed is None:
        value = torch.full(batch, math.lgamma(n + 1), dtype=torch.float64, device=allowed.device)
        return value, torch.ones(batch, dtype=torch.bool, device=allowed.device)
    small = unexpanded(support.allowed, 2)
    zeros = torch.zeros(small.shape, dtype=torch.float64, device=small.device).masked_fill(~small, -torch.inf)
    _, support, _ = distinct(zeros.expand(support.shape), support)
    value = torch.zeros(math.prod(small.shape[:-2]), dtype=torch.float64, device=small.device)
    exact = torch.ones_like(value, dtype=torch.bool)
    for block in blocks(support, small.device):
        found = [_count(mask.cpu().numpy().tobytes(), block.size) for mask in block.of(small)]
        value = value.index_add(0, block.item, value.new_tensor([count for count, _ in found]))
        bad = exact.new_tensor([not good for _, good in found])
        exact[block.item[bad]] = False
    return value.reshape(small.shape[:-2]).expand(batch), exact.reshape(small.shape[:-2]).expand(batch)


@functools.lru_cache(maxsize=256)
def _count(mask: bytes, n: int) -> tuple[float, bool]:
    """Log-number of permutations of one component, remembered by its mask, and whether it is exact."""
    allowed = torch.frombuffer(bytearray(mask), dtype=torch.bool).reshape(n, n)
    if bool(allowed.all()):
        return math.lgamma(n + 1), True
    method: Method = "exact" if n <= EXACT_LIMIT else "bethe"
    logits = torch.zeros(n, n, dtype=torch.float64, device="cpu").masked_fill(~allowed, -torch.inf)
    return float(log_normalizer(logits, find_support(allowed), method)), method == "exact"

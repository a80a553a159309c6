r"""Sums over partial and one-to-many assignments: exact normalizers and draws of their Gibbs law.

Row by row, over how often each column has been taken (:mod:`pyro_gs.ops.subsets`): ``T_i(k)`` is the sum over the
assignments of the first i rows that take column j ``k_j`` times. There are ``prod_j (c_j + 1)`` states. Logits and scores
are first shifted by the potentials of the padded problem (:mod:`pyro_gs.ops.padding`), which a factor for what is left
over in the end makes up for. Then the weights of a row are its marginals there, which sum to one, and ``T_i`` is the law of
``k`` if rows chose for themselves: nothing that matters underflows. The factors in the end are kept as logarithms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_gs.ops.implicit import check_potentials, scale
from pyro_gs.ops.logits import without_offsets
from pyro_gs.ops.padding import Assignment
from pyro_gs.ops.subsets import choose, levels
from pyro_gs.ops.support import find_support

STATE_LIMIT = 2**20


class _States(NamedTuple):
    """All states, level by level.

    Attributes:
        before: (width, states); the state that one more row at ``column`` turns into this one.
        column: (width, states); m where a state has fewer predecessors.
        taken: (states, m), how often each column is taken.
        upto: number of states in the levels up to each, (rows + 1).
    """

    before: Tensor
    column: Tensor
    taken: Tensor
    upto: list[int]


class _Scaled(NamedTuple):
    """A problem in ordinary numbers.

    Attributes:
        pairs: (b, n, m + 1), the last column zero.
        alone: (b, n), or None where all rows must be matched.
        log_ends: logarithms of the factors of the states after the last row, (states, b).
        shift: to be added to the logarithm of the sum, (b,).
    """

    pairs: Tensor
    alone: Tensor | None
    log_ends: Tensor
    shift: Tensor


def check_states(problem: Assignment) -> None:
    """Raise ``ValueError`` if the exact sum has more than 2^20 states; names the number."""
    count = math.prod(c + 1 for c in problem.capacities)
    if count > STATE_LIMIT:
        raise ValueError(
            f"the exact sum over assignments has prod(capacities + 1) = {count:,} states for logits of shape "
            f"{tuple(problem.logits.shape)}, more than {STATE_LIMIT:,}; take fewer columns or smaller "
            "capacities, or a relaxed law, GumbelSinkhorn(temperature, pad_logits(...))"
        )


def log_assignment_sum(problem: Assignment, *, certain: bool = True) -> Tensor:
    """Log-sum of ``exp(<logits, P> + scores of unmatched rows)`` over all assignments, float64 of the batch shape.

    Differentiable any number of times; the backward pass keeps one table a row.

    Args:
        problem: what to assign.
        certain: as in :func:`pyro_gs.ops.implicit.check_potentials`; then the value is right to rounding of itself, and
            not to be subtracted from.

    Raises:
        ValueError: no assignment, more than 2^20 states, or logits of which rounding leaves nothing.
    """
    states = _states(problem)
    scaled = _scaled(problem, states, certain)
    table = _start(scaled)
    for row in range(problem.shape[0]):
        if torch.is_grad_enabled() and scaled.pairs.requires_grad:
            table = checkpoint(_grow, table, scaled, row, states, use_reentrant=False, preserve_rng_state=False)
        else:
            table = _grow(table, scaled, row, states)
    weight, top = _ends(table, scaled)
    total = (table * weight).sum(0)
    return (total.log() + top + scaled.shift).reshape(problem.logits.shape[:-2])


@torch.no_grad()
def sample_assignments(problem: Assignment, count: int) -> Tensor:
    """Exact draws of the Gibbs law: the column of every row, m where unmatched, long (count, ..., n)."""
    n, m = problem.shape
    states = _states(problem)
    scaled = _scaled(problem, states)
    tables = [_start(scaled)]
    for row in range(n):
        tables.append(_grow(tables[-1], scaled, row, states))
    items = torch.arange(len(scaled.pairs), device=scaled.pairs.device)
    out = torch.empty(count, len(items), n, dtype=torch.long, device=items.device)
    state = choose((tables[n] * _ends(tables[n], scaled)[0])[:, None].expand(-1, count, -1))
    for row in range(n - 1, -1, -1):
        table = _longer(tables[row], len(tables[row]) + 1)  # zero for states that these rows cannot have reached
        last = len(table) - 1
        column, before = states.column[:, state].long(), states.before[:, state].long()
        weight = scaled.pairs[items, row, column] * table[before.clamp(max=last), items]
        if scaled.alone is not None:
            stay = scaled.alone[:, row] * table[state.clamp(max=last), items]
            weight = torch.cat([weight, stay[None]])
            column = torch.cat([column, torch.full_like(state, m)[None]])
            before = torch.cat([before, state[None]])
        pick = choose(weight)[None]
        out[..., row] = column.gather(0, pick)[0]
        state = before.gather(0, pick)[0]
    return out.reshape(count, *problem.logits.shape[:-1])


def _ends(table: Tensor, scaled: _Scaled) -> tuple[Tensor, Tensor]:
    """Factors of the last states (states, b) over ``exp(top)``, with which the largest product is one, and ``top`` (b,)."""
    log_table = table.detach().log()
    top = (log_table + scaled.log_ends).amax(0)
    return torch.where(log_table > -torch.inf, scaled.log_ends - top, -torch.inf).exp(), top


def _states(problem: Assignment) -> _States:
    check_states(problem)
    n, m = problem.shape
    capacities = problem.capacities
    rows = min(n, sum(capacities))
    device = problem.logits.device
    found = levels(capacities, rows)
    width = max((level.before.shape[0] for level in found), default=1)
    before = [torch.zeros(width, 1, dtype=torch.long, device="cpu")]
    column = [torch.full((width, 1), m, dtype=torch.long, device="cpu")]
    taken = [torch.zeros(1, m, dtype=torch.long, device="cpu")]
    upto = [1]
    for level in found:
        start = upto[-1] - len(taken[-1])
        pad = (0, 0, 0, width - level.before.shape[0])
        before.append(torch.nn.functional.pad(level.before.long() + start, pad))
        column.append(torch.nn.functional.pad(level.column.long(), pad, value=m))
        one_more = torch.nn.functional.one_hot(level.column[0].long(), m + 1)[:, :m]
        taken.append(taken[-1][level.before[0].long()] + one_more)
        upto.append(upto[-1] + level.states)
    upto += [upto[-1]] * (n - rows)
    return _States(torch.cat(before, -1).to(device), torch.cat(column, -1).to(device), torch.cat(taken).to(device), upto)


def _scaled(problem: Assignment, states: _States, certain: bool = True) -> _Scaled:
    n, m = problem.shape
    capacity = torch.tensor(problem.capacities, device=problem.logits.device)
    padded = problem.padded().detach().double()
    size = padded.shape[-1]
    padded = padded.reshape(-1, size, size)
    padded, rows, columns = without_offsets(padded)
    found = scale(padded, find_support(padded > -torch.inf), tol=1e-8, max_iter=500, relative=False)
    u, v = found.u, found.v
    check_potentials(padded + u[..., None] + v[:, None], u, v, certain=certain)
    first = (capacity.cumsum(0) - capacity).clamp(max=size - 1)
    of_column = v[:, first]
    total = u.sum(-1) + v.sum(-1) - rows.sum(-1) - columns.sum(-1)
    x = problem.logits.double().reshape(-1, n, m) - rows[:, :n, None] - columns[:, None, first]
    inside = padded[:, :n, first] > -torch.inf
    shifted = torch.where(inside, x, 0.0) + u[:, :n, None] + of_column[:, None]
    pairs = torch.where(inside & (capacity > 0), shifted + capacity.double().log(), -torch.inf).exp()
    pairs = torch.cat([pairs, torch.zeros_like(pairs[..., :1])], -1)
    left = (capacity - states.taken).double()  # places that stay free
    log_end = -torch.special.xlogy(states.taken.double(), capacity.double()).sum(-1, keepdim=True).expand(-1, len(x))
    if size > n:  # each is filled by a row of zeros, and such rows that are left fill the columns of unmatched rows
        empty = padded[:, n] + u[:, n, None] + v
        free = empty[:, first]
        log_end = log_end + torch.where(left[:, None] > 0, left[:, None] * free, 0.0).sum(-1)
    alone = None
    if problem.unmatched is None:
        log_end = torch.where(left.sum(-1)[:, None] == size - n, log_end, -torch.inf)
    else:
        column = int(capacity.sum())
        scores = problem.unmatched.double().reshape(-1, n) - rows[:, :n] - columns[:, column, None]
        open_ = scores > -torch.inf
        shifted = torch.where(open_, scores, 0.0) + u[:, :n] + v[:, column, None] + math.log(n)
        alone = torch.where(open_, shifted, -torch.inf).exp()
        matched = states.taken.sum(-1)[:, None].double()
        log_end = log_end - (n - matched) * math.log(n)
        if size > n:
            log_end = log_end + torch.where(matched > 0, matched * empty[:, column], 0.0)
    return _Scaled(pairs, alone, log_end, -total)


def _start(scaled: _Scaled) -> Tensor:
    return torch.ones_like(scaled.shift)[None]


def _longer(table: Tensor, size: int) -> Tensor:
    """A table (states, b) with zeros for more states; also of no items, which torch 2.4 does not pad."""
    return torch.cat([table, table.new_zeros(size - len(table), table.shape[1])])


def _grow(table: Tensor, scaled: _Scaled, row: int, states: _States) -> Tensor:
    """Sums over the first ``row + 1`` rows from those over the first ``row``, (states so far, b)."""
    size = states.upto[row + 1]
    grown = _longer(table, size)
    weights = scaled.pairs[:, row].T.contiguous()
    total = torch.zeros_like(grown) if scaled.alone is None else grown * scaled.alone[:, row]
    for before, column in zip(states.before[:, :size], states.column[:, :size], strict=True):
        total = total + grown.index_select(0, before) * weights.index_select(0, column)
    return total

"""States of a row-by-row recursion over matchings: how often each column has been taken so far.

With all capacities one a state is a subset of the columns. States are sorted by level, the number of rows that are
matched, and within a level by their code, so that with capacities of one the complements of a level's states are
another level's in reverse order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Level(NamedTuple):
    """How the states of one level come from those of the level below.

    Attributes:
        before: long (width, states); the state that one more row at ``column`` turns into this one.
        column: long (width, states); where a state has fewer predecessors than ``width``, the number of columns.
    """

    before: Tensor
    column: Tensor

    @property
    def states(self) -> int:
        """Number of states."""
        return self.before.shape[1]

    def to(self, device: torch.device) -> Level:
        """The same on a device."""
        return Level(self.before.to(device), self.column.to(device))


@functools.lru_cache(maxsize=8)
def levels(capacities: tuple[int, ...], rows: int) -> tuple[Level, ...]:
    """Levels 1 to ``rows`` for columns that may be taken ``capacities`` times.

    Args:
        capacities: of every column, at least 0 each.
        rows: number of levels; at most the sum of ``capacities``.
    """
    radix = np.array(capacities, dtype=np.int64) + 1
    stride = np.concatenate([[1], np.cumprod(radix)[:-1]])
    codes = np.arange(int(radix.prod()))
    level = np.zeros(len(codes), dtype=np.int64)
    for step, base in zip(stride, radix, strict=True):
        level += codes // step % base
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(rows + 2))
    position = np.empty(len(codes), dtype=np.int32)
    position[order] = np.arange(len(codes)) - starts[np.minimum(level[order], rows + 1)]
    out = []
    for k in range(1, rows + 1):
        states = order[starts[k] : starts[k + 1]]
        state, column = np.nonzero(states[:, None] // stride % radix)
        width = min(k, len(radix))
        first = np.searchsorted(state, np.arange(len(states)))
        rank = np.arange(len(state)) - first[state]
        before = np.zeros((width, len(states)), dtype=np.int32)
        columns = np.full((width, len(states)), len(radix), dtype=np.int32)
        before[rank, state] = position[states[state] - stride[column]]
        columns[rank, state] = column
        out.append(Level(torch.from_numpy(before), torch.from_numpy(columns)))
    return tuple(out)


class Moves(NamedTuple):
    """The steps from one level of subsets to the next, column by column.

    Attributes:
        before: long (n, moves); the subsets that lack the column.
        after: long (n, moves); the same with it.
    """

    before: Tensor
    after: Tensor

    def to(self, device: torch.device) -> Moves:
        """The same on a device."""
        return Moves(self.before.to(device), self.after.to(device))


@functools.lru_cache(maxsize=8)
def moves(n: int) -> tuple[Moves, ...]:
    """Steps to levels 1 to n of the subsets of n columns."""
    out = []
    for level in levels((1,) * n, n):
        order = level.column.flatten().argsort(stable=True)
        before = level.before.flatten()[order].reshape(n, -1)
        out.append(Moves(before, (order % level.states).to(torch.int32).reshape(n, -1)))
    return tuple(out)

"""Cycles of rows that take each other's columns, drawn so that every allowed one has a chance.

From a permutation, row x may take the column of row y where the mask allows it: a directed graph on the rows. A directed
cycle of it is a move, each row taking the column of the next, and any two permutations of the mask differ by disjoint
cycles. So a proposal that can draw every cycle reaches all of them, whatever the mask.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bools = NDArray[np.bool_]
Longs = NDArray[np.int64]


def propose_cycle(index: Tensor, allowed: Tensor) -> tuple[Tensor, float] | None:
    """Draw a cycle by a walk that avoids itself and closes, where it may, with probability one half.

    Args:
        index: permutation, long (n,).
        allowed: bool (n, n).

    Returns:
        The permutation after the move and the log of the proposal's probability backward over forward; None where the walk
        came to an end without closing.
    """
    taken = index.cpu().numpy()
    edges = allowed.cpu().numpy()[:, taken]  # [x, y]: x may take the column of y
    n = len(taken)
    np.fill_diagonal(edges, False)
    uniform = torch.rand(2 * n + 1, dtype=torch.float64).tolist()
    start = min(int(uniform[0] * n), n - 1)
    free = np.ones(n, dtype=bool)
    free[start] = False
    path = [start]
    while True:
        here, t = path[-1], len(path)
        options = (edges[here] & free).nonzero()[0]
        closes = t > 1 and bool(edges[here, start])
        if closes and (not len(options) or uniform[2 * t - 1] < 0.5):
            break
        if not len(options):
            return None
        following = int(options[min(int(uniform[2 * t] * len(options)), len(options) - 1)])
        free[following] = False
        path.append(following)
    cycle = np.array(path)
    new = taken.copy()
    new[cycle] = taken[np.roll(cycle, -1)]
    forward = _log_probability(cycle, edges)
    backward_edges = allowed.cpu().numpy()[:, new]
    np.fill_diagonal(backward_edges, False)
    return torch.from_numpy(new).to(index.device), _log_probability(cycle[::-1], backward_edges) - forward


def _log_probability(cycle: Longs, edges: Bools) -> float:
    """Log-probability, up to the choice of the first row, that the walk draws a cycle from any of its rows."""
    k = len(cycle)
    degree = edges[cycle].sum(1)
    among = edges[cycle[:, None], cycle]
    logs = np.empty(k)
    for first in range(k):
        seen = np.roll(among, (-first, -first), (0, 1))
        options = np.roll(degree, -first) - np.tril(seen, -1).sum(1)
        closes = seen[:, 0].copy()
        closes[0] = False
        # Before its end the walk goes on, which it must where it cannot close; at the end it closes.
        steps = -np.log(options[:-1]) - np.log(2) * closes[:-1]
        logs[first] = steps.sum() - np.log(2) * (options[-1] > 0)
    return float(np.logaddexp.reduce(logs))

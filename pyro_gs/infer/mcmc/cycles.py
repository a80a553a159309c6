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

from pyro_gs.infer.mcmc.chain import Focus

Bools = NDArray[np.bool_]
Longs = NDArray[np.int64]


def move_by_cycles(focus: Focus) -> tuple[int, int]:
    """Propose one cycle for every unit and accept or refuse it by Metropolis-Hastings.

    Where the items depend on each other, the cycle is in one of them, drawn uniformly.

    Returns:
        Numbers of proposals made and accepted.

    Raises:
        ItemsDepend: passed on from ``Focus.evaluate``.
    """
    site = focus.site
    replicas = torch.arange(focus.chain.replicas, device=site.device)[:, None]
    items = focus.draw_items()
    mask = torch.ones(1, site.n, site.n, dtype=torch.bool, device=site.device) if site.allowed is None else site.allowed
    which = torch.zeros_like(items) if site.allowed is None else items
    new, ratio = propose_cycles(focus.index[replicas, items].flatten(0, 1), mask, which.flatten())
    made = focus.unit_shape.numel()
    if bool((ratio == -torch.inf).all()):
        return made, 0
    candidates = focus.index.clone()
    candidates[replicas, items] = new.reshape(*items.shape, site.n)
    scores, terms = focus.evaluate(candidates[None])
    ratio = ratio.reshape(focus.unit_shape)
    taken = torch.rand_like(ratio).log() < scores[0] - focus.score + ratio
    focus.accept(torch.zeros_like(items), candidates[None], terms, taken)
    return made, int(taken.sum())


def propose_cycles(index: Tensor, allowed: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Draw cycles by walks that avoid themselves and close, where they may, with probability one half.

    Args:
        index: permutations, long (B, n).
        allowed: masks, bool (items, n, n).
        items: which of the masks each permutation obeys, long (B,).

    Returns:
        The permutations after the move, long (B, n), and the log of the proposal's probability backward over forward,
        float64 (B,): ``-inf``, with the permutation as it was, where the walk came to an end without closing.
    """
    taken, mask, item = index.cpu().numpy(), allowed.cpu().numpy(), items.cpu().numpy()
    path, length = _walk(taken, mask, item)
    found = length.nonzero()[0]
    new, ratio = taken.copy(), np.full(len(taken), -np.inf)
    if len(found):
        length, item = length[found], item[found]
        path = path[found, : int(length.max())]
        place = np.arange(path.shape[1])
        inside = place < length[:, None]
        follows = np.take_along_axis(path, (place + 1) % length[:, None], 1)
        owner = np.broadcast_to(found[:, None], path.shape)
        new[owner[inside], path[inside]] = taken[owner[inside], follows[inside]]
        backward = np.take_along_axis(path, (length[:, None] - 1 - place) % length[:, None], 1)
        ratio[found] = _log_probability(backward, length, new[found], mask, item) - _log_probability(
            path, length, taken[found], mask, item
        )
    return torch.from_numpy(new).to(index.device), torch.from_numpy(ratio).to(index.device)


def _walk(taken: Longs, mask: Bools, item: Longs) -> tuple[Longs, Longs]:
    """The rows of each walk, (B, n), and its length, 0 where it did not close."""
    size, n = taken.shape
    path, length = np.zeros_like(taken), np.zeros(size, dtype=np.int64)
    free = np.ones((size, n), dtype=bool)
    start = np.minimum((torch.rand(size, dtype=torch.float64, device="cpu").numpy() * n).astype(np.int64), n - 1)
    path[:, 0] = start
    walking = np.arange(size)
    free[walking, start] = False
    for t in range(1, n + 1):
        reach = np.take_along_axis(mask[item[walking], path[walking, t - 1]], taken[walking], 1)
        closes = reach[np.arange(len(walking)), start[walking]] & (t > 1)
        options = (reach & free[walking]).cumsum(1)
        count = options[:, -1]
        close, step = torch.rand(2, len(walking), dtype=torch.float64, device="cpu").numpy()
        ends = closes & ((count == 0) | (close < 0.5))
        length[walking[ends]] = t
        goes = ~ends & (count > 0)
        walking, options, count = walking[goes], options[goes], count[goes]
        if not len(walking):
            break
        chosen = np.minimum((step[goes] * count).astype(np.int64), count - 1)
        following = (options > chosen[:, None]).argmax(1)
        path[walking, t] = following
        free[walking, following] = False
    return path, length


def _log_probability(path: Longs, length: Longs, taken: Longs, mask: Bools, item: Longs) -> NDArray[np.float64]:
    """Log-probabilities, up to the choice of the first row, that the walk draws cycles from any of their rows.

    Args:
        path: rows of the cycles, (B, L); what lies beyond ``length`` is ignored.
        length: number of rows, (B,).
        taken: permutations before the move, (B, n).
        mask: (items, n, n).
        item: (B,).
    """
    place = np.arange(path.shape[1])
    inside = place < length[:, None]
    columns = np.take_along_axis(taken, path, 1)
    among = mask[item[:, None, None], path[:, :, None], columns[:, None, :]]  # [i, j]: row i of the path may follow to j
    among = among & inside[:, :, None] & inside[:, None, :] & (place[:, None] != place)
    degree = mask[item[:, None], path].sum(-1) - 1  # all columns but its own
    # Of the rows that i may follow to, those are gone that the walk from row f has met: f, ..., i in cyclic order.
    upto = among.cumsum(2)
    own = upto[:, place, place]
    met = own[:, :, None] - (upto - among) + np.where(place > place[:, None], upto[:, :, -1:], 0)
    options = degree[:, :, None] - met  # [i, f]
    last = (place[:, None] - place + 1) % length[:, None, None] == 0
    going = inside[:, :, None] & inside[:, None, :] & ~last
    # Before its end the walk goes on, which it must where it cannot close; at the end it closes.
    steps = np.where(going, -np.log(np.where(going, options, 1)) - np.log(2) * among, 0.0).sum(1)
    steps -= np.log(2) * (last & (options > 0) & inside[:, :, None]).sum(1)
    result: NDArray[np.float64] = np.logaddexp.reduce(np.where(inside, steps, -np.inf), 1)
    return result

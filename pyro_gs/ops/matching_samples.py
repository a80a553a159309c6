r"""Draws from ``p(P) ~ exp <X, P>`` over permutations.

Exact for components of at most 20 rows, by walking back through the recursion over subsets, and for those whose
entries are all equal. Larger ones by Markov chain Monte Carlo from the matching of ``X + eps`` with Gumbel noise:

- without a forbidden entry, block Gibbs: each of 50 sweeps parts the rows at random into blocks of eight and draws, exactly,
  how each block shares out the columns that it holds;
- with forbidden entries, where blocks need not be connected, the chain of Jerrum and Sinclair (1989) over perfect and
  near-perfect matchings, watched at the perfect ones, for ``10 n`` of those.

The stationary law of either is exact; a finite run is close to it. But blocks of eight rows do not cross between modes of
sharp logits that differ by a longer cycle: the shares of such modes stay near those of the start.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.matching import solve_assignment
from pyro_gs.ops.permanent import EXACT_LIMIT, balance, distinct, in_chunks, subset_tables
from pyro_gs.ops.subsets import choose, levels
from pyro_gs.ops.support import Support, blocks

_SWEEPS = 50
_BLOCK = 8
_VISITS = 10  # for every row
_AT_ONCE = 2**22  # numbers in the choices of what is drawn at once


@torch.no_grad()
def sample_matchings(logits: Tensor, support: Support, count: int) -> Tensor:
    """Index form of draws, long (count, ..., n).

    Args:
        logits: shape (..., n, n), checked.
        support: of them.
        count: number of draws of every batch item.
    """
    shape = (count, *logits.shape[:-1])
    x, support, batch = distinct(logits, support)
    total = math.prod(batch)  # a shape is a plain tuple while Pyro tracks provenance
    copies = total // max(1, math.prod(x.shape[:-2]))
    n, items = x.shape[-1], math.prod(x.shape[:-2])
    if count == 0 or total == 0:
        return torch.zeros(shape, dtype=torch.long, device=logits.device)
    z = balance(x, support)
    out = torch.empty(count * copies, items, n, dtype=torch.long, device=logits.device)
    for block in blocks(support, x.device):
        index = _draw(block.of(x), block.of(z), count * copies)
        chosen = block.columns.expand(index.shape).gather(-1, index)
        out[:, block.item[:, None], block.rows] = chosen
    # Items that were expanded have draws of their own: bring their dimensions to where they belong.
    expanded = [dim for dim in range(len(batch)) if x.shape[dim] != batch[dim]]
    out = out.reshape(count, *(batch[dim] for dim in expanded), *x.shape[:-1])
    return _place(out, expanded, len(batch)).reshape(shape)


def _place(out: Tensor, expanded: list[int], dims: int) -> Tensor:
    """Move the dimensions 1, 2, ... of copies to the batch dimensions (of size one) that they stand for."""
    k = len(expanded)
    order = [0]
    for dim in range(dims):
        order.append(1 + expanded.index(dim) if dim in expanded else 1 + k + dim)
    order.append(1 + k + dims)
    order += [1 + k + dim for dim in expanded]  # of size one, last
    return out.permute(order)


def _draw(x: Tensor, z: Tensor, count: int) -> Tensor:
    """Draws of components (g, s, s), balanced as ``z``: long (count, g, s)."""
    size = x.shape[-1]
    flat = (x == x[:, :1, :1]).all(-1).all(-1)
    out = torch.empty(count, len(x), size, dtype=torch.long, device=x.device)
    if bool(flat.any()):
        out[:, flat] = torch.rand(count, int(flat.sum()), size, device=x.device).argsort(-1)
    rest = (~flat).nonzero()[:, 0]
    if len(rest) == 0:
        return out
    if size <= EXACT_LIMIT:
        parts = in_chunks(z[rest])
        out[:, rest] = torch.cat([draw_exactly(part.exp(), count) for part in parts], 1)
        return out
    for item in rest.tolist():
        if bool((x[item] > -torch.inf).all()):
            out[:, item] = draw_by_blocks(z[item], count)
        else:
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
            draws = [draw_by_chain(z[item].exp().cpu().numpy(), rng) for _ in range(count)]
            out[:, item] = torch.from_numpy(np.stack(draws)).to(x.device)
    return out


def draw_exactly(a: Tensor, count: int) -> Tensor:
    """Exact draws for scaled matrices (b, n, n), n at most 20: long (count, b, n).

    Walks back through the recursion over subsets, the last row first.
    """
    b, n, _ = a.shape
    tables = subset_tables(a, n - 1)
    steps = [level.to(a.device) for level in levels((1,) * n, n)]
    items = torch.arange(b, device=a.device)
    out = torch.empty(count, b, n, dtype=torch.long, device=a.device)
    per_turn = max(1, _AT_ONCE // (n * b))
    for start in range(0, count, per_turn):
        draws = out[start : start + per_turn]
        state = torch.zeros(draws.shape[:2], dtype=torch.long, device=a.device)
        for row in range(n - 1, -1, -1):
            column = steps[row].column[:, state].long()
            before = steps[row].before[:, state].long()
            pick = choose(a[items, row, column] * tables[row][before, items])[None]
            draws[..., row] = column.gather(0, pick)[0]
            state = before.gather(0, pick)[0]
    return out


def draw_by_blocks(z: Tensor, count: int) -> Tensor:
    """Block Gibbs draws for one matrix (n, n) without a forbidden entry: long (count, n)."""
    n = len(z)
    column_of = solve_assignment(z + gumbel_noise(torch.Size((count, n, n)), z))
    whole = n - n % _BLOCK
    for _ in range(_SWEEPS):
        order = torch.rand(count, n, device=z.device).argsort(-1)
        for rows in (order[:, :whole].reshape(count, -1, _BLOCK), order[:, -_BLOCK:].reshape(count, 1, _BLOCK)):
            columns = column_of.gather(1, rows.flatten(1)).reshape(rows.shape)
            part = z[rows[..., :, None], columns[..., None, :]].flatten(0, 1)
            part = balance(part, Support(part.shape))
            index = torch.cat([draw_exactly(p.exp(), 1)[0] for p in in_chunks(part)]).reshape(rows.shape)
            column_of.scatter_(1, rows.flatten(1), columns.gather(-1, index).flatten(1))
    return column_of


def draw_by_chain(a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One draw for a scaled matrix (n, n) whose allowed entries are connected: index form, (n,).

    The chain of Jerrum and Sinclair, a near-perfect matching having the mean allowed entry in place of the missing one,
    watched only while its matching is perfect. Over all states together its law is the product of the entries, and so is
    that of the watched chain over the perfect ones; stopping at the first perfect matching after a fixed time would be
    biased.
    """
    n = len(a)
    edges = np.argwhere(a > 0).tolist()
    missing = n / len(edges)
    with np.errstate(divide="ignore"):
        scores = np.log(a) + rng.gumbel(size=a.shape)
    column_of = solve_assignment(torch.from_numpy(scores)).tolist()
    row_of = [0] * n
    for i, j in enumerate(column_of):
        row_of[j] = i
    free_row = free_column = -1
    weight = a.tolist()
    left = _VISITS * n
    while True:
        picks = zip(rng.integers(len(edges), size=4096).tolist(), rng.random(4096).tolist(), strict=True)
        for pick, level in picks:
            i, j = edges[pick]
            if free_row < 0:  # perfect: drop the pair if it is matched
                left -= 1
                if left == 0:
                    return np.array(column_of)
                if column_of[i] == j and level * weight[i][j] < missing:
                    column_of[i], row_of[j], free_row, free_column = -1, -1, i, j
            elif i == free_row and j == free_column:
                if level * missing < weight[i][j]:
                    column_of[i], row_of[j], free_row, free_column = j, i, -1, -1
            elif i == free_row:  # slide: j leaves its row
                k = row_of[j]
                if level * weight[k][j] < weight[i][j]:
                    column_of[i], row_of[j], column_of[k], free_row = j, i, -1, k
            elif j == free_column:
                k = column_of[i]
                if level * weight[i][k] < weight[i][j]:
                    column_of[i], row_of[j], row_of[k], free_column = j, i, -1, k

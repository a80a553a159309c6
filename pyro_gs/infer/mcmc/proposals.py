"""How pairs of rows are drawn that exchange their columns: uniformly, or as the warm-up has shown."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_gs.infer.log_joint import PermutationSite
from pyro_gs.infer.mcmc.swaps import exchange, possible_pairs

_FIRST_BUILD = 64
_SMOOTHING = 0.1


class UniformSwaps:
    """Uniform over the pairs that can ever be exchanged, which is symmetric.

    Args:
        site: whose rows they are.
    """

    def __init__(self, site: PermutationSite) -> None:
        self._site = site
        self._pairs, self._counts = possible_pairs(site.allowed, site.num_items, site.n, site.device)
        self._ends = self._counts.cumsum(0)
        self._all: dict[tuple[int, bool], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def movable(self, independent: bool) -> Tensor:
        """Which units have an exchange at all, bool (items,) or, where items depend, (1,)."""
        return self._counts > 0 if independent else (self._ends[-1:] > 0)

    def longest(self, independent: bool) -> int:
        """Number of exchanges that a unit has at most."""
        return self._pairs.shape[1] if independent else int(self._ends[-1])

    def table(self, index: Tensor, independent: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All exchanges of every unit.

        Args:
            index: long (replicas, items, n).
            independent: whether each item is a unit.

        Returns:
            Items, long (L, replicas, units); rows, long (L, replicas, units, 2), the same row twice where a unit has
            fewer; log-probabilities of drawing them, and of drawing the way back, float64 (L, replicas, units).
        """
        replicas, num_items = index.shape[:2]
        if (replicas, independent) not in self._all:
            self._all[replicas, independent] = self._list(replicas, num_items, independent)
        return self._all[replicas, independent]

    def _list(self, replicas: int, num_items: int, independent: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        real = torch.arange(self._pairs.shape[1], device=self._pairs.device) < self._counts[:, None]
        items, place = torch.ones_like(real).nonzero(as_tuple=True) if independent else real.nonzero(as_tuple=True)
        rows = self._pairs[items, place]
        if independent:
            items, rows = items.reshape(num_items, -1).T, rows.reshape(num_items, -1, 2).transpose(0, 1)
        else:
            items, rows = items[:, None], rows[:, None]
        items = items[:, None].expand(len(items), replicas, items.shape[1])
        rows = rows[:, None].expand(*items.shape, 2)
        each = self._counts[items] if independent else self._ends[-1].expand(items.shape)
        flat = -each.to(torch.float64).log()
        return items, rows, flat, flat

    def draw(self, index: Tensor, count: int, independent: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Draw exchanges, each from the same permutations.

        Args:
            index: long (replicas, items, n).
            count: number K of exchanges for each unit.
            independent: whether each item is a unit; else an item is drawn too.

        Returns:
            Items, long (K, replicas, units); rows, long (K, replicas, units, 2), the same row twice for none; log of the
            probability backward over forward, float64 (K, replicas, units).
        """
        replicas, num_items = index.shape[:2]
        shape = (count, replicas, num_items if independent else 1)
        uniform = torch.rand(shape, dtype=torch.float64, device=index.device)
        if independent:
            items = torch.arange(num_items, device=index.device).expand(shape)
            place = (uniform * self._counts).long()
        else:
            flat = (uniform * self._ends[-1]).long()
            items = torch.searchsorted(self._ends, flat, right=True)
            place = flat - (self._ends - self._counts)[items]
        return items, self._pairs[items, place], torch.zeros_like(uniform)


class AdaptedSwaps(UniformSwaps):
    """A row by how unsure it is, and a column for it by how often it had it; uniform until it has seen enough.

    A row a is drawn with probability r_a and a column j with probability w_aj; the row that holds j is the other one. The
    same exchange arises from either row, so forward it has ``r_a w_a,P(b) + r_b w_b,P(a)`` and backward
    ``r_a w_a,P(a) + r_b w_b,P(b)``.
    """

    def __init__(self, site: PermutationSite) -> None:
        super().__init__(site)
        self._hits = torch.zeros(site.num_items, site.n, site.n, dtype=torch.float64, device=site.device)
        self._draws = 0
        self._rows: Tensor | None = None

    def observe(self, index: Tensor, *, last: bool) -> None:
        """Take in a state of the warm-up (items, n); ``last`` ends the adaptation."""
        self._hits.scatter_add_(-1, index[..., None], torch.ones_like(self._hits[..., :1]))
        self._draws += 1
        if last or (self._draws >= _FIRST_BUILD and math.log2(self._draws).is_integer()):
            self._build()
            self._hits *= 0.5  # what is older counts less

    def _build(self) -> None:
        site = self._site
        mask = torch.ones_like(self._hits, dtype=torch.bool) if site.allowed is None else site.allowed
        flat = mask / mask.sum(-1, keepdim=True)
        seen = self._hits / self._hits.sum(-1, keepdim=True)
        self._columns = (1 - _SMOOTHING) * seen + _SMOOTHING * flat
        can = torch.zeros_like(mask[..., 0])
        for item, (pairs, count) in enumerate(zip(self._pairs, self._counts.tolist(), strict=True)):
            can[item, pairs[:count].flatten()] = True
        weight = (1 - seen.amax(-1) + _SMOOTHING) * can
        total = weight.sum(-1, keepdim=True)
        self._rows = torch.where(total > 0, weight / total, 1 / site.n)

    def table(self, index: Tensor, independent: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`UniformSwaps.table`."""
        items, rows, forward, backward = super().table(index, independent)
        if self._rows is None:
            return items, rows, forward, backward
        now = self._of_items(index.expand(len(items), *index.shape), items, independent)
        share = torch.zeros_like(forward) if independent else (self._counts[items] / self._ends[-1]).log()
        forward = share + self._probability(items, now, rows).log()
        return items, rows, forward, share + self._probability(items, exchange(now, rows), rows).log()

    @staticmethod
    def _of_items(index: Tensor, items: Tensor, independent: bool) -> Tensor:
        """The permutation of each exchange's item, long (K, replicas, units, n)."""
        return index if independent else index.gather(2, items[..., None].expand(*items.shape, index.shape[-1]))

    def draw(self, index: Tensor, count: int, independent: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`UniformSwaps.draw`."""
        if self._rows is None:
            return super().draw(index, count, independent)
        items, _, ratio = super().draw(index, count, independent)  # items by their numbers of pairs
        now = self._of_items(index.expand(count, *index.shape), items, independent)
        row = _categorical(self._rows[items])
        columns = self._columns[items, row]
        column = _categorical(columns)
        other = (now == column[..., None]).to(torch.uint8).argmax(-1)
        rows = torch.stack([row, other], -1)
        forward = self._probability(items, now, rows)
        backward = self._probability(items, exchange(now, rows), rows)
        return items, rows, torch.where(row == other, ratio, backward.log() - forward.log())

    def _probability(self, items: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        assert self._rows is not None
        first, second = rows.unbind(-1)
        held = index.gather(-1, rows)
        part = self._rows[items, first] * self._columns[items, first, held[..., 1]]
        return part + self._rows[items, second] * self._columns[items, second, held[..., 0]]


def _categorical(probability: Tensor) -> Tensor:
    """A draw of each distribution along the last dimension, by its cumulative sums."""
    ends = probability.cumsum(-1)
    uniform = torch.rand(ends.shape[:-1], dtype=ends.dtype, device=ends.device)[..., None] * ends[..., -1:]
    return (ends <= uniform).sum(-1).clamp(max=ends.shape[-1] - 1)

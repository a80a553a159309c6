"""How pairs of rows are drawn that exchange their columns: uniformly, or as the warm-up has shown."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from pyro_gs.infer.log_joint import PermutationSite
from pyro_gs.infer.mcmc.swaps import exchange, possible_pairs

_FIRST_BUILD = 64
_SMOOTHING = 0.1


class SwapProposal(Protocol):
    """A law of exchanges given the permutations."""

    def movable(self, independent: bool) -> Tensor:
        """Which units have an exchange at all, bool (items,) or, where items depend, (1,)."""

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


class UniformSwaps:
    """Uniform over the pairs that can ever be exchanged, which is symmetric."""

    def __init__(self, site: PermutationSite) -> None:
        self._site = site
        self._pairs, self._counts = possible_pairs(site.allowed, site.num_items, site.n, site.device)
        self._ends = self._counts.cumsum(0)

    def movable(self, independent: bool) -> Tensor:
        """As :class:`SwapProposal`."""
        return self._counts > 0 if independent else (self._ends[-1:] > 0)

    def draw(self, index: Tensor, count: int, independent: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As :class:`SwapProposal`."""
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

    def draw(self, index: Tensor, count: int, independent: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As :class:`SwapProposal`."""
        if self._rows is None:
            return super().draw(index, count, independent)
        items, _, ratio = super().draw(index, count, independent)  # items by their numbers of pairs
        now = (
            index.expand(count, *index.shape)
            if independent
            else index.expand(count, *index.shape).gather(2, items[..., None].expand(*items.shape, index.shape[-1]))
        )
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

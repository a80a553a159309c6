"""Exchanges from one state with what they change, by a hook or by running the model."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gs.infer.log_joint import PermutationSite, Terms
from pyro_gs.infer.mcmc.chain import Focus
from pyro_gs.infer.mcmc.swaps import SwapDelta, exchange, score_swaps


def is_good(site: PermutationSite, index: Tensor, items: Tensor, rows: Tensor) -> Tensor:
    """Which exchanges are of two rows and allowed, bool (K, replicas, units)."""
    good = rows[..., 0] != rows[..., 1]
    if site.allowed is None:
        return good
    replica = torch.arange(items.shape[1], device=items.device)[:, None]
    columns = index[replica[..., None], items[..., None], rows.flip(-1)]
    return good & site.allowed[items[..., None], rows, columns].all(-1)


def exchanged(index: Tensor, items: Tensor, rows: Tensor) -> Tensor:
    """Permutations after exchanges, each alone, long (K, replicas, items, n).

    Args:
        index: permutations before, long (replicas, items, n).
        items: long (K, replicas, units).
        rows: long (K, replicas, units, 2).
    """
    index = index.expand(len(items), *index.shape)
    if items.shape[2] == index.shape[2]:  # every unit is an item
        return exchange(index, rows)
    places = items[..., None].expand(*items.shape, index.shape[-1])
    return index.scatter(2, places, exchange(index.gather(2, places), rows))


class ScoredSwaps:
    """Exchanges from one state and their gains.

    Args:
        focus: the site.
        items: item of each exchange, long (K, replicas, units).
        rows: the two rows, long (K, replicas, units, 2).
        good: which to score, bool (K, replicas, units).
        hook: scores them for a single replica; without it the model does.
        state: permutations (replicas, items, n) that the exchanges start from and the scores of their units; by default
            the present ones.

    Attributes:
        gain: change of the units' scores, float64 (K, replicas, units), ``-inf`` where not good.
    """

    def __init__(
        self,
        focus: Focus,
        items: Tensor,
        rows: Tensor,
        good: Tensor,
        hook: SwapDelta | None,
        state: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.items, self.rows = items, rows
        index, score = (focus.index, focus.score) if state is None else state
        self._terms: Terms | None = None
        if hook is None or focus.chain.replicas > 1:
            self._candidates = exchanged(index, items, torch.where(good[..., None], rows, 0))
            scores, self._terms = focus.evaluate(self._candidates)
            self.gain = torch.where(good, scores - score, -torch.inf)
            return
        now = None if state is None else index[0]
        if bool(good.all()):
            self.gain = score_swaps(hook, focus, items.reshape(-1), rows.reshape(-1, 2), now).reshape(good.shape)
        else:
            self.gain = torch.full(good.shape, -torch.inf, dtype=torch.float64, device=good.device)
            if bool(good.any()):
                self.gain[good] = score_swaps(hook, focus, items[good], rows[good], now)

    def take(self, focus: Focus, chosen: Tensor, units: Tensor) -> None:
        """Let units of the present state take the exchanges chosen (replicas, units)."""
        if self._terms is not None:
            focus.accept(chosen, self._candidates, self._terms, units)
            return
        unit = units[0].nonzero()[:, 0]
        place = chosen[0, unit]
        focus.exchange(self.items[place, 0, unit], self.rows[place, 0, unit], self.gain[place, 0, unit])

    def replace(self, other: ScoredSwaps, units: Tensor) -> None:
        """Take over the gains of the same exchanges from another state for some units, bool (replicas, units)."""
        self.gain = torch.where(units, other.gain, self.gain)
        if self._terms is not None and other._terms is not None:
            self._candidates = torch.where(units[..., None], other._candidates, self._candidates)
            inside = torch.where(units, other._terms.inside, self._terms.inside)
            self._terms = Terms(inside, torch.where(units[:, 0], other._terms.outside, self._terms.outside))

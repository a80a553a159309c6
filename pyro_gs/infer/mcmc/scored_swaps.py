"""Exchanges from one state with what they change, by a hook or by running the model."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gs.infer.log_joint import PermutationSite, Terms
from pyro_gs.infer.mcmc.chain import Focus
from pyro_gs.infer.mcmc.swaps import SwapDelta, exchange, score_swaps

_HOOKED = 32
"""Most replicas for which a hook is asked one by one; for more, one run of the model takes less time."""


def takes_hook(focus: Focus, hook: SwapDelta | None) -> bool:
    """Whether exchanges are scored by the hook rather than by the model.

    A hook gives changes of the joint density. Where the likelihood has a power other than one they must all be changes of
    the likelihood, so only a flat prior will do; and at power zero a chain may reach permutations of likelihood zero,
    from which there are no changes.
    """
    chain = focus.chain
    if hook is None or chain.replicas > _HOOKED:
        return False
    return not chain.tempered or (chain.joint.flat_prior and chain.positive and bool(focus.likelihood.isfinite().all()))


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
        hook: scores them where :func:`takes_hook`; else the model does.
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
        if hook is not None and takes_hook(focus, hook):
            self._change = self._ask(hook, focus, good, None if state is None else index)
            self.gain = self._change
            if not focus.chain.tempered:
                return
            focus.chain.positive = not bool((self._change[good] == -torch.inf).any())
            if focus.chain.positive:
                self.gain = torch.where(good, focus.temper(self._change), -torch.inf)
                return
        self._candidates = exchanged(index, items, torch.where(good[..., None], rows, 0))
        scores, self._terms = focus.evaluate(self._candidates)
        self.gain = torch.where(good, scores - score, -torch.inf)

    def _ask(self, hook: SwapDelta, focus: Focus, good: Tensor, index: Tensor | None) -> Tensor:
        """Changes by the hook, float64 (K, replicas, units), ``-inf`` where not good."""
        if good.shape[1] == 1 and bool(good.all()):
            now = None if index is None else index[0]
            return score_swaps(hook, focus, self.items.reshape(-1), self.rows.reshape(-1, 2), now).reshape(good.shape)
        out = torch.full(good.shape, -torch.inf, dtype=torch.float64, device=good.device)
        for replica in range(good.shape[1]):
            part = good[:, replica]
            if bool(part.any()):
                items, rows = self.items[:, replica][part], self.rows[:, replica][part]
                now = None if index is None else index[replica]
                out[:, replica][part] = score_swaps(hook, focus, items, rows, now, replica)
        return out

    def take(self, focus: Focus, chosen: Tensor, units: Tensor) -> None:
        """Let units of the present state take the exchanges chosen (replicas, units)."""
        if self._terms is not None:
            focus.accept(chosen, self._candidates, self._terms, units)
            return
        replica, unit = units.nonzero(as_tuple=True)
        place = (chosen[replica, unit], replica, unit)
        focus.exchange(replica, self.items[place], self.rows[place], self._change[place])

    def replace(self, other: ScoredSwaps, units: Tensor) -> None:
        """Take over the gains of the same exchanges from another state for some units, bool (replicas, units)."""
        self.gain = torch.where(units, other.gain, self.gain)
        if self._terms is None and other._terms is None:
            self._change = torch.where(units, other._change, self._change)
        if self._terms is not None and other._terms is not None:
            self._candidates = torch.where(units[..., None], other._candidates, self._candidates)
            inside = torch.where(units, other._terms.inside, self._terms.inside)
            self._terms = Terms(inside, torch.where(units[:, 0], other._terms.outside, self._terms.outside))

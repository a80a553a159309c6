"""Informed proposals: exchanges drawn by how much they change the log joint density (Zanella 2020)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_gs.infer.log_joint import LogJoint, PotentialJoint
from pyro_gs.infer.mcmc.chain import Focus
from pyro_gs.infer.mcmc.cycles import move_by_cycles
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel
from pyro_gs.infer.mcmc.proposals import UniformSwaps
from pyro_gs.infer.mcmc.scored_swaps import ScoredSwaps, exchanged, is_good
from pyro_gs.infer.mcmc.swaps import SwapDelta, check_swap_delta
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.logits import check_count

Balance = Literal["sqrt", "barker"]
Score = Literal["auto", "exact", "gradient"]

_BALANCES: dict[str, Callable[[Tensor], Tensor]] = {"sqrt": lambda log_t: log_t / 2, "barker": logsigmoid}
"""Logarithms of functions with g(t) = t g(1/t), of log t."""


_REST = 0.1
"""Probability that a unit makes no proposal. Every exchange changes the parity of a permutation, so where all are accepted,
as on a flat target, the chain would have period two; resting costs no scores."""


class LocallyBalanced(PermutationKernel):
    r"""Metropolis-Hastings whose proposals know the target: likely exchanges are proposed more often.

    From a permutation x all exchanges of two rows' columns that are allowed are scored, and one is proposed with
    probability proportional to ``g(p(y) / p(x))``, for a balancing function, ``g(t) = t g(1 / t)``. The acceptance ratio
    is then the ratio of the normalizers of the two proposals, which is near one where they are alike. The scores of the
    state reached are those of the next step, so a proposal costs one table of scores. Where pairs are forbidden, cycles
    are proposed too, as in :class:`SwapMetropolis`, because exchanges alone need not reach all permutations of a mask.

    The scores change how well the chain moves, not what it converges to: the acceptance ratio is always exact.

    - By a ``swap_delta`` hook, where there is one: exact, and the cheapest.
    - ``"exact"``: the model is run on all n (n - 1) / 2 permutations, n^2 numbers each, in batches.
    - ``"gradient"``: one backward pass, whatever n, for large n without a hook. It is the first-order change, which is the
      exact one only where the model is written linear in the matrices, such as ``(P * logits).sum((-1, -2))``; write it so
      where you can. A Gaussian about ``P @ x`` is linear in effect, but its gradient misses minus half the squared change;
      one about ``P W P^T`` misses more, and where it is sharp uniform proposals can do better. Of the laws of this library
      as priors, only that of ``GibbsPermutation`` has a gradient; the scores do not see the others.

    Effective draws of 1,000 for n = 12, and the distance from the posterior for n = 5, 30 steps after a uniform start (by
    ``benchmarks/informed.py``):

    ===================  ===========  ===========  ==============
    log density          uniform      exact        gradient
    ===================  ===========  ===========  ==============
    linear               23, .051     90, .027     113, .023
    ``P @ x``            23, .051     90, .027     59, .049
    ``P W P^T``          18, .160     78, .050     94, .106
    the same, sharp      8, .360      60, .256     14, .425
    ===================  ===========  ===========  ==============

    Source: Zanella (2020), Informed proposals for local MCMC in discrete spaces, JASA 115; by gradients as in Grathwohl et
    al. (2021), Oops I took a gradient, ICML.

    Args:
        model: as in :class:`PermutationKernel`.
        potential_fn: as in :class:`PermutationKernel`.
        balance: ``"sqrt"``, or ``"barker"``, ``t / (1 + t)``, which is bounded and so less drawn to the best exchange.
        score: ``"auto"`` for the hook or, without one, exactly; ``"exact"``; ``"gradient"``.
        sites: as in :class:`PermutationKernel`.
        num_steps: proposals of exchanges in a step, of every item where items are independent given the rest, else of the
            site as a whole; by default one for each item. One in ten is left out, at random, because every exchange
            changes the parity of the permutation.
        num_cycles: as in :class:`SwapMetropolis`.
        swap_delta: as in :class:`SwapMetropolis`.
        allowed: as in :class:`PermutationKernel`.
        vectorize: as in :class:`PermutationKernel`.
        jit_compile: not supported.

    Raises:
        ValueError: as :class:`PermutationKernel`; an unknown ``balance`` or ``score``; a ``swap_delta`` with
            ``score="exact"``; ``num_steps`` below 1, ``num_cycles`` below 0; at set-up, a hook that disagrees with the
            model; with ``score="gradient"``, a log joint density without a finite gradient.

    Example:
        >>> import pyro, torch, pyro_gs as pgs
        >>> from pyro.infer import MCMC
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.factor("likelihood", 2 * P.diagonal(dim1=-2, dim2=-1).sum(-1))
        >>> mcmc = MCMC(LocallyBalanced(model), num_samples=50, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["P"].shape
        torch.Size([50, 3, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        balance: Balance = "sqrt",
        score: Score = "auto",
        sites: Sequence[str] | None = None,
        num_steps: int | None = None,
        num_cycles: int | None = None,
        swap_delta: SwapDelta | None = None,
        allowed: Tensor | Mapping[str, Tensor] | None = None,
        vectorize: bool | None = None,
        jit_compile: bool = False,
    ) -> None:
        super().__init__(model, potential_fn, sites=sites, allowed=allowed, vectorize=vectorize, jit_compile=jit_compile)
        if balance not in _BALANCES:
            raise ValueError(f"balance must be one of {', '.join(map(repr, _BALANCES))}, but is {balance!r}")
        if score not in ("auto", "exact", "gradient"):
            raise ValueError(f"score must be one of 'auto', 'exact', 'gradient', but is {score!r}")
        if num_steps is not None:
            check_count(num_steps, "num_steps", least=1)
        if num_cycles is not None:
            check_count(num_cycles, "num_cycles", least=0)
        if swap_delta is not None and not callable(swap_delta):
            raise TypeError(f"swap_delta must be callable, but is {type(swap_delta).__name__}")
        if swap_delta is not None and score == "exact":
            raise ValueError("score='exact' runs the model and has no use for swap_delta; leave out one of them")
        self._balance = balance
        self._score = score
        self._num_steps = num_steps
        self._num_cycles = num_cycles
        self._swap_delta = swap_delta
        self._proposals: dict[str, UniformSwaps] = {}
        self._tables: dict[str, _Table] = {}

    def prepare(self, focus: Focus) -> None:
        """List the exchanges; compare the hook with the model."""
        hook = self._hook(focus.chain.joint)
        if hook is not None:
            check_swap_delta(hook, focus)
        self._proposals[focus.site.name] = UniformSwaps(focus.site)
        self._tables.pop(focus.site.name, None)

    def _hook(self, joint: LogJoint | PotentialJoint) -> SwapDelta | None:
        if self._score == "exact":
            return None
        return joint.swap_delta if self._swap_delta is None else self._swap_delta

    def move(self, focus: Focus) -> tuple[int, int]:
        """Exchanges, then cycles."""
        cycles = self._num_cycles if self._num_cycles is not None else focus.default_cycles
        made = accepted = 0
        for _ in range(self._num_steps or focus.items_per_unit):
            more, taken = self._exchange(focus)
            made, accepted = made + more, accepted + taken
        for _ in range(cycles):
            more, taken = move_by_cycles(focus)
            made, accepted = made + more, accepted + taken
        return made, accepted

    def cleanup(self) -> None:
        """As :meth:`PermutationKernel.cleanup`."""
        super().cleanup()
        self._tables.clear()

    def _exchange(self, focus: Focus) -> tuple[int, int]:
        """One informed proposal for every unit that has an exchange to make."""
        if not self._proposals[focus.site.name].longest(focus.independent):
            return 0, 0
        hook = self._hook(focus.chain.joint)
        here = self._tables.get(focus.site.name)
        if here is None or not here.is_of(focus):
            here = self._tabulate(focus, hook)
        self._tables[focus.site.name] = here
        active = (here.total > -torch.inf) & (torch.rand_like(here.total) >= _REST)
        if not bool(active.any()):
            return 0, 0
        made = int(active.sum())
        chosen = (here.log_weights + gumbel_noise(here.log_weights.shape, here.log_weights)).argmax(0, keepdim=True)
        items, rows, _, _ = self._proposals[focus.site.name].table(focus.index, focus.independent)
        items, rows = items.gather(0, chosen), rows.gather(0, chosen[..., None].expand(*chosen.shape, 2))
        if here.found is None:
            found, place = ScoredSwaps(focus, items, rows, active[None], hook), torch.zeros_like(chosen)
        else:
            found, place = here.found, chosen
        gain = found.gain.gather(0, place)[0]
        live = active & (gain > -torch.inf)
        if not bool(live.any()):
            return made, 0
        index = exchanged(focus.index, items, torch.where(live[..., None], rows, 0))[0]
        there = self._tabulate(focus, hook, (index, focus.score + torch.where(live, gain, 0)))
        ratio = gain + there.log_probability(chosen) - here.log_probability(chosen)
        taken = live & (torch.rand_like(ratio).log() < ratio)
        accepted = int(taken.sum())
        if accepted:
            found.take(focus, place[0], taken)
            here.replace(there, taken, focus.index)
        return made, accepted

    def _tabulate(self, focus: Focus, hook: SwapDelta | None, state: tuple[Tensor, Tensor] | None = None) -> _Table:
        """Weights of all exchanges from the present state or another one, given as for :class:`ScoredSwaps`."""
        index = focus.index if state is None else state[0]
        items, rows, _, _ = self._proposals[focus.site.name].table(index, focus.independent)
        good = is_good(focus.site, index, items, rows)
        if self._score == "gradient":
            found = None
            gain = _first_order(focus.chain.gradient(focus.site.name, index), index, items, rows)
        else:
            found = ScoredSwaps(focus, items, rows, good, hook, state)
            gain = found.gain
        log_weights = torch.where(good, _BALANCES[self._balance](gain), -torch.inf)
        return _Table(focus, index, focus.chain.power, found, log_weights, log_weights.logsumexp(0))


def _first_order(gradient: Tensor, index: Tensor, items: Tensor, rows: Tensor) -> Tensor:
    """First-order changes by exchanges, (K, replicas, units), of a gradient (replicas, items, n, n)."""
    by_row = gradient.gather(-1, index[..., None, :].expand_as(gradient))  # [a, b]: row a takes the column of row b
    own = by_row.diagonal(dim1=-2, dim2=-1)
    change = by_row + by_row.mT - own[..., None] - own[..., None, :]
    replica = torch.arange(len(index), device=index.device)[:, None]
    return change[replica, items, rows[..., 0], rows[..., 1]]


@dataclasses.dataclass
class _Table:
    """Weights of all exchanges of one state.

    Attributes:
        focus: whose they are.
        index: the state.
        power: of the likelihood that they were made with.
        found: the exchanges with their gains; None where only their first order is known.
        log_weights: by exchange, (L, replicas, units).
        total: log of the sum of the weights, (replicas, units).
    """

    focus: Focus
    index: Tensor
    power: Tensor
    found: ScoredSwaps | None
    log_weights: Tensor
    total: Tensor

    def is_of(self, focus: Focus) -> bool:
        """Whether the table belongs to the present state."""
        return self.focus is focus and self.index is focus.index and self.power is focus.chain.power

    def log_probability(self, chosen: Tensor) -> Tensor:
        """Log-probability of exchanges (1, replicas, units), without the first dimension."""
        return self.log_weights.gather(0, chosen)[0] - self.total

    def replace(self, other: _Table, units: Tensor, index: Tensor) -> None:
        """Units (replicas, units) have moved to another state, which makes ``index``."""
        self.index = index
        self.log_weights = torch.where(units, other.log_weights, self.log_weights)
        self.total = torch.where(units, other.total, self.total)
        if self.found is not None and other.found is not None:
            self.found.replace(other.found, units)

"""Metropolis-Hastings by exchanges of two rows' columns, and by longer cycles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_gs.infer.log_joint import LogJoint, PotentialJoint
from pyro_gs.infer.mcmc.chain import Focus
from pyro_gs.infer.mcmc.cycles import move_by_cycles
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel
from pyro_gs.infer.mcmc.proposals import AdaptedSwaps, UniformSwaps
from pyro_gs.infer.mcmc.scored_swaps import ScoredSwaps, is_good, takes_hook
from pyro_gs.infer.mcmc.swaps import SwapDelta, check_swap_delta
from pyro_gs.ops.logits import check_count

_LONGEST, _LONGEST_HOOK = 64, 512
"""Most proposals that are scored at once, without a hook and with one."""

_TABLE = 2**13
"""Numbers of the candidates' matrices up to which all exchanges of a state are scored at once in any case."""

_LARGE_TABLE = 2**20
"""Numbers up to which they are where refusals are many."""

_WIDTH = 2**17
"""Numbers of the candidates' matrices beyond which scoring more of them at once saves no time."""


class SwapMetropolis(PermutationKernel):
    """Random-walk Metropolis-Hastings: two rows exchange their columns, or several rotate them.

    A step makes ``num_steps`` proposals of exchanges, or one more, and, where pairs are forbidden, ``num_cycles`` of longer
    cycles; exchanges alone need not reach all permutations of a mask, cycles do. Items of a plate that are independent given
    the rest move at once, each accepted on its own. Items that depend on each other, by a term outside of their plate or,
    against what a plate says, inside of it, take turns at random; the kernel finds out which it is.

    Exchanges are scored ahead. Where they are few, all of a state's are scored in one run of the model, and how many
    proposals are refused before one is accepted is drawn as a geometric number: the same chain in law. Where they are many,
    several proposals are scored at once, and what lies beyond the first accepted one is thrown away.

    With ``adapt`` the marginals seen during warm-up shape the proposal: rows that are unsure are taken more often, and
    exchanged for columns that they have had. The proposal is fixed when the warm-up ends.

    Args:
        model: as in :class:`PermutationKernel`.
        potential_fn: as in :class:`PermutationKernel`.
        sites: as in :class:`PermutationKernel`.
        num_steps: proposals of exchanges in a step, of every item where items are independent given the rest, else of the
            site as a whole, each in an item drawn uniformly; by default the number of rows of all items that move as one.
        num_cycles: proposals of cycles in a step, counted alike; by default one for each item where pairs are forbidden,
            else none.
        adapt: whether to learn the proposal during warm-up.
        swap_delta: function of :class:`Swaps` that returns the change of the log joint density by each exchange, (K,); by
            default the attribute ``swap_delta`` of the model, a function of ``(swaps, *args, **kwargs)`` with the model's
            arguments, else the model is run. Compared with the model at 16 exchanges at set-up, and its sum with a run of
            the model after 256 moves, 1,024 more, and so on. Whether items depend on each other is seen at set-up only, at
            a few values of each: where it shows at others alone, write ``law.expand([items]).to_event(1)``, not a plate.
        allowed: as in :class:`PermutationKernel`.
        vectorize: as in :class:`PermutationKernel`.
        jit_compile: not supported.

    Raises:
        ValueError: as :class:`PermutationKernel`; ``num_steps`` below 1, ``num_cycles`` below 0, or, at set-up, a hook that
            disagrees with the model.

    Example:
        >>> import pyro, torch, pyro_gs as pgs
        >>> from pyro.infer import MCMC
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.factor("likelihood", 2 * P.diagonal(dim1=-2, dim2=-1).sum(-1))
        >>> mcmc = MCMC(SwapMetropolis(model), num_samples=50, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["P"].shape
        torch.Size([50, 3, 3])
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        sites: Sequence[str] | None = None,
        num_steps: int | None = None,
        num_cycles: int | None = None,
        adapt: bool = False,
        swap_delta: SwapDelta | None = None,
        allowed: Tensor | Mapping[str, Tensor] | None = None,
        vectorize: bool | None = None,
        jit_compile: bool = False,
    ) -> None:
        super().__init__(model, potential_fn, sites=sites, allowed=allowed, vectorize=vectorize, jit_compile=jit_compile)
        if num_steps is not None:
            check_count(num_steps, "num_steps", least=1)
        if num_cycles is not None:
            check_count(num_cycles, "num_cycles", least=0)
        if swap_delta is not None and not callable(swap_delta):
            raise TypeError(f"swap_delta must be callable, but is {type(swap_delta).__name__}")
        self._num_steps = num_steps
        self._num_cycles = num_cycles
        self._adapt = adapt
        self._swap_delta = swap_delta
        self._proposals: dict[str, UniformSwaps] = {}
        self._tables: dict[str, _Table] = {}
        self._rate = 0.5
        self._refused = 0

    def cleanup(self) -> None:
        """Forget the chain and what was learned on it."""
        super().cleanup()
        self._proposals.clear()
        self._tables.clear()
        self._rate = 0.5
        self._refused = 0

    def prepare(self, focus: Focus) -> None:
        """Set up the proposal; compare the hook with the model."""
        hook = self._hook(focus.chain.joint)
        if hook is not None:
            check_swap_delta(hook, focus)
        name = focus.site.name
        self._proposals[name] = AdaptedSwaps(focus.site) if self._adapt else UniformSwaps(focus.site)

    def _hook(self, joint: LogJoint | PotentialJoint) -> SwapDelta | None:
        return joint.swap_delta if self._swap_delta is None else self._swap_delta

    def move(self, focus: Focus) -> tuple[int, int]:
        """Exchanges, then cycles."""
        site = focus.site
        proposal = self._proposals[site.name]
        steps = self._num_steps or site.n * focus.items_per_unit
        cycles = self._num_cycles if self._num_cycles is not None else focus.default_cycles
        made, accepted = self._exchanges(focus, proposal, steps)
        for _ in range(cycles):
            more, taken = move_by_cycles(focus)
            made, accepted = made + more, accepted + taken
        if self.warming_up and isinstance(proposal, AdaptedSwaps):
            proposal.observe(focus.index[0], last=self._t + 1 == self._warmup_steps)
        return made, accepted

    def _exchanges(self, focus: Focus, proposal: UniformSwaps, steps: int) -> tuple[int, int]:
        """Make ``steps`` proposals of exchanges, or one more, in every unit.

        An exchange changes the parity, so where all are accepted a fixed number of them would have period two.
        """
        movable = proposal.movable(focus.independent).expand(focus.unit_shape)
        remaining = torch.where(movable, steps + torch.randint(2, focus.unit_shape, device=movable.device), 0)
        made = int(remaining.sum())
        hook = self._hook(focus.chain.joint)
        width = 1 if takes_hook(focus, hook) else focus.site.num_items * focus.site.n**2
        if not made:
            return 0, 0
        longest = proposal.longest(focus.independent)
        small = longest * width <= _TABLE
        # A large table pays where it serves for many refusals, and only if it can be scored in one go.
        if small or (longest * width <= _LARGE_TABLE and longest * self._likely_rate < 0.5):
            return made, self._by_table(focus, proposal, remaining, hook)
        return made, self._ahead_of_time(focus, proposal, remaining, hook)

    def _by_table(self, focus: Focus, proposal: UniformSwaps, remaining: Tensor, hook: SwapDelta | None) -> int:
        """Score all exchanges of a state at once; then how many proposals it refuses is a geometric number.

        The chain is the same in law as when every proposal is drawn.
        """
        left = remaining.to(torch.float64).cpu().numpy()
        accepted = 0
        while True:
            table = self._tables.get(focus.site.name)
            if table is None or table.index is not focus.index or table.focus is not focus:
                table = self._tabulate(focus, proposal, hook)
                self._tables[focus.site.name] = table
                self._rate = 0.9 * self._rate + 0.1 * float(table.total.mean())
            shape = table.total.shape
            uniform = 1 - torch.rand(2, *shape, dtype=torch.float64, device="cpu").numpy()  # in (0, 1]
            with np.errstate(divide="ignore"):
                wait = np.floor(np.log(uniform[0]) / np.log1p(-table.total)) + 1  # inf where all are refused
            moves = wait <= left
            count = int(moves.sum())
            if not count:
                return accepted
            left = np.where(moves, left - wait, 0.0)
            ends = table.ends
            chosen = np.minimum((ends < uniform[1] * ends[-1]).sum(0), len(ends) - 1)
            accepted += count
            self._refused = 0
            device = focus.index.device
            table.found.take(focus, torch.from_numpy(chosen).to(device), torch.from_numpy(moves).to(device))

    def _tabulate(self, focus: Focus, proposal: UniformSwaps, hook: SwapDelta | None) -> _Table:
        items, rows, forward, backward = proposal.table(focus.index, focus.independent)
        found = ScoredSwaps(focus, items, rows, is_good(focus.site, focus.index, items, rows), hook)
        log_p = forward + (found.gain + (backward - forward)).clamp(max=0.0)
        log_p = torch.where(found.gain > -torch.inf, log_p, -torch.inf)
        ends = log_p.exp().cpu().numpy().cumsum(0)
        return _Table(focus, focus.index, found, ends, np.minimum(ends[-1], 1.0))

    def _ahead_of_time(self, focus: Focus, proposal: UniformSwaps, remaining: Tensor, hook: SwapDelta | None) -> int:
        """Score several proposals from one state at once; what lies beyond the first accepted one is thrown away."""
        accepted, longest = 0, int(remaining.max())
        while longest > 0:
            count = min(longest, self._ahead(focus, takes_hook(focus, hook)))
            items, rows, ratio = proposal.draw(focus.index, count, focus.independent)
            due = torch.arange(count, device=rows.device)[:, None, None] < remaining
            good = due & is_good(focus.site, focus.index, items, rows)
            used = remaining.clamp(max=count)
            place = good.any(-1).any(-1).nonzero()[:, 0]  # what no unit can take is not scored
            if len(place):
                found = ScoredSwaps(focus, items[place], rows[place], good[place], hook)
                taken = torch.rand_like(found.gain).log() < found.gain + ratio[place]
                units, first = taken.any(0), taken.to(torch.uint8).argmax(0)
                used = torch.where(units, place[first] + 1, used)
                moves = int(units.sum())
                if moves:
                    found.take(focus, first, units)
                    accepted += moves
                self._rate = 0.95 * self._rate + 0.05 * float(taken.sum()) / float(due.sum())
                self._refused = 0 if moves else self._refused + int(due.sum())
            remaining = remaining - used
            longest = int(remaining.max())
        return accepted

    def _ahead(self, focus: Focus, hooked: bool) -> int:
        """How many proposals to score at once: about as many as are refused in a row. It does not change the chain's law."""
        width = focus.site.num_items * focus.site.n**2
        most = _LONGEST_HOOK if hooked else max(1, min(_LONGEST, _WIDTH // width))
        return max(1, min(most, int(1.5 / self._likely_rate)))

    @property
    def _likely_rate(self) -> float:
        """Acceptance rate as seen lately; a run of refusals says no more than that it is below one over their number."""
        return max(self._rate, 1 / (1 + self._refused))


@dataclasses.dataclass
class _Table:
    """All exchanges of one state, with the cumulative probability that one step proposes and accepts them."""

    focus: Focus
    index: Tensor
    found: ScoredSwaps
    ends: NDArray[np.float64]
    total: NDArray[np.float64]

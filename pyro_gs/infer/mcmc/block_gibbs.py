"""Gibbs updates of a few rows at a time: all reassignments of their columns scored, one drawn exactly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_gs.infer.mcmc.chain import Focus
from pyro_gs.infer.mcmc.cycles import move_by_cycles
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.logits import check_count

_LARGEST = 6


class BlockGibbs(PermutationKernel):
    """Gibbs sampling of blocks of rows: k of them are redrawn jointly given the others, exactly, over all k! ways.

    The rows of a block are drawn without a look at the permutation: uniformly, or, where pairs are forbidden, one after
    the other among those that share an allowed column with a row of the block, as long as there are any, so that the block
    has something to exchange. All reassignments of the columns that they have are scored in one run of the model, and one
    is drawn from its conditional probability; nothing is rejected, but the block may stay as it was. Where pairs are
    forbidden, cycles are proposed too, as in :class:`SwapMetropolis`, because blocks of k rows alone need not reach all
    permutations of a mask.

    The acceptance rate that is reported is the share of blocks, and cycles, that changed.

    Args:
        model: as in :class:`PermutationKernel`.
        potential_fn: as in :class:`PermutationKernel`.
        block_size: number k of rows in a block, 2 to 6; a site with fewer rows is redrawn as a whole.
        num_blocks: blocks in a step, of every item where items are independent given the rest, else of the site as a whole;
            by default n / k, rounded up, for each item.
        sites: as in :class:`PermutationKernel`.
        num_cycles: as in :class:`SwapMetropolis`.
        allowed: as in :class:`PermutationKernel`.
        vectorize: as in :class:`PermutationKernel`.
        jit_compile: not supported.

    Raises:
        ValueError: as :class:`PermutationKernel`; ``block_size`` outside 2 to 6, ``num_blocks`` below 1, ``num_cycles``
            below 0.

    Example:
        >>> import pyro, torch, pyro_gs as pgs
        >>> from pyro.infer import MCMC
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(5))
        ...     pyro.factor("likelihood", 2 * P.diagonal(dim1=-2, dim2=-1).sum(-1))
        >>> mcmc = MCMC(BlockGibbs(model, block_size=3), num_samples=50, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["P"].shape
        torch.Size([50, 5, 5])
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        block_size: int = 4,
        num_blocks: int | None = None,
        sites: Sequence[str] | None = None,
        num_cycles: int | None = None,
        allowed: Tensor | Mapping[str, Tensor] | None = None,
        vectorize: bool | None = None,
        jit_compile: bool = False,
    ) -> None:
        super().__init__(model, potential_fn, sites=sites, allowed=allowed, vectorize=vectorize, jit_compile=jit_compile)
        check_count(block_size, "block_size", least=2)
        if block_size > _LARGEST:
            raise ValueError(
                f"block_size must be from 2 to {_LARGEST}, as all block_size! reassignments are scored, but is {block_size}"
            )
        if num_blocks is not None:
            check_count(num_blocks, "num_blocks", least=1)
        if num_cycles is not None:
            check_count(num_cycles, "num_cycles", least=0)
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._num_cycles = num_cycles
        self._neighbors: dict[str, Tensor] = {}

    def prepare(self, focus: Focus) -> None:
        """Find out which rows may be in a block together."""
        allowed = focus.site.allowed
        if allowed is not None:
            weight = allowed.to(torch.float64)
            # Two rows exchange two columns that both may have; in a longer cycle, neighbors share only one.
            shared = weight @ weight.mT > (1.5 if self._block_size == 2 else 0.5)
            shared.diagonal(dim1=-2, dim2=-1).fill_(False)
            self._neighbors[focus.site.name] = shared

    def move(self, focus: Focus) -> tuple[int, int]:
        """Blocks, then cycles."""
        site = focus.site
        cycles = self._num_cycles if self._num_cycles is not None else focus.default_cycles
        size = min(self._block_size, site.n)
        made = changed = 0
        if size > 1:
            for _ in range(self._num_blocks or -(-site.n // size) * focus.items_per_unit):
                changed += self._redraw(focus, size)
                made += focus.unit_shape.numel()
        for _ in range(cycles):
            more, taken = move_by_cycles(focus)
            made, changed = made + more, changed + taken
        return made, changed

    def _redraw(self, focus: Focus, size: int) -> int:
        """Redraw a block of every unit; how many changed."""
        site = focus.site
        index = focus.index
        items = focus.draw_items()
        rows = self._draw_rows(site.name, items, site.n, size)
        replica = torch.arange(len(index), device=site.device)[:, None]
        columns = index[replica[..., None], items[..., None], rows]
        orders = torch.tensor(list(itertools.permutations(range(size))), device=site.device)
        new = columns[..., orders].movedim(-2, 0)  # (k!, replicas, units, k), the present order first
        good = torch.ones(new.shape[:-1], dtype=torch.bool, device=site.device)
        if site.allowed is not None:
            good = site.allowed[items[..., None], rows, new].all(-1)
            kept = good.any(-1).any(-1)  # what no unit can take is not scored
            if int(kept.sum()) == 1:
                return 0
            new, good = new[kept], good[kept]
        candidates = index.repeat(len(new), 1, 1, 1)
        candidates[:, replica[..., None], items[..., None], rows] = torch.where(good[..., None], new, columns)
        scores, terms = focus.evaluate(candidates)
        log_weights = torch.where(good, scores, -torch.inf)
        chosen = (log_weights + gumbel_noise(log_weights.shape, log_weights)).argmax(0)
        changed = chosen != 0
        if bool(changed.any()):
            focus.accept(chosen, candidates, terms, changed)
        return int(changed.sum())

    def _draw_rows(self, name: str, items: Tensor, n: int, size: int) -> Tensor:
        """Rows of a block for every unit, (replicas, units, size), drawn without regard to the permutation."""
        keys = torch.rand(*items.shape, n, dtype=torch.float64, device=items.device)
        neighbors = self._neighbors.get(name)
        if neighbors is None:
            return keys.topk(size, -1).indices
        # In the random order of the keys, but a row that can move before others, then one with a neighbor in the block.
        near = neighbors[items].any(-1)
        joined = torch.zeros_like(near)
        rows = []
        for _ in range(size):
            row = (keys + near.to(keys.dtype)).argmax(-1, keepdim=True)
            rows.append(row)
            keys = keys.scatter(-1, row, -2.0)
            joined = joined | neighbors[items[..., None], row][..., 0, :]
            near = joined
        return torch.cat(rows, -1)

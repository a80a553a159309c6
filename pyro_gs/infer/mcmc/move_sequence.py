"""Several kernels over permutations, one after the other, as one."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_gs.infer.mcmc.chain import Chain
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel


class MoveSequence(PermutationKernel):
    """Kernels over permutations that take turns on one chain, in the order given.

    Proposals from a guide reach far, exchanges explore nearby: ``MoveSequence([GuideProposal(guide=guide),
    SwapMetropolis()], model)``. Or every kernel moves a site of its own, ``BlockGibbs(sites=["Q"])``.

    Args:
        kernels: kernels without a model, at least one.
        model: as in :class:`PermutationKernel`.
        potential_fn: as in :class:`PermutationKernel`.
        allowed: as in :class:`PermutationKernel`.
        vectorize: as in :class:`PermutationKernel`.
        jit_compile: not supported.

    Raises:
        TypeError: ``kernels`` holds something else.
        ValueError: no kernel, one with a model of its own, or one twice; else as :class:`PermutationKernel`.

    Example:
        >>> from pyro_gs import SwapMetropolis
        >>> MoveSequence([SwapMetropolis(), SwapMetropolis(adapt=True)]).names
        ['SwapMetropolis 1', 'SwapMetropolis 2']
    """

    def __init__(
        self,
        kernels: Sequence[PermutationKernel],
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        allowed: Tensor | Mapping[str, Tensor] | None = None,
        vectorize: bool | None = None,
        jit_compile: bool = False,
    ) -> None:
        super().__init__(model, potential_fn, allowed=allowed, vectorize=vectorize, jit_compile=jit_compile)
        if not isinstance(kernels, (list, tuple)):
            raise TypeError(
                f"kernels must be a list of kernels, but is {type(kernels).__name__}; write MoveSequence([...], model)"
            )
        self.kernels = list(kernels)
        if not self.kernels:
            raise ValueError("kernels must hold at least one kernel, but is empty")
        for kernel in self.kernels:
            check_moves(kernel)
        if len({id(kernel) for kernel in self.kernels}) < len(self.kernels):
            raise ValueError("kernels has the same kernel twice; make two of them")

    @property
    def names(self) -> list[str]:
        """Names of the kernels' classes, with a number where there are several of one."""
        kinds = [type(kernel).__name__ for kernel in self.kernels]
        seen: collections.Counter[str] = collections.Counter()
        out = []
        for kind in kinds:
            seen[kind] += 1
            out.append(kind if kinds.count(kind) == 1 else f"{kind} {seen[kind]}")
        return out

    def bind(self, chain: Chain, warmup_steps: int) -> None:
        """Let all kernels work on a chain."""
        super().bind(chain, warmup_steps)
        for kernel in self.kernels:
            kernel.bind(chain, warmup_steps)
        self._moved = [name for name in chain.joint.sites if any(name in kernel.moved_sites for kernel in self.kernels)]

    def _move_all(self) -> tuple[int, int]:
        before = [(0, 0) if k.starts_samples else (k.num_proposed, k.num_accepted) for k in self.kernels]
        for kernel in self.kernels:
            kernel.step()
        counts = [
            (k.num_proposed - made, k.num_accepted - taken) for k, (made, taken) in zip(self.kernels, before, strict=True)
        ]
        return sum(made for made, _ in counts), sum(taken for _, taken in counts)

    def end_warmup(self) -> None:
        """End the warm-up of all kernels."""
        super().end_warmup()
        for kernel in self.kernels:
            kernel.end_warmup()

    def logging(self) -> collections.OrderedDict[str, str]:
        """Acceptance rates by kernel."""
        return collections.OrderedDict(
            (f"acc. {name}", f"{k.acceptance_rate:.3f}") for name, k in zip(self.names, self.kernels, strict=True)
        )

    def diagnostics(self) -> dict[str, Any]:
        """As :meth:`PermutationKernel.diagnostics`, and the acceptance rates by kernel."""
        rates = {name: kernel.acceptance_rate for name, kernel in zip(self.names, self.kernels, strict=True)}
        return {**super().diagnostics(), "acceptance rate by kernel": rates}

    def cleanup(self) -> None:
        """Forget the chain."""
        super().cleanup()
        for kernel in self.kernels:
            kernel.cleanup()


def check_moves(kernel: Any) -> None:
    """Raise unless it is a kernel over permutations without a model.

    Raises:
        TypeError: it is something else.
        ValueError: it has a model.
    """
    if not isinstance(kernel, PermutationKernel):
        found = kernel.__name__ if isinstance(kernel, type) else type(kernel).__name__
        raise TypeError(f"moves must be kernels over permutations, such as SwapMetropolis(), but one is {found}")
    if kernel.model is not None or kernel.potential_fn is not None:
        kind = type(kernel).__name__
        raise ValueError(f"{kind} has a model of its own here; write {kind}(), the model goes to the kernel around it")

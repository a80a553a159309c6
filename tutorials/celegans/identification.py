"""What every method of identification returns, and the clock that stops each and keeps its history."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_gs.ops.matching import matching, to_index

__all__ = ["Identification", "Run", "Snapshot", "check_initial", "match_allowed", "onehot", "random_allowed"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A look at a running method.

    Attributes:
        seconds: Since the start of the run.
        step: How many steps were done.
        objective: What the method maximizes or samples from, in nats; the method says which.
        index: Shape (J, n), long: the identities it would answer if it stopped here.
    """

    seconds: float
    step: int
    objective: float
    index: Tensor


@dataclass(frozen=True, eq=False)
class Identification:
    """A posterior over the identities of observed neurons, as a method sees it.

    Attributes:
        method: Name of the method.
        marginals: Shape (J, n, n), float64: posterior probability that observed neuron m is identity i. Rows
            sum to one; zero where not allowed.
        index: Shape (J, n), long: the hard answer, an allowed permutation.
        history: Looks at the run, in order of time.
        seconds: How long the run took.
        extra: Figures of the method's own, such as its acceptance rate.
    """

    method: str
    marginals: Tensor
    index: Tensor
    history: list[Snapshot]
    seconds: float
    extra: dict[str, float] = field(default_factory=dict)


def onehot(index: Tensor) -> Tensor:
    """Permutation matrices of index vectors: (..., n) long to (..., n, n) float64."""
    return torch.nn.functional.one_hot(index, index.shape[-1]).to(torch.float64)


def match_allowed(scores: Tensor, allowed: Tensor) -> Tensor:
    """The allowed permutation of largest total score.

    Args:
        scores: Shape (..., n, n), finite.
        allowed: Shape (..., n, n), bool.

    Returns:
        Shape (..., n), long: the identity of each observed neuron.
    """
    return to_index(matching(torch.where(allowed, scores, -math.inf)))


def random_allowed(allowed: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an allowed permutation for each worm: the best match of random scores.

    Each can occur; they are not equally likely.

    Args:
        allowed: Shape (J, n, n), bool.
        generator: Where the random numbers come from.

    Returns:
        Shape (J, n), long.
    """
    scores = torch.rand(allowed.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return match_allowed(scores.to(allowed.device), allowed)


def check_initial(initial: Tensor | None, allowed: Tensor) -> None:
    """Refuse a starting point that is no allowed permutation.

    Args:
        initial: Shape (J, n), long, or None.
        allowed: Shape (J, n, n), bool.

    Raises:
        ValueError: If it is of another shape or dtype, no permutation, or not allowed.
    """
    if initial is None:
        return
    if initial.shape != allowed.shape[:2] or initial.dtype != torch.long:
        raise ValueError(
            f"initial has shape {tuple(initial.shape)} and dtype {initial.dtype}, "
            f"expected {tuple(allowed.shape[:2])} and torch.int64"
        )
    n = allowed.shape[-1]
    if not bool((initial.sort(-1).values == torch.arange(n, device=initial.device)).all()):
        raise ValueError(f"initial: expected each row to be a permutation of range({n})")
    forbidden = ~allowed.gather(-1, initial.unsqueeze(-1)).squeeze(-1)
    if forbidden.any():
        worm, neuron = forbidden.nonzero()[0].tolist()
        raise ValueError(
            f"initial[{worm}, {neuron}] is {int(initial[worm, neuron])}, expected an identity that allowed permits"
        )


class Run:
    """Counts steps and seconds, stops at whichever limit comes first, takes snapshots at even distances.

    Iterating yields 0, 1, ...; the first step is always done.

    Args:
        method: Name of the method, shown beside the progress bar.
        budget: Seconds, or None. The clock starts here.
        steps: Number of steps, or None. At least one of both is needed.
        progress: Whether to draw a progress bar.
        snapshots: How many snapshots are due in a run.

    Raises:
        ValueError: If there is no limit, or one is not positive.

    Attributes:
        clock: What every budget is measured by, a function that returns seconds. Wall-clock time; a sweep beside other
            jobs sets it to ``time.process_time``, which such jobs do not change: one core's time for one thread.
    """

    clock: ClassVar[Callable[[], float]] = staticmethod(time.perf_counter)

    def __init__(
        self,
        method: str,
        *,
        budget: float | None,
        steps: int | None,
        progress: bool = False,
        snapshots: int = 64,
    ) -> None:
        if budget is None and steps is None:
            raise ValueError("budget=None and steps=None: expected seconds, a number of steps or both")
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise ValueError(f"budget={budget!r}: expected a positive finite number of seconds")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps={steps!r}: expected an integer of at least 1")
        self.method = method
        self.history: list[Snapshot] = []
        self.step = 0
        self._budget, self._steps, self._snapshots = budget, steps, snapshots
        self._bar = tqdm(total=1000, desc=method, bar_format="{l_bar}{bar}{postfix}", disable=not progress)
        self._start = Run.clock()

    @property
    def seconds(self) -> float:
        """Time since the start."""
        return Run.clock() - self._start

    @property
    def fraction(self) -> float:
        """Share of the run that is over, from 0 to 1, by whichever limit is nearer."""
        by_time = 0.0 if self._budget is None else self.seconds / self._budget
        by_step = 0.0 if self._steps is None else self.step / self._steps
        return min(1.0, max(by_time, by_step))

    @property
    def due(self) -> bool:
        """Whether it is time for a snapshot."""
        return self.fraction * self._snapshots >= len(self.history) + 1

    def record(self, objective: float, index: Tensor, **shown: float) -> None:
        """Take a snapshot; the progress bar shows the objective and further figures, never an accuracy."""
        self.history.append(Snapshot(self.seconds, self.step, objective, index.clone()))
        self._bar.n = round(1000 * self.fraction)
        figures = {"objective": f"{objective:.1f}"} | {name: f"{value:.3g}" for name, value in shown.items()}
        self._bar.set_postfix(figures)

    def __iter__(self) -> Iterator[int]:
        """Yield steps until a limit is reached; `step` and `fraction` count the yielded one as done."""
        try:
            while self.step == 0 or self.fraction < 1:
                self.step += 1
                yield self.step - 1
        finally:
            self._bar.close()

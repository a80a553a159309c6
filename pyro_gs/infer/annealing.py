"""Temperature schedules, and an SVI that follows one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from pyro.infer import SVI

from pyro_gs.ops.logits import check_temperature


def _check_steps(num_steps: int) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an integer of at least 1, but is {num_steps!r}")


@dataclasses.dataclass(frozen=True)
class ConstantSchedule:
    """The same temperature at every step.

    Args:
        temperature: positive.

    Example:
        >>> ConstantSchedule(0.5)(100)
        0.5
    """

    temperature: float

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def __call__(self, step: int) -> float:
        """Temperature of a step (counted from 0)."""
        return self.temperature


@dataclasses.dataclass(frozen=True)
class _Ramp:
    start: float
    end: float
    num_steps: int

    def __post_init__(self) -> None:
        check_temperature(self.start, "start")
        check_temperature(self.end, "end")
        _check_steps(self.num_steps)

    def share(self, step: int) -> float:
        """How much of the way is behind at a step, 0 to 1."""
        return min(max(step, 0) / self.num_steps, 1.0)


class ExponentialSchedule(_Ramp):
    """From ``start`` to ``end`` by a constant factor a step over ``num_steps`` steps, then ``end``.

    Args:
        start: temperature of step 0, positive.
        end: temperature of step ``num_steps`` and later, positive.
        num_steps: at least 1.

    Example:
        >>> [round(ExponentialSchedule(1.0, 0.25, 2)(step), 3) for step in range(4)]
        [1.0, 0.5, 0.25, 0.25]
    """

    def __call__(self, step: int) -> float:
        """Temperature of a step (counted from 0)."""
        share = self.share(step)
        return math.exp((1 - share) * math.log(self.start) + share * math.log(self.end))


class LinearSchedule(_Ramp):
    """From ``start`` to ``end`` by a constant difference a step over ``num_steps`` steps, then ``end``.

    Args:
        start: temperature of step 0, positive.
        end: temperature of step ``num_steps`` and later, positive.
        num_steps: at least 1.

    Example:
        >>> [LinearSchedule(1.0, 0.5, 2)(step) for step in range(4)]
        [1.0, 0.75, 0.5, 0.5]
    """

    def __call__(self, step: int) -> float:
        """Temperature of a step (counted from 0)."""
        share = self.share(step)
        return (1 - share) * self.start + share * self.end


class AnnealedSVI(SVI):
    """Pyro's ``SVI`` that sets the guide's temperature before every step.

    Only the guide anneals; the relaxed prior keeps the temperature that ``relax`` was given, unless that is a function
    that reads the guide's: ``relax(model, temperature=lambda: guide.temperature)``.

    Args:
        model: as in ``SVI``.
        guide: an object with a ``temperature``, such as ``AutoGumbelSinkhorn``.
        optim: as in ``SVI``.
        loss: as in ``SVI``.
        schedule: temperature of each step, a function of the step number; a dict by site where the guide takes one.
        tempered: the object whose ``temperature`` is set, by default ``guide`` (a part of an ``AutoGuideList``, say).

    Raises:
        TypeError: the object has no ``temperature``.

    Example:
        >>> import pyro
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_gs import AutoGumbelSinkhorn, UniformPermutation, relax
        >>> def model():
        ...     P = pyro.sample("P", UniformPermutation(3))
        ...     pyro.factor("likelihood", 3 * P[..., 0, 0])
        >>> guide = AutoGumbelSinkhorn(model)
        >>> relaxed = relax(model, temperature=lambda: guide.temperature)
        >>> schedule = ExponentialSchedule(1.0, 0.1, 20)
        >>> svi = AnnealedSVI(relaxed, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), schedule=schedule)
        >>> losses = [svi.step() for _ in range(21)]
        >>> round(guide.temperature, 3)
        0.1
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: Any,
        *,
        schedule: Callable[[int], float | Mapping[str, float]],
        tempered: Any = None,
    ) -> None:
        super().__init__(model, guide, optim, loss)
        self.tempered: Any = guide if tempered is None else tempered
        if not hasattr(self.tempered, "temperature"):
            raise TypeError(
                f"guide must have a temperature to anneal, but {type(self.tempered).__name__} has none; name the part that "
                "has one by tempered=..."
            )
        self.schedule = schedule
        self.num_steps_taken = 0

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Set the temperature, take a gradient step, return the loss."""
        self.tempered.temperature = self.schedule(self.num_steps_taken)
        loss: float = super().step(*args, **kwargs)
        self.num_steps_taken += 1
        return loss

"""What the variational methods share: SVI with a step size that is set between steps, and the ELBO since the last look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.elbo import ELBO
from pyro.optim import PyroOptim

__all__ = ["Ascent", "falling"]


def falling(first: float, last: float, share: float) -> float:
    """A step size that falls geometrically: its value at a share of the way, clamped to [0, 1]."""
    size: float = first * (last / first) ** min(1.0, max(0.0, share))
    return size


class Ascent:
    """Adam's way up an ELBO. Makes a new parameter store.

    Args:
        model: A Pyro model.
        guide: Its guide.
        seed: Of all random numbers.
        loss: What estimates the ELBO; None for ``Trace_ELBO`` with ``samples`` of them, drawn together.
        samples: In a step.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *,
        seed: int,
        loss: ELBO | None = None,
        samples: int = 1,
    ) -> None:
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()
        if loss is None:
            loss = Trace_ELBO(num_particles=samples, vectorize_particles=True, max_plate_nesting=1)
        self._adam = {"lr": 1.0}
        self._optimizer = PyroOptim(torch.optim.Adam, self._adam)
        self._svi = SVI(model, guide, self._optimizer, loss)
        self._total, self._count = 0.0, 0

    def step(self, size: float, *args: Any) -> None:
        """One step of a size, on the model's arguments."""
        self._adam["lr"] = size
        for inner in self._optimizer.optim_objs.values():
            for group in inner.param_groups:
                group["lr"] = size
        self._total -= self._svi.step(*args)
        self._count += 1

    def evaluate(self, count: int, *args: Any) -> float:
        """The mean ELBO of a number of estimates at the parameters as they are."""
        return -sum(float(self._svi.evaluate_loss(*args)) for _ in range(count)) / count

    def forget(self) -> None:
        """Drop Adam's moments, as after a change of the parameters from outside."""
        self._optimizer.optim_objs.clear()

    def elbo(self) -> float:
        """The mean ELBO of the steps since this was last called."""
        mean = self._total / self._count
        self._total, self._count = 0.0, 0
        return mean

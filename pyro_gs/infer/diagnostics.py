"""Is a fit to relaxed permutations at the mercy of its temperature?

Functions of a model, a guide and the model's arguments; none changes a parameter. In each, ``model`` is the one that ``SVI``
was given, the relaxed one where the guide's draws are relaxed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from torch import Tensor

from pyro_gs.distributions import constraints
from pyro_gs.distributions.relaxed import RelaxedPermutation, carries_log, log_of, plain
from pyro_gs.infer.handlers import is_permutation_law, name_sites, unwrap
from pyro_gs.ops.logits import check_count, warn_user
from pyro_gs.ops.matching import matching

_FEW = 10.0  # effective draws, below which corrected marginals are not to be relied on


class TemperatureWarning(UserWarning):
    """The hard permutations of a fit depend on its temperature, or that cannot be told."""


@dataclasses.dataclass(frozen=True)
class GradientVariance:
    """What :func:`gradient_variance` found.

    Attributes:
        total: sum over all parameters of the variance of the gradient's entries.
        signal_to_noise: squared length of the mean gradient, less what noise adds to it, over ``total``; at least 0.
        by_parameter: the part of ``total`` of each parameter, by its name in Pyro's parameter store.
        num_draws: number of gradients.
    """

    total: float
    signal_to_noise: float
    by_parameter: dict[str, float]
    num_draws: int


@dataclasses.dataclass(frozen=True)
class RelaxationGap:
    """What :func:`relaxation_gap` found, in nats; means over the draws.

    Attributes:
        relaxed: log density of everything but the permutations, at relaxed permutations.
        hard: the same at the hard permutations that they round to.
        gap: ``relaxed - hard``.
        standard_error: of ``gap``.
    """

    relaxed: float
    hard: float
    gap: float
    standard_error: float


@dataclasses.dataclass(frozen=True)
class TemperatureEffect:
    """What :func:`check_temperature_effect` found, dicts by site.

    Attributes:
        marginals: of the guide's hard permutations, (..., n, n).
        corrected: the same, weighted to the posterior of the hard permutations.
        shift: largest difference of the two.
        effective_draws: that the weights leave, the smallest over a site's plates.
        num_draws: number of draws.
    """

    marginals: dict[str, Tensor]
    corrected: dict[str, Tensor]
    shift: dict[str, float]
    effective_draws: dict[str, float]
    num_draws: int


def gradient_variance(
    loss: Any, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_draws: int = 100, **kwargs: Any
) -> GradientVariance:
    """Variance of the gradient of a loss with respect to the unconstrained parameters, from repeated draws.

    Against temperature::

        for temperature in (1.0, 0.5, 0.25, 0.1):
            guide.temperature = temperature
            print(temperature, gradient_variance(Trace_ELBO(), relax(model, temperature), guide, *args).total)

    Gradients that the parameters hold are kept; the baseline of an ``AutoGumbelMatching`` goes on learning.

    Args:
        loss: with a method ``loss_and_grads``, such as ``Trace_ELBO(num_particles=8)``.
        model: a Pyro model.
        guide: a Pyro guide.
        *args: of both.
        num_draws: number of gradients, at least 2.
        **kwargs: of both.

    Raises:
        TypeError: ``loss`` has no ``loss_and_grads``.
        ValueError: ``num_draws`` below 2; no parameter has a gradient.

    Example:
        >>> import pyro
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_gs import AutoGumbelSinkhorn, UniformPermutation, relax
        >>> def model():
        ...     P = pyro.sample("P", UniformPermutation(3))
        ...     pyro.factor("likelihood", 3 * P[..., 0, 0])
        >>> gradient_variance(Trace_ELBO(), relax(model), AutoGumbelSinkhorn(model), num_draws=10).total > 0
        True
    """
    check_count(num_draws, "num_draws", least=2)
    if not hasattr(loss, "loss_and_grads"):
        raise TypeError(f"loss must have a method loss_and_grads, as Trace_ELBO() has, but is {type(loss).__name__}")
    kept: dict[str, tuple[Tensor, Tensor | None]] = {}
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    try:
        for _ in range(num_draws):
            with poutine.trace(param_only=True) as capture:
                loss.loss_and_grads(model, guide, *args, **kwargs)
            for name, site in capture.trace.nodes.items():
                parameter = site["value"].unconstrained()
                if name not in kept:
                    # What a first backward pass left beside an earlier gradient cannot be told apart: draw it again.
                    kept[name] = (parameter, None)
                if parameter.grad is None:
                    continue
                grad = parameter.grad.detach().double()
                sums[name] = sums.get(name, 0.0) + grad
                squares[name] = squares.get(name, 0.0) + grad.square()
                parameter.grad = None
    finally:
        for parameter, grad_before in kept.values():
            parameter.grad = grad_before
    if not sums:
        raise ValueError("no parameter of the model or the guide has a gradient; give a model and a guide to be trained")
    mean = {name: total / num_draws for name, total in sums.items()}
    variance = {
        name: float((squares[name] - num_draws * mean[name].square()).clamp(min=0.0).sum()) / (num_draws - 1) for name in sums
    }
    total = sum(variance.values())
    signal = sum(float(value.square().sum()) for value in mean.values()) - total / num_draws
    return GradientVariance(total, max(signal, 0.0) / total if total > 0 else torch.inf, variance, num_draws)

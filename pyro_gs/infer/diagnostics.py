"""Is a fit to relaxed permutations at the mercy of its temperature?

Functions of a model, a guide and the model's arguments; none changes a parameter. In each, ``model`` is the one that ``SVI``
was given, the relaxed one where the guide's draws are relaxed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer.util import MultiFrameTensor, get_plate_stacks
from torch import Tensor

from pyro_gs.distributions import constraints
from pyro_gs.distributions.relaxed import RelaxedPermutation, log_of
from pyro_gs.infer.handlers import name_sites, unwrap
from pyro_gs.ops.logits import check_count, warn_user
from pyro_gs.ops.matching import matching

_PLATE = "num_draws_vectorized"
_FEW = 10.0  # effective draws, below which corrected marginals are not to be relied on


class TemperatureWarning(UserWarning):
    """The hard permutations of a fit depend on its temperature, or that cannot be told.

    Example:
        >>> import warnings
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> import pyro_gs as pgs
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> def model(y):
        ...     P = pyro.sample("P", pgs.UniformPermutation(4))
        ...     pyro.sample("y", dist.Normal(P @ torch.arange(4.0), 0.1).to_event(1), obs=y)
        >>> guide = pgs.AutoGumbelSinkhorn(model)  # not fitted
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", pgs.TemperatureWarning)
        ...     _ = pgs.check_temperature_effect(pgs.relax(model), guide, torch.arange(4.0), num_draws=50)
        Traceback (most recent call last):
            ...
        pyro_gs.infer.diagnostics.TemperatureWarning: whether the hard permutations of this fit depend on its ...
    """


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
        ValueError: ``num_draws`` below 2; no parameter has a gradient, or one has a gradient that is infinite or NaN.

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
    with poutine.trace(param_only=True) as capture, torch.no_grad():
        loss.loss(model, guide, *args, **kwargs)  # sets up what was not called before
    nodes: dict[str, Any] = capture.trace.nodes
    parameters = {name: site["value"].unconstrained() for name, site in nodes.items()}
    before = {name: parameter.grad for name, parameter in parameters.items()}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    squares = {name: torch.zeros_like(total) for name, total in sums.items()}
    seen = False
    try:
        for _ in range(num_draws):
            for parameter in parameters.values():
                parameter.grad = None
            loss.loss_and_grads(model, guide, *args, **kwargs)
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    seen = True
                    _refuse_infinite(parameter.grad, f"the gradient of parameter '{name}'")
                    sums[name] += parameter.grad
                    squares[name] += parameter.grad.double().square()
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]
    if not seen:
        raise ValueError("no parameter of the model or the guide has a gradient; give a model and a guide to be trained")
    mean = {name: total / num_draws for name, total in sums.items()}
    variance = {
        name: float((squares[name] - num_draws * mean[name].square()).clamp(min=0.0).sum()) / (num_draws - 1)
        for name in sums
    }
    total = sum(variance.values())
    signal = sum(float(value.square().sum()) for value in mean.values()) - total / num_draws
    return GradientVariance(total, max(signal, 0.0) / total if total > 0 else torch.inf, variance, num_draws)


def saturation(
    guide: Callable[..., Any], *args: Any, num_draws: int = 100, max_plate_nesting: int | None = None, **kwargs: Any
) -> dict[str, float]:
    """Mean of the largest entry of the rows of relaxed draws: 1 at permutations, little above 1 / n for flat matrices.

    Args:
        guide: a Pyro guide with relaxed permutation sites.
        *args: of the guide.
        num_draws: number of draws, at least 1.
        max_plate_nesting: number of nested plates, for all draws at once; None for one after the other.
        **kwargs: of the guide.

    Returns:
        Dict by site; the mean over draws, rows and the items of plates.

    Raises:
        ValueError: ``num_draws`` below 1; no relaxed permutation site.

    Example:
        >>> import torch
        >>> from pyro_gs import AutoGumbelSinkhorn, UniformPermutation
        >>> import pyro
        >>> def model():
        ...     return pyro.sample("P", UniformPermutation(3))
        >>> 1 / 3 < saturation(AutoGumbelSinkhorn(model, temperature=10.0))["P"] < 0.5
        True
    """
    check_count(num_draws, "num_draws", least=1)
    sums: dict[str, float] = {}
    draws = _Draws(None, guide, args, kwargs, num_draws, max_plate_nesting)
    for _, logs in draws:
        for name, log_p in logs.items():
            sums[name] = sums.get(name, 0.0) + float(log_p.amax(-1).exp().mean())
    return {name: total / draws.num_calls for name, total in sums.items()}


def relaxation_gap(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 100,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> RelaxationGap:
    """How much of the objective is owed to matrices that are no permutations.

    The guide's draws are scored by the model as they are and rounded to ``M(log P)``, with the same draws of everything
    else; the permutations' own priors and the guide's densities, which do not change, are left out.

    Args:
        model: a Pyro model, relaxed or plain.
        guide: a Pyro guide with relaxed permutation sites.
        *args: of both.
        num_draws: number of draws, at least 2.
        max_plate_nesting: number of nested plates of the model, for all draws at once; None for one after the other. As
            with ``vectorize_particles`` of Pyro's ELBOs the model then has to broadcast.
        **kwargs: of both.

    Raises:
        ValueError: ``num_draws`` below 2; no relaxed permutation site; a log density that is infinite or NaN.

    Example:
        >>> import pyro
        >>> from pyro_gs import AutoGumbelSinkhorn, UniformPermutation, relax
        >>> def model():
        ...     P = pyro.sample("P", UniformPermutation(3))
        ...     pyro.factor("likelihood", -(P[..., 0, 0] - 0.5).square())  # prefers what is no permutation
        >>> relaxation_gap(relax(model), AutoGumbelSinkhorn(model)).gap > 0
        True
    """
    check_count(num_draws, "num_draws", least=2)
    scores: tuple[list[Tensor], list[Tensor]] = ([], [])
    draws = _Draws(model, guide, args, kwargs, num_draws, max_plate_nesting)
    for trace, logs in draws:
        for rounded in (False, True):
            found = draws.replay(trace, _values(trace, logs, rounded))
            found.compute_log_prob(lambda name, site, logs=logs: name not in logs)
            terms = MultiFrameTensor()
            for name, frames in get_plate_stacks(found).items():
                if name not in logs:
                    terms.add((frames, found.nodes[name]["log_prob"]))
            scores[rounded].append(draws.total(terms, trace))
    relaxed, hard = (torch.cat(part).double() for part in scores)
    for kind, values in (("relaxed", relaxed), ("hard", hard)):
        _refuse_infinite(values, f"the log density of everything but the permutations, at {kind} ones,")
    gap = relaxed - hard
    return RelaxationGap(float(relaxed.mean()), float(hard.mean()), float(gap.mean()), float(gap.std()) / num_draws**0.5)


def check_temperature_effect(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 500,
    tolerance: float = 0.2,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> TemperatureEffect:
    r"""Warn when the hard permutations of a fit are not those of the posterior, as far as its own draws can tell.

    A fit to a relaxed model approximates the relaxed posterior, whose matrices round to other permutations than the
    posterior of the plain model has. The guide's density is known, so its draws can be weighted to the latter,

    ``w = p(P) L(M(P)) / q(P)``,

    with the relaxed prior ``p``, the guide ``q`` and everything else, ``L``, at the hard permutation. Warned is where a
    probability of a pair moves by more than the tolerance, and where the weights leave fewer than ten effective draws, so
    that nothing can be said. Where the model lies in a plate as a whole, the weights of an item are its own.

    **What it was seen to do** (``benchmarks/temperature_check.py``). Of 32 fits to four and five noisy points, at
    temperatures 1 to 0.1, with 4,000 draws: it warned at 23, whose hard marginals were off the enumerated ones by 0.17 to
    0.54; was silent at 6, off by 0.09 to 0.16; and could not tell at 3, off by 0.18 to 0.28. The corrected marginals were
    off by at most 0.12 where it could tell.

    **Limits.** Weights correct what the draws reach: a guide that misses a mode altogether has even weights and no warning.
    The target has the prior ``M(X_0 + eps)``, as the tightened KL's (``docs/objectives.md``). Effective draws fall fast
    with the number of rows: above about ten rows expect the second warning. Then lower the temperature until the hard
    draws stop changing, or compare with MCMC.

    Args:
        model: the relaxed model.
        guide: a fitted guide with relaxed permutation sites, of any objective.
        *args: of both.
        num_draws: number of draws, at least 2.
        tolerance: largest shift of a probability that goes without a warning, between 0 and 1.
        max_plate_nesting: as for :func:`relaxation_gap`; worth it, as several thousand draws are then cheap.
        **kwargs: of both.

    Raises:
        ValueError: ``num_draws`` below 2, ``tolerance`` not in (0, 1); no relaxed permutation site, the plain model in place
            of the relaxed one, or a subsampled plate; a log density that is NaN or +inf, or no draw of positive density.

    Warns:
        TemperatureWarning: as above.

    Example:
        >>> import pyro
        >>> from pyro_gs import AutoGumbelSinkhorn, UniformPermutation, relax
        >>> def model():
        ...     P = pyro.sample("P", UniformPermutation(3))
        ...     pyro.factor("likelihood", 0.1 * P[..., 0, 0])
        >>> effect = check_temperature_effect(relax(model), AutoGumbelSinkhorn(model), max_plate_nesting=0)
        >>> effect.shift["P"] < 0.2
        True
    """
    check_count(num_draws, "num_draws", least=2)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, but is {tolerance!r}")
    hard: dict[str, list[Tensor]] = {}
    weights: dict[str, list[Tensor]] = {}
    draws = _Draws(model, guide, args, kwargs, num_draws, max_plate_nesting)
    for trace, logs in draws:
        for name in logs:
            _refuse_subsampling(trace.nodes[name]["cond_indep_stack"])
        rounded = _values(trace, logs, True)
        for name, weight in _log_weights(draws, trace, _values(trace, logs, False), rounded).items():
            hard.setdefault(name, []).append(draws.first(rounded[name]))
            weights.setdefault(name, []).append(draws.first(weight))
    marginals, corrected, shift, effective = {}, {}, {}, {}
    for name, values in hard.items():
        P = torch.cat(values)
        log_w = torch.cat(weights[name]).double()
        _refuse_infinite(log_w.amax(0), f"the largest log weight of the draws of site '{name}'")
        w = log_w.softmax(0)
        effective[name] = float((1 / w.square().sum(0)).min())
        w = w.reshape(w.shape + (1,) * (P.dim() - w.dim())).to(P.dtype)
        marginals[name], corrected[name] = P.mean(0), (w * P).sum(0)
        shift[name] = float((marginals[name] - corrected[name]).abs().max())
    unsure = [name for name, count in effective.items() if count < _FEW]
    moved = [name for name in shift if shift[name] > tolerance and name not in unsure]
    if moved:
        text = ", ".join(f"'{name}' by {shift[name]:.2f}" for name in moved)
        warn_user(
            f"the hard permutations of this fit depend on its temperature: weighted to their posterior, a probability of a "
            f"pair moves at site {text}; lower the temperature of guide and model and fit on, or take the corrected ones",
            TemperatureWarning,
        )
    if unsure:
        text = ", ".join(f"'{name}' ({effective[name]:.1f})" for name in unsure)
        warn_user(
            f"whether the hard permutations of this fit depend on its temperature cannot be told, as weights leave fewer "
            f"than {_FEW:g} effective draws of {num_draws} at site {text}; give more (num_draws=...) or compare with MCMC",
            TemperatureWarning,
        )
    return TemperatureEffect(marginals, corrected, shift, effective, num_draws)


class _Draws:
    """Draws of a guide, one after the other or all at once in a plate to the left of the model's, replayed by the model."""

    def __init__(
        self,
        model: Callable[..., Any] | None,
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        num_draws: int,
        max_plate_nesting: int | None,
    ) -> None:
        if max_plate_nesting is not None:
            check_count(max_plate_nesting, "max_plate_nesting", least=0)
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.num_draws = num_draws
        self.dim = None if max_plate_nesting is None else -max_plate_nesting - 1
        self.num_calls = num_draws if self.dim is None else 1

    @torch.no_grad()
    def _trace(self, fn: Callable[..., Any]) -> Any:
        if self.dim is None:
            return poutine.trace(fn).get_trace(*self.args, **self.kwargs)
        with pyro.plate(_PLATE, self.num_draws, dim=self.dim):
            return poutine.trace(fn).get_trace(*self.args, **self.kwargs)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Tensor]]]:
        for _ in range(self.num_calls):
            trace = self._trace(self.guide)
            sites = dict(trace.iter_stochastic_nodes())
            logs = {
                name: log_of(site["value"]).detach()
                for name, site in sites.items()
                if isinstance(getattr(unwrap(site["fn"]), "support", None), constraints.DoublyStochastic)
            }
            if not logs:
                raise ValueError(
                    "guide must have a relaxed permutation site, such as those of AutoGumbelSinkhorn, but draws "
                    f"{name_sites(list(sites)) or 'nothing'} only"
                )
            yield trace, logs

    def replay(self, trace: Any, values: dict[str, Tensor]) -> Any:
        """A trace of the model at a draw of the guide with other values of its permutation sites."""
        changed = trace.copy()
        for name, value in values.items():
            changed.nodes[name] = {**trace.nodes[name], "value": value}
        return self._trace(poutine.replay(self.model, trace=changed))

    def frames(self, trace: Any) -> tuple[Any, ...]:
        """The plate of the draws, where there is one."""
        stacks = get_plate_stacks(trace).values()
        return tuple(frame for frame in next(iter(stacks), ()) if frame.name == _PLATE)

    def total(self, terms: MultiFrameTensor, trace: Any) -> Tensor:
        """The sum of all terms of each draw, of shape (draws,)."""
        total: Tensor | float = terms.sum_to(self.frames(trace))
        if not isinstance(total, Tensor):  # of a model without a term
            total = torch.tensor(float(total), device="cpu")
        return total.expand(self.num_draws // self.num_calls)

    def first(self, value: Tensor) -> Tensor:
        """The value with the draws as its first dimension."""
        return value[None] if self.dim is None else value


def _values(trace: Any, logs: dict[str, Tensor], rounded: bool) -> dict[str, Tensor]:
    """Values of the permutation sites, relaxed with their logarithms or rounded, without what else a guide attaches."""
    out = {}
    for name, log_p in logs.items():
        dtype = trace.nodes[name]["value"].dtype
        out[name] = matching(log_p).to(dtype) if rounded else RelaxedPermutation.wrap(log_p.exp().to(dtype), log_p)
    return out


def _refuse_infinite(values: Tensor, what: str) -> None:
    bad = values[~values.isfinite()]
    if len(bad):
        raise ValueError(f"{what} is {float(bad[0])}, expected finite numbers; look at the model's terms and its data")


def _refuse_subsampling(frames: Any) -> None:
    for frame in frames:
        if frame.full_size is not None and frame.full_size != frame.size:
            raise ValueError(
                f"plate '{frame.name}' must not be subsampled here, but shows {frame.size} of {frame.full_size} items at a "
                "time; give the model all of them"
            )


@torch.no_grad()
def _log_weights(draws: _Draws, trace: Any, relaxed: dict[str, Tensor], rounded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logarithms of the weights of a draw, of the batch shape of each permutation site."""
    prior = draws.replay(trace, relaxed)
    rest = draws.replay(trace, rounded)
    prior.compute_log_prob(lambda name, site: name in relaxed)
    rest.compute_log_prob(lambda name, site: name not in relaxed)
    ratio = MultiFrameTensor()
    stacks = get_plate_stacks(rest)
    for name, frames in stacks.items():
        ratio.add((frames, (prior if name in relaxed else rest).nodes[name]["log_prob"]))
    for name, frames in get_plate_stacks(trace).items():
        node = trace.nodes[name]
        log_q = node["fn"].log_prob(relaxed.get(name, node["value"]))
        ratio.add((frames, -scale_and_mask(log_q, node["scale"], node["mask"])))
    out = {}
    for name in relaxed:
        site = trace.nodes[name]
        own = site["cond_indep_stack"]
        independent = all(set(own) <= set(frames) for frames in stacks.values())
        out[name] = ratio.sum_to(own if independent else draws.frames(trace)).expand(site["fn"].batch_shape)
    return out

"""Single inferences on a model within a budget of time, as :func:`pyro_gs.compare` runs them."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer import NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_gs.infer.autoguide import AutoGumbelSinkhorn
from pyro_gs.infer.autoguide_linderman import AutoRounding, AutoStickBreaking
from pyro_gs.infer.autoguide_matching import AutoGumbelMatching
from pyro_gs.infer.enumeration import enumerate_posterior, permutation_posterior
from pyro_gs.infer.handlers import relax
from pyro_gs.infer.index_handler import indexed
from pyro_gs.infer.log_joint import LogJoint, distinct_candidates
from pyro_gs.infer.mcmc.block_gibbs import BlockGibbs
from pyro_gs.infer.mcmc.convergence import ConvergenceWarning, convergence
from pyro_gs.infer.mcmc.guide_proposal import GuideProposal
from pyro_gs.infer.mcmc.hmc_gibbs import HMCGibbs
from pyro_gs.infer.mcmc.locally_balanced import LocallyBalanced
from pyro_gs.infer.mcmc.move_sequence import MoveSequence
from pyro_gs.infer.mcmc.parallel_tempering import ParallelTempering
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel
from pyro_gs.infer.mcmc.swap_metropolis import SwapMetropolis

Kind = Literal["exact", "variational", "mcmc"]
Marginals = dict[str, Tensor]

STEP_SIZES = (0.3, 0.005)
"""Adam's step size at the beginning and the end of a fit, geometric in between."""

FIRST_TEMPERATURE = 1.0
"""Where annealing begins."""

PARTICLES = 4
"""Draws in a step of a fit."""

FITTED = 0.9
"""Share of the budget that a guide is fitted for; the rest is for its draws and its bound."""

WARMUP = 0.2
"""Share of the budget that a chain warms up."""

ASSISTED = 0.4
"""Share of the budget that a fit before a chain takes."""

NUTS_WARMUP = 200
"""Steps of warm-up where NUTS samples the other latent sites."""

LEAST_DRAWS = 8
"""Draws of a chain below which nothing can be said of it."""

HARD_DRAWS = 10_000
GRADIENT_DRAWS = 4
EVIDENCE_DRAWS = 100  # times the particles
SNAPSHOT_DRAWS = 500


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with its arguments, and what it may cost.

    Attributes:
        model: a Pyro model.
        args: its arguments.
        kwargs: its keyword arguments.
        budget: seconds for each method.
        seed: of each method.
        temperature: of relaxed models and guides.
        snapshots: number of looks at the marginals during a run.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    budget: float
    seed: int
    temperature: float
    snapshots: int

    @property
    def joint(self) -> LogJoint:
        """The log joint density of the model."""
        return LogJoint(self.model, self.args, self.kwargs, normalized=False)


@dataclasses.dataclass(frozen=True, eq=False)
class MethodResult:
    """What a method found.

    Attributes:
        name: of the method.
        kind: ``"exact"``, ``"variational"`` or ``"mcmc"``.
        seconds: of wall-clock time, set-up included.
        draws: permutation matrices by site, (S, ..., n, n): draws of the posterior, of a guide hard ones; of an exact
            posterior its whole support.
        log_weights: log-probabilities of the draws, (S,), where they are not equal.
        marginals: (..., n, n) by site.
        log_evidence: in nats, or None.
        evidence_is: what ``log_evidence`` is: exact, an estimate, or a bound and of what.
        ess_per_second: effective draws a second of wall-clock time, by the bulk of the distance to the mode; None where
            draws are independent or do not move.
        history: seconds and marginals so far, one a snapshot.
    """

    name: str
    kind: Kind
    seconds: float
    draws: dict[str, Tensor]
    log_weights: Tensor | None
    marginals: Marginals
    log_evidence: float | None
    evidence_is: str
    ess_per_second: float | None
    history: list[tuple[float, Marginals]]


Runner = Callable[[str, Task], MethodResult]


class _Clock:
    """Wall-clock time of a run, and when the next snapshot is due."""

    def __init__(self, task: Task, share: float = 1.0) -> None:
        self.start = time.perf_counter()
        self._end = share * task.budget
        self._step = self._end / task.snapshots
        self._next = self._step

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def fraction(self) -> float:
        return min(1.0, self.seconds / self._end)

    def ticks(self) -> Iterator[bool]:
        """One for every step until the time is over; True when a snapshot is due after it."""
        while self.seconds < self._end:
            due = self.seconds >= self._next
            if due:
                self._next += self._step
            yield due


def run_exact(name: str, task: Task) -> MethodResult:
    """Enumerate the permutations; where there are other latent sites, given draws of those by NUTS within the budget."""
    clock = _Clock(task)
    if task.joint.others:
        kernel = NUTS(indexed(task.model))
        with pyro.validation_enabled(False):
            kernel.setup(NUTS_WARMUP, *task.args, **task.kwargs)
            params, draws = kernel.initial_params, []
            for _ in clock.ticks():
                params = kernel.sample(params)
                draws.append({site: kernel.transforms[site].inv(value) for site, value in params.items()})
        kept = draws[NUTS_WARMUP:]
        _check_warmup(name, task, len(draws), NUTS_WARMUP)
        samples = {site: torch.stack([draw[site] for draw in kept]) for site in kept[0]}
        posterior = permutation_posterior(task.model, samples, *task.args, **task.kwargs)
    else:
        posterior = enumerate_posterior(task.model, *task.args, **task.kwargs)
    evidence = posterior.log_evidence
    return MethodResult(
        name,
        "exact",
        clock.seconds,
        posterior.permutations,
        posterior.log_probs,
        posterior.marginals,
        None if evidence is None else float(evidence),
        "exact" if evidence is not None else "",
        None,
        [(clock.seconds, posterior.marginals)],
    )


def _check_warmup(name: str, task: Task, steps: int, warmup: int | None, least: int = 1) -> None:
    """Raise unless ``least`` steps followed the warm-up; None where it has not ended."""
    if warmup is None:
        raise ValueError(
            f"budget must leave '{name}' time for a warm-up and {least} samples, but in {task.budget} s it made {steps} "
            "steps in all; give more seconds"
        )
    if steps < warmup + least:
        raise ValueError(
            f"budget must leave '{name}' time for {warmup} steps of warm-up and {least} samples, but in {task.budget} s it "
            f"made {steps} steps in all; give more seconds"
        )


def _check_bound(bound: float) -> None:
    if not math.isfinite(bound):
        raise ValueError(
            f"its bound is {bound}, as where the guide draws permutations of likelihood zero; forbid them in the prior, "
            "UniformPermutation(n, allowed), or give them a small likelihood in place of none"
        )


def _check_gradient(joint: LogJoint) -> None:
    """Raise where the likelihood changes with the permutations but has no gradient in their matrices."""
    others = {name: node["value"] for name, node in joint.others.items()}
    slopes, scores = [], []
    for draw in distinct_candidates(joint.sites, joint.start, GRADIENT_DRAWS):
        values = {name: value.detach().clone().requires_grad_() for name, value in draw.items()}
        with torch.enable_grad():
            likelihood = joint.evaluate(values, others, None).total[1].sum()
        scores.append(float(likelihood.detach()))
        if likelihood.requires_grad and math.isfinite(scores[-1]):
            found = torch.autograd.grad(likelihood, list(values.values()), allow_unused=True)
            slopes += [slope for slope in found if slope is not None]
    flat = not any(bool((slope != 0).any()) for slope in slopes)
    if flat and max(scores) > -math.inf and max(scores) - min(scores) > 1e-6 * (1 + abs(max(scores))):
        raise ValueError(
            "the likelihood has no gradient in the matrices of the permutations, as where the model takes their argmax, so "
            "there is nothing to fit by; write it in terms of P @ x, or use 'gumbel-matching, score' or a chain"
        )


@dataclasses.dataclass(frozen=True)
class Variational:
    """A guide over the permutations, beside an ``AutoNormal`` for the rest, fitted by SVI.

    Attributes:
        guide: makes the guide of a model and a temperature.
        relaxed: whether it is fitted to the relaxed model.
        bound: what the ELBO bounds.
        annealed: whether guide and prior begin at :data:`FIRST_TEMPERATURE` where the task's is lower, and reach it half
            way; low temperatures have more local optima.
        differentiates: whether the fit takes the gradient of the likelihood in the matrices.
    """

    guide: Callable[[Callable[..., Any], float], Any]
    relaxed: bool
    bound: str
    annealed: bool = False
    differentiates: bool = True

    def __call__(self, name: str, task: Task) -> MethodResult:
        """Fit within the budget."""
        with pyro.get_param_store().scope():
            return self._run(name, task)

    def _run(self, name: str, task: Task) -> MethodResult:
        clock = _Clock(task)
        history: list[tuple[float, Marginals]] = []
        part, svi = self.fit(task, _Clock(task, FITTED), history)
        marginals, draws = _of_guide(part, HARD_DRAWS)
        history.append((clock.seconds, marginals))
        losses = [svi.evaluate_loss(*task.args, **task.kwargs)]
        while len(losses) < EVIDENCE_DRAWS and clock.fraction < 1:
            losses.append(svi.evaluate_loss(*task.args, **task.kwargs))
        bound = -sum(losses) / len(losses)
        _check_bound(bound)
        return MethodResult(name, "variational", clock.seconds, draws, None, marginals, bound, self.bound, None, history)

    def fit(self, task: Task, clock: _Clock, history: list[tuple[float, Marginals]]) -> tuple[Any, SVI]:
        """Fit until the clock's time is over; returns the guide of the permutations and the SVI object."""
        joint = task.joint
        sites = list(joint.sites)
        schedule = self._schedule(task.temperature)
        current = [schedule(0.0)]
        model = relax(task.model, temperature=lambda: current[0]) if self.relaxed else task.model
        if joint.others:
            part = self.guide(poutine.block(task.model, expose=sites), task.temperature)
            guide: Any = AutoGuideList(model)
            guide.append(part)
            guide.append(AutoNormal(poutine.block(task.model, hide=sites)))
        else:
            guide = part = self.guide(task.model, task.temperature)
        if self.differentiates:
            _check_gradient(joint)
        options = {"lr": STEP_SIZES[0]}
        optimizer = PyroOptim(torch.optim.Adam, options)
        elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=joint.vectorize, max_plate_nesting=joint.nesting)
        svi = SVI(model, guide, optimizer, elbo)
        for due in clock.ticks():
            options["lr"] = STEP_SIZES[0] * (STEP_SIZES[1] / STEP_SIZES[0]) ** clock.fraction
            for inner in optimizer.optim_objs.values():
                for group in inner.param_groups:
                    group["lr"] = options["lr"]
            if self.annealed:
                part.temperature = current[0] = schedule(clock.fraction)
            loss = svi.step(*task.args, **task.kwargs)
            if math.isnan(loss):
                _check_bound(-loss)
            if due:
                history.append((clock.seconds, _of_guide(part, SNAPSHOT_DRAWS)[0]))
        if self.annealed:  # of the last step, which the clock may have cut off before the end
            part.temperature = current[0] = task.temperature
        return part, svi

    def _schedule(self, temperature: float) -> Callable[[float], float]:
        """Temperature at a share of the time, 0 to 1."""
        if not self.annealed or temperature >= FIRST_TEMPERATURE:
            return lambda share: temperature
        ratio = temperature / FIRST_TEMPERATURE
        return lambda share: FIRST_TEMPERATURE * ratio ** min(1.0, 2 * share)


def _of_guide(guide: Any, count: int) -> tuple[Marginals, dict[str, Tensor]]:
    draws = guide.hard_sample((count,))
    return {name: value.mean(0) for name, value in draws.items()}, draws


@dataclasses.dataclass(frozen=True)
class Chain:
    """A Markov chain on the permutations, with NUTS for the rest.

    Attributes:
        kernel: makes a kernel without a model; takes the fitted guide where ``assisted``.
        assisted: a variational method whose guide is fitted first, within a share of the budget.
    """

    kernel: Callable[..., PermutationKernel]
    assisted: Variational | None = None

    def __call__(self, name: str, task: Task) -> MethodResult:
        """Sample within the budget."""
        with pyro.get_param_store().scope():
            return self._run(name, task)

    def _run(self, name: str, task: Task) -> MethodResult:
        clock = _Clock(task)
        if self.assisted is None:
            moves = self.kernel()
        else:
            moves = self.kernel(self.assisted.fit(task, _Clock(task, ASSISTED), [])[0])
        joint = task.joint
        if joint.others:
            kernel: Any = HMCGibbs(NUTS(task.model), moves=moves)
            warmup: int | None = NUTS_WARMUP
        else:
            kernel = moves
            kernel.model = task.model
            warmup = None  # until end_warmup
        try:
            return self._sample(name, task, kernel, clock, warmup, joint)
        finally:
            kernel.cleanup()
            moves.model = None  # as the user gave it

    def _sample(
        self, name: str, task: Task, kernel: Any, clock: _Clock, warmup: int | None, joint: LogJoint
    ) -> MethodResult:
        with pyro.validation_enabled(False):
            kernel.setup(sys.maxsize if warmup is None else warmup, *task.args, **task.kwargs)
            params = kernel.initial_params
            start, steps = clock.fraction, 0
            history: list[tuple[float, Marginals]] = []
            kept: dict[str, list[Tensor]] = {site: [] for site in joint.sites}
            for due in clock.ticks():
                params = kernel.sample(params)
                steps += 1
                if warmup is None or steps < warmup:
                    if joint.others or clock.fraction < start + WARMUP * (1 - start):
                        continue
                    kernel.end_warmup()
                    warmup = steps
                    continue
                for site, draws in kept.items():
                    draws.append(params[site].to(torch.bool))
                if due:
                    history.append((clock.seconds, {site: _mean(draws) for site, draws in kept.items()}))
            evidence = kernel.diagnostics().get("log evidence", {}).get("stepping_stone")
        _check_warmup(name, task, steps, warmup, least=LEAST_DRAWS)
        seconds = clock.seconds
        found = {site: torch.stack(values).to(torch.get_default_dtype()) for site, values in kept.items()}
        marginals = {site: value.mean(0) for site, value in found.items()}
        size = effective_draws(found)
        return MethodResult(
            name,
            "mcmc",
            seconds,
            found,
            None,
            marginals,
            evidence,
            "estimate by stepping stones" if evidence is not None else "",
            None if size is None else size / seconds,
            [*history, (seconds, marginals)],
        )


def _mean(draws: list[Tensor]) -> Tensor:
    return torch.stack(draws).to(torch.get_default_dtype()).mean(0)


def effective_draws(draws: Mapping[str, Tensor]) -> float | None:
    """Effective number of draws by the bulk of the distance to the mode, the least over sites; None if constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = convergence(draws)
    sizes = [found[f"{site}_hamming"].worst_ess_bulk for site in draws if f"{site}_hamming" in found]
    return min((size for size in sizes if size is not None), default=None)


def _gumbel_sinkhorn(model: Callable[..., Any], temperature: float, **options: Any) -> AutoGumbelSinkhorn:
    return AutoGumbelSinkhorn(model, temperature=temperature, **options)


_RELAXED = "lower bound for the relaxed model"
_HARD = "lower bound under the prior M(X_0 + eps)"
GUMBEL_SINKHORN = Variational(_gumbel_sinkhorn, True, _RELAXED, True)
STRAIGHT_THROUGH = Variational(functools.partial(_gumbel_sinkhorn, objective="tightened_kl", hard=True), True, _HARD, True)

RUNNERS: dict[str, Runner] = {
    "exact": run_exact,
    "gumbel-sinkhorn": GUMBEL_SINKHORN,
    "gumbel-sinkhorn, tightened KL": Variational(
        functools.partial(_gumbel_sinkhorn, objective="tightened_kl"), True, _RELAXED, True
    ),
    "straight-through": STRAIGHT_THROUGH,
    "gumbel-matching": Variational(
        lambda model, temperature: AutoGumbelMatching(model, gradient="perturb_and_map"), False, _HARD
    ),
    "gumbel-matching, score": Variational(
        lambda model, temperature: AutoGumbelMatching(model), False, _HARD, differentiates=False
    ),
    "rounding": Variational(lambda model, temperature: AutoRounding(model), True, _RELAXED),
    "stick-breaking": Variational(lambda model, temperature: AutoStickBreaking(model), True, _RELAXED),
    "swaps": Chain(SwapMetropolis),
    "locally balanced": Chain(LocallyBalanced),
    "block gibbs": Chain(BlockGibbs),
    "tempering": Chain(ParallelTempering),
    "vi + mcmc": Chain(lambda guide: MoveSequence([GuideProposal(guide=guide), SwapMetropolis()]), GUMBEL_SINKHORN),
}
"""The methods that :func:`pyro_gs.compare` knows by name."""

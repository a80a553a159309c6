"""The methods that ``benchmarks/sinkhorn.py`` times: this library and its peers, each by its own batching if it has one."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import pyro_gs

TARGETS = {torch.float64: 1e-6, torch.float32: 1e-5}  # largest error of a row or column sum that the peers are asked for
LOOPED = 8  # items that are timed of a peer that has no batches; its time is scaled to the whole batch
UNROLLED_BYTES = 3e9  # what the graph of a peer that unrolls its iterations may take
GEOMLOSS_ITERATIONS = 1000  # it spends whatever it is given on annealing; the error falls as one over their number


@dataclass(frozen=True)
class Problem:
    """A batch of matrices; ``backward`` asks for the gradient of ``(P * weights).sum()`` in the logits too."""

    logits: Tensor  # (batch, n, n)
    weights: Tensor
    temperature: float
    backward: bool
    max_sweeps: int  # cap on the iterations of a peer

    @property
    def n(self) -> int:
        """Rows and columns."""
        return self.logits.shape[-1]

    @property
    def target(self) -> float:
        """Marginal error that is asked for."""
        return TARGETS[self.logits.dtype]

    def unrolled_sweeps(self, numbers: int) -> int:
        """Cap on sweeps where each leaves so many numbers in the graph of a backward pass; a multiple of 10."""
        memory = UNROLLED_BYTES / (numbers * self.logits.element_size()) if self.backward else self.max_sweeps
        return max(10, min(self.max_sweeps, int(memory)) // 10 * 10)


Result = tuple[Tensor, Tensor | None]  # the doubly stochastic matrices, and the gradient
Call = Callable[[], Result]
Method = Callable[[Problem], Call]  # whatever is prepared once, such as compilation, happens before the call


def make_problem(
    n: int, batch: int, dtype: torch.dtype, device: str, temperature: float, *, backward: bool, max_sweeps: int
) -> Problem:
    """Standard normal logits plus Gumbel noise, and standard normal weights; seed 0."""
    generator = torch.Generator().manual_seed(0)
    normal, weights, uniform = (f(batch, n, n, generator=generator, dtype=torch.float64) for f in _DRAWS)
    logits = normal - torch.log(-torch.log(uniform))
    return Problem(logits.to(device, dtype), weights.to(device, dtype), temperature, backward, max_sweeps)


_DRAWS = (torch.randn, torch.randn, torch.rand)


def on_torch(plan: Callable[[Tensor, Problem], Tensor], *, items: int | None = None) -> Method:
    """A method of torch operations, on the first ``items`` items only if that is given."""

    def prepare(problem: Problem) -> Call:
        logits, weights = problem.logits[:items], problem.weights[:items]

        def call() -> Result:
            x = logits.detach().requires_grad_(problem.backward)
            p = plan(x, problem)
            return p.detach(), torch.autograd.grad((p * weights).sum(), x)[0] if problem.backward else None

        return call

    return prepare


def _ours(x: Tensor, problem: Problem, *, at_target: bool = False, **options: Any) -> Tensor:
    tol = {"tol": problem.target} if at_target else {}
    return pyro_gs.sinkhorn(x, temperature=problem.temperature, **tol, **options)


def _ours_log(x: Tensor, problem: Problem) -> Tensor:
    return pyro_gs.log_sinkhorn(x, temperature=problem.temperature).exp()


# POT stops on the Euclidean norm of the errors of rows or columns that sum to 1 / n; it bounds the largest error.


def _pot_log(x: Tensor, problem: Problem) -> Tensor:
    n = problem.n
    uniform = torch.full_like(x[0, 0], 1 / n).detach()
    options = {"stopThr": problem.target / n, "numItermax": problem.unrolled_sweeps(2 * x.numel()), "warn": False}
    solve = importlib.import_module("ot.bregman").sinkhorn_log
    return n * torch.stack([solve(uniform, uniform, -item, problem.temperature, **options) for item in x])


def _pot_last_step(x: Tensor, problem: Problem) -> Tensor:
    options = {"tol": problem.target / problem.n, "max_iter": problem.max_sweeps, "grad": "last_step"}
    solve = importlib.import_module("ot").solve
    return problem.n * torch.stack([solve(-item, reg=problem.temperature, **options).plan for item in x])


def _pot_batch(x: Tensor, problem: Problem, *, method: str) -> Tensor:
    numbers = 2 * x.numel() if method == "log_sinkhorn" else 6 * x[..., 0].numel()
    options = {"tol": problem.target / problem.n, "max_iter": problem.unrolled_sweeps(numbers), "method": method}
    grad = "autodiff" if problem.backward else "detach"
    solve = importlib.import_module("ot").solve_batch
    return problem.n * solve(-x, reg=problem.temperature, grad=grad, **options).plan


def _geomloss(x: Tensor, problem: Problem) -> Tensor:
    solve = importlib.import_module("geomloss.ot").solve_batch
    iterations = min(problem.max_sweeps, GEOMLOSS_ITERATIONS)
    return problem.n * solve(-x, reg=problem.temperature, max_iter=iterations).plan


def count_sweeps(problem: Problem, cap: int) -> int:
    """Plain sweeps until every row sum is right to the target, or the cap; for a peer without a stopping rule."""
    z = problem.logits.double() / problem.temperature
    kernel = (z - z.amax(-1, keepdim=True)).exp()
    u = 1 / kernel.sum(-1, keepdim=True)
    for sweep in range(1, cap):
        rows = kernel @ (1 / (kernel.mT @ u))
        if bool(((u * rows - 1).abs() <= problem.target).all()):
            return sweep
        u = 1 / rows
    return cap


def prepare_pygmtools(problem: Problem) -> Call:
    """It takes a fixed number of half-sweeps, so it is given the fewest that reach the target."""
    solve = importlib.import_module("pygmtools").sinkhorn
    sweeps = count_sweeps(problem, problem.unrolled_sweeps(2 * problem.logits.numel()))
    options = {"max_iter": 2 * sweeps, "tau": problem.temperature, "backend": "pytorch"}
    batched = len(problem.logits) > 1  # its other mode is a loop over the batch
    return on_torch(lambda x, _: solve(x, batched_operation=batched, **options))(problem)


# The symmetric system takes half the time of ott's default in float64; in float32 it fails where the default does not.
_SYMMETRIC = {"symmetric": True, "precondition_fun": lambda x: x}
_LOOSE = {"rtol": 1e-4, "atol": 1e-4}  # what float32 reaches; ott's own 1e-6 in float64


def make_ott(device: str) -> Method:
    """ott-jax in ``lse_mode`` with Anderson acceleration and implicit differentiation, compiled before it is timed.

    Raises:
        RuntimeError: jax has no such device.
    """
    jax = importlib.import_module("jax")
    jax.config.update("jax_default_device", jax.devices({"cuda": "gpu"}.get(device, device))[0])
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)  # a failed linear solve is reported as such
    geometry = importlib.import_module("ott.geometry.geometry").Geometry
    problem_class = importlib.import_module("ott.problems.linear.linear_problem").LinearProblem
    solver = importlib.import_module("ott.solvers.linear.sinkhorn").Sinkhorn
    anderson = importlib.import_module("ott.solvers.linear.acceleration").AndersonAcceleration
    implicit = importlib.import_module("ott.solvers.linear.implicit_differentiation").ImplicitDiff
    compiled: dict[Any, Any] = {}

    def compile_for(problem: Problem, inputs: list[Any], loop: bool) -> Any:
        n, double = problem.n, problem.logits.dtype == torch.float64
        sinkhorn = solver(
            threshold=problem.target / n,
            norm_error=4,  # close to the largest error, and above it
            max_iterations=problem.max_sweeps,
            anderson=anderson(memory=10 if n >= 30 or loop else 5, ridge_identity=1e-8 if double else 1e-6),
            implicit_diff=implicit(**(_SYMMETRIC if double else {"solver_kwargs": _LOOSE | {"ridge_kernel": 1 / n}})),
        )

        def loss(x: Any, weights: Any, temperature: Any) -> tuple[Any, Any]:
            p = n * sinkhorn(problem_class(geometry(cost_matrix=-x, epsilon=temperature))).matrix
            return (p * weights).sum(), p

        one = jax.value_and_grad(loss, has_aux=True) if problem.backward else loss

        def in_turn(x: Any, weights: Any, temperature: Any) -> Any:
            return jax.lax.map(lambda item: one(*item, temperature), (x, weights))

        return jax.jit(in_turn if loop else jax.vmap(one, (0, 0, None))).lower(*inputs).compile()

    def prepare(problem: Problem) -> Call:
        jax.config.update("jax_enable_x64", problem.logits.dtype == torch.float64)
        arrays = [jax.numpy.asarray(x.cpu().numpy()) for x in (problem.logits, problem.weights)]
        inputs = [*arrays, jax.numpy.asarray(problem.temperature, arrays[0].dtype)]
        # vmap goes on until the last item is done, which costs more than a loop where the items differ
        loop = len(problem.logits) == 1 or problem.temperature < 0.5
        key = (problem.logits.shape, problem.logits.dtype, problem.backward, problem.max_sweeps, loop)
        if key not in compiled:
            compiled[key] = compile_for(problem, inputs, loop)
        solve = compiled[key]

        def call() -> Result:
            out = jax.block_until_ready(solve(*inputs))
            if problem.backward:
                (_, p), grad = out
                return torch.from_dlpack(p), torch.from_dlpack(grad)
            return torch.from_dlpack(out[1]), None

        return call

    return prepare


OURS, DEFAULT, SWEEPS = "ours-tol", "ours", "sweeps-20"
ONLY_BACKWARD = {"POT-last-step"}  # methods that differ from another one in the backward pass only
POT, OTT = ("POT-log", "POT-last-step", "POT-batch", "POT-kernel"), "ott-jax"
_REQUIRED = {"POT": ("ot",), "geomloss": ("geomloss",), "ott-jax": ("ott", "jax"), "pygmtools": ("pygmtools",)}
NAMES = (DEFAULT, OURS, "ours-log", SWEEPS, *POT, "geomloss", OTT, "pygmtools")


def looped_items(name: str, batch: int) -> int:
    """How many items of a batch a method is timed on."""
    return min(batch, LOOPED) if name in ("POT-log", "POT-last-step") else batch


def find_methods(names: list[str], device: str) -> tuple[dict[str, Method], list[str]]:
    """The methods of these names whose libraries are there, and a line for every library that is not."""
    makers: dict[str, Callable[[], Method]] = {
        DEFAULT: lambda: on_torch(_ours),
        OURS: lambda: on_torch(partial(_ours, at_target=True)),
        "ours-log": lambda: on_torch(_ours_log),
        SWEEPS: lambda: on_torch(partial(_ours, num_iters=20)),
        "POT-log": lambda: on_torch(_pot_log, items=LOOPED),
        "POT-last-step": lambda: on_torch(_pot_last_step, items=LOOPED),
        "POT-batch": lambda: on_torch(partial(_pot_batch, method="log_sinkhorn")),
        "POT-kernel": lambda: on_torch(partial(_pot_batch, method="sinkhorn")),
        "geomloss": lambda: on_torch(_geomloss),
        OTT: lambda: make_ott(device),
        "pygmtools": lambda: prepare_pygmtools,
    }
    found, skipped = {}, {}
    for name in names:
        library = "POT" if name in POT else name
        if not all(find_spec(module) for module in _REQUIRED.get(library, ())):
            skipped[library] = f"skipped {library}: not installed; pip install 'pyro-gs[bench]'"
            continue
        try:
            found[name] = makers[name]()
        except RuntimeError as error:  # jax without the device
            skipped[library] = f"skipped {library}: {error}"
    return found, list(skipped.values())

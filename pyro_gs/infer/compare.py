"""Several inferences on one model, side by side."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm.auto import tqdm

from pyro_gs.infer.log_joint import VectorizationWarning
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel
from pyro_gs.infer.randomness import randomness_kept
from pyro_gs.infer.runners import RUNNERS, Chain, Marginals, MethodResult, Runner, Task
from pyro_gs.ops.logits import check_count, check_temperature
from pyro_gs.ops.matching import matching, to_index

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DEFAULT = ("gumbel-sinkhorn", "swaps", "vi + mcmc")
Method = str | PermutationKernel | tuple[str, PermutationKernel | Runner]


def total_variation(p: Marginals, q: Marginals) -> float:
    """Total variation distance of the rows' marginals, 0 to 1, the mean over rows, items and sites.

    Raises:
        ValueError: other sites or shapes.
    """
    _check_same(p, q)
    rows = torch.cat([(0.5 * (p[name] - q[name]).abs().sum(-1)).reshape(-1).double() for name in p])
    return float(rows.mean())


def bhattacharyya(p: MethodResult, q: MethodResult) -> float:
    """Bhattacharyya distance ``-log sum_P sqrt(p(P) q(P))`` of the joint laws of all permutations, in nats.

    Of draws the law is their frequencies, which are never quite those of the posterior: with K permutations of much mass
    and S effective draws the distance to the truth is about ``K / (8 S)``.
    """
    a, b = _law(p), _law(q)
    overlap = sum(math.sqrt(a[state] * b[state]) for state in a if state in b)
    return max(0.0, -math.log(overlap)) if overlap > 0 else math.inf


def _law(result: MethodResult) -> dict[bytes, float]:
    """Probabilities of the states that the draws take."""
    parts = [to_index(value).flatten(1).cpu() for value in result.draws.values()]
    states, group = torch.unique(torch.cat(parts, 1), dim=0, return_inverse=True)
    draws = len(group)
    if result.log_weights is None:
        weights = torch.full((draws,), 1 / draws, dtype=torch.float64, device="cpu")
    else:
        weights = result.log_weights.cpu().double().softmax(0)
    mass = torch.zeros(len(states), dtype=torch.float64, device="cpu").index_add(0, group, weights)
    return dict(zip((row.tobytes() for row in states.numpy()), mass.tolist(), strict=True))


def _check_same(p: Marginals, q: Marginals) -> None:
    shapes = [{name: tuple(value.shape) for name, value in part.items()} for part in (p, q)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"marginals must be of the same sites and shapes, but are {shapes[0]} and {shapes[1]}")


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What several methods found; ``print`` shows a table.

    Attributes:
        results: by method.
        reference: name of the method that the others are compared with: the exact one where it ran, else none.
        left_out: methods that could not run, and why.

    Example:
        >>> import pyro, pyro_gs as pgs
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.factor("f", 2 * P[..., 0, 0])
        >>> found = pgs.compare(model, methods=["exact"], progress=False)
        >>> found.reference, found.left_out
        ('exact', {})
    """

    results: Mapping[str, MethodResult]
    reference: str | None
    left_out: Mapping[str, str]

    def __getitem__(self, name: str) -> MethodResult:
        """The result of a method.

        Raises:
            KeyError: it did not run; says why.
        """
        if name in self.left_out:
            raise KeyError(f"'{name}' did not run: {self.left_out[name]}")
        return self.results[name]

    def distances(self) -> dict[tuple[str, str], float]:
        """Total variation distance between the marginals of every two methods."""
        names = list(self.results)
        return {
            (a, b): total_variation(self.results[a].marginals, self.results[b].marginals)
            for k, a in enumerate(names)
            for b in names[k + 1 :]
        }

    def map(self, name: str) -> dict[str, Tensor]:
        """The matching of a method's log marginals, by site."""
        return {site: matching(value.log()) for site, value in self[name].marginals.items()}

    def __str__(self) -> str:
        head = ["method", "seconds", "log evidence", "", "ESS/s"]
        rows = []
        truth = None if self.reference is None else self.results[self.reference]
        if truth is not None:
            head += ["TV", "Bhattacharyya"]
        for name, result in self.results.items():
            row = [
                name,
                f"{result.seconds:.1f}",
                "" if result.log_evidence is None else f"{result.log_evidence:.2f}",
                result.evidence_is,
                "" if result.ess_per_second is None else f"{result.ess_per_second:.1f}",
            ]
            if truth is not None:
                row += [f"{total_variation(truth.marginals, result.marginals):.3f}", f"{bhattacharyya(truth, result):.3f}"]
            rows.append(row)
        widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
        ]
        lines += [f"not run: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)

    def plot(self, *, site: str | None = None, item: int | tuple[int, ...] | None = None) -> Figure:
        """Marginals of a permutation side by side, and below how far each method was from the reference over time.

        Args:
            site: which; the first by default.
            item: of a site with several permutations; the first by default.

        Returns:
            The figure.
        """
        from matplotlib import pyplot as plt

        from pyro_gs.plotting import plot_marginals

        names = list(self.results)
        site = next(iter(self.results[names[0]].marginals)) if site is None else site
        columns = max(len(names), 2)
        figure = plt.figure(figsize=(2.4 * columns, 5.0), layout="constrained")
        grid = figure.add_gridspec(2, columns, height_ratios=[1.3, 1])
        for k, name in enumerate(names):
            marginals = self.results[name].marginals[site]
            if marginals.dim() > 2:
                marginals = marginals[(0,) * (marginals.dim() - 2) if item is None else item]
            ax = figure.add_subplot(grid[0, k])
            plot_marginals(marginals, map=matching(marginals.log()), key=False, ax=ax)
            ax.set_title(name, fontsize="medium")
        ax = figure.add_subplot(grid[1, :])
        for name in names:
            result = self.results[name]
            goal = self.results[self.reference or name].marginals
            if name == self.reference:
                continue
            ax.plot(
                [seconds for seconds, _ in result.history],
                [total_variation(goal, marginals) for _, marginals in result.history],
                marker=".",
                label=name,
            )
        what = f"to {self.reference}" if self.reference else "to the method's own last marginals"
        ax.set_xlabel("seconds")
        ax.set_ylabel(f"total variation\n{what}")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize="small")
        return figure


def compare(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    methods: Iterable[Method] = ("exact", *_DEFAULT),
    budget: float = 10.0,
    temperature: float = 0.5,
    seed: int = 0,
    snapshots: int = 20,
    progress: bool = True,
) -> Comparison:
    """Run several inferences on one model, each for the same time, and lay their posteriors side by side.

    Other latent sites than permutations are taken along: by an ``AutoNormal`` beside a guide, by NUTS beside a chain.

    Args:
        model: a Pyro model with latent permutations.
        args: its arguments.
        kwargs: its keyword arguments.
        methods: names (``"exact"``, ``"gumbel-sinkhorn"``, ``"gumbel-sinkhorn, tightened KL"``, ``"straight-through"``,
            ``"gumbel-matching"``, ``"gumbel-matching, score"``, ``"rounding"``, ``"stick-breaking"``, ``"swaps"``,
            ``"locally balanced"``,
            ``"block gibbs"``, ``"tempering"``, ``"vi + mcmc"``), kernels without a model, or pairs of a name and a kernel
            or a function of the name and a ``Task`` that returns a ``MethodResult``. Those that cannot take the model,
            such as the exact one where there are too many permutations, or that raise any other exception, are left out,
            with the reason.
        budget: seconds for each method, set-up included; ``"exact"`` takes what it needs.
        temperature: of guides and relaxed models.
        seed: set before each method (``pyro.set_rng_seed``); the random state of before is put back in the end.
        snapshots: number of looks at the marginals during a run.
        progress: show a progress bar.

    Returns:
        The results, a table and a picture.

    Raises:
        TypeError: ``methods`` is no list, or holds what is none of these.
        ValueError: no method, an unknown name or one given twice, a kernel with a model of its own, a ``budget`` that is not
            positive and finite, a model without a latent permutation, or no method that could run.

    Warns:
        VectorizationWarning: the model does not broadcast; once for all methods.

    Example:
        >>> import pyro, pyro_gs as pgs
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.factor("f", 2 * P[..., 0, 0])
        >>> found = compare(model, methods=["exact", "swaps"], budget=0.2, progress=False)
        >>> sorted(found.results)
        ['exact', 'swaps']
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < math.inf:
        raise ValueError(f"budget must be a positive and finite number of seconds, but is {budget!r}")
    check_temperature(temperature)
    check_count(snapshots, "snapshots", least=1)
    if isinstance(methods, (str, PermutationKernel)) or not isinstance(methods, Iterable):
        raise TypeError(f"methods must be a list, but is {methods!r}; write methods=[{methods!r}]")
    runners: dict[str, Runner] = {}
    for method in methods:
        name, runner = _runner(method)
        if name in runners:
            raise ValueError(f"methods has '{name}' twice; give one of them another name, ('another', kernel)")
        runners[name] = runner
    if not runners:
        raise ValueError(f"methods must hold at least one method, but is empty; the names are {_names()}")
    task = Task(model, tuple(args), dict(kwargs or {}), float(budget), seed, temperature, snapshots)
    with randomness_kept():
        pyro.set_rng_seed(seed)
        _ = task.joint  # a model without a permutation fails here rather than method by method
        results, left_out = _run(runners, task, progress)
    exact = [name for name, result in results.items() if result.kind == "exact"]
    return Comparison(results, exact[0] if exact else None, left_out)


def _run(runners: Mapping[str, Runner], task: Task, progress: bool) -> tuple[dict[str, MethodResult], dict[str, str]]:
    """Results by method, and the reasons of those that have none."""
    results, left_out = {}, {}
    failure: Exception | None = None
    bar = tqdm(runners.items(), disable=not progress, desc="compare")
    for name, runner in bar:
        bar.set_postfix_str(name)
        pyro.set_rng_seed(task.seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", VectorizationWarning)  # was given for the model already
                results[name] = runner(name, task)
        except Exception as error:
            expected = isinstance(error, (ValueError, NotImplementedError))
            left_out[name] = str(error) if expected else f"{type(error).__name__}: {error}"
            failure = error
    if not results:
        raise ValueError(
            "none of the methods could run: " + "; ".join(f"{k}: {v}" for k, v in left_out.items())
        ) from failure
    return results, left_out


def _names() -> str:
    return ", ".join(map(repr, RUNNERS))


def _runner(method: Any) -> tuple[str, Runner]:
    if isinstance(method, tuple) and len(method) == 2 and isinstance(method[0], str):
        name, what = method
    elif isinstance(method, str):
        if method not in RUNNERS:
            raise ValueError(f"methods has '{method}', but the names are {_names()}")
        return method, RUNNERS[method]
    else:
        name, what = type(method).__name__, method
    if isinstance(what, PermutationKernel):
        if what.model is not None or what.potential_fn is not None:
            kind = type(what).__name__
            raise ValueError(f"methods has {kind} with a model of its own; write {kind}(), it gets the model of compare")
        return name, Chain(lambda: what)
    if callable(what) and not isinstance(what, (type, MCMCKernel)):
        return name, what
    raise TypeError(
        f"methods must hold names, kernels without a model, or pairs of a name and one of them, but has {method!r}; for "
        "example methods=['exact', ('long blocks', pyro_gs.BlockGibbs(block_size=6))]"
    )

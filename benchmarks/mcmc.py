"""Speed of the permutation kernels and of an SVI step.

1. Proposals a second of ``SwapMetropolis``, with a ``swap_delta`` hook and without, against a Metropolis kernel that runs
   the model through Pyro for every proposal; turn by turn in one run.
2. Effective draws a second of ``LocallyBalanced`` against ``SwapMetropolis`` on three targets: the smaller one of the bulk
   sizes of the distance to the mode and of the log density, over seconds of sampling.
3. An SVI step with ``AutoGumbelSinkhorn``, split into sampling, densities or their bounds, model and backward pass.

Prints the tables of ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from matching import describe_machine, table
from torch import Tensor

import pyro_gs as pgs
from pyro_gs.infer.log_joint import LogJoint
from pyro_gs.infer.mcmc.swaps import Swaps
from tutorials.celegans.connectome import load_connectome
from tutorials.celegans.evidence import CollapsedEvidence, Statistics
from tutorials.celegans.exchange import ExchangeSearch
from tutorials.celegans.model import collapsed_model
from tutorials.celegans.worms import simulate

NEURONS, WORMS = 139, 4


@dataclass
class Row:
    """One line of the csv; empty where a column does not apply."""

    part: str
    target: str
    n: int
    method: str
    per_second: float = 0.0  # proposals or effective draws
    ratio: float = 0.0  # to the first method of the target, median of the rounds
    acceptance: float = 0.0
    sampling_ms: float = 0.0
    density_ms: float = 0.0
    model_ms: float = 0.0
    backward_ms: float = 0.0
    library_share: float = 0.0


@dataclass(frozen=True)
class Target:
    """A model with arguments, a start, and the hook that scores exchanges."""

    name: str
    model: Callable[..., Any]
    args: tuple[Any, ...]
    start: Tensor
    hook: Callable[[Swaps], Tensor]


def points_model(x: Tensor, y: Tensor, scale: float) -> None:
    """Noisy points in an order of their own."""
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P.to(x) @ x, scale).to_event(2), obs=y)


def points(n: int, scale: float, seed: int = 0) -> Target:
    """Match noisy points to their originals; the likelihood is linear in P."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    truth = torch.randperm(n, generator=generator)
    y = x[truth] + scale * torch.randn(n, 2, generator=generator)
    score = -torch.cdist(y, x).square() / (2 * scale**2)

    def hook(swaps: Swaps) -> Tensor:
        columns = swaps.index[swaps.items[:, None], swaps.rows]
        return (score[swaps.rows, columns.flip(-1)] - score[swaps.rows, columns]).sum(-1)

    return Target(f"points, noise {scale}", points_model, (x, y, scale), pgs.to_matrix(truth), hook)


def graph_model(W: Tensor, Y: Tensor, scale: float) -> None:
    """A noisy matrix seen with its rows and columns in another order."""
    P = pyro.sample("P", pgs.UniformPermutation(len(W))).to(W)
    pyro.sample("Y", dist.Normal(P @ W @ P.mT, scale).to_event(2), obs=Y)


def graph(n: int, scale: float, seed: int = 0) -> Target:
    """Match a noisy matrix; the likelihood is quadratic in P."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(n, n, generator=generator)
    truth = pgs.to_matrix(torch.randperm(n, generator=generator))
    Y = truth @ W @ truth.mT + scale * torch.randn(n, n, generator=generator)

    def hook(swaps: Swaps) -> Tensor:
        index = swaps.index[0]
        moved = index.expand(len(swaps.rows), n).scatter(1, swaps.rows, index[swaps.rows.flip(-1)])
        after = W[moved[:, :, None], moved[:, None, :]] - Y
        before = W[index[:, None], index[None, :]] - Y
        return (before.square().sum() - after.square().sum((1, 2))) / (2 * scale**2)

    return Target(f"graph, noise {scale}", graph_model, (W, Y, scale), truth, hook)


def worms(at_truth: bool) -> Target:
    """The main job's model with the weights integrated out."""
    connectome = load_connectome("directed").thin(NEURONS, torch.Generator().manual_seed(0))
    data = simulate(connectome, worms=WORMS, known=0.2, eta=0.1, seed=0)
    evidence = CollapsedEvidence(connectome.adjacency, Statistics.from_traces(data.traces), data.sigma, data.weight_scale)
    torch.manual_seed(0)
    start = pgs.to_matrix(data.truth) if at_truth else pgs.UniformPermutation(NEURONS, data.allowed).sample()
    name = f"worms, {'at the truth' if at_truth else 'from the prior'}"
    hook = ExchangeSearch(evidence, data.allowed).swap_delta
    return Target(name, collapsed_model, (evidence, data.allowed), start, hook)


class EachThroughPyro:
    """Metropolis by exchanges, the model run through Pyro for every proposal."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.P = target.start.clone()
        self.score = self._score(self.P)
        self.proposed = self.accepted = 0

    def _score(self, P: Tensor) -> float:
        with torch.no_grad():
            model = poutine.condition(self.target.model, {"P": P})
            return float(poutine.trace(model).get_trace(*self.target.args).log_prob_sum())

    def run(self, seconds: float) -> float:
        """Proposals a second."""
        n = self.P.shape[-1]
        items = self.P.reshape(-1, n, n)
        before, start = self.proposed, time.perf_counter()
        with pyro.validation_enabled(False):
            while time.perf_counter() - start < seconds:
                item = int(torch.randint(len(items), ()))
                a, b = torch.randperm(n)[:2].tolist()
                moved = items.clone()
                moved[item, [a, b]] = items[item, [b, a]]
                score = self._score(moved.reshape(self.P.shape))
                self.proposed += 1
                if float(torch.rand(()).log()) < score - self.score:
                    items, self.score = moved, score
                    self.accepted += 1
        self.P = items.reshape(self.P.shape)
        return (self.proposed - before) / (time.perf_counter() - start)


class Library:
    """``SwapMetropolis`` on a target."""

    def __init__(self, target: Target, hook: bool, num_steps: int) -> None:
        self.kernel = pgs.SwapMetropolis(target.model, swap_delta=target.hook if hook else None, num_steps=num_steps)
        self.kernel.initial_params = {"P": target.start}
        self.num_steps = num_steps
        with pyro.validation_enabled(False):
            self.kernel.setup(0, *target.args)
        self.params = self.kernel.initial_params

    def run(self, seconds: float) -> float:
        """Proposals a second."""
        made, start = 0, time.perf_counter()
        before = self.kernel.num_proposed
        with pyro.validation_enabled(False):
            while time.perf_counter() - start < seconds:
                self.params = self.kernel.sample(self.params)
                made += 1
        return (self.kernel.num_proposed - before) / (time.perf_counter() - start)


def measure_proposals(targets: Sequence[Target], seconds: float, rounds: int) -> list[Row]:
    """Proposals a second, turn by turn."""
    rows = []
    for target in targets:
        n = target.start.shape[-1]
        pyro.set_rng_seed(0)
        steps = min(500, n * (n - 1) // 2)
        plain = EachThroughPyro(target)
        methods: dict[str, Any] = {
            "each through Pyro": plain,
            "SwapMetropolis": Library(target, False, steps),
            "SwapMetropolis, swap_delta": Library(target, True, steps),
        }
        found: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(rounds + 1):  # the first is a warm-up
            for name, method in methods.items():
                found[name].append(method.run(seconds))
        base = found["each through Pyro"][1:]
        for name, speeds in found.items():
            method = methods[name]
            accepted = plain.accepted / plain.proposed if method is plain else method.kernel.acceptance_rate
            ratio = median(s / b for s, b in zip(speeds[1:], base, strict=True))
            rows.append(Row("proposals", target.name, n, name, median(speeds[1:]), ratio, accepted))
            print(rows[-1], flush=True)
    return rows


def effective_draws(kernel: Any, target: Target, seconds: float) -> tuple[float, float]:
    """Effective draws a second, and the acceptance rate, of a kernel that starts at the truth."""
    joint = LogJoint(target.model, target.args, normalized=False)
    kernel.model = target.model
    kernel.initial_params = {"P": target.start}
    with pyro.validation_enabled(False):
        kernel.setup(0, *target.args)
        params, draws = kernel.initial_params, []
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            params = kernel.sample(params)
            draws.append(params["P"].to(torch.bool))
        spent = time.perf_counter() - start
        values = torch.stack(draws).double()
        log_density = torch.cat([joint.evaluate({"P": part}, {}, len(part)).total.sum(0) for part in values.split(200)])
    found = pgs.convergence({"P": values}, log_density=log_density)
    sizes = [found[name].worst_ess_bulk for name in ("P_hamming", "log_density") if found[name].defined]
    return min(sizes, default=0.0) / spent, kernel.acceptance_rate


def measure_ess(targets: Sequence[Target], seconds: float, rounds: int) -> list[Row]:
    """Effective draws a second, turn by turn."""
    rows = []
    for target in targets:
        n = target.start.shape[-1]
        hooked = {"swap_delta": target.hook}
        methods: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            "SwapMetropolis": (pgs.SwapMetropolis, {}),
            "LocallyBalanced": (pgs.LocallyBalanced, {}),
            "SwapMetropolis, swap_delta": (pgs.SwapMetropolis, hooked),
            "LocallyBalanced, swap_delta": (pgs.LocallyBalanced, hooked),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
        for round_ in range(rounds):
            for name, (make, options) in methods.items():
                pyro.set_rng_seed(round_)
                found[name].append(effective_draws(make(**options), target, seconds))
        base = [size for size, _ in found["SwapMetropolis"]]
        for name, results in found.items():
            sizes = [size for size, _ in results]
            ratio = median(s / b for s, b in zip(sizes, base, strict=True))
            accepted = median(rate for _, rate in results)
            rows.append(Row("effective draws", target.name, n, name, median(sizes), ratio, accepted))
            print(rows[-1], flush=True)
    return rows


def split_step(
    name: str, n: int, model: Callable[..., Any], args: tuple[Any, ...], repeats: int, objective: Any = "density"
) -> Row:
    """Parts of an SVI step in milliseconds, medians over repeats.

    The model's part is its likelihood at the sample, forward and backward on its own; the library's share is all but it.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = pgs.AutoGumbelSinkhorn(model, objective=objective)
    relaxed = pgs.relax(model)
    guide(*args)
    parameters = list(guide.parameters())
    parts: list[list[float]] = []
    for _ in range(repeats + 2):  # the first two are warm-ups
        for parameter in parameters:
            parameter.grad = None
        times = [time.perf_counter()]
        guide_trace: Any = poutine.trace(guide).get_trace(*args)
        times.append(time.perf_counter())
        model_trace: Any = poutine.trace(poutine.replay(relaxed, trace=guide_trace)).get_trace(*args)
        model_trace.compute_log_prob(lambda name, site: name != "P")
        times.append(time.perf_counter())
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        P = model_trace.nodes["P"]["value"].detach().as_subclass(Tensor).requires_grad_()
        alone: Any = poutine.trace(poutine.condition(model, {"P": P}))
        start = time.perf_counter()
        with pyro.validation_enabled(False):
            trace = alone.get_trace(*args)
            trace.compute_log_prob(lambda name, site: name != "P")
        likelihood = sum(site["log_prob_sum"] for site in trace.nodes.values() if "log_prob_sum" in site)
        likelihood.backward()
        alone_time = time.perf_counter() - start
        steps = [b - a for a, b in itertools.pairwise(times)]
        parts.append([*(1e3 * step for step in steps), 1 - alone_time / sum(steps)])
    sampling, model_ms, density, backward, share = (median(column) for column in zip(*parts[2:], strict=True))
    return Row(
        "SVI step",
        name,
        n,
        objective,
        sampling_ms=sampling,
        density_ms=density,
        model_ms=model_ms,
        backward_ms=backward,
        library_share=share,
    )


def measure_steps(repeats: int) -> list[Row]:
    """SVI steps on points and on the worms."""
    rows = []
    for n in (10, 100, 279):
        target = points(n, 0.5)
        rows.append(split_step(target.name, n, target.model, target.args, repeats))
        print(rows[-1], flush=True)
    target = worms(at_truth=True)
    for objective in ("density", "tightened_kl", "noise_kl"):
        rows.append(split_step("worms", NEURONS, target.model, target.args, repeats, objective))
        print(rows[-1], flush=True)
    return rows


def report(rows: Sequence[Row]) -> None:
    """Print the tables of the three parts."""
    print(f"\n{describe_machine()}\n")
    for part, title in (("proposals", "proposals a second"), ("effective draws", "effective draws a second")):
        chosen = [row for row in rows if row.part == part]
        if chosen:
            head = ["target", "n", "kernel", title, "ratio", "accepted"]
            cells = [
                [row.target, str(row.n), row.method, f"{row.per_second:,.4g}", f"{row.ratio:.3g}", f"{row.acceptance:.3f}"]
                for row in chosen
            ]
            print(table(head, cells) + "\n")
    steps = [row for row in rows if row.part == "SVI step"]
    if steps:
        head = ["model", "n", "objective", "sampling, ms", "densities, ms", "model, ms", "backward, ms", "library's share"]
        cells = [
            [
                row.target,
                str(row.n),
                row.method,
                *(f"{x:.2f}" for x in (row.sampling_ms, row.density_ms, row.model_ms, row.backward_ms)),
                f"{row.library_share:.2f}",
            ]
            for row in steps
        ]
        print(table(head, cells))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--parts", nargs="+", choices=["proposals", "ess", "steps"], default=["proposals", "ess", "steps"])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each method (default: 5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mcmc.csv")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows: list[Row] = []
    if "proposals" in args.parts:
        targets = [points(10, 0.1), points(10, 0.5), points(30, 0.1), points(30, 0.5), worms(True), worms(False)]
        rows += measure_proposals(targets, args.seconds, args.rounds)
    if "ess" in args.parts:
        rows += measure_ess([points(30, 0.3), points(12, 0.8), graph(12, 4.0)], 3 * args.seconds, args.rounds)
    if "steps" in args.parts:
        rows += measure_steps(20)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    report(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

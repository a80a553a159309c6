"""Long runs: is memory flat, does anything drift, does anything become NaN? ``python benchmarks/soak.py``.

Three parts, each a table: SVI for 20,000 steps and a chain of 50,000 draws, with the process's memory over the run; SVI for
10,000 steps in float32 at temperatures down to 1e-3 on three models. Exits with 1 if a value is not finite, a draw is not
what it should be, or memory grows by more than ``LEAK`` KiB for each thousand steps; losses and draws are not kept.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import report
import torch
from joblib import Parallel, delayed
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.mcmc import StreamingMCMC
from pyro.ops.streaming import CountMeanStats, StatsOfDict
from pyro.optim import ClippedAdam
from torch import Tensor
from tqdm import tqdm

import pyro_gs as pgs

SVI_STEPS = 20_000
DRAWS = 50_000
COLD_STEPS = 10_000
TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3)
LEAK = 50.0  # KiB; a tensor of 5 x 5 in float32 with its Python object is about two thirds of one
N = 5


def resident() -> float:
    """KiB of this process in memory, after garbage is collected."""
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def points() -> tuple[Tensor, Tensor]:
    """Points, and the same in another order with noise."""
    pyro.set_rng_seed(0)
    x = torch.randn(N, 2)
    return x, x[torch.randperm(N)] + 0.3 * torch.randn(N, 2)


X, Y = points()


def full() -> None:
    """All permutations of points."""
    P = pyro.sample("P", pgs.UniformPermutation(N))
    pyro.sample("y", dist.Normal(P @ X, 0.3).to_event(2), obs=Y)


def masked() -> None:
    """A band of allowed pairs, in a plate of two."""
    band = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 2
    with pyro.plate("items", 2):
        P = pyro.sample("P", pgs.UniformPermutation(N, band.expand(2, N, N)))
        pyro.sample("y", dist.Normal(P @ X, 0.3).to_event(2), obs=Y.expand(2, N, 2))


def informed() -> None:
    """A prior with logits, and a likelihood that is no function of P @ x."""
    P = pyro.sample("P", pgs.GibbsPermutation(4 * torch.cdist(X, Y).neg()))
    W = X @ X.T
    pyro.sample("w", dist.Normal(P @ W @ P.mT, 0.5).to_event(2), obs=Y @ Y.T)


MODELS: dict[str, Callable[[], None]] = {"full": full, "masked": masked, "informed": informed}


def fit(model: Callable[[], None], temperature: float) -> tuple[pgs.AutoGumbelSinkhorn, SVI]:
    """A guide and its SVI, in torch's default dtype."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide = pgs.AutoGumbelSinkhorn(model, temperature=temperature)
    guide()
    relaxed = pgs.relax(model, temperature=temperature)
    return guide, SVI(relaxed, guide, ClippedAdam({"lr": 0.01}), Trace_ELBO())


def growth(marks: list[float], every: int) -> float:
    """KiB for each thousand steps, over the second half of the run."""
    half = marks[len(marks) // 2 :]
    return (half[-1] - half[0]) / (every * (len(half) - 1)) * 1000


def drift(value: Tensor) -> float:
    """How far the sums of rows and columns of matrices are from one."""
    return max(float((value.sum(dim) - 1).abs().max()) for dim in (-1, -2))


def long_svi(steps: int) -> list[str]:
    """Memory, and sums of the guide's draws after a run."""
    every = max(1, steps // 20)
    guide, svi = fit(full, 0.5)
    marks = []
    for step in tqdm(range(1, steps + 1), desc="SVI", disable=None):
        if not math.isfinite(svi.step()):
            raise ArithmeticError(f"the loss of step {step} is not finite")
        if step % every == 0:
            marks.append(resident())
    relaxed = guide.relaxed_sample((100,))["P"]
    hard = guide.hard_sample((100,))["P"]
    if not torch.equal(hard, hard.round()) or drift(hard) > 0:
        raise ArithmeticError(f"a hard draw is no permutation after {steps} steps")
    return [f"SVI, {steps:,} steps", f"{growth(marks, every):.1f}", f"{drift(relaxed):.1e}"]


def long_chain(draws: int) -> list[str]:
    """Memory over a chain that keeps the mean of its draws only, and how far that is from the exact one."""
    every = max(1, draws // 20)
    marks: list[float] = []

    def mark(_: object, draw: dict[str, Tensor], stage: str, step: int) -> None:
        if drift(draw["P"]) > 0 or not torch.equal(draw["P"], draw["P"].round()):
            raise ArithmeticError(f"draw {step} is no permutation")
        if stage == "Sample" and step % every == 0:
            marks.append(resident())

    pyro.set_rng_seed(1)
    mean = StatsOfDict(default=CountMeanStats)
    mcmc = StreamingMCMC(
        pgs.SwapMetropolis(full), draws, warmup_steps=200, statistics=mean, hook_fn=mark, disable_progbar=True
    )
    mcmc.run()
    found = mcmc.get_statistics(group_by_chain=False)["P"]["mean"]
    error = float((found - pgs.enumerate_posterior(full).marginals["P"]).abs().max())
    return [f"MCMC, {draws:,} draws", f"{growth(marks, every):.1f}", f"marginals off by {error:.1e}"]


def not_finite(name: str, temperature: float, steps: int) -> int:
    """Losses and parameters that are not finite in a run in float32."""
    torch.set_num_threads(1)
    guide, svi = fit(MODELS[name], temperature)
    bad = sum(not math.isfinite(svi.step()) for _ in range(steps))
    return bad + int(guide.logits("P").isnan().sum())


def cold(steps: int, temperatures: tuple[float, ...], jobs: int = 1) -> list[list[str]]:
    """What is not finite, by model and temperature; so many runs at once."""
    runs = [(name, temperature) for name in MODELS for temperature in temperatures]
    found = Parallel(jobs, return_as="generator")(delayed(not_finite)(*run, steps) for run in runs)
    counts = dict(zip(runs, tqdm(found, total=len(runs), desc="cold", disable=None), strict=True))
    return [[name, *(str(counts[name, temperature]) for temperature in temperatures)] for name in MODELS]


def main(arguments: list[str] | None = None) -> int:
    """Run the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps")
    parser.add_argument("--jobs", type=int, default=1, help="cold runs at once")
    options = parser.parse_args(arguments)
    scale = options.scale
    steps, draws, cold_steps = (max(40, round(scale * count)) for count in (SVI_STEPS, DRAWS, COLD_STEPS))
    rows = [long_svi(steps), long_chain(draws)]
    print(report.markdown([["run", "KiB a thousand steps, second half", "constraints"], *rows]))
    table = cold(cold_steps, TEMPERATURES, options.jobs)
    print(f"\nNot finite, of {cold_steps:,} steps in float32:\n")
    print(report.markdown([["model", *(f"temperature {t:g}" for t in TEMPERATURES)], *table]))
    leaks = [row[0] for row in rows if scale >= 1 and float(row[1]) > LEAK]
    bad = [row[0] for row in table if any(count != "0" for count in row[1:])]
    for what, names in (("memory grows", leaks), ("not finite", bad)):
        if names:
            print(f"\n{what}: {', '.join(names)}")
    return int(bool(leaks or bad))


if __name__ == "__main__":
    raise SystemExit(main())

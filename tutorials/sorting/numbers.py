"""Sorting lists of numbers, the paper's protocol: train on U(0, 1), test on longer lists and on other intervals.

Numbers are drawn in float32, in which neighbours in U(1000, 1001) are 6e-5 apart: equal ones are exchangeable. Networks are
trained in float32 and tested in float64, all of them: in float32 rounding merges, or swaps, what lies so close.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_gs.nn import EachItem
from tutorials.sorting.methods import Method, Sorter, Standardized, ordering, right_positions
from tutorials.training import train

__all__ = ["INTERVALS", "METHODS", "SIZES", "NumbersJob", "draw_lists", "make_sorter", "measure", "run_job"]

INTERVALS = ((0, 1), (0, 10), (0, 1000), (1, 2), (10, 11), (100, 101), (1000, 1001))
"""Numbers of a test are uniform on each of these."""

SIZES = (5, 10, 15, 80, 100, 120)
"""Lengths of the lists of a test."""

TRAINED = 10
"""Length of the lists on which networks for any length are trained."""

BATCH = 10
LEARNING_RATE = 1e-2
_HIDDEN = 32

METHODS = {
    "paper": Method("Gumbel-Sinkhorn, the paper's form", "row", sweeps=20, noise=1.0, loss="squared error"),
    "paper-no-noise": Method("Sinkhorn, the paper's form", "row", sweeps=20, loss="squared error"),
    "converged": Method("row of scores, converged", "row", loss="squared error"),
    "converged-ce": Method("row of scores, converged, cross entropy", "row"),
    "paper-standardized": Method(
        "Gumbel-Sinkhorn, the paper's form, inputs standardized",
        "row",
        sweeps=20,
        noise=1.0,
        loss="squared error",
        standardized=True,
    ),
    "position": Method("features of the position", "position"),
    "position-standardized": Method("features of the position, inputs standardized", "position", standardized=True),
    "rank": Method("one number an item, linear", encoder="linear"),
    "rank-gumbel": Method("one number an item, linear, Gumbel noise", encoder="linear", noise=1.0),
    "rank-mlp": Method("one number an item, MLP"),
    "rank-mlp-standardized": Method("one number an item, MLP, inputs standardized", standardized=True),
    "neuralsort": Method("NeuralSort, MLP", relaxation="neural_sort"),
    "softsort": Method("SoftSort, MLP", relaxation="soft_sort"),
    "diffsort": Method("diffsort (odd-even), MLP", relaxation="odd_even"),
}
"""Methods by the name that ``--methods`` takes."""


@dataclass(frozen=True)
class NumbersJob:
    """One network, trained and tested.

    Attributes:
        method: A key of `METHODS`.
        n: Length of the lists it is trained on.
        seed: Of parameters and batches.
        steps: Of Adam.
        lists: Test lists for each interval and length.
    """

    method: str
    n: int
    seed: int
    steps: int
    lists: int

    @property
    def settings(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    @property
    def seconds(self) -> float:
        """About how long it takes, on one core."""
        return float(self.steps * 0.004 * (1 + self.n / 15) ** 1.5 + self.lists * 0.03)


class _Objective(nn.Module):
    """Lists of U(0, 1) and the loss of sorting them."""

    def __init__(self, sorter: Sorter, n: int) -> None:
        super().__init__()
        self.sorter = sorter
        self.n = n

    def forward(self, generator: torch.Generator, share: float) -> Tensor:
        """The loss of a batch."""
        device = next(self.parameters()).device
        values = torch.rand(BATCH, self.n, generator=generator, dtype=torch.float32).to(device)
        return self.sorter.loss(values[..., None], ordering(values).to(values.dtype), item_dim=1)


def make_sorter(method: Method, n: int, seed: int) -> Sorter:
    """A network for numbers, (..., n, 1), at temperature 1 as in the paper."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mlp = [nn.Linear(1, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU()]
        linear = method.encoder == "linear"
        each = EachItem(nn.Identity() if linear else nn.Sequential(*mlp))
        items = Standardized(each) if method.standardized else each
        return Sorter(items, 1 if linear else _HIDDEN, n, method, temperature=1.0).float()


def draw_lists(interval: tuple[float, float], lists: int, n: int, generator: torch.Generator) -> Tensor:
    """Lists of numbers uniform on an interval, float32 (lists, n)."""
    low, high = interval
    values: Tensor = torch.rand(lists, n, generator=generator, dtype=torch.float32)
    return values.mul_(high - low).add_(low)


def measure(sorter: Sorter, sizes: tuple[int, ...], lists: int) -> dict[str, float]:
    """Proportions of wrong positions and of lists with any error, on lists that are the same for every network.

    Args:
        sorter: In eval mode; float64 afterwards.
        sizes: Lengths of the lists.
        lists: How many of each.

    Returns:
        By ``wrong_{low}_{high}_{n}`` and ``any_{low}_{high}_{n}``.
    """
    sorter = sorter.double()
    device = next(sorter.parameters()).device
    found: dict[str, float] = {}
    for n in sizes:
        generator = torch.Generator().manual_seed(n)
        for low, high in INTERVALS:
            values = draw_lists((low, high), lists, n, generator).to(device)
            wrong = ~right_positions(sorter.solve(values.double()[..., None]), values)
            found[f"wrong_{low}_{high}_{n}"] = float(wrong.double().mean())
            found[f"any_{low}_{high}_{n}"] = float(wrong.any(-1).double().mean())
    return found


def run_job(job: NumbersJob, folder: Path, device: str = "cpu") -> dict[str, float]:
    """Train and test; networks for any length are tested on all of `SIZES`.

    Args:
        job: What to run.
        folder: Of checkpoints.
        device: Of the network.

    Returns:
        The figures of `measure`, and ``any_wrong``, the worst share of lists with an error, ``loss``, the mean of the last
        hundred steps.
    """
    method = METHODS[job.method]
    sorter = make_sorter(method, job.n, job.seed).to(device)
    trained = {"method": job.method, "n": job.n}
    losses = train(
        _Objective(sorter, job.n),
        job.steps,
        path=folder / f"{job.method}-{job.n}-{job.seed}-{job.steps}.pt",
        seed=job.seed,
        settings=trained,
        learning_rate=LEARNING_RATE,
    )
    found = measure(sorter, SIZES if method.any_size else (job.n,), job.lists)
    worst = max(value for name, value in found.items() if name.startswith("any_"))
    return {**found, "any_wrong": worst, "loss": sum(losses[-100:]) / len(losses[-100:])}

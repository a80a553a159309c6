"""Sorting images of four-digit numbers, the large-MNIST task of Grover et al. (2019), on the 5,000 digits at hand.

Digits are split into train, validation and test before numbers are put together, so that no test image shows a digit's image
that training has seen. In a set equal numbers are exchangeable.

The published code (github.com/ermongroup/neuralsort, ``tf/run_sort.py``) makes one target for all methods by NeuralSort,
whose rows are positions and whose columns are items. The matrix of its Sinkhorn baselines has items as rows, as each row is
a function of one image. So these are trained, and scored, on the inverse permutation, which no such network can give: rows
that depend on one item each permute with the items, ``Q(pi x) = pi Q(x)``, but the inverse has its columns permuted. The
best it can do is to be right where the permutation is its own inverse, in 4 of 6 cases at n = 3, in 26 of 120 at n = 5, in
232 of 5,040 at n = 7 (`inverse_ceiling`). The methods ``published`` have this target.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_gs.nn import EachItem
from tutorials.pictures import Split, mnist
from tutorials.sorting.methods import Method, Sorter, ordering, right_positions
from tutorials.training import load_checkpoint, train

__all__ = [
    "METHODS",
    "TEMPERATURES",
    "DigitsJob",
    "choose_temperature",
    "draw_sets",
    "inverse_ceiling",
    "load_sorter",
    "make_sorter",
    "measure",
    "run_job",
]

PLACES = 4
"""Digits of a number."""

TEMPERATURES = (0.25, 1.0, 4.0)
"""Among which each method's is chosen, by the share of fully right validation sets."""

IMAGES = 100
"""About as many a batch, in sets."""

LEARNING_RATE = 1e-3
_FEATURES = 64
_CHECKED = 100  # sets at once in a test

METHODS = {
    "published": Method("Sinkhorn, row of scores, 20 sweeps, inverse target", "row", sweeps=20, inverse=True),
    "published-gumbel": Method(
        "Gumbel-Sinkhorn, row of scores, 20 sweeps, inverse target", "row", sweeps=20, noise=1.0, samples=5, inverse=True
    ),
    "row-20": Method("Sinkhorn, row of scores, 20 sweeps", "row", sweeps=20),
    "row-20-gumbel": Method("Gumbel-Sinkhorn, row of scores, 20 sweeps", "row", sweeps=20, noise=1.0, samples=5),
    "row": Method("Sinkhorn, row of scores, converged", "row"),
    "row-gumbel": Method("Gumbel-Sinkhorn, row of scores, converged", "row", noise=1.0, samples=5),
    "row-squared": Method("Sinkhorn, row of scores, converged, squared error", "row", loss="squared error"),
    "rank": Method("Sinkhorn, one number an item"),
    "rank-gumbel": Method("Gumbel-Sinkhorn, one number an item", noise=1.0, samples=5),
    "neuralsort": Method("NeuralSort", relaxation="neural_sort"),
    "softsort": Method("SoftSort", relaxation="soft_sort"),
    "odd-even": Method("diffsort, odd-even", relaxation="odd_even"),
    "bitonic": Method("diffsort, bitonic", relaxation="bitonic"),
}
"""Methods by the name that ``--methods`` takes."""


@dataclass(frozen=True)
class DigitsJob:
    """One network, trained, validated and tested.

    Attributes:
        method: A key of `METHODS`.
        n: Size of the sets.
        seed: Of parameters and batches.
        temperature: Of the relaxation.
        steps: Of Adam.
        scale: Divisor of the resolution, 1 or 2: of numbers of 28 x 112 or 14 x 56 pixels.
        sets: Validation sets, and test sets.
    """

    method: str
    n: int
    seed: int
    temperature: float
    steps: int
    scale: int
    sets: int

    @property
    def settings(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    @property
    def seconds(self) -> float:
        """About how long it takes, on one core."""
        batch = {1: 0.4, 2: 0.07}[self.scale]
        return batch * (self.steps + 0.7 * self.sets * self.n / IMAGES)


class _Objective(nn.Module):
    """Sets of training images and the loss of sorting them."""

    def __init__(self, sorter: Sorter, n: int, scale: int) -> None:
        super().__init__()
        self.sorter = sorter
        self.n = n
        self.scale = scale

    def forward(self, generator: torch.Generator, share: float) -> Tensor:
        """The loss of a batch."""
        device = next(self.parameters()).device
        images, numbers = draw_sets("train", max(1, IMAGES // self.n), self.n, self.scale, generator)
        target = ordering(numbers).to(device, images.dtype)
        return self.sorter.loss(images.to(device), target, item_dim=3)


def make_sorter(method: Method, n: int, seed: int, temperature: float, scale: int) -> Sorter:
    """The network of Grover et al. (2019): two convolutions of 32 and 64 channels, a layer of 64, the method's scores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = 28 // scale // 2 // 2
        cnn = nn.Sequential(
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * side * (PLACES * 28 // scale // 2 // 2), _FEATURES),
            nn.ReLU(),
        )
        return Sorter(EachItem(cnn, item_dim=3), _FEATURES, n, method, temperature).float()


@functools.cache
def _digits(split: Split, scale: int) -> Tensor:
    """Images by label, (10, each, side, side)."""
    images, labels = mnist(split)
    images = functional.avg_pool2d(images.float()[:, None], scale)[:, 0]
    return torch.stack([images[labels == digit] for digit in range(10)])


def draw_sets(split: Split, sets: int, n: int, scale: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sets of numbers, uniform on 0 to 9999, as images.

    Args:
        split: Whose digits.
        sets: How many.
        n: Size of a set.
        scale: Divisor of the resolution.
        generator: Of torch.

    Returns:
        Images (sets, n, 1, 28 / scale, 112 / scale), 0 to 1, and the numbers (sets, n).
    """
    digits = _digits(split, scale)
    shown = torch.randint(10, (sets, n, PLACES), generator=generator)
    which = torch.randint(digits.shape[1], shown.shape, generator=generator)
    images = digits[shown, which].transpose(-3, -2).flatten(-2)
    return images[:, :, None], (shown * 10 ** torch.arange(PLACES - 1, -1, -1)).sum(-1)


def measure(sorter: Sorter, split: Split, n: int, scale: int, sets: int) -> dict[str, float]:
    """Share of right positions and of fully right sets, on sets that are the same for every network.

    Returns:
        By ``{split}_positions`` and ``{split}_sets``.
    """
    generator = torch.Generator().manual_seed(n)
    device = next(sorter.parameters()).device
    right = []
    for start in range(0, sets, _CHECKED):
        images, numbers = draw_sets(split, min(_CHECKED, sets - start), n, scale, generator)
        right.append(right_positions(sorter.solve(images.to(device)).cpu(), numbers))
    found = torch.cat(right)
    return {
        f"{split}_positions": float(found.double().mean()),
        f"{split}_sets": float(found.all(-1).double().mean()),
    }


def run_job(job: DigitsJob, folder: Path, device: str = "cpu") -> dict[str, float]:
    """Train, validate and test.

    Args:
        job: What to run.
        folder: Of checkpoints.
        device: Of the network.

    Returns:
        The figures of `measure` on the validation and the test split, and ``loss``, the mean of the last hundred steps.
    """
    objective = _objective(job).to(device)
    losses = train(
        objective,
        job.steps,
        path=_path(job, folder),
        seed=job.seed,
        settings={name: value for name, value in job.settings.items() if name not in ("sets", "steps", "seed")},
        learning_rate=LEARNING_RATE,
    )
    found = {"loss": sum(losses[-100:]) / len(losses[-100:])}
    for split in ("validation", "test"):
        found |= measure(objective.sorter, split, job.n, job.scale, job.sets)
    return found


def load_sorter(job: DigitsJob, folder: Path) -> Sorter | None:
    """The network that `run_job` has trained, in eval mode; None if the folder has it not."""
    path = _path(job, folder)
    if not path.exists():
        return None
    objective = _objective(job)
    objective.load_state_dict(load_checkpoint(path, torch.device("cpu"))["objective"])
    return objective.sorter.eval()


def choose_temperature(trials: Sequence[Mapping[str, Any]]) -> float:
    """The temperature with most fully right validation sets; of equal ones the first.

    Raises:
        ValueError: If none is done.
    """
    done = [record for record in trials if record["status"] == "done"]
    if not done:
        errors = "; ".join(str(record["error"]) for record in trials)
        raise ValueError(f"expected a temperature at which training ends, got {errors or 'no trials'}")
    return float(max(done, key=lambda record: record["validation_sets"])["temperature"])


def _path(job: DigitsJob, folder: Path) -> Path:
    parts = (job.method, job.n, f"{job.temperature:g}", job.seed, job.steps, job.scale)
    return folder / f"{'-'.join(map(str, parts))}.pt"


def _objective(job: DigitsJob) -> _Objective:
    sorter = make_sorter(METHODS[job.method], job.n, job.seed, job.temperature, job.scale)
    return _Objective(sorter, job.n, job.scale)


def inverse_ceiling(n: int) -> float:
    """Share of permutations of n that are their own inverse.

    The most sets in which a network of one row an item can be right against the inverse. It answers ``pi M`` where the items
    are permuted by ``pi``, so it is right where ``pi^2`` is the inverse of M; square roots are most where M is the identity,
    as the number of roots is the sum of the irreducible characters (Frobenius and Schur), largest there.

    Example:
        >>> [round(inverse_ceiling(n), 3) for n in (2, 3, 5, 7)]
        [1.0, 0.667, 0.217, 0.046]
    """
    share, before = 1.0, 1.0  # of n items and of one fewer: I(k) = I(k - 1) + (k - 1) I(k - 2), over k!
    for k in range(2, n + 1):
        share, before = (share + before) / k, share
    return share

"""One method on one grid and seed."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from pyro_gs.nn import SinkhornNetwork
from tutorials.experiment import check_seeds
from tutorials.jigsaw.border import solve
from tutorials.jigsaw.data import DATA, source
from tutorials.jigsaw.measures import mean, measure
from tutorials.jigsaw.networks import NETWORKS, Training, answers, build
from tutorials.jigsaw.puzzle import Puzzles, scrambled
from tutorials.provenance import Provenance, key_of, provenance_of
from tutorials.training import train

__all__ = ["METHODS", "Job", "answer_of", "expand", "fitted", "provenance", "puzzles_of", "run_job"]

METHODS: dict[str, str] = {
    "chance": "chance",
    "border": "borders (no learning)",
    **{name: kind.title for name, kind in NETWORKS.items()},
}
"""Titles of methods by the name that ``--methods`` takes."""


@dataclass(frozen=True)
class Job:
    """What is to run.

    Attributes:
        data: One of `DATA`.
        k: Pieces along each side.
        method: One of `METHODS`.
        seed: Of parameters, training batches and test puzzles.
        steps: Of training; 0 where nothing is trained.
        batch: Puzzles a step; 0 where nothing is trained.
        puzzles: Of the test.
        device: Where networks are.
        folder: Where users have the data; no part of the settings.
    """

    data: str
    k: int
    method: str
    seed: int
    steps: int
    batch: int
    puzzles: int
    device: str = "cpu"
    folder: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All but the folder; of the device the kind, as processes of torchrun have one each."""
        settings = {name: value for name, value in asdict(self).items() if name != "folder"}
        return {**settings, "device": torch.device(self.device).type}

    @property
    def seconds(self) -> float:
        """About how long it takes, on one core."""
        rounds = 5 if self.method == "neighbours" else 1
        return 1 + rounds * self.steps * self.batch * (4e-4 + 2e-5 * self.k**2)


@functools.cache
def provenance() -> Provenance:
    """That of the code that results depend on."""
    own = ("border", "data", "dense", "jobs", "measures", "neighbours", "networks", "puzzle")
    return provenance_of(
        "pyro_gs/*.py", "tutorials/pictures/*.py", "tutorials/training.py", *(f"tutorials/jigsaw/{name}.py" for name in own)
    )


def expand(
    grids: Mapping[str, Sequence[int]],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    batch: int,
    puzzles: int,
    device: str = "cpu",
    folder: Path | None = None,
) -> list[Job]:
    """Jobs of all grids, methods and seeds, seed by seed.

    Args:
        grids: Pieces along each side, by data set.
        methods: Of `METHODS`.
        seeds: At least one.
        steps: As `Job`.
        batch: As `Job`.
        puzzles: As `Job`.
        device: As `Job`.
        folder: As `Job`; for the data that need one.

    Raises:
        ValueError: If a number is too small, or the data cannot be opened, are too few for a batch or for the test, or too
            small for a grid.
    """
    for name, value in (("steps", steps), ("batch", batch), ("puzzles", puzzles)):
        if value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
    check_seeds(seeds)
    if folder is not None and not any(DATA[data].needs_folder for data in grids):
        raise ValueError(f"folder={str(folder)!r}: expected only with data that are read from one, not {', '.join(grids)}")
    jobs = []
    for data, sizes in grids.items():
        place = folder if DATA[data].needs_folder else None
        generator = torch.Generator().manual_seed(0)
        source(data, "train", place).draw(batch, generator)
        shown = source(data, "test", place).draw(puzzles, generator)
        for k in sizes:
            if k < 2:
                raise ValueError(f"grids: expected integers of at least 2, got {k}")
            scrambled(shown[:1], k, generator)
        everywhere = Job(data, 0, "", 0, steps, batch, puzzles, device, place)
        for k in sizes:
            for method in methods:
                job = replace(everywhere, k=k, method=method)
                jobs.append(job if method in NETWORKS else replace(job, steps=0, batch=0))
    return [replace(job, seed=seed) for seed in seeds for job in jobs]


def puzzles_of(job: Job) -> Puzzles:
    """The puzzles that a job is measured on: the same for all methods."""
    generator = torch.Generator().manual_seed(job.seed)
    return scrambled(source(job.data, "test", job.folder).draw(job.puzzles, generator).to(job.device), job.k, generator)


def fitted(job: Job, checkpoints: Path | None, *, progress: bool = False) -> SinkhornNetwork:
    """The network of a job, trained, or read from its checkpoint.

    Args:
        job: Of a method that is trained.
        checkpoints: Folder; None for none.
        progress: Whether to draw a bar.
    """
    channels, height, width = puzzles_of(replace(job, puzzles=1)).pieces.shape[2:]
    kind = NETWORKS[job.method]
    with torch.random.fork_rng([]):
        torch.manual_seed(job.seed)
        network = build(kind, job.k**2, (channels, height, width)).to(job.device)
    objective = Training(network, kind.loss, source(job.data, "train", job.folder), job.k, job.batch)
    train(
        objective,
        job.steps,
        path=None if checkpoints is None else checkpoints / f"{key_of(job.settings, provenance())}.pt",
        seed=job.seed,
        settings=job.settings,
        learning_rate=kind.learning_rate,
        scheduler=functools.partial(OneCycleLR, max_lr=kind.learning_rate, total_steps=job.steps),
        title=f"{job.data}, {job.k} x {job.k}, {METHODS[job.method]}" if progress else None,
    )
    return network


def run_job(job: Job, *, checkpoints: Path | None = None, progress: bool = False) -> dict[str, Any]:
    """Train and measure.

    Args:
        job: What to run.
        checkpoints: As `fitted`.
        progress: As `fitted`.

    Returns:
        Means of `tutorials.jigsaw.measures.Measures` over the test puzzles, and ``train_seconds`` and ``test_seconds`` of
        the wall clock.
    """
    start = time.perf_counter()
    network = fitted(job, checkpoints, progress=progress) if job.method in NETWORKS else None
    trained = time.perf_counter()
    puzzles = puzzles_of(job)
    answer = answer_of(job, network, puzzles)
    done = time.perf_counter()
    return {**mean(measure(puzzles, answer)), "train_seconds": trained - start, "test_seconds": done - trained}


def answer_of(job: Job, network: SinkhornNetwork | None, puzzles: Puzzles) -> Tensor:
    """What a job's method answers to puzzles.

    Args:
        job: The job.
        network: Its network; None for a method that has none.
        puzzles: The puzzles.

    Returns:
        The position of each piece, shape (batch, n).
    """
    if network is not None:
        return answers(network, puzzles.pieces)
    if job.method == "border":
        return solve(puzzles.pieces, DATA[job.data].outside)
    generator = torch.Generator().manual_seed(job.seed + 1)  # others than the puzzles' own
    return torch.rand(puzzles.index.shape, generator=generator).argsort(-1).to(puzzles.index.device)

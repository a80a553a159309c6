"""One method on one grid and seed."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from pyro_gs import nn as gsnn
from pyro_gs import to_matrix
from tutorials.assemble import classifier
from tutorials.assemble.ceilings import best_for, best_for_mean, best_for_nearest, nearest
from tutorials.assemble.network import NETWORKS, LabelScores, Training, answers, build
from tutorials.assemble.tasks import Digits, Tasks
from tutorials.experiment import check_seeds
from tutorials.jigsaw.puzzle import join
from tutorials.pictures import Split
from tutorials.provenance import Provenance, key_of, provenance_of
from tutorials.training import train

__all__ = [
    "METHODS",
    "Job",
    "answer_of",
    "assembled",
    "digits",
    "expand",
    "fitted",
    "judge",
    "provenance",
    "run_job",
    "tasks_of",
]

METHODS: dict[str, str] = {
    "chance": "chance",
    **{name: kind.title for name, kind in NETWORKS.items()},
    "mean": "best for the mean picture of the label",
    "target": "best for the target picture",
    "nearest": "best for the nearest picture",
}
"""Titles of methods by the name that ``--methods`` takes; the last three are exact, the last two told more than the
label."""

_LEARNING_RATE = 2e-3  # the highest of a one-cycle schedule


@dataclass(frozen=True)
class Job:
    """What is to run.

    Attributes:
        k: Pieces along each side.
        method: One of `METHODS`.
        seed: Of parameters, training batches and test tasks.
        steps: Of training; 0 where nothing is trained.
        batch: Tasks a step; 0 where nothing is trained.
        tasks: Of the test.
        classifier_steps: Of training of the classifier.
        device: Where networks are.
    """

    k: int
    method: str
    seed: int
    steps: int
    batch: int
    tasks: int
    classifier_steps: int
    device: str = "cpu"

    @property
    def settings(self) -> dict[str, Any]:
        """All of it; of the device the kind, as processes of torchrun have one each."""
        return {**asdict(self), "device": torch.device(self.device).type}

    @property
    def seconds(self) -> float:
        """About how long it takes, on one core."""
        searched = self.tasks * self.k / 100 if self.method == "nearest" else 0.0
        return 1 + self.steps * self.batch * (2e-4 + 2e-5 * self.k**2) + searched


@functools.cache
def provenance() -> Provenance:
    """That of the code that results depend on."""
    own = ("ceilings", "classifier", "jobs", "network", "tasks")
    others = (
        "tutorials/jigsaw/networks.py",
        "tutorials/jigsaw/puzzle.py",
        "tutorials/pictures/*.py",
        "tutorials/training.py",
    )
    return provenance_of("pyro_gs/*.py", *others, *(f"tutorials/assemble/{name}.py" for name in own))


def expand(
    grids: Sequence[int],
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    batch: int,
    tasks: int,
    classifier_steps: int,
    device: str = "cpu",
) -> list[Job]:
    """Jobs of all grids, methods and seeds, seed by seed.

    Args:
        grids: Pieces along each side.
        methods: Of `METHODS`.
        seeds: At least one.
        steps: As `Job`.
        batch: As `Job`.
        tasks: As `Job`.
        classifier_steps: As `Job`.
        device: As `Job`.

    Raises:
        ValueError: If a number is too small, or a grid does not fit a digit.
    """
    for name, value in (("steps", steps), ("batch", batch), ("tasks", tasks), ("classifier_steps", classifier_steps)):
        if value < 1:
            raise ValueError(f"{name}={value!r}: expected an integer of at least 1")
    check_seeds(seeds)
    for k in grids:
        if not 2 <= k <= 28:
            raise ValueError(f"grids: expected integers from 2 to 28, got {k}")
    return [
        Job(k, method, seed, *((steps, batch) if method in NETWORKS else (0, 0)), tasks, classifier_steps, device)
        for seed in seeds
        for k in grids
        for method in methods
    ]


@functools.cache
def digits(split: Split, k: int) -> Digits:
    """Digits of a part of the data; once in a process."""
    return Digits(split, k)


def tasks_of(job: Job) -> Tasks:
    """The tasks that a job is measured on: the same for all methods."""
    return digits("test", job.k).draw(job.tasks, torch.Generator().manual_seed(job.seed)).to(job.device)


def judge(job: Job, checkpoints: Path | None, *, progress: bool = False) -> tuple[nn.Module, float]:
    """The classifier of a job, trained, or read from its checkpoint; the same for all jobs of a command.

    Args:
        job: The job.
        checkpoints: Folder; None for none.
        progress: Whether to draw a bar.

    Returns:
        The classifier, and the share of real test digits that it tells right.
    """
    return _judge(job.classifier_steps, job.device, checkpoints, "classifier" if progress else None)


@functools.cache
def _judge(steps: int, device: str, checkpoints: Path | None, title: str | None) -> tuple[nn.Module, float]:
    settings = {"classifier": True, "steps": steps, "device": torch.device(device).type}
    path = None if checkpoints is None else checkpoints / f"{key_of(settings, provenance())}.pt"
    network = classifier.trained(steps, path=path, device=device, title=title)
    return network, classifier.accuracy_on_real(network)


def fitted(job: Job, checkpoints: Path | None, *, progress: bool = False) -> tuple[LabelScores, gsnn.SinkhornLayer]:
    """The network of a job, trained, or read from its checkpoint, and its layer.

    Args:
        job: Of a method that is trained.
        checkpoints: As `judge`.
        progress: As `judge`.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(job.seed)
        scores, layer = build(NETWORKS[job.method], job.k)
    train(
        Training(scores.to(job.device), layer, digits("train", job.k), job.batch),
        job.steps,
        path=None if checkpoints is None else checkpoints / f"{key_of(job.settings, provenance())}.pt",
        seed=job.seed,
        settings=job.settings,
        learning_rate=_LEARNING_RATE,
        scheduler=functools.partial(OneCycleLR, max_lr=_LEARNING_RATE, total_steps=job.steps),
        title=f"{job.k} x {job.k}, {METHODS[job.method]}" if progress else None,
    )
    return scores, layer


def answer_of(job: Job, scores: LabelScores | None, tasks: Tasks) -> Tensor:
    """What a job's method answers.

    Args:
        job: The job.
        scores: Its network; None for a method that has none.
        tasks: The tasks.

    Returns:
        The position of each piece, shape (batch, n).
    """
    if scores is not None:
        return answers(scores, tasks)
    if job.method == "mean":
        return best_for_mean(tasks, digits("train", job.k))
    if job.method == "target":
        return best_for(tasks.pieces, tasks.targets)
    if job.method == "nearest":
        return best_for_nearest(tasks, digits("train", job.k))
    generator = torch.Generator().manual_seed(job.seed + 1)
    return torch.rand(tasks.pieces.shape[:2], generator=generator).argsort(-1).to(tasks.pieces.device)


def assembled(tasks: Tasks, answer: Tensor) -> Tensor:
    """Pieces where an answer puts them, shape (batch, n, 1, height, width)."""
    return gsnn.assemble(to_matrix(answer, dtype=tasks.pieces.dtype), tasks.pieces, item_dim=3)


def run_job(job: Job, *, checkpoints: Path | None = None, progress: bool = False) -> dict[str, Any]:
    """Train and measure.

    Args:
        job: What to run.
        checkpoints: As `judge`.
        progress: As `judge`.

    Returns:
        ``accuracy``: share of the assembled pictures that the classifier takes for the label; ``nearest_l1``,
        ``nearest_l2``: `tutorials.assemble.ceilings.nearest` among the training pictures of the label; ``target_l1``,
        ``target_l2``: mean absolute and mean squared difference to the target, a test picture of the label;
        ``real_accuracy``: of the classifier on real test digits; ``train_seconds`` and ``test_seconds`` of the wall clock.
    """
    network, real_accuracy = judge(job, checkpoints)
    start = time.perf_counter()
    scores = fitted(job, checkpoints, progress=progress)[0] if job.method in NETWORKS else None
    trained = time.perf_counter()
    tasks = tasks_of(job)
    parts = assembled(tasks, answer_of(job, scores, tasks))
    done = time.perf_counter()
    l1, l2 = nearest(parts, tasks.labels, digits("train", job.k))
    difference = parts - tasks.targets
    margin = parts.shape[-1] * job.k - 28  # what padding added, see `tutorials.jigsaw.puzzle.padded`
    first = margin // 2
    pictures = join(parts)[..., first : first + 28, first : first + 28]
    return {
        "accuracy": float((classifier.classified(network, pictures) == tasks.labels).double().mean()),
        "nearest_l1": float(l1.mean()),
        "nearest_l2": float(l2.mean()),
        "target_l1": float(difference.abs().mean()),
        "target_l2": float(difference.square().mean()),
        "real_accuracy": real_accuracy,
        "train_seconds": trained - start,
        "test_seconds": done - trained,
    }

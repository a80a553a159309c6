"""One job of a sweep: a method on a cell with a seed, from what identifies it to what is recorded of it."""

from __future__ import annotations

import functools
import platform
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from threadpoolctl import threadpool_limits

from pyro_gs.infer.objective import Objective
from tutorials.celegans.__main__ import CEILING_SHARE, METHODS, run_ceiling, run_method, takes_objective
from tutorials.celegans.cells import Cell, Table, mean_candidates
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.identification import Identification, Run, onehot
from tutorials.celegans.report import reliability_curve, score
from tutorials.celegans.worms import Worms, chance_accuracy
from tutorials.experiment import check_seeds, record_of
from tutorials.provenance import Provenance, key_of, provenance_of

__all__ = ["BINS", "SETTINGS", "Clock", "Job", "expand", "provenance", "run_job"]

Clock = Literal["cpu", "wall"]
"""What budgets are measured by: processor time of the worker, or wall-clock time."""

BINS = 10
"""Bins of confidence in what is recorded for reliability curves."""

_CODE = (
    "pyro_gs/*.py",
    ":!pyro_gs/nn",
    "tutorials/celegans/*.py",
    "tutorials/celegans/data",
    ":!tutorials/celegans/tables.py",
)
"""Files whose changes make another version of the code, as patterns of Git."""


def provenance() -> Provenance:
    """That of the software as it lies here; looked up once."""
    return provenance_of(*_CODE)


@dataclass(frozen=True)
class Job:
    """What is to run.

    Attributes:
        cell: The setting of the data.
        seed: Of the data and of the method.
        method: A name of ``METHODS``, or ``"chance"`` or ``"ceiling"``.
        objective: Of methods that have one, None for the others.
        budget: Seconds; the ceiling takes its share of them. Zero for chance, which takes what it takes.
        clock: What the budget is measured by; empty for chance.
    """

    cell: Cell
    seed: int
    method: str
    objective: Objective | None = None
    budget: float = 0.0
    clock: Clock | Literal[""] = ""

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        return {"chance": 1.0, "ceiling": CEILING_SHARE * self.budget}.get(self.method, self.budget)

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on, but the software and the processor; `SETTINGS` are the names."""
        own = {"seed": self.seed, "method": self.method, "objective": self.objective}
        return {**self.cell.settings, **own, "budget": self.budget, "clock": self.clock}

    def key(self, software: Provenance) -> str:
        """A short name of settings and software, the same on every machine: 16 hexadecimal digits."""
        return key_of(self.settings, software)


SETTINGS = tuple(Job(Cell(), 0, "chance").settings)
"""Names of all settings of a job."""


def expand(
    tables: Iterable[Table],
    seeds: Sequence[int],
    *,
    methods: Sequence[str] = (),
    objectives: Sequence[Objective] = (),
    budget: float | None = None,
    clock: Clock = "cpu",
) -> list[Job]:
    """The jobs of tables, each once: all cells of the first seed, then of the second, and so on.

    Args:
        tables: What to run.
        seeds: One data set each.
        methods: In place of those of the tables, which they are without.
        objectives: The same.
        budget: Seconds for each method, in place of those of the cells.
        clock: What they are measured by.

    Returns:
        Chance, methods and ceiling of each cell.

    Raises:
        ValueError: If a method is none, there is no seed or one out of its range, or the budget is not positive.
    """
    if not seeds:
        raise ValueError("seeds is empty, expected at least one")
    check_seeds(seeds)
    if budget is not None and not 0 < budget < float("inf"):
        raise ValueError(f"budget={budget!r}: expected a positive finite number of seconds")
    if clock not in get_args(Clock):
        raise ValueError(f"clock={clock!r}: expected one of {', '.join(map(repr, get_args(Clock)))}")
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"methods: {name!r} is none of {', '.join(METHODS)}")
    jobs: dict[Job, None] = {}
    for seed in seeds:
        for table in tables:
            for cell in table.cells:
                seconds = budget or cell.budget
                jobs[Job(cell, seed, "chance")] = None
                for name in methods or table.methods or METHODS:
                    choices = objectives or table.objectives
                    for objective in choices if takes_objective(name) else (None,):
                        jobs[Job(cell, seed, name, objective, seconds, clock)] = None
                jobs[Job(cell, seed, "ceiling", None, seconds, clock)] = None
    return list(jobs)


_BUSY = threading.Lock()


def run_job(job: Job, software: Provenance) -> dict[str, Any]:
    """Do a job in this process, on one thread.

    Args:
        job: What is to run.
        software: What it is recorded with.

    Returns:
        A record that JSON can hold: ``key``, the settings, the software, ``status`` and what was measured, see
        ``results.py``. An error of the method makes a record with status ``"failed"`` and the message.

    Raises:
        RuntimeError: If a job is running in another thread of this process: clock and threads belong to the process.
    """
    if not _BUSY.acquire(blocking=False):
        raise RuntimeError("a job is running in this process already, expected workers that are processes of one thread")
    threads, clock, dtype = torch.get_num_threads(), Run.clock, torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        Run.clock = staticmethod(time.perf_counter if job.clock == "wall" else time.process_time)
        with threadpool_limits(1):
            return record_of(job, software, _measure) | {"processor": _processor()}
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        Run.clock = staticmethod(clock)
        _BUSY.release()


def _measure(job: Job) -> dict[str, Any]:
    connectome, worms = job.cell.data(job.seed)
    common = {"mean_candidates": mean_candidates(worms)}
    if job.method == "chance":
        return common | {"accuracy": chance_accuracy(worms, seed=job.seed)}
    if job.method == "ceiling":
        result = run_ceiling(worms, connectome, seed=job.seed, budget=job.budget)
    else:
        result = run_method(job.method, worms, connectome, seed=job.seed, budget=job.budget, objective=job.objective)
    return common | _figures(result, worms, connectome)


def _figures(result: Identification, worms: Worms, connectome: Connectome) -> dict[str, Any]:
    """How well a method did."""
    assert worms.truth is not None
    scores, curve = score(result, worms), reliability_curve(result, worms)
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    bins = [[0, 0.0, 0] for _ in range(BINS)]
    if curve is not None:
        columns = (curve.lower, curve.count, curve.confidence, curve.accuracy)
        for lower, count, confidence, right in zip(*(column.tolist() for column in columns), strict=True):
            bins[round(lower * BINS)] = [count, count * confidence, round(count * right)]
    return {
        "accuracy": scores.accuracy,
        "accuracy_unknown": scores.accuracy_unknown,
        "calibration_error": scores.calibration_error,
        "log_evidence": float(evidence(onehot(result.index))),
        "log_evidence_truth": float(evidence(onehot(worms.truth))),
        "seconds": result.seconds,
        "updates": result.extra.get("steps"),
        "proposals": result.extra.get("proposals"),
        "bins": bins,
    }


@functools.cache
def _processor() -> str:
    """Name of the processor, as far as the system tells."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

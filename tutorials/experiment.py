"""Jobs that are done once: on one process or several at a time, resumable, their results on disk."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import joblib
import torch
from tqdm import tqdm

from tutorials.processes import from_first, joined, rank, world_size
from tutorials.provenance import Provenance, key_of
from tutorials.records import Records

__all__ = ["ANY", "Job", "add_options", "finish", "finish_on", "record_of", "run", "run_jobs"]

ANY = "any"
"""In place of a commit: whichever."""


class Job(Protocol):
    """What is to run, as a frozen dataclass has it."""

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on, but software and processor; flat, for JSON, with ``method`` and ``seed``."""

    @property
    def seconds(self) -> float:
        """About how long it takes."""


J = TypeVar("J", bound=Job)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ``ValueError`` unless generators take all of them."""
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds={seed}: expected an integer from 0 to 2^32 - 1")


def run(
    jobs: Sequence[J],
    folder: Path,
    work: Callable[[J], Mapping[str, Any]],
    software: Provenance,
    *,
    outcome: str,
    workers: int | None = 1,
    reuse: Collection[str] = (),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run what is not there yet, and record what is measured.

    Args:
        jobs: As `run_jobs`.
        folder: Of the results, see `tutorials.records.Records`.
        work: Does a job and returns what it has measured. An error makes a record with status ``"failed"`` and the message.
        software: What results are recorded with.
        outcome: Which figure the progress bar shows.
        workers: As `run_jobs`.
        reuse: As `run_jobs`.
        progress: As `run_jobs`.

    Returns:
        Records of the jobs, in their order.

    Raises:
        ValueError: As `run_jobs`; if a job is there twice, which would count twice.
    """
    twice = [job.settings for job, count in Counter(jobs).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: expected every job once, so no data, size, method or seed twice")
    return run_jobs(
        jobs, folder, _Recorded(work), software, outcome=outcome, workers=workers, reuse=reuse, progress=progress
    )


class _Recorded:
    """Work whose result, or error, becomes a record."""

    def __init__(self, work: Callable[[Any], Mapping[str, Any]]) -> None:
        self._work = work

    def __call__(self, job: Job, software: Provenance) -> dict[str, Any]:
        return record_of(job, software, self._work)


def record_of(job: J, software: Provenance, work: Callable[[J], Mapping[str, Any]]) -> dict[str, Any]:
    """Do a job and make its record: ``key``, settings, software, ``status`` and what was measured, or the error."""
    record = {"key": key_of(job.settings, software), **job.settings, **asdict(software)}
    try:
        figures = work(job)
        bad = {name: x for name, x in figures.items() if isinstance(x, float) and not math.isfinite(x)}
        if bad:
            raise FloatingPointError(f"expected finite figures, got {bad}")
        return {**record, "status": "done", **figures}
    except Exception as error:
        if world_size() > 1:  # the other processes wait for this one: torchrun ends them
            raise
        return {**record, "status": "failed", "error": f"{type(error).__name__}: {error}"}


def run_jobs(
    jobs: Sequence[J],
    folder: Path,
    work: Callable[[J, Provenance], dict[str, Any]],
    software: Provenance,
    *,
    outcome: str,
    records: Callable[[Path], Records] = Records,
    workers: int | None = None,
    reuse: Collection[str] = (),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Run what is not there yet.

    A job that the folder holds is not run again, unless it failed. It is the same only if all agrees that its result
    depends on: its settings, versions and commit. Results that differ in any of these stay in the folder beside the new
    ones.

    Where the jobs run is joblib's matter: ``joblib.parallel_config`` around this call chooses processes of this machine, a
    Dask cluster or any backend that is registered with joblib (``ray.util.joblib.register_ray()`` registers Ray). Each
    worker must be a process that does one job at a time. Under ``torchrun`` (see `tutorials.processes.joined`) all
    processes do each job together, and the first one keeps the records.

    Args:
        jobs: In the order in which they start.
        folder: Of the results.
        work: Makes the record of a job: ``key``, settings, software, ``status`` and what was measured.
        software: What results are recorded with.
        outcome: Which figure the progress bar shows.
        records: Opens the folder.
        workers: How many at once; None leaves it to ``joblib.parallel_config``.
        reuse: Commits whose results count too, or ``"any"``.
        progress: Whether to draw a progress bar with the time left.

    Returns:
        The records of the jobs, in their order.

    Raises:
        ValueError: If another run has the folder open, its log is damaged, or several workers are wanted under
            ``torchrun``.
    """
    if world_size() == 1:
        return _run_first(jobs, folder, work, software, outcome, records, workers, reuse, progress)
    if workers not in (1, None):
        raise ValueError(f"workers={workers!r}: expected 1 under torchrun, whose processes do each job together")
    if rank() == 0:
        return _run_first(jobs, folder, _announced(work), software, outcome, records, 1, reuse, progress)
    job: J | None
    while (job := from_first(None)) is not None:
        work(job, software)
    return []


def _announced(work: Callable[[J, Provenance], dict[str, Any]]) -> Callable[[J, Provenance], dict[str, Any]]:
    """Work of the first process that tells the others which job is next."""

    def announced(job: J, software: Provenance) -> dict[str, Any]:
        return work(from_first(job), software)

    return announced


def _run_first(
    jobs: Sequence[J],
    folder: Path,
    work: Callable[[J, Provenance], dict[str, Any]],
    software: Provenance,
    outcome: str,
    open_records: Callable[[Path], Records],
    workers: int | None,
    reuse: Collection[str],
    progress: bool,
) -> list[dict[str, Any]]:
    keys = [key_of(job.settings, software) for job in jobs]
    with open_records(folder) as results:
        found: dict[str, dict[str, Any]] = {}
        done = {key: record for key, record in results.records.items() if record["status"] == "done"}
        accepted = {_settings(r, jobs): r for r in done.values() if ANY in reuse or r["commit"] in reuse}
        for job, key in zip(jobs, keys, strict=True):
            same = done.get(key) or accepted.get(_settings(job.settings, jobs))
            if same is not None:
                found[key] = same
        left = {key: job for job, key in zip(jobs, keys, strict=True) if key not in found}
        weights = {key: round(1000 * job.seconds) for key, job in left.items()}  # whole numbers add up exactly
        bar = tqdm(
            total=sum(weights.values()),
            desc=f"{len(left)} jobs, {len(found)} done before",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
            smoothing=0,
            disable=not progress,
        )
        parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
        try:
            for count, record in enumerate(parallel(joblib.delayed(work)(job, software) for job in left.values()), 1):
                results.append(record)
                found[record["key"]] = record
                bar.update(weights[record["key"]])
                figure = f"{record[outcome]:.3f}" if record["status"] == "done" else "failed"
                bar.set_postfix_str(f"{count} of {len(left)}: {record['method']} {figure}")
        finally:
            bar.close()
            results.write_tables()
            if world_size() > 1:
                from_first(None)
    return [found[key] for key in keys]


def _settings(record: Mapping[str, Any], jobs: Sequence[Job]) -> tuple[Any, ...]:
    """What must agree for a record to be that of a job."""
    return tuple(record.get(name, "none") for name in (jobs[0].settings if jobs else ()))


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options of commands that train: ``--jobs``, ``--device``, ``--out``, ``--reuse`` and ``--quiet``."""
    parser.add_argument("--jobs", type=int, default=1, help="how many at once; 1")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1; cpu")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder; {out}")
    about = f"commits whose results count too, or {ANY}"
    parser.add_argument("--reuse", nargs="+", default=[], metavar="COMMIT", help=about)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def finish_on(device: str, work: Callable[[torch.device], Sequence[Mapping[str, Any]]]) -> int:
    """`finish` of work on a device, with the other processes of ``torchrun``, see `tutorials.processes.joined`."""
    with contextlib.ExitStack() as stack:
        return finish(lambda: work(stack.enter_context(joined(device))))


def finish(work: Callable[[], Sequence[Mapping[str, Any]]]) -> int:
    """Run jobs as a command does, and say how it ended.

    Args:
        work: Runs them and returns their records.

    Returns:
        The exit status: 0, 1 if jobs or the machine failed, 2 if an argument is wrong, 130 if interrupted.
    """
    try:
        records = work()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool as error:
        print(f"error: a worker died; the same command goes on from here. {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a cluster that does not answer
        print(f"error: {error}; the same command goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if rank() != 0:
        return 0
    failed = [record for record in records if record["status"] == "failed"]
    print(f"{len(records) - len(failed)} of {len(records)} jobs are done")
    for record in failed:
        print(f"failed: {record['method']}, seed {record['seed']}: {record['error']}", file=sys.stderr)
    if failed:
        print("the same command tries them again", file=sys.stderr)
    return 1 if failed else 0

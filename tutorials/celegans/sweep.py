"""Whole tables: every method on every cell and seed, resumable, on as many processes as wanted.

python -m tutorials.celegans.sweep table1 table2 --jobs 2 --out results/celegans-sweep
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import joblib

from pyro_gs.infer.objective import OBJECTIVES
from tutorials.celegans.__main__ import METHODS
from tutorials.celegans.cells import TABLES
from tutorials.celegans.jobs import Clock, Job, expand, provenance, run_job
from tutorials.celegans.results import Results
from tutorials.experiment import ANY, finish, run_jobs

__all__ = ["build_parser", "main", "run"]


def run(
    jobs: Sequence[Job],
    folder: Path,
    *,
    workers: int | None = None,
    reuse: Collection[str] = (),
    progress: bool = True,
    work: Callable[..., dict[str, Any]] = run_job,
) -> list[dict[str, Any]]:
    """Run what is not there yet.

    Jobs, folder and workers are as in `tutorials.experiment.run_jobs`.

    Args:
        jobs: In the order in which they start.
        folder: Of the results, see `Results`.
        workers: How many at once; None leaves it to ``joblib.parallel_config``.
        reuse: Commits whose results count too, or ``"any"``.
        progress: Whether to draw a progress bar with the time left.
        work: What does a job.

    Returns:
        The records of the jobs, in their order.

    Raises:
        ValueError: If another sweep has the folder open, or its log is damaged.
    """
    return run_jobs(
        jobs,
        folder,
        work,
        provenance(),
        outcome="accuracy",
        records=Results,
        workers=workers,
        reuse=reuse,
        progress=progress,
    )


@contextlib.contextmanager
def _backend(name: str, workers: int) -> Iterator[None]:
    """Where the jobs run; with Dask on the cluster of ``DASK_SCHEDULER_ADDRESS``, or on one made here."""
    with contextlib.ExitStack() as stack:
        if name == "dask":
            try:
                import dask
                from distributed import Client, LocalCluster
            except ImportError as error:
                raise ValueError("backend='dask': expected the package dask[distributed] to be installed") from error
            cluster = dask.config.get("scheduler-address", None)
            if cluster is None:
                own = LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
                cluster = stack.enter_context(own)
            stack.enter_context(Client(cluster))
            workers = -1  # as many as the cluster has
        stack.enter_context(joblib.parallel_config(name, n_jobs=workers))
        yield


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "\n".join(f"  {name:<11} {table.about}" for name, table in TABLES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tutorials.celegans.sweep",
        description=(__doc__ or "").split("\n")[0],
        epilog=f"tables:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tables", nargs="+", choices=list(TABLES), metavar="TABLE", help="which tables, see below")
    parser.add_argument("--seeds", type=int, nargs="+", help="one data set each; 0 1 2 3 4, with --quick 0 1")
    parser.add_argument("--budget", type=float, help="seconds for each method; what the cells say")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=[], help="in place of the tables' own")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=[], help="in place of the tables' own")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once; 1")
    parser.add_argument("--clock", choices=get_args(Clock), default="cpu", help="what budgets are measured by; cpu")
    parser.add_argument("--backend", choices=["loky", "dask"], default="loky", help="of joblib; loky, or a Dask cluster")
    parser.add_argument("--out", type=Path, default=Path("results/celegans-sweep"), help="folder; results/celegans-sweep")
    parser.add_argument(
        "--reuse", nargs="+", default=[], metavar="COMMIT", help=f"commits whose results count too, or {ANY}"
    )
    parser.add_argument("--quick", action="store_true", help="small cells and budgets: a look in minutes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep; returns the exit status: 0, 1 if jobs or the machine failed, 2 if an argument is wrong."""
    args = build_parser().parse_args(argv)
    tables = [TABLES[name].quick() if args.quick else TABLES[name] for name in args.tables]
    seeds = args.seeds or ([0, 1] if args.quick else [0, 1, 2, 3, 4])

    def work() -> list[dict[str, Any]]:
        if args.jobs < 1:
            raise ValueError(f"jobs={args.jobs}: expected an integer of at least 1")
        jobs = expand(tables, seeds, methods=args.methods, objectives=args.objectives, budget=args.budget, clock=args.clock)
        seconds = sum(job.seconds for job in jobs)
        size = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"
        print(f"{len(jobs)} jobs, {size} of one core, into {args.out}")
        with _backend(args.backend, args.jobs):
            return run(jobs, args.out, reuse=args.reuse, progress=not args.quiet)

    return finish(work)


if __name__ == "__main__":
    sys.exit(main())

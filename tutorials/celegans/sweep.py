"""Whole tables: every method on every cell and seed, resumable, on as many processes as wanted.

python -m tutorials.celegans.sweep table1 table2 --jobs 2 --out results/celegans-sweep
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, get_args

import joblib
from tqdm import tqdm

from pyro_gs.infer.objective import OBJECTIVES
from tutorials.celegans.__main__ import METHODS
from tutorials.celegans.cells import TABLES
from tutorials.celegans.jobs import SETTINGS, Clock, Job, expand, provenance, run_job
from tutorials.celegans.results import Results

__all__ = ["build_parser", "main", "run"]

ANY = "any"
"""In place of a commit: whichever."""


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

    A job that the folder holds is not run again, unless it failed. It is the same only if all agrees that its result
    depends on: data, seed, method, objective, budget, clock, versions and commit. Results that differ in any of these stay
    in the folder beside the new ones.

    Where the jobs run is joblib's matter: ``joblib.parallel_config`` around this call chooses processes of this machine, a
    Dask cluster or any backend that is registered with joblib (``ray.util.joblib.register_ray()`` registers Ray). Each
    worker must be a process that does one job at a time.

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
    software = provenance()
    with Results(folder) as results:
        found: dict[str, dict[str, Any]] = {}
        accepted = {_settings(r): r for r in results.records.values() if ANY in reuse or r["commit"] in reuse}
        for job in jobs:
            key = job.key(software)
            same = results.records.get(key) or accepted.get(_settings(job.settings))
            if same is not None and same["status"] == "done":
                found[key] = same
        left = [job for job in jobs if job.key(software) not in found]
        weights = {job.key(software): round(1000 * job.seconds) for job in left}  # whole numbers add up exactly
        bar = tqdm(
            total=sum(weights.values()),
            desc=f"{len(left)} jobs, {len(found)} done before",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}",
            smoothing=0,
            disable=not progress,
        )
        parallel = joblib.Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1)
        try:
            for count, record in enumerate(parallel(joblib.delayed(work)(job, software) for job in left), 1):
                results.append(record)
                found[record["key"]] = record
                bar.update(weights[record["key"]])
                bar.set_postfix_str(f"{count} of {len(left)}: {record['method']} {_outcome(record)}")
        finally:
            bar.close()
            results.write_tables()
    return [found[job.key(software)] for job in jobs]


def _settings(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in SETTINGS)


def _outcome(record: dict[str, Any]) -> str:
    return f"{record['accuracy']:.3f}" if record["status"] == "done" else "failed"


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
    try:
        if args.jobs < 1:
            raise ValueError(f"jobs={args.jobs}: expected an integer of at least 1")
        jobs = expand(tables, seeds, methods=args.methods, objectives=args.objectives, budget=args.budget, clock=args.clock)
        seconds = sum(job.seconds for job in jobs)
        size = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"
        print(f"{len(jobs)} jobs, {size} of one core, into {args.out}")
        with _backend(args.backend, args.jobs):
            records = run(jobs, args.out, reuse=args.reuse, progress=not args.quiet)
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
    return report_failures(records)


def report_failures(records: Sequence[Mapping[str, Any]]) -> int:
    """Print how a sweep ended; returns the exit status."""
    failed = [record for record in records if record["status"] == "failed"]
    print(f"{len(records) - len(failed)} of {len(records)} jobs are done")
    for record in failed:
        print(f"failed: {record['method']}, seed {record['seed']}: {record['error']}", file=sys.stderr)
    if failed:
        print("the same command tries them again", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Jigsaw puzzles: networks of pieces, with and without Gumbel noise, against a dense network, borders and chance.

python -m tutorials.jigsaw --jobs 2
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tutorials.experiment import ANY, finish, run
from tutorials.jigsaw.data import DATA
from tutorials.jigsaw.figures import Shown, draw_solutions, draw_temperatures
from tutorials.jigsaw.jobs import METHODS, Job, answer_of, expand, fitted, provenance, run_job, test_puzzles
from tutorials.jigsaw.networks import NETWORKS
from tutorials.jigsaw.sizes import SIZES
from tutorials.jigsaw.tables import markdown
from tutorials.processes import joined, rank

__all__ = ["build_parser", "main"]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "\n".join(
        [*(f"  {name:<18} {data.about}" for name, data in DATA.items()), "methods:"]
        + [f"  {name:<18} {title}" for name, title in METHODS.items()]
    )
    parser = argparse.ArgumentParser(
        prog="python -m tutorials.jigsaw",
        description=(__doc__ or "").split("\n")[0],
        epilog=f"data:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="a look, in seconds")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="all grids and methods, hours")
    parser.set_defaults(size="default")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=["mnist", "photographs"], metavar="DATA")
    parser.add_argument("--folder", type=Path, help="where full-mnist, celeba or imagenet is")
    parser.add_argument("--grids", nargs="+", type=int, help="pieces along each side, for all data; what the size says")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help="what the size says")
    parser.add_argument("--seeds", nargs="+", type=int, help="of networks, batches and puzzles; what the size says")
    parser.add_argument("--steps", type=int, help="of training; what the size says")
    parser.add_argument("--batch", type=int, default=32, help="puzzles a step, for each process; 32")
    parser.add_argument("--puzzles", type=int, help="of the test; what the size says")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once; 1")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1; cpu")
    parser.add_argument("--out", type=Path, default=Path("results/jigsaw"), help="folder; results/jigsaw")
    parser.add_argument(
        "--reuse", nargs="+", default=[], metavar="COMMIT", help=f"commits whose results count too, or {ANY}"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the puzzles; returns the exit status: 0, 1 if jobs or the machine failed, 2 if an argument is wrong."""
    args = build_parser().parse_args(argv)
    return finish(functools.partial(_run, args))


def _run(args: argparse.Namespace) -> list[dict[str, Any]]:
    size = SIZES[args.size]
    if args.jobs < 1:
        raise ValueError(f"jobs={args.jobs}: expected an integer of at least 1")
    with joined(args.device) as device:
        jobs = expand(
            {data: args.grids or size.grids_of(data) for data in args.data},
            args.methods or size.methods,
            size.seeds if args.seeds is None else args.seeds,
            steps=size.steps if args.steps is None else args.steps,
            batch=args.batch,
            puzzles=size.puzzles if args.puzzles is None else args.puzzles,
            device=str(device),
            folder=args.folder,
        )
        checkpoints = args.out / "checkpoints"
        work = functools.partial(run_job, checkpoints=checkpoints, progress=not args.quiet and args.jobs == 1)
        records = run(
            jobs,
            args.out,
            work,
            provenance(),
            outcome="equal_any_wrong",
            workers=args.jobs,
            reuse=args.reuse,
            progress=not args.quiet,
        )
        if rank() == 0:
            _report(args.out, jobs, records, checkpoints)
    return records


def _report(folder: Path, jobs: Sequence[Job], records: Sequence[Mapping[str, Any]], checkpoints: Path) -> None:
    """Write and print the tables, and draw pictures from the networks of the first seed."""
    text = markdown(records)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    print(text)
    done = {record["key"] for record in records if record["status"] == "done"}
    paths = []
    for data in dict.fromkeys(job.data for job in jobs):
        k = max(job.k for job in jobs if job.data == data)
        group = [job for job in jobs if job.data == data and job.k == k and job.seed == jobs[0].seed]
        group = [job for job, record in zip(jobs, records, strict=True) if job in group and record["key"] in done]
        paths += _draw(folder, data, group, checkpoints)
    print(f"results.csv, tables.md, {', '.join(path.name for path in paths)} in {folder}")


def _draw(folder: Path, data: str, jobs: Sequence[Job], checkpoints: Path) -> list[Path]:
    jobs = [job for job in jobs if job.method != "chance"]
    if not jobs:
        return []
    puzzles = test_puzzles(replace(jobs[0], puzzles=1))
    shown = []
    for job in jobs:
        network = fitted(job, checkpoints) if job.method in NETWORKS else None
        shown.append(Shown(METHODS[job.method], answer_of(job, network, puzzles), network))
    paths = [draw_solutions(folder / f"solutions-{data}.png", puzzles, shown)]
    last = next((x for x in reversed(shown) if x.network is not None), None)
    if last is not None and last.network is not None:
        paths.append(draw_temperatures(folder / f"temperatures-{data}.png", puzzles, last.network, last.title))
    return paths


if __name__ == "__main__":
    torch.set_num_threads(1)  # small layers gain little from a second, and --jobs uses the others
    sys.exit(main())

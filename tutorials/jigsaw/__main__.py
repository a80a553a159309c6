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

from pyro_gs.nn import SinkhornNetwork
from tutorials.experiment import add_options, finish_on, run
from tutorials.jigsaw.data import DATA
from tutorials.jigsaw.figures import Shown, draw_solutions, draw_temperatures
from tutorials.jigsaw.jobs import METHODS, Job, answer_of, expand, fitted, provenance, puzzles_of, run_job
from tutorials.jigsaw.networks import NETWORKS
from tutorials.jigsaw.puzzle import Puzzles
from tutorials.jigsaw.sizes import SIZES
from tutorials.jigsaw.tables import markdown
from tutorials.processes import rank

__all__ = ["build_parser", "main"]

_SEEN = 20  # puzzles of which one is drawn


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
    add_options(parser, "results/jigsaw")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the puzzles; returns the exit status: 0, 1 if jobs or the machine failed, 2 if an argument is wrong."""
    args = build_parser().parse_args(argv)
    return finish_on(args.device, lambda device: _run(args, device))


def _run(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    size = SIZES[args.size]
    if args.jobs < 1:
        raise ValueError(f"jobs={args.jobs}: expected an integer of at least 1")
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
    shown = _shown(jobs, records)
    networks = {job: fitted(job, checkpoints) for job in shown if job.method in NETWORKS}  # by all processes together
    if rank() == 0:
        text = markdown(records)
        (args.out / "tables.md").write_text(text, encoding="utf-8")
        print(text)
        paths = [path for data in args.data for path in _draw(args.out, [x for x in shown if x.data == data], networks)]
        print(f"results.csv, tables.md, {', '.join(path.name for path in paths)} in {args.out}")
    return records


def _shown(jobs: Sequence[Job], records: Sequence[Mapping[str, Any]]) -> list[Job]:
    """Those of the pictures: of the first seed, on the largest grid of each data set, if they are done."""
    largest = {data: max(job.k for job in jobs if job.data == data) for data in {job.data for job in jobs}}
    chosen = [job.seed == jobs[0].seed and job.k == largest[job.data] and job.method != "chance" for job in jobs]
    # processes of torchrun other than the first have no records; a failure there has ended all
    done = [record["status"] == "done" for record in records] or [True] * len(jobs)
    return [job for job, *is_shown in zip(jobs, chosen, done, strict=True) if all(is_shown)]


def _draw(folder: Path, jobs: Sequence[Job], networks: Mapping[Job, SinkhornNetwork]) -> list[Path]:
    if not jobs:
        return []
    puzzles = _contrasted(puzzles_of(replace(jobs[0], puzzles=min(_SEEN, jobs[0].puzzles))))
    shown = [Shown(METHODS[job.method], answer_of(job, networks.get(job), puzzles), networks.get(job)) for job in jobs]
    paths = [draw_solutions(folder / f"solutions-{jobs[0].data}.png", puzzles, shown)]
    learned = [job for job in jobs if job in networks]
    if learned:
        path = folder / f"temperatures-{jobs[0].data}.png"
        paths.append(draw_temperatures(path, puzzles, networks[learned[-1]], METHODS[learned[-1].method]))
    return paths


def _contrasted(puzzles: Puzzles) -> Puzzles:
    """The puzzle whose picture has the most contrast: crops of photographs may show a plain ground."""
    best = puzzles.ordered.flatten(1).std(1).argmax()
    return Puzzles(*(values[best][None] for values in (puzzles.pieces, puzzles.ordered, puzzles.index)))


if __name__ == "__main__":
    torch.set_num_threads(1)  # small layers gain little from a second, and --jobs uses the others
    sys.exit(main())

"""Digits assembled from the pieces of others: networks with and without Gumbel noise, against what can be attained.

python -m tutorials.assemble --jobs 2
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
from torch import Tensor

from pyro_gs.nn import SinkhornLayer, assemble
from tutorials.assemble.figures import draw_tasks
from tutorials.assemble.jobs import (
    METHODS,
    Job,
    answer_of,
    assembled,
    expand,
    fitted,
    judge,
    provenance,
    run_job,
    tasks_of,
)
from tutorials.assemble.network import NETWORKS, LabelScores
from tutorials.assemble.sizes import SIZES
from tutorials.experiment import add_options, finish_on, run
from tutorials.markdown import methods_table
from tutorials.processes import rank

__all__ = ["build_parser", "main"]

_COLUMNS = {
    "accuracy": "taken for the label",
    "nearest_l1": "l1 to the nearest",
    "nearest_l2": "l2 to the nearest",
    "target_l1": "l1 to the target",
    "target_l2": "l2 to the target",
}
_DRAWN = 5  # tasks of the picture


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "\n".join(f"  {name:<18} {title}" for name, title in METHODS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tutorials.assemble",
        description=(__doc__ or "").split("\n")[0],
        epilog=f"methods:\n{about}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="a look, in seconds")
    size.add_argument("--full", dest="size", action="store_const", const="full", help="more grids, methods, steps: hours")
    parser.set_defaults(size="default")
    parser.add_argument("--grids", nargs="+", type=int, help="pieces along each side; what the size says")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help="what the size says")
    parser.add_argument("--seeds", nargs="+", type=int, help="of networks, batches and tasks; what the size says")
    parser.add_argument("--steps", type=int, help="of training; what the size says")
    parser.add_argument("--batch", type=int, default=32, help="tasks a step, for each process; 32")
    add_options(parser, "results/assemble")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tasks; returns the exit status: 0, 1 if jobs or the machine failed, 2 if an argument is wrong."""
    args = build_parser().parse_args(argv)
    return finish_on(args.device, lambda device: _run(args, device))


def _run(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    size = SIZES[args.size]
    if args.jobs < 1:
        raise ValueError(f"jobs={args.jobs}: expected an integer of at least 1")
    jobs = expand(
        size.grids if args.grids is None else args.grids,
        args.methods or size.methods,
        size.seeds if args.seeds is None else args.seeds,
        steps=size.steps if args.steps is None else args.steps,
        batch=args.batch,
        tasks=size.tasks,
        classifier_steps=size.classifier_steps,
        device=str(device),
    )
    checkpoints, shown = args.out / "checkpoints", not args.quiet
    judge(jobs[0], checkpoints, progress=shown)  # before jobs that run at once would each train it
    work = functools.partial(run_job, checkpoints=checkpoints, progress=shown and args.jobs == 1)
    records = run(
        *(jobs, args.out, work, provenance()),
        outcome="accuracy",
        workers=args.jobs,
        reuse=args.reuse,
        progress=shown,
    )
    # of the first seed; processes of torchrun other than the first have no records, and a failure there has ended all
    done = [record["status"] == "done" for record in records] or [True] * len(jobs)
    drawn = [job for job, is_done in zip(jobs, done, strict=True) if is_done and job.seed == jobs[0].seed]
    networks = {job: fitted(job, checkpoints) for job in drawn if job.method in NETWORKS}  # by all processes together
    if rank() == 0:
        text = _markdown(records)
        (args.out / "tables.md").write_text(text, encoding="utf-8")
        print(text)
        paths = [
            _draw(args.out, [job for job in drawn if job.k == k], networks) for k in dict.fromkeys(job.k for job in drawn)
        ]
        print(f"results.csv, tables.md, {', '.join(path.name for path in paths)} in {args.out}")
    return records


def _markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """A section for each grid: methods and their measures, median (lowest to highest) of the seeds."""
    parts = []
    done = [record for record in records if record["status"] == "done"]
    for k in dict.fromkeys(record["k"] for record in done):
        of_grid = [record for record in done if record["k"] == k]
        first = of_grid[0]
        about = (
            f"{first['tasks']} test tasks; {max(record['steps'] for record in of_grid)} steps of training; the classifier"
        )
        about += f" is right on {first['real_accuracy']:.1%} of real test digits"
        parts.append(f"### {k} x {k}\n\n{about}.\n\n{methods_table(of_grid, METHODS, _COLUMNS)}\n")
    return "\n".join(parts)


@torch.no_grad()
def _draw(folder: Path, jobs: Sequence[Job], networks: Mapping[Job, tuple[LabelScores, SinkhornLayer]]) -> Path:
    """A picture of a grid."""
    columns: dict[str, Tensor] = {}
    tasks = tasks_of(replace(jobs[0], tasks=_DRAWN))
    for job in jobs:
        scores, title = networks[job][0] if job in networks else None, METHODS[job.method]
        answer = answer_of(job, scores, tasks)
        if job in networks:
            scores, layer = networks[job]
            P = layer.eval()(scores(tasks.pieces, tasks.labels))
            # pieces by where the answer has them, so that it is the diagonal
            columns[f"matchings, {title}"] = P.take_along_dim(answer.argsort(-1)[..., None], -2)
            columns[f"soft, {title}"] = assemble(P, tasks.pieces, item_dim=3)
        columns[title] = assembled(tasks, answer)
    return draw_tasks(folder / f"assembled-{jobs[0].k}.png", tasks, columns)


if __name__ == "__main__":
    torch.set_num_threads(1)  # small layers gain little from a second, and --jobs uses the others
    sys.exit(main())

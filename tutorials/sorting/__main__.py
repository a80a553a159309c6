"""Sort numbers, and images of numbers: Sinkhorn networks and their competitors, side by side.

python -m tutorials.sorting numbers digits --seeds 0 1 2 --jobs 2 --out results/sorting
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tutorials.experiment import add_options, check_seeds, finish_on, run
from tutorials.processes import rank
from tutorials.provenance import provenance_of
from tutorials.sorting import digits, numbers
from tutorials.sorting.digits import DigitsJob
from tutorials.sorting.numbers import NumbersJob
from tutorials.sorting.tables import (
    digits_markdown,
    draw_numbers,
    draw_sorted,
    numbers_markdown,
    numbers_summary,
    write_numbers,
)

__all__ = ["build_parser", "main"]

_CODE = ("pyro_gs/*.py", "tutorials/sorting/*.py", "tutorials/pictures/*.py", "tutorials/training.py")

_SHOWN = ("published-gumbel", "row-20-gumbel", "rank-gumbel", "neuralsort")


@dataclass(frozen=True)
class _Size:
    """How much is run.

    Attributes:
        steps: Of the networks for numbers.
        lists: Of a test.
        sizes: Lengths of lists for which a network of its own is trained, where one is needed for each.
        image_steps: Of the networks for images.
        scale: Divisor of the images' resolution.
        sets: Of a test.
        image_sizes: Of the sets.
        methods: For images.
    """

    steps: int
    lists: int
    sizes: tuple[int, ...]
    image_steps: int
    scale: int
    sets: int
    image_sizes: tuple[int, ...]
    methods: tuple[str, ...]


_SIZES = {
    "quick": _Size(20, 10, (5,), 10, 2, 20, (3,), _SHOWN),
    "default": _Size(300, 200, (5, 15, 80), 300, 2, 500, (3, 5, 7), _SHOWN),
    "full": _Size(3000, 1000, numbers.SIZES, 3000, 1, 2000, (3, 5, 7, 9, 15), tuple(digits.METHODS)),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    about = [f"  {name:<22} {method.title}" for name, method in numbers.METHODS.items()]
    images = [f"  {name:<22} {method.title}" for name, method in digits.METHODS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m tutorials.sorting",
        description=(__doc__ or "").split("\n")[0],
        epilog="\n".join(["methods of numbers:", *about, "methods of digits:", *images]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="numbers or digits; both")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="whether it runs at all, in a minute")
    size.add_argument("--full", action="store_true", help="all methods, sizes and pixels; days")
    parser.add_argument("--seeds", type=int, nargs="+", help="of networks and batches; 0 1 2, with --quick 0")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="see below; all of numbers, four of digits")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="of the sets of images; 3 5 7")
    parser.add_argument("--steps", type=int, help="of training; 300")
    parser.add_argument("--scale", type=int, choices=[1, 2], help="divisor of the images' resolution; 2")
    add_options(parser, "results/sorting")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 0, 1 if jobs or the machine failed, 2 if an argument is wrong."""
    args = build_parser().parse_args(argv)
    tasks = list(dict.fromkeys(args.tasks)) or list(_TASKS)
    size = _SIZES["quick" if args.quick else "full" if args.full else "default"]
    if args.steps is not None:
        size = replace(size, steps=args.steps, image_steps=args.steps)
    if args.scale is not None:
        size = replace(size, scale=args.scale)
    if args.sizes is not None:
        size = replace(size, image_sizes=tuple(args.sizes))
    seeds = args.seeds or ([0] if args.quick else [0, 1, 2])

    def work(device: torch.device) -> list[dict[str, Any]]:
        _check(args, tasks, size, seeds)
        return [record for task in tasks for record in _TASKS[task](args, size, seeds, str(device))]

    return finish_on(args.device, work)


def _check(args: argparse.Namespace, tasks: Sequence[str], size: _Size, seeds: Sequence[int]) -> None:
    """Raise ``ValueError`` unless the command line makes sense."""
    wrong = [task for task in tasks if task not in _TASKS]
    if wrong:
        raise ValueError(f"task {wrong[0]!r}: expected one of {', '.join(_TASKS)}")
    known = [name for task in tasks for name in (numbers.METHODS if task == "numbers" else digits.METHODS)]
    wrong = [name for name in args.methods or () if name not in known]
    if wrong:
        raise ValueError(f"methods={wrong[0]!r}: expected some of {', '.join(dict.fromkeys(known))}")
    counts = {"jobs": args.jobs, "steps": size.image_steps, "sizes": min(size.image_sizes) - 1}
    for name, value in counts.items():
        if value < 1:
            shown = value + 1 if name == "sizes" else value
            raise ValueError(f"{name}={shown}: expected an integer of at least {2 if name == 'sizes' else 1}")
    check_seeds(seeds)


def _run(
    jobs: Sequence[Any], folder: Path, work: Any, args: argparse.Namespace, outcome: str, about: str
) -> list[dict[str, Any]]:
    """Run jobs, with their networks beside the results, in a folder of the commit that they come from."""
    software = provenance_of(*_CODE)
    if rank() == 0:
        print(f"{about}: {len(jobs)} jobs, {sum(job.seconds for job in jobs) / 60:.0f} minutes of one core, into {folder}")
    networks = folder / "networks" / (software.commit or "none")
    return run(
        jobs,
        folder,
        functools.partial(work, folder=networks),
        software,
        outcome=outcome,
        workers=args.jobs,
        reuse=args.reuse,
        progress=not args.quiet,
    )


def _numbers(args: argparse.Namespace, size: _Size, seeds: Sequence[int], device: str) -> list[dict[str, Any]]:
    """Numbers: run, print and write."""
    folder = args.out / "numbers"
    jobs = [
        NumbersJob(name, n, seed, size.steps, size.lists)
        for seed in seeds
        for name, method in numbers.METHODS.items()
        if not args.methods or name in args.methods
        for n in ((numbers.TRAINED,) if method.any_size else size.sizes)
    ]
    records = _run(jobs, folder, functools.partial(numbers.run_job, device=device), args, "any_wrong", "numbers")
    if any(record["status"] == "done" for record in records):
        summary = numbers_summary(records)
        text = "\n\n".join([summary, numbers_markdown(records, "any"), numbers_markdown(records, "wrong")])
        (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
        write_numbers(folder / "numbers.csv", records)
        draw_numbers(folder / "numbers.png", records)
        print(f"\n{summary}\n\ntables.md, numbers.csv, results.csv, numbers.png in {folder}\n")
    return records


def _digits(args: argparse.Namespace, size: _Size, seeds: Sequence[int], device: str) -> list[dict[str, Any]]:
    """Images: choose each method's temperature, run, print and write."""
    folder = args.out / "digits"
    chosen_at = 5 if 5 in size.image_sizes else size.image_sizes[0]
    names = [name for name in digits.METHODS if name in (args.methods or size.methods)]
    work = functools.partial(digits.run_job, device=device)

    def job(name: str, n: int, seed: int, temperature: float) -> DigitsJob:
        return DigitsJob(name, n, seed, temperature, size.image_steps, size.scale, size.sets)

    tried = [job(name, chosen_at, seeds[0], temperature) for name in names for temperature in digits.TEMPERATURES]
    trials = _run(tried, folder, work, args, "validation_sets", "digits, temperatures")
    if rank() != 0:  # the first process has the records, and says what is next
        return _run([], folder, work, args, "test_sets", "digits")
    best = {name: digits.choose_temperature([r for r in trials if r["method"] == name]) for name in names}
    jobs = [job(name, n, seed, best[name]) for seed in seeds for n in size.image_sizes for name in names]
    records = _run(jobs, folder, work, args, "test_sets", "digits")
    done = [record for record in records if record["status"] == "done"]
    if done:
        text = digits_markdown(records)
        (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
        sorters = {}
        for record in done:
            if (record["n"], record["seed"]) == (chosen_at, seeds[0]):
                shown = job(record["method"], chosen_at, seeds[0], record["temperature"])
                sorter = digits.load_sorter(shown, folder / "networks" / (record["commit"] or "none"))
                if sorter is not None:
                    sorters[record["method"]] = sorter
        draw_sorted(folder / "sorted.png", sorters, chosen_at, size.scale, seed=0)
        print(f"\n{text}\n\ntables.md, results.csv, sorted.png in {folder}\n")
    return records


_TASKS = {"numbers": _numbers, "digits": _digits}


if __name__ == "__main__":
    sys.exit(main())

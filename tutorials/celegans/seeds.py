"""The second command: methods over several seeds of one cell, with the median; a sweep with a cell of your own.

python -m tutorials.celegans.seeds --seeds 0 1 2 3 4 --budget 90 --methods gumbel-sinkhorn
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tutorials.celegans.__main__ import METHODS, build_parser, cell_of
from tutorials.celegans.cells import Table
from tutorials.celegans.jobs import expand
from tutorials.celegans.sweep import run
from tutorials.experiment import finish


def main(argv: Sequence[str] | None = None) -> int:
    """Run every method on every seed; what the folder holds already is not run again; print the medians."""
    parser = build_parser()
    parser.prog = "python -m tutorials.celegans.seeds"
    parser.description = (__doc__ or "").split("\n")[0]
    parser.set_defaults(budget=90.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one data set each")
    args = parser.parse_args(argv)

    def work() -> list[dict[str, Any]]:
        cell = cell_of(args)
        cell.data(args.seeds[0])  # refuses bad settings before there is a folder
        table = Table("", (cell,), tuple(args.methods), (args.objective,))
        jobs = expand([table], args.seeds, budget=args.budget, clock="wall")
        records = run(jobs, args.out, workers=1, progress=not args.quiet)
        _print_medians(records, args.methods)
        return records

    return finish(work)


def _print_medians(records: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> None:
    print("\n| method | median | lowest | highest | calibration error | seeds |\n| --- | --- | --- | --- | --- | --- |")
    done = [record for record in records if record["status"] == "done"]
    for method in ("ceiling", *methods, "chance"):
        right = [record["accuracy"] for record in done if record["method"] == method]
        off = [record["calibration_error"] for record in done if record["method"] == method != "chance"]
        if right:
            title = METHODS[method][0] if method in METHODS else method
            spread = f"{statistics.median(right):.3f} | {min(right):.3f} | {max(right):.3f}"
            print(f"| {title} | {spread} | {f'{statistics.median(off):.3f}' if off else ''} | {len(right)} |")


if __name__ == "__main__":
    sys.exit(main())

"""The second command: methods over several seeds, with the median.

python -m tutorials.celegans.seeds --seeds 0 1 2 3 4 --budget 90 --methods gumbel-sinkhorn
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Sequence

import torch

from tutorials.celegans.__main__ import build_parser, make_data, run_ceiling, run_method, set_threads
from tutorials.celegans.report import Score, score
from tutorials.celegans.worms import chance_accuracy


def main(argv: Sequence[str] | None = None) -> int:
    """Run every method on every seed; append to ``seeds.csv`` as results come; print the medians."""
    parser = build_parser()
    parser.prog = "python -m tutorials.celegans.seeds"
    parser.description = (__doc__ or "").split("\n")[0]
    parser.set_defaults(budget=90.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one data set each")
    parser.add_argument("--ceiling", action="store_true", help="run the collapsed chain from the truth too")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    found: dict[str, list[Score]] = {}
    try:
        set_threads(args.threads)
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / "seeds.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["seed", "method", "accuracy", "accuracy_unknown", "calibration_error", "seconds", "chance"])
            for seed in args.seeds:
                connectome, worms = make_data(args, seed)
                chance = chance_accuracy(worms, seed=seed)
                runs = [run_method(name, worms, connectome, args, seed) for name in args.methods]
                if args.ceiling:
                    runs.append(run_ceiling(worms, connectome, args, seed))
                for run in runs:
                    s = score(run, worms)
                    found.setdefault(s.method, []).append(s)
                    row = (s.accuracy, s.accuracy_unknown, s.calibration_error, s.seconds, chance)
                    writer.writerow([seed, s.method, *(f"{x:.6f}" for x in row)])
                    print(f"seed {seed}: {s.method} {s.accuracy:.3f} in {s.seconds:.0f} s", flush=True)
                file.flush()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n| method | median | lowest | highest | calibration error | seeds |\n| --- | --- | --- | --- | --- | --- |")
    for method, scores in sorted(found.items(), key=lambda item: -statistics.median(s.accuracy for s in item[1])):
        right = [s.accuracy for s in scores]
        off = statistics.median(s.calibration_error for s in scores)
        spread = f"{statistics.median(right):.3f} | {min(right):.3f} | {max(right):.3f}"
        print(f"| {method} | {spread} | {off:.3f} | {len(right)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

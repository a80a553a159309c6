"""The main job: identify neurons of several simulated worms on the real connectome, by every method, side by side.

python -m tutorials.celegans --worms 4 --known 0.2 --eta 0.1 --neurons 139 --steps 1000 --seed 0 --budget 40
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from pyro_gs.infer.objective import OBJECTIVES, Objective
from tutorials.celegans import gumbel_sinkhorn, vi_mcmc, weights_vi
from tutorials.celegans.baselines import (
    fit_collapsed_mcmc,
    fit_gibbs_mcmc,
    fit_map_faq,
    fit_naive_vi,
    fit_rounding_vi,
    fit_stick_breaking_vi,
    fit_tempered_mcmc,
)
from tutorials.celegans.cells import Cell, mean_candidates
from tutorials.celegans.connectome import Connectome, Graph, Thinning
from tutorials.celegans.identification import Identification
from tutorials.celegans.report import draw_figures, markdown_table, write_results
from tutorials.celegans.worms import Worms, chance_accuracy

Fit = Callable[..., Identification]

METHODS: dict[str, tuple[str, Fit]] = {
    "gumbel-sinkhorn": ("Gumbel-Sinkhorn VI", gumbel_sinkhorn.fit),
    "plain": ("Gumbel-Sinkhorn VI, plain", functools.partial(gumbel_sinkhorn.fit, exchange=False, restarts=False)),
    "naive-vi": ("naive VI", fit_naive_vi),
    "map": ("MAP (FAQ)", fit_map_faq),
    "mcmc": ("MCMC (paper)", fit_gibbs_mcmc),
    "collapsed-mcmc": ("collapsed MCMC", fit_collapsed_mcmc),
    "gumbel-sinkhorn-w": ("VI with Gaussian W", weights_vi.fit),
    "rounding": ("rounding VI", fit_rounding_vi),
    "stick-breaking": ("stick-breaking VI", fit_stick_breaking_vi),
    "vi-mcmc": ("VI, then MCMC", vi_mcmc.fit),
    "tempered-mcmc": ("tempered MCMC", fit_tempered_mcmc),
    "map-exchanges": ("MAP with exchanges", functools.partial(fit_map_faq, exchange=True)),
}
"""Methods by the name that ``--methods`` takes."""

SHOWN = (
    "gumbel-sinkhorn",
    "plain",
    "naive-vi",
    "map",
    "map-exchanges",
    "mcmc",
    "collapsed-mcmc",
    "tempered-mcmc",
)
"""Methods of the main job; the sweep runs all."""

CEILING_SHARE = 1 / 3
"""Budget of the collapsed chain that starts at the truth, as a share of a method's."""


def build_parser() -> argparse.ArgumentParser:
    """The command line, shared with ``tutorials.celegans.seeds``."""
    parser = argparse.ArgumentParser(
        prog="python -m tutorials.celegans",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--worms", type=int, default=4, help="number of worms")
    parser.add_argument("--known", type=float, default=0.2, help="share of neurons whose identity is known, 0 to 1")
    parser.add_argument("--eta", type=float, default=0.1, help="candidates lie nearer than this along the body (length 1)")
    parser.add_argument("--neurons", type=int, default=139, help="neurons kept of 279")
    parser.add_argument("--thinning", choices=get_args(Thinning), default="even", help="how they are chosen")
    parser.add_argument("--steps", type=int, default=1000, help="time steps of a recording")
    parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of the noise")
    parser.add_argument("--spectral-factor", type=float, default=2.0, help="1 / largest eigenvalue of the weights")
    parser.add_argument("--measurement-noise", type=float, default=0.0, help="standard deviation, added to the traces")
    parser.add_argument("--unseen", type=float, default=0.0, help="share of neurons that a worm does not show")
    parser.add_argument("--graph", choices=get_args(Graph), default="directed", help="connections")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of wall-clock time for each method")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(SHOWN), help="which to run")
    parser.add_argument("--objective", choices=OBJECTIVES, default="noise_kl", help="of the Gumbel-Sinkhorn guide")
    parser.add_argument("--out", type=Path, default=Path("results/celegans"), help="folder for tables and pictures")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def set_threads(threads: int) -> None:
    """Set torch's threads.

    Raises:
        ValueError: ``threads`` is not positive, or more than 1024.
    """
    if not 1 <= threads <= 1024:  # torch crashes on many more
        raise ValueError(f"threads={threads}: expected an integer within [1, 1024]")
    torch.set_num_threads(threads)


def cell_of(args: argparse.Namespace) -> Cell:
    """The setting of the data that a command line asks for."""
    return Cell(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Cell) if hasattr(args, field.name)})


def takes_objective(name: str) -> bool:
    """Whether a method has an objective to choose."""
    return "Gumbel" in METHODS[name][0]


def run_method(
    name: str,
    worms: Worms,
    connectome: Connectome,
    *,
    seed: int,
    budget: float,
    objective: Objective | None = None,
    progress: bool = False,
) -> Identification:
    """Run one method within the budget; ``objective`` is for those that have one."""
    title, fit = METHODS[name]
    options: dict[str, Any] = {"objective": objective} if objective is not None and takes_objective(name) else {}
    result = fit(worms, connectome, seed=seed, budget=budget, progress=progress, **options)
    return dataclasses.replace(result, method=title)


def run_ceiling(worms: Worms, connectome: Connectome, *, seed: int, budget: float, progress: bool = False) -> Identification:
    """The collapsed chain from the truth, for its share of the budget of a method: what the data can tell at all."""
    seconds = CEILING_SHARE * budget
    result = fit_collapsed_mcmc(worms, connectome, seed=seed, budget=seconds, progress=progress, initial=worms.truth)
    return dataclasses.replace(result, method="ceiling")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    parser = build_parser()
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the methods")
    parser.add_argument("--threads", type=int, default=1, help="of torch; small matrices gain little from a second")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    start = time.perf_counter()
    try:
        set_threads(args.threads)
        connectome, worms = cell_of(args).data(args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        chance = chance_accuracy(worms, seed=args.seed)
        print(
            f"{worms.num_worms} worms, {worms.num_neurons} neurons, {int(connectome.adjacency.sum())} {args.graph} "
            f"connections, {args.known:.0%} known, "
            f"{mean_candidates(worms):.1f} candidates a neuron"
        )
        options: dict[str, Any] = {"seed": args.seed, "budget": args.budget, "progress": not args.quiet}
        results = []
        for name in args.methods:
            results.append(run_method(name, worms, connectome, objective=args.objective, **options))
        results.append(run_ceiling(worms, connectome, **options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings["cores"] = os.cpu_count()
    settings["machine"] = platform.machine()
    scores = write_results(args.out, results, worms, connectome, chance, settings)
    figures = draw_figures(args.out, results, worms, connectome, chance)
    print()
    print(markdown_table(scores, chance))
    print()
    names = ", ".join(path.name for path in figures)
    print(
        f"{time.perf_counter() - start:.0f} s; results.csv, history.csv, identities.csv, results.json, {names} in {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The main job: identify neurons of several simulated worms on the real connectome, by every method, side by side.

python -m tutorials.celegans --worms 4 --known 0.2 --eta 0.1 --neurons 139 --steps 1000 --seed 0 --budget 45
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
from typing import Any

import torch

from pyro_gs.infer.objective import OBJECTIVES
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
from tutorials.celegans.connectome import Connectome, load_connectome
from tutorials.celegans.identification import Identification
from tutorials.celegans.report import draw_figures, markdown_table, write_results
from tutorials.celegans.worms import Worms, chance_accuracy, simulate

Fit = Callable[..., Identification]

METHODS: dict[str, tuple[str, Fit]] = {
    "gumbel-sinkhorn": ("Gumbel-Sinkhorn VI", gumbel_sinkhorn.fit),
    "no-exchanges": ("Gumbel-Sinkhorn VI, no exchanges", functools.partial(gumbel_sinkhorn.fit, exchange=False)),
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
    parser.add_argument("--neurons", type=int, default=139, help="neurons kept of 279, evenly along the body")
    parser.add_argument("--steps", type=int, default=1000, help="time steps of a recording")
    parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of the noise")
    parser.add_argument("--graph", choices=["directed", "symmetric", "chemical"], default="directed", help="connections")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the methods")
    parser.add_argument("--budget", type=float, default=45.0, help="seconds of wall-clock time for each method")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="which to run")
    parser.add_argument("--objective", choices=OBJECTIVES, default="noise_kl", help="of the Gumbel-Sinkhorn guide")
    parser.add_argument("--threads", type=int, default=1, help="of torch; small matrices gain little from a second")
    parser.add_argument("--out", type=Path, default=Path("results/celegans"), help="folder for tables and pictures")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def set_threads(threads: int) -> None:
    """Set torch's threads.

    Raises:
        ValueError: ``threads`` is not positive.
    """
    if threads < 1:
        raise ValueError(f"threads={threads}: expected an integer of at least 1")
    torch.set_num_threads(threads)


def make_data(args: argparse.Namespace, seed: int) -> tuple[Connectome, Worms]:
    """Connectome and simulated worms of a seed."""
    whole = load_connectome(args.graph)
    connectome = whole.thin(args.neurons, torch.Generator().manual_seed(seed))
    worms = simulate(
        connectome, worms=args.worms, steps=args.steps, known=args.known, eta=args.eta, sigma=args.sigma, seed=seed
    )
    return connectome, worms


def run_method(name: str, worms: Worms, connectome: Connectome, args: argparse.Namespace, seed: int) -> Identification:
    """Run one method within the budget."""
    title, fit = METHODS[name]
    options: dict[str, Any] = {"objective": args.objective} if "Gumbel" in title else {}
    result = fit(worms, connectome, seed=seed, budget=args.budget, progress=not args.quiet, **options)
    return dataclasses.replace(result, method=title)


def run_ceiling(worms: Worms, connectome: Connectome, args: argparse.Namespace, seed: int) -> Identification:
    """The collapsed chain from the truth: what the data can tell at all."""
    budget = CEILING_SHARE * args.budget
    result = fit_collapsed_mcmc(worms, connectome, seed=seed, budget=budget, progress=not args.quiet, initial=worms.truth)
    return dataclasses.replace(result, method="ceiling")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    args = build_parser().parse_args(argv)
    torch.set_default_dtype(torch.float64)
    start = time.perf_counter()
    try:
        set_threads(args.threads)
        connectome, worms = make_data(args, args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        chance = chance_accuracy(worms, seed=args.seed)
        print(
            f"{worms.num_worms} worms, {worms.num_neurons} neurons, {int(connectome.adjacency.sum())} {args.graph} "
            f"connections, {float(worms.known.double().mean()):.0%} known, "
            f"{float(worms.allowed.sum(-1).double().mean()):.1f} candidates a neuron"
        )
        results = []
        for name in args.methods:
            results.append(run_method(name, worms, connectome, args, args.seed))
        results.append(run_ceiling(worms, connectome, args, args.seed))
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

"""Identify the neurons of your own recordings, and write a table and a report.

python -m tutorials.celegans.own worm1.csv worm2.nwb --positions worm1_positions.csv - --eta 0.1 --out results/own
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from tutorials.celegans import gumbel_sinkhorn
from tutorials.celegans.__main__ import METHODS, set_threads
from tutorials.celegans.atlas import Atlas, read_atlas
from tutorials.celegans.connectome import Connectome, load_connectome
from tutorials.celegans.html_report import confident, write_report
from tutorials.celegans.identities import identity_table, write_identities
from tutorials.celegans.preparation import to_worms
from tutorials.celegans.recalibration import recalibrated, simulated_reliability
from tutorials.celegans.recordings import Recording, read_recording

__all__ = [
    "Atlas",
    "gumbel_sinkhorn",
    "identity_table",
    "load_connectome",
    "main",
    "read_atlas",
    "read_recording",
    "recalibrated",
    "simulated_reliability",
    "to_worms",
    "write_identities",
    "write_report",
]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tutorials.celegans.own",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("recordings", type=Path, nargs="+", metavar="RECORDING", help=".csv, .npz or .nwb, one a worm")
    parser.add_argument("--positions", nargs="+", metavar="CSV", help="columns label,x,y,z; one a recording, - for none")
    parser.add_argument("--drop", nargs="+", default=[], metavar="LABEL", help="columns to leave out, where they occur")
    parser.add_argument("--atlas", type=Path, metavar="CSV", help="your atlas; the connectome's own places if not given")
    parser.add_argument("--spread", type=float, default=10.0, help="micrometres that worms differ by, without --atlas")
    parser.add_argument(
        "--mirrored",
        choices=["yes", "no", "unknown"],
        default="unknown",
        help="whether the positions are a mirror image of the atlas, which decides between left and right",
    )
    parser.add_argument("--eta", type=float, help="candidates lie nearer than this along the body (length 1)")
    parser.add_argument("--max-candidates", type=int, help="only so many identities, the densest by place and colour")
    parser.add_argument("--neurons", nargs="+", metavar="NAME", help="keep only these of the connectome")
    parser.add_argument("--graph", choices=["directed", "symmetric", "chemical"], default="directed", help="connections")
    parser.add_argument("--sigma", type=float, default=1.0, help="noise of the standardized traces")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["gumbel-sinkhorn"], help="which to run")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for each method")
    parser.add_argument(
        "--simulations", type=int, default=0, help="fits of simulated worms that correct the probabilities, a budget each"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the methods")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=Path("results/own"), help="folder for tables and reports")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser


def read_all(args: argparse.Namespace) -> list[Recording]:
    """The recordings of a command line, without the neurons to drop."""
    places = args.positions or ["-"] * len(args.recordings)
    if len(places) != len(args.recordings):
        raise ValueError(f"--positions: {len(places)} for {len(args.recordings)} recordings, expected one each, - for none")
    recordings = [
        read_recording(path, positions=None if place == "-" else place, drop=args.drop)
        for path, place in zip(args.recordings, places, strict=True)
    ]
    names = [recording.name for recording in recordings]
    recordings = [
        recording if names.count(recording.name) == 1 else dataclasses.replace(recording, name=str(path))
        for path, recording in zip(args.recordings, recordings, strict=True)
    ]
    for label in args.drop:
        if not any(label in recording.dropped for recording in recordings):
            raise ValueError(f"--drop: no recording has the label {label!r}")
    return recordings


def make_folder(path: Path) -> None:
    """Make the folder for the results, and see that a file can be written into it, before hours of inference.

    Raises:
        ValueError: If not.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"--out: nothing can be written into the folder {path} ({error.strerror})") from None


def network(args: argparse.Namespace, recordings: Sequence[Recording]) -> tuple[Connectome, Atlas | None]:
    """The connectome, with self-connections, and the atlas of a command line; both have the same neurons."""
    connectome = load_connectome(args.graph)
    if args.neurons is not None:
        connectome = connectome.subset(args.neurons)
    placed = any(recording.positions is not None for recording in recordings)
    atlas = Atlas.from_connectome(connectome, args.spread) if placed else None
    if args.atlas is not None:
        atlas = read_atlas(args.atlas)
        shared = [name for name in connectome.names if name in atlas.names]
        if not shared:
            raise ValueError(
                f"{args.atlas.name} has none of the connectome's neurons ({', '.join(connectome.names[:3])}, ...), its own "
                f"are {', '.join(atlas.names[:3])}, ..."
            )
        if len(shared) < len(connectome):
            print(
                f"{args.atlas.name} has {len(shared)} of the connectome's {len(connectome)} neurons; the others are left out"
            )
            connectome = connectome.subset(shared)
    return connectome, atlas


def main(argv: Sequence[str] | None = None) -> int:
    """Read, identify, write; returns the exit status."""
    args = build_parser().parse_args(argv)
    torch.set_default_dtype(torch.float64)
    try:
        set_threads(args.threads)
        if args.simulations < 0:
            raise ValueError(f"--simulations {args.simulations}: expected an integer of at least 0")
        if not 0 <= args.seed < 2**32:
            raise ValueError(f"--seed {args.seed}: expected an integer within [0, {2**32 - 1}]")
        make_folder(args.out)
        recordings = read_all(args)
        connectome, atlas = network(args, recordings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            worms = to_worms(
                recordings,
                connectome,
                atlas=atlas,
                eta=args.eta,
                max_candidates=args.max_candidates,
                sigma=args.sigma,
                mirrored={"yes": True, "no": False, "unknown": None}[args.mirrored],
            )
        notes = [f"{r.name}: left out {', '.join(x or repr(x) for x in r.dropped)}" for r in recordings if r.dropped]
        if atlas is not None:
            notes += [f"{r.name} has no positions: activity alone tells" for r in recordings if r.positions is None]
        notes += [str(warning.message) for warning in caught]
        for note in notes:
            print(f"note: {note}")
        unknown = worms.observed & ~worms.known
        candidates = worms.allowed.sum(-1).double()[unknown]
        mean = float(candidates.mean()) if len(candidates) else 0.0
        print(
            f"{len(recordings)} recordings, {int(worms.observed.sum())} neurons, {int(worms.known.sum())} given, "
            f"{mean:.1f} candidates for each of the others, of {len(connectome)} identities"
        )
        for name in args.methods:
            title, fit = METHODS[name]
            options = {"budget": args.budget, "progress": not args.quiet}
            result = fit(worms, connectome, seed=args.seed, **options)
            if args.simulations:
                seeds = range(args.seed + 1, args.seed + 1 + args.simulations)
                curve = simulated_reliability(fit, worms, connectome, result.index, seeds=seeds, **options)
                result = recalibrated(result, worms, curve)
            rows = identity_table(result, worms, recordings, connectome)
            write_identities(args.out / f"identities-{name}.csv", rows)
            settings = {"method": title, "seconds": f"{result.seconds:.0f}", "seed": args.seed, "sigma": args.sigma}
            settings["atlas"] = args.atlas or ("places of the connectome" if atlas else "none")
            settings["eta"] = args.eta or "none"
            settings["probabilities"] = (
                f"corrected by {args.simulations} fits of simulated worms"
                if args.simulations
                else "as the method gives them"
            )
            settings["mirrored"] = args.mirrored
            settings["candidates"] = f"{mean:.1f} for each neuron that was not given"
            settings |= {f"note {number}": note for number, note in enumerate(notes, 1)}
            write_report(args.out / f"report-{name}.html", rows, recordings, connectome, settings=settings)
            print(f"{title}: {confident(rows)}; identities-{name}.csv, report-{name}.html")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One SVI step of the Gumbel-Sinkhorn guide on worms that share a network, processor and GPU side by side.

PYTHONPATH=. python benchmarks/celegans_device.py --devices cpu cuda

The model is the tutorial's with W integrated out, float64; sizes are its own and beyond. The devices take turns at every
size; of each the first steps are not counted. Both start from the same parameters; the first losses are compared.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_gs as pgs
from tutorials.celegans.cells import Cell
from tutorials.celegans.evidence import CollapsedEvidence, Statistics
from tutorials.celegans.model import collapsed_model

FIELDS = (
    "worms",
    "neurons",
    "samples",
    "device",
    "chip",
    "threads",
    "median_ms",
    "fastest_ms",
    "slowest_ms",
    "log_evidence",
)
SIZES = ((4, 139, 1), (4, 139, 16), (5, 279, 1), (5, 279, 8), (20, 279, 1), (20, 279, 8))
"""Worms, neurons, samples of the permutations in a step."""

WARM = 3


def moved(statistics_: Statistics, device: str) -> Statistics:
    """The same sums on a device."""
    values = {field.name: getattr(statistics_, field.name) for field in dataclasses.fields(statistics_)}
    return Statistics(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in values.items()})


class Stepper:
    """Steps of a guide's fit on a device."""

    def __init__(self, cell: Cell, samples: int, device: str) -> None:
        connectome, worms = cell.data(0)
        evidence = CollapsedEvidence(
            connectome.adjacency.to(device), moved(Statistics.from_worms(worms), device), worms.sigma, worms.weight_scale
        )
        assert worms.truth is not None
        self.log_evidence = float(evidence(pgs.to_matrix(worms.truth).double().to(device)))
        self._data = (evidence, worms.allowed.to(device), worms.logits.to(device))
        self._device = device
        guide = pgs.AutoGumbelSinkhorn(collapsed_model, init_scale=0.0)
        elbo = Trace_ELBO(num_particles=samples, vectorize_particles=True, max_plate_nesting=1)
        self._svi = SVI(pgs.relax(collapsed_model), guide, Adam({"lr": 0.05}), elbo)
        with pyro.get_param_store().scope() as self._parameters:  # each stepper has its own
            guide(*self._data)

    def step(self) -> float:
        """Seconds of a step."""
        with pyro.get_param_store().scope(self._parameters) as self._parameters:
            self._synchronize()
            start = time.perf_counter()
            self._svi.step(*self._data)
            self._synchronize()
            return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def measure(worms: int, neurons: int, samples: int, devices: Sequence[str], steps: int) -> list[dict[str, object]]:
    """Times of a size on every device."""
    cell = Cell(worms=worms, neurons=neurons)
    steppers = {device: Stepper(cell, samples, device) for device in devices}
    times: dict[str, list[float]] = {device: [] for device in devices}
    for count in range(WARM + steps):
        for device, stepper in steppers.items():
            seconds = 1000 * stepper.step()
            if count >= WARM:
                times[device].append(seconds)
    return [
        {
            **{"worms": worms, "neurons": neurons, "samples": samples, "device": device},
            "chip": torch.cuda.get_device_name() if device == "cuda" else "",
            "threads": torch.get_num_threads(),
            "median_ms": round(statistics.median(times[device]), 2),
            "fastest_ms": round(min(times[device]), 2),
            "slowest_ms": round(max(times[device]), 2),
            "log_evidence": f"{stepper.log_evidence:.6f}",
        }
        for device, stepper in steppers.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every size, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=["cpu"])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "celegans_device.csv")
    args = parser.parse_args(argv)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    print("| worms | neurons | samples | " + " | ".join(f"{device}, ms" for device in args.devices) + " |")
    print("| " + " | ".join(["---"] * (3 + len(args.devices))) + " |")
    for size in SIZES[: args.sizes]:
        found = measure(*size, args.devices, args.steps)
        rows += found
        cells = [f"{row['median_ms']} [{row['fastest_ms']}, {row['slowest_ms']}]" for row in found]
        print(f"| {' | '.join(map(str, size))} | {' | '.join(cells)} |", flush=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    print(f"torch {torch.__version__}, {args.threads} threads; wrote {args.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

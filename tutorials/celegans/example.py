"""Simulated recordings as a laboratory would bring them: for tests, the tutorial and a first try of the command."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch

from tutorials.celegans.connectome import Connectome
from tutorials.celegans.recordings import Recording
from tutorials.celegans.worms import simulate

__all__ = ["Example", "simulate_recordings"]


@dataclass(frozen=True, eq=False)
class Example:
    """Files of simulated recordings, and what they hold.

    Attributes:
        traces: ``worm1.csv``, ...: a CSV of traces for each worm.
        positions: ``worm1_positions.csv``, ...: a CSV of places for each worm.
        nwb: ``worm1.nwb``, ...: traces, labels and places in one file, for each worm; empty if not asked for.
        recordings: The same in memory.
        truth: The names of each worm's neurons, in the order of its labels.
    """

    traces: list[Path]
    positions: list[Path]
    nwb: list[Path]
    recordings: list[Recording]
    truth: list[list[str]]


def simulate_recordings(
    folder: str | Path,
    connectome: Connectome,
    *,
    worms: int = 2,
    steps: int = 1000,
    seen: float = 0.9,
    known: float = 0.2,
    spread: float = 5.0,
    nwb: bool = False,
    seed: int = 0,
) -> Example:
    """Simulate worms on one network and write them as files.

    Each worm shows a share of its neurons; its body is turned, stretched and sheared at random, and each neuron lies off
    the place of the connectome. The second worm is recorded for nine tenths of the time of the first, and so on.
    Neurons that are not known get the labels ``?1``, ``?2``, ...

    Args:
        folder: Made if there is none.
        connectome: The n neurons, their connections and places.
        worms: How many.
        steps: Transitions of the first recording.
        seen: Share of the neurons that a worm shows.
        known: Share of the neurons shown whose identity is given, at random.
        spread: Standard deviation of the places between worms, in micrometres.
        nwb: Whether to write NWB files too, which needs pynwb.
        seed: Of all random numbers.

    Returns:
        The files and their contents.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if not 0 < seen <= 1:
        raise ValueError(f"seen={seen!r}: expected a share within (0, 1]")
    if not spread >= 0:
        raise ValueError(f"spread={spread!r}: expected micrometres, zero or more")
    folder = Path(folder)
    simulated = simulate(connectome, worms=worms, steps=steps, known=known, seed=seed)
    assert simulated.truth is not None
    generator = torch.Generator().manual_seed(seed)
    example = Example([], [], [], [], [])
    folder.mkdir(parents=True, exist_ok=True)
    for j in range(worms):
        count = max(1, round(seen * len(connectome)))
        truth = simulated.truth[j, :count]  # in random order already
        names = [connectome.names[i] for i in truth.tolist()]
        labels = tuple(
            name if given else f"?{m + 1}"
            for m, (name, given) in enumerate(zip(names, simulated.known[j, :count].tolist(), strict=True))
        )
        noise = torch.randn(count, 3, generator=generator, dtype=torch.float64)
        positions = (connectome.position[truth] + spread * noise) @ _body(generator).mT
        length = 1 + max(2, round(steps * 0.9**j))
        identities = tuple(None if label.startswith("?") else label for label in labels)
        recording = Recording(f"worm{j + 1}", simulated.traces[j, :length, :count].clone(), labels, identities, positions)
        example.recordings.append(recording)
        example.truth.append(names)
        example.traces.append(_write(folder / f"{recording.name}.csv", list(labels), recording.traces.tolist()))
        rows = [[label, *place] for label, place in zip(labels, positions.tolist(), strict=True)]
        example.positions.append(_write(folder / f"{recording.name}_positions.csv", ["label", "x", "y", "z"], rows))
        if nwb:
            from tutorials.celegans.nwb import write_nwb

            write_nwb(folder / f"{recording.name}.nwb", recording)
            example.nwb.append(folder / f"{recording.name}.nwb")
    return example


def _body(generator: torch.Generator) -> torch.Tensor:
    """A random rotation, with stretches of up to 15 % and a little shear: (3, 3)."""

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1

    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    rotation[:, 0] *= torch.linalg.det(rotation).sign()
    shape: torch.Tensor = rotation @ (torch.eye(3, dtype=torch.float64) + (0.15 * uniform(3)).diag() + 0.05 * uniform(3, 3))
    return shape


def _write(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path

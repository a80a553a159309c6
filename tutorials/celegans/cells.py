"""The cells of the tables: one setting of data each, all that the results depend on beside seed, method and budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pyro_gs.infer.objective import OBJECTIVES, Objective
from tutorials.celegans.connectome import Connectome, Graph, Thinning, load_connectome
from tutorials.celegans.worms import Worms, simulate

__all__ = ["BASE", "TABLES", "Cell", "Table", "eta_for_candidates", "mean_candidates"]

QUICK_NEURONS = 30 / 139
"""Share of the neurons, and of the candidates, that a quick cell keeps."""

QUICK_STEPS = 0.2
"""Share of the time steps that a quick cell keeps."""

QUICK_BUDGET = 1.0
"""Seconds of a method in a quick cell."""


def eta_for_candidates(connectome: Connectome, candidates: float, known: float = 0.0) -> float:
    """How far along the body candidates may lie, so that a neuron has a given number of them on average.

    Known neurons have one candidate; the others have those of their neighbours that are unknown. The average is over all
    neurons and over which of them are known. Distances are a finite list, so the right one is looked up.

    Args:
        connectome: The n neurons and their places.
        candidates: The average wanted; of those that there are, the nearest is taken.
        known: Share of neurons whose identity is given; the count is rounded.

    Returns:
        Eta in body lengths, halfway between two distances.

    Raises:
        ValueError: If no eta gives so few or so many.
    """
    n = len(connectome)
    unknown = n - round(known * n)
    share = unknown * (unknown - 1) / (n * (n - 1))  # of the pairs of different neurons, those with both unknown
    distances, counts = torch.cat([torch.zeros(1), torch.pdist(connectome.body.unsqueeze(1))]).unique(return_counts=True)
    averages = 1 + (counts.cumsum(0) - 1) * 2 * share / n
    least, most = float(averages[0]), float(averages[-1])
    if not least <= candidates <= most:
        raise ValueError(
            f"candidates={candidates!r}: expected {least:.4g} to {most:.4g} with {n} neurons and known={known!r}"
        )
    place = int((averages - candidates).abs().argmin())
    last = place + 1 == len(distances)
    return float(distances[place] + 1 if last else (distances[place] + distances[place + 1]) / 2)


def mean_candidates(worms: Worms) -> float:
    """Mean number of candidates of an observed neuron, known ones counted in."""
    return float(worms.allowed.sum(-1)[worms.observed].double().mean())


@dataclass(frozen=True)
class Cell:
    """One setting of the data.

    Attributes:
        worms: How many.
        known: Share of neurons whose identity is given.
        eta: How far along the body candidates lie, in body lengths; None where ``candidates`` says it.
        candidates: Mean number of candidates in place of ``eta``, see `eta_for_candidates`; None otherwise.
        neurons: How many are kept of 279.
        steps: Transitions of a recording.
        sigma: Standard deviation of the noise that drives the activity.
        spectral_factor: The largest absolute eigenvalue of the weights is one over this.
        graph: Which connections count.
        thinning: Rule by which neurons are kept.
        measurement_noise: Standard deviation of noise added to the traces.
        unseen: Share of neurons that each worm does not show.
        dropped: Share of connections that the connectome which methods are given lacks.
        added: Share by which it has others in excess.
        budget: Seconds for each method, by default. No setting of the data: not compared, and not among `settings`.

    Raises:
        ValueError: If not exactly one of ``eta`` and ``candidates`` is given.
    """

    worms: int = 4
    known: float = 0.2
    eta: float | None = 0.1
    candidates: float | None = None
    neurons: int = 139
    steps: int = 1000
    sigma: float = 1.0
    spectral_factor: float = 2.0
    graph: Graph = "directed"
    thinning: Thinning = "even"
    measurement_noise: float = 0.0
    unseen: float = 0.0
    dropped: float = 0.0
    added: float = 0.0
    budget: float = field(default=20.0, compare=False)

    def __post_init__(self) -> None:
        """Check that there is one rule for candidates."""
        if (self.eta is None) == (self.candidates is None):
            raise ValueError(f"eta={self.eta!r}, candidates={self.candidates!r}: expected exactly one of them")

    @property
    def settings(self) -> dict[str, Any]:
        """All fields that the data depend on."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "budget"}

    def data(self, seed: int) -> tuple[Connectome, Worms]:
        """Simulate.

        Args:
            seed: Of all random numbers.

        Returns:
            The connectome that methods are given, which is another than that behind the data where connections are
            ``dropped`` or ``added``; and the worms.

        Raises:
            ValueError: If a setting is out of its range.
        """
        generator = torch.Generator().manual_seed(seed)
        connectome = load_connectome(self.graph).thin(self.neurons, generator, self.thinning)
        eta = self.eta
        if eta is None:
            assert self.candidates is not None
            eta = eta_for_candidates(connectome, self.candidates, self.known)
        worms = simulate(
            connectome,
            worms=self.worms,
            steps=self.steps,
            known=self.known,
            eta=eta,
            sigma=self.sigma,
            spectral_factor=self.spectral_factor,
            measurement_noise=self.measurement_noise,
            unseen=self.unseen,
            seed=seed,
        )
        return connectome.rewire(dropped=self.dropped, added=self.added, generator=generator), worms

    def quick(self) -> Cell:
        """The same at a small size, for a look in minutes; its figures say nothing about the full one."""
        return dataclasses.replace(
            self,
            neurons=round(self.neurons * QUICK_NEURONS),
            candidates=None if self.candidates is None else max(2.0, round(self.candidates * QUICK_NEURONS, 1)),
            steps=math.ceil(self.steps * QUICK_STEPS),
            budget=QUICK_BUDGET,
        )


@dataclass(frozen=True)
class Table:
    """A set of cells, and what runs on them beside chance and ceiling.

    Attributes:
        about: One sentence.
        cells: In the order of the table.
        methods: By the names of ``--methods``; empty for all.
        objectives: Of the methods that have one.
        axis: The field of the cells that varies, where it is one number and the others stay; it becomes a curve.
    """

    about: str
    cells: tuple[Cell, ...]
    methods: tuple[str, ...] = ()
    objectives: tuple[Objective, ...] = ("noise_kl",)
    axis: str | None = None

    def quick(self) -> Table:
        """The same with quick cells."""
        return dataclasses.replace(self, cells=tuple(cell.quick() for cell in self.cells))


BASE = Cell()
"""The cell that the sweeps of one setting go through: four worms, 20 % known, eta .1, 139 of the 279 neurons."""

STRONGEST = ("gumbel-sinkhorn", "map-exchanges", "tempered-mcmc", "collapsed-mcmc")
"""Methods of the sweeps beyond the paper's two tables."""


def _around(axis: str, values: Iterable[Any], **others: Any) -> tuple[Cell, ...]:
    return tuple(dataclasses.replace(BASE, **{axis: value}, **others) for value in values)


def _protocol() -> tuple[Cell, ...]:
    settings: Sequence[tuple[str, Sequence[Any]]] = (
        ("graph", ("symmetric", "chemical")),
        ("spectral_factor", (1.2, 2.5, 5.0)),
        ("thinning", ("random", "regions")),
        ("neurons", (84, 195)),
    )
    return (BASE, *(cell for axis, values in settings for cell in _around(axis, values)))


# One worm costs a quarter of four; where few are known or candidates many, all methods get twice the time.
_SECONDS = {1: {10: 10.0, 30: 10.0, 45: 20.0, 60: 20.0}, 4: {10: 20.0, 30: 40.0, 45: 40.0, 60: 40.0}}
_TABLE_1 = tuple(
    Cell(worms=j, known=0.0, eta=None, candidates=float(c), budget=_SECONDS[j][c]) for c in (10, 30, 45, 60) for j in (1, 4)
)
_TABLE_2 = tuple(
    Cell(known=k, eta=eta, budget=40.0 if k == 0.1 else 20.0) for k in (0.4, 0.3, 0.2, 0.1) for eta in (0.1, 0.2)
)
_WRONG = (0.05, 0.1, 0.2)

TABLES: dict[str, Table] = {
    "base": Table("The cell that the other sweeps go through.", (BASE,)),
    "table1": Table(
        "The paper's Table 1, by mean number of candidates and worms. No neuron is known, the harder reading.", _TABLE_1
    ),
    "table2": Table("The paper's Table 2, by share of known neurons and eta, with four worms.", _TABLE_2),
    "protocol": Table("What the paper leaves open, one setting at a time.", _protocol(), STRONGEST),
    "sigma": Table(
        "The noise that drives the activity; it scales all of it and cancels.", _around("sigma", (0.5, 1.0, 2.0)), STRONGEST
    ),
    "worms": Table("Number of worms.", _around("worms", (1, 2, 3, 4, 5, 6, 8)), STRONGEST, axis="worms"),
    "length": Table("Length of the recordings.", _around("steps", (100, 300, 1000, 3000, 10_000)), STRONGEST, axis="steps"),
    "noise": Table(
        "Noise added to the traces, in units of the noise that drives them.",
        _around("measurement_noise", (0.0, 0.25, 0.5, 1.0)),
        STRONGEST,
        axis="measurement_noise",
    ),
    "unseen": Table(
        "Neurons that each worm does not show.", _around("unseen", (0.0, 0.1, 0.2, 0.3)), STRONGEST, axis="unseen"
    ),
    "dropped": Table("A connectome that lacks connections.", _around("dropped", (0.0, *_WRONG)), STRONGEST, axis="dropped"),
    "added": Table("A connectome with connections in excess.", _around("added", (0.0, *_WRONG)), STRONGEST, axis="added"),
    "all": Table(
        "All 279 neurons, five worms.", (Cell(worms=5, neurons=279, budget=600.0),), ("gumbel-sinkhorn", "tempered-mcmc")
    ),
    "objectives": Table(
        "The objectives of the Gumbel-Sinkhorn guide over the cells of Tables 1 and 2.",
        _TABLE_1 + _TABLE_2,
        ("gumbel-sinkhorn",),
        OBJECTIVES,
    ),
}
"""The tables by name. Cells that several share are run once."""

"""The connectome of the hermaphrodite C. elegans: who sends to whom, and where each cell body lies.

The tables beside this module (``data/neurons.csv``, ``data/connections.csv``) hold the 279 somatic neurons
that have synapses with another neuron; ``data/SOURCES.md`` tells where they come from and ``build_data.py``
makes them anew.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Literal, TypeGuard, get_args

import torch

__all__ = ["DATA", "REGIONS", "Connectome", "Graph", "Thinning", "load_connectome", "normalize_name"]

Graph = Literal["directed", "symmetric", "chemical"]
"""The graphs that `load_connectome` builds."""

Thinning = Literal["even", "random", "regions"]
"""The rules by which `Connectome.thin` keeps neurons."""

REGIONS = (0.18, 0.84)
"""Where along the body the head ends and the tail begins: gaps between the neurons, with 180, 59 and 40 in the regions."""

DATA = Path(__file__).resolve().parent / "data"
"""The folder with the tables."""

_LEADING_ZEROS = re.compile(r"(?<=[A-Z])0+(?=[0-9])")


def normalize_name(name: str) -> str:
    """Write a neuron's name as this tutorial does: upper case, no spaces around it, no zeros before a number.

    Args:
        name: A neuron's name as a source spells it, such as ``"DA01"`` or ``"avfl"``.

    Returns:
        The normalized name, such as ``"DA1"`` or ``"AVFL"``. A normalized name comes back unchanged.

    Example:
        >>> normalize_name("DA01"), normalize_name("VB10"), normalize_name(" avfl ")
        ('DA1', 'VB10', 'AVFL')
    """
    return _LEADING_ZEROS.sub("", name.strip().upper())


@dataclass(frozen=True, eq=False)
class Connectome:
    """Named neurons, the connections between them and their places in the body.

    The convention is that of the model ``Y[t] = (W * adjacency) @ Y[t - 1] + noise``: ``adjacency[i, j]``
    is True where neuron ``j`` sends to neuron ``i``, and ``W[i, j]`` is the weight from ``j`` to ``i``. Row
    ``i`` therefore marks the parents of neuron ``i``, and ``adjacency.sum(1)`` is the in-degree.

    Attributes:
        names: The n neurons, each once, spelled as `normalize_name` does.
        adjacency: Shape (n, n), bool. The diagonal may have entries, see `load_connectome`.
        position: Shape (n, 3), float64, in micrometres: x, y, z of the cell body. y runs along the body,
            from the head (smallest) to the tail (largest).
        graph: Which connections count, such as ``"directed"``; see `load_connectome`.
    """

    names: tuple[str, ...]
    adjacency: torch.Tensor
    position: torch.Tensor
    graph: str

    def __post_init__(self) -> None:
        """Check that the fields fit one another."""
        n = len(self.names)
        if len(set(self.names)) != n:
            repeated = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"names: {repeated} occur more than once, expected every neuron once")
        for field, tensor, shape, dtype in (
            ("adjacency", self.adjacency, (n, n), torch.bool),
            ("position", self.position, (n, 3), torch.float64),
        ):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{field} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, "
                    f"expected {shape} and {dtype} for {n} names"
                )

    def __repr__(self) -> str:
        """Name the graph and its size in place of thousands of entries."""
        connections = int(self.adjacency.sum())
        return f"Connectome(graph={self.graph!r}, neurons={len(self)}, connections={connections})"

    def __len__(self) -> int:
        """Return the number of neurons."""
        return len(self.names)

    @property
    def body(self) -> torch.Tensor:
        """Position along the body axis, rescaled over the neurons of this connectome.

        Returns:
            Shape (n,), float64, without unit: 0 for the neuron nearest the head, 1 for the one nearest the
            tail. All zeros where every neuron lies at the same place. What `subset` and `thin` return is
            rescaled over the neurons kept.
        """
        y = self.position[:, 1]
        extent = y.max() - y.min()
        return (y - y.min()) / extent if extent > 0 else torch.zeros_like(y)

    def index(self, name: str) -> int:
        """Find a neuron's place among the names.

        Args:
            name: A neuron's name, in any spelling that `normalize_name` understands.

        Returns:
            The neuron's row (and column) in `adjacency`.

        Raises:
            ValueError: If no neuron has that name; the message suggests the closest ones.
        """
        wanted = normalize_name(name)
        if wanted in self.names:
            return self.names.index(wanted)
        close = difflib.get_close_matches(wanted, self.names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"such as {', '.join(self.names[:3])}"
        raise ValueError(f"name {name!r} matches no neuron, expected one of the {len(self)} here: {hint}")

    def subset(self, names_or_index: Sequence[str] | Sequence[int] | torch.Tensor) -> Connectome:
        """Keep some neurons and every connection between two of them.

        Args:
            names_or_index: The k neurons to keep, in the order wanted: names, or places in ``range(n)`` as a
                sequence or as an integer tensor of shape (k,).

        Returns:
            The induced connectome, of k neurons.

        Raises:
            ValueError: If a name matches no neuron, a place lies outside ``range(n)``, a neuron comes twice
                or none is left.
        """
        if isinstance(names_or_index, str):
            raise ValueError(f"names_or_index={names_or_index!r}: expected a sequence of names, not one name")
        items: Sequence[object]
        if isinstance(names_or_index, torch.Tensor):
            if names_or_index.dim() != 1:
                raise ValueError(f"names_or_index has shape {tuple(names_or_index.shape)}, expected (k,)")
            items = names_or_index.tolist()
        else:
            items = names_or_index
        chosen = [self._place(item) for item in items]
        if not chosen:
            raise ValueError("names_or_index is empty, expected at least one neuron")
        repeated = sorted({self.names[i] for i in chosen if chosen.count(i) > 1})
        if repeated:
            raise ValueError(f"names_or_index holds {', '.join(repeated)} more than once, expected each once")
        index = torch.tensor(chosen, dtype=torch.long, device=self.adjacency.device)
        return Connectome(
            names=tuple(self.names[i] for i in chosen),
            adjacency=self.adjacency[index][:, index],
            position=self.position[index],
            graph=self.graph,
        )

    def thin(self, n: int, generator: torch.Generator, rule: Thinning = "even") -> Connectome:
        """Keep n neurons at random.

        Args:
            n: How many neurons to keep, from 2 to all of them.
            generator: Where the random numbers come from.
            rule: ``"even"``, spread along the body as all of them are: sorted along it (ties in their present order),
                they fall into n blocks whose sizes differ by one at most, and each block keeps one, each of its neurons
                with the same probability. ``"random"``, any n, each set with the same probability. ``"regions"``, the
                same share of head, middle and tail (`REGIONS`; what rounding leaves goes to the largest remainders),
                at random within each.

        Returns:
            The induced connectome of n neurons, in their present order.

        Raises:
            ValueError: If n is not an integer within that range, or ``rule`` is none of these.
        """
        total = len(self)
        if not _is_integer(n) or not 2 <= n <= total:
            raise ValueError(f"n={n!r}: expected an integer within [2, {total}], the number of neurons")
        if rule not in get_args(Thinning):
            raise ValueError(f"rule={rule!r}: expected one of {', '.join(map(repr, get_args(Thinning)))}")
        if rule == "even":
            kept = self._one_of_each_block(n, generator)
        else:
            shuffled = torch.randperm(total, generator=generator, device=generator.device).cpu()
            if rule == "regions":
                region = torch.bucketize(self.body.cpu(), torch.tensor(REGIONS, dtype=torch.float64))[shuffled]
                quota = region.bincount().double() * n / total
                count = quota.floor().long()
                count[(quota - count).argsort(descending=True, stable=True)[: n - int(count.sum())]] += 1
                kept = torch.cat([shuffled[region == r][:k] for r, k in enumerate(count.tolist())])
            else:
                kept = shuffled[:n]
        return self.subset(kept.sort().values)

    def _one_of_each_block(self, n: int, generator: torch.Generator) -> torch.Tensor:
        order = torch.argsort(self.position[:, 1], stable=True).cpu()
        edges = torch.arange(n + 1) * len(self) // n
        uniform = torch.rand(n, dtype=torch.float64, generator=generator, device=generator.device).cpu()
        return order[edges[:-1] + (uniform * edges.diff()).floor().long()]

    def rewire(self, *, dropped: float = 0.0, added: float = 0.0, generator: torch.Generator) -> Connectome:
        """Make a wrong connectome, as one that was mapped in another animal is.

        Args:
            dropped: Share of the connections that are left out, chosen at random.
            added: As many connections as this share of the present ones are put between random pairs of different
                neurons that have none. Entries are drawn one by one: a symmetric graph does not stay symmetric.
            generator: Where the random numbers come from.

        Returns:
            The same neurons; both counts are rounded.

        Raises:
            ValueError: If a share lies outside [0, 1], or there is no room for so many new connections.
        """
        for name, share in (("dropped", dropped), ("added", added)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share!r}: expected a share within [0, 1]")
        n, flat = len(self), self.adjacency.flatten()
        present = flat.nonzero().squeeze(1)
        absent = (~(self.adjacency | torch.eye(n, dtype=torch.bool, device=flat.device))).flatten().nonzero().squeeze(1)
        fewer, more = round(dropped * len(present)), round(added * len(present))
        if more > len(absent):
            raise ValueError(f"added={added!r}: {more} new connections, but only {len(absent)} pairs have none")

        def draw(among: torch.Tensor, count: int) -> torch.Tensor:
            order = torch.randperm(len(among), generator=generator, device=generator.device)
            return among[order[:count].to(among.device)]

        changed = flat.clone()
        changed[draw(present, fewer)] = False
        changed[draw(absent, more)] = True
        return replace(self, adjacency=changed.view(n, n))

    def _place(self, item: object) -> int:
        """Turn a name or a place into a place, within ``range(n)``."""
        if isinstance(item, str):
            return self.index(item)
        expected = f"expected names or integers within [0, {len(self) - 1}]"
        if not _is_integer(item) or not 0 <= item < len(self):
            raise ValueError(f"names_or_index holds {item!r}, {expected}")
        return int(item)


def _is_integer(value: object) -> TypeGuard[int]:
    """Tell integers, those of numpy among them, from everything else; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def load_connectome(graph: Graph = "directed") -> Connectome:
    """Load the 279 neurons, sorted by name, with the connections of one graph.

    Self-connections: a gap junction joins the neurons RIBL, RIBR and VA8 each to itself. These three
    entries of the diagonal are there in ``"directed"`` and ``"symmetric"``, and are among the numbers
    below; the diagonal of ``"chemical"`` is empty. Four neurons have no parent in ``"directed"`` (IL2DL,
    IL2DR, PLNR, PVDR).

    Args:
        graph: ``"directed"``, chemical synapses from sender to receiver and gap junctions both ways, 2,993
            pairs; ``"symmetric"``, the same pairs and their reversals, 4,577 pairs; ``"chemical"``,
            chemical synapses alone, 2,194 pairs.

    Returns:
        A new connectome of n = 279 neurons: `adjacency` of shape (279, 279), bool; `position` of shape
        (279, 3), float64, in micrometres.

    Raises:
        ValueError: If the graph is none of these.
    """
    if graph not in get_args(Graph):
        raise ValueError(f"graph={graph!r}: expected one of {', '.join(map(repr, get_args(Graph)))}")
    with (DATA / "neurons.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = tuple(row["name"] for row in rows)
    position = torch.tensor([[float(row[axis]) for axis in "xyz"] for row in rows], dtype=torch.float64)
    place = {name: i for i, name in enumerate(names)}
    adjacency = torch.zeros(len(names), len(names), dtype=torch.bool)
    with (DATA / "connections.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["type"] == "chemical" or graph != "chemical":
                adjacency[place[row["target"]], place[row["source"]]] = True
    if graph == "symmetric":
        adjacency = adjacency | adjacency.T
    return Connectome(names=names, adjacency=adjacency, position=position, graph=graph)

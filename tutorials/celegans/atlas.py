"""Where each neuron lies, and which colour it has, as a Gaussian for each (Varol et al. 2020)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tutorials.celegans.connectome import Connectome, normalize_name
from tutorials.celegans.csv_table import read_table, table_number

__all__ = ["Atlas", "principal_axes", "read_atlas"]


@dataclass(frozen=True, eq=False)
class Atlas:
    """Gaussian place, and colour if known, of n neurons.

    Attributes:
        names: The neurons, normalized, each once.
        means: Shape (n, 3), float64, in micrometres.
        covariances: Shape (n, 3, 3), float64, positive definite, in square micrometres.
        color_means: Shape (n, c), float64, or None.
        color_covariances: Shape (n, c, c), float64, positive definite, or None; given exactly where the means are.
        channels: The c colour channels by name, or None.
        axis: Shape (3,), float64: unit vector along the body; by default the first principal axis of the means.
    """

    names: tuple[str, ...]
    means: Tensor
    covariances: Tensor
    color_means: Tensor | None = None
    color_covariances: Tensor | None = None
    channels: tuple[str, ...] | None = None
    axis: Tensor = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        """Check that the fields fit one another, and find the axis."""
        n = len(self.names)
        repeated = sorted(name for name, count in Counter(self.names).items() if count > 1)
        if repeated or n < 4:
            raise ValueError(f"names: {n} neurons, repeated {repeated}; expected at least 4, each once")
        if (self.color_means is None) != (self.color_covariances is None):
            raise ValueError("color_means and color_covariances: expected both or none")
        pairs = [("", self.means, self.covariances, 3)]
        if self.color_means is not None and self.color_covariances is not None:
            pairs.append(("color_", self.color_means, self.color_covariances, self.color_means.shape[-1]))
        for prefix, means, covariances, width in pairs:
            for field, tensor, shape in (
                (f"{prefix}means", means, (n, width)),
                (f"{prefix}covariances", covariances, (n, width, width)),
            ):
                if tuple(tensor.shape) != shape or tensor.dtype != torch.float64 or not bool(tensor.isfinite().all()):
                    raise ValueError(
                        f"{field} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected finite float64 of "
                        f"shape {shape} for {n} names"
                    )
            bad = (torch.linalg.cholesky_ex(covariances).info > 0) | ((covariances - covariances.mT).abs() > 1e-9).any(
                (1, 2)
            )
            if bad.any():
                name = self.names[int(bad.nonzero()[0])]
                raise ValueError(f"{prefix}covariances: that of {name} is not symmetric and positive definite")
        if self.channels is not None and (self.color_means is None or self.color_means.shape[1] != len(self.channels)):
            raise ValueError(f"channels: {len(self.channels)}, expected as many as color_means has columns")
        if self.axis is None:
            object.__setattr__(self, "axis", principal_axes(self.means)[0])

    def __repr__(self) -> str:
        """Give the sizes in place of the numbers."""
        channels = 0 if self.color_means is None else self.color_means.shape[1]
        return f"Atlas(neurons={len(self.names)}, channels={channels})"

    @classmethod
    def from_connectome(cls, connectome: Connectome, spread: float = 10.0) -> Atlas:
        """The places that the package ships, with the same isotropic spread for all.

        Args:
            connectome: Its neurons and their places.
            spread: Standard deviation between worms along each axis, in micrometres.

        Raises:
            ValueError: If ``spread`` is not positive and finite.
        """
        if not (math.isfinite(spread) and spread > 0):
            raise ValueError(f"spread={spread!r}: expected a positive finite number of micrometres")
        covariances = spread**2 * torch.eye(3, dtype=torch.float64).expand(len(connectome), 3, 3)
        axis = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        return cls(connectome.names, connectome.position, covariances.contiguous(), axis=axis)


def read_atlas(path: str | Path) -> Atlas:
    """Read an atlas from a CSV, such as your own copy of a NeuroPAL atlas.

    Columns: ``name``; ``x``, ``y``, ``z``, in micrometres; their spread, as one column ``sd`` or as the covariance
    ``xx``, ``xy``, ``xz``, ``yy``, ``yz``, ``zz``; and for each colour channel, such as ``red``, its mean in a column
    of its name and its standard deviation in ``red_sd``.

    Args:
        path: The file.

    Raises:
        ValueError: If a column is missing, a name comes twice, a value is no number or a covariance is not positive
            definite; the message says where.
    """
    path = Path(path)
    header, rows = read_table(path)
    full = ("xx", "xy", "xz", "yy", "yz", "zz")
    spread = ("sd",) if "sd" in header else full
    missing = [column for column in ("name", "x", "y", "z", *spread) if column not in header]
    if missing:
        raise ValueError(
            f"{path.name}: no column {', '.join(missing)}; expected name, x, y, z, then sd or {', '.join(full)}, "
            "then a column and its _sd for each colour"
        )
    others = [column for column in header if column not in ("name", "x", "y", "z", *spread)]
    channels = tuple(column for column in others if not column.endswith("_sd"))
    if sorted(others) != sorted([*channels, *(f"{channel}_sd" for channel in channels)]):
        raise ValueError(f"{path.name}: colour columns {', '.join(others)}, expected each with its _sd")
    names = tuple(normalize_name(row[header.index("name")]) for _, row in rows)
    values = {
        column: torch.tensor(
            [table_number(path, line, column, row[header.index(column)]) for line, row in rows], dtype=torch.float64
        )
        for column in header
        if column != "name"
    }
    for column in (name for name in header if name == "sd" or name.endswith("_sd")):
        for (line, _), value in zip(rows, values[column].tolist(), strict=True):
            if not value > 0:
                raise ValueError(f"{path.name}: row {line}, column {column!r} holds {value}, expected a positive number")
    covariances = torch.zeros(len(rows), 3, 3, dtype=torch.float64)
    for column in full:
        i, j = ("xyz".index(letter) for letter in column)
        if spread == full:
            covariances[:, i, j] = covariances[:, j, i] = values[column]
        elif i == j:
            covariances[:, i, i] = values["sd"].square()
    means = torch.stack([values[axis] for axis in "xyz"], 1)
    colors: tuple[Tensor, Tensor, tuple[str, ...]] | tuple[()] = ()
    if channels:
        variances = torch.stack([values[f"{channel}_sd"].square() for channel in channels], 1)
        colors = (torch.stack([values[channel] for channel in channels], 1), variances.diag_embed(), channels)
    try:
        return Atlas(names, means, covariances, *colors)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def principal_axes(points: Tensor) -> Tensor:
    """Orthonormal rows, that of the longest extent first: (m, 3) to (3, 3)."""
    axes: Tensor = torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh
    return axes

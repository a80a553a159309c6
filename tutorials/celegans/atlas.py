"""Where each neuron lies, and which colour it has, as a Gaussian for each; and how a worm is laid onto that.

As in Varol et al., 'Statistical Atlas of C. elegans Neurons' (MICCAI 2020): place and colour of each neuron are
Gaussian up to an affine map of the worm, which is found by turns of assignment and regression.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_gs.ops.sinkhorn import sinkhorn
from tutorials.celegans.connectome import Connectome, normalize_name
from tutorials.celegans.recordings import Recording, read_table, table_number

__all__ = ["Atlas", "Registration", "position_logits", "read_atlas", "register"]

ANGLES = 16
"""Rotations about the body axis that the search starts from."""

STARTS = 6
"""Starting maps of one scale and shift that are refined to a similarity; similarities that are refined to an affine map."""

BLUR = (16.0, 8.0, 4.0, 2.0)
"""Standard deviation, in micrometres, that is added to the atlas in the rounds of the similarity map."""

TRIAL_ROUNDS = 8
"""Turns of expected assignment and affine regression after which the best map is chosen."""

ROUNDS = 50
"""Largest number of turns that the chosen map gets on top."""

SETTLED = 0.05
"""Largest move of a neuron, in micrometres, after which the turns end."""

AFFINE_NEURONS = 12
"""Neurons needed for an affine map, of 12 numbers; fewer get a similarity."""

SHEAR = 0.5
"""Prior standard deviation of the affine map's entries about the similarity, as a share of its scale."""


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
            object.__setattr__(self, "axis", _principal_axes(self.means)[0])

    def __repr__(self) -> str:
        """Give the sizes in place of the numbers."""
        channels = 0 if self.color_means is None else self.color_means.shape[1]
        return f"Atlas(neurons={len(self.names)}, channels={channels})"

    @classmethod
    def from_connectome(cls, connectome: Connectome, scale: float = 10.0) -> Atlas:
        """The places that the package ships, with the same isotropic spread for all.

        Args:
            connectome: Its neurons and their places.
            scale: Standard deviation between worms along each axis, in micrometres.

        Raises:
            ValueError: If ``scale`` is not positive and finite.
        """
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale={scale!r}: expected a positive finite number of micrometres")
        covariances = scale**2 * torch.eye(3, dtype=torch.float64).expand(len(connectome), 3, 3)
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
    covariances = torch.zeros(len(rows), 3, 3, dtype=torch.float64)
    for column in full:
        i, j = ("xyz".index(letter) for letter in column)
        if spread == full:
            covariances[:, i, j] = covariances[:, j, i] = values[column]
        elif i == j:
            covariances[:, i, i] = values["sd"].square()
    means = torch.stack([values[axis] for axis in "xyz"], 1)
    if not channels:
        return Atlas(names, means, covariances)
    variances = torch.stack([values[f"{channel}_sd"].square() for channel in channels], 1)
    color_means = torch.stack([values[channel] for channel in channels], 1)
    return Atlas(names, means, covariances, color_means, variances.diag_embed(), channels)


@dataclass(frozen=True, eq=False)
class Registration:
    """A worm laid onto an atlas: ``matrix @ place + offset``.

    Attributes:
        matrix: Shape (3, 3), float64.
        offset: Shape (3,), float64, in micrometres.
        positions: Shape (m, 3), float64: the worm's neurons in the frame of the atlas.
        colors: Shape (m, c), float64: their colours on the scale of the atlas; None where worm or atlas has none.
        log_density: Of places and colours in the frame of the worm under the best matching, in nats.
    """

    matrix: Tensor
    offset: Tensor
    positions: Tensor
    colors: Tensor | None
    log_density: float


def position_logits(registration: Registration, atlas: Atlas) -> Tensor:
    """Log density of each neuron's place, and colour where there is one, under each identity.

    Args:
        registration: Of a worm of m neurons.
        atlas: Of n identities; the one that the worm was registered with.

    Returns:
        Shape (m, n), float64, finite, in nats.
    """
    logits = _log_density(registration.positions, atlas.means, atlas.covariances)
    if registration.colors is not None and atlas.color_means is not None and atlas.color_covariances is not None:
        logits = logits + _log_density(registration.colors, atlas.color_means, atlas.color_covariances)
    return logits


def register(recording: Recording, atlas: Atlas) -> Registration:
    """Find the affine map of a worm onto an atlas, and the gain and offset of each colour channel.

    The worm may be turned, mirrored, reversed, stretched and sheared, and show a part of the body, but has to be
    straight. The search starts from rotations about the body axis in both directions and both handednesses,
    and from the neurons whose identity is known, which stay with it all along. The best starts are refined by turns of
    assignment and a similarity map, with the atlas blurred less and less; the best of those by turns of assignment and
    affine regression, of the worm's places on the atlas's, so that noise in the places does not shrink the map. What
    has the highest density wins. Left and right can be told apart only as far as known neurons or the cloud of places
    tell them.

    Args:
        recording: With places. Known neurons that the atlas lacks are not used.
        atlas: In micrometres as well.

    Raises:
        ValueError: If the recording has no places, or less than four, or they lie in a plane; or its colour channels are
            not those of the atlas.
    """
    search = _Search(recording, atlas)
    similar = sorted((search.similarity(*start) for start in search.starts()), key=lambda found: -found[2])
    hands = [
        [(A, b) for A, b, _ in similar if (torch.linalg.det(A) > 0) == proper][: STARTS // 2] for proper in (True, False)
    ]
    A, b, _ = max(
        (search.affine(*start, rounds=TRIAL_ROUNDS) for start in itertools.chain(*hands)), key=lambda found: found[2]
    )
    A, b, value = search.affine(A, b, rounds=ROUNDS)
    positions = search.x @ A.mT + b
    return Registration(A, b, positions, search.colors_at(search.match(A, b, 0.0)), value)


def _principal_axes(points: Tensor) -> Tensor:
    """Orthonormal rows, the longest extent first: (m, 3) to (3, 3)."""
    axes: Tensor = torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh
    return axes


def _log_density(points: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """Gaussian log densities: (m, k), (n, k), (n, k, k) to (m, n)."""
    factor = torch.linalg.cholesky(covariances)
    white = torch.linalg.solve_triangular(factor, (points.unsqueeze(0) - means.unsqueeze(1)).mT, upper=False)
    scale = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * means.shape[-1] * math.log(2 * math.pi)
    density: Tensor = (-0.5 * white.square().sum(1) - scale.unsqueeze(-1)).mT
    return density


class _Search:
    """The turns of assignment and regression for one worm."""

    def __init__(self, recording: Recording, atlas: Atlas) -> None:
        if recording.positions is None:
            raise ValueError(f"recording {recording.name!r} has no positions, expected a place for each neuron")
        self.x, self.atlas = recording.positions, atlas
        extents = torch.linalg.svdvals(self.x - self.x.mean(0))
        if len(self.x) < 4 or float(extents[2]) < 1e-6 * float(extents[0]):
            raise ValueError(
                f"recording {recording.name!r}: {len(self.x)} places with extents {extents.tolist()}, expected at least 4 "
                "that do not lie in a plane"
            )
        if len(self.x) > len(atlas.names):
            raise ValueError(
                f"recording {recording.name!r} has {len(self.x)} neurons, expected at most the atlas's {len(atlas.names)}"
            )
        place = {name: i for i, name in enumerate(atlas.names)}
        anchors = [(m, place[name]) for m, name in enumerate(recording.identities) if name in place]
        self.rows, self.columns = torch.tensor(anchors, dtype=torch.long).reshape(-1, 2).unbind(1)
        self.colors = self._check_colors(recording)

    def _check_colors(self, recording: Recording) -> Tensor | None:
        if recording.colors is None or self.atlas.color_means is None:
            return None
        named = recording.channels is not None and self.atlas.channels is not None
        given, wanted = recording.colors.shape[1], self.atlas.color_means.shape[1]
        if given != wanted or (named and recording.channels != self.atlas.channels):
            raise ValueError(
                f"recording {recording.name!r} has {given} colour channels {recording.channels or ''}, expected those of "
                f"the atlas, {wanted} {self.atlas.channels or ''}, in the same order"
            )
        return recording.colors

    def starts(self) -> list[tuple[Tensor, Tensor]]:
        """Maps by the known neurons, and the most promising ones of each scale and shift along the body."""
        x, means, axis = self.x, self.atlas.means, self.atlas.axis
        chosen = []
        if len(self.rows) >= 3:
            chosen += [_similarity(x[self.rows], means[self.columns], mirror) for mirror in (1.0, -1.0)]
        own = _principal_axes(x)
        across = _principal_axes(means - (means @ axis).unsqueeze(-1) * axis)[:2]
        along_x, along = x @ own[0], means @ axis
        ratio = float((along.max() - along.min()) / (along_x.max() - along_x.min()))
        rotations = []
        for turn, direction, mirror in itertools.product(range(ANGLES), (1.0, -1.0), (1.0, -1.0)):
            angle = 2 * math.pi * turn / ANGLES
            second = math.cos(angle) * across[0] + math.sin(angle) * across[1]
            third = mirror * (math.cos(angle) * across[1] - math.sin(angle) * across[0])
            rotations.append(direction * axis.outer(own[0]) + second.outer(own[1]) + third.outer(own[2]))
        # The worm's own size laid on either end or the middle, and stretched to the whole length.
        for scale, shift in ((1.0, "head"), (1.0, "tail"), (1.0, "mean"), (ratio, "head"), (ratio, "mean")):
            maps = []
            for rotation in rotations:
                moved = scale * x @ rotation.mT
                here, offset = moved @ axis, means.mean(0) - moved.mean(0)
                offset = offset - (offset @ axis) * axis
                by = {"head": along.min() - here.min(), "tail": along.max() - here.max(), "mean": along.mean() - here.mean()}
                maps.append((scale * rotation, offset + by[shift] * axis))
            chosen += sorted(maps, key=lambda start: -self._blurred(*start))[:STARTS]
        return chosen

    def _blurred(self, A: Tensor, b: Tensor) -> float:
        """How well the cloud fits that of the atlas, each neuron on its own."""
        blur = 2 * (BLUR[0] ** 2 + float(self.atlas.covariances.diagonal(dim1=-2, dim2=-1).mean()))
        y = self.x @ A.mT + b
        density = torch.logsumexp(-torch.cdist(y, self.atlas.means).square() / blur, 1)
        density[self.rows] = -(y[self.rows] - self.atlas.means[self.columns]).square().sum(1) / blur
        return float(density.sum()) + len(y) * float(torch.linalg.slogdet(A).logabsdet)

    def colors_at(self, match: Tensor) -> Tensor | None:
        """Colours on the scale of the atlas, by the gain and offset that fit a matching."""
        if self.colors is None or self.atlas.color_means is None:
            return None
        target = self.atlas.color_means[match]
        gain = target.std(0) / self.colors.std(0).clamp(min=1e-12)
        return (self.colors - self.colors.mean(0)) * gain + target.mean(0)

    def densities(self, A: Tensor, b: Tensor, blur: float, colors: Tensor | None) -> Tensor:
        """Log densities (m, n) of places and colours in the frame of the worm."""
        spread = blur**2 * torch.eye(3, dtype=torch.float64)
        value = _log_density(self.x @ A.mT + b, self.atlas.means, self.atlas.covariances + spread)
        if colors is not None:
            assert self.atlas.color_means is not None
            assert self.atlas.color_covariances is not None
            value = value + _log_density(colors, self.atlas.color_means, self.atlas.color_covariances)
        per_worm: Tensor = value + torch.linalg.slogdet(A).logabsdet
        return per_worm

    def match(self, A: Tensor, b: Tensor, blur: float, colors: Tensor | None = None) -> Tensor:
        """The best matching with the known neurons in their places: long (m,)."""
        value = self.densities(A, b, blur, colors)
        worst = value.min() - 1e6
        value[self.rows] = worst
        value[:, self.columns] = worst
        value[self.rows, self.columns] = 0.0
        return torch.from_numpy(linear_sum_assignment(value.numpy(), maximize=True)[1])

    def similarity(self, A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
        """Refine a start: the map, and its log density."""
        mirror, colors = float(torch.linalg.det(A).sign()), None
        for blur in BLUR:
            match = self.match(A, b, blur, colors)
            A, b = _similarity(self.x, self.atlas.means[match], mirror)
            colors = self.colors_at(match)
        return A, b, self._value(A, b, self.match(A, b, 0.0, colors))

    def _value(self, A: Tensor, b: Tensor, match: Tensor) -> float:
        each = self.densities(A, b, 0.0, self.colors_at(match))
        return float(each.gather(1, match.unsqueeze(1)).sum())

    def affine(self, A: Tensor, b: Tensor, *, rounds: int) -> tuple[Tensor, Tensor, float]:
        """Refine a map by expectation and maximization: the map, and its log density."""
        match = self.match(A, b, 0.0)
        if len(self.x) < AFFINE_NEURONS:
            return A, b, self._value(A, b, match)
        base = torch.linalg.inv(A)
        colors = self.colors_at(match)
        for _ in range(rounds):
            q = self._expected(A, b, colors)
            before = self.x @ A.mT + b
            A, b = self._regress(A, q, base)
            if float((self.x @ A.mT + b - before).abs().max()) < SETTLED:
                break
        return A, b, self._value(A, b, self.match(A, b, 0.0, colors))

    def _expected(self, A: Tensor, b: Tensor, colors: Tensor | None) -> Tensor:
        """Expected matching (m, n): the Sinkhorn scaling of the densities, unseen neurons in rows of their own."""
        value = self.densities(A, b, 0.0, colors)
        n = value.shape[1]
        logits = torch.zeros(n, n, dtype=torch.float64)
        logits[: len(value)] = value - value.amax(1, keepdim=True)
        free = torch.ones(n, dtype=torch.bool)
        free[self.rows] = False
        others = torch.ones(n, dtype=torch.bool)
        others[self.columns] = False
        q = torch.zeros(n, n, dtype=torch.float64)
        q[self.rows, self.columns] = 1.0
        q[free.nonzero(), others.nonzero().mT] = sinkhorn(logits[free][:, others])
        return q[: len(value)]

    def _regress(self, A: Tensor, q: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """Generalized least squares of the worm's places on the atlas's, whose noise the map A weighs.

        This way round noise in the places does not shrink the map, and expected matchings leave it unbiased.
        """
        precision = A.mT @ torch.linalg.inv(self.atlas.covariances) @ A
        center = self.atlas.means.mean(0)
        design = torch.cat([self.atlas.means - center, q.new_ones(q.shape[1], 1)], 1)
        left = torch.einsum("n,na,nb,nij->iajb", q.sum(0), design, design, precision).reshape(12, 12)
        right = torch.einsum("na,nij,nj->ia", design, precision, q.mT @ self.x).reshape(12)
        prior = torch.zeros(3, 4, dtype=torch.float64)
        prior[:, :3] = 1 / (SHEAR**2 * float(torch.linalg.det(base).abs()) ** (2 / 3))
        toward = torch.cat([base, torch.zeros(3, 1, dtype=torch.float64)], 1)
        solution = torch.linalg.solve(left + prior.flatten().diag(), right + (prior * toward).flatten()).reshape(3, 4)
        A = torch.linalg.inv(solution[:, :3])
        return A, center - A @ solution[:, 3]


def _similarity(x: Tensor, y: Tensor, mirror: float) -> tuple[Tensor, Tensor]:
    """Rotation (mirrored if ``mirror`` is -1), scale and shift of x onto y (Horn 1987; scale from both extents)."""
    xc, yc = x - x.mean(0), y - y.mean(0)
    U, _, Vh = torch.linalg.svd(yc.mT @ xc)
    signs = torch.ones(3, dtype=torch.float64)
    signs[2] = mirror * torch.linalg.det(U @ Vh).sign()
    A: Tensor = (yc.norm() / xc.norm()) * (U * signs) @ Vh
    return A, y.mean(0) - A @ x.mean(0)

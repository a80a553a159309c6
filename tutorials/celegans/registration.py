"""A worm laid onto an atlas by an affine map, and what its places and colours then say.

As in Varol et al., 'Statistical Atlas of C. elegans Neurons' (MICCAI 2020): place and colour of each neuron are
Gaussian up to an affine map of the worm, which is found by turns of assignment and regression.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pyro_gs.ops.sinkhorn import sinkhorn
from tutorials.celegans.atlas import Atlas, principal_axes
from tutorials.celegans.recordings import Recording

__all__ = ["Registration", "anchors", "position_logits", "register"]

ANGLES = 16
"""Rotations about the body axis that the search starts from."""

STARTS = 3
"""Starting maps of one handedness, scale and shift that are refined to a similarity; similarities of one handedness that are
refined to an affine map."""

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
class Registration:
    """A worm laid onto an atlas: ``matrix @ place + offset``.

    Attributes:
        matrix: Shape (3, 3), float64.
        offset: Shape (3,), float64, in micrometres.
        positions: Shape (m, 3), float64: the worm's neurons in the frame of the atlas.
        colors: Shape (m, c), float64: their colours on the scale of the atlas; None where worm or atlas has none.
        log_density: Of places and colours in the frame of the worm under the best matching, in nats.
        margin: By how much it exceeds that of the best map of the other handedness, in nats, when the two were compared;
            infinite where only one was tried.
    """

    matrix: Tensor
    offset: Tensor
    positions: Tensor
    colors: Tensor | None
    log_density: float
    margin: float = math.inf

    @property
    def mirrored(self) -> bool:
        """Whether the map mirrors the worm."""
        return bool(torch.linalg.det(self.matrix) < 0)

    @property
    def scale(self) -> float:
        """How much longer the worm is in the frame of the atlas: near 1 where both are in micrometres."""
        return math.pow(float(torch.linalg.det(self.matrix).abs()), 1 / 3)


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


def register(recording: Recording, atlas: Atlas, *, mirrored: bool | None = None) -> Registration:
    """Find the affine map of a worm onto an atlas, and the gain and offset of each colour channel.

    The worm may be turned, mirrored, reversed, stretched and sheared, and show a part of the body, but has to be
    straight. The search starts from rotations about the body axis in both directions and both handednesses,
    and from the neurons whose identity is known, which stay with it all along. The best starts are refined by turns of
    assignment and a similarity map, with the atlas blurred less and less; the best of those by turns of assignment and
    affine regression, of the worm's places on the atlas's, so that noise in the places does not shrink the map. What
    has the highest density wins. The body is nearly its own mirror image, so that a worm and its mirror image fit about
    as well; ``margin`` of the result tells how far colours, known neurons and the cloud of places tell them apart.

    Args:
        recording: With places. Known neurons that the atlas lacks are not used.
        atlas: In micrometres as well.
        mirrored: Whether the recording's frame is a mirror image of the atlas's; None where that is not known.

    Raises:
        ValueError: If the recording has no places, or less than four, or they lie in a plane; or its colour channels are
            not those of the atlas.
    """
    search = _Search(recording, atlas)
    hands = (False, True) if mirrored is None else (mirrored,)
    similar = sorted((search.similarity(*start) for start in search.starts(hands)), key=lambda found: -found[2])
    best = []
    for hand in hands:
        starts = [(A, b) for A, b, _ in similar if (torch.linalg.det(A) < 0) == hand][:STARTS]
        best.append(max((search.affine(*start, rounds=TRIAL_ROUNDS) for start in starts), key=lambda found: found[2]))
    (A, b, value), *others = sorted(best, key=lambda found: -found[2])
    margin = value - others[0][2] if others else math.inf
    A, b, value = search.affine(A, b, rounds=ROUNDS)
    positions = search.x @ A.mT + b
    return Registration(A, b, positions, search.colors_at(search.match(A, b, 0.0)), value, margin)


def anchors(recording: Recording, atlas: Atlas) -> tuple[Tensor, Tensor]:
    """The known neurons that the atlas has: their places in the recording and in the atlas, both long (k,)."""
    place = {name: i for i, name in enumerate(atlas.names)}
    pairs = [(m, place[name]) for m, name in enumerate(recording.identities) if name in place]
    rows, columns = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return rows, columns


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
        if len(self.x) < 4 or not float(extents[2]) > 1e-6 * float(extents[0]):
            raise ValueError(
                f"recording {recording.name!r}: {len(self.x)} places with extents {extents.tolist()}, expected at least 4 "
                "that do not lie in a plane; flat places cannot be laid onto the atlas, so give all three coordinates, or "
                "none and let known neurons and activity tell"
            )
        if len(self.x) > len(atlas.names):
            raise ValueError(
                f"recording {recording.name!r} has {len(self.x)} neurons, expected at most the atlas's {len(atlas.names)}"
            )
        self.rows, self.columns = anchors(recording, atlas)
        self.colors = self._check_colors(recording)

    def _check_colors(self, recording: Recording) -> Tensor | None:
        if recording.colors is None or self.atlas.color_means is None:
            return None
        named = recording.channels is not None and self.atlas.channels is not None
        given, wanted = recording.channels or (), self.atlas.channels or ()
        same = sorted(given) == sorted(wanted) if named else recording.colors.shape[1] == self.atlas.color_means.shape[1]
        if not same:
            raise ValueError(
                f"recording {recording.name!r} has {recording.colors.shape[1]} colour channels {given or ''}, expected "
                f"those of the atlas, {self.atlas.color_means.shape[1]} {wanted or ''}"
            )
        return recording.colors[:, [given.index(channel) for channel in wanted]] if named else recording.colors

    def starts(self, hands: Sequence[bool]) -> list[tuple[Tensor, Tensor]]:
        """Maps by the known neurons, and the most promising ones of each handedness, scale and shift along the body."""
        x, means, axis = self.x, self.atlas.means, self.atlas.axis
        chosen = []
        if len(self.rows) >= 3:
            chosen += [_similarity(x[self.rows], means[self.columns], -1.0 if hand else 1.0) for hand in hands]
        own = principal_axes(x)
        own[2] *= torch.linalg.det(own).sign()
        across = principal_axes(means - (means @ axis).unsqueeze(-1) * axis)[:2]
        handed = torch.linalg.det(torch.stack([axis, *across])).sign()
        along_x, along = x @ own[0], means @ axis
        ratio = float((along.max() - along.min()) / (along_x.max() - along_x.min()))
        rotations: dict[bool, list[Tensor]] = {hand: [] for hand in hands}
        for turn, direction, hand in itertools.product(range(ANGLES), (1.0, -1.0), hands):
            angle = 2 * math.pi * turn / ANGLES
            second = math.cos(angle) * across[0] + math.sin(angle) * across[1]
            third = math.cos(angle) * across[1] - math.sin(angle) * across[0]
            third = handed * direction * (-third if hand else third)
            rotations[hand].append(direction * axis.outer(own[0]) + second.outer(own[1]) + third.outer(own[2]))
        # The worm's own size laid on either end or the middle, and stretched to the whole length.
        shifts = ((1.0, "head"), (1.0, "tail"), (1.0, "mean"), (ratio, "head"), (ratio, "mean"))
        for (scale, shift), hand in itertools.product(shifts, hands):
            maps = []
            for rotation in rotations[hand]:
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

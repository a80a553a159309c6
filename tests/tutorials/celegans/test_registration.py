"""Registration, with an atlas that the tests simulate: worms drawn from it, distorted, with neurons missing."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tutorials.celegans.atlas import Atlas
from tutorials.celegans.recordings import Recording
from tutorials.celegans.registration import Registration, position_logits, register

SPREAD = 3.0


def atlas(n: int = 60, *, colors: bool = False) -> Atlas:
    """A body of 400 by 50 by 30 micrometres that tapers to the tail and bends up: no turn of it looks the same."""
    generator = torch.Generator().manual_seed(7)
    y = torch.rand(n, generator=generator, dtype=torch.float64) ** 2
    across = torch.randn(n, 2, generator=generator, dtype=torch.float64) * torch.tensor([25.0, 15.0], dtype=torch.float64)
    means = torch.stack([across[:, 0] * (1.2 - y), 400 * y, across[:, 1] * (1.2 - y) + 60 * (y - 0.4).square() * 4], 1)
    root = SPREAD * (torch.eye(3) + 0.3 * torch.randn(n, 3, 3, generator=generator)).double()
    hues = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    noise = 0.04 * torch.eye(3, dtype=torch.float64).expand(n, 3, 3)
    names = tuple(f"N{i}" for i in range(n))
    return Atlas(names, means, root @ root.mT, *((hues, noise.contiguous(), ("r", "g", "b")) if colors else ()))


def drawn(of: Atlas, *, seen: int, known: int, seed: int, mirror: bool = False) -> tuple[Recording, Tensor, Tensor, Tensor]:
    """A worm from an atlas: the recording, its truth, its places in the frame of the atlas, and the distortion."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.linalg.cholesky(of.covariances)
    own = of.means + (factor @ torch.randn(len(of.names), 3, 1, generator=generator, dtype=torch.float64)).squeeze(-1)
    truth = torch.randperm(len(of.names), generator=generator)[:seen]
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    rotation[:, 0] *= torch.linalg.det(rotation).sign() * (-1 if mirror else 1)
    stretch = torch.tensor([0.85, 1.1, 1.2], dtype=torch.float64).diag()
    stretch += 0.05 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    body = rotation @ stretch
    identities = tuple(of.names[i] if m < known else None for m, i in enumerate(truth.tolist()))
    colors = None
    if of.color_means is not None:
        noise = 0.2 * torch.randn(seen, 3, generator=generator, dtype=torch.float64)
        colors = 40 + 12 * (of.color_means[truth] + noise)
    recording = Recording(
        "worm",
        torch.randn(3, seen, generator=generator, dtype=torch.float64),
        tuple(f"?{m}" for m in range(seen)),
        identities,
        own[truth] @ body.mT + torch.tensor([300.0, -80.0, 15.0], dtype=torch.float64),
        colors,
        of.channels,
    )
    return recording, truth, own[truth], body


def ranks(logits: Tensor, truth: Tensor) -> Tensor:
    return (logits > logits.gather(1, truth[:, None])).sum(1)


@pytest.mark.parametrize(
    ("known", "seen", "mirror"), [(0, 50, False), (0, 50, True), (10, 50, False), (10, 30, True), (2, 45, False)]
)
def test_registration_undoes_the_distortion(known: int, seen: int, mirror: bool) -> None:
    of = atlas()
    recording, truth, own, body = drawn(of, seen=seen, known=known, seed=seen + known, mirror=mirror)
    found = register(recording, of)
    # With spread s and m neurons an entry of the map has a standard error of s / (width sqrt(m)); the least width is 15.
    error = SPREAD / (15 * math.sqrt(seen))
    assert (found.matrix @ body - torch.eye(3)).abs().max() < 4 * error + 0.05
    assert (found.matrix @ recording.positions.mT + found.offset[:, None] - found.positions.mT).abs().max() < 1e-9  # type: ignore[union-attr]
    assert (found.positions - own).norm(dim=1).median() < SPREAD
    place = ranks(position_logits(found, of), truth)
    assert place.double().mean() < 3
    assert float((place < 5).double().mean()) > 0.8
    assert math.isfinite(found.log_density)


def test_registration_of_a_part_of_the_body() -> None:
    of = atlas(120)
    recording, truth, own, _ = drawn(of, seen=110, known=0, seed=3)
    head = (own @ of.axis - (of.means @ of.axis).min()).abs() < 200
    part = recording.without([label for label, keep in zip(recording.labels, head.tolist(), strict=True) if not keep])
    assert 30 < len(part.labels) < 100
    found = register(part, of)
    assert (found.positions - own[head]).norm(dim=1).median() < 2 * SPREAD
    assert ranks(position_logits(found, of), truth[head]).double().median() <= 2


def symmetric() -> Atlas:
    """A cloud that is its own mirror image."""
    half, flip = atlas(30), torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64).diag()
    means = half.means + 8 * torch.eye(3, dtype=torch.float64)[0]
    covariances = torch.cat([half.covariances, flip @ half.covariances @ flip])
    return Atlas(tuple(f"N{i}" for i in range(60)), torch.cat([means, means @ flip]), covariances)


def test_known_neurons_settle_what_the_cloud_cannot_tell() -> None:
    """Without known neurons either hand fits as well."""
    of = symmetric()
    for seed in (0, 1):
        recording, truth, own, _ = drawn(of, seen=50, known=6, seed=seed, mirror=bool(seed))
        found = register(recording, of)
        assert (found.positions - own).norm(dim=1).median() < SPREAD
        assert ranks(position_logits(found, of), truth).double().mean() < 3


@pytest.mark.parametrize("mirror", [False, True])
def test_handedness_may_be_given(mirror: bool) -> None:
    """The cloud of the test above, without known neurons: the margin is small, and who knows the frame settles it."""
    of = symmetric()
    recording, truth, own, _ = drawn(of, seen=50, known=0, seed=2, mirror=mirror)
    # Two hands that fit alike differ by the luck of 50 places, of three squared normal deviates each: sqrt(2 * 150) nats.
    assert register(recording, of).margin < math.sqrt(300)
    found = register(recording, of, mirrored=mirror)
    assert found.mirrored == mirror
    assert found.margin == math.inf
    assert (found.positions - own).norm(dim=1).median() < SPREAD
    assert ranks(position_logits(found, of), truth).double().mean() < 3
    assert register(recording, of, mirrored=not mirror).mirrored != mirror


def test_scale_tells_of_other_units() -> None:
    of = atlas()
    recording, *_ = drawn(of, seen=50, known=10, seed=0)
    assert recording.positions is not None
    scale = register(recording, of).scale
    assert 0.8 < scale < 1.25
    millimetres = dataclasses.replace(recording, positions=recording.positions / 1000)
    assert register(millimetres, of).scale == pytest.approx(1000 * scale, rel=0.01)


def test_colours_are_matched_by_name() -> None:
    of = atlas(colors=True)
    recording, *_ = drawn(of, seen=50, known=0, seed=5)
    assert recording.colors is not None
    turned = dataclasses.replace(recording, colors=recording.colors.flip(1), channels=("b", "g", "r"))
    found, same = register(turned, of), register(recording, of)
    assert found.colors is not None
    assert same.colors is not None
    assert torch.equal(found.colors, same.colors)
    assert found.margin > 100  # colours tell the hands apart


def test_few_neurons_get_a_similarity() -> None:
    of = atlas()
    recording, _, _, _ = drawn(of, seen=8, known=8, seed=0)
    found = register(recording, of)
    square = found.matrix @ found.matrix.mT
    torch.testing.assert_close(square, square[0, 0] * torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_colours_are_put_on_the_scale_of_the_atlas_and_tell_more() -> None:
    of = atlas(colors=True)
    recording, truth, own, _ = drawn(of, seen=50, known=0, seed=5)
    found = register(recording, of)
    assert found.colors is not None
    assert of.color_means is not None
    assert (found.positions - own).norm(dim=1).median() < SPREAD
    assert (found.colors - of.color_means[truth]).abs().mean() < 0.3  # the noise of the colours has 0.2
    with_colors = ranks(position_logits(found, of), truth)
    without = ranks(position_logits(Registration(found.matrix, found.offset, found.positions, None, 0.0), of), truth)
    assert with_colors.double().mean() < 0.3
    assert without.double().mean() > 2 * with_colors.double().mean()


def test_logits_are_gaussian_log_densities() -> None:
    of = atlas(10, colors=True)
    assert of.color_means is not None
    assert of.color_covariances is not None
    generator = torch.Generator().manual_seed(0)
    places, hues = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    eye = torch.eye(3, dtype=torch.float64)
    logits = position_logits(Registration(eye, 0 * eye[0], places, hues, 0.0), of)
    place = torch.distributions.MultivariateNormal(of.means, of.covariances).log_prob(places[:, None])
    hue = torch.distributions.MultivariateNormal(of.color_means, of.color_covariances).log_prob(hues[:, None])
    torch.testing.assert_close(logits, place + hue)


def test_registration_refuses() -> None:
    of = atlas(20, colors=True)
    worm, *_ = drawn(of, seen=15, known=0, seed=0)
    fields = [worm.name, worm.traces, worm.labels, worm.identities]
    with pytest.raises(ValueError, match="recording 'worm' has no positions"):
        register(Recording(*fields), of)  # type: ignore[arg-type]
    assert worm.positions is not None
    flat = worm.positions * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="15 places with extents .* that do not lie in a plane"):
        register(Recording(*fields, flat), of)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has 15 neurons, expected at most the atlas's 10"):
        register(worm, atlas(10))
    two = torch.ones(15, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="has 2 colour channels"):
        register(Recording(*fields, worm.positions, two), of)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"3 colour channels \('b', 'g', 'x'\), expected those of the atlas, 3 \('r', 'g', 'b'\)"
    ):
        register(Recording(*fields, worm.positions, worm.colors, ("b", "g", "x")), of)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="places with extents .* that do not lie in a plane"):
        register(Recording(*fields, 0 * worm.positions), of)  # type: ignore[arg-type]

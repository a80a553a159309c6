import dataclasses

import pytest
import torch
from placed import network, placed, recording

from tutorials.celegans.atlas import Atlas
from tutorials.celegans.connectome import load_connectome
from tutorials.celegans.preparation import standardize, to_worms
from tutorials.celegans.registration import position_logits, register


def test_standardized_traces_have_innovations_of_scale_one() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    traces, state = [], torch.zeros(3, dtype=torch.float64)
    for step in noise:
        state = torch.tensor([0.0, 0.9, -0.5]) * state + step
        traces.append(100 + torch.tensor([2.0, 0.1, 30.0]) * state)
    worm = dataclasses.replace(recording(["?1", "?2", "?3"]), traces=torch.stack(traces).double())
    found, persistence = standardize(worm)
    assert found.mean(0).abs().max() < 1e-9
    torch.testing.assert_close(persistence, torch.tensor([0.0, 0.9, -0.5]).double(), atol=0.02, rtol=0)
    residual = found[1:] - torch.tensor([0.0, 0.9, -0.5]) * found[:-1]
    # A standard deviation over 20,000 numbers has a standard error of .005.
    torch.testing.assert_close(residual.std(0), torch.ones(3, dtype=torch.float64), atol=0.02, rtol=0)
    torch.testing.assert_close(found[:, 1].std(), torch.tensor(1 / (1 - 0.81) ** 0.5).double(), atol=0.1, rtol=0)


def test_units_do_not_matter() -> None:
    worm = recording(["?1", "?2", "?3"])
    scales = torch.tensor([1e-200, 1.0, 1e200], dtype=torch.float64)
    for given, found in zip(
        standardize(worm), standardize(dataclasses.replace(worm, traces=worm.traces * scales)), strict=True
    ):
        torch.testing.assert_close(found, given)


def test_recordings_of_different_sizes_are_padded() -> None:
    connectome = network(6)
    a, b, c = connectome.names[:3]
    first = recording(["?1", b, "?3"], steps=10)
    second = recording([c, "?2", "?3", "?4", "?5", a], steps=15, name="other")
    worms = to_worms([first, second], connectome, sigma=0.7)
    assert worms.traces.shape == (2, 15, 6)
    assert torch.equal(worms.traces[0, :10, :3], standardize(first)[0])
    assert not worms.traces[0, 10:].any()
    assert not worms.traces[0, :, 3:].any()
    assert worms.observed.sum(1).tolist() == [3, 6]
    assert worms.lengths.tolist() == [9, 14]
    assert worms.known.tolist() == [[False, True] + [False] * 4, [True] + [False] * 4 + [True]]
    others = [1, 0, 1, 1, 1, 1]
    assert worms.allowed[0].int().tolist() == [others, [0, 1, 0, 0, 0, 0], others, others, others, others]
    assert worms.allowed[1, :, 0].nonzero().flatten().tolist() == [5]
    assert worms.allowed[1, :, 2].nonzero().flatten().tolist() == [0]
    assert worms.allowed[1].sum(1).tolist() == [1, 4, 4, 4, 4, 1]
    assert not worms.logits.any()
    assert worms.truth is None
    assert worms.sigma == 0.7
    assert worms.weight_scale == pytest.approx(0.5 / max(float(connectome.adjacency.sum()) / 6, 1) ** 0.5)
    assert to_worms([first], connectome, weight_scale=0.3).weight_scale == 0.3


def test_an_atlas_gives_logits_and_keeps_every_candidate() -> None:
    connectome = network(20)
    shuffled = connectome.subset(torch.randperm(20, generator=torch.Generator().manual_seed(0)))
    worm, atlas = placed(connectome, list(range(18))), Atlas.from_connectome(shuffled)
    worms = to_worms([worm], connectome, atlas=atlas)
    logits = position_logits(register(worm, atlas), atlas)
    for i, name in enumerate(connectome.names):
        assert torch.equal(worms.logits[0, :18, i], logits[:, atlas.names.index(name)])
    assert not worms.logits[0, 18:].any()
    assert worms.allowed[0].sum(1).tolist() == [1] * 4 + [16] * 16
    # The places tell: most neurons are nearest to themselves.
    assert float((worms.logits[0, :18].argmax(1) == torch.arange(18)).double().mean()) > 0.7


def test_eta_keeps_what_is_near_along_the_body() -> None:
    connectome = network(40)
    worm = placed(connectome, list(range(35)), known=10, spread=0.5)
    worms = to_worms([worm], connectome, eta=0.2)
    near = (connectome.body[:35, None] - connectome.body).abs()
    candidates = worms.allowed[0, 10:35]
    unknown = torch.arange(40) >= 10
    # A neuron lies within a few micrometres of a body of hundreds: only the border of the window is unsure.
    assert candidates[(near[10:] < 0.18) & unknown].all()
    assert not candidates[(near[10:] > 0.22) | ~unknown].any()
    assert not worms.allowed[0, 35:, :10].any()
    assert worms.allowed[0, 35:, 35:].all()
    assert not worms.logits.any()
    both = to_worms([worm], connectome, eta=0.2, atlas=Atlas.from_connectome(connectome), mirrored=False)
    assert torch.equal(both.allowed, worms.allowed)
    assert both.logits.any()


def test_max_candidates_keeps_the_densest_and_a_matching() -> None:
    connectome = network(30)
    worm = placed(connectome, list(range(28)), spread=4.0)
    atlas = Atlas.from_connectome(connectome)
    for most in (1, 5):
        worms = to_worms([worm], connectome, atlas=atlas, max_candidates=most)
        free = worms.logits[0].masked_fill(~to_worms([worm], connectome).allowed[0], -torch.inf)
        rank = (free[:, None, :] > free[:, :, None]).sum(2)
        dense = worms.allowed[0, 4:28] & (rank[4:28] >= most)
        assert dense.sum(1).max() <= 1  # its place in the best matching
        assert worms.allowed[0, 4:28].sum(1).max() <= most + 1
        assert worms.allowed[0].any(1).all()


def test_a_worm_that_shows_all_and_one_neuron_worms() -> None:
    connectome = network(4)
    assert to_worms([recording(list(connectome.names))], connectome).known.all()
    assert to_worms([recording(["?1"])], connectome).observed.sum() == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            ["?1", "AVAX", "AVAL", "M3L"],
            "recording 'worm': 'AVAX', 'M3L' \\(2 in all\\): no neuron .* close to the first: .*AVA[LR]",
        ),
        (["time", "?1"], "'time' .*: no neuron .* starts with '\\?' .*--drop.* without\\(labels\\)"),
        ([f"?{i}" for i in range(280)], "recording 'worm' has 280 neurons, expected at most the 279 of the connectome"),
    ],
)
def test_labels_that_do_not_fit_the_connectome(labels: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_worms([recording(labels)], load_connectome())


def test_flat_traces_are_named() -> None:
    worm = recording(["?1", "AVAL", "?3"])
    traces = worm.traces.clone()
    traces[:, 1] = 7.0
    with pytest.raises(ValueError, match=r"recording 'worm': the traces of AVAL have no noise .*without\(labels\)"):
        standardize(dataclasses.replace(worm, traces=traces))
    with pytest.raises(ValueError, match=r"the traces of \?1, AVAL, \?3 have no noise .* 2 time steps"):
        standardize(dataclasses.replace(worm, traces=traces[:2]))


def test_too_few_candidates_are_named() -> None:
    """Three neurons in one place where the connectome has one: the window holds too few names."""
    connectome = network(30)
    places = connectome.position.clone()
    order = connectome.body.argsort()
    places[order[15]] = places[order[16]] = places[order[14]]
    worm = recording([f"?{i}" if i in order[14:17] else name for i, name in enumerate(connectome.names)], places=places)
    with pytest.raises(
        ValueError, match=r"recording 'worm': the neurons \?.* in all\) have only \d+ candidates between them"
    ):
        to_worms([worm], connectome, eta=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.1}, "recording 'worm' has no positions, which eta=0.1 needs"),
        ({"atlas": True}, "recording 'worm' has no positions, which an atlas needs"),
        ({"eta": float("nan")}, "eta=nan: expected a positive finite share"),
        ({"max_candidates": 3}, "max_candidates=3 needs an atlas"),
        ({"max_candidates": 0}, "max_candidates=0: expected an integer of at least 1"),
        ({"sigma": 0.0}, "sigma=0.0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    connectome = network(5)
    if "atlas" in options:
        options = {"atlas": Atlas.from_connectome(connectome)}
    with pytest.raises(ValueError, match=message):
        to_worms([recording(["?1", "?2"])], connectome, **options)  # type: ignore[arg-type]


def test_bad_recordings_and_atlases() -> None:
    connectome = network(6)
    with pytest.raises(ValueError, match="recordings is empty"):
        to_worms([], connectome)
    with pytest.raises(ValueError, match=r"expected a sequence: \[recording\]"):
        to_worms(recording(["?1"]), connectome)  # type: ignore[arg-type]
    atlas = Atlas.from_connectome(connectome.subset([0, 1, 2, 3]))
    worm = placed(connectome, list(range(6)))
    missing = ", ".join(connectome.names[4:])
    with pytest.raises(ValueError, match=rf"atlas: it lacks 2 of the 6 neurons \({missing}\).*connectome\.subset"):
        to_worms([worm], connectome, atlas=atlas)


def test_worms_with_and_without_places() -> None:
    connectome = network(20)
    worm, bare = placed(connectome, list(range(18)), known=15), recording(["?1", connectome.names[3]], name="bare")
    atlas = Atlas.from_connectome(connectome)
    worms = to_worms([worm, bare], connectome, atlas=atlas, mirrored=False)
    assert torch.equal(worms.logits[0], to_worms([worm], connectome, atlas=atlas, mirrored=False).logits[0])
    assert not worms.logits[1].any()
    assert worms.allowed[1, 0].sum() == 19
    with pytest.raises(ValueError, match=r"recording 'bare' has no positions, which eta=0\.2 needs"):
        to_worms([worm, bare], connectome, atlas=atlas, eta=0.2)


def test_columns_that_only_rise_are_no_traces() -> None:
    worm = recording(["?1", "", "?3"])
    traces = worm.traces.clone()
    traces[:, 1] = torch.rand(len(traces), generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    with pytest.raises(ValueError, match=r"recording 'worm': the column '' rises at every time step.*--drop"):
        standardize(dataclasses.replace(worm, traces=traces))
    standardize(dataclasses.replace(worm, traces=traces[:9]))

"""A worm of your own: the example's files, the command, and the README's ten lines."""

import csv
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tutorials.celegans import gumbel_sinkhorn, own
from tutorials.celegans.__main__ import METHODS
from tutorials.celegans.atlas import Atlas
from tutorials.celegans.connectome import Connectome, load_connectome
from tutorials.celegans.example import Example, simulate_recordings
from tutorials.celegans.identities import identity_table
from tutorials.celegans.preparation import to_worms
from tutorials.celegans.recordings import read_recording

README = Path(own.__file__).with_name("README.md")
NWB = importlib.util.find_spec("pynwb") is not None
needs_nwb = pytest.mark.skipif(not NWB, reason="pynwb is not installed")

pytestmark = pytest.mark.usefixtures("float64_only")


def network() -> Connectome:
    return load_connectome().thin(36, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """Two worms that show 29 of 36 neurons, for 601 and 541 time steps."""
    return simulate_recordings(
        tmp_path_factory.mktemp("worms"), network(), steps=600, seen=0.8, known=0.3, spread=3.0, nwb=NWB, seed=1
    )


def test_the_example_writes_what_it_holds(example: Example) -> None:
    assert [len(worm.labels) for worm in example.recordings] == [29, 29]
    assert [len(worm.traces) for worm in example.recordings] == [601, 541]
    assert example.truth[0] != example.truth[1]
    for traces, places, worm, truth in zip(
        example.traces, example.positions, example.recordings, example.truth, strict=True
    ):
        read = read_recording(traces, positions=places)
        assert (read.name, read.labels, read.identities) == (worm.name, worm.labels, worm.identities)
        assert torch.equal(read.traces, worm.traces)
        assert read.positions is not None
        assert worm.positions is not None
        assert torch.equal(read.positions, worm.positions)
        given = [name is not None for name in worm.identities]
        assert 4 <= sum(given) <= 14
        assert all(name in (None, true) for name, true in zip(worm.identities, truth, strict=True))


@needs_nwb
def test_the_examples_nwb_files_hold_the_same(example: Example) -> None:
    for path, worm in zip(example.nwb, example.recordings, strict=True):
        read = read_recording(path)
        assert read.identities == worm.identities
        assert torch.equal(read.traces, worm.traces)


@pytest.mark.parametrize(
    ("options", "message"), [({"seen": 0.0}, "seen=0.0"), ({"spread": -1.0}, "spread=-1.0"), ({"steps": 1}, "steps=1")]
)
def test_the_example_refuses(tmp_path: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_recordings(tmp_path, network(), **options)  # type: ignore[arg-type]


def test_worms_that_show_a_part_are_identified(example: Example) -> None:
    """Places, known neurons and activity together name most of the others; places alone do not."""
    connectome = network()
    atlas = Atlas.from_connectome(connectome, 4.0)
    worms = to_worms(example.recordings, connectome, atlas=atlas)
    result = gumbel_sinkhorn.fit(worms, connectome, steps=150)
    rows = identity_table(result, worms, example.recordings, connectome)
    truth = [name for names in example.truth for name in names]
    right = np.array([row.identity == name for row, name in zip(rows, truth, strict=True)])
    unknown = np.array([not row.known for row in rows])
    assert right[~unknown].all()
    assert right[unknown].mean() > 0.85
    placed = [connectome.names[i] for i in worms.logits[worms.observed].argmax(1)]
    assert np.mean([a == b for a, b in zip(placed, truth, strict=True)]) < right.mean() - 0.1


def test_the_command(example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    second, place = (example.nwb[1], "-") if NWB else (example.traces[1], str(example.positions[1]))
    files = [str(example.traces[0]), str(second), "--positions", str(example.positions[0]), place]
    names = ["--neurons", *network().names]
    out = tmp_path / "deep" / "out"
    options = ["--eta", "0.5", "--max-candidates", "20", "--methods", "gumbel-sinkhorn", "map", "--budget", "1", "--quiet"]
    assert own.main([*files, *names, *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 recordings, 58 neurons" in printed
    for method in ("gumbel-sinkhorn", "map"):
        assert f"{METHODS[method][0]}: " in printed
        with (out / f"identities-{method}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 58
        assert [row["label"] for row in rows] == [label for worm in example.recordings for label in worm.labels]
        for worm in ("worm1", "worm2"):
            identities = [row["identity"] for row in rows if row["worm"] == worm]
            assert len(set(identities)) == 29
        page = (out / f"report-{method}.html").read_text()
        assert METHODS[method][0] in page
        assert page.count("<tr data-worm=") == 58


def test_every_method_takes_recordings_without_places(example: Example, tmp_path: Path) -> None:
    files, names = [str(path) for path in example.traces], ["--neurons", *network().names]
    options = ["--budget", "0.2", "--quiet", "--methods", *METHODS]
    assert own.main([*files, *names, *options, "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("identities-*.csv"))) == len(METHODS)


def test_an_atlas_file_of_fewer_neurons(example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    connectome = network()
    path = tmp_path / "atlas.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "x", "y", "z", "sd"])
        writer.writerows(
            [name, *place, 4.0] for name, place in zip(connectome.names, connectome.position.tolist(), strict=True)
        )
    files = [str(example.traces[0]), "--positions", str(example.positions[0])]
    options = ["--methods", "map", "--budget", "0.2", "--quiet", "--out", str(tmp_path)]
    assert own.main([*files, "--atlas", str(path), *options]) == 0
    printed = capsys.readouterr().out
    assert "atlas.csv has 36 of the connectome's 279 neurons; the others are left out" in printed
    assert "of 36 identities" in printed


def test_what_is_not_used_is_told(example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worm with places beside one without, a column dropped, and a column of places that the atlas does not have."""
    sizes = tmp_path / "sizes.csv"
    header, *lines = example.positions[0].read_text().splitlines()
    sizes.write_text("\n".join([f"{header},size", *(f"{line},1" for line in lines)]))
    label = next(label for label in example.recordings[0].labels if label.startswith("?"))
    files = [*map(str, example.traces), "--positions", str(sizes), "-", "--drop", label, "--mirrored", "no"]
    options = ["--neurons", *network().names, "--methods", "map", "--budget", "0.2", "--quiet", "--out", str(tmp_path)]
    assert own.main([*files, *options]) == 0
    printed, page = capsys.readouterr().out, (tmp_path / "report-map.html").read_text()
    for note in (
        f"worm1: left out {label}",
        "worm2 has no positions: activity alone tells",
        "worm1: size: not used, since the atlas has no colours",
    ):
        assert f"note: {note}" in printed
        assert note in page
    certain = "named without doubt, by probabilities of 0 and 1 that tell nothing"
    others = sum(name is None for worm in example.recordings for name in worm.identities) - 1  # one is dropped
    assert f"MAP (FAQ): {others} {certain}" in printed
    assert certain in page
    assert "expected to be right" not in page


def test_an_atlas_of_other_names(example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "atlas.csv"
    path.write_text("\n".join(["name,x,y,z,sd", *(f"cell{i},{i},{i * i},{-i},1" for i in range(5))]))
    files = [str(example.traces[0]), "--positions", str(example.positions[0]), "--atlas", str(path)]
    assert own.main([*files, "--out", str(tmp_path)]) == 2
    assert "atlas.csv has none of the connectome's neurons" in capsys.readouterr().err


def test_recordings_of_one_name_and_neurons_to_drop(example: Example, tmp_path: Path) -> None:
    copies = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        copies.append(tmp_path / folder / "worm.csv")
        copies[-1].write_bytes(example.traces[0].read_bytes())
    known = next(name for name in example.recordings[0].identities if name)
    args = own.build_parser().parse_args([*map(str, copies), "--drop", known])
    worms = own.read_all(args)
    assert [worm.name for worm in worms] == [str(path) for path in copies]
    assert all(known not in worm.labels and len(worm.labels) == 28 for worm in worms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eta", "0.1"], "recording 'worm1' has no positions, which eta=0.1 needs"),
        (["--positions", "a", "b"], "--positions: 2 for 1 recordings, expected one each"),
        (["--positions", "none.csv"], "none.csv"),
        (["--drop", "AVAX"], "--drop: no recording has the label 'AVAX'"),
        (["--neurons", "AVAL", "AVAR"], "recording 'worm1' has 29 neurons, expected at most the 2"),
        (["--atlas", "none.csv"], "none.csv"),
        (["--budget", "0"], "budget=0.0: expected a positive"),
        (["--threads", "0"], "threads=0"),
        (["--threads", "1000000"], "threads=1000000: expected an integer within"),
        (["--seed", "-1"], "--seed -1: expected an integer within"),
        (["--positions", "{positions}", "--spread", "0"], "spread=0.0: expected a positive"),
        (["--sigma", "-1"], "sigma=-1.0"),
        (["--out", str(README)], "--out: nothing can be written into the folder"),
        (["--out", str(README / "deeper")], "--out: nothing can be written into the folder"),
    ],
)
def test_the_command_refuses(
    example: Example, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option.format(positions=example.positions[0]) for option in options]
    assert own.main([str(example.traces[0]), "--quiet", "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


@needs_nwb
def test_the_lines_of_the_readme(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = re.findall(r"^```python\n(.*?)```", README.read_text(), re.DOTALL | re.MULTILINE)[-1]
    assert len([line for line in lines.splitlines() if line]) <= 10
    for path in (example.traces[0], example.positions[0], example.nwb[1]):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    for there, here in (("load_connectome()", "load_connectome().subset(names)"), ("budget=300", "budget=0.5")):
        assert there in lines
        lines = lines.replace(there, here)
    exec(compile(lines, str(README), "exec"), {"names": network().names})
    with (tmp_path / "identities.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 58
    assert (tmp_path / "report.html").stat().st_size > 20_000

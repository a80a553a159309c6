"""The command lines, as a user types them, at a small size."""

import csv
import json

import pytest
from matplotlib import image

from tutorials.celegans import seeds
from tutorials.celegans.__main__ import METHODS, SHOWN, main

SMALL = ["--neurons", "16", "--worms", "2", "--steps", "60", "--eta", "0.3", "--budget", "0.5", "--quiet"]

pytestmark = pytest.mark.usefixtures("float64_only")


def test_the_comparison(tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path / "deep" / "out")]) == 0
    out = tmp_path / "deep" / "out"
    printed = capsys.readouterr().out
    assert "| method | accuracy |" in printed
    with (out / "results.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {METHODS[name][0] for name in SHOWN} | {"ceiling"}
    for title, row in rows.items():
        assert 0 <= float(row["accuracy"]) <= 1
        assert f"| {title} | {float(row['accuracy']):.3f} |" in printed
    content = json.loads((out / "results.json").read_text())
    assert content["settings"]["neurons"] == 16
    assert 0 < content["chance"] < 1
    with (out / "identities.csv").open() as file:
        assert sum(1 for _ in csv.DictReader(file)) == 16 * 2 * len(rows)
    for name in ("connectome", "activity", "marginals", "accuracy", "progress"):
        picture = image.imread(out / f"{name}.png")
        assert picture.shape[0] > 150
        assert picture[..., :3].std() > 0.01  # something is drawn


def test_the_comparison_of_worms_that_show_less(tmp_path):
    options = ["--unseen", "0.25", "--measurement-noise", "0.1", "--spectral-factor", "1.5", "--thinning", "random"]
    assert main([*SMALL, *options, "--methods", "naive-vi", "--out", str(tmp_path)]) == 0
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert [settings[key] for key in ("unseen", "measurement_noise", "spectral_factor", "thinning")] == [
        0.25,
        0.1,
        1.5,
        "random",
    ]
    with (tmp_path / "identities.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 * 2 * 2  # two methods
    right = [row["identity"] == row["truth"] for row in rows if row["method"] == "naive VI"]
    with (tmp_path / "results.csv").open() as file:
        scores = {row["method"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    assert scores["naive VI"] == pytest.approx(sum(right) / len(right), abs=1e-6)


def test_seeds_go_on_and_print_medians(tmp_path, capsys):
    options = [*SMALL, "--methods", "map", "naive-vi", "--out", str(tmp_path)]
    assert seeds.main([*options, "--seeds", "0", "1"]) == 0
    first = (tmp_path / "jobs.jsonl").read_text()
    assert seeds.main([*options, "--seeds", "0", "1", "2"]) == 0
    assert (tmp_path / "jobs.jsonl").read_text().startswith(first)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    assert {row["clock"] for row in rows if row["method"] != "chance"} == {"wall"}
    printed = capsys.readouterr().out
    table = printed.split("| method | median | lowest | highest |")[-1].splitlines()[2:6]
    assert [line.split(" | ")[0] for line in table] == ["| ceiling", "| MAP (FAQ)", "| naive VI", "| chance"]
    accuracies = sorted(float(row["accuracy"]) for row in rows if row["method"] == "map")
    assert table[1].startswith(f"| MAP (FAQ) | {accuracies[1]:.3f} | {accuracies[0]:.3f} | {accuracies[2]:.3f} | ")


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--known", "1.5", "known=1.5"),
        ("--known", "nan", "known=nan"),
        ("--eta", "0", "eta=0.0"),
        ("--worms", "0", "worms=0"),
        ("--neurons", "500", "n=500"),
        ("--steps", "1", "steps=1"),
        ("--budget", "-1", "budget=-1.0"),
        ("--spectral-factor", "1", "spectral_factor=1.0"),
        ("--unseen", "0.95", "unseen=0.95"),
        ("--sigma", "-2", "sigma=-2.0"),
    ],
)
def test_bad_options_are_refused(option, value, text, tmp_path, capsys):
    options = [*SMALL, "--out", str(tmp_path)]
    options = [*options, option, value]
    assert main(options) == 2
    assert text in capsys.readouterr().err
    assert seeds.main(options) == 2
    assert text in capsys.readouterr().err


def test_threads_are_positive(tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path), "--threads", "0"]) == 2
    assert "threads=0" in capsys.readouterr().err

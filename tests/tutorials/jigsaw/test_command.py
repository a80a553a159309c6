import csv

import numpy as np
import pytest
from matplotlib import image
from PIL import Image

from tutorials.jigsaw import jobs
from tutorials.jigsaw.__main__ import main
from tutorials.jigsaw.data import source
from tutorials.jigsaw.jobs import expand, fitted, run_job

SMALL = ["--quick", "--steps", "2", "--batch", "4", "--puzzles", "6", "--quiet"]


def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command(tmp_path, capsys):
    command = [*SMALL, "--methods", "chance", "border", "gumbel", "--out", str(tmp_path)]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "### mnist, 2 x 2" in output
    assert "| Gumbel-Sinkhorn (paper) |" in output
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") in output
    assert [(row["data"], row["method"]) for row in rows(tmp_path)] == [
        (data, method) for data in ("mnist", "photographs") for method in ("chance", "border", "gumbel")
    ]
    for name in ("solutions-mnist", "temperatures-mnist", "solutions-photographs", "temperatures-photographs"):
        assert image.imread(tmp_path / f"{name}.png")[..., :3].std() > 0.01  # something is drawn
    content = (tmp_path / "jobs.jsonl").read_text()
    assert main(command) == 0  # nothing is left to do
    assert (tmp_path / "jobs.jsonl").read_text() == content


def test_methods_without_training_are_not_run_again_with_other_steps(tmp_path):
    command = [*SMALL, "--data", "mnist", "--methods", "chance", "--out", str(tmp_path)]
    assert main(command) == 0
    assert main([*command, "--steps", "3"]) == 0
    assert len(rows(tmp_path)) == 1


def test_jobs_are_reproducible_and_resumed(tmp_path, monkeypatch):
    (job,) = expand({"mnist": [2]}, ["gumbel"], [3], steps=3, batch=4, puzzles=20)
    first, second = run_job(job, checkpoints=tmp_path), run_job(job)
    assert {x: first[x] for x in ("wrong", "l2")} == {x: second[x] for x in ("wrong", "l2")}
    monkeypatch.setattr(jobs.Training, "forward", None)  # no step is left to do
    assert not fitted(job, tmp_path).training


def test_all_methods_have_the_same_puzzles():
    found = expand({"mnist": [2], "photographs": [3]}, ["border", "gumbel"], [0, 1], steps=3, batch=4, puzzles=5)
    assert [(job.data, job.k, job.method, job.seed) for job in found[:4]] == [
        *(("mnist", 2, "border", 0), ("mnist", 2, "gumbel", 0)),
        *(("photographs", 3, "border", 0), ("photographs", 3, "gumbel", 0)),
    ]
    a, b, _, _, other, *_ = (jobs.puzzles_of(job).pieces for job in found)
    assert bool((a == b).all())
    assert not bool((a == other).all())


def test_arguments_are_checked(tmp_path, capsys):
    def message(*options):
        assert main([*SMALL, "--out", str(tmp_path), *options]) == 2
        return capsys.readouterr().err

    assert "steps=0: expected an integer of at least 1" in message("--steps", "0")
    assert "jobs=0: expected an integer of at least 1" in message("--jobs", "0")
    assert "grids: expected integers of at least 2, got 1" in message("--grids", "1")
    assert "k=29: expected an integer from 1 to the shorter side" in message("--grids", "29")
    assert "folder=None: expected a folder with data='celeba'" in message("--data", "celeba")
    assert "count=4000: expected an integer from 1 to the 3500 pictures" in message("--batch", "4000")
    assert "device='abacus'" in message("--device", "abacus")
    assert not (tmp_path / "jobs.jsonl").exists()


def test_pictures_of_users(tmp_path, capsys):
    source.cache_clear()
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        place = tmp_path / "data" / part / "n01"
        place.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(place / f"{number}.JPEG")
    options = ["--data", "imagenet", "--folder", str(tmp_path / "data"), "--methods", "sinkhorn"]
    assert main([*SMALL, *options, "--out", str(tmp_path / "out")]) == 0
    assert "### imagenet, 2 x 2" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["mnist", "digits", "photographs"])
def test_offline_data(data):
    found = expand({data: [2]}, ["chance"], [0], steps=1, batch=4, puzzles=5)
    assert jobs.puzzles_of(found[0]).pieces.shape[:2] == (5, 4)

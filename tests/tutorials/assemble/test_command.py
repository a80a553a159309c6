import csv

import torch
from matplotlib import image

from tutorials.assemble.__main__ import main
from tutorials.assemble.jobs import METHODS, expand, run_job

SMALL = ["--quick", "--steps", "2", "--batch", "4", "--quiet"]


def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_the_command(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)  # half the time
    command = [*SMALL, "--grids", "2", "--methods", *METHODS, "--out", str(tmp_path)]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "### 2 x 2" in output
    for title in METHODS.values():
        assert f"| {title} |" in output
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") in output
    found = rows(tmp_path)
    # exact: nothing can be nearer to any picture, or to the target
    assert min(float(row["nearest_l2"]) for row in found.values()) == float(found["nearest"]["nearest_l2"])
    assert min(float(row["target_l2"]) for row in found.values()) == float(found["target"]["target_l2"])
    assert image.imread(tmp_path / "assembled-2.png")[..., :3].std() > 0.01  # something is drawn
    content = (tmp_path / "jobs.jsonl").read_text()
    assert main(command) == 0  # nothing is left to do
    assert (tmp_path / "jobs.jsonl").read_text() == content


def test_padded_grids(tmp_path):
    (job,) = expand([3], ["mean"], [0], steps=1, batch=1, tasks=20, classifier_steps=1)
    found = run_job(job)
    assert 0 < found["nearest_l2"] < found["target_l2"] < 0.3


def test_arguments_are_checked(tmp_path, capsys):
    def message(*options):
        assert main([*SMALL, "--out", str(tmp_path), *options]) == 2
        return capsys.readouterr().err

    assert "steps=0: expected an integer of at least 1" in message("--steps", "0")
    assert "jobs=0: expected an integer of at least 1" in message("--jobs", "0")
    assert "grids: expected integers from 2 to 28, got 1" in message("--grids", "1")
    assert "device='abacus'" in message("--device", "abacus")

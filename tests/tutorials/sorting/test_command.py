import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tutorials
from tutorials.sorting.__main__ import main
from tutorials.sorting.tables import digits_markdown, numbers_rows, numbers_summary


def test_quick_run_and_again(tmp_path, capsys):
    arguments = ["--quick", "--quiet", "--out", str(tmp_path), "--reuse", "any"]
    assert main(["numbers", *arguments, "--methods", "paper", "rank"]) == 0
    assert main(["digits", *arguments, "--methods", "rank-gumbel", "softsort", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 jobs are done" in printed
    assert "| Gumbel-Sinkhorn, one number an item |" in printed
    for name in ("numbers/tables.md", "numbers/numbers.png", "digits/tables.md", "digits/sorted.png", "digits/results.csv"):
        assert (tmp_path / name).stat().st_size > 0
    with (tmp_path / "numbers" / "numbers.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 + 6 * 7  # one length on seven intervals, and six
    lines = (tmp_path / "digits" / "jobs.jsonl").read_text().splitlines()
    assert len(lines) == 6  # of each method three temperatures, of which one is used
    before = (tmp_path / "digits" / "tables.md").read_text()
    assert main(["digits", *arguments, "--methods", "rank-gumbel", "softsort", "--steps", "2"]) == 0
    assert (tmp_path / "digits" / "jobs.jsonl").read_text().splitlines() == lines
    assert (tmp_path / "digits" / "tables.md").read_text() == before
    chosen = {line["method"]: [] for line in map(json.loads, lines)}
    for line in map(json.loads, lines):
        chosen[line["method"]].append(line["validation_sets"])
    assert all(len(shares) == 3 for shares in chosen.values())


@pytest.mark.slow
def test_processes_of_torchrun_do_each_job_together(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tutorials.sorting"]
    options = ["digits", "--quick", "--quiet", "--methods", "rank", "--steps", "2", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    top = Path(tutorials.__file__).parents[1]
    done = subprocess.run(launch + options, cwd=top, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 of 1 jobs are done") == 1
    assert len((tmp_path / "digits" / "jobs.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jigsaw"], "task 'jigsaw': expected one of numbers, digits"),
        (["numbers", "--methods", "odd-even"], "methods='odd-even': expected some of paper, paper-no-noise"),
        (["--jobs", "0"], "jobs=0: expected an integer of at least 1"),
        (["digits", "--sizes", "1", "3"], "sizes=1: expected an integer of at least 2"),
        (["--steps", "0"], "steps=0: expected an integer of at least 1"),
        (["--seeds", "-1"], "seeds=-1: expected an integer from 0"),
        (["--device", "abacus"], "device='abacus': expected 'cpu'"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--quiet", "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def record(seed, **shares):
    return {"status": "done", "method": "rank", "seed": seed, "n": 10} | shares


def test_the_summary_takes_the_worst_interval_of_each_seed():
    first = {"any_0_1_5": 0.0, "wrong_0_1_5": 0.0, "any_0_10_5": 0.25, "wrong_0_10_5": 0.1}
    second = {"any_0_1_5": 0.5, "wrong_0_1_5": 0.2, "any_1_2_5": 0.75, "wrong_1_2_5": 0.3}
    records = [record(0, **first), record(1, **second), {"status": "failed", "method": "rank", "seed": 2, "n": 10}]
    assert len(numbers_rows(records)) == 4
    lines = numbers_summary(records).splitlines()
    assert lines[2] == "| one number an item, linear | 0.250 (0.000 to 0.500) |"
    assert lines[-1] == "| one number an item, linear | 0.500 (0.250 to 0.750) |"


def test_the_table_of_images_has_the_ceiling():
    records = [
        {"status": "done", "method": "rank", "n": n, "temperature": 4.0, "test_sets": share, "test_positions": 0.9}
        for n, share in ((3, 0.7), (3, 0.8), (5, 0.4))
    ]
    text = digits_markdown(records)
    assert "| Sinkhorn, one number an item | 4 | 0.750 (0.700 to 0.800) | 0.400 |" in text
    assert "| (the most against the inverse target) |  | 0.667 | 0.217 |" in text

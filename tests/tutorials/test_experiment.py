import csv
import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tutorials import experiment
from tutorials.experiment import finish, run
from tutorials.provenance import Provenance, key_of, provenance_of
from tutorials.records import Records

TOP = Path(experiment.__file__).parents[1]
SOFTWARE = Provenance("1.0", "abc", "2.0")


@dataclass(frozen=True)
class Square:
    number: int
    method: str = "square"
    seed: int = 0

    @property
    def settings(self):
        return asdict(self)

    @property
    def seconds(self):
        return 0.1


class Work:
    """Squares, and what it was called with."""

    def __init__(self, failing=()):
        self.seen = []
        self.failing = failing

    def __call__(self, job):
        self.seen.append(job.number)
        if job.number in self.failing:
            raise ArithmeticError("no luck")
        return {"square": float(job.number**2), "curve": [1, 2]}


def squares(folder, numbers, work, software=SOFTWARE, **options):
    return run([Square(i) for i in numbers], folder, work, software, outcome="square", progress=False, **options)


def test_jobs_are_done_once_and_failed_ones_again(tmp_path):
    work = Work(failing=(2,))
    first = squares(tmp_path, [1, 2, 3], work)
    assert [r["status"] for r in first] == ["done", "failed", "done"]
    assert first[1]["error"] == "ArithmeticError: no luck"
    work.failing = ()
    assert [r["square"] for r in squares(tmp_path, [3, 2, 1, 4], work)] == [9.0, 4.0, 1.0, 16.0]
    assert work.seen == [1, 2, 3, 2, 4]
    lines = [json.loads(line) for line in (tmp_path / "jobs.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [1, 2, 3, 2, 4]
    assert lines[0] == {
        **{"key": key_of(Square(1).settings, SOFTWARE), "number": 1, "method": "square", "seed": 0},
        **{"version": "1.0", "commit": "abc", "torch": "2.0", "status": "done", "square": 1.0, "curve": [1, 2]},
    }
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["square"] for row in rows] == ["1", "4", "9", "16"]  # in the order of their first records
    assert "curve" not in rows[0]


def test_other_software_does_them_again_unless_reused(tmp_path):
    work, newer = Work(), Provenance("1.0", "def", "2.0")
    squares(tmp_path, [1], work)
    squares(tmp_path, [1], work, newer, reuse=["abc"])
    squares(tmp_path, [1], work, newer, reuse=["any"])
    assert work.seen == [1]
    squares(tmp_path, [1], work, newer)
    assert work.seen == [1, 1]


def test_several_processes(tmp_path):
    found = squares(tmp_path, range(6), Work(), workers=2)
    assert [r["square"] for r in found] == [0.0, 1.0, 4.0, 9.0, 16.0, 25.0]
    with Records(tmp_path) as records:
        assert len(records.records) == 6


def test_how_a_command_ends(capsys, tmp_path):
    def raising(error):
        def work():
            raise error

        return work

    assert finish(lambda: squares(tmp_path, [1], Work())) == 0
    assert finish(lambda: squares(tmp_path, [1, 2], Work(failing=(2,)))) == 1
    output = capsys.readouterr()
    assert output.out == "1 of 1 jobs are done\n1 of 2 jobs are done\n"
    assert output.err == "failed: square, seed 0: ArithmeticError: no luck\nthe same command tries them again\n"
    assert finish(raising(ValueError("steps=0"))) == 2
    assert finish(raising(OSError("disk full"))) == 1
    assert finish(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.splitlines() == [
        "error: steps=0",
        "error: disk full; the same command goes on from here",
        "interrupted; the same command goes on from here",
    ]


def test_an_error_in_a_worker_process_is_recorded(tmp_path):
    found = squares(tmp_path, [1, 2], Work(failing=(1,)), workers=2)
    assert [r["status"] for r in found] == ["failed", "done"]


def test_provenance():
    here = provenance_of("pyro_gs/*.py")
    assert here is provenance_of("pyro_gs/*.py")
    assert key_of({"a": 1, "b": 2}, here) == key_of({"b": 2, "a": 1}, here)
    assert key_of({"a": 1, "b": 2}, here) != key_of({"a": 1, "b": 3}, here)


def test_no_jobs(tmp_path):
    assert squares(tmp_path, [], Work()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_no_failure_of_a_job(error, tmp_path):
    def work(job):
        raise error

    with pytest.raises(error):
        squares(tmp_path, [1], work)
    with Records(tmp_path) as records:
        assert records.records == {}


SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path

    import torch

    sys.path.insert(0, str(Path(sys.argv[1]) / "tests/tutorials"))
    from test_experiment import SOFTWARE, Square
    from tutorials.experiment import finish, run
    from tutorials.processes import joined, rank


    def work(job):
        total = torch.tensor(float(job.number + rank()))
        torch.distributed.all_reduce(total)
        return {"square": float(total)}


    with joined("cpu"):
        jobs = [Square(i) for i in range(3)]
        sys.exit(finish(lambda: run(jobs, Path(sys.argv[2]), work, SOFTWARE, outcome="square", progress=False)))
    """
)


@pytest.mark.slow
def test_processes_of_torchrun_do_each_job_together(tmp_path):
    squares(tmp_path / "out", [1], Work())
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)}
    subprocess.run(
        [*command, str(TOP), str(tmp_path / "out")], env=environment, check=True, capture_output=True, timeout=200
    )
    with Records(tmp_path / "out") as records:
        assert [(r["number"], r["square"]) for r in records.records.values()] == [(1, 1.0), (0, 1.0), (2, 5.0)]


def test_a_figure_that_is_not_finite_is_a_failure(tmp_path):
    records = squares(tmp_path, [2, 3], lambda job: {"square": math.nan if job.number == 3 else 4.0})
    assert [record["status"] for record in records] == ["done", "failed"]
    assert records[1]["error"] == "FloatingPointError: expected finite figures, got {'square': nan}"


def test_a_job_that_is_named_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\{'number': 3.*\}: expected every job once, so no .* seed twice"):
        squares(tmp_path, [2, 3, 3], Work())

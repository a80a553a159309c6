import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import dask
import pytest
from distributed import LocalCluster

from tutorials.celegans import __main__, jobs, sweep
from tutorials.celegans.cells import TABLES
from tutorials.celegans.jobs import expand, provenance
from tutorials.celegans.sweep import main, run

QUICK = ["base", "--quick", "--quiet", "--methods", "map", "naive-vi", "--budget", "0.3"]

pytestmark = pytest.mark.usefixtures("float64_only")


def wanted(seeds, methods=("map", "naive-vi")):
    return expand([TABLES["base"].quick()], seeds, methods=methods, budget=0.3)


def log(folder):
    path = folder / "jobs.jsonl"
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def fake(job, software):
    """Do a job without work."""
    fake.seen.append((job.method, job.seed))
    status = {"status": "failed", "error": "no luck"} if job.method in fake.failing else {"status": "done", "accuracy": 0.5}
    return {"key": job.key(software), **job.settings, **vars(software)} | status


@pytest.fixture(autouse=True)
def _reset():
    fake.seen, fake.failing = [], set()


def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    options = [*QUICK, "--seeds", "0", "1", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tutorials.celegans.sweep", *options, "--jobs", "2"],
        cwd=Path(sweep.__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while len(log(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the workers with it
        process.wait()
    before = log(tmp_path)
    jobs_wanted = wanted([0, 1, 2])
    assert 3 <= len(before) < len(jobs_wanted) == 12
    with (tmp_path / "jobs.jsonl").open("ab") as file:
        file.write(b'{"key": "torn in the mid')
    assert main(options) == 0
    after = log(tmp_path)
    assert after[: len(before)] == before  # nothing is lost
    keys = [json.loads(line)["key"] for line in after]
    assert sorted(keys) == sorted(job.key(provenance()) for job in jobs_wanted)  # nothing is missing or doubled
    found = rows(tmp_path)
    assert [row["key"] for row in found] == keys
    assert {row["status"] for row in found} == {"done"}
    assert len({row["chance"] for row in found}) == 3


def test_a_dask_cluster_takes_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "_measure", lambda job: pytest.fail("this ran here"))  # not in other processes
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        dask.config.set({"scheduler-address": cluster.scheduler_address}),
    ):
        assert main([*QUICK, "--seeds", "0", "--backend", "dask", "--out", str(tmp_path)]) == 0
    assert {row["method"]: row["status"] for row in rows(tmp_path)} == dict.fromkeys(
        ["chance", "map", "naive-vi", "ceiling"], "done"
    )
    assert "4 of 4 jobs are done" in capsys.readouterr().out


def test_only_what_is_not_there_runs(tmp_path):
    first = run(wanted([0]), tmp_path, workers=1, progress=False, work=fake)
    assert fake.seen == [(method, 0) for method in ("chance", "map", "naive-vi", "ceiling")]
    fake.seen.clear()
    again = run(wanted([1, 0]), tmp_path, workers=1, progress=False, work=fake)
    assert fake.seen == [(method, 1) for method in ("chance", "map", "naive-vi", "ceiling")]
    assert again[4:] == first


def test_other_budgets_run_beside(tmp_path):
    run(wanted([0]), tmp_path, workers=1, progress=False, work=fake)
    fake.seen.clear()
    more = expand([TABLES["base"].quick()], [0], methods=("map",), budget=0.6)
    run(more, tmp_path, workers=1, progress=False, work=fake)
    assert fake.seen == [("map", 0), ("ceiling", 0)]  # chance has none
    assert [row["budget"] for row in rows(tmp_path)] == ["0", "0.3", "0.3", "0.3", "0.6", "0.6"]


@pytest.mark.parametrize(("reuse", "runs"), [([], 4), (["other"], 4), (["old"], 0), (["any"], 0)])
def test_results_of_another_commit_count_only_where_asked(reuse, runs, tmp_path, monkeypatch):
    now = provenance()
    old = jobs.Provenance(now.version, "old", now.torch)
    monkeypatch.setattr(sweep, "provenance", lambda: old)
    run(wanted([0]), tmp_path, workers=1, progress=False, work=fake)
    monkeypatch.setattr(sweep, "provenance", lambda: now)
    fake.seen.clear()
    assert len(run(wanted([0]), tmp_path, workers=1, progress=False, work=fake, reuse=reuse)) == 4
    assert len(fake.seen) == runs
    assert len(rows(tmp_path)) == 4 + runs


def test_failed_jobs_are_told_and_tried_again(tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise RuntimeError("no luck")

    options = [*QUICK, "--seeds", "0", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setitem(__main__.METHODS, "map", ("MAP", fail))
        assert main(options) == 1
    printed = capsys.readouterr()
    assert "3 of 4 jobs are done" in printed.out
    assert "failed: map, seed 0: RuntimeError: no luck" in printed.err
    assert {row["method"]: row["status"] for row in rows(tmp_path)}["map"] == "failed"
    assert main(options) == 0
    assert {row["status"] for row in rows(tmp_path)} == {"done"}
    assert len(log(tmp_path)) == 5


def test_the_bar_shows_jobs_and_time_left(tmp_path, capsys):
    run(wanted([0]), tmp_path, workers=1, work=fake)
    shown = capsys.readouterr().err
    assert "4 jobs, 0 done before" in shown
    assert "left, 4 of 4: ceiling 0.500" in shown
    assert "100%" in shown


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--jobs", "0"], "jobs=0: expected an integer of at least 1"),
        (["--budget", "-1"], "budget=-1.0"),
        (["--budget", "nan"], "budget=nan"),
        (["--seeds", "0", "-1"], "seeds=-1: expected an integer from 0 to 2^32 - 1"),
        (["--seeds", str(2**32)], "seeds=4294967296"),
    ],
)
def test_bad_options_are_refused(options, text, tmp_path, capsys):
    assert main([*QUICK, "--out", str(tmp_path / "out"), *options]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OSError("no space left"), BrokenProcessPool("killed")])
def test_what_stops_a_sweep_is_told(error, tmp_path, monkeypatch, capsys):
    def stop(*args, **options):
        raise error

    monkeypatch.setattr(sweep, "run", stop)
    assert main([*QUICK, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert str(error) in printed
    assert "the same command goes on from here" in printed


def test_unknown_tables_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["table3"])
    assert stopped.value.code == 2
    assert "table3" in capsys.readouterr().err

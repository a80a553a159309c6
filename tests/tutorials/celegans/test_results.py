import csv
import json

import pytest

from tutorials.celegans.cells import BASE
from tutorials.celegans.jobs import Job
from tutorials.celegans.results import COLUMNS, Results
from tutorials.provenance import Provenance
from tutorials.records import read_log

SOFTWARE = Provenance("1.0", "abc", "2.0")


def record(seed=0, method="map", status="done", budget=1.0, **measured):
    job = Job(BASE, seed, method, None, 0.0 if method == "chance" else budget, "cpu")
    settings = {"key": job.key(SOFTWARE), **job.settings, "version": "1.0", "commit": "abc", "torch": "2.0"}
    measured = ({"accuracy": 0.5} if status == "done" else {"error": "broken"}) | measured
    return settings | {"status": status, "processor": "p"} | measured


def rows(folder, name="results.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables_follow_the_log(tmp_path):
    bins = [[0, 0.0, 0]] * 9 + [[4, 3.8, 3]]
    with Results(tmp_path / "deep" / "out") as results:
        results.append(record(bins=bins))
        results.append(record(method="chance", accuracy=0.25))
        results.append(record(seed=1, status="failed"))
    out = tmp_path / "deep" / "out"
    found = rows(out)
    assert tuple(found[0]) == COLUMNS
    assert [row["accuracy"] for row in found] == ["0.5", "0.25", ""]
    assert [row["chance"] for row in found] == ["0.25", "0.25", ""]  # of the same cell and seed
    assert [row["error"] for row in found] == ["", "", "broken"]
    assert {"base", "table2", "worms", "objectives"} < set(found[0]["tables"].split())
    assert "table1" not in found[0]["tables"].split()
    pooled = rows(out, "reliability.csv")
    assert len(pooled) == 10
    assert pooled[-1] == {"key": found[0]["key"], "bin": "9", "count": "4", "confidence": "3.8", "right": "3"}


def test_a_torn_line_is_dropped_and_what_follows_is_whole(tmp_path):
    with Results(tmp_path) as results:
        results.append(record(seed=0))
        results.append(record(seed=1))
    log = tmp_path / "jobs.jsonl"
    whole = log.read_bytes()
    first = whole.index(b"\n") + 1
    for length in (first + 1, len(whole) - 1, first):
        log.write_bytes(whole[:length])
        assert [r["seed"] for r in read_log(log).values()] == [0]
        with Results(tmp_path) as results:
            assert len(results.records) == 1
            results.append(record(seed=1))
        assert log.read_bytes() == whole
        assert len(rows(tmp_path)) == 2


def test_a_record_without_its_settings_is_damaged(tmp_path):
    short = {name: value for name, value in record().items() if name not in ("worms", "commit")}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(record()) + "\n" + json.dumps(short) + "\n")
    with pytest.raises(ValueError, match=r"jobs\.jsonl, line 2: expected a record with commit, worms, got"):
        Results(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(ValueError, match=f"out='{out}': expected a folder that can be written to"):
            Results(out)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"key": "a"}', ""])
def test_a_damaged_line_before_the_last_is_no_torn_one(line, tmp_path):
    log = tmp_path / "jobs.jsonl"
    log.write_text(json.dumps(record()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"jobs\.jsonl, line 2: expected a record"):
        Results(tmp_path)
    log.write_text(json.dumps(record()) + "\n")
    with Results(tmp_path):  # the lock was released
        pass


def test_a_later_success_replaces_a_failure_and_not_the_reverse(tmp_path):
    with Results(tmp_path) as results:
        for status in ("failed", "done", "failed"):
            results.append(record(status=status))
    assert [r["status"] for r in read_log(tmp_path / "jobs.jsonl").values()] == ["done"]
    assert len((tmp_path / "jobs.jsonl").read_text().splitlines()) == 3


def test_two_sweeps_cannot_share_a_folder(tmp_path):
    with Results(tmp_path), pytest.raises(ValueError, match="another run is writing there"):
        Results(tmp_path)


def test_rows_of_other_budgets_stay(tmp_path):
    with Results(tmp_path) as results:
        results.append(record(budget=1.0))
        results.append(record(budget=2.0))
    assert [row["budget"] for row in rows(tmp_path)] == ["1", "2"]

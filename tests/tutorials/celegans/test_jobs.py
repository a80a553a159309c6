import dataclasses
import json

import pytest
import torch

from tutorials.celegans import __main__, jobs
from tutorials.celegans.cells import Cell, Table
from tutorials.celegans.identification import Run
from tutorials.celegans.jobs import SETTINGS, Job, expand, provenance, run_job
from tutorials.provenance import Provenance

SMALL = Cell(worms=2, neurons=16, steps=60, eta=0.3)
SOFTWARE = Provenance("1.0", "abc", "2.0")

pytestmark = pytest.mark.usefixtures("float64_only")


def test_jobs_go_through_all_cells_of_a_seed_before_the_next():
    other = dataclasses.replace(SMALL, worms=1, budget=7.0)
    found = expand([Table("", (SMALL, other), ("map",))], [5, 3])
    assert [(job.seed, job.cell.worms, job.method) for job in found] == [
        (seed, worms, method) for seed in (5, 3) for worms in (2, 1) for method in ("chance", "map", "ceiling")
    ]
    assert [job.budget for job in found[:6]] == [0, 20, 20, 0, 7, 7]


def test_shared_cells_and_objectives_run_once():
    tables = [
        Table("", (SMALL,), ("gumbel-sinkhorn", "map")),
        Table("", (SMALL,), ("gumbel-sinkhorn",), ("density", "noise_kl")),
    ]
    found = [(job.method, job.objective) for job in expand(tables, [0])]
    assert sorted(found, key=str) == sorted(
        [
            ("chance", None),
            ("ceiling", None),
            ("map", None),
            ("gumbel-sinkhorn", "noise_kl"),
            ("gumbel-sinkhorn", "density"),
        ],
        key=str,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "seeds is empty"),
        ({"budget": 0.0}, r"budget=0\.0: expected a positive"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"clock": "sun"}, "clock='sun': expected one of 'cpu', 'wall'"),
        ({"methods": ["magic"]}, "methods: 'magic' is none of gumbel-sinkhorn"),
    ],
)
def test_expand_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        expand([Table("", (SMALL,))], **({"seeds": [0]} | options))


def test_the_key_changes_with_all_that_changes_the_result():
    job = Job(SMALL, 0, "gumbel-sinkhorn", "noise_kl", 1.0, "cpu")
    keys = {job.key(SOFTWARE)}
    for field, value in Cell(4, 0.5, None, 9.0, 17, 61, 1.5, 3.0, "chemical", "random", 0.1, 0.2, 0.3, 0.4).settings.items():
        changes = {"eta": None, "candidates": 9.0} if field in ("eta", "candidates") else {field: value}
        keys.add(dataclasses.replace(job, cell=dataclasses.replace(SMALL, **changes)).key(SOFTWARE))
    for changes in ({"seed": 1}, {"method": "plain"}, {"objective": "density"}, {"budget": 2.0}, {"clock": "wall"}):
        keys.add(dataclasses.replace(job, **changes).key(SOFTWARE))
    for changes in ({"version": "2"}, {"commit": "abd"}, {"torch": "3"}):
        keys.add(job.key(dataclasses.replace(SOFTWARE, **changes)))
    assert len(keys) == 1 + (len(Cell().settings) - 1) + 5 + 3
    assert job.key(SOFTWARE) == Job(SMALL, 0, "gumbel-sinkhorn", "noise_kl", 1.0, "cpu").key(SOFTWARE)


@pytest.mark.parametrize(("method", "clock"), [("map", "cpu"), ("naive-vi", "wall"), ("ceiling", "cpu")])
def test_a_record_holds_what_was_measured(method, clock):
    before = Run.clock
    record = run_job(Job(SMALL, 0, method, None, 0.3, clock), SOFTWARE)
    assert Run.clock is before
    assert json.loads(json.dumps(record)) == record
    assert record["status"] == "done"
    assert record["steps"] == 60  # the setting, not what the method counts
    assert set(SETTINGS) < set(record)
    assert 0.4 * record["budget"] / (3 if method == "ceiling" else 1) < record["seconds"]
    bins = record["bins"]
    unknown = 2 * (16 - 3)
    assert sum(count for count, _, _ in bins) == unknown
    assert sum(right for _, _, right in bins) == round(unknown * record["accuracy_unknown"])
    error = sum(abs(confidence - right) for _, confidence, right in bins) / unknown
    assert error == pytest.approx(record["calibration_error"])
    for i, (count, confidence, _) in enumerate(bins):
        assert i / 10 * count - 1e-9 <= confidence <= (i + 1) / 10 * count + 1e-9
    if method == "ceiling":
        assert record["log_evidence"] >= record["log_evidence_truth"] - 20


def test_chance_is_a_job_of_its_own():
    record = run_job(Job(SMALL, 0, "chance"), SOFTWARE)
    assert record["status"] == "done"
    assert 3 / 16 < record["accuracy"] < 0.7
    assert "bins" not in record


def test_budgets_are_of_the_clock_that_was_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(jobs, "chance_accuracy", lambda worms, seed: seen.append(Run.clock) or 0.5)
    for clock in ("cpu", "wall"):
        run_job(Job(SMALL, 0, "chance", clock=clock), SOFTWARE)
    assert [clock.__name__ for clock in seen] == ["process_time", "perf_counter"]


def test_a_method_that_fails_makes_a_record(monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no luck")

    monkeypatch.setitem(__main__.METHODS, "map", ("MAP", fail))
    before = Run.clock
    record = run_job(Job(SMALL, 0, "map", None, 0.3, "cpu"), SOFTWARE)
    assert (record["status"], record["error"]) == ("failed", "RuntimeError: no luck")
    assert Run.clock is before
    assert "accuracy" not in record


def test_provenance_is_that_of_this_code():
    software = provenance()
    assert software.version
    assert software.torch
    assert provenance() is software


def test_two_jobs_in_one_process_are_refused(monkeypatch):
    def nested(worms, seed):
        with pytest.raises(RuntimeError, match="a job is running in this process already"):
            run_job(Job(SMALL, 0, "chance"), SOFTWARE)
        return 0.5

    monkeypatch.setattr(jobs, "chance_accuracy", nested)
    assert run_job(Job(SMALL, 0, "chance"), SOFTWARE)["status"] == "done"


@pytest.mark.parametrize("job", [Job(SMALL, 0, "chance"), Job(SMALL, 0, "map", None, -1.0, "cpu")])
def test_a_job_leaves_the_process_as_it_was(job):
    """Done or failed."""
    torch.set_default_dtype(torch.float32)
    threads, clock = torch.get_num_threads(), Run.clock
    assert run_job(job, SOFTWARE)["status"] == ("done" if job.method == "chance" else "failed")
    assert torch.get_default_dtype() == torch.float32
    assert torch.get_num_threads() == threads
    assert Run.clock is clock

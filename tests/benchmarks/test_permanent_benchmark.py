import csv
import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from pyro_gs import log_permanent

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("matching", "memory", "peers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("permanent_benchmark", BENCHMARKS / "permanent.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_run_prints_the_tables_and_writes_the_figures(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "RYSER_FROM", 4)
    monkeypatch.setattr(script, "LISTED", [5])
    monkeypatch.setattr(script, "SHORT_S", 0.0)
    monkeypatch.setattr(script, "run_apart", lambda _, arguments: {"first": float(arguments[-2]), "later": 0.5})
    out = tmp_path / "permanent.csv"
    assert script.main(["--n", "3", "4", "6", "--batch", "1", "3", "--repeats", "2", "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    ours = " | ".join(script.OURS)
    assert printed.count(f"| n | batch | {ours} |") == 2
    assert "| 6 | 3 | 6, 0.5 | 6, 0.5 | 6, 0.5 | 6, 0.5 |" in printed
    assert "| power of n 2^n | batch | n = 4, 6 |" in printed
    assert f"run once, over {script.SLOW_S:g} s: none" in printed

    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {(int(row["n"]), int(row["batch"]), row["method"]) for row in rows}
    assert len(names) == len(rows) == 3 * 2 * len(script.OURS) + 2 * 2 + 2
    assert {place[:2] for place in names if place[2] == "Ryser"} == {(4, 1), (4, 3), (6, 1), (6, 3)}
    assert {place[:2] for place in names if place[2] == "OneOneMatching"} == {(5, 1)}
    assert all(0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"]) for row in rows)
    assert {row["timings"] for row in rows} == {"2"}
    errors = [float(row["error"]) for row in rows if row["error"]]
    assert len(errors) == 3
    assert max(errors) < 1e-12
    assert len([row for row in rows if row["error_wide"]]) == 2


def test_rivals_compute_the_same(script):
    logits = script.draw(6, 3)
    assert torch.allclose(script.ryser(logits).log(), log_permanent(logits), rtol=0, atol=1e-10)
    assert torch.allclose(script.listed(logits), log_permanent(logits), rtol=0, atol=1e-10)
    matrix = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(1, 3, 3)
    known = script.ryser(matrix.log())
    assert known.item() == pytest.approx(450.0, rel=1e-13)


def test_batches_of_rysers_formula_are_split(script, monkeypatch):
    logits = script.draw(5, 7)
    whole = script.ryser(logits)
    monkeypatch.setattr(script, "AT_ONCE", 2 * 2**5)
    assert torch.allclose(script.ryser(logits), whole, rtol=1e-12)


def test_errors_are_those_of_the_signs(script):
    wide = torch.rand(4, 10, 10, dtype=torch.float64) * script.WIDTH
    assert script.ryser_error(wide) > 1e-8
    assert script.ryser_error(torch.zeros(1, 8, 8, dtype=torch.float64)) < 1e-10


def test_slow_calls_run_once(script, monkeypatch):
    monkeypatch.setattr(script, "SLOW_S", 0.0)
    calls = []
    assert len(script.measure(lambda: calls.append(None), 7)) == 1
    assert len(calls) == 2  # with the warm-up


def test_growth_is_a_power_of_the_work(script):
    times = {n: 3.0 * (n * 2.0**n) ** 1.25 for n in (10, 15, 20)}
    assert script.growth(times, (10, 15)) == pytest.approx(1.25)
    assert script.growth(times, (10, 15, 20)) == pytest.approx(1.25)


def test_tables_grow_as_n_2_to_the_n(script):
    first, second, size = script.build_tables(6)
    assert min(first, second) > 0
    # two indices to a predecessor for each pair of a subset and a member of it, and two for each move; 4 bytes each
    assert size == pytest.approx(4 * 4 * 6 * 2**5 / 1e6)


def test_memory_is_measured_in_a_process_of_its_own(script):
    seen = script.run_apart(str(BENCHMARKS / "permanent.py"), ["--memory", "log_permanent", 16, 8])
    if sys.platform == "linux":  # elsewhere an earlier peak may hide it
        # The index tables, and the largest two tables of the recursion for eight matrices.
        indices, table = 2 * 4 * 16 * 2**15 / 1e6, 8 * 8 * math.comb(16, 8) / 1e6
        assert indices < seen["first"] < 10 * indices
        assert 2 * table < seen["later"] < 30 * table

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "matching", raising=False)
    spec = importlib.util.spec_from_file_location("matching_law_benchmark", BENCHMARKS / "matching_law.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_run_prints_the_tables_and_writes_the_figures(script, tmp_path, capsys):
    out = tmp_path / "law.csv"
    options = ["--n", "4", "6", "--scales", "0", "2", "--draws", "2", "--calls", "6", "--num-particles", "200"]
    assert script.main([*options, "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    assert printed.count("| n | scale 0 | scale 2 |") == 3
    assert "| n, at scale 0 | mean of p n! - 1 | standard error |" in printed
    assert "| n | scale | total mass | standard error |" in printed
    with out.open(encoding="utf-8") as file:
        rows = {(row["n"], row["scale"]): row for row in csv.DictReader(file)}
    assert list(rows) == [("4", "0"), ("4", "2"), ("6", "0"), ("6", "2")]
    for (n, scale), row in rows.items():
        assert 0 < float(row["sd"]) <= float(row["sd_largest"]) < 0.5
        assert float(row["ms"]) > 0
        assert min(float(row["below"]), float(row["above"])) > 0
        assert (row["mass"] != "") == (n == "4")
        assert (row["uniform_error"] != "") == (scale == "0")
        if row["mass"]:
            assert abs(float(row["mass"]) - 1) < 5 * float(row["mass_sd"])
        if row["uniform_error"]:
            assert abs(float(row["uniform_error"])) < 5 * float(row["uniform_se"])


def test_three_rows_do_not_vary(script):
    """Exact there: what is measured is the estimate, not the draw."""
    row = script.Row(3, 1.0, 2, 3, 50)
    script.measure(row)
    assert row.sd_largest < 1e-12
    assert row.mass == ""


def test_a_wrong_density_shows(script, monkeypatch):
    """At scale 0 and in the total mass."""
    right = script.GumbelMatching.log_prob
    monkeypatch.setattr(script.GumbelMatching, "log_prob", lambda law, value: right(law, value) + 0.1)
    row = script.Row(4, 0.0, 2, 6, 1000)
    script.measure(row)
    assert row.uniform_error == pytest.approx(0.105, abs=0.05)
    assert row.mass == pytest.approx(1.105, abs=0.05)

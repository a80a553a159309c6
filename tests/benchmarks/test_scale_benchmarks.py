"""The scripts on candidates and on scale, at small sizes."""

import csv
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch, request):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(request.param)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("script", ["sparse"], indirect=True)
def test_candidates_agree_with_the_dense_operators(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "_memory", lambda *_: 1.0)
    out = tmp_path / "sparse.csv"
    assert script.main(["--quick", "--repeats", "1", "--out", str(out)]) == 0
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == ["draw", "gradient", "step", "matching", "draw", "gradient", "step"]
    assert all(float(row["gap"]) < 1e-9 for row in rows if row["what"] != "step")
    assert all(float(row["ratio"]) > 0 for row in rows)
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| 60 |")]) == 7


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("script", ["scale"], indirect=True)
def test_exponents(script, tmp_path):
    sizes = (10, 20, 40, 80)
    assert abs(script.exponent(sizes, [3 * n**2.5 for n in sizes]) - 2.5) < 1e-12
    assert abs(script.exponent(sizes, [100.0, *(n**2.0 for n in sizes[1:])]) - 2) < 1e-12  # the smallest is overhead
    out = tmp_path / "scale.csv"
    assert script.main(["--quick", "--repeats", "1", "--out", str(out)]) == 0
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["operation"] for row in rows} == {series.operation for series in script.SERIES}
    assert all(float(row["seconds"]) > 0 for row in rows)

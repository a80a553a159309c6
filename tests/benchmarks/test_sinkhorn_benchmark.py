import csv
import importlib.util
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sinkhorn.py"
PEERS = {"POT sinkhorn_log": ("POT", ("ot",)), "ott-jax Sinkhorn": ("ott-jax", ("ott", "jax"))}


# Peers may be installed, and warn when they are imported.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_quick_run_prints_the_table_and_writes_the_figures(tmp_path, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("sinkhorn_benchmark", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)  # dataclasses look their module up
    spec.loader.exec_module(script)
    out = tmp_path / "sinkhorn.csv"
    temperatures = ["1", "0.2"]
    options = ["--quick", "--temperatures", *temperatures, "--max-iterations", "1000", "--out", str(out)]
    assert script.main(options) == 0

    printed = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    names = table[0][2:]
    assert [row[1] for row in table[2:]] == 2 * ["ms", f"time / ({script.OURS})", "marginal error", "gradient off by"]
    assert [row[0] for row in table[2::4]] == temperatures
    assert {len(row) for row in table} == {len(names) + 2}
    for column, (peer, modules) in PEERS.items():
        installed = all(find_spec(module) for module in modules)
        assert (column in names) == installed
        assert (f"skipped {peer}: not installed; pip install 'pyro-gs[bench]'" in printed) != installed

    with out.open(encoding="utf-8") as file:
        rows = {(row["temperature"], row["method"]): row for row in csv.DictReader(file)}
    assert len(rows) == len(temperatures) * len(names)
    for t in map(str, map(float, temperatures)):
        assert float(rows[t, script.OURS]["marginal_error"]) <= script.TARGET
        assert float(rows[t, script.DEFAULT]["marginal_error"]) <= 1e-10
        assert float(rows[t, script.OURS]["ratio"]) == 1.0
        # Both are converged, so their gradients agree; 20 sweeps are not.
        assert float(rows[t, script.OURS]["gradient_gap"]) < 1e-5
    assert float(rows["0.2", "20 unrolled sweeps"]["marginal_error"]) > 1e-3
    assert rows["0.2", "20 unrolled sweeps"]["converged"] == "False"

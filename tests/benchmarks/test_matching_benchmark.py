import csv
import importlib.util
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "matching.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("matching_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of peers, when they are imported
def test_quick_run_prints_the_tables_and_writes_the_figures(script, tmp_path, capsys):
    out = tmp_path / "matching.csv"
    assert script.main(["--quick", "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    names = table[0][3:]
    assert names[:2] == [script.LOOP, "matching, scipy"]
    for name, module in {"torch-linear-assignment": "torch_linear_assignment", "lapx lapjvr_batch": "lap"}.items():
        if find_spec(module) is None:
            assert name not in names
            assert f"skipped {name.split()[0]}: not installed; pip install 'pyro-gs[bench]'" in printed
    shapes = [[kind, str(batch), str(n)] for kind in script.INPUTS for batch, n in script.QUICK]
    assert [row[:3] for row in table[2 : 2 + len(shapes)]] == shapes
    hard = {row[0]: dict(zip(names, row[1:], strict=True)) for row in table[-len(script.HARD) :]}
    for name in (name for name in names if name.startswith("matching")):
        assert hard["infeasible mask"][name] == f"raised {script.HARD_ITEMS}"
        assert {hard[kind][name] for kind in script.HARD[1:3]} == {"best"}

    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == len(shapes) * names
    assert {row["agrees"] for row in rows} == {"True"}
    assert {row["ratio"] for row in rows if row["method"] == script.LOOP} == {"1"}
    assert all(0 < float(row["min_ms"]) <= float(row["median_ms"]) <= float(row["max_ms"]) for row in rows)


def test_wrong_answers_are_reported(script):
    def worst(logits):
        return torch.stack([torch.from_numpy(linear_sum_assignment(x.clamp_min(-1e6).numpy())[1]) for x in logits])

    found = {"loop": script.scipy_loop, "worst": worst, "none": lambda logits: torch.zeros(logits.shape[:2]).long()}
    items = script.HARD_ITEMS
    assert script.verdicts(found, "values of 1e300") == [
        "best",
        f"not the best {items}",
        f"forbidden pair or no permutation {items}",
    ]
    assert script.verdicts(found, "infeasible mask")[:2] == [f"raised {items}", f"forbidden pair or no permutation {items}"]
    logits = script.draw("ties", 3, 6, script.np.random.default_rng(0))
    best = script.weights(logits, script.scipy_loop(logits))
    assert script.agree(best, best)
    assert not script.agree(script.weights(logits, worst(logits)), best)
    assert not script.agree([*best[:2], None], best)

import csv
import importlib.util
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PEERS = {  # column -> what the skipped line calls it, and what it imports
    "POT-batch": ("POT", ("ot",)),
    "geomloss": ("geomloss", ("geomloss",)),
    "ott-jax": ("ott-jax", ("ott", "jax")),
    "pygmtools": ("pygmtools", ("pygmtools",)),
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("peers", "memory", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("sinkhorn_benchmark", BENCHMARKS / "sinkhorn.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def read(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Peers may be installed, and warn when they are imported.
@pytest.mark.filterwarnings("ignore")
def test_quick_run_prints_the_tables_draws_and_writes_the_figures(script, tmp_path, capsys):
    out, figure = tmp_path / "sinkhorn.csv", tmp_path / "sinkhorn.png"
    names = ["ours", "ours-tol", "sweeps-20", *PEERS]
    options = ["--quick", "--n", "6", "--temperatures", "1", "0.2", "--max-work", "4e5", "--out", str(out)]
    assert script.main([*options, "--methods", *names, "--figure", str(figure)]) == 0

    printed = capsys.readouterr().out
    there = [name for name in names if name not in PEERS or all(map(find_spec, PEERS[name][1]))]
    for name, (library, _) in PEERS.items():
        assert (f"skipped {library}: not installed; pip install 'pyro-gs[bench]'" in printed) == (name not in there)
    headers = [line for line in printed.splitlines() if line.startswith("| n x batch | tau |")]
    assert headers == 2 * [f"| n x batch | tau | {' | '.join(there)} |"]
    for title in ("forward, float64", "forward + backward, float64", "To reach", "Limits of the machine"):
        assert f"### {title}\n" in printed
    assert figure.stat().st_size > 1000

    rows = {(row["temperature"], row["kind"], row["method"]): row for row in read(out)}
    assert len(rows) == 4 * len(there) + 3
    for t in ("1.0", "0.2"):
        assert float(rows[t, "forward", "ours"]["marginal_error"]) <= 1e-10
        assert float(rows[t, "backward", "ours-tol"]["marginal_error"]) <= 1e-6
        # Both are converged, so their gradients agree; 20 sweeps are not.
        assert float(rows[t, "backward", "ours-tol"]["gradient_gap"]) < 1e-5
    assert float(rows["0.2", "backward", "sweeps-20"]["gradient_gap"]) > 1e-3
    assert rows["0.2", "forward", "sweeps-20"]["converged"] == "False"
    for name in set(there) - {"geomloss"}:  # which has a fixed number of iterations
        assert rows["1.0", "forward", name]["converged"] == ("False" if name == "sweeps-20" else "True")


def test_resume_measures_only_what_is_missing(script, tmp_path, capsys):
    out = tmp_path / "sinkhorn.csv"
    options = ["--quick", "--n", "4", "--methods", "ours", "--passes", "forward", "--out", str(out)]
    assert script.main([*options, "--temperatures", "1"]) == 0
    first = out.read_text(encoding="utf-8")
    assert script.main([*options, "--temperatures", "1", "0.5", "--resume"]) == 0
    assert out.read_text(encoding="utf-8").startswith(first)
    assert [row["temperature"] for row in read(out)] == ["1.0", "0.5"]
    assert capsys.readouterr().err.count("temperature 1.0") == 1
    assert script.read_csv(out)[0].converged is True


def test_memory_is_measured_in_a_process_of_its_own(script):
    seen = script.memory.in_own_process("ours", 200, 8, "float64", "cpu")
    # The result, the gradient and the matrix in between are there at least.
    assert 3 < seen["torch"] < 40
    if sys.platform == "linux":  # elsewhere an earlier peak may hide it
        assert 3 < seen["process"] < 40


def test_sweeps_are_counted_up_to_the_target(script):
    problem = script.peers.make_problem(6, 3, torch.float64, "cpu", 1.0, backward=False, max_sweeps=1000)
    needed = script.peers.count_sweeps(problem, 1000)
    log_p = problem.logits
    errors = []
    for _ in range(needed):
        log_p = log_p.log_softmax(-1).log_softmax(-2)
        errors.append(script.marginal_error(log_p.exp()))
    assert errors[-1] <= problem.target < errors[-2]
    assert script.peers.count_sweeps(problem, 5) == 5

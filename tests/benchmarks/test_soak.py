import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    torch.set_default_dtype(torch.float32)  # which users have, and which the cold part is about
    spec = importlib.util.spec_from_file_location("soak", BENCHMARKS / "soak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("float64_only")
def test_short_runs_hold(soak, monkeypatch, capsys):
    monkeypatch.setattr(soak, "TEMPERATURES", (1.0, 1e-3))
    assert soak.main(["--scale", "0.005"]) == 0
    printed = capsys.readouterr().out
    assert "| SVI, 100 steps |" in printed
    assert "| MCMC, 250 draws |" in printed
    for model in ("full", "masked", "informed"):
        assert f"| {model} | 0 | 0 |" in printed


def test_what_is_not_finite_is_counted(soak, monkeypatch, capsys):
    monkeypatch.setattr(soak.SVI, "step", lambda self: float("nan"))
    table = soak.cold(3, (1.0,))
    assert [row[1] for row in table] == ["3", "3", "3"]

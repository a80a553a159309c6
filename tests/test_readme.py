import pathlib
import re

import pytest
import torch

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_code_runs_and_prints_what_it_says(capsys):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    first, second = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(first, str(README), "exec"), names)
    index, *marginals = capsys.readouterr().out.split("\n", 1)
    assert index == "tensor([3, 0, 4, 1, 2])"
    values = [float(x) for x in re.findall(r"\d\.\d+", marginals[0])]
    assert sum(values) == pytest.approx(5, abs=0.01)
    exec(compile(second.replace("budget=5", "budget=2"), str(README), "exec"), names)
    text = capsys.readouterr().out
    for word in ("p(map)", "Bhattacharyya", "vi + mcmc"):
        assert word in text


def test_pages_and_pictures_that_it_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target

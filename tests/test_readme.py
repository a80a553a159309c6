import pathlib
import re

import pytest
import torch

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_ten_lines_run_and_print_what_they_say(capsys):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
    index, *marginals = capsys.readouterr().out.split("\n", 1)
    assert index == "tensor([3, 0, 4, 1, 2])"
    values = [float(x) for x in re.findall(r"\d\.\d+", marginals[0])]
    assert sum(values) == pytest.approx(5, abs=0.01)


def test_pages_and_pictures_that_it_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target

"""Sizes and pictures of a tutorial, as a script and in a notebook's kernel."""

import os
import pathlib
import subprocess
import sys

import nbclient
import nbformat
import pytest
from matplotlib import image

ROOT = pathlib.Path(__file__).parents[2]
CODE = """
import matplotlib.pyplot as plt
from tutorials.page import Page

page = Page("example", "an example")
print("the size is", page.size)
figure, ax = plt.subplots()
ax.plot([0, 1])
page.show("line", figure)
print(len(plt.get_fignums()), "left open")
"""


def environment(size):
    ours = {name: value for name, value in os.environ.items() if name != "PYRO_GS_TUTORIAL_SIZE"}
    return {**ours, "PYTHONPATH": str(ROOT), **({} if size is None else {"PYRO_GS_TUTORIAL_SIZE": size})}


def run(folder, *flags, size=None):
    command = [sys.executable, "-c", CODE, *flags]
    return subprocess.run(command, cwd=folder, env=environment(size), capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("flags", "size", "expected"),
    [
        ([], None, "default"),
        (["--quick"], None, "quick"),
        (["--full"], None, "full"),
        ([], "quick", "quick"),
        (["--full"], "quick", "full"),  # a flag goes before the environment
    ],
)
def test_a_script_has_the_size_asked_for_and_writes_its_picture(tmp_path, flags, size, expected):
    done = run(tmp_path, *flags, size=size)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"the size is {expected}", "0 left open"]
    assert image.imread(tmp_path / "results" / "example" / "line.png")[..., :3].std() > 0.01  # something is drawn


def test_a_script_writes_where_it_is_told_to(tmp_path):
    assert run(tmp_path, "--quick", "--out", "elsewhere").returncode == 0
    assert [file.name for file in tmp_path.rglob("*.png")] == ["line.png"]
    assert (tmp_path / "elsewhere" / "line.png").exists()


@pytest.mark.parametrize(
    ("flags", "size", "words"),
    [
        ([], "small", "PYRO_GS_TUTORIAL_SIZE is 'small', not one of quick, default, full"),
        (["--quick", "--full"], None, "not allowed with argument"),
        (["--fast"], None, "unrecognized arguments: --fast"),
    ],
)
def test_a_wrong_size_is_refused_and_nothing_written(tmp_path, flags, size, words):
    done = run(tmp_path, *flags, size=size)
    assert done.returncode != 0
    assert words in done.stderr
    assert not list(tmp_path.iterdir())


def test_in_a_notebook_the_picture_appears_below_the_cell_and_nothing_is_written(tmp_path, monkeypatch):
    for name, value in environment("quick").items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    nbclient.NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs
    printed = "".join(part.text for part in outputs if part.get("name") == "stdout")
    assert printed.splitlines()[:2] == ["the size is quick", "1 left open"]
    assert sum("image/png" in part.get("data", {}) for part in outputs) == 1
    assert not list(tmp_path.iterdir())

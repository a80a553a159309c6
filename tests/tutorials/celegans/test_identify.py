"""The tutorial, from top to bottom at its smallest size, in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest
from matplotlib import image

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.usefixtures("float64_only")
def test_it_runs_and_draws_its_pictures(tmp_path):
    command = [sys.executable, "-m", "tutorials.celegans.identify", "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in (
        "candidates a neuron",
        "by the prior",
        "plain SVI",
        "with exchanges and restarts",
        "total variation",
        "are right",
    ):
        assert words in done.stdout
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 5
    for picture in pictures:
        assert image.imread(picture)[..., :3].std() > 0.01  # something is drawn

"""The first tutorial, from top to bottom at its smallest size, in a process of its own."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from matplotlib import image

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.usefixtures("float64_only")
def test_it_runs_and_draws_its_pictures(tmp_path):
    command = [sys.executable, "-m", "tutorials.first_permutation", "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"log evidence -\d+\.\d+", done.stdout)
    for word in ("exact", "swaps", "vi + mcmc", "HMCGibbs", "2.65253e+32 permutations", "expected calibration error"):
        assert word in done.stdout
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 6
    for picture in pictures:
        assert image.imread(picture)[..., :3].std() > 0.01  # something is drawn


def test_its_page_has_the_length_of_a_page():
    """600 to 1,500 words of text."""
    lines = (ROOT / "tutorials" / "first_permutation.py").read_text().splitlines()
    words = " ".join(line.lstrip("# ") for line in lines if line.startswith("#") and not line.startswith("# %%")).split()
    assert 600 <= len(words) <= 1500

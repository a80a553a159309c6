"""Runs of a tutorial that is a page: as a script at its smallest size, in a process of its own."""

import os
import pathlib
import subprocess
import sys

from matplotlib import image

ROOT = pathlib.Path(__file__).parents[2]


def run_quick(name, folder, pictures):
    """What `tutorials/<name>.py --quick` prints; it must succeed and draw so many pictures in the folder."""
    command = [sys.executable, "-m", f"tutorials.{name}", "--quick", "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn = sorted(folder.glob("*.png"))
    assert len(drawn) == pictures
    for picture in drawn:
        assert image.imread(picture)[..., :3].std() > 0.01  # something is drawn
    return done.stdout


def count_words(name):
    """Words of the page's text."""
    lines = (ROOT / "tutorials" / f"{name}.py").read_text().splitlines()
    return len(" ".join(line.lstrip("# ") for line in lines if line.startswith("#") and not line.startswith("# %%")).split())

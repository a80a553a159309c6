"""Running a tutorial that is a page, at its smallest size and in a process of its own, and reading what it says."""

import os
import pathlib
import subprocess
import sys

from matplotlib import image

ROOT = pathlib.Path(__file__).parents[2]


def printed(module, folder, *, pictures):
    """Standard output of ``python -m module --quick``, which must succeed and draw so many pictures into the folder."""
    command = [sys.executable, "-m", module, "--quick", "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    drawn = sorted(folder.glob("*.png"))
    assert len(drawn) == pictures
    for picture in drawn:
        assert image.imread(picture)[..., :3].std() > 0.01  # something is drawn
    return done.stdout


def words(module):
    """Number of words of a tutorial's text, comments beside code left out."""
    lines = (ROOT / f"{module.replace('.', '/')}.py").read_text().splitlines()
    return len(" ".join(line.lstrip("# ") for line in lines if line.startswith("#") and not line.startswith("# %%")).split())

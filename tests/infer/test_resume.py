"""The how-to page on resuming, with a process that is killed in earnest."""

import pathlib
import re
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how_to" / "resume.md"
DIE = """
run(Path(sys.argv[1]), until=130)
os.kill(os.getpid(), signal.SIGKILL)
"""
FINISH = """
print(torch.equal(run(Path(sys.argv[1])), run(Path(sys.argv[1] + ".whole"))))
"""


@pytest.mark.usefixtures("float64_only")
def test_a_killed_fit_goes_on_bit_for_bit(tmp_path):
    first_cell = re.findall(r"```\{code-cell\}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)[0]
    definitions = "import signal, sys\n" + first_cell.partition("with tempfile")[0]
    path = tmp_path / "fit.pt"
    command = [sys.executable, "-c", definitions + DIE, path]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert path.exists()
    finished = subprocess.run(
        [sys.executable, "-c", definitions + FINISH, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "True"

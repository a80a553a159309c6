"""The how-to page on resuming, with a process that is killed in earnest."""

import pathlib
import re
import signal
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

import pyro_gs as pgs

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how_to" / "resume.md"
DIE = """
run(Path(sys.argv[1]), until=130)
os.kill(os.getpid(), signal.SIGKILL)
"""
FINISH = """
print(torch.equal(run(Path(sys.argv[1])), run(Path(sys.argv[1] + ".whole"))))
"""


def stepping(gradient, steps, state=None):
    """A fit of hard matchings; what it needs to go on, and its last loss."""
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

    def model():
        P = pyro.sample("P.of", pgs.UniformPermutation(4))
        pyro.sample("y", dist.Normal(P @ x, 0.3).to_event(2), obs=x.flip(0))

    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide = pgs.AutoGumbelMatching(model, gradient=gradient)
    guide()
    svi = SVI(model, guide, ClippedAdam({"lr": 0.05}), Trace_ELBO())
    if state is not None:
        guide.load_state_dict(state["guide"])
        svi.optim.set_state(state["optim"])
        torch.set_rng_state(state["generator"])
    loss = [svi.step() for _ in range(steps)][-1]
    return {"guide": guide.state_dict(), "optim": svi.optim.get_state(), "generator": torch.get_rng_state()}, loss


@pytest.mark.parametrize("gradient", ["score", "perturb_and_map"])
def test_averages_of_a_guide_are_kept(gradient, tmp_path):
    whole, loss = stepping(gradient, 30)
    torch.save(stepping(gradient, 17)[0], tmp_path / "fit.pt")
    resumed, again = stepping(gradient, 13, torch.load(tmp_path / "fit.pt", weights_only=True))
    assert loss == again
    assert whole["guide"].keys() == resumed["guide"].keys()
    assert all(torch.equal(value, resumed["guide"][name]) for name, value in whole["guide"].items())
    sums = [value for name, value in whole["guide"].items() if name.endswith("sums")]
    assert len(sums) == 1
    assert gradient != "score" or sums[0].all()


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

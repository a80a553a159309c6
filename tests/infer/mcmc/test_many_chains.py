"""The code of the page on scale: chains in processes of their own, the same again at the same seed."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PAGE = ROOT / "docs" / "scale.md"
# Pyro draws chains one after the other where it counts fewer cores than chains, one being for itself
CORES = "import torch.multiprocessing as mp\nmp.cpu_count = lambda: 8\n"
AGAIN = """

first = mcmc.get_samples(group_by_chain=True)["P"]
pyro.set_rng_seed(SEED)
mcmc = MCMC(pgs.SwapMetropolis(model), num_samples=500, warmup_steps=200, num_chains=CHAINS, mp_context="fork",
            disable_progbar=True)
mcmc.run(x, y)
second = mcmc.get_samples(group_by_chain=True)["P"]
print("same", torch.equal(first, second), "apart", len({chain.numpy().tobytes() for chain in first}))
print("rhat", pgs.convergence(mcmc).worst_rhat)
"""


@pytest.mark.slow
def test_the_page_draws_several_chains():
    (program,) = re.findall(r"```\{code-cell\}\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CORES + program + AGAIN], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Chains will be drawn sequentially" not in done.stderr
    same, rhat = done.stdout.strip().splitlines()[-2:]
    assert same == "same True apart 4"
    assert float(rhat.split()[1]) < 1.1

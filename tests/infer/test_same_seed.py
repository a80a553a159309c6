"""The same seed gives the same bits: fits of every guide, kernels that tests/infer/mcmc/test_processes.py leaves out."""

import pyro
import pytest
import torch
from pyro.infer import MCMC, SVI, Trace_ELBO

import pyro_gs as pgs

COST = torch.arange(16.0).reshape(4, 4).cos()


def model():
    with pyro.plate("items", 2):
        P = pyro.sample("P", pgs.UniformPermutation(4))
        pyro.factor("fit", 2 * (P * COST.to(P.dtype)).sum((-2, -1)))


GUIDES = {
    "AutoGumbelSinkhorn": lambda: pgs.AutoGumbelSinkhorn(model),
    "hard": lambda: pgs.AutoGumbelSinkhorn(model, hard=True),
    "tightened_kl": lambda: pgs.AutoGumbelSinkhorn(model, objective="tightened_kl", rank=2),
    "particles": lambda: pgs.AutoGumbelSinkhorn(model, num_particles=4),
    "AutoGumbelMatching": lambda: pgs.AutoGumbelMatching(model),
    "perturb_and_map": lambda: pgs.AutoGumbelMatching(model, gradient="perturb_and_map"),
    "AutoRounding": lambda: pgs.AutoRounding(model),
    "AutoStickBreaking": lambda: pgs.AutoStickBreaking(model),
}


def fit(name, seed):
    """Losses, parameters and draws after five steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = GUIDES[name]()
    fitted = model if isinstance(guide, pgs.AutoGumbelMatching) else pgs.relax(model)
    svi = SVI(fitted, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = torch.tensor([svi.step() for _ in range(5)])
    return [losses, *(value.detach() for value in guide.parameters()), guide.hard_sample((20,))["P"]]


@pytest.mark.parametrize("name", GUIDES)
def test_fits(name):
    first, second, other = (fit(name, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def guide_proposal():
    guide = pgs.AutoGumbelSinkhorn(model)
    guide()
    return pgs.GuideProposal(model, guide=guide)


@pytest.mark.parametrize(
    "make",
    [lambda: pgs.ParallelTempering(model, num_temperatures=3), guide_proposal],
    ids=["ParallelTempering", "GuideProposal"],
)
def test_chains(make):
    chains = []
    for seed in (1, 1, 2):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        mcmc = MCMC(make(), num_samples=20, warmup_steps=10, disable_progbar=True)
        mcmc.run()
        chains.append(mcmc.get_samples()["P"])
    assert torch.equal(chains[0], chains[1])
    assert not torch.equal(chains[0], chains[2])

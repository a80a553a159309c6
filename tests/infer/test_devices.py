"""Inference follows the device of the data: guides, restarts, chains, enumeration, summaries."""

from functools import partial

import matching_model
import pyro
import pyro.distributions as dist
import pytest
import torch
from matching_model import exact, log_likelihood, noisy_points
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_gs as pgs
from pyro_gs.infer.objective import OBJECTIVES

SCALE = 0.9


@pytest.fixture(params=["meta/cpu", *(pytest.param(x, marks=pytest.mark.cuda) for x in ("cpu/cuda", "cuda/cuda"))])
def device(request):
    """Torch's default device, and that of the data.

    On a default device without memory everything fails that is not put where the data are; so the processor alone tells.
    """
    default, of_data = request.param.split("/")
    with torch.device(default):
        yield of_data


@pytest.fixture
def points(device):
    with torch.device("cpu"):
        return tuple(value.to(device) for value in noisy_points(4, SCALE, 0))


def model(x, y, scale):
    P = pyro.sample("P", pgs.UniformPermutation(len(x), torch.ones(len(x), len(x), dtype=torch.bool, device=x.device)))
    pyro.sample("y", dist.Normal(P @ x, scale).to_event(2), obs=y)


def truth():
    with torch.device("cpu"):
        return exact(*noisy_points(4, SCALE, 0), SCALE)


GUIDES = {
    **{name: partial(pgs.AutoGumbelSinkhorn, model, objective=name) for name in OBJECTIVES},
    "stick-breaking": partial(pgs.AutoStickBreaking, model),
    "rounding": partial(pgs.AutoRounding, model),
}


@pytest.mark.parametrize("name", GUIDES)
def test_relaxed_guides(name, device, points):
    guide = GUIDES[name]()
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(pgs.relax(model), guide, Adam({"lr": 0.1}), elbo)
    losses = [svi.step(*points, SCALE) for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10])
    hard = guide.hard_sample((50,))["P"]
    median = guide.median()["P"]
    assert hard.device.type == median.device.type == device
    assert all(parameter.device.type == device for parameter in pyro.get_param_store().values())
    assert bool(pgs.constraints.permutation.check(hard).all())


def test_gumbel_matching_guide(device, points):
    guide = pgs.AutoGumbelMatching(model)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(40):
        svi.step(*points, SCALE)
    assert guide.logits("P").device.type == device
    assert guide()["P"].device.type == device


def test_partial_restarts(device, points):
    guide = pgs.AutoGumbelSinkhorn(model)
    svi = SVI(pgs.relax(model), guide, Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(*points, SCALE)
    restarts = pgs.PartialRestarts(guide, lambda P: float(log_likelihood(P["P"], *points, SCALE)))
    for _ in range(3):
        restarts.begin()
        for _ in range(10):
            svi.step(*points, SCALE)
        restarts.end()
    restarts.finish()
    assert restarts.best["P"].device.type == guide.logits("P").device.type == device


KERNELS = {
    "swaps": lambda: pgs.SwapMetropolis(model),
    "locally balanced": lambda: pgs.LocallyBalanced(model),
    "block Gibbs": lambda: pgs.BlockGibbs(model),
    "sequence": lambda: pgs.MoveSequence([pgs.SwapMetropolis(), pgs.LocallyBalanced()], model),
    "tempering": lambda: pgs.ParallelTempering(model, num_temperatures=3),
}


@pytest.mark.parametrize("name", KERNELS)
def test_chains(name, device, points):
    chain = MCMC(KERNELS[name](), num_samples=150, warmup_steps=30, disable_progbar=True)
    chain.run(*points, SCALE)
    draws = chain.get_samples()["P"]
    assert draws.device.type == device
    _, marginals, _, _ = truth()
    # 150 draws that depend on each other, with a standard error of .04 if they did not
    assert float((draws.mean(0).cpu() - marginals).abs().max()) < 0.3
    assert pgs.summary(chain)
    assert pgs.convergence(chain)


def test_enumeration(device, points):
    posterior = pgs.enumerate_posterior(model, *points, SCALE)
    evidence, marginals, _, _ = truth()
    assert posterior.log_evidence.device.type == posterior.marginals["P"].device.type == device
    assert float(posterior.log_evidence) == pytest.approx(evidence, abs=1e-4)  # float32 on either
    assert torch.allclose(posterior.marginals["P"].cpu(), marginals, atol=1e-5)


@pytest.mark.cuda
def test_a_prior_on_the_host_and_data_elsewhere():
    """``UniformPermutation(n)`` has no device to follow; the model moves its permutations to the data."""
    x, y = (value.to("cuda") for value in noisy_points(4, SCALE, 0))
    evidence, marginals, _, _ = truth()
    posterior = pgs.enumerate_posterior(matching_model.model, x, y, SCALE)
    assert float(posterior.log_evidence) == pytest.approx(evidence, abs=1e-4)
    chain = MCMC(pgs.SwapMetropolis(matching_model.model), num_samples=150, warmup_steps=30, disable_progbar=True)
    chain.run(x, y, SCALE)
    assert float((chain.get_samples()["P"].mean(0).cpu() - marginals).abs().max()) < 0.3
    guide = pgs.AutoGumbelSinkhorn(matching_model.model)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(pgs.relax(matching_model.model), guide, Adam({"lr": 0.1}), elbo)
    losses = [svi.step(x, y, SCALE) for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10])

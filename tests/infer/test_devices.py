"""Inference follows the device of the data: guides, restarts, chains, enumeration, comparisons, summaries, pictures."""

from functools import partial

import matching_model
import matplotlib as mpl
import pyro
import pyro.distributions as dist
import pytest
import torch
from matching_model import exact, log_likelihood, noisy_points
from matplotlib import pyplot as plt
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.optim import Adam

import pyro_gs as pgs
from pyro_gs import plotting
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


def of_worms(x, y, scale, size=None):
    """The same for every item of a plate, which may be subsampled."""
    with worms(x, y, scale, size) as chosen:
        P = pyro.sample("P", pgs.UniformPermutation(len(x), torch.ones(len(x), len(x), dtype=torch.bool, device=x.device)))
        pyro.sample("y", dist.Normal(P @ x, scale).to_event(2), obs=y[chosen])


def worms(x, y, scale, size=None):
    """The plate: without ``create_plates`` Pyro's guides make their own, with indices on the default device."""
    return pyro.plate("worms", len(y), subsample_size=size, device=str(x.device))


def with_shift(x, y, scale):
    shift = pyro.sample("shift", dist.Normal(x.new_zeros(()), x.new_ones(())))
    P = pyro.sample("P", pgs.UniformPermutation(len(x), torch.ones(len(x), len(x), dtype=torch.bool, device=x.device)))
    pyro.sample("y", dist.Normal(P @ x + shift[..., None, None], scale).to_event(2), obs=y)


class Similarity(torch.nn.Module):
    """Logits from the points."""

    def __init__(self, like):
        super().__init__()
        self.map = torch.nn.Linear(2, 3, device=like.device)

    def forward(self, x, y, *rest):
        return self.map(y) @ self.map(x).mT


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


OPTIONS = {
    "low rank": lambda x: {"rank": 2},
    "amortized": lambda x: {"logits": Similarity(x)},
    "straight-through": lambda x: {"hard": True},
    "importance sample": lambda x: {"num_particles": 4},
    "started": lambda x: {"init_logits": pgs.init_to_matching({"P": torch.eye(4, device=x.device)})},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_the_guide(name, device, points):
    guide = pgs.AutoGumbelSinkhorn(model, **OPTIONS[name](points[0]))
    svi = SVI(pgs.relax(model), guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(*points, SCALE)
    assert all(bool(p.isfinite().all()) and p.device.type == device for p in pyro.get_param_store().values())
    assert (
        guide.median(*points, SCALE)["P"].device.type == guide.hard_sample((3,), *points, SCALE)["P"].device.type == device
    )


@pytest.mark.parametrize("kind", ["free", "amortized", "matching"])
def test_subsampled_plates(kind, device, points):
    x, y = points[0], torch.stack([points[1]] * 5)
    if kind == "matching":
        guide, fitted = pgs.AutoGumbelMatching(of_worms, create_plates=worms), of_worms
    else:
        options = {"logits": Similarity(x)} if kind == "amortized" else {}
        guide, fitted = pgs.AutoGumbelSinkhorn(of_worms, create_plates=worms, **options), pgs.relax(of_worms)
    svi = SVI(fitted, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(5):
        svi.step(x, y, SCALE, 2)
    logits = guide.logits("P", x, y, SCALE)
    assert logits.shape == (5, 4, 4)
    assert logits.device.type == device
    assert bool(logits.isfinite().all())


@pytest.mark.filterwarnings("ignore::pyro_gs.infer.diagnostics.TemperatureWarning")  # of 30 draws
def test_annealing_and_its_diagnostics(device, points):
    guide = pgs.AutoGumbelSinkhorn(model)
    relaxed = pgs.relax(model)
    schedule = pgs.ExponentialSchedule(1.0, 0.5, 30)
    svi = pgs.AnnealedSVI(relaxed, guide, Adam({"lr": 0.1}), Trace_ELBO(), schedule=schedule)
    for _ in range(30):
        svi.step(*points, SCALE)
    assert pgs.gradient_variance(Trace_ELBO(), relaxed, guide, *points, SCALE, num_draws=5).total > 0
    assert pgs.relaxation_gap(relaxed, guide, *points, SCALE, num_draws=5).standard_error > 0
    assert 0.25 < pgs.saturation(guide, *points, SCALE, num_draws=5)["P"] < 1
    effect = pgs.check_temperature_effect(relaxed, guide, *points, SCALE, num_draws=30)
    assert effect.corrected["P"].device.type == device
    drawn = Predictive(model, guide=pgs.harden(guide), num_samples=3)(points[0], None, SCALE)
    assert drawn["P"].device.type == drawn["y"].device.type == device


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


@pytest.mark.parametrize(("law", "count"), [("relaxed", 10), ("sequential", 150)])  # .2 s a draw the one
def test_guides_as_proposals(law, count, device, points):
    guide = pgs.AutoGumbelSinkhorn(model)
    guide(*points, SCALE)
    chain = MCMC(pgs.GuideProposal(model, guide=guide, law=law), num_samples=count, warmup_steps=5, disable_progbar=True)
    chain.run(*points, SCALE)
    draws = chain.get_samples()["P"]
    assert draws.device.type == device
    assert bool(pgs.constraints.permutation.check(draws).all())
    if law == "sequential":
        assert len(draws.unique(dim=0)) > 1  # ten draws of the other may all be refused


@pytest.mark.parametrize("moves", [pgs.SwapMetropolis, pgs.LocallyBalanced, pgs.BlockGibbs])
def test_beside_nuts(moves, device, points):
    chain = MCMC(pgs.HMCGibbs(NUTS(with_shift), moves=moves()), num_samples=10, warmup_steps=5, disable_progbar=True)
    chain.run(*points, SCALE)
    draws = chain.get_samples()
    assert draws["P"].device.type == draws["shift"].device.type == device
    assert len(torch.unique(draws["shift"])) > 1
    posterior = pgs.permutation_posterior(with_shift, {"shift": draws["shift"]}, *points, SCALE)
    assert posterior.marginals["P"].device.type == device


def test_rounded_draws(device, points):
    x = points[0]
    relaxed = pgs.GumbelSinkhorn(0.5, x.new_zeros(4, 4)).sample((500,))
    rounded = pgs.round_samples(with_shift, {"P": relaxed, "shift": torch.randn_like(relaxed[:, 0, 0])}, *points, SCALE)
    assert rounded.marginals["P"].device.type == rounded.log_probs.device.type == device
    assert pgs.summary(rounded)["P"].marginals.device.type == device


def test_comparison(device, points):
    methods = [
        "exact",
        "gumbel-sinkhorn",
        "gumbel-matching",
        "rounding",
        "stick-breaking",
        "swaps",
        "tempering",
        "vi + mcmc",
    ]
    found = pgs.compare(model, (*points, SCALE), methods=methods, budget=0.5, snapshots=3, progress=False)
    # a chain may lack time for its warm-up on a busy machine, but nothing else keeps a method out
    assert not {name: text for name, text in found.left_out.items() if "budget must leave" not in text}
    assert {name for name in methods if "mcmc" not in name and name != "tempering"} <= {*found.results}
    assert "exact" in str(found)
    assert float((found["exact"].marginals["P"].cpu() - truth()[1]).abs().max()) < 1e-4
    mpl.use("Agg")
    found.plot()
    plt.close("all")


def test_calibration_and_pictures(device, points):
    with torch.device("cpu"):
        order = torch.cat([torch.argsort(torch.rand(2, 30, 3), -1), torch.full((2, 30, 1), 3)], -1)
    draws = pgs.to_matrix(order.to(device)).float()
    right, allowed = torch.eye(4, device=device), torch.ones(4, 4, dtype=torch.bool, device=device)
    found = pgs.summary({"P": draws}, group_by_chain=True, truth=right)
    curve = pgs.reliability(found["P"].marginals, right)
    assert pgs.recalibrate(found["P"].marginals, curve, allowed=allowed).device.type == device
    mpl.use("Agg")
    plotting.plot_marginals(found["P"].marginals, truth=right, allowed=allowed)
    plotting.plot_confidence(found["P"].marginals, truth=right)
    plotting.plot_entropy(found, allowed=allowed)
    plotting.plot_reliability(curve)
    plotting.plot_trace({"P": draws}, group_by_chain=True)
    plt.close("all")


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

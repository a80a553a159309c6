"""Pyro's own guides and kernels on a relaxed site, through the transform of its support."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from dist_fixture import BLOCKS, TRIDIAGONAL
from pyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO, autoguide
from pyro.optim import Adam
from test_birkhoff import MIXED

import pyro_gs as pgs
from pyro_gs.distributions.relaxed import plain

THREE, FOUR = torch.ones(3, 3).bool(), torch.ones(4, 4).bool()


def gumbel_sinkhorn(allowed):
    return pgs.GumbelSinkhorn(0.7, torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf))


def sort(law, items=None):
    """The positions of n things, seen with noise; in a plate if there are several sets of them."""

    def model():
        x = torch.arange(float(law.event_shape[-1]))
        if items is None:
            P = pyro.sample("P", law)
            pyro.sample("x", dist.Normal(P @ x, 0.5).to_event(P.dim() - 1), obs=x.expand(P.shape[:-1]))
        else:
            with pyro.plate("items", items):
                P = pyro.sample("P", law)
                pyro.sample("x", dist.Normal(P @ x, 0.5).to_event(1), obs=x.expand(P.shape[:-1]))

    return model


MODELS = {
    "n=3": lambda: sort(gumbel_sinkhorn(THREE)),
    "n=4": lambda: sort(gumbel_sinkhorn(FOUR)),
    "tridiagonal": lambda: sort(gumbel_sinkhorn(TRIDIAGONAL)),
    "blocks": lambda: sort(gumbel_sinkhorn(BLOCKS)),
    "plate": lambda: sort(gumbel_sinkhorn(THREE), 3),
    "plate of a mask": lambda: sort(gumbel_sinkhorn(BLOCKS), 2),
    "plate of masks": lambda: sort(gumbel_sinkhorn(MIXED), 3),
    "to_event": lambda: sort(gumbel_sinkhorn(THREE).expand((2,)).to_event(1)),
    "relaxed": lambda: pgs.relax(sort(pgs.UniformPermutation(4, BLOCKS)), temperature=0.7),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    return request.param()


def inside(model, P):
    site = pyro.poutine.trace(model).get_trace().nodes["P"]
    assert P.shape[-site["value"].dim() :] == site["value"].shape
    return bool(site["fn"].support.check(plain(P)).all())


@pytest.mark.parametrize(
    "make",
    [
        autoguide.AutoNormal,
        autoguide.AutoMultivariateNormal,
        autoguide.AutoIAFNormal,
        autoguide.AutoLowRankMultivariateNormal,
        autoguide.AutoDelta,
    ],
)
def test_guides(model, make):
    guide = make(model)
    svi = SVI(model, guide, Adam({"lr": 0.03}), Trace_ELBO())
    for _ in range(6):
        assert math.isfinite(svi.step())
    assert inside(model, guide()["P"])
    for name, value in guide.named_parameters():
        assert value.isfinite().all(), name
    if make is autoguide.AutoIAFNormal:
        return
    assert inside(model, guide.median()["P"])
    if make is not autoguide.AutoDelta:
        quantiles = guide.quantiles([0.25, 0.5, 0.75])["P"]
        assert len(quantiles) == 3
        assert all(inside(model, P) for P in quantiles)


def test_guide_improves():
    model = MODELS["n=4"]()
    guide = autoguide.AutoNormal(model, init_scale=0.1)
    svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0))
    losses = [svi.step() for _ in range(150)]
    # The loss of one step scatters by about 1.
    assert sum(losses[-20:]) / 20 < sum(losses[:5]) / 5 - 3
    assert pgs.to_index(pgs.matching(plain(guide.median()["P"]))).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kernel", [NUTS, HMC])
@pytest.mark.parametrize("name", list(MODELS))
def test_kernels(name, kernel):
    model = MODELS[name]()
    options = {"max_tree_depth": 3} if kernel is NUTS else {"num_steps": 3}
    mcmc = MCMC(kernel(model, **options), num_samples=10, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    P = mcmc.get_samples()["P"]
    assert len(P) == 10
    assert inside(model, P)
    assert (P[0] != P[-1]).any()


def test_a_wild_step_is_rejected():
    mcmc = MCMC(
        HMC(MODELS["n=3"](), step_size=1e99, num_steps=3, adapt_step_size=False, adapt_mass_matrix=False),
        num_samples=3, warmup_steps=0, disable_progbar=True,
    )  # fmt: skip
    mcmc.run()
    P = mcmc.get_samples()["P"]
    assert (P == P[0]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("float64_only")
def test_nuts_agrees_with_the_law():
    law = pgs.GumbelSinkhorn(1.0, torch.randn(3, 3))
    draws = plain(law.sample((50_000,)))
    mcmc = MCMC(NUTS(lambda: pyro.sample("P", law)), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    P = plain(mcmc.get_samples()["P"])
    size = mcmc.diagnostics()["P"]["n_eff"].clamp(max=300)
    assert (size > 80).all()
    # Four and a half standard errors; a matrix has four free entries, each further off with probability 7e-6.
    for power in (1, 2):
        error = (draws**power).std(0) / size.sqrt()
        assert (((P**power).mean(0) - (draws**power).mean(0)).abs() < 4.5 * error).all()

"""Rounded draws of a relaxed model against enumeration."""

import matching_model
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

import pyro_gs as pgs

POINTS = tuple(value.double() for value in matching_model.noisy_points(3, 1.0, 0))


def test_weights_turn_the_prior_into_the_posterior():
    """Independent draws of the relaxed prior, whose likelihood is the relaxed one: the weights correct that, too."""
    pyro.set_rng_seed(0)
    _, marginals, _, _ = matching_model.exact(*POINTS, 1.0)
    draws = pgs.GumbelSinkhorn(0.5, torch.zeros(3, 3)).sample((20_000,))
    log_relaxed = matching_model.log_likelihood(draws, *POINTS, 1.0)
    chosen = torch.multinomial(log_relaxed.softmax(0), 20_000, replacement=True)
    rounded = pgs.round_samples(matching_model.model, {"P": draws[chosen]}, *POINTS, 1.0)
    assert 1000 < rounded.effective_sample_size < 20_000
    # five standard errors of a share with that many draws, halved by the resampling
    slack = 5 * 0.5 / (rounded.effective_sample_size / 2) ** 0.5
    assert (rounded.marginals["P"] - marginals).abs().max() < slack
    assert torch.allclose(pgs.summary(rounded)["P"].marginals, rounded.marginals["P"])


def with_latent(x, y):
    P = pyro.sample("P", pgs.UniformPermutation(3))
    z = pyro.sample("z", dist.Normal(P @ x, 1.0).to_event(2))
    pyro.sample("y", dist.Normal(z, 1.0).to_event(2), obs=y)


def test_other_sites_that_depend_on_the_permutation_count():
    pyro.set_rng_seed(2)
    x, y = POINTS
    draws = pgs.GumbelSinkhorn(0.5, torch.zeros(3, 3)).sample((20_000,))
    z = dist.Normal(draws @ x, 1.0).sample()
    chosen = torch.multinomial(dist.Normal(z, 1.0).log_prob(y).sum((-2, -1)).softmax(0), 2000, replacement=True)
    rounded = pgs.round_samples(with_latent, {"P": draws[chosen], "z": z[chosen]}, x, y)
    _, marginals, _, _ = matching_model.exact(x, y, 2**0.5)
    # five standard errors; resampling leaves most draws distinct
    assert rounded.effective_sample_size > 300
    assert (rounded.marginals["P"] - marginals).abs().max() < 5 * 0.5 / (rounded.effective_sample_size / 2) ** 0.5


def with_shift(x, y):
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    P = pyro.sample("P", pgs.UniformPermutation(3))
    pyro.sample("y", dist.Normal(P @ x + shift[..., None, None], 1.0).to_event(2), obs=y)


def test_with_a_continuous_latent():
    pyro.set_rng_seed(1)
    x, y = POINTS
    count = 4000
    R, shift = pgs.GumbelSinkhorn(0.5, torch.zeros(3, 3)).sample((count,)), torch.randn(count)
    log_relaxed = dist.Normal(R @ x + shift[:, None, None], 1.0).log_prob(y).sum((-2, -1))
    chosen = torch.multinomial(log_relaxed.softmax(0), count, replacement=True)
    rounded = pgs.round_samples(with_shift, {"P": R[chosen], "shift": shift[chosen]}, x, y)
    grid = torch.linspace(-5, 5, 1001)
    perms = pgs.UniformPermutation(3).enumerate_support()
    log_p = dist.Normal(perms @ x + grid[:, None, None, None], 1.0).log_prob(y).sum((-2, -1))
    p = (log_p + dist.Normal(0.0, 1.0).log_prob(grid)[:, None]).flatten().softmax(0).reshape(log_p.shape)
    # at least 400 effective draws after both weightings: five standard errors
    assert rounded.effective_sample_size > 800
    assert (rounded.marginals["P"] - torch.einsum("k,kij->ij", p.sum(0), perms)).abs().max() < 5 * 0.5 / 20
    mean = (rounded.log_probs.exp() * rounded.others["shift"]).sum()
    exact = (p.sum(1) * grid).sum()
    sd = ((p.sum(1) * grid.square()).sum() - exact.square()).sqrt()
    assert abs(float(mean - exact)) < 5 * float(sd) / 20


@pytest.mark.filterwarnings("ignore::pyro_gs.EstimateWarning")
def test_takes_what_nuts_returns():
    pyro.set_rng_seed(2)
    mcmc = MCMC(NUTS(pgs.relax(with_shift, temperature=1.0), max_tree_depth=3), 30, 10, disable_progbar=True)
    mcmc.run(*POINTS)
    rounded = pgs.round_samples(with_shift, mcmc.get_samples(), *POINTS)
    assert torch.equal(rounded.others["shift"], mcmc.get_samples()["shift"])
    assert pgs.constraints.permutation.check(rounded.permutations["P"]).all()


def test_few_effective_draws_warn():
    draws = pgs.GumbelSinkhorn(5.0, torch.zeros(3, 3)).sample((30,))
    with pytest.warns(pgs.EstimateWarning, match="leave .* effective ones; sample the relaxed model at a lower temperature"):
        pgs.round_samples(matching_model.model, {"P": draws}, POINTS[0], POINTS[1], 0.05)


def test_bad_samples():
    draws = torch.full((5, 3, 3), 1 / 3)
    with pytest.raises(ValueError, match="samples must have draws of the latent sites 'shift'"):
        pgs.round_samples(with_shift, {"P": draws}, *POINTS)
    with pytest.raises(ValueError, match=r"samples\['P'\] must have shape \(S, 3, 3\), but has \(5, 2, 2\)"):
        pgs.round_samples(with_shift, {"P": torch.ones(5, 2, 2), "shift": torch.zeros(5)}, *POINTS)
    with pytest.raises(ValueError, match=r"the same number of draws of every site, but has \[4, 5\]"):
        pgs.round_samples(with_shift, {"P": draws, "shift": torch.zeros(4)}, *POINTS)

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from matching_model import exact, log_likelihood, model, noisy_points
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam, ClippedAdam

import pyro_gs as pgs
from pyro_gs.infer.autoguide_linderman import AutoRounding, AutoStickBreaking
from pyro_gs.infer.hardening import harden

GUIDES = [AutoRounding, AutoStickBreaking]


def fit(relaxed, guide, args, steps=150, number=8):
    elbo = Trace_ELBO(num_particles=number, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(relaxed, guide, ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / steps)}), elbo)
    return [svi.step(*args) for _ in range(steps)]


@pytest.mark.parametrize("kind", GUIDES)
def test_easy_matching_is_found(kind):
    x, y = noisy_points(4, 0.1, 0)
    guide = kind(model, temperature=0.3)
    losses = fit(pgs.relax(model, temperature=0.3), guide, (x, y, 0.1))
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-20:]) < sum(losses[:20])
    best = exact(x, y, 0.1)[1].round()
    assert torch.equal(guide.median()["P"], best)
    hard = guide.hard_sample((200,))["P"]
    assert pgs.constraints.permutation.check(hard).all()
    assert (hard.mean(0) * best).sum() > 3.6
    draws = Predictive(model, guide=harden(guide), num_samples=10)(x, y, 0.1)["P"]
    assert pgs.constraints.permutation.check(draws).all()


@pytest.mark.parametrize("kind", GUIDES)
def test_every_parameter_has_a_gradient(kind):
    x, y = noisy_points(4, 0.5, 0)
    guide = kind(model)
    Trace_ELBO().loss_and_grads(pgs.relax(model), guide, x, y, 0.5)
    gradients = {name: parameter.grad for name, parameter in guide.named_parameters()}
    assert len(gradients) == 2
    for gradient in gradients.values():
        assert gradient.isfinite().all()
        assert (gradient != 0).any()


@pytest.mark.usefixtures("float64_only")
def test_stick_breaking_bounds_the_evidence_of_the_relaxed_model():
    # The same evidence as for AutoGumbelSinkhorn: estimated from draws of the prior (an estimate of the mean of 0.05 nats).
    scale, tau = 1.0, 0.7
    x, y = noisy_points(4, scale, 2)
    guide, relaxed = AutoStickBreaking(model, temperature=tau), pgs.relax(model, temperature=tau)
    fit(relaxed, guide, (x, y, scale))
    R = pgs.GumbelSinkhorn(tau, torch.zeros(4, 4)).sample(torch.Size((20_000,)))
    score = log_likelihood(torch.as_tensor(R), x, y, scale)
    evidence = float(torch.logsumexp(score, 0)) - math.log(len(R))
    with torch.no_grad():
        losses = [
            Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=0).loss(relaxed, guide, x, y, scale)
            for _ in range(10)
        ]
    losses = torch.tensor(losses)
    assert -losses.mean() - 4 * losses.std() / 10**0.5 < evidence + 0.05
    assert -losses.mean() > evidence - 2.0  # a fit, not any bound


@pytest.mark.usefixtures("float64_only")
def test_rounding_kl_is_that_of_the_true_densities():
    guide = AutoRounding(model, temperature=0.3, prior_scale=0.7)
    x, y = noisy_points(3, 0.5, 0)
    guide(x, y, 0.5)
    with torch.no_grad():
        guide.locs.P = torch.randn(3, 3)
        guide.scales.P = torch.rand(3, 3) + 0.2
        q = guide._law("P", (), {})
        p = pgs.RoundingPermutation(0.3, torch.full((3, 3), 1 / 3), 0.7)
        X = pgs.RoundingPermutation(0.3, q.loc, q.scale).rsample(torch.Size((20_000,)))
        ratio = pgs.RoundingPermutation(0.3, q.loc, q.scale).log_prob(X) - p.log_prob(X)
        error = float(ratio.std()) / len(X) ** 0.5
        assert float(q.kl()) == pytest.approx(float(ratio.mean()), abs=4.3 * error)
        # ... and it is what an ELBO takes: nothing but the KL is in one without data

        def prior():
            pyro.sample("P", pgs.UniformPermutation(3))

        for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
            assert elbo.loss(pgs.relax(prior), guide) == pytest.approx(float(q.kl()))


def test_prior_of_rounding_has_uniform_permutations():
    # chi-square of 6 permutations at a failure rate of 2e-5
    draws = pgs.RoundingPermutation(0.3, torch.full((3, 3), 1 / 3), 0.5).rsample(torch.Size((6000,)))
    code = pgs.to_index(pgs.matching(draws)) @ torch.tensor([9, 3, 1])
    counts = code.unique(return_counts=True)[1].double()
    assert len(counts) == 6
    assert ((counts - 1000).square() / 1000).sum() < 29.8


def test_plates_and_temperatures():
    def worms():
        with pyro.plate("worms", 5, subsample_size=2):
            P = pyro.sample("P", pgs.UniformPermutation(4))
            pyro.sample("y", dist.Normal(P[..., 0, 0], 0.1), obs=torch.ones(2))

    for kind in GUIDES:
        pyro.clear_param_store()
        guide = kind(worms)
        schedule = pgs.LinearSchedule(0.9, 0.3, 100)
        svi = pgs.AnnealedSVI(pgs.relax(worms), guide, Adam({"lr": 0.1}), Trace_ELBO(), schedule=schedule)
        for _ in range(100):
            svi.step()
        assert guide.median()["P"].shape == (5, 4, 4)
        assert (guide.hard_sample((300,))["P"].mean(0)[:, 0, 0] > 0.6).all()


@pytest.mark.parametrize("kind", GUIDES)
def test_errors(kind):
    x, y = noisy_points(4, 0.5, 0)
    with pytest.raises(RuntimeError, match="has not seen the model's arguments"):
        kind(model).median()
    allowed = ~torch.eye(4).bool()
    with pytest.raises(ValueError, match="no forbidden pairs, but the prior of site 'P' forbids 4; use AutoGumbelS"):
        kind(model)(x, y, 0.5, allowed)
    with pytest.raises(ValueError, match="temperature must be positive and finite, but is 0"):
        kind(model, temperature=0)
    with pytest.raises(ValueError, match="init_scale must be a positive finite number, but is -1.0"):
        kind(model, init_scale=-1.0)


def test_errors_of_rounding():
    with pytest.raises(ValueError, match="temperature must be at most 1"):
        AutoRounding(model, temperature=1.5)
    with pytest.raises(ValueError, match="prior_scale must be a positive"):
        AutoRounding(model, prior_scale=0.0)
    with pytest.raises(ValueError, match="prior of site 'Q' is GibbsPermutation with other probabilities"):
        AutoRounding(lambda: pyro.sample("Q", pgs.GibbsPermutation(torch.eye(3))))()

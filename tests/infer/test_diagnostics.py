import contextlib

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from matching_model import exact, model, noisy_points
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import ClippedAdam

import pyro_gs as pgs
from pyro_gs.infer.autoguide_matching import AutoGumbelMatching
from pyro_gs.infer.diagnostics import (
    TemperatureWarning,
    check_temperature_effect,
    gradient_variance,
    relaxation_gap,
    saturation,
)


def fitted(n, scale, seed, temperature, steps=150, **options):
    x, y = noisy_points(n, scale, seed)
    guide = pgs.AutoGumbelSinkhorn(model, temperature=temperature, **options)
    relaxed = pgs.relax(model, temperature=temperature)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(relaxed, guide, ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / steps)}), elbo)
    for _ in range(steps):
        svi.step(x, y, scale)
    return relaxed, guide, (x, y, scale)


# --- gradient variance


@pytest.mark.usefixtures("float64_only")
def test_gradient_variance_of_a_known_estimator():
    # Guide z ~ N(m, 1), model z ~ N(0, 1): d loss / dm = z with variance 1 and mean m; by 400 draws to 30%.
    def prior():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(3.0)), 1.0))

    found = gradient_variance(Trace_ELBO(), prior, guide, num_draws=400)
    assert found.total == pytest.approx(1.0, rel=0.3)
    assert found.signal_to_noise == pytest.approx(9.0, rel=0.35)
    assert found.by_parameter == {"m": found.total}
    assert pyro.param("m").unconstrained().grad is None


def test_gradient_variance_leaves_gradients_alone():
    x, y = noisy_points(4, 0.5, 0)
    guide = pgs.AutoGumbelSinkhorn(model)
    guide(x, y, 0.5)
    free = guide.free_logits.P_unconstrained
    free.grad = torch.ones(4, 4)
    before = free.detach().clone()
    gradient_variance(Trace_ELBO(), pgs.relax(model), guide, x, y, 0.5, num_draws=2)
    assert torch.equal(free.grad, torch.ones(4, 4))
    assert torch.equal(free, before)


@pytest.mark.usefixtures("float64_only")
def test_gradient_variance_grows_as_the_temperature_falls_and_shrinks_with_particles():
    x, y = noisy_points(4, 0.5, 0)
    guide = pgs.AutoGumbelSinkhorn(model)
    totals = []
    for temperature in (1.0, 0.3, 0.1):
        guide.temperature = temperature
        relaxed = pgs.relax(model, temperature=temperature)
        totals.append(gradient_variance(Trace_ELBO(), relaxed, guide, x, y, 0.5, num_draws=30).total)
    assert totals[0] < totals[1] < totals[2]
    many = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    assert gradient_variance(many, relaxed, guide, x, y, 0.5, num_draws=30).total < totals[2] / 4


def test_gradient_variance_errors():
    with pytest.raises(TypeError, match="loss must have a method loss_and_grads.*but is function"):
        gradient_variance(lambda: 0, model, model)
    with pytest.raises(ValueError, match="num_draws must be an integer of at least 2, but is 1"):
        gradient_variance(Trace_ELBO(), model, model, num_draws=1)
    with pytest.raises(ValueError, match="no parameter of the model or the guide has a gradient"):
        gradient_variance(Trace_ELBO(), lambda: None, lambda: None)


# --- saturation and gap


def test_saturation():
    x, y = noisy_points(4, 0.5, 0)
    guide = pgs.AutoGumbelSinkhorn(model, temperature=1000.0)
    assert saturation(guide, x, y, 0.5)["P"] == pytest.approx(0.25, abs=0.01)
    guide.temperature = 0.01
    assert saturation(guide, x, y, 0.5)["P"] > 0.98
    guide.temperature = 0.5
    want = pgs.GumbelSinkhorn(0.5, guide.logits("P").detach()).sample((4000,)).amax(-1).mean()
    assert saturation(guide, x, y, 0.5, num_draws=400, max_plate_nesting=0)["P"] == pytest.approx(
        float(want), abs=0.03
    )  # 4.7 errors


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("hard", [False, True])
def test_relaxation_gap_of_known_likelihoods(hard):
    # The gap of c sum P^2 is c (E sum P^2 - n), by long simulation; of a likelihood linear in the row sums it is zero.
    def own(power):
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("score", 2 * P.pow(power).sum((-2, -1)))

    guide = pgs.AutoGumbelSinkhorn(own, temperature=0.7, hard=hard)
    flat = relaxation_gap(own, guide, 1)
    assert flat.relaxed == pytest.approx(6.0)
    assert flat.gap == pytest.approx(0.0, abs=1e-5)
    found = relaxation_gap(pgs.relax(own), guide, 2, num_draws=1000, max_plate_nesting=0)
    draws = pgs.GumbelSinkhorn(0.7, guide.logits("P").detach()).sample((20_000,))
    want = float(2 * draws.pow(2).sum((-2, -1)).mean()) - 6
    assert found.hard == pytest.approx(6.0)
    assert found.gap == pytest.approx(want, abs=4.7 * found.standard_error)
    assert found.standard_error < abs(want) / 10
    assert found.relaxed - found.hard == pytest.approx(found.gap)


def test_gap_closes_as_the_temperature_falls():
    x, y = noisy_points(4, 0.5, 0)
    guide = pgs.AutoGumbelSinkhorn(model)
    gaps = []
    for temperature in (1.0, 0.3, 0.02):
        guide.temperature = temperature
        gaps.append(relaxation_gap(model, guide, x, y, 0.5, max_plate_nesting=0).gap)
    assert gaps[0] > gaps[1] > abs(gaps[2])


def test_hard_guides_are_refused():
    x, y = noisy_points(4, 0.5, 0)
    guide = AutoGumbelMatching(model)
    for call in (lambda: saturation(guide, x, y, 0.5), lambda: relaxation_gap(model, guide, x, y, 0.5)):
        with pytest.raises(ValueError, match="guide must have a relaxed permutation site.*but draws 'P' only"):
            call()


# --- the effect of the temperature


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize(("scale", "seed", "temperature", "warns"), [(0.5, 1, 1.0, True), (2.0, 2, 0.2, False)])
def test_warning_where_hard_marginals_are_far_from_the_enumerated(scale, seed, temperature, warns):
    relaxed, guide, args = fitted(4, scale, seed, temperature)
    want = exact(*args)[1]
    error = float((guide.hard_sample((5000,))["P"].mean(0) - want).abs().max())
    if warns:
        with pytest.warns(TemperatureWarning, match="a probability of a pair moves at site 'P' by"):
            found = check_temperature_effect(relaxed, guide, *args, num_draws=2000, max_plate_nesting=0)
        assert error > 0.25
    else:
        found = check_temperature_effect(relaxed, guide, *args, num_draws=2000, max_plate_nesting=0)  # warnings are errors
        assert error < 0.15
    assert float((found.corrected["P"] - want).abs().max()) < 0.1
    assert found.shift["P"] == float((found.marginals["P"] - found.corrected["P"]).abs().max())


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("shared", [False, True])
def test_corrected_marginals_are_right_in_plates_beside_continuous_latents(shared):
    # Two items with a normal latent, shared or of each its own; enumerated with the latent on a grid. 0.08: 4 errors of
    # 4,000 draws.
    weight = torch.tensor([0.0, 1.5])

    def worms():
        plate = pyro.plate("worms", 2)
        with contextlib.nullcontext() if shared else plate:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with plate:
            P = pyro.sample("P", pgs.UniformPermutation(2))
            pyro.factor("score", (weight + z) * P[..., 0, 0])

    guide = AutoGuideList(worms)
    guide.append(pgs.AutoGumbelSinkhorn(poutine.block(worms, expose=["P"]), temperature=0.7, objective="tightened_kl"))
    guide.append(AutoNormal(poutine.block(worms, hide=["P"]), init_scale=1.0))
    found = check_temperature_effect(
        pgs.relax(worms, temperature=0.7), guide, num_draws=4000, tolerance=0.9, max_plate_nesting=1
    )
    z = torch.linspace(-6, 6, 400)
    matched = (weight + z[:, None]).exp()
    evidence = ((matched + 1) / 2).log()
    if shared:
        evidence = evidence.sum(-1, keepdim=True)
    weights = (dist.Normal(0.0, 1.0).log_prob(z)[:, None] + evidence).softmax(0)
    want = (weights * matched / (matched + 1)).sum(0)
    assert (found.corrected["P"][:, 0, 0] - want).abs().max() < 0.08
    assert (found.marginals["P"][1, 0, 0] - want[1]).abs() > 0.15


def test_too_few_effective_draws_are_said():
    x, y = noisy_points(5, 0.1, 0)
    guide = pgs.AutoGumbelSinkhorn(model)
    with pytest.warns(TemperatureWarning, match="cannot be told.*fewer than 10 effective draws of 50"):
        check_temperature_effect(pgs.relax(model), guide, x, y, 0.1, num_draws=50)


def test_errors_of_the_check():
    x, y = noisy_points(4, 0.5, 0)
    guide = pgs.AutoGumbelSinkhorn(model)
    with pytest.raises(ValueError, match=r"relaxed value.*pyro_gs\.relax"):
        check_temperature_effect(model, guide, x, y, 0.5)
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1, but is 2"):
        check_temperature_effect(pgs.relax(model), guide, x, y, 0.5, tolerance=2)

    pyro.clear_param_store()

    def worms():
        with pyro.plate("worms", 5, subsample_size=2):
            pyro.sample("P", pgs.UniformPermutation(3))

    with pytest.raises(ValueError, match="plate 'worms' must not be subsampled here, but shows 2 of 5 items"):
        check_temperature_effect(pgs.relax(worms), pgs.AutoGumbelSinkhorn(worms))


# --- densities that are not finite


def spoiled(value):
    """A model whose likelihood is a constant, or what is added to it."""

    def own():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("score", P.sum((-2, -1)) * value)

    return pgs.relax(own), pgs.AutoGumbelSinkhorn(own)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_densities_that_are_not_finite_are_refused(value):
    found = spoiled(value)
    with pyro.validation_enabled(False):  # under which Pyro refuses or warns itself
        with pytest.raises(ValueError, match="log density of everything but the permutations, at relaxed ones, is"):
            relaxation_gap(*found, num_draws=2)
        with pytest.raises(ValueError, match="the largest log weight of the draws of site 'P' is"):
            check_temperature_effect(*found, num_draws=2)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_gradients_that_are_not_finite_are_refused():
    def own():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("score", (P[..., 0, 0] - P[..., 0, 0].detach()).sqrt())  # 0, and no gradient there

    with pytest.raises(ValueError, match=r"the gradient of parameter '.*free_logits\.P' is (nan|-?inf)"):
        gradient_variance(Trace_ELBO(), pgs.relax(own), pgs.AutoGumbelSinkhorn(own), num_draws=2)


def test_a_model_without_likelihood_has_no_gap():
    def prior():
        pyro.sample("P", pgs.UniformPermutation(3))

    for nesting in (None, 0):
        found = relaxation_gap(pgs.relax(prior), pgs.AutoGumbelSinkhorn(prior), num_draws=3, max_plate_nesting=nesting)
        assert (found.relaxed, found.gap, found.standard_error) == (0.0, 0.0, 0.0)

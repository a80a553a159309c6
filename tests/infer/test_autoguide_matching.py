import copy
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from matching_model import exact, log_likelihood, model, noisy_points
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam, ClippedAdam

import pyro_gs as pgs
from pyro_gs.infer.autoguide_matching import AutoGumbelMatching
from pyro_gs.infer.matching_objective import DecayingAverage, GuideGumbelMatching, centred

TRIDIAGONAL = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
BAND = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()


def particles(number, nesting=0):
    return Trace_ELBO(num_particles=number, vectorize_particles=True, max_plate_nesting=nesting)


def fit(model, guide, args, steps=400, lr=0.1, number=8, nesting=0):
    svi = SVI(model, guide, ClippedAdam({"lr": lr, "lrd": 0.05 ** (1 / steps)}), particles(number, nesting))
    return [svi.step(*args) for _ in range(steps)]


def gradients(model, guide, args, repeats, number=100):
    """Gradients of repeated estimates of the loss with respect to the logits of P, (repeats, n, n)."""
    elbo, out = particles(number), []
    for _ in range(repeats):
        free = guide.free_logits.P_unconstrained
        free.grad = None
        elbo.loss_and_grads(model, guide, *args)
        out.append(free.grad.clone())
    return torch.stack(out)


def exact_loss(logits, prior_logits, score, kl=pgs.tightened_kl):
    """Minus the objective by enumeration: expected score under the exact probabilities, and the bound of the KL."""
    law = pgs.GumbelMatching(logits)
    P = law.enumerate_support()
    log_q = law.log_prob(P)
    bound = kl(pgs.GumbelSinkhorn(1.0, logits), pgs.GumbelSinkhorn(1.0, prior_logits))
    return bound - (log_q.exp() * torch.where(log_q > -torch.inf, score(P), 0.0)).sum()


def exact_gradient(logits, prior_logits, score):
    logits = logits.clone().requires_grad_(True)
    (out,) = torch.autograd.grad(exact_loss(logits, prior_logits, score), logits)
    return torch.where(logits > -torch.inf, out, 0.0)


# --- gradients


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("forbid", [False, True])
def test_score_gradient_is_unbiased(forbid):
    # Every entry within 4.7 standard errors of the exact gradient: for nine entries a failure rate of 2e-5. The baseline
    # learns along the way. The exact gradient is that of the probabilities of test_gumbel_matching.py; one difference
    # quotient checks it here again.
    x, y = noisy_points(3, 0.7, 1)
    start = torch.zeros(3, 3).masked_fill(~TRIDIAGONAL, -torch.inf) if forbid else torch.zeros(3, 3)

    def own(x, y):
        P = pyro.sample("P", pgs.GumbelMatching(start))
        pyro.sample("y", dist.Normal(P @ x, 0.7).to_event(2), obs=y)

    guide = AutoGumbelMatching(own, init_scale=0.7)
    guide(x, y)
    found = gradients(own, guide, (x, y), 300, number=50)
    logits, shift = guide.logits("P").detach(), torch.tensor([[1e-4, 0, 0], [0, 0, 0], [0, 0, 0]])

    def score(P):
        return log_likelihood(P, x, y, 0.7)

    want = exact_gradient(logits, start, score)
    up, down = (exact_loss(logits + sign * shift, start, score) for sign in (1, -1))
    assert float(up - down) / 2e-4 == pytest.approx(float(want[0, 0]), rel=1e-4)
    error = found.std(0) / len(found) ** 0.5
    assert want.abs().max() > 20 * error.max()  # the test can tell it from zero
    assert ((found.mean(0) - want).abs() <= 4.7 * error).all()


@pytest.mark.usefixtures("float64_only")
def test_perturb_and_map_gradient_of_a_linear_likelihood():
    # Unbiased as the strength falls: at .1 a bias of 4% of the gradient is left.
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))

    def linear():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("score", (weights * P).sum((-2, -1)))

    guide = AutoGumbelMatching(linear, init_scale=0.7, gradient="perturb_and_map", strength=0.1)
    guide()
    found = gradients(linear, guide, (), 200)
    want = exact_gradient(guide.logits("P").detach(), torch.zeros(3, 3), lambda P: (weights * P).sum((-2, -1)))
    error = found.std(0) / len(found) ** 0.5
    kl_only = exact_gradient(guide.logits("P").detach(), torch.zeros(3, 3), lambda P: torch.zeros(len(P)))
    size = (want - kl_only).abs().max()
    assert size > 20 * error.max()
    assert ((found.mean(0) - want).abs() <= 4.7 * error + 0.04 * size).all()


def test_perturb_and_map_scales_with_the_loss(tol):
    z = torch.randn(5, 4, 4)
    gradient = []
    for scale in (1.0, 1e-3):
        law = GuideGumbelMatching(z.clone().requires_grad_(True), gradient="perturb_and_map", strength=2.0)
        torch.manual_seed(1)
        (scale * (law.rsample() * z).sum()).backward()
        gradient.append(law.logits.grad)
    assert gradient[0].abs().max() > 0.1
    assert torch.allclose(gradient[0] * 1e-3, gradient[1], rtol=tol, atol=tol * 1e-3)
    assert gradient[0].sum(-1).abs().max() < 10 * tol


def test_centring_leaves_a_gradient_of_the_law_alone(tol):
    weight = torch.randn(7, 4, 4)
    full = centred(weight, torch.ones(4, 4).bool())
    assert max(full.sum(dim).abs().max() for dim in (-1, -2)) < tol
    assert (centred(full, torch.ones(4, 4).bool()) - full).abs().max() < tol
    assert (centred(weight, BAND)[..., ~BAND] == 0).all()


@pytest.mark.usefixtures("float64_only")
def test_baseline_lowers_the_variance():
    # Total variance of the gradient of 20 particles, at the start: 2.1 times lower on this instance.
    x, y = noisy_points(5, 0.5, 0)
    totals = {}
    for decay in (None, 0.9):
        pyro.clear_param_store()
        guide = AutoGumbelMatching(model, baseline_decay=decay)
        guide(x, y, 0.5)
        totals[decay] = float(gradients(model, guide, (x, y, 0.5), 320, number=20)[20:].var(0).sum())
    assert totals[0.9] < 0.67 * totals[None]


def test_decaying_average_by_item(tol):
    average = DecayingAverage(torch.Size((3,)), 0.5)
    first = average.subtract(torch.tensor([[1.0, 10.0], [3.0, 30.0]]), torch.tensor([0, 2]))
    assert torch.equal(first, torch.tensor([[1.0, 10.0], [3.0, 30.0]]))  # nothing is known yet
    second = average.subtract(torch.tensor([[5.0, 7.0]]), torch.tensor([0, 1]))
    assert (second - torch.tensor([[3.0, 7.0]])).abs().max() < tol
    third = average.subtract(torch.tensor([[0.0, 0.0]]), torch.tensor([0, 2]))
    # of item 0: (.25 * 2 + .5 * 5) / .75
    assert (third - torch.tensor([[-4.0, -20.0]])).abs().max() < tol


# --- bounds


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("objective", ["tightened_kl", "noise_kl"])
@pytest.mark.parametrize("gradient", ["score", "perturb_and_map"])
def test_fit_reaches_the_optimum_below_the_evidence(gradient, objective):
    # n = 3: the objective is known, and its optimum found by deterministic descent. 0.03 nats: noise of the last steps; 0.1:
    # bias of perturb-and-MAP.
    scale = 1.0
    x, y = noisy_points(3, scale, 2)
    guide = AutoGumbelMatching(model, gradient=gradient, objective=objective)
    fit(model, guide, (x, y, scale), 300, number=16)
    kl = pgs.tightened_kl if objective == "tightened_kl" else pgs.gumbel_noise_kl

    def score(P):
        return log_likelihood(P, x, y, scale)

    found = float(exact_loss(guide.logits("P").detach(), torch.zeros(3, 3), score, kl))
    logits = torch.zeros(3, 3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=25, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = exact_loss(logits, torch.zeros(3, 3), score, kl)
        loss.backward()
        return loss

    optimizer.step(closure)
    best = float(exact_loss(logits.detach(), torch.zeros(3, 3), score, kl))
    assert found - best < (0.03 if gradient == "score" else 0.1)
    assert -found < exact(x, y, scale)[0]


PRIORS = {
    "uniform": (lambda: pgs.UniformPermutation(4), 0.5),
    "gumbel matching": (lambda: pgs.GumbelMatching(2 * torch.eye(3).masked_fill(~TRIDIAGONAL, -torch.inf)), 0.5),
    "gibbs": (lambda: pgs.GibbsPermutation(2 * torch.eye(4)), 0.5),
    "plackett-luce": (lambda: pgs.PlackettLuce(torch.tensor([0.0, 1.0, 2.0, 3.0])), 0.5),
    "mallows": (lambda: pgs.Mallows(torch.eye(5), 1.0), 0.5),
    "masked uniform": (lambda: pgs.UniformPermutation(3, TRIDIAGONAL), 0.5),
    "masked gibbs": (lambda: pgs.GibbsPermutation(torch.eye(3).masked_fill(~TRIDIAGONAL, -torch.inf)), 0.5),
}


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("name", PRIORS)
def test_bound_lies_below_the_evidence_of_every_prior(name):
    # The evidence of the very prior of the model, by enumeration.
    make, scale = PRIORS[name]
    prior = make()
    x, y = noisy_points(prior.n, scale, 1)

    def own(x, y):
        P = pyro.sample("P", make())
        pyro.sample("y", dist.Normal(P.to(x) @ x, scale).to_event(2), obs=y)

    P = prior.enumerate_support()
    evidence = float(torch.logsumexp(prior.log_prob(P) + log_likelihood(P, x, y, scale), 0))
    guide = AutoGumbelMatching(own, baseline_decay=0.9)
    losses = fit(own, guide, (x, y), 120)
    with torch.no_grad():
        late = torch.tensor([particles(20).loss(own, guide, x, y) for _ in range(30)])
    assert -late.mean() + 4 * late.std() / 30**0.5 < evidence
    assert late.mean() < sum(losses[:10]) / 10


@pytest.mark.usefixtures("float64_only")
def test_bound_is_tight_where_the_guide_is_the_prior():
    # Nothing is observed: the loss is the KL, zero at the prior, also of laws whose log-probability enters.
    for make in (lambda: pgs.UniformPermutation(4), lambda: pgs.GumbelMatching(torch.zeros(4, 4))):
        pyro.clear_param_store()

        def own(make=make):
            pyro.sample("P", make())

        guide = AutoGumbelMatching(own, init_scale=0.0)
        assert abs(Trace_ELBO().loss(own, guide)) < 1e-8


@pytest.mark.usefixtures("float64_only")
def test_mean_field_elbo_takes_the_bound():
    x, y = noisy_points(4, 0.5, 0)
    for objective, kl in (("tightened_kl", pgs.tightened_kl), ("noise_kl", pgs.gumbel_noise_kl)):
        pyro.clear_param_store()
        guide = AutoGumbelMatching(model, init_scale=1.0, objective=objective, gradient="perturb_and_map")
        losses = [elbo(num_particles=2000, vectorize_particles=True, max_plate_nesting=0).loss(model, guide, x, y, 0.5)
                  for elbo in (Trace_ELBO, TraceMeanField_ELBO)]  # fmt: skip
        assert losses[0] == pytest.approx(losses[1], abs=4.7 * 2**0.5 * 20 / 2000**0.5)  # sd of the likelihood: below 20
        logits = guide.logits("P").detach()
        q = pgs.GumbelSinkhorn(1.0, logits)
        want = kl(q, pgs.GumbelSinkhorn(1.0, torch.zeros(4, 4)))
        got = torch.distributions.kl_divergence(
            GuideGumbelMatching(logits, objective, "perturb_and_map"), pgs.UniformPermutation(4)
        )
        assert float(got) == pytest.approx(float(want))
    svi = SVI(model, AutoGumbelMatching(model), Adam({"lr": 0.1}), TraceMeanField_ELBO())
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="it would train nothing; use Trace_ELBO"):
        svi.step(x, y, 0.5)


# --- Pyro


@pytest.mark.parametrize("gradient", ["score", "perturb_and_map"])
@pytest.mark.parametrize("vectorized", [True, False])
def test_subsampled_plate(gradient, vectorized):
    # Items at very different scales, so that one baseline for all would serve none.
    offset = torch.tensor([0.0, 50.0, -30.0, 10.0, 0.0])

    def worms():
        with pyro.plate("worms", 5, subsample_size=2) as index:
            P = pyro.sample("P", pgs.UniformPermutation(3))
            pyro.factor("score", 10 * P[..., 0, 0] + offset[index])

    guide = AutoGumbelMatching(worms, gradient=gradient)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=vectorized, max_plate_nesting=1)
    svi = SVI(worms, guide, Adam({"lr": 0.1}), elbo)
    for _ in range(120):
        svi.step()
    logits = guide.logits("P")
    assert logits.shape == (5, 3, 3)
    assert (guide.hard_sample((500,))["P"].mean(0)[:, 0, 0] > 0.55).all()


@pytest.mark.parametrize("gradient", ["score", "perturb_and_map"])
def test_sites_with_events_and_masks(gradient):
    def worms():
        with pyro.plate("weeks", 3, subsample_size=2):
            P = pyro.sample("P", pgs.UniformPermutation(3).expand([2, 2]).to_event(1))
            pyro.factor("score", 10 * P[..., 0, 0].sum(-1))
        with pyro.plate("days", 2), poutine.mask(mask=torch.tensor([True, False])):
            Q = pyro.sample("Q", pgs.UniformPermutation(3))
            pyro.factor("more", 10 * Q[..., 0, 0])

    guide = AutoGumbelMatching(worms, gradient=gradient)
    svi = SVI(worms, guide, Adam({"lr": 0.1}), particles(4, 1))
    for _ in range(100):
        svi.step()
    draws = guide.hard_sample((300,))
    assert draws["P"].shape == (300, 3, 2, 3, 3)
    assert (draws["P"].mean(0)[..., 0, 0] > 0.55).all()
    assert draws["Q"].mean(0)[0, 0, 0] > 0.55


def test_draws_are_hard_and_predictive_takes_them():
    x, y = noisy_points(4, 0.5, 0)
    guide = AutoGumbelMatching(model)
    value = guide(x, y, 0.5)["P"]
    assert pgs.constraints.permutation.check(value)
    assert torch.equal(guide.median()["P"], pgs.matching(guide.logits("P")))
    draws = Predictive(model, guide=guide, num_samples=20)(x, y, 0.5)["P"]
    assert pgs.constraints.permutation.check(draws).all()
    with pytest.raises(NotImplementedError, match="no relaxed draws"):
        guide.relaxed_sample()
    assert not hasattr(guide, "temperature")


def test_with_continuous_latents_and_a_copy():
    x, y = noisy_points(4, 0.3, 1)

    def joint(x, y):
        scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        P = pyro.sample("P", pgs.UniformPermutation(4))
        pyro.sample("y", dist.Normal(P.to(x) @ x, scale[..., None, None]).to_event(2), obs=y)

    guide = AutoGuideList(joint)
    guide.append(AutoGumbelMatching(poutine.block(joint, expose=["P"])))
    guide.append(AutoNormal(poutine.block(joint, hide=["P"])))
    losses = fit(joint, guide, (x, y), 150, lr=0.05)
    assert sum(losses[-20:]) < sum(losses[:20])
    assert set(guide.median(x, y)) == {"P", "scale"}
    twin = copy.deepcopy(guide)
    assert torch.equal(twin[0].logits("P"), guide[0].logits("P"))


# --- errors


def test_priors_without_a_bound_are_refused_with_a_repair():
    x, y = noisy_points(4, 0.5, 0)
    with pytest.raises(NotImplementedError, match=r"pyro.sample\('P', pyro_gs.GumbelMatching\(law.log_weights\)\)"):
        AutoGumbelMatching(model)(x, y, 0.5, BAND)

    def repaired(x, y):
        law = pgs.UniformPermutation(4, BAND)
        P = pyro.sample("P", pgs.GumbelMatching(law.log_weights))
        pyro.sample("y", dist.Normal(P @ x, 0.5).to_event(2), obs=y)

    assert math.isfinite(SVI(repaired, AutoGumbelMatching(repaired), Adam({"lr": 0.1}), Trace_ELBO()).step(x, y))


def test_relaxed_models_are_refused():
    x, y = noisy_points(4, 0.5, 0)
    with pytest.raises(ValueError, match="site 'P' is GumbelSinkhorn; give it and SVI the plain model"):
        AutoGumbelMatching(pgs.relax(model))(x, y, 0.5)
    svi = SVI(pgs.relax(model), AutoGumbelMatching(model), Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(ValueError, match="GumbelSinkhorn does not score; give SVI the plain model"):
        svi.step(x, y, 0.5)


def test_perturb_and_map_needs_the_gradient_of_the_prior():
    def ranking():
        pyro.sample("P", pgs.PlackettLuce(torch.zeros(3)))

    with pytest.raises(NotImplementedError, match=r"PlackettLuce at site 'P' has no gradient.*gradient='score'"):
        AutoGumbelMatching(ranking, gradient="perturb_and_map")()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"objective": "density"}, "objective must be one of tightened_kl, noise_kl, but is 'density'"),
        ({"gradient": "rebar"}, "gradient must be one of score, perturb_and_map, but is 'rebar'"),
        ({"strength": 0.0}, "strength must be a positive finite number, but is 0.0"),
        ({"baseline_decay": 1.0}, "baseline_decay must be None, or at least 0 and below 1, but is 1.0"),
        ({"init_scale": -1.0}, "init_scale must be a finite number of at least 0, but is -1.0"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        AutoGumbelMatching(model, **options)

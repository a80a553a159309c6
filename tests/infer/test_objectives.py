"""Each objective of the guide against the exact evidence of the prior that it bounds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from matching_model import exact, log_likelihood, model, noisy_points
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import ClippedAdam

import pyro_gs as pgs
from pyro_gs.infer.objective import OBJECTIVES, GuideGumbelSinkhorn

SCALE = 0.5
BAND = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()
# Of the density at n = 4 (docs/density.md says .001 nats in the mean for a law's own samples); n = 3 is exact, but slow.
DENSITY = 0.01
pytestmark = pytest.mark.usefixtures("float64_only")


def mask_logits(allowed, n):
    return torch.zeros(n, n) if allowed is None else torch.where(allowed, 0.0, -torch.inf)


def log_mean(log_w):
    """Logarithm of the mean of weights, and its standard error."""
    w = (log_w - log_w.max()).exp()
    return float(w.mean().log() + log_w.max()), float(w.std() / w.mean()) / len(w) ** 0.5


def discrete_evidence(x, y, allowed=None):
    """Log evidence under the prior M(eps) and its standard error: enumerated, or from a long run with forbidden pairs."""
    if allowed is None:
        return exact(x, y, SCALE)[0], 0.0
    draws = pgs.GumbelMatching(mask_logits(allowed, len(x))).sample(torch.Size((400_000,)))
    return log_mean(log_likelihood(draws, x, y, SCALE))


def fit(guide, x, y, allowed=None, tau=1.0, steps=120, elbo=None):
    elbo = elbo or Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(pgs.relax(model, temperature=tau), guide, optimizer, elbo)
    for _ in range(steps):
        svi.step(x, y, SCALE, allowed)
    return guide.logits("P").detach()


@torch.no_grad()
def log_weights(logits, x, y, objective, hard, *, tau=1.0, tau0=1.0, count=4000):
    q = GuideGumbelSinkhorn(objective, tau, logits, hard=hard)
    P = q.rsample(torch.Size((count,)))
    prior = pgs.GumbelSinkhorn(tau0, torch.where(logits > -torch.inf, 0.0, -torch.inf))
    return log_likelihood(torch.as_tensor(P), x, y, SCALE) + prior.log_prob(P) - q.log_prob(P)


def elbo_of(log_w):
    return float(log_w.mean()), float(log_w.std()) / len(log_w) ** 0.5


def weighted(log_w, particles):
    return elbo_of(torch.logsumexp(log_w.reshape(-1, particles), -1) - math.log(particles))


# --- values of the guide


@pytest.mark.parametrize("allowed", [None, BAND])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_hard_draws_are_permutations_with_the_relaxed_gradient(allowed, objective):
    logits = (torch.randn(4, 4) + mask_logits(allowed, 4)).requires_grad_()
    weight = torch.randn(4, 4)
    grads = []
    for hard in (True, False):
        torch.manual_seed(1)
        P = GuideGumbelSinkhorn(objective, 0.7, logits, hard=hard).rsample((5,))
        assert hard == bool(((P == 0) | (P == 1)).all())
        grads.append(torch.autograd.grad((P * weight).sum(), logits)[0])
    assert torch.equal(*grads)
    torch.manual_seed(1)
    expanded = GuideGumbelSinkhorn(objective, 0.7, logits, hard=True).expand((5,)).rsample()
    torch.manual_seed(1)
    assert torch.equal(expanded, GuideGumbelSinkhorn(objective, 0.7, logits, hard=True).rsample((5,)))


@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_pyros_elbo_is_the_mean_of_the_weights(objective, elbo_class):
    # the ELBO that Pyro computes from the guide is the bound that the tests below measure by log_weights
    x, y = noisy_points(4, SCALE, 0)
    start = torch.randn(4, 4)
    guide = pgs.AutoGumbelSinkhorn(model, temperature=0.6, objective=objective, hard=True, init_logits={"P": start})
    elbo = elbo_class(num_particles=4000, vectorize_particles=True, max_plate_nesting=0)
    loss = elbo.loss(pgs.relax(model, temperature=0.8), guide, x, y, SCALE)
    mean, error = elbo_of(log_weights(start, x, y, objective, True, tau=0.6, tau0=0.8))
    assert abs(-loss - mean) < 4.3 * 2**0.5 * error  # two independent estimates; 1.7e-5


# --- hard likelihood: the discrete evidence under M(X_0 + eps)


@pytest.mark.parametrize(
    ("n", "forbid", "count"),
    [(3, False, 1500), (4, False, 4000), (4, True, 4000), (5, False, 4000), (6, False, 4000)],
)
def test_hard_bounds_lie_below_the_discrete_evidence_in_order(n, forbid, count):
    x, y = noisy_points(n, SCALE, 1)
    allowed = BAND if forbid else None
    guide = pgs.AutoGumbelSinkhorn(model, objective="tightened_kl", hard=True)
    logits = fit(guide, x, y, allowed)
    evidence, evidence_error = discrete_evidence(x, y, allowed)
    log_w = []
    for objective in OBJECTIVES:
        torch.manual_seed(0)  # the same draws
        log_w.append(log_weights(logits, x, y, objective, True, count=count))
        bound, error = elbo_of(log_w[-1])
        assert bound + 4 * math.hypot(error, evidence_error) < evidence
    gain, error = elbo_of(log_w[0] - log_w[1])
    assert gain > 4 * error  # true densities beat the tightened KL
    assert (log_w[1] > log_w[2]).all()  # which beats the noise KL


@pytest.mark.parametrize("allowed", [None, BAND])
@pytest.mark.parametrize(("tau", "tau0"), [(1.0, 1.0), (0.7, 0.9)])
def test_hard_weights_with_true_densities_average_to_the_discrete_evidence(allowed, tau, tau0):
    # The weights of hard draws are unbiased for the evidence under M(eps), at any temperatures, also of guide and prior
    # apart; from a guide that was not fitted, so that the weights vary.
    x, y = noisy_points(4, SCALE, 1)
    logits = 2 * exact(x, y, SCALE)[1] + 0.5 * torch.randn(4, 4) + mask_logits(allowed, 4)
    found, error = log_mean(log_weights(logits, x, y, "density", True, tau=tau, tau0=tau0, count=10_000))
    evidence, evidence_error = discrete_evidence(x, y, allowed)
    assert error < 0.1
    assert abs(found - evidence) < 4.3 * math.hypot(error, evidence_error) + DENSITY  # 1.7e-5


def test_true_densities_with_a_common_temperature_do_not_depend_on_it():
    # X + eps up to the gauge is a function of the relaxed point at any temperature, so this KL is the same at all
    logits = torch.randn(4, 4)
    laws = [[pgs.GumbelSinkhorn(tau, x) for x in (logits, torch.zeros(4, 4))] for tau in (1.0, 0.3)]
    values = []
    for q, p in laws:
        torch.manual_seed(0)
        P = q.rsample((50,))
        values.append(q.log_prob(P) - p.log_prob(P))
    assert torch.allclose(*values, atol=1e-6)


# --- relaxed likelihood: the evidence of the relaxed model


@pytest.mark.parametrize("allowed", [None, BAND])
def test_relaxed_bounds_lie_below_the_relaxed_evidence(allowed):
    x, y = noisy_points(4, SCALE, 2)
    tau = 0.7
    guide = pgs.AutoGumbelSinkhorn(model, temperature=tau)
    logits = fit(guide, x, y, allowed, tau)
    prior = pgs.GumbelSinkhorn(tau, mask_logits(allowed, 4))
    with torch.no_grad():
        draws = prior.sample(torch.Size((200_000,)))
        evidence, evidence_error = log_mean(log_likelihood(torch.as_tensor(draws), x, y, SCALE))
    log_w = log_weights(logits, x, y, "density", False, tau=tau, tau0=tau, count=8000)
    same, error = log_mean(log_w)
    assert abs(same - evidence) < 4.3 * math.hypot(error, evidence_error) + DENSITY
    bounds = [elbo_of(log_w), weighted(log_w, 4), weighted(log_w, 40)]
    for bound, error in bounds[:2]:
        assert bound + 4 * math.hypot(error, evidence_error) < evidence
    assert bounds[0][0] + 4 * bounds[0][1] < bounds[1][0] < bounds[2][0]
    kl = [elbo_of(log_weights(logits, x, y, name, False, tau=tau, tau0=tau))[0] for name in OBJECTIVES[1:]]
    assert kl[1] < kl[0] < bounds[0][0]  # KL bounds of the relaxed evidence too, and looser


def test_relaxed_evidence_of_three_rows_by_the_exact_density():
    x, y = noisy_points(3, SCALE, 2)
    logits = 3 * exact(x, y, SCALE)[1]
    found, error = log_mean(log_weights(logits, x, y, "density", False, count=1000))
    with torch.no_grad():
        draws = pgs.GumbelSinkhorn(1.0, torch.zeros(3, 3)).sample(torch.Size((200_000,)))
        evidence, evidence_error = log_mean(log_likelihood(torch.as_tensor(draws), x, y, SCALE))
    assert abs(found - evidence) < 4.3 * math.hypot(error, evidence_error)
    assert error < 0.2


def test_training_shrinks_the_gap_of_the_relaxed_elbo():
    x, y = noisy_points(4, SCALE, 2)
    gaps = []
    for steps in (1, 120):
        pyro.clear_param_store()
        torch.manual_seed(0)
        logits = fit(pgs.AutoGumbelSinkhorn(model), x, y, steps=steps)
        log_w = log_weights(logits, x, y, "density", False, count=10_000)
        gaps.append(log_mean(log_w)[0] - elbo_of(log_w)[0])
    assert 0 < gaps[1] < 0.3 * gaps[0]


# --- importance weighting


@pytest.mark.parametrize("hard", [False, True])
def test_renyi_elbo_tightens_towards_the_evidence(hard):
    x, y = noisy_points(4, SCALE, 1)
    pyro.set_rng_seed(0)
    elbo = RenyiELBO(alpha=0, num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    guide = pgs.AutoGumbelSinkhorn(model, hard=hard)
    logits = fit(guide, x, y, elbo=elbo, steps=80)
    log_w = log_weights(logits, x, y, "density", hard, count=20_000)
    evidence, evidence_error = discrete_evidence(x, y) if hard else log_mean(log_w)
    relaxed = pgs.relax(model)
    bounds = []
    for particles, repeats in ((1, 200), (8, 60), (200, 12)):
        kind = Trace_ELBO() if particles == 1 else RenyiELBO(
            alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=0
        )  # fmt: skip
        found, found_error = elbo_of(torch.tensor([-kind.loss(relaxed, guide, x, y, SCALE) for _ in range(repeats)]))
        bound, error = weighted(log_w, particles)
        assert abs(found - bound) < 4.3 * math.hypot(found_error, error)  # Pyro's is that of the weights
        bounds.append(bound)
        if particles < 200:
            assert bound + 4 * math.hypot(error, evidence_error) < evidence
    assert bounds[0] < bounds[1] < bounds[2]
    # half the weights' relative variance over K = 200 is left of the gap
    assert abs(bounds[2] - evidence) < 4 * math.hypot(error, evidence_error) + 0.05


def test_renyi_elbo_with_a_kl_bounds_nothing():
    # Its particles share the KL, so it tends to log E_q[likelihood] - KL, which can exceed the evidence.
    def pair(strength):
        P = pyro.sample("P", pgs.UniformPermutation(2))
        pyro.factor("fit", torch.where(P[..., 0, 0] > 0.5, strength, -strength))

    strength = torch.tensor(8.0)
    evidence = float(torch.logaddexp(strength, -strength)) - math.log(2)
    start = {"P": torch.tensor([[0.3, 0.0], [0.0, 0.3]])}
    guide = pgs.AutoGumbelSinkhorn(pair, objective="tightened_kl", hard=True, init_logits=start)
    relaxed = pgs.relax(pair)
    assert -Trace_ELBO(num_particles=100).loss(relaxed, guide, strength) < evidence
    weighted_elbo = RenyiELBO(alpha=0, num_particles=4000, vectorize_particles=True, max_plate_nesting=0)
    assert -weighted_elbo.loss(relaxed, guide, strength) > evidence


def test_expected_likelihood_is_what_pyro_sees():
    # with hard draws the likelihood in the trace is that of a permutation matrix
    x, y = noisy_points(4, SCALE, 0)
    seen = []

    def spy(x, y, scale):
        P = pyro.sample("P", pgs.UniformPermutation(4))
        seen.append(torch.as_tensor(P).detach())
        pyro.sample("y", dist.Normal(P @ x, scale).to_event(2), obs=y)

    guide = pgs.AutoGumbelSinkhorn(spy, hard=True)
    guide(x, y, SCALE)
    seen.clear()
    Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=0).loss(pgs.relax(spy), guide, x, y, SCALE)
    assert seen[-1].shape == (3, 4, 4)
    assert pgs.constraints.permutation.check(seen[-1]).all()

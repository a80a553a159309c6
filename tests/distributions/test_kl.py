import math

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_gs import (
    GibbsPermutation,
    GumbelMatching,
    GumbelSinkhorn,
    UniformPermutation,
    gumbel_noise_kl,
    monte_carlo_kl,
    tightened_kl,
)

ALLOWED = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("logit", "tau", "tau_0", "want"),
    [(0.0, 1.0, 1.0, 0.0), (2.0, 1.0, 1.0, 1.13534), (-3.0, 1.0, 1.0, 16.0855), (0.0, 0.5, 1.0, 0.884068)],
)
def test_noise_kl_of_an_entry(logit, tau, tau_0, want):
    q, p = GumbelSinkhorn(tau, torch.full((1, 1), logit)), GumbelSinkhorn(tau_0, torch.zeros(1, 1))
    assert float(gumbel_noise_kl(q, p)) == pytest.approx(want, abs=1e-4)


def test_noise_kl_matches_monte_carlo():
    x, x0, tau, tau_0 = torch.tensor([[0.5, -0.3], [1.0, 0.2]]), torch.tensor([[0.1, 0.0], [-0.4, 0.3]]), 0.7, 1.1
    q, p = GumbelSinkhorn(tau, x), GumbelSinkhorn(tau_0, x0)
    noise = torch.distributions.Gumbel(torch.zeros(()), torch.ones(())).sample((100_000, 2, 2))
    z = (x + noise) / tau
    ratio = torch.distributions.Gumbel(x / tau, 1 / tau).log_prob(z) - torch.distributions.Gumbel(
        x0 / tau_0, 1 / tau_0
    ).log_prob(z)
    total = ratio.sum((-1, -2))
    assert abs(float(total.mean()) - float(gumbel_noise_kl(q, p))) < 4 * float(total.std()) / 100_000**0.5


def test_shapes_sum_over_the_matrix():
    x = torch.randn(5, 3, 4, 4)
    q, p = GumbelSinkhorn(1.0, x), GumbelSinkhorn(torch.tensor([0.5, 1.0, 2.0]), torch.zeros(4, 4))
    for kl in (gumbel_noise_kl, tightened_kl, kl_divergence):
        assert kl(q, p).shape == (5, 3)
        assert torch.allclose(
            kl(q, p)[2, 1], kl(GumbelSinkhorn(1.0, x[2, 1]), GumbelSinkhorn(1.0, torch.zeros(4, 4))), rtol=1e-4
        )


def test_expanded_laws_cost_and_give_the_same():
    q, p = GumbelSinkhorn(0.7, torch.randn(3, 4, 4)), GumbelSinkhorn(1.0, torch.zeros(3, 4, 4))
    large = kl_divergence(q.expand((6, 3)), p.expand((6, 3)))
    assert large.shape == (6, 3)
    assert torch.allclose(large[4], kl_divergence(q, p))


@pytest.mark.usefixtures("float64_only")
def test_registered_kl_is_the_tightened_one_and_closed_form():
    # density.md: - sum log S(-X) - n^2 log n at equal temperatures and X_0 = 0
    from pyro_gs import log_sinkhorn

    x = 2 * torch.randn(6, 6)
    q, p = GumbelSinkhorn(1.0, x), GumbelSinkhorn(1.0, torch.zeros(6, 6))
    want = -log_sinkhorn(-x).sum() - 36 * math.log(6)
    assert float(kl_divergence(q, p)) == pytest.approx(float(want), rel=1e-9)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize(("tau", "tau_0"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5)])
def test_tightened_is_the_minimum_over_the_gauge(forbid, tau, tau_0):
    allowed = ALLOWED if forbid else torch.ones(4, 4, dtype=torch.bool)

    def law(t, x):
        return GumbelSinkhorn(t, x.masked_fill(~allowed, -torch.inf))

    x, x0 = torch.randn(4, 4), 0.5 * torch.randn(4, 4)
    p, bound = law(tau_0, x0), float(tightened_kl(law(tau, x), law(tau_0, x0)))
    r, c = torch.zeros(4, 1, requires_grad=True), torch.zeros(1, 4, requires_grad=True)
    optimizer = torch.optim.LBFGS([r, c], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def loss():
        optimizer.zero_grad()
        value = gumbel_noise_kl(law(tau, x + r + c), p)
        value.backward()
        return value

    optimizer.step(loss)
    assert bound == pytest.approx(float(loss().detach()), rel=1e-7)
    assert bound <= float(gumbel_noise_kl(law(tau, x), p))


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize(("tau", "tau_0"), [(1.0, 1.0), (0.5, 1.0), (0.7, 0.5)])
def test_tightened_bounds_the_true_divergence(forbid, tau, tau_0):
    torch.manual_seed(4)
    x = torch.randn(4, 4).masked_fill(~ALLOWED, -torch.inf) if forbid else 2 * torch.randn(5, 5)
    q, p = GumbelSinkhorn(tau, x), GumbelSinkhorn(tau_0, torch.zeros_like(x).masked_fill(x == -torch.inf, -torch.inf))
    value = q.sample(torch.Size((2000,)))
    ratio = q.log_prob(value) - p.log_prob(value)
    error = float(ratio.std()) / 2000**0.5
    assert float(ratio.mean()) - 4 * error > 0  # a KL that the estimate can tell from zero
    assert float(ratio.mean()) - 4 * error - 0.05 <= float(tightened_kl(q, p)) <= float(gumbel_noise_kl(q, p))


@pytest.mark.usefixtures("float64_only")
def test_gradients():
    x = torch.randn(2, 4, 4).requires_grad_()
    tau = torch.tensor(0.7, requires_grad=True)
    p = GumbelSinkhorn(1.0, torch.zeros(4, 4).masked_fill(~ALLOWED, -torch.inf))

    for kl in (gumbel_noise_kl, tightened_kl):
        assert torch.autograd.gradcheck(
            lambda z, t, kl=kl: kl(GumbelSinkhorn(t, z.masked_fill(~ALLOWED, -torch.inf)), p), (x, tau)
        )


def test_edges():
    q = GumbelSinkhorn(1.0, torch.randn(4, 4))
    masked = GumbelSinkhorn(1.0, torch.zeros(4, 4).masked_fill(~ALLOWED, -torch.inf))
    for kl in (gumbel_noise_kl, tightened_kl):
        assert float(kl(q, masked)) == math.inf  # another support
        assert float(kl(masked, q)) == math.inf
        assert float(kl(masked, masked)) == pytest.approx(0.0, abs=1e-5)
        with pytest.raises(ValueError, match="same event_shape"):
            kl(q, GumbelSinkhorn(1.0, torch.zeros(3, 3)))
    far = GumbelSinkhorn(1.0, torch.full((2, 2), -800.0).fill_diagonal_(0.0))
    assert float(gumbel_noise_kl(far, GumbelSinkhorn(1.0, torch.zeros(2, 2)))) == math.inf  # overflows, but is not NaN


def enumerated_kl(q, p):
    values = q.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape)).enumerate_support()
    log_q, log_p = q.log_prob(values), p.log_prob(values)
    return torch.where(log_q > -torch.inf, log_q.exp() * (log_q - log_p), 0.0).sum(0)


CIRCLE = (torch.arange(4)[None] - torch.arange(4)[:, None]) % 4 <= 1  # two permutations


@pytest.mark.parametrize(
    ("q", "p"),
    [
        (GibbsPermutation, GibbsPermutation),
        (GibbsPermutation, lambda x: UniformPermutation(4)),
        (lambda x: UniformPermutation(4, ALLOWED), GibbsPermutation),
        (lambda x: UniformPermutation(4, ALLOWED), lambda x: UniformPermutation(4)),
    ],
)
def test_kl_of_gibbs_laws(q, p, tol):
    q, p = q(2 * torch.randn(3, 4, 4)), p(torch.randn(3, 4, 4))
    found = kl_divergence(q, p)
    assert torch.allclose(found, enumerated_kl(q, p), atol=1000 * tol)
    assert (found > 0).all()
    batch = torch.Size((2, 3))
    wide = kl_divergence(q.expand(batch), p.expand(batch))
    assert torch.allclose(wide, found.expand(2, 3))


def test_kl_of_gibbs_laws_with_masks(tol):
    x = torch.randn(4, 4)
    q, p = GibbsPermutation(x.masked_fill(~CIRCLE, -torch.inf)), GibbsPermutation(x)
    assert float(kl_divergence(q, p) - enumerated_kl(q, p)) == pytest.approx(0, abs=100 * tol)
    assert float(kl_divergence(p, q)) == torch.inf
    assert float(kl_divergence(UniformPermutation(4), q)) == torch.inf
    assert float(kl_divergence(q, q)) == pytest.approx(0, abs=100 * tol)
    with pytest.raises(NotImplementedError, match=r"GibbsPermutation with n=21 has a component of more than 20 rows"):
        kl_divergence(GibbsPermutation(torch.zeros(21, 21)), UniformPermutation(21))
    with pytest.raises(NotImplementedError, match="the normalizer of a law is 'bethe'"):
        kl_divergence(p, GibbsPermutation(x, normalizer="bethe"))
    with pytest.raises(ValueError, match="same event_shape"):
        kl_divergence(p, GibbsPermutation(torch.zeros(3, 3)))


def test_gradient_of_the_kl_of_gibbs_laws(float64_only):
    x, y = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: kl_divergence(GibbsPermutation(x), GibbsPermutation(y)), (x, y))


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_bound_of_the_kl_of_matchings(scale):
    q, p = GumbelMatching(scale * torch.randn(20, 3, 3)), GumbelMatching(scale * torch.randn(20, 3, 3))
    assert (kl_divergence(q, p) >= enumerated_kl(q, p)).all()
    bound = kl_divergence(q, UniformPermutation(3))
    assert (bound >= enumerated_kl(q, UniformPermutation(3))).all()
    assert torch.allclose(bound, kl_divergence(q, GumbelMatching(torch.zeros(3, 3))))
    with pytest.raises(NotImplementedError, match=r"estimate it by pyro_gs.monte_carlo_kl\(q, p\)"):
        kl_divergence(GumbelMatching(torch.zeros(4, 4)), UniformPermutation(4, ALLOWED))


def test_monte_carlo_kl():
    q, p = GibbsPermutation(torch.randn(2, 4, 4)), GibbsPermutation(torch.randn(4, 4))
    value, error = monte_carlo_kl(q, p, 4000)
    assert value.shape == error.shape == (2,)
    assert ((value - kl_divergence(q, p)).abs() < 5 * error).all()
    value, _ = monte_carlo_kl(GibbsPermutation(torch.zeros(4, 4)), q, 100)  # the batch of p
    assert value.shape == (2,)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 2, but is 1"):
        monte_carlo_kl(q, p, 1)


def test_monte_carlo_kl_of_relaxed_laws():
    """Between zero and both bounds, and with a gradient."""
    x = torch.randn(3, 3, requires_grad=True)
    q, p = GumbelSinkhorn(0.7, x), GumbelSinkhorn(1.0, torch.zeros(3, 3))
    value, error = monte_carlo_kl(q, p, 2000)
    assert (value + 5 * error > 0).all()
    assert (value - 5 * error < tightened_kl(q, p)).all()
    (grad,) = torch.autograd.grad(value, x)
    assert grad.abs().max() > 0


@pytest.mark.usefixtures("float64_only")
def test_entropy_of_the_relaxed_law_and_its_gradient():
    """At a fixed seed the estimate is a differentiable function; its mean agrees with another sample's."""
    x = torch.randn(3, 3, requires_grad=True)

    def entropy(logits, tau):
        torch.manual_seed(3)
        return GumbelSinkhorn(tau, logits).entropy(8)

    assert torch.autograd.gradcheck(entropy, (x, torch.tensor(0.8, requires_grad=True)), atol=1e-4)
    law = GumbelSinkhorn(0.8, x.detach())
    draws = -law.log_prob(law.sample((4000,)))
    error = float(draws.std()) * (1 / 4000 + 1 / 2000) ** 0.5
    assert abs(float(law.entropy(2000)) - float(draws.mean())) < 5 * error


def test_monte_carlo_kl_of_laws_on_other_faces():
    x = torch.zeros(3, 3)
    less = x.clone()
    less[0, 0] = -torch.inf
    q = GumbelSinkhorn(1.0, torch.stack([x, less]))
    for validate in (True, False):
        p = GumbelSinkhorn(1.0, x, validate_args=validate)
        value, error = monte_carlo_kl(q, p, 10)
        assert value.tolist() == [0.0, torch.inf]
        assert error.isinf().tolist() == [False, True]
        value, _ = monte_carlo_kl(p, q, 10)
        assert value.tolist() == [0.0, torch.inf]


def test_bad_pairs():
    q = GumbelSinkhorn(1.0, torch.zeros(2, 3, 3))
    with pytest.raises(TypeError, match="p must be a distribution, but is int"):
        monte_carlo_kl(q, 3)
    with pytest.raises(ValueError, match=r"batch shapes that broadcast, but have \(2,\) and \(5,\)"):
        kl_divergence(GibbsPermutation(torch.zeros(2, 3, 3)), GibbsPermutation(torch.zeros(5, 3, 3)))
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1, but is 0"):
        q.entropy(0)


@pytest.mark.parametrize("kl", [gumbel_noise_kl, tightened_kl])
def test_other_laws_are_refused(kl):
    relaxed, hard = GumbelSinkhorn(1.0, torch.zeros(3, 3)), GibbsPermutation(torch.zeros(3, 3))
    for q, p, name in ((hard, relaxed, "q"), (relaxed, hard, "p")):
        with pytest.raises(TypeError, match=f"{name} must be a Gumbel-Sinkhorn law, but is GibbsPermutation"):
            kl(q, p)

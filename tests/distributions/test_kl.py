import math

import pytest
import torch
from torch.distributions import kl_divergence

from pyro_gs import GumbelSinkhorn, gumbel_noise_kl, tightened_kl

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

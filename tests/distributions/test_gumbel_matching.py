import math

import mpmath
import pytest
import torch
from enumeration import chi_square, entropy_by_enumeration, mean_by_enumeration

from pyro_gs import EstimateWarning, GumbelMatching, GumbelSinkhorn, to_index
from pyro_gs.distributions.matching_integral import log_pair_probability

BAND = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1


def noise_free(law, size):
    """Frequencies of the enumerated permutations among draws, and their standard errors."""
    values = law.enumerate_support()
    draws = law.sample(torch.Size((size,)))
    counts = torch.stack([(draws == value).all(-1).all(-1).double().mean(0) for value in values])
    return counts, (counts * (1 - counts) / size).sqrt()


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_exact_law(n, scale, tol):
    law = GumbelMatching(scale * torch.randn(n, n))
    assert law.is_exact
    assert float(law.log_prob(law.enumerate_support()).exp().sum()) == pytest.approx(1, abs=10 * tol)
    assert chi_square(law, 20_000) > 2e-5


@pytest.mark.usefixtures("float64_only")
def test_exact_law_of_three_rows_with_forbidden_pairs():
    logits = torch.zeros(3, 3).masked_fill(~BAND[:3, :3], -torch.inf)
    p = GumbelMatching(logits).log_prob(GumbelMatching(logits).enumerate_support()).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-10)
    # docs/density.md: not the uniform law
    assert sorted(p.tolist()) == pytest.approx([0.289, 0.354, 0.357], abs=2e-3)


@pytest.mark.usefixtures("float64_only")
def test_two_rows_in_closed_form():
    mpmath.mp.dps = 50
    for d in (-300.0, -20.0, -1.0, -0.051, -0.049, 0.0, 1e-6, 0.049, 0.051, 2.0, 40.0):
        t = mpmath.mpf(d)
        want = mpmath.mpf(1) / 2 if d == 0 else mpmath.e**t * (mpmath.e**t - 1 - t) / (mpmath.e**t - 1) ** 2
        found = float(log_pair_probability(torch.tensor(d)))
        assert found == pytest.approx(float(mpmath.log(want)), rel=1e-11, abs=1e-300)
    d = torch.tensor([-40.0, -1.0, -0.06, -0.01, 0.0, 0.02, 3.0], requires_grad=True)
    assert torch.autograd.gradcheck(log_pair_probability, d)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [2, 3])
def test_gradients_of_the_exact_law(n):
    logits = torch.randn(2, n, n, requires_grad=True)
    values = GumbelMatching(logits).enumerate_support()
    assert torch.autograd.gradcheck(lambda x: GumbelMatching(x).log_prob(values), logits)
    assert torch.autograd.gradcheck(lambda x: GumbelMatching(x).entropy(), logits)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("n", [4, 5])
def test_estimates_against_draws(n, scale):
    """4,000 particles: the estimate's standard deviation is below .02."""
    law = GumbelMatching(scale * torch.randn(n, n), num_particles=4000)
    assert not law.is_exact
    p = law.log_prob(law.enumerate_support()).exp()
    assert float(p.sum()) == pytest.approx(1, abs=0.02)
    frequency, error = noise_free(law, 40_000)
    often = frequency > 1e-3
    assert ((p - frequency)[often].abs() < 5 * error[often] + 0.06 * frequency[often]).all()


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [4, 7, 12])
def test_estimates_of_equal_logits(n):
    """Every permutation has 1 / n!; the mean of the estimates' exponentials is unbiased."""
    law = GumbelMatching(torch.zeros(n, n), num_particles=2000)
    runs = torch.stack([law.log_prob(torch.eye(n)) for _ in range(10)]) + math.lgamma(n + 1)
    weight = runs.exp()
    error = float(weight.std()) / math.sqrt(10)
    assert abs(float(weight.mean()) - 1) < 5 * error
    assert error < 0.1


@pytest.mark.usefixtures("float64_only")
def test_gradient_of_the_estimate():
    """What holds of the exact gradient holds of the estimate's, up to its noise."""
    logits = torch.randn(4, 4, requires_grad=True)
    law = GumbelMatching(logits, num_particles=4000)
    log_p = law.log_prob(law.enumerate_support())
    # The gradients of probabilities sum to zero.
    (grad,) = torch.autograd.grad(log_p.exp().sum(), logits)
    assert float(grad.abs().max()) < 0.05
    # Shifts of rows and columns change nothing.
    (grad,) = torch.autograd.grad(law.log_prob(torch.eye(4)), logits)
    assert float(grad.sum(-1).abs().max()) < 1e-9
    assert float(grad.sum(-2).abs().max()) < 0.1


def test_items_with_supports_of_their_own():
    masks = torch.stack([BAND, torch.block_diag(torch.ones(1, 1), torch.ones(3, 3)).bool()])
    law = GumbelMatching(torch.randn(2, 4, 4).masked_fill(~masks, -torch.inf), num_particles=4000)
    values = law.enumerate_support()
    p = law.log_prob(values).exp()
    assert torch.allclose(p.sum(0), torch.ones(2), atol=0.02)
    assert law.is_exact.tolist() == [False, True]
    frequency, error = noise_free(law, 20_000)
    assert ((p > 0) == (frequency > 0)).all()
    assert ((p - frequency).abs() <= 5 * error + 0.05 * frequency).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_bounds(scale, tol):
    law = GumbelMatching(scale * torch.randn(5, 3, 3))
    values = law.enumerate_support()
    low, high = law.log_prob_bounds(values)
    exact = law.log_prob(values)
    assert (low <= exact + 10 * tol).all()
    assert (exact <= high + 10 * tol).all()
    pair = GumbelMatching(scale * torch.randn(4, 2, 2))
    _, high = pair.log_prob_bounds(torch.eye(2))
    assert torch.allclose(high, pair.log_prob(torch.eye(2)), atol=10 * tol)  # one exchange is all there is
    masked = GumbelMatching(torch.zeros(4, 4).masked_fill(~BAND, -torch.inf))
    low, high = masked.log_prob_bounds(torch.eye(4).flip(0))
    assert float(low) == float(high) == -math.inf
    low, high = GumbelMatching(torch.randn(60, 60)).log_prob_bounds(torch.eye(60))
    assert low < high <= 0


def test_is_the_limit_of_the_relaxed_law():
    logits = torch.randn(4, 4)
    torch.manual_seed(1)
    hard = GumbelMatching(logits).sample((50,))
    torch.manual_seed(1)
    soft = GumbelSinkhorn(1e-3, logits).sample((50,))
    assert torch.allclose(hard, torch.as_tensor(soft), atol=1e-2)


def test_marginals(tol):
    law = GumbelMatching(torch.randn(2, 3, 3))
    mean, error = law.marginals(20_000)
    assert ((mean - mean_by_enumeration(law)).abs() < 5 * error).all()
    assert torch.allclose(mean.sum(-1), torch.ones(2, 3))
    sure, error = GumbelMatching(100 * torch.eye(3)).marginals(10)
    assert torch.equal(sure, torch.eye(3))
    assert (error > 0).all()  # ten draws do not prove it
    masked = torch.zeros(4, 4).masked_fill(~BAND, -torch.inf)
    assert (GumbelMatching(masked).marginals(10)[1][~BAND] == 0).all()


def test_entropy_and_mode(tol):
    law = GumbelMatching(torch.randn(3, 3))
    assert float(law.entropy() - entropy_by_enumeration(law)) == pytest.approx(0, abs=10 * tol)
    large = GumbelMatching(torch.zeros(4, 4), num_particles=500)
    assert float(large.entropy(50)) == pytest.approx(math.log(24), abs=0.1)  # log(24) for every draw, up to .03 of noise
    assert to_index(GumbelMatching(10 * torch.eye(4).roll(1, -1)).mode).tolist() == [1, 2, 3, 0]


def test_bad_input():
    with pytest.raises(NotImplementedError, match=r"estimated up to 32, but one has 33; take log_prob_bounds"):
        GumbelMatching(torch.zeros(33, 33)).log_prob(torch.eye(33))
    with pytest.raises(ValueError, match="num_particles must be an integer of at least 2, but is 0"):
        GumbelMatching(torch.zeros(3, 3), num_particles=0)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 2, but is 1"):
        GumbelMatching(torch.zeros(3, 3)).marginals(1)
    with pytest.raises(ValueError, match="value is not a permutation matrix"):
        GumbelMatching(torch.zeros(3, 3)).log_prob_bounds(torch.ones(3, 3))


@pytest.mark.usefixtures("float64_only")
def test_logits_far_apart():
    """Exact to entries of e^-90, then refused; nothing in between is wrong."""
    for scale in (10.0, 20.0):
        law = GumbelMatching(scale * torch.randn(10, 3, 3))
        p = law.log_prob(law.enumerate_support())
        assert torch.allclose(p.exp().sum(0), torch.ones(10), atol=1e-9)
        low, high = law.log_prob_bounds(law.enumerate_support())
        assert (low <= p + 1e-9).all()
        assert (p <= high + 1e-9).all()
    for n in (3, 5):
        with pytest.raises(NotImplementedError, match=r"above e\^-90, but logits have one of e\^-\d+ in a component of"):
            GumbelMatching(1000 * torch.randn(n, n)).log_prob(torch.eye(n))
    pair = GumbelMatching(1000 * torch.randn(2, 2))
    assert float(pair.log_prob(pair.enumerate_support()).exp().sum()) == pytest.approx(1)


def test_estimates_of_few_draws_warn():
    law = GumbelMatching(torch.randn(20, 20), num_particles=10)
    with pytest.warns(EstimateWarning, match=r"20 rows\) rests on fewer than 8 effective draws of 10; raise num_par"):
        law.log_prob(torch.eye(20))


def test_equal_permutations_and_single_rows():
    law = GumbelMatching(torch.zeros(2, 4, 4, requires_grad=True))
    value = torch.eye(4).expand(6, 2, 4, 4)
    log_p = law.log_prob(value)
    assert (log_p == log_p[0]).all()
    assert (log_p[:, 0] != log_p[:, 1]).all()  # two laws, though alike, have estimates of their own
    (grad,) = torch.autograd.grad(log_p[:, 1].sum(), law.logits)
    assert (grad[0] == 0).all()
    assert grad[1].abs().max() > 0.1
    alone = torch.zeros(1, 1, requires_grad=True)
    assert torch.autograd.grad(GumbelMatching(alone).log_prob(torch.eye(1)), alone)[0] == 0


def test_empty_batches():
    for n in (3, 4):
        assert GumbelMatching(torch.zeros(0, n, n)).log_prob(torch.eye(n)).shape == (0,)
        assert GumbelMatching(torch.zeros(n, n)).log_prob(torch.zeros(0, n, n)).shape == (0,)

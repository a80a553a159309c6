import itertools
import math

import pytest
import torch
from enumeration import chi_square, entropy_by_enumeration, enumerated, mean_by_enumeration

from pyro_gs import GumbelSinkhorn, to_matrix
from pyro_gs.distributions.plackett_luce import PlackettLuce


@pytest.mark.parametrize("n", [1, 2, 4])
def test_log_prob_is_a_product_of_choices(n, tol):
    scores = torch.randn(n)
    weights = [math.exp(float(s)) for s in scores]
    law, total = PlackettLuce(scores), 0.0
    for ranking in itertools.permutations(range(n)):
        want = math.prod(weights[k] / sum(weights[j] for j in ranking[i:]) for i, k in enumerate(ranking))
        assert float(law.log_prob(to_matrix(torch.tensor(ranking))).exp()) == pytest.approx(want, abs=tol)
        total += want
    assert total == pytest.approx(1.0)


def test_rows_are_positions():
    law = PlackettLuce(torch.tensor([0.0, 50.0, 100.0]))
    for value in (law.sample(), law.mode):
        assert (value @ torch.tensor([1.0, 2.0, 3.0])).tolist() == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_draws_have_these_probabilities(n, spread):
    assert chi_square(PlackettLuce(spread * torch.randn(n)), 200 * math.factorial(n)) > 2e-5  # the failure rate


def test_mode_is_the_most_probable():
    law = PlackettLuce(torch.randn(4, 5))
    values, log_p = enumerated(law)
    best = log_p.argmax(0)
    assert torch.equal(law.mode, torch.stack([values[best[i], i] for i in range(4)]))


def test_log_prob_ignores_a_common_shift_and_far_scores(tol):
    scores = torch.tensor([3e5, 0.0, -3e5], requires_grad=True)
    law = PlackettLuce(scores)
    log_p = law.log_prob(torch.eye(3).flip(0))
    log_p.backward()
    assert float(log_p.detach()) == pytest.approx(-9e5)
    assert scores.grad.tolist() == pytest.approx([-2.0, 1.0, 1.0])
    scores = torch.randn(6)
    value = PlackettLuce(scores).sample()
    assert torch.allclose(PlackettLuce(scores).log_prob(value), PlackettLuce(scores + 4).log_prob(value), atol=10 * tol)


@pytest.mark.usefixtures("float64_only")
def test_gradients():
    scores = torch.randn(3, 4, requires_grad=True)
    value = PlackettLuce(scores.detach()).sample()
    assert torch.autograd.gradcheck(lambda s: PlackettLuce(s).log_prob(value), scores)
    assert torch.autograd.gradcheck(lambda s: PlackettLuce(s).marginals(), scores)
    assert torch.autograd.gradcheck(lambda s: PlackettLuce(s).entropy(), scores)


# --- marginals


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("spread", [0.5, 5.0, 30.0])
def test_marginals_are_those_of_the_enumeration(n, spread, tol):
    law = PlackettLuce(spread * torch.randn(3, n))
    assert torch.allclose(law.marginals(), mean_by_enumeration(law), rtol=0, atol=tol)
    assert torch.equal(law.mean, law.marginals())


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [7, 18, 19, 60])
def test_marginals_of_many_items(n):
    scores = 2 * torch.randn(2, n)
    m = PlackettLuce(scores).marginals()
    ones = torch.ones(2, n)
    assert torch.allclose(m.sum(-1), ones, rtol=0, atol=1e-12)
    assert torch.allclose(m.sum(-2), ones, rtol=0, atol=1e-12)
    assert torch.allclose(m[:, 0], scores.softmax(-1), rtol=0, atol=1e-12)
    equal = PlackettLuce(torch.zeros(n)).marginals()
    assert torch.allclose(equal, torch.full((n, n), 1 / n), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64_only")
def test_marginals_of_many_items_by_sampling():
    law = PlackettLuce(torch.randn(25))
    draws = law.sample(torch.Size((20_000,)))
    m = law.marginals()
    z = (draws.mean(0) - m) / (m * (1 - m) / 20_000).sqrt()
    assert float(z.abs().max()) < 6.0  # of 625 frequencies; p-value about 1e-6


def test_marginals_of_distant_scores():
    scores = torch.tensor([0.0, 1e6, 1e6, -1e4], requires_grad=True)
    m = PlackettLuce(scores).marginals()
    want = torch.tensor([[0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    assert torch.allclose(m, want, atol=1e-6)
    m[0, 1].backward()
    assert torch.allclose(scores.grad, torch.tensor([0, 0.25, -0.25, 0]), atol=1e-6)


# --- entropy


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("spread", [0.0, 2.0, 30.0])
def test_entropy_is_that_of_the_enumeration(n, spread, tol):
    law = PlackettLuce(spread * torch.randn(2, n))
    assert torch.allclose(law.entropy(), entropy_by_enumeration(law), rtol=0, atol=10 * tol)


def test_entropy_of_many_items(tol):
    assert float(PlackettLuce(torch.zeros(13)).entropy()) == pytest.approx(math.lgamma(14), rel=tol)
    with pytest.raises(
        NotImplementedError, match=r"PlackettLuce with n=17 .* exact for n up to 16; estimate it by Monte Carlo"
    ):
        PlackettLuce(torch.zeros(17)).entropy()


# --- form


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_dtype_follows_the_scores(kind):
    law = PlackettLuce(torch.randn(2, 4, dtype=kind)).expand(torch.Size((3, 2)))
    value = law.sample()
    for result in (value, law.log_prob(value), law.mode, law.mean, law.entropy(), law.enumerate_support()):
        assert result.dtype == kind
    assert law.mean.shape == (3, 2, 4, 4)
    assert law.entropy().shape == (3, 2)
    assert repr(law) == "PlackettLuce(batch_shape=(3, 2), event_shape=(4, 4))"


def test_integer_values_score_too():
    law = PlackettLuce(torch.randn(4))
    value = law.sample()
    assert torch.equal(law.log_prob(value.long()), law.log_prob(value))


def test_empty_batches():
    law = PlackettLuce(torch.zeros(0, 3))
    assert law.sample().shape == law.mean.shape == (0, 3, 3)
    assert law.log_prob(law.sample()).shape == law.entropy().shape == (0,)


def test_infer_shapes():
    assert PlackettLuce.infer_shapes(scores=(5, 2, 3)) == ((5, 2), (3, 3))


@pytest.mark.parametrize(
    ("scores", "error", "text"),
    [
        ([1.0, 2.0], TypeError, r"scores must be a torch.Tensor of shape \(..., n\), but is list"),
        (torch.arange(3), TypeError, "scores must have dtype torch.float32 or torch.float64, but has torch.int64"),
        (torch.zeros(3).half(), TypeError, "scores must have dtype torch.float32 or torch.float64, but has torch.float16"),
        (torch.tensor(1.0), ValueError, r"scores must have shape \(..., n\) with n >= 1, but has shape \(\)"),
        (torch.zeros(2, 0), ValueError, r"scores must have shape \(..., n\) with n >= 1, but has shape \(2, 0\)"),
        (torch.tensor([0.0, -math.inf]), ValueError, "scores has the entry -inf at position 1; entries must be finite"),
        (torch.tensor([[0.0, 0.0], [math.inf, 0.0]]), ValueError, "scores of batch item 1 has the entry inf at position 0"),
        (torch.tensor([math.nan]), ValueError, "scores has the entry nan at position 0"),
    ],
)
def test_bad_arguments(scores, error, text):
    with pytest.raises(error, match=text):
        PlackettLuce(scores)


def test_bad_values():
    law = PlackettLuce(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="value of batch item 1 is not a permutation matrix, which PlackettLuce expects"):
        law.log_prob(torch.stack([torch.eye(3), torch.full((3, 3), 1 / 3)]))
    with pytest.raises(ValueError, match="it is a relaxed value, so relax the model too"):
        law.log_prob(GumbelSinkhorn(1.0, torch.zeros(2, 3, 3)).sample())
    with pytest.raises(ValueError, match=r"value must have shape \(..., 3, 3\), but has \(4, 4\)"):
        law.log_prob(torch.eye(4))

import itertools
import math

import pytest
import torch
from enumeration import chi_square, entropy_by_enumeration, enumerated, mean_by_enumeration

from pyro_gs import to_matrix
from pyro_gs.distributions.mallows import Mallows
from pyro_gs.ops.mallows import swap_probabilities
from pyro_gs.ops.ranking import kendall_distance


def centers(*shape):
    n = shape[-1]
    flat = torch.stack([torch.randperm(n) for _ in range(math.prod(shape[:-1]))])
    return to_matrix(flat.reshape(shape))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_log_prob_is_exponential_in_the_number_of_swapped_pairs(n, tol):
    center, theta = torch.randperm(n).tolist(), 0.7
    rankings = list(itertools.permutations(range(n)))
    pairs = list(itertools.combinations(center, 2))
    weights = [math.exp(-theta * sum(r.index(a) > r.index(b) for a, b in pairs)) for r in rankings]
    law = Mallows(to_matrix(torch.tensor(center)), theta)
    got = law.log_prob(to_matrix(torch.tensor(rankings))).exp()
    assert torch.allclose(got, torch.tensor(weights) / sum(weights), atol=tol)


def test_normalizer_is_the_product_of_the_paper(tol):
    theta = torch.tensor([0.05, 0.5, 2.0])
    k = torch.arange(1.0, 21)[:, None]
    want = ((1 - (-k * theta).exp()) / (1 - (-theta).exp())).log().sum(0)
    assert torch.allclose(-Mallows(torch.eye(20), theta).log_prob(torch.eye(20)), want, atol=100 * tol)


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("theta", [0.0, 0.4, 1.5])
def test_draws_have_these_probabilities(n, theta):
    assert chi_square(Mallows(centers(n), theta), 200 * math.factorial(n)) > 2e-5  # the failure rate


def test_draws_of_a_batch():
    law = Mallows(centers(3, 1, 8), torch.tensor([0.0, 0.5, 3.0, 800.0]))
    draws = law.sample(torch.Size((4000,)))
    distance = kendall_distance(draws, law.center).double()
    error = distance.std(0) / 4000**0.5
    assert ((distance.mean(0) - law.mean_distance()).abs() <= 5 * error + 1e-9).all()
    assert torch.equal(draws[0, :, 3], law.mode[:, 3])
    m = law.marginals()
    assert ((draws.mean(0) - m).abs() <= 6 * (m * (1 - m) / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_expectations_are_those_of_the_enumeration(n, tol):
    law = Mallows(centers(5, n), torch.tensor([0.0, 1e-9, 0.3, 2.0, 40.0]))
    values, log_p = enumerated(law)
    distance = (log_p.exp() * kendall_distance(values, law.center)).sum(0)
    assert torch.allclose(log_p.exp().sum(0), torch.ones(5), atol=tol)
    assert torch.allclose(law.mean_distance(), distance, atol=10 * tol)
    assert torch.allclose(law.entropy(), entropy_by_enumeration(law), atol=10 * tol)
    assert torch.allclose(law.marginals(), mean_by_enumeration(law), atol=tol)
    assert torch.equal(law.mean, law.marginals())


def test_marginals_of_many_items(tol):
    law = Mallows(torch.eye(60), torch.tensor([0.0, 0.1, 5.0]))
    m = law.marginals()
    assert torch.allclose(m.sum(-1), torch.ones(3, 60), atol=100 * tol)
    assert torch.allclose(m.sum(-2), torch.ones(3, 60), atol=100 * tol)
    assert torch.allclose(m[0], torch.full((60, 60), 1 / 60), atol=tol)
    assert torch.allclose(m, m.mT, atol=tol)  # a ranking and its inverse are as far from the identity


def test_swapped_pairs_by_mallows_formula(tol):
    theta, k = torch.tensor([[0.3], [1.0], [4.0]]), torch.arange(1.0, 8)

    def h(k):
        return k / (1 - (-k * theta).exp())

    assert torch.allclose(swap_probabilities(theta[:, 0], 8), (1 - h(k + 1) + h(k)).double(), atol=100 * tol)


@pytest.mark.usefixtures("float64_only")
def test_gradients():
    theta, center = torch.tensor([1e-3, 0.5, 3.0], requires_grad=True), centers(3, 5)
    value = Mallows(center, 0.3).sample()
    for f in (
        lambda t: Mallows(center, t).log_prob(value),
        lambda t: Mallows(center, t).mean_distance(),
        lambda t: Mallows(center, t).entropy(),
        lambda t: Mallows(center, t).marginals(),
    ):
        assert torch.autograd.gradcheck(f, theta)


@pytest.mark.parametrize("theta", [0.0, 900.0])
def test_gradients_at_the_ends(theta, tol):
    t = torch.tensor(theta, requires_grad=True)
    law = Mallows(torch.eye(5), t)
    log_p = law.log_prob(torch.eye(5)[[1, 0, 2, 3, 4]])
    (grad,) = torch.autograd.grad(log_p, t)
    assert float(grad) == pytest.approx(float(law.mean_distance().detach()) - 1, abs=tol)
    assert float(law.mean_distance().detach()) == pytest.approx(5.0 if theta == 0 else 0.0, abs=tol)
    (slope,) = torch.autograd.grad(law.mean_distance(), t)
    assert float(slope) == pytest.approx(-50 / 12 if theta == 0 else 0.0, abs=100 * tol)  # variance of inversions: 50 / 12
    assert float(law.entropy().detach()) == pytest.approx(math.log(120) if theta == 0 else 0.0, abs=10 * tol)


# --- form


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_dtype_follows_the_center(kind):
    law = Mallows(centers(2, 4).to(kind), torch.tensor(0.5, dtype=torch.float64)).expand(torch.Size((3, 2)))
    value = law.sample()
    for result in (value, law.log_prob(value), law.mode, law.mean, law.entropy(), law.mean_distance()):
        assert result.dtype == kind
    assert law.mean.shape == (3, 2, 4, 4)
    assert law.entropy().shape == law.mean_distance().shape == (3, 2)
    assert repr(law) == "Mallows(batch_shape=(3, 2), event_shape=(4, 4))"


def test_batch_of_theta_alone():
    law = Mallows(torch.eye(4), torch.tensor([[0.5], [1.0]]))
    assert law.batch_shape == (2, 1)
    assert law.sample(torch.Size((3,))).shape == (3, 2, 1, 4, 4)
    assert Mallows.infer_shapes(center=(3, 4, 4), theta=(2, 1)) == ((2, 3), (4, 4))


def test_empty_batches():
    law = Mallows(torch.zeros(0, 3, 3), 1.0)
    assert law.sample().shape == law.mean.shape == (0, 3, 3)
    assert law.log_prob(law.sample()).shape == law.entropy().shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([0, 1], 1.0), TypeError, r"center must be a permutation matrix .* is list; .* pass pyro_gs.to_matrix\(index\)"),
        (
            (torch.tensor([1, 0, 2]), 1.0),
            ValueError,
            r"center must be .* has shape \(3,\); .* pass pyro_gs.to_matrix\(index\)",
        ),
        (
            (torch.stack([torch.eye(3), torch.full((3, 3), 1 / 3)]), 1.0),
            ValueError,
            r"center of batch item 1 is not a permutation matrix.*pass pyro_gs.to_matrix\(index\)",
        ),
        (
            (torch.eye(3).long(), 1.0),
            TypeError,
            "center must have dtype torch.float32 or torch.float64, but has torch.int64",
        ),
        ((torch.eye(3), -0.1), ValueError, "theta must be at least 0 and finite, but is -0.1"),
        ((torch.eye(3), math.nan), ValueError, "theta must be at least 0 and finite, but is nan"),
        ((torch.eye(3, dtype=torch.float32), 1e60), ValueError, "theta must be at least 0 and finite, but is inf"),
        ((torch.eye(3), "1"), TypeError, "theta must be a number or a tensor, but is str"),
        (
            (torch.eye(3), torch.tensor([1.0, -1.0])),
            ValueError,
            r"theta must be at least 0 and finite, but is -1.0 at \(1,\)",
        ),
        ((torch.eye(3), torch.tensor(1)), TypeError, "theta must have a floating dtype"),
        ((torch.eye(3).expand(2, 3, 3), torch.ones(3)), ValueError, r"theta of shape \(3,\) does not broadcast with \(2,\)"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        Mallows(*arguments)


def test_bad_values():
    law = Mallows(torch.eye(3), 1.0)
    with pytest.raises(ValueError, match="value is not a permutation matrix, which Mallows expects"):
        law.log_prob(torch.full((3, 3), 1 / 3))
    unchecked = Mallows(torch.eye(3), 1.0, validate_args=False)
    assert float(unchecked.log_prob(torch.full((3, 3), 1 / 3))) == -math.inf

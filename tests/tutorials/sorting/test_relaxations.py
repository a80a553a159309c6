import math

import pytest
import torch

from tutorials.sorting.methods import ordering
from tutorials.sorting.relaxations import diff_sort, neural_sort, soft_sort


def odd_even(scores, temperature):
    return diff_sort(scores, temperature, "odd_even")


def bitonic(scores, temperature):
    return diff_sort(scores, temperature, "bitonic")


ALL = [neural_sort, soft_sort, odd_even, bitonic]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("relax", ALL)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 9])
def test_temperature_to_zero_gives_the_sorting_permutation(relax, n):
    scores = draw(4, n)
    # the Cauchy swaps of the networks are of order temperature / gap away from 0 and 1
    P = relax(scores, 1e-9).exp()
    torch.testing.assert_close(P, ordering(scores).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("relax", ALL)
def test_positions_are_distributions_over_items(relax):
    P = relax(draw(3, 2, 7), 0.7).exp()
    assert P.shape == (3, 2, 7, 7)
    torch.testing.assert_close(P.sum(-2), torch.ones(3, 2, 7, dtype=P.dtype))


@pytest.mark.parametrize("relax", [odd_even, bitonic])
def test_networks_are_doubly_stochastic(relax):
    torch.testing.assert_close(relax(draw(5, 6), 0.7).exp().sum(-1), torch.ones(5, 6, dtype=torch.float64))


@pytest.mark.parametrize("relax", [neural_sort, soft_sort])
def test_equivariance(relax):
    scores = draw(4, 6)
    permuted = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(relax(scores[:, permuted], 0.7), relax(scores, 0.7)[:, permuted])


@pytest.mark.parametrize("relax", ALL)
def test_gradients(relax):
    scores = draw(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: relax(s, 0.8), scores)


@pytest.mark.parametrize(("a", "b"), [(0.3, 1.1), (1.1, 0.3)])
def test_two_items_by_hand(a, b):
    scores, tau = torch.tensor([a, b], dtype=torch.float64), 0.5
    first = 1 / (1 + math.exp(-(b - a) / tau))  # logits -a and -b; the sums of distances are alike
    torch.testing.assert_close(neural_sort(scores, tau).exp()[0], torch.tensor([first, 1 - first], dtype=torch.float64))
    near = 1 / (1 + math.exp(-abs(b - a) / tau))  # the item that belongs there is at distance 0, the other at |b - a|
    least = near if a < b else 1 - near
    torch.testing.assert_close(soft_sort(scores, tau).exp()[0], torch.tensor([least, 1 - least], dtype=torch.float64))
    swap = math.atan((b - a) / tau) / math.pi + 0.5
    for relax in (odd_even, bitonic):
        torch.testing.assert_close(relax(scores, tau).exp()[0], torch.tensor([swap, 1 - swap], dtype=torch.float64))


@pytest.mark.parametrize("relax", ALL)
def test_logarithms_and_gradients_stay_finite_where_entries_underflow(relax):
    scores = torch.tensor([0.0, 1e3, -1e3], requires_grad=True)
    log_p = relax(scores, 1e-3)
    assert bool(log_p.isfinite().all())
    log_p.sum().backward()
    assert bool(scores.grad.isfinite().all())


@pytest.mark.parametrize("relax", ALL)
def test_bad_input(relax):
    with pytest.raises(ValueError, match=r"scores of batch item 1 is nan at item 2"):
        relax(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, torch.nan]]), 1.0)
    with pytest.raises(ValueError, match=r"scores must have shape \(\.\.\., n\) with n >= 1, but are \(3, 0\)"):
        relax(torch.zeros(3, 0), 1.0)
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, but is 0"):
        relax(torch.zeros(3), 0.0)
    with pytest.raises(TypeError, match=r"scores must have a floating dtype"):
        relax(torch.zeros(3, dtype=torch.int64), 1.0)


def test_another_network():
    with pytest.raises(ValueError, match=r"kind='merge': expected one of \('odd_even', 'bitonic'\)"):
        diff_sort(torch.zeros(3), 1.0, "merge")

"""Logits that are large, or have large offsets: the exact value, by fractions over all permutations, or a refusal."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from pyro_gs import GibbsMatching, GibbsPermutation, GumbelSinkhorn, UniformPermutation, log_permanent

REFUSED = "logits differ by so much that float64 cannot tell what is left"


def exact(X):
    """All permutations as matrices, their log-probabilities, and the log-permanent."""
    n = X.shape[-1]
    orders = list(itertools.permutations(range(n)))
    weights = [sum(Fraction(float(X[i, j])) for i, j in enumerate(order)) for order in orders]
    gaps = [float(weight - max(weights)) for weight in weights]
    total = math.log(math.fsum(map(math.exp, gaps)))
    return torch.eye(n, dtype=X.dtype)[torch.tensor(orders)], torch.tensor(gaps) - total, float(max(weights)) + total


def refused(function, value):
    """What a function refuses a value with, or what it returns."""
    try:
        return None, function(value)
    except ValueError as error:
        return str(error), None


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8, 1e13, 1e17])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e9, 1e13, 1e20, 1e37])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_exact_laws_are_right_or_refuse(size, offset, kind, float64_only):
    answered = 0
    for n in (1, 2, 3, 4):
        X = (size * torch.randn(n, n) + offset).to(kind)
        P, log_p, total = exact(X)
        entropy = -float(torch.special.xlogy(log_p.exp(), log_p.exp()).sum())
        for family in (GibbsPermutation, GibbsMatching):
            law = family(X)
            refusal, found = refused(law.log_prob, P)
            assert refusal is None or REFUSED in refusal
            if found is None:
                continue
            answered += 1
            best = log_p > -30
            assert torch.allclose(found[best].double(), log_p[best], rtol=1e-5, atol=5e-4)  # 1e-4 is let pass as rounding
            assert (found[~best] < -29).all()
            assert abs(float(law.entropy()) - entropy) < 2e-3
            assert torch.allclose(law.marginals().double(), (log_p.exp()[:, None, None] * P.double()).sum(0), atol=5e-4)
            drawn = law.sample((20,))
            assert all(log_p[(P == each).all(-1).all(-1)] > -30 for each in drawn)
            assert math.isclose(float(log_permanent(X.double())), total, rel_tol=1e-6, abs_tol=1e-3)
    assert answered or size >= 1e13


def test_offsets_say_nothing(float64_only):
    X = (torch.randn(3, 3) * 2**10).round() / 2**10  # so that adding them is exact
    offset = torch.tensor([2.0**33, 0.0, -(2.0**30)])
    value = GumbelSinkhorn(1.0, X).rsample()
    for moved in (X + offset, X + offset[:, None]):
        assert torch.allclose(GumbelSinkhorn(1.0, moved).log_prob(value), GumbelSinkhorn(1.0, X).log_prob(value), atol=1e-9)
        for law in (GibbsPermutation, GibbsMatching):
            assert torch.allclose(law(moved).log_prob(torch.eye(3)), law(X).log_prob(torch.eye(3)), atol=1e-9)
        found = torch.distributions.kl_divergence(GibbsPermutation(moved), UniformPermutation(3))
        assert torch.allclose(
            found, torch.distributions.kl_divergence(GibbsPermutation(X), UniformPermutation(3)), atol=1e-9
        )


def test_a_matching_law_in_float32_keeps_its_digits():
    """It was computed from sums that float32 rounds: .006 nats off with offsets of 1e4, 1.8 with 1e8."""
    X = torch.full((3, 3), 1e8, dtype=torch.float32)
    law = GibbsMatching(X, capacities=1)
    assert torch.allclose(law.log_prob(torch.eye(3)), torch.tensor(-math.log(6), dtype=torch.float32))
    assert torch.allclose(law.entropy(), torch.tensor(math.log(6), dtype=torch.float32))
    scores = 1e8 + torch.tensor([0.0, 8.0, 16.0], dtype=torch.float32)
    law = GibbsMatching(X, unmatched=scores)
    values = law.enumerate_support()
    assert torch.allclose(law.log_prob(values).exp().sum(), torch.ones((), dtype=torch.float32))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_value_beyond_the_dtype_is_refused(kind):
    X = torch.full((3, 3), torch.finfo(kind).max / 2, dtype=kind)
    calls = [lambda: log_permanent(X), lambda: log_permanent(X, capacities=1)]
    if kind == torch.float32:
        calls += [GibbsPermutation(X).log_normalizer, GibbsMatching(X).log_normalizer]
        assert torch.allclose(GibbsPermutation(X).entropy(), torch.tensor(math.log(6), dtype=kind))
    for call in calls:
        with pytest.raises(OverflowError, match=rf"beyond {kind}; give logits in float64"):
            call()

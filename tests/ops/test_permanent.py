import itertools
import math

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_gs import log_permanent, log_permanent_bounds, matching, sinkhorn
from pyro_gs.ops.permanent import METHODS, log_count, marginals
from pyro_gs.ops.subsets import levels
from pyro_gs.ops.support import find_support

pytestmark = pytest.mark.usefixtures("float64_only")
TRIDIAGONAL = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1
BLOCKS = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(2, 2)).bool()[:, torch.tensor([3, 1, 0, 4, 2])]


def support_of(logits):
    return find_support(logits.detach() > -torch.inf, warn=False)


def brute(logits):
    n = logits.shape[-1]
    return torch.logsumexp(
        torch.stack([logits[..., range(n), list(p)].sum(-1) for p in itertools.permutations(range(n))]), 0
    )


def free_and_masked(scale=1.0):
    masks = torch.stack([torch.ones(5, 5).bool(), TRIDIAGONAL, BLOCKS])
    return scale * torch.randn(3, 5, 5), masks


@pytest.mark.parametrize("n", range(1, 9))
def test_exact_against_brute_force(n):
    logits = 5 * torch.randn(3, n, n)
    assert torch.allclose(log_permanent(logits), brute(logits), rtol=0, atol=1e-11)


def test_exact_with_masks_of_their_own():
    free, masks = free_and_masked(3.0)
    logits = free.masked_fill(~masks, -torch.inf)
    assert torch.allclose(log_permanent(logits), brute(logits), rtol=0, atol=1e-11)
    assert torch.allclose(log_permanent(logits[None].expand(4, 3, 5, 5))[2], brute(logits), rtol=0, atol=1e-11)
    # pairs that lie on no permutation change nothing, and nobody is warned of them
    logits = torch.tensor([[0.0, -torch.inf], [2.0, 1.0]])
    assert float(log_permanent(logits)) == pytest.approx(1.0)


def test_known_values():
    assert float(log_permanent(torch.zeros(20, 20))) == pytest.approx(math.log(math.factorial(20)), rel=1e-14)
    derangements = torch.zeros(12, 12).masked_fill(torch.eye(12).bool(), -torch.inf)
    assert float(log_permanent(derangements)) == pytest.approx(math.log(176_214_841), rel=1e-14)


def test_ten_digits_at_fifty_nats():
    """The permanent of a 12 x 12 matrix whose entries span 50 nats, against Ryser's formula with 200 digits."""
    logits = 50 * torch.rand(12, 12) - 25
    mpmath.mp.dps = 200
    a = [[mpmath.e ** mpmath.mpf(float(x)) for x in row] for row in logits]
    sums, total, members = [mpmath.mpf(0)] * 12, mpmath.mpf(0), 0
    for code in range(1, 1 << 12):  # subsets in Gray order, one column in or out at a time
        gray = code ^ (code >> 1)
        j = (gray ^ members).bit_length() - 1
        sign = 1 if gray >> j & 1 else -1
        sums = [s + sign * row[j] for s, row in zip(sums, a, strict=True)]
        members = gray
        total += (-1) ** (12 - bin(gray).count("1")) * mpmath.fprod(sums)
    assert abs(float(log_permanent(logits)) - float(mpmath.log(total))) < 1e-10


def test_nothing_underflows():
    """Rows and columns shifted by thousands of nats, and logits that leave one permutation."""
    logits = torch.randn(6, 6)
    shifted = logits + 3000 * torch.randn(6, 1) + 3000 * torch.randn(1, 6)
    gap = shifted - logits
    assert float(log_permanent(shifted) - log_permanent(logits)) == pytest.approx(
        float(gap[:, 0].sum() + (gap[0] - gap[0, 0]).sum()), abs=1e-8
    )
    sharp = 1000 * torch.randn(10, 10)
    assert float(log_permanent(sharp)) == pytest.approx(float((sharp * matching(sharp)).sum()), abs=1e-8)


def test_marginals_are_the_gradient():
    free, masks = free_and_masked(2.0)
    logits = free.masked_fill(~masks, -torch.inf)
    index = list(itertools.permutations(range(5)))
    weight = torch.stack([logits[:, range(5), list(p)].sum(-1) for p in index]).softmax(0)
    matrices = torch.eye(5)[torch.tensor(index)]
    want = torch.einsum("kb,kij->bij", weight, matrices)
    found = marginals(logits, support_of(logits))
    assert torch.allclose(found, want, atol=1e-13)
    assert torch.allclose(found.sum(-1), torch.ones(3, 5))
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(log_permanent(logits).sum(), logits)
    assert torch.allclose(grad, want, atol=1e-13)
    assert (grad[~masks] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method):
    free, masks = free_and_masked()
    free.requires_grad_()

    def value(x):
        return log_permanent(x.masked_fill(~masks, -torch.inf), method=method)

    assert torch.autograd.gradcheck(value, free)
    if method == "exact":
        assert torch.autograd.gradgradcheck(value, free)


def test_bounds_hold():
    free, masks = free_and_masked(3.0)
    for logits in (free.masked_fill(~masks, -torch.inf), torch.zeros(1, 7, 7), 0.3 * torch.randn(20, 8, 8)):
        exact = log_permanent(logits)
        value = {method: log_permanent(logits, method=method) for method in METHODS}
        for lower in ("bethe", "sinkhorn_bethe", "sinkhorn_lower"):
            assert (value[lower] <= exact + 1e-9).all(), lower
        for upper in ("bethe_upper", "sinkhorn_upper"):
            assert (value[upper] >= exact - 1e-9).all(), upper
        assert (value["sinkhorn_bethe"] <= value["bethe"] + 1e-9).all()  # the latter is the maximum
        low, high = log_permanent_bounds(logits)
        assert torch.allclose(low, torch.maximum(value["bethe"], value["sinkhorn_lower"]), rtol=1e-14, atol=1e-14)
        assert torch.allclose(high, torch.minimum(value["bethe_upper"], value["sinkhorn_upper"]), rtol=1e-14, atol=1e-14)


def test_bethe_of_two_rows_is_the_larger_product():
    logits = torch.tensor([[[3.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.allclose(log_permanent(logits, method="bethe"), torch.tensor([3.0, 0.0]))


def test_gradients_of_bounds():
    logits = torch.randn(30, 30, requires_grad=True)
    (grad,) = torch.autograd.grad(log_permanent(logits, method="sinkhorn_upper"), logits)
    assert torch.allclose(grad, sinkhorn(logits), atol=1e-9)
    (grad,) = torch.autograd.grad(log_permanent(logits, method="bethe"), logits)
    assert torch.allclose(grad.sum(0), torch.ones(30), atol=1e-9)


@pytest.mark.parametrize("n", range(2, 9))
def test_agrees_with_pyro(n):
    logits = 2 * torch.randn(n, n)
    exact = dist.OneOneMatching(logits).log_partition_function
    assert float(log_permanent(logits) - exact) == pytest.approx(0, abs=1e-11)
    bethe = dist.OneOneMatching(logits, bp_iters=3000).log_partition_function
    assert float(log_permanent(logits, method="sinkhorn_bethe") - bethe) == pytest.approx(0, abs=1e-8)


def test_count_of_masks():
    band = (torch.arange(30)[:, None] - torch.arange(30)).abs() <= 4
    masks = torch.stack([band, torch.ones(30, 30).bool()])
    value, exact = log_count(find_support(masks), masks)
    assert exact.tolist() == [False, True]
    assert float(value[1]) == pytest.approx(math.lgamma(31))
    value, exact = log_count(find_support(BLOCKS), BLOCKS)
    assert bool(exact)
    assert float(value) == pytest.approx(math.log(4))


def test_dtype():
    logits = torch.randn(2, 4, 4, dtype=torch.float32)
    assert log_permanent(logits).dtype == torch.float32
    assert torch.allclose(log_permanent(logits).double(), log_permanent(logits.double()), atol=1e-6)
    assert log_permanent(torch.zeros(0, 3, 3)).shape == (0,)


def test_bad_input():
    with pytest.raises(ValueError, match=r"at most 20 rows, but logits have one of 21; .* bethe, sinkhorn_bethe"):
        log_permanent(torch.zeros(21, 21))
    large = torch.zeros(2, 22, 22)
    large[0] = large[0].masked_fill(~torch.block_diag(torch.ones(10, 10), torch.ones(12, 12)).bool(), -torch.inf)
    with pytest.raises(ValueError, match=r"logits of batch item 1 have one of 22"):
        log_permanent(large)
    assert log_permanent(large[0]).isfinite()
    with pytest.raises(ValueError, match="method must be one of exact, bethe, .*, but is 'ryser'"):
        log_permanent(torch.zeros(3, 3), method="ryser")
    with pytest.raises(ValueError, match="allows no permutation"):
        log_permanent(torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]]))
    with pytest.raises(ValueError, match="nan"):
        log_permanent(torch.full((2, 2), torch.nan))
    with pytest.raises(TypeError, match="floating dtype"):
        log_permanent(torch.zeros(2, 2, dtype=torch.long))


def test_levels_of_multisets():
    """Every way from one level to the next is listed once."""
    capacities = (2, 0, 1)
    states = [[s for s in itertools.product(range(3), range(1), range(2)) if sum(s) == k] for k in range(4)]
    for k, level in enumerate(levels(capacities, 3), start=1):
        assert level.states == len(states[k])
        ways = int((level.column < 3).sum())
        assert ways == sum(1 for s in states[k] for c in s if c)
    assert np.all(levels((1,) * 4, 4)[1].column.numpy() < 4)


@pytest.mark.usefixtures("float64_only")
def test_what_rounding_leaves_nothing_of_is_refused():
    """The two permutations differ by 750, which 1e30 swallows."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1e30, 0.0], [0.0, 1e30, 750.0]])
    with pytest.raises(ValueError, match="logits differ by so much that float64 cannot tell what is left"):
        log_permanent(logits)


def test_gradient_at_logits_that_were_given_expanded():
    """Every item has its own, though the items share their memory; a law that was expanded hands it to what it came from."""
    shared, weight = torch.randn(1, 3, 3), torch.tensor([1.0, 5.0])
    x, copied = shared.expand(2, 3, 3).detach().requires_grad_(), shared.repeat(2, 1, 1).requires_grad_()
    found, want = (torch.autograd.grad((weight * log_permanent(each)).sum(), each)[0] for each in (x, copied))
    assert torch.allclose(found, want, atol=1e-12)
    root = shared.clone().requires_grad_()
    (found,) = torch.autograd.grad((weight * log_permanent(root.expand(2, 3, 3))).sum(), root)
    assert torch.allclose(found, want.sum(0, keepdim=True), atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 80.0, 1e4, 3e7])
def test_two_rows_whose_products_are_alike_but_for_rounding(shift):
    """Found by hostile input: each of four entries decided by rounding of its own which product is the larger."""
    far = 3e5 if shift else 0.0  # beside components of one and three rows
    blocks = [torch.zeros(2, 2), torch.tensor([[0.1, 0.3], [0.5, 0.7]]), torch.tensor([[0.3, 0.1], [0.7, 0.5]])]
    for block in blocks:
        tied, order = torch.block_diag(torch.tensor([[far]]), block + shift, torch.zeros(3, 3)), torch.randperm(6)
        parts = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(3, 3))
        tied = tied.masked_fill(parts == 0, -torch.inf)[order][:, torch.randperm(6)]
        exact, bethe = log_permanent(tied), log_permanent(tied, method="bethe")
        alone = log_permanent(torch.zeros(3, 3), method="bethe")
        assert abs(float(exact - bethe) - math.log(2) - (math.log(6) - float(alone))) < 1e-8
        beliefs = marginals(tied, find_support(tied > -torch.inf), "bethe")
        assert torch.allclose(beliefs.sum(-1), torch.ones(6))
        assert torch.allclose(beliefs.sum(-2), torch.ones(6))


@pytest.mark.parametrize("shift", [0.0, 80.0, 1e4, 3e7])
def test_bounds_hold_where_logits_are_large(shift):
    for n in (2, 3):
        x = shift + torch.zeros(n, n)
        lower, upper = log_permanent_bounds(x)
        exact = n * shift + math.lgamma(n + 1)
        assert lower <= exact + 1e-9 + 1e-15 * shift
        assert upper >= exact - 1e-9 - 1e-15 * shift


def test_the_larger_of_two_products_is_taken():
    x = torch.tensor([[1.0, 1e30], [-3e7, 0.0]])
    assert log_permanent(x, method="bethe") == 1e30
    x = torch.randn(500, 2, 2)
    best = torch.maximum(x[:, 0, 0] + x[:, 1, 1], x[:, 0, 1] + x[:, 1, 0])
    assert torch.allclose(log_permanent(x, method="bethe"), best)


def test_rectangular_logits_are_told_of_the_sum_over_matchings():
    with pytest.raises(ValueError, match=r"has shape \(1, 3\); for the sum .* give capacities=1"):
        log_permanent(torch.zeros(1, 3))
    assert torch.allclose(log_permanent(torch.zeros(1, 3), capacities=1).exp(), torch.tensor(3.0))

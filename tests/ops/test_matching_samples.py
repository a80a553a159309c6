import itertools

import numpy as np
import pytest
import torch
from enumeration import p_value

from pyro_gs import GibbsPermutation, log_permanent
from pyro_gs.ops import matching_samples
from pyro_gs.ops.matching_samples import draw_by_blocks, draw_by_chain, sample_matchings
from pyro_gs.ops.permanent import balance
from pyro_gs.ops.support import Support, find_support

FAILURE_RATE = 2e-5


def chi_square(index, logits):
    """p-value of draws (k, n) against ``exp <logits, P>`` over all permutations."""
    return p_value(index, GibbsPermutation(logits.double()))


def draw(logits, count):
    return sample_matchings(logits, find_support(logits > -torch.inf), count)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_exact_draws(n, scale):
    logits = scale * torch.randn(n, n)
    assert chi_square(draw(logits, 20_000), logits) > FAILURE_RATE


def test_items_of_a_batch_have_their_own_support():
    masks = torch.stack([
        torch.ones(5, 5).bool(),
        (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1,
        torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool(),
    ])  # fmt: skip
    logits = torch.randn(3, 5, 5).masked_fill(~masks, -torch.inf)
    index = draw(logits, 10_000)
    assert index.shape == (10_000, 3, 5)
    for item in range(3):
        assert chi_square(index[:, item], logits[item]) > FAILURE_RATE


def test_expanded_items_are_drawn_apart():
    logits = torch.randn(2, 1, 4, 4).expand(2, 3, 4, 4)
    index = draw(logits, 4_000)
    assert index.shape == (4_000, 2, 3, 4)
    for i, j in itertools.product(range(2), range(3)):
        assert chi_square(index[:, i, j], logits[i, j]) > FAILURE_RATE
    assert not torch.equal(index[:, 0, 0], index[:, 0, 1])
    assert draw(torch.zeros(0, 3, 3), 2).shape == (2, 0, 3)
    assert draw(torch.zeros(3, 3), 0).shape == (0, 3)


@pytest.mark.parametrize("mask", ["full", "band"])
def test_the_chain(mask):
    """The sampler of large components, at a size where the law is known."""
    logits = torch.randn(4, 4)
    if mask == "band":
        logits = logits.masked_fill((torch.arange(4)[:, None] - torch.arange(4)).abs() > 1, -torch.inf)
    a = balance(logits, find_support(logits > -torch.inf)).exp().double().numpy()
    rng = np.random.default_rng(0)
    index = np.stack([draw_by_chain(a, rng) for _ in range(4_000)])
    assert chi_square(torch.from_numpy(index), logits.double()) > FAILURE_RATE


def test_block_gibbs(monkeypatch):
    """With blocks of two and three rows, at a size where the law is known; from the start the sweeps use."""
    logits = (2 * torch.randn(5, 5)).double()
    z = balance(logits, Support(logits.shape))
    for block in (2, 3):
        monkeypatch.setattr(matching_samples, "_BLOCK", block)
        assert chi_square(draw_by_blocks(z, 10_000), logits) > FAILURE_RATE


@pytest.mark.parametrize("n", [24])
def test_large_draws_have_the_right_mean(n):
    """Block Gibbs against exact marginals of a law that a gauge makes a product of two."""
    far = 4 * torch.rand(n, n).double()
    apart = torch.block_diag(torch.ones(12, 12), torch.ones(12, 12)).bool()
    logits = torch.where(apart, far, far - 60)  # e^-120 of what crosses is never seen
    split = logits.masked_fill(~apart, -torch.inf).requires_grad_()
    (want,) = torch.autograd.grad(log_permanent(split), split)
    index = draw(logits, 2_000)
    mean = torch.nn.functional.one_hot(index, n).double().mean(0)
    error = (mean - want) / (want * (1 - want) / 2_000).sqrt().clamp(min=1e-3)
    assert float(error.abs().max()) < 5  # 288 entries: 2e-4 by chance


def test_large_masks():
    logits = torch.randn(25, 25).masked_fill((torch.arange(25)[:, None] - torch.arange(25)).abs() > 3, -torch.inf)
    index = draw(logits, 2)
    assert (index.sort(-1).values == torch.arange(25)).all()
    assert logits.expand(2, 25, 25).gather(-1, index[..., None]).isfinite().all()

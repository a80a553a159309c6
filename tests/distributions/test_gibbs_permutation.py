import pyro.distributions as dist
import pytest
import torch
from enumeration import chi_square, entropy_by_enumeration, mean_by_enumeration

from pyro_gs import GibbsPermutation, matching, sinkhorn, to_index, to_matrix

BAND = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_samples(n, scale):
    assert chi_square(GibbsPermutation(scale * torch.randn(n, n)), 20_000) > 2e-5


def test_samples_of_a_mask():
    assert chi_square(GibbsPermutation(torch.randn(5, 5).masked_fill(~BAND, -torch.inf)), 20_000) > 2e-5


@pytest.mark.parametrize("n", range(1, 8))
def test_exact(n, tol):
    law = GibbsPermutation(3 * torch.randn(2, n, n))
    assert torch.allclose(law.log_prob(law.enumerate_support()).exp().sum(0), torch.ones(2), atol=100 * tol)
    assert torch.allclose(law.marginals(), mean_by_enumeration(law), atol=100 * tol)
    assert torch.allclose(law.mean * (1 - law.mean), law.variance)
    assert torch.allclose(law.entropy(), entropy_by_enumeration(law), atol=1000 * tol)
    assert torch.allclose(law.log_prob(law.mode), law.log_prob(law.enumerate_support()).amax(0))


def test_batch_of_supports(tol):
    masks = torch.stack([BAND, torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()])
    law = GibbsPermutation(torch.randn(2, 5, 5).masked_fill(~masks, -torch.inf))
    values = law.enumerate_support()
    p = law.log_prob(values).exp()
    assert torch.allclose(p.sum(0), torch.ones(2))
    assert ((p > 0).sum(0) == torch.tensor([8, 12])).all()
    assert torch.allclose(law.marginals(), mean_by_enumeration(law), atol=100 * tol)


@pytest.mark.usefixtures("float64_only")
def test_gradients():
    logits = torch.randn(2, 4, 4, requires_grad=True)
    value = matching(torch.randn(2, 4, 4))
    assert torch.autograd.gradcheck(lambda x: GibbsPermutation(x).log_prob(value), logits)
    assert torch.autograd.gradcheck(lambda x: GibbsPermutation(x).entropy(), logits)
    assert torch.autograd.gradcheck(lambda x: GibbsPermutation(x).marginals(), logits)


@pytest.mark.parametrize("n", range(1, 9))
def test_agrees_with_one_one_matching(n):
    law = GibbsPermutation(torch.randn(n, n))
    other = law.to_one_one_matching()
    index = other.enumerate_support() if n < 8 else other.sample(torch.Size((20,)))
    found = law.log_prob(to_matrix(index))
    assert torch.allclose(found, torch.stack([other.log_prob(i) for i in index]), atol=1e-5)
    back = GibbsPermutation.from_one_one_matching(other)
    assert torch.equal(back.logits, law.logits)
    assert back.normalizer == "exact"
    if n > 1:
        assert torch.equal(to_index(law.mode), other.mode())
        bethe = law.to_one_one_matching(bp_iters=2000)
        again = GibbsPermutation.from_one_one_matching(bethe)
        index = to_index(law.mode)
        assert float(again.log_prob(law.mode) - bethe.log_prob(index)) == pytest.approx(0, abs=1e-4)


def test_other_normalizers():
    logits = torch.randn(30, 30)
    law = GibbsPermutation(logits, normalizer="bethe")
    assert torch.allclose(law.marginals().sum(-1), torch.ones(30), atol=1e-5)
    upper = GibbsPermutation(logits, normalizer="bethe_upper")
    value = law.sample()
    assert float(law.log_prob(value)) > float(upper.log_prob(value))
    assert torch.allclose(GibbsPermutation(logits, normalizer="sinkhorn_upper").marginals(), sinkhorn(logits), atol=1e-5)
    assert law.entropy().isfinite()
    assert not law.is_exact
    assert law.expand((3,)).normalizer == "bethe"


def test_sizes_that_cannot_be_exact():
    law = GibbsPermutation(torch.randn(21, 21))
    for quantity in (lambda: law.log_prob(torch.eye(21)), law.marginals, law.entropy):
        with pytest.raises(
            ValueError, match=r"at most 20 rows, but logits have one of 21; the alternatives by name are bethe"
        ):
            quantity()
    assert law.sample().shape == (21, 21)


def test_bad_input():
    with pytest.raises(ValueError, match="normalizer must be one of exact, .*, but is 'laplace'"):
        GibbsPermutation(torch.zeros(2, 2), normalizer="laplace")
    with pytest.raises(ValueError, match=r"OneOneMatching has no batches, but this law has batch_shape \(2,\)"):
        GibbsPermutation(torch.zeros(2, 3, 3)).to_one_one_matching()
    with pytest.raises(TypeError, match="law must be a pyro.distributions.OneOneMatching, but is Normal"):
        GibbsPermutation.from_one_one_matching(dist.Normal(0.0, 1.0))


def test_empty_batches():
    law = GibbsPermutation(torch.zeros(0, 3, 3, requires_grad=True))
    assert law.marginals().shape == (0, 3, 3)
    assert law.entropy().shape == law.log_prob(torch.eye(3)).shape == (0,)
    assert law.sample((2,)).shape == (2, 0, 3, 3)
    law.log_prob(torch.eye(3)).sum().backward()
    assert GibbsPermutation(torch.zeros(0, 30, 30), normalizer="bethe").log_normalizer().shape == (0,)

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_gs import SupportWarning, UniformPermutation, to_index
from pyro_gs.ops.matching_samples import draw_by_chain


def allowed_permutations(mask):
    n = len(mask)
    return [p for p in itertools.permutations(range(n)) if all(mask[i, j] for i, j in enumerate(p))]


def band(n, width):
    return (torch.arange(n)[:, None] - torch.arange(n)).abs() <= width


def chi_square(draws, support):
    """p-value of draws (tuples) against the uniform law on ``support``."""
    counts = {p: 0 for p in support}
    for p in draws:
        counts[p] += 1
    return stats.chisquare(list(counts.values())).pvalue


@pytest.mark.parametrize("mask", [torch.ones(4, 4).bool(), band(4, 1), band(5, 2)], ids=["full", "tridiagonal", "band"])
def test_samples_are_uniform(mask):
    support = allowed_permutations(mask)
    draws = to_index(UniformPermutation(len(mask), mask).sample(torch.Size((100 * len(support),))))
    assert chi_square(map(tuple, draws.tolist()), support) > 2e-5  # the failure rate


def test_the_chain_is_uniform():
    mask = band(5, 2).numpy()
    support = allowed_permutations(torch.from_numpy(mask))
    rng = np.random.default_rng(0)
    draws = [tuple(draw_by_chain(mask / mask.sum(), rng).tolist()) for _ in range(60 * len(support))]
    assert chi_square(draws, support) > 2e-5


def test_log_prob_counts():
    assert float(UniformPermutation(5).log_prob(torch.eye(5))) == pytest.approx(-math.log(120), rel=1e-5)
    derangements = ~torch.eye(12, dtype=torch.bool)
    law = UniformPermutation(12, derangements)
    assert law.is_exact
    assert float(law.log_prob(torch.eye(12).roll(1, 0))) == pytest.approx(-math.log(176_214_841), rel=1e-6)
    for width in (1, 2):
        mask = band(6, width)
        count = len(allowed_permutations(mask))
        assert float(UniformPermutation(6, mask).log_prob(torch.eye(6))) == pytest.approx(-math.log(count), rel=1e-5)


def test_large_masks_are_bethe_and_say_so():
    law = UniformPermutation(30, band(30, 4))
    assert not law.is_exact
    assert law.log_prob(torch.eye(30)).isfinite()
    law = UniformPermutation(30, band(30, 4))
    assert to_index(law.sample()).shape == (30,)


def test_components_multiply():
    mask = torch.block_diag(torch.ones(2, 2), band(3, 1)).bool()
    law = UniformPermutation(5, mask[torch.randperm(5)])
    assert float(-law.log_prob(law.sample()).exp().reciprocal().log()) == pytest.approx(-math.log(6), rel=1e-5)


def test_enumerated_support():
    mask = band(4, 1)
    values = UniformPermutation(4, mask).enumerate_support()
    assert [tuple(p) for p in to_index(values).tolist()] == allowed_permutations(mask)
    with pytest.raises(ValueError, match=r"has about 362880 permutations, more than the 40320"):
        UniformPermutation(9).enumerate_support()
    assert len(UniformPermutation(12, band(12, 1)).enumerate_support()) == 233  # by count, not by n


def test_mean():
    assert torch.allclose(UniformPermutation(4).mean, torch.full((4, 4), 0.25))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((2.0,), TypeError, "n must be an integer, but is 2.0"),
        ((0,), ValueError, "n must be at least 1, but is 0"),
        ((3, torch.ones(3, 3)), TypeError, "allowed must be a boolean tensor"),
        ((3, torch.ones(4, 4).bool()), ValueError, r"allowed must have shape \(..., 3, 3\) for n=3"),
        (
            (2, torch.tensor([[[True, True], [True, True]], [[True, False], [True, False]]])),
            ValueError,
            "allowed of batch item 1",
        ),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        UniformPermutation(*arguments)


def test_bad_values():
    law = UniformPermutation(3, band(3, 1))
    assert float(law.log_prob(torch.eye(3).flip(0))) == -math.inf  # a permutation, but not allowed
    with pytest.raises(ValueError, match="value is not a permutation matrix"):
        law.log_prob(torch.full((3, 3), 1 / 3))
    with pytest.raises(ValueError, match="value must have shape"):
        law.log_prob(torch.eye(4))


def test_pruned_mask_warns():
    with pytest.warns(SupportWarning, match="allowed permits row 1, column 0"):
        UniformPermutation(2, torch.tensor([[True, False], [True, True]]))


def test_batched_masks_enumerate_over_their_union():
    masks = torch.ones(2, 4, 4, dtype=torch.bool)
    masks[1, 0, 0] = False
    law = UniformPermutation(4, masks)
    values = law.enumerate_support()
    assert len(values) == 24
    assert torch.allclose(law.log_prob(values).exp().sum(0), torch.ones(2))
    assert (law.log_prob(values)[:, 1] == -math.inf).sum() == 6


def test_no_draws():
    assert UniformPermutation(3, band(3, 1)).sample(torch.Size((0,))).shape == (0, 3, 3)

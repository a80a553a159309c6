"""``summary`` against enumeration and hand-made samples."""

import dataclasses
import itertools
import math
import types

import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel

import pyro_gs as pgs


def posterior(n, seed, batch=()):
    """All permutations of n and random log-probabilities, as an enumeration hands them over."""
    support = pgs.to_matrix(torch.tensor(list(itertools.permutations(range(n)))))
    log_probs = torch.randn(len(support), generator=torch.Generator().manual_seed(seed)).log_softmax(0)
    perms = support.reshape(-1, *[1] * len(batch), n, n).expand(-1, *batch, n, n)
    return types.SimpleNamespace(permutations={"P": perms}, log_probs=log_probs)


class Replay(MCMCKernel):
    """Draws what it is given; a kernel without a model."""

    transforms = {}  # noqa: RUF012

    def __init__(self, draws):
        self.draws, self.step = draws, 0

    def setup(self, warmup_steps, *args, **kwargs):
        self._initial = {name: value[0] for name, value in self.draws.items()}

    @property
    def initial_params(self):
        return self._initial

    @initial_params.setter
    def initial_params(self, params):
        self._initial = params

    def sample(self, params):
        self.step += 1
        return {name: value[self.step - 1] for name, value in self.draws.items()}


def test_exact_posterior(tol):
    exact = posterior(4, 0)
    probs, perms = exact.log_probs.exp(), exact.permutations["P"]
    site = pgs.summary(exact)["P"]
    expected = sum(p * P for p, P in zip(probs, perms, strict=True))
    assert torch.allclose(site.marginals, expected, atol=tol)
    assert torch.equal(site.map, perms[probs.argmax()])
    assert torch.allclose(site.map_probability, probs.max())
    assert torch.allclose(site.confidence, expected.max(-1).values, atol=tol)
    assert torch.allclose(site.entropy, -(expected * expected.log()).sum(-1), atol=tol)
    products = (perms * expected.log()).sum((-1, -2))
    assert torch.equal(site.matching, perms[products.argmax()])
    assert site.distinct == 24
    assert not site.relaxed
    assert "exact posterior over 24 values" in str(pgs.summary(exact))


def test_mode_and_matching_of_marginals_are_told_apart():
    # The mode, .3, shares no pair with the others, which agree on most rows.
    draws = pgs.to_matrix(torch.tensor(3 * [[0, 1, 2, 3]] + 2 * [[1, 0, 3, 2]] + 2 * [[1, 2, 3, 0]] + [[1, 3, 0, 2]] * 2))
    site = pgs.summary({"P": draws})["P"]
    assert pgs.to_index(site.map).tolist() == [0, 1, 2, 3]
    assert float(site.map_probability) == pytest.approx(3 / 9)
    assert pgs.to_index(site.matching).tolist() == [1, 0, 3, 2]
    assert site.distinct == 4


def test_ties_go_to_the_larger_product_of_marginals():
    draws = torch.tensor([[2, 1, 0, 3], [0, 1, 2, 3], [0, 1, 3, 2], [0, 3, 2, 1]])
    for order in itertools.permutations(range(4)):
        site = pgs.summary({"P": pgs.to_matrix(draws[list(order)])})["P"]
        assert pgs.to_index(site.map).tolist() == [0, 1, 2, 3]
        assert float(site.map_probability) == 0.25


def test_many_float32_draws_keep_their_ties():
    # 1/3000 summed 1000 times is not exact in float32; three permutations come equally often.
    kinds = pgs.to_matrix(torch.tensor([[0, 1, 2], [1, 2, 0], [1, 0, 2]]), dtype=torch.float32)
    site = pgs.summary({"P": kinds.repeat(1000, 1, 1)})["P"]
    # marginals of each row: (1/3, 2/3, 0), (1/3, 1/3, 1/3), (1/3, 0, 2/3)
    assert pgs.to_index(site.map).tolist() == [1, 0, 2]
    assert site.marginals.dtype == torch.float32


def test_samples_agree_with_the_posterior_they_are_from():
    exact = posterior(4, 1)
    draws = exact.permutations["P"][torch.multinomial(exact.log_probs.exp(), 20000, replacement=True)]
    one, other = pgs.summary(exact)["P"], pgs.summary({"P": draws})["P"]
    # 16 entries, 5 standard deviations each of at most sqrt(.25 / 20000): failure rate below 1e-5
    assert (one.marginals - other.marginals).abs().max() < 5 * math.sqrt(0.25 / 20000)
    assert torch.equal(one.map, other.map)
    assert torch.equal(one.matching, other.matching)


def test_batches_are_summarized_item_by_item(tol):
    items = [posterior(3, seed) for seed in range(4)]
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [i.permutations["P"][torch.multinomial(i.log_probs.exp(), 200, True, generator=generator)] for i in items], 1
    ).reshape(200, 2, 2, 3, 3)
    whole = pgs.summary({"P": draws}, truth=torch.eye(3))["P"]
    assert whole.marginals.shape == (2, 2, 3, 3)
    for place in itertools.product(range(2), range(2)):
        part = whole[place]
        alone = pgs.summary({"P": draws[(slice(None), *place)]}, truth=torch.eye(3))["P"]
        for name in (f.name for f in dataclasses.fields(alone) if isinstance(getattr(alone, f.name), torch.Tensor)):
            assert torch.allclose(getattr(part, name).double(), getattr(alone, name).double(), atol=tol), name
        assert part.calibration_error == pytest.approx(alone.calibration_error)
    with pytest.raises(IndexError, match="batch shape"):
        whole[0, 0, 0]


def test_chains_are_pooled_and_other_sites_listed():
    draws = pgs.to_matrix(torch.randint(2, (2, 50, 1)) * torch.tensor([1, -1]) + torch.tensor([0, 1]))
    grouped = pgs.summary({"P": draws, "mu": torch.randn(2, 50)}, group_by_chain=True)
    flat = pgs.summary({"P": draws.flatten(0, 1)})
    assert torch.equal(grouped["P"].marginals, flat["P"].marginals)
    assert list(grouped) == ["P"]
    assert grouped.others == ("mu",)
    assert "2 chains of 50 draws" in str(grouped)
    assert "not permutations: mu" in str(grouped)


def test_mcmc():
    draws = {"P": pgs.to_matrix(torch.argsort(torch.rand(30, 3), -1)), "mu": torch.randn(30)}
    mcmc = pyro.infer.MCMC(Replay(draws), num_samples=30, warmup_steps=0, disable_progbar=True)
    with pytest.raises(ValueError, match=r"mcmc\.run"):
        pgs.summary(mcmc)
    mcmc.run()
    result = pgs.summary(mcmc)
    assert torch.allclose(result["P"].marginals, draws["P"].mean(0))
    assert result.others == ("mu",)


def test_hard_samples_of_a_guide():
    def model():
        pyro.sample("P", pgs.UniformPermutation(3))

    guide = pgs.AutoGumbelSinkhorn(model)
    guide()
    draws = guide.hard_sample((100,))
    assert torch.allclose(pgs.summary(draws)["P"].marginals, draws["P"].mean(0))
    with pytest.raises(TypeError, match=r"guide\.hard_sample\(\(1000,\)\)"):
        pgs.summary(guide)


def test_relaxed_samples(tol):
    relaxed = pgs.GumbelSinkhorn(0.7, 2 * torch.randn(4, 4)).rsample((50,))
    result = pgs.summary({"P": relaxed})
    site = result["P"]
    assert site.relaxed
    assert torch.allclose(site.marginals, torch.Tensor(relaxed.detach()).mean(0).as_subclass(torch.Tensor), atol=tol)
    rounded = pgs.summary({"P": pgs.matching(relaxed.log())})["P"]
    assert site.distinct == rounded.distinct
    assert site.map_probability == rounded.map_probability
    assert "relaxed samples" in str(result)


def test_truth():
    draws = pgs.to_matrix(torch.tensor([[0, 1, 2, 3]] * 3 + [[0, 1, 3, 2]]))
    truth = pgs.to_matrix(torch.tensor([1, 0, 2, 3]))
    site = pgs.summary({"P": draws}, truth={"P": truth})["P"]
    assert float(site.accuracy) == float(site.matching_accuracy) == 0.5
    # rows 0 and 1: certain and wrong; rows 2 and 3: .75 and right
    assert site.reliability.count.tolist() == [2, 2]
    assert site.calibration_error == pytest.approx((2 * 0.25 + 2 * 1.0) / 4)


@pytest.mark.parametrize("n", [1, 5, 279])
def test_sizes(n):
    draws = pgs.to_matrix(torch.argsort(torch.rand(20, n), -1))
    site = pgs.summary({"P": draws}, truth=torch.eye(n))["P"]
    assert torch.allclose(site.marginals.sum(-1), torch.ones(n))
    assert all(bool(getattr(site, name).isfinite().all()) for name in ("marginals", "confidence", "entropy"))


def test_table():
    draws = pgs.to_matrix(torch.argsort(torch.rand(10, 25, 13), -1))
    lines = str(pgs.summary({"P": draws, "Q": draws[:, 0, :4, :4] * 0 + torch.eye(4)})).split("\n")
    assert lines[0].split() == ["n", "distinct", "p(map)", "confidence", "least", "entropy", "map"]
    assert sum(line.strip().startswith("P[") for line in lines) == 20
    assert "P: 5 more batch items" in lines
    assert lines[21].split() == ["Q", "4", "1", "1.000", "1.000", "1.000", "0.000", "0", "1", "2", "3"]


EYES = torch.eye(3).expand(5, 3, 3)
BROKEN = torch.cat([EYES[:4], torch.ones(1, 3, 3)])


@pytest.mark.parametrize(
    ("samples", "options", "error", "message"),
    [
        (3, {}, TypeError, "samples must be a Pyro MCMC after run or a dict"),
        ({}, {}, ValueError, "empty"),
        ({"P": [1]}, {}, TypeError, r"samples\['P'\] must be a real torch.Tensor"),
        ({"P": torch.tensor(1.0)}, {}, ValueError, r"\(draws, ...\) with a draw, but has shape \(\)"),
        ({"P": EYES[:0]}, {}, ValueError, "with a draw"),
        ({"P": EYES, "mu": torch.zeros(4)}, {}, ValueError, r"'P'\] has \(5,\) and samples\['mu'\] has \(4,\)"),
        ({"P": EYES, "mu": torch.tensor([0, 0, 0, torch.nan, 0])}, {}, ValueError, r"samples\['mu'\]\[3\] is nan"),
        ({"mu": torch.zeros(5)}, {}, ValueError, r"no site holds permutation matrices.*'mu' \(\)"),
        ({"P": BROKEN}, {}, ValueError, r"\[0, 4\] of site 'P' is neither a permutation matrix.*sites=\[\]"),
        ({"P": EYES, "W": torch.ones(5, 2, 2)}, {"sites": ["W"]}, ValueError, r"\[0, 0\] of site 'W'"),
        ({"P": EYES}, {"sites": ["Q"]}, ValueError, r"sites names 'Q', but samples has the sites \['P'\]"),
        ({"P": EYES, "mu": torch.zeros(5)}, {"sites": "mu"}, ValueError, r"site 'mu' must have draws of shape"),
        ({"P": EYES}, {"truth": torch.ones(3, 3)}, ValueError, "truth of site 'P' is not a permutation matrix"),
        ({"P": EYES}, {"truth": torch.eye(4)}, ValueError, r"truth of site 'P' must broadcast to shape \(3, 3\)"),
        ({"P": EYES}, {"truth": {"Q": torch.eye(3)}}, ValueError, r"truth names the sites \['Q'\]"),
        ({"P": EYES, "Q": EYES}, {"truth": torch.eye(3)}, ValueError, r"truth=\{'P': ...\}"),
    ],
)
def test_bad_input(samples, options, error, message):
    with pytest.raises(error, match=message):
        pgs.summary(samples, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_probs": torch.zeros(6)}, ValueError, "sum to 6.0"),
        ({"log_probs": torch.full((6,), torch.nan)}, ValueError, "sum to nan"),
        ({"log_probs": torch.zeros(6, dtype=torch.long)}, TypeError, "floating tensor of shape"),
        ({"log_probs": torch.full((2,), 0.5).log()}, ValueError, r"permutations\['P'\] has 6 values"),
    ],
)
def test_bad_posterior(change, error, message):
    exact = posterior(3, 0)
    vars(exact).update(change)
    with pytest.raises(error, match=message):
        pgs.summary(exact)


def test_continuous_sites_that_look_alike_are_left_alone():
    rows = dist.Dirichlet(torch.ones(3)).sample((5, 3))  # rows that sum to one, columns that do not
    assert pgs.summary({"P": EYES, "W": rows}).others == ("W",)

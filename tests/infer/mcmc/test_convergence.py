"""R-hat and effective sample sizes of permutations against ArviZ, known autocorrelation and chains that do not mix."""

import itertools
import math

import arviz_base
import numpy as np
import pyro.infer
import pytest
import torch
from arviz_stats.base import array_stats
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel

import pyro_gs as pgs


def walk(n, draws, chains=2, stay=0.0, seed=0, start=None):
    """Random walk by swaps of neighbours, a uniform law; index (chains, draws, n)."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty(chains, draws, n, dtype=torch.long)
    for chain in range(chains):
        state = torch.randperm(n, generator=generator) if start is None else start
        for draw in range(draws):
            if float(torch.rand((), generator=generator)) >= stay:
                i = int(torch.randint(n - 1, (), generator=generator))
                state = state.clone()
                state[[i, i + 1]] = state[[i + 1, i]]
            out[chain, draw] = state
    return out


class Walk(MCMCKernel):
    """A uniform walk over permutations and a normal site, as a kernel of Pyro."""

    transforms = {}  # noqa: RUF012

    def setup(self, warmup_steps, *args, **kwargs):
        self._state = {"P": torch.eye(3), "mu": torch.zeros(2)}

    @property
    def initial_params(self):
        return self._state

    @initial_params.setter
    def initial_params(self, params):
        self._state = params

    def sample(self, params):
        return {"P": params["P"][torch.randperm(3)], "mu": torch.randn(2)}


@pytest.mark.parametrize("relaxed", [False, True])
def test_agrees_with_arviz_entry_by_entry(relaxed):
    P = pgs.to_matrix(walk(4, 101, chains=3))
    if relaxed:
        P = pgs.sinkhorn(2 * P + torch.randn(P.shape))
    log_density = torch.randn(3, 101).cumsum(-1)
    result = pgs.convergence({"P": P}, group_by_chain=True, log_density=log_density)
    post = pgs.posterior_dict({"P": P}, group_by_chain=True, log_density=log_density)
    assert list(result) == list(post) == ["P", "P_hamming", "log_density"]
    for name, values in post.items():
        one = result[name]
        values = values if values.ndim == 3 else values[..., None]
        for k in range(values.shape[-1]):
            x = values[..., k]
            assert one.rhat[k] == pytest.approx(float(array_stats.rhat(x)), rel=1e-9)
            assert one.ess_bulk[k] == pytest.approx(float(array_stats.ess(x, method="bulk")), rel=1e-9)
            if name != "P" or relaxed:
                assert one.ess_tail[k] == pytest.approx(float(array_stats.ess(x, method="tail", prob=0.05)), rel=1e-9)
        assert one.worst_rhat == one.rhat.max()
        assert one.median_rhat == np.median(one.rhat)
        assert one.worst == one.labels[one.rhat.argmax()]
        assert (one.worst_ess_bulk, one.worst_ess_tail) == (one.ess_bulk.min(), one.ess_tail.min())
    assert post["P"].shape == (3, 101, 16)
    assert result.worst_rhat == max(one.worst_rhat for one in result.values())


def test_effective_sample_size_of_a_chain_of_known_autocorrelation():
    # The state is drawn anew with probability 1/4 a step, so every function of it has autocorrelation (3/4)^t and
    # an effective sample size of draws / 7.
    generator = torch.Generator().manual_seed(0)
    fresh = torch.rand(4, 2000, generator=generator) < 0.25
    fresh[:, 0] = True
    drawn = torch.argsort(torch.rand(4, 2000, 3, generator=generator), -1)
    last = torch.where(fresh, torch.arange(2000), 0).cummax(-1).values
    index = drawn.gather(1, last[..., None].expand(-1, -1, 3))
    result = pgs.convergence({"P": pgs.to_matrix(index)}, group_by_chain=True)
    # the estimate's spread at this length is about a tenth; three of these
    assert result["P"].median_ess_bulk == pytest.approx(8000 / 7, rel=0.3)
    assert result["P_hamming"].worst_ess_bulk == pytest.approx(8000 / 7, rel=0.3)
    assert result.worst_rhat < 1.02


def test_chains_that_stay_at_different_permutations_are_infinitely_far():
    index = torch.stack([torch.tensor([0, 1, 2, 3]).expand(50, 4), torch.tensor([1, 0, 2, 3]).expand(50, 4)])
    result = pgs.convergence({"P": pgs.to_matrix(index)}, group_by_chain=True)
    assert result["P"].labels == ("0,0", "0,1", "1,0", "1,1")
    assert result["P"].constant == 12
    assert result.worst_rhat == math.inf
    assert (result["P"].rhat == math.inf).all()
    assert np.isfinite(result["P"].ess_bulk).all()
    assert result["P"].worst_ess_bulk < 10
    assert result["P_hamming"].worst_rhat == math.inf
    assert "inf" in str(result)


def test_chains_in_two_modes_are_seen():
    # Two blocks of three rows, in one chain on their own columns, in the other on each other's.
    low = torch.cat([walk(3, 2000, chains=1, seed=1), walk(3, 2000, chains=1, seed=2) + 3], -1)
    high = torch.cat([walk(3, 2000, chains=1, seed=3) + 3, walk(3, 2000, chains=1, seed=4)], -1)
    apart = pgs.convergence({"P": pgs.to_matrix(torch.cat([low, high]))}, group_by_chain=True)
    # probability 1/3 and 0: between halves 1/27, within 1/9, R-hat sqrt(4/3), as the docstring says
    assert apart["P"].median_rhat == pytest.approx(math.sqrt(1 + 2 / (3 * 2)), abs=0.02)
    assert apart["P_hamming"].worst_rhat > 1.5
    assert apart["P_hamming"].worst_ess_bulk < 10
    together = pgs.convergence({"P": pgs.to_matrix(torch.cat([low, low.flip(1)]))}, group_by_chain=True)
    assert together.worst_rhat < 1.05


def test_forbidden_pairs_are_left_out_and_counted():
    index = torch.cat([walk(3, 100), walk(2, 100) + 3], -1)  # two blocks: 13 entries vary
    P = pgs.to_matrix(index)
    result = pgs.convergence({"P": P}, group_by_chain=True)
    assert (len(result["P"].labels), result["P"].constant) == (13, 12)
    assert all(np.isfinite(one.rhat).all() for one in result.values())
    post = pgs.posterior_dict({"P": P}, group_by_chain=True)
    allowed = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool()
    assert (post.constant["P"] == ~allowed.numpy()).all()
    for k, label in enumerate(post.coords["P_entry"]):
        i, j = map(int, label.split(","))
        assert (post["P"][..., k] == P[..., i, j].numpy()).all()


@pytest.mark.parametrize("call", [pgs.convergence, pgs.posterior_dict])
def test_nothing_that_varies_is_announced(call):
    samples = {"P": torch.eye(3).expand(2, 20, 3, 3), "mu": torch.randn(2, 20)}
    with pytest.warns(pgs.ConvergenceWarning, match=r"'P', 'P_hamming' varies in any draw \(2 x 20\)"):
        result = call(samples, group_by_chain=True)
    if call is pgs.convergence:
        assert result.undefined == ("P", "P_hamming")
        assert result["P"].worst_rhat is None
        assert result["P"].worst is None
        assert not result["P"].defined
        assert result.worst_rhat == result["mu"].worst_rhat
        assert "nan" not in str(result)
    else:
        assert list(result) == ["mu"]
        assert result.constant["P"].all()


def test_one_chain_is_split_into_halves():
    x = torch.cat([torch.randn(51), torch.randn(50) + 1])
    P = torch.eye(2).expand(101, 2, 2).clone()
    P[:20] = P[:20].flip(-1)
    result = pgs.convergence({"P": P, "x": x})
    halves = x.numpy()[[list(range(50)), list(range(51, 101))]]

    # By hand: rank-normalized between and within variances of the two halves (Vehtari et al. 2021, section 4.1)
    def r_hat(values):
        ranks = values.reshape(-1).argsort().argsort().reshape(2, 50) + 1
        z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((ranks - 3 / 8) / (100 + 1 / 4))).numpy()
        within, between = z.var(1, ddof=1).mean(), 50 * z.mean(1).var(ddof=1)
        return math.sqrt((49 / 50 * within + between / 50) / within)

    folded = np.abs(halves - np.median(halves))
    assert result["x"].worst_rhat == pytest.approx(max(r_hat(halves), r_hat(folded)), rel=1e-6)
    assert result["x"].worst_rhat > 1.1
    assert result["P"].worst_rhat > 1.1
    assert (result.chains, result.draws) == (1, 101)


def test_plates_and_several_sites():
    P = pgs.to_matrix(torch.stack([walk(3, 40, seed=1), walk(3, 40, seed=2) * 0 + torch.arange(3)], 2))
    Q = pgs.to_matrix(walk(2, 40, seed=3))
    samples = {"P": P, "Q": Q, "mu": torch.randn(2, 40, 3), "fixed": torch.zeros(2, 40)}
    with pytest.warns(pgs.ConvergenceWarning, match="'fixed' varies"):
        result = pgs.convergence(samples, group_by_chain=True)
    assert set(result) == {"P", "P_hamming", "Q", "Q_hamming", "mu", "fixed"}
    assert set(result["P"].labels) == {f"0,{i},{j}" for i, j in itertools.product(range(3), repeat=2)}
    assert result["P_hamming"].labels == ("0",)
    assert result["P_hamming"].constant == 1
    assert result["mu"].labels == ("0", "1", "2")
    post = pgs.posterior_dict(samples, group_by_chain=True)
    assert post["P_hamming"].shape == (2, 40, 1)
    assert post["Q_hamming"].shape == (2, 40)
    assert post["mu"].shape == (2, 40, 3)
    assert post["fixed"].shape == (2, 40)


def test_hamming_is_the_share_of_rows_that_differ():
    index = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [1, 0, 2, 3], [1, 2, 3, 0]])
    post = pgs.posterior_dict({"P": pgs.to_matrix(index)})
    assert post["P_hamming"].tolist() == [[0.0, 0.0, 0.5, 1.0]]


def test_arviz_reads_the_dictionary():
    samples = {"P": pgs.to_matrix(walk(3, 40)), "mu": torch.randn(2, 40, 3)}
    post = pgs.posterior_dict(samples, group_by_chain=True, log_density=torch.randn(2, 40))
    assert all(type(x) is np.ndarray and x.shape[:2] == (2, 40) and np.isfinite(x).all() for x in post.values())
    data = arviz_base.from_dict({"posterior": post}, dims=post.dims, coords=post.coords)["posterior"]
    assert data["P"].dims == ("chain", "draw", "P_entry")
    entry = data["P"].sel(P_entry="0,2").to_numpy()
    assert (entry == samples["P"][..., 0, 2].numpy()).all()
    assert data["mu"].shape == (2, 40, 3)
    assert data["log_density"].dims == ("chain", "draw")


def test_mcmc_object():
    mcmc = pyro.infer.MCMC(Walk(), num_samples=200, warmup_steps=1, disable_progbar=True)
    mcmc.run()
    result = pgs.convergence(mcmc)
    assert (result.chains, result.draws) == (1, 200)
    assert result.worst_rhat < 1.1
    assert result["P"].median_ess_bulk > 100
    assert pgs.posterior_dict(mcmc)["mu"].shape == (1, 200, 2)


GOOD = {"P": pgs.to_matrix(walk(3, 20))}


@pytest.mark.parametrize(
    ("samples", "options", "error", "message"),
    [
        (None, {}, TypeError, "samples must be a Pyro MCMC"),
        ({"mu": torch.randn(2, 20)}, {"group_by_chain": True}, ValueError, "no site holds permutation matrices"),
        ({"P": GOOD["P"][:, :7]}, {"group_by_chain": True}, ValueError, "at least 8 draws a chain, but have 7"),
        (GOOD, {"group_by_chain": True, "log_density": [1.0]}, TypeError, "log_density must be a floating tensor"),
        (GOOD, {"group_by_chain": True, "log_density": torch.zeros(20)}, ValueError, r"must have shape \(2, 20\)"),
        (
            GOOD,
            {"group_by_chain": True, "log_density": torch.full((2, 20), -torch.inf)},
            ValueError,
            r"log_density\[0, 0\] is -inf",
        ),
        (GOOD | {"P_hamming": torch.randn(2, 20)}, {"group_by_chain": True}, ValueError, "site 'P_hamming'.*rename"),
    ],
)
def test_bad_input(samples, options, error, message):
    with pytest.raises(error, match=message):
        pgs.convergence(samples, **options)

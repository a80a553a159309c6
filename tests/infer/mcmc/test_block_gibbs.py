"""BlockGibbs: invariance of enumerated posteriors for all block sizes, blocks under masks, bad input."""

import pickle

import pyro
import pytest
import torch
from invariance import TARGETS, check_converges, check_invariant, check_mcmc, masked, points

import pyro_gs as pgs
from pyro_gs.infer.log_joint import LogJoint
from pyro_gs.infer.mcmc.block_gibbs import BlockGibbs
from pyro_gs.infer.mcmc.chain import Chain


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("block_size", [3])
def test_leaves_the_posterior_invariant(name, block_size):
    check_invariant(BlockGibbs(block_size=block_size), TARGETS[name]())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("block_size", [2, 4])
def test_converges_from_a_wrong_start(name, block_size):
    check_converges(BlockGibbs(block_size=block_size), TARGETS[name](), steps=20)


@pytest.mark.parametrize("block_size", [4, 5, 6])
def test_a_block_of_all_rows_is_a_draw_from_the_posterior(block_size):
    check_converges(BlockGibbs(block_size=block_size, num_blocks=1), points(), steps=1)
    if block_size > 4:
        check_converges(BlockGibbs(block_size=block_size, num_blocks=1, num_cycles=0), masked(), steps=1)


def test_mcmc():
    target = points()
    check_mcmc(BlockGibbs(target.model, block_size=3), target, num_samples=200)


def test_potential_fn():
    target = points()
    x, y = target.args
    kernel = BlockGibbs(potential_fn=lambda values: 0.5 * (values["P"] @ x - y).square().sum((-1, -2)))
    mcmc = pyro.infer.MCMC(
        kernel, num_samples=1000, warmup_steps=1, initial_params={"P": torch.eye(4)}, disable_progbar=True
    )
    mcmc.run()
    found = mcmc.get_samples()["P"].mean(0)
    assert torch.allclose(found, target.marginals()["P"], atol=0.07)  # 4 standard errors of independent draws


def test_rows_of_a_block_are_uniform_where_all_is_allowed():
    kernel = BlockGibbs(block_size=2)
    rows = kernel._draw_rows("P", torch.zeros(6000, 1, dtype=torch.long), 4, 2)[:, 0].sort(-1).values
    counts = torch.bincount(rows[:, 0] * 4 + rows[:, 1], minlength=16)[[1, 2, 3, 6, 7, 11]]
    assert float((counts - 1000.0).square().sum() / 1000) < 29.6  # chi-square, 5 degrees of freedom, 2e-5


def test_blocks_under_a_mask_have_something_to_exchange():
    # Rows 0 and 1 share their columns, as do rows 2 and 3; rows 4 and 5 are fixed.
    allowed = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2), torch.eye(2)).bool()

    def model():
        pyro.sample("P", pgs.UniformPermutation(6, allowed))

    for block_size in (2, 3, 4):
        chain = Chain(LogJoint(model), {"P": torch.arange(6).expand(300, 1, 6)})
        kernel = BlockGibbs(block_size=block_size, num_blocks=1, num_cycles=0)
        kernel.bind(chain, 0)
        rows = kernel._draw_rows("P", torch.zeros(300, 1, dtype=torch.long), 6, block_size)[:, 0]
        first = rows[:, :2].sort(-1).values
        assert bool(((first == torch.tensor([0, 1])).all(-1) | (first == torch.tensor([2, 3])).all(-1)).all())
        assert all(len(set(row)) == block_size for row in rows.tolist())
        kernel.step()
        assert 0.3 < kernel.acceptance_rate < 0.9  # one block or two of two permutations each: 1/2 or 3/4


def test_cycles_reach_what_blocks_do_not():
    # Two permutations that differ in all five rows.
    allowed = torch.eye(5, dtype=torch.bool)
    allowed |= allowed.roll(1, 1)

    def model():
        pyro.sample("P", pgs.UniformPermutation(5, allowed))

    for cycles, moves in ((0, False), (None, True)):
        chain = Chain(LogJoint(model), {"P": torch.arange(5).expand(50, 1, 5)})
        kernel = BlockGibbs(block_size=3, num_cycles=cycles)
        kernel.bind(chain, 0)
        kernel.step()
        assert bool((chain.index["P"] != torch.arange(5)).any()) is moves


def test_one_row_stays():
    def model():
        pyro.sample("P", pgs.UniformPermutation(1))

    kernel = BlockGibbs()
    kernel.bind(Chain(LogJoint(model), {"P": torch.zeros(1, 1, 1, dtype=torch.long)}), 0)
    kernel.step()
    assert kernel.acceptance_rate == 0


def test_pickles():
    assert isinstance(pickle.loads(pickle.dumps(BlockGibbs(block_size=3))), BlockGibbs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"block_size": 1}, ValueError, "block_size"),
        ({"block_size": 7}, ValueError, "block_size must be from 2 to 6, .* but is 7"),
        ({"block_size": 2.0}, ValueError, "block_size"),
        ({"num_blocks": 0}, ValueError, "num_blocks"),
        ({"num_cycles": -1}, ValueError, "num_cycles"),
        ({"jit_compile": True}, NotImplementedError, "jit_compile"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        BlockGibbs(**kwargs)

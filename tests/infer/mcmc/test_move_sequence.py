"""MoveSequence: invariance, acceptance by kernel, sites of their own, and what is refused."""

import pickle

import invariance
import matching_model
import pyro
import pytest
import torch
from invariance import TARGETS
from pyro.infer import MCMC

import pyro_gs as pgs
from pyro_gs.infer.mcmc.chain import Chain

SEQUENCES = {
    "exchanges, blocks": lambda: [pgs.SwapMetropolis(num_steps=1), pgs.BlockGibbs(block_size=2)],
    "balanced, exchanges": lambda: [pgs.LocallyBalanced(), pgs.SwapMetropolis(num_steps=1)],
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernels", SEQUENCES)
def test_leaves_posteriors_invariant(kernels, target):
    pyro.set_rng_seed(0)
    invariance.check_invariant(pgs.MoveSequence(SEQUENCES[kernels]()), TARGETS[target](), replicas=1000)


def test_converges_with_a_site_for_each_kernel():
    pyro.set_rng_seed(1)
    kernel = pgs.MoveSequence([pgs.SwapMetropolis(sites=["P"]), pgs.BlockGibbs(sites=["Q"], block_size=2)])
    invariance.check_converges(kernel, TARGETS["two sites"](), steps=40)


def test_under_mcmc():
    pyro.set_rng_seed(2)
    target = TARGETS["points"]()
    kernel = pgs.MoveSequence([pgs.SwapMetropolis(adapt=True), pgs.BlockGibbs(block_size=2)], target.model)
    invariance.check_mcmc(kernel, target)


def test_counts_by_kernel():
    """What is reported is of the samples, and the sum is that of the parts."""
    kernel = pgs.MoveSequence(
        [pgs.SwapMetropolis(num_steps=2), pgs.SwapMetropolis(num_steps=5), pgs.BlockGibbs(block_size=2)],
        matching_model.model,
    )
    x, y = matching_model.noisy_points(4, 1.0, 0)
    mcmc = MCMC(kernel, 30, 10, hook_fn=lambda kernel, *_: seen.append(kernel.logging()), disable_progbar=True)
    seen = []
    mcmc.run(x, y, 1.0)
    assert list(seen[-1]) == ["acc. SwapMetropolis 1", "acc. SwapMetropolis 2", "acc. BlockGibbs"]
    rates = mcmc.diagnostics()["acceptance rate by kernel"]["chain 0"]
    assert [f"{rate:.3f}" for rate in rates.values()] == list(seen[-1].values())
    assert rates["SwapMetropolis 1"] != rates["BlockGibbs"]
    kernel.setup(10, x, y, 1.0)
    params = kernel.initial_params
    for _ in range(40):
        params = kernel.sample(params)
    first, second, third = kernel.kernels
    assert 30 * 2 <= first.num_proposed <= 30 * 3  # at random one more a step
    assert 30 * 5 <= second.num_proposed <= 30 * 6
    assert kernel.num_proposed == first.num_proposed + second.num_proposed + third.num_proposed
    assert kernel.num_accepted == first.num_accepted + second.num_accepted + third.num_accepted


def test_all_kernels_stop_adapting_together():
    target = TARGETS["points"]()
    kernel = pgs.MoveSequence([pgs.SwapMetropolis(adapt=True), pgs.SwapMetropolis(adapt=True)])
    kernel.bind(Chain(target.joint, target.draw(1)), 3)
    for step in range(5):
        assert [part.warming_up for part in (kernel, *kernel.kernels)] == [step < 3] * 3
        kernel.step()
    kernel.bind(Chain(target.joint, target.draw(1)), 3)
    kernel.end_warmup()
    assert not any(part.warming_up for part in (kernel, *kernel.kernels))


def test_pickles_before_set_up_and_after_cleanup():
    target = TARGETS["points"]()
    kernel = pgs.MoveSequence([pgs.SwapMetropolis(), pgs.LocallyBalanced()])
    assert pickle.loads(pickle.dumps(kernel)).names == ["SwapMetropolis", "LocallyBalanced"]
    kernel.bind(Chain(target.joint, target.draw(1)), 1)
    for _ in range(3):
        kernel.step()
    kernel.cleanup()
    assert pickle.loads(pickle.dumps(kernel)).names == ["SwapMetropolis", "LocallyBalanced"]


def test_a_potential_function():
    kernel = pgs.MoveSequence(
        [pgs.SwapMetropolis(), pgs.BlockGibbs(block_size=2)],
        potential_fn=lambda z: -z["P"].diagonal(dim1=-2, dim2=-1).sum(-1),
    )
    mcmc = MCMC(kernel, 20, 5, initial_params={"P": torch.eye(3)}, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["P"].shape == (20, 3, 3)


SWAPS = pgs.SwapMetropolis()


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: pgs.MoveSequence([]), ValueError, "kernels must hold at least one kernel, but is empty"),
        (
            lambda: pgs.MoveSequence(matching_model.model),
            TypeError,
            r"kernels must be a list of kernels, but is function; write MoveSequence\(\[...\], model\)",
        ),
        (lambda: pgs.MoveSequence(SWAPS), TypeError, "kernels must be a list of kernels, but is SwapMetropolis"),
        (lambda: pgs.MoveSequence([pgs.SwapMetropolis]), TypeError, "but one is SwapMetropolis"),
        (lambda: pgs.MoveSequence([SWAPS, SWAPS]), ValueError, "the same kernel twice; make two of them"),
        (
            lambda: pgs.MoveSequence([pgs.SwapMetropolis(matching_model.model)]),
            ValueError,
            r"SwapMetropolis has a model of its own here; write SwapMetropolis\(\)",
        ),
        (
            lambda: pgs.MoveSequence([SWAPS], matching_model.model, jit_compile=True),
            NotImplementedError,
            "jit_compile=True would freeze",
        ),
    ],
)
def test_bad_construction(build, error, match):
    with pytest.raises(error, match=match):
        build()


def test_a_site_that_no_kernel_moves():
    target = TARGETS["two sites"]()
    kernel = pgs.MoveSequence([pgs.SwapMetropolis(sites=["P"]), pgs.LocallyBalanced(sites=["P"])], target.model)
    with pytest.raises(ValueError, match="no kernel moves 'Q', which would stay at a draw from the prior"):
        MCMC(kernel, 5, 5, disable_progbar=True).run(*target.args)
    # a start of the user's is another matter
    kernel.initial_params = {"Q": torch.eye(3)}
    kernel.setup(0, *target.args)
    params = kernel.initial_params
    for _ in range(5):
        params = kernel.sample(params)
    assert torch.equal(params["Q"], torch.eye(3))

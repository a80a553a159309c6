"""The checks of :mod:`invariance` can fail."""

import pytest
import torch
from invariance import TARGETS, check_converges, check_invariant, check_mcmc, plate, points

from pyro_gs.infer.mcmc.swap_metropolis import SwapMetropolis


class Greedy(SwapMetropolis):
    """Wrong by a little: as if the likelihood had the power 0.7."""

    def bind(self, chain, warmup_steps):
        chain.power = 0.7 * torch.ones_like(chain.power)
        super().bind(chain, warmup_steps)


@pytest.mark.parametrize("target", [points, plate])
@pytest.mark.parametrize("check", [check_invariant, check_converges])
def test_a_wrong_kernel_is_found_out(check, target):
    with pytest.raises(AssertionError, match="differ from the posterior"):
        check(Greedy(), target(), replicas=2000, steps=10)


@pytest.mark.parametrize("name", TARGETS)
def test_a_right_kernel_passes(name):
    target = TARGETS[name]()
    check_invariant(SwapMetropolis(), target)
    check_converges(SwapMetropolis(), target)


def test_mcmc():
    target = points()
    check_mcmc(SwapMetropolis(target.model), target)

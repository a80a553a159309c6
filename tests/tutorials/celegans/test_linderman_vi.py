"""The two laws of Linderman et al. (2018) on the candidates of worms."""

import pytest
import torch
from padded import show_less
from test_baselines import small_connectome

from tutorials.celegans.baselines.map_faq import mask_center
from tutorials.celegans.baselines.rounding_vi import TEMPERATURE, rounded
from tutorials.celegans.baselines.stick_breaking_vi import Sticks
from tutorials.celegans.worms import simulate


@pytest.fixture(params=[None, [7, 9]], ids=["all shown", "one shows less"])
def data(request):
    connectome = small_connectome(9)
    worms = simulate(connectome, worms=2, steps=30, known=0.3, eta=0.5, seed=1)
    return connectome, worms if request.param is None else show_less(worms, request.param)


def test_rounded_matrices_keep_to_the_mask_and_lie_near_a_permutation(data):
    allowed = data[1].allowed
    free = allowed & (allowed.sum(-1, keepdim=True) > 1)
    entries = 0.1 + 0.05 * torch.randn(int(free.sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    P = rounded(entries, allowed)
    assert not P[~allowed].any()
    assert bool((P[allowed & ~free] == 1).all())
    hard = (P > 0.5).double()
    assert bool((hard.sum(-1) == 1).all())
    assert bool((hard.sum(-2) == 1).all())
    torch.testing.assert_close(P[free], TEMPERATURE * entries + (1 - TEMPERATURE) * hard[free])


def test_sticks_make_doubly_stochastic_matrices_of_the_neurons_with_a_choice(data):
    connectome, worms = data
    sticks = Sticks(worms.allowed, connectome.body)
    psi = torch.randn(sum(sticks.sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    P = sticks.matrix(psi)
    torch.testing.assert_close(P.sum(-1), torch.ones_like(P[..., 0]))
    torch.testing.assert_close(P.sum(-2), torch.ones_like(P[..., 0]))
    single = worms.allowed.sum(-1) == 1
    assert torch.equal(P[single], worms.allowed[single].double())
    torch.testing.assert_close(sticks.inverse(P), psi, atol=1e-6, rtol=0)  # what Sticks promises is 1e-8 of its spread


def test_sticks_start_on_the_mask(data):
    connectome, worms = data
    sticks = Sticks(worms.allowed, connectome.body)
    start = sticks.softened(mask_center(worms.allowed))
    P = sticks.matrix(sticks.inverse(start))
    torch.testing.assert_close(P, start, atol=1e-6, rtol=0)
    assert float(P[~worms.allowed].sum()) < 0.01 * P.sum()

"""The two laws of Linderman et al. (2018) on the candidates of worms."""

import pytest
import torch
from padded import show_less
from test_baselines import small_connectome

from tutorials.celegans.baselines import fit_rounding_vi
from tutorials.celegans.baselines.map_faq import mask_center
from tutorials.celegans.baselines.rounding_vi import TEMPERATURE, rounded
from tutorials.celegans.baselines.stick_breaking_vi import Sticks
from tutorials.celegans.svi import Ascent
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


def test_a_run_that_leaves_the_polytope_ends_with_what_it_has(data, monkeypatch):
    connectome, worms = data
    step, count = Ascent.step, iter(range(100))

    def fails(self, *args):
        if next(count) == 5:
            torch.linalg.cholesky(-torch.eye(2))
        step(self, *args)

    monkeypatch.setattr(Ascent, "step", fails)
    result = fit_rounding_vi(worms, connectome, steps=20)
    assert result.extra == {"steps": 6.0, "diverged": 1.0}
    torch.testing.assert_close(result.marginals.sum(-1), torch.ones_like(result.marginals[..., 0]))
    assert fit_rounding_vi(worms, connectome, steps=3).extra["diverged"] == 0.0

"""The model with its weights: at hard permutations it is the full model."""

import math

import pyro.poutine as poutine
import pytest
import torch
from padded import show_less
from test_baselines import small_connectome

from pyro_gs import to_matrix
from tutorials.celegans.evidence import Statistics
from tutorials.celegans.model import full_model
from tutorials.celegans.weights_vi import weights_model
from tutorials.celegans.worms import simulate


@pytest.mark.parametrize("sizes", [None, [7, 9]], ids=["all shown", "one shows less"])
def test_the_log_joint_is_that_of_the_full_model(sizes):
    connectome = small_connectome(9)
    worms = simulate(connectome, worms=2, steps=30, known=0.2, eta=0.5)
    if sizes is not None:
        worms = show_less(worms, sizes)
    V = torch.randn(int(connectome.adjacency.sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    P = to_matrix(worms.truth).double()
    scaled = poutine.condition(weights_model, data={"V": V, "P": P})
    mine = poutine.trace(scaled).get_trace(worms, connectome.adjacency, Statistics.from_worms(worms)).log_prob_sum()
    full = poutine.condition(full_model, data={"W": worms.weight_scale * V, "P": P})
    theirs = poutine.trace(full).get_trace(worms, connectome).log_prob_sum()
    # the density of W is that of V, divided by the scale for each weight
    assert float(mine) == pytest.approx(float(theirs) + len(V) * math.log(worms.weight_scale), rel=1e-10)

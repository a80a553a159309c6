import random

import numpy as np
import pyro
import pytest
import torch

import pyro_gs as pgs
from pyro_gs.infer.randomness import randomness_kept


def states():
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def model(x):
    pyro.sample("noise", pyro.distributions.Normal(0.0, 1.0), obs=torch.tensor(np.random.normal() * random.random()))
    P = pyro.sample("P", pgs.UniformPermutation(3))
    pyro.factor("fit", (P * x).sum((-2, -1)))


def test_states_are_put_back_after_an_exception_too():
    before = states()
    with pytest.raises(ZeroDivisionError), randomness_kept():
        torch.rand(2), random.random(), np.random.normal()
        assert all(a != b for a, b in zip(states(), before, strict=True))
        raise ZeroDivisionError
    assert states() == before


@pytest.mark.filterwarnings("ignore::pyro_gs.VectorizationWarning")
@pytest.mark.parametrize(
    "function",
    [
        lambda x: pgs.enumerate_posterior(model, x),
        lambda x: pgs.round_samples(model, {"P": pgs.sinkhorn(torch.arange(540.0).cos().reshape(60, 3, 3))}, x),
        lambda x: pgs.permutation_posterior(model, {}, x),
        lambda x: pgs.enumerate_posterior(model, "no matrix"),
        lambda x: pgs.compare(model, (x,), methods=["exact"], progress=False),
    ],
    ids=["enumerate_posterior", "round_samples", "permutation_posterior, refused", "a model that raises", "compare"],
)
def test_what_is_not_random_leaves_no_trace(function):
    before = states()
    try:
        function(torch.eye(3))
    except (ValueError, TypeError) as error:
        assert str(error)
    assert states() == before

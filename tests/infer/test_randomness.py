import random

import numpy as np
import pyro
import pytest
import torch
from pyro.util import get_rng_state

import pyro_gs as pgs
from pyro_gs.infer.randomness import randomness_kept

# of a model that draws as it runs
pytestmark = pytest.mark.filterwarnings("ignore::pyro_gs.VectorizationWarning", "ignore::pyro_gs.EstimateWarning")


def states():
    found = get_rng_state()
    return [found["torch"].tolist(), found["random"], found["numpy"][1].tolist(), found["numpy"][2]]


def draw_all():
    return torch.rand(()) + random.random() + np.random.normal()  # noqa: NPY002 (the global generators are meant)


def model(x):
    pyro.sample("noise", pyro.distributions.Normal(0.0, 1.0), obs=draw_all())
    P = pyro.sample("P", pgs.UniformPermutation(3))
    pyro.factor("fit", (P * x).sum((-2, -1)))


def test_states_are_put_back():
    before = states()
    with randomness_kept():
        draw_all()
        assert states()[0] != before[0]
        assert states()[1] != before[1]
        assert states()[2:] != before[2:]
    assert states() == before


def sums(x):
    return pgs.enumerate_posterior(model, x)


def weights(x):
    return pgs.round_samples(model, {"P": pgs.sinkhorn(torch.arange(540.0).cos().reshape(60, 3, 3))}, x)


def table(x):
    return pgs.compare(model, (x,), methods=["exact"], progress=False)


@pytest.mark.parametrize("function", [sums, weights, table])
def test_what_is_not_random_leaves_no_trace(function):
    before = states()
    function(torch.eye(3))
    assert states() == before


@pytest.mark.parametrize("function", [sums, table, lambda x: pgs.permutation_posterior(model, {}, torch.eye(3))])
def test_nor_does_an_exception(function):
    before = states()
    with pytest.raises((TypeError, ValueError)):
        function("no matrix")
    assert states() == before

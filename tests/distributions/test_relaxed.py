"""Values that carry their logarithm: what keeps it, what drops it."""

import copy
import pickle

import pytest
import torch

import pyro_gs as pgs
from pyro_gs.distributions.relaxed import RelaxedPermutation


def cold(requires_grad=False):
    logits = torch.randn(6, 6).requires_grad_(requires_grad)
    return pgs.GumbelSinkhorn(0.02, logits), logits


def test_first_read_without_gradients_does_not_cost_the_graph():
    law, logits = cold(requires_grad=True)
    value = law.rsample()
    with torch.no_grad():
        quiet = law.log_prob(value)
    loud = law.log_prob(value)
    assert torch.equal(quiet, loud.detach())
    loud.backward()
    assert logits.grad.isfinite().all()


def test_a_detached_leaf_keeps_the_logarithm_and_gets_its_gradient():
    law, _ = cold()
    value = law.rsample().detach().requires_grad_()
    score = law.log_prob(value)
    assert score.isfinite()
    score.backward()
    assert value.grad.isfinite().all()


@pytest.mark.parametrize("change", ["itself", "view", "data", "out"])
def test_a_change_in_place_is_noticed(change):
    law = pgs.GumbelSinkhorn(0.5, torch.randn(4, 4))
    value, flat = law.sample(), torch.full((4, 4), 0.25)
    if change == "itself":
        value[...] = 0.25
    elif change == "view":
        value[:][...] = 0.25
    elif change == "data":
        value.data = flat.clone()
    else:
        torch.mul(flat, 1.0, out=value)
    assert value.log_p is None
    assert torch.allclose(law.log_prob(value), law.log_prob(flat))


def test_conversions_keep_the_logarithm_in_double_precision():
    law, _ = cold()
    value = law.sample()
    assert torch.equal(value.float().log_p, value.log_p)
    assert value.to(torch.float64).log_p.dtype == torch.float64


def test_copies():
    law, _ = cold()
    value = law.sample()
    for again in (copy.deepcopy(value), pickle.loads(pickle.dumps(value)), value.clone(), value.expand(2, 6, 6)[0]):
        assert isinstance(again, RelaxedPermutation)
        assert torch.equal(again.log_p, value.log_p)


def test_only_the_guides_own_tensor_stands_for_its_kl():
    guide = pgs.AutoGumbelSinkhorn(
        lambda: __import__("pyro").sample("P", pgs.UniformPermutation(4)), objective="tightened_kl"
    )
    value = guide()["P"]
    law, flat = pgs.GumbelSinkhorn(0.7, torch.randn(4, 4)), torch.tensor(value.detach().tolist())
    assert not torch.allclose(law.log_prob(value), law.log_prob(flat), atol=1e-2)
    assert torch.allclose(law.log_prob(value.detach()), law.log_prob(flat), rtol=1e-3)

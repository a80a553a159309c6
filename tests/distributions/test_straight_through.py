import copy

import pyro
import pyro.poutine as poutine
import pytest
import torch

from pyro_gs import GumbelSinkhorn, GumbelSinkhornStraightThrough, UniformPermutation, matching, relax
from pyro_gs.distributions.relaxed import RelaxedPermutation, log_of, plain

BAND = (torch.arange(4)[:, None] - torch.arange(4)).abs() <= 1


@pytest.fixture
def pair():
    """The straight-through law and the relaxed one, and draws of both with the same noise."""
    logits = torch.randn(2, 4, 4).masked_fill(torch.stack([~BAND, torch.zeros(4, 4).bool()]), -torch.inf)
    logits.requires_grad_()
    hard_law, soft_law = GumbelSinkhornStraightThrough(0.4, logits), GumbelSinkhorn(0.4, logits)
    torch.manual_seed(5)
    hard = hard_law.rsample((3,))
    torch.manual_seed(5)
    soft = soft_law.rsample((3,))
    return hard_law, soft_law, hard, soft, logits


def test_hard_forward_soft_gradient(pair):
    _, _, hard, soft, logits = pair
    assert ((hard == 0) | (hard == 1)).all()
    assert torch.equal(plain(hard).detach(), matching(log_of(soft).detach()).to(hard.dtype))
    weight = torch.randn(hard.shape)
    grads = [torch.autograd.grad((weight * plain(x)).sum(), logits)[0] for x in (hard, soft)]
    assert torch.equal(*grads)


def test_density_at_the_relaxed_point(pair):
    hard_law, soft_law, hard, soft, logits = pair
    want = soft_law.log_prob(soft)
    prior = GumbelSinkhorn(1.0, soft_law.logits.detach())
    for value in (hard, hard.clone(), hard.detach(), copy.deepcopy(hard.detach()), hard[None].expand(2, 3, 2, 4, 4)[1]):
        assert isinstance(value, RelaxedPermutation)
        assert torch.allclose(hard_law.log_prob(value), want)
        assert torch.allclose(prior.log_prob(value), prior.log_prob(soft))
    (grad,) = torch.autograd.grad(hard_law.log_prob(hard).sum(), logits, retain_graph=True)
    (other,) = torch.autograd.grad(want.sum(), logits)
    assert torch.allclose(grad, other)


def test_expand_and_to_event(pair):
    hard_law, *_ = pair
    large = hard_law.expand((5, 2))
    assert type(large) is GumbelSinkhornStraightThrough
    value = large.expand((3, 5, 2)).to_event(1).rsample()
    assert ((value == 0) | (value == 1)).all()
    assert large.to_event(1).log_prob(value).shape == (3, 5)


def test_replay_into_a_relaxed_model():
    logits = torch.randn(4, 4, requires_grad=True)

    def model():
        with pyro.plate("items", 3):
            P = pyro.sample("P", UniformPermutation(4))
        pyro.sample("y", pyro.distributions.Normal(P @ torch.arange(4.0), 1.0).to_event(2), obs=torch.zeros(3, 4))

    def guide():
        with pyro.plate("items", 3):
            pyro.sample("P", GumbelSinkhornStraightThrough(0.5, logits))

    guided = poutine.trace(guide).get_trace()
    value = guided.nodes["P"]["value"]
    assert ((value == 0) | (value == 1)).all()
    trace = poutine.trace(poutine.replay(relax(model, temperature=1.0), guided)).get_trace()
    trace.compute_log_prob()
    soft = RelaxedPermutation.wrap(log_of(value).exp(), log_of(value))
    want = GumbelSinkhorn(1.0, torch.zeros(4, 4)).log_prob(soft)
    assert torch.allclose(trace.nodes["P"]["log_prob"], want)
    pyro.infer.Trace_ELBO().differentiable_loss(relax(model), guide).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() > 0


def test_a_permutation_without_its_logarithm():
    law = GumbelSinkhornStraightThrough(0.5, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="has a zero at row 0, column 1, where a match is allowed, so it has no density"):
        law.log_prob(torch.eye(3))

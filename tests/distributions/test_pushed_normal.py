"""What the two laws of Linderman et al. (2018) have in common."""

import copy
import math
import pickle

import pyro
import pytest
import torch

from pyro_gs.distributions.relaxed import plain
from pyro_gs.distributions.rounding import RoundingPermutation
from pyro_gs.distributions.stick_breaking import StickBreakingPermutation

every_kind = pytest.mark.parametrize(("kind", "added"), [(StickBreakingPermutation, 1), (RoundingPermutation, 0)])
SHAPES = [((), (3, 3), ()), ((2, 1), (4, 3, 3), ()), ((), (3, 3), (2, 3, 3)), ((), (2, 1, 1), (1, 1))]


def make(kind, temperature=(), loc=(3, 3), scale=()):
    return kind(0.2 + 0.5 * torch.rand(temperature), torch.randn(loc), 0.5 + torch.rand(scale))


@every_kind
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes(kind, added, shapes):
    law = make(kind, *shapes)
    assert kind.infer_shapes(**dict(zip(("temperature", "loc", "scale"), shapes, strict=True))) == (
        law.batch_shape,
        law.event_shape,
    )
    assert law.event_shape == (shapes[1][-1] + added,) * 2
    for sample_shape in ((), (3,), (2, 3)):
        value = law.sample(torch.Size(sample_shape))
        assert value.shape == sample_shape + law.batch_shape + law.event_shape
        assert law.support.check(value).all()
        assert law.log_prob(value).shape == sample_shape + law.batch_shape
        assert law.log_prob(value).isfinite().all()


@every_kind
def test_expand(kind, added):
    law = make(kind, (), (2, 3, 3), ())
    large = law.expand((3, 2)).expand((4, 3, 2))
    assert type(large) is kind
    value = large.rsample()
    assert value.shape == (4, 3, 2, *law.event_shape)
    assert torch.allclose(large.log_prob(value), law.log_prob(value))
    assert repr(large) == f"{kind.__name__}(batch_shape=(4, 3, 2), event_shape={tuple(law.event_shape)})"

    def model():
        with pyro.plate("items", 2):
            return pyro.sample("P", make(kind))

    assert type(pyro.poutine.trace(model).get_trace().nodes["P"]["fn"]) is kind
    assert law.to_event(1).log_prob(value).shape == (4, 3)
    assert (law.mask(torch.zeros(2).bool()).log_prob(law.sample()) == 0).all()


@every_kind
def test_copies(kind, added):
    law = make(kind)
    for again in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law)):
        torch.manual_seed(1)
        want = law.sample()
        torch.manual_seed(1)
        value = again.sample()
        assert torch.equal(plain(value), plain(want))
        assert torch.equal(law.log_prob(want), again.log_prob(value))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(kind, added, dtype):
    law = kind(0.3, torch.zeros(40, 3, 3, dtype=dtype), 0.7)
    value = law.rsample(torch.Size((50,)))
    assert value.dtype == law.log_prob(value).dtype == dtype
    assert law.log_prob(value).isfinite().all()


@pytest.mark.usefixtures("float64_only")
@every_kind
def test_gradients_of_samples_and_density(kind, added):
    arguments = [part.requires_grad_() for part in (torch.tensor(0.5), torch.randn(3, 3), torch.rand(3, 3) + 0.5)]

    def draw(*arguments):
        torch.manual_seed(0)
        law = kind(*arguments)
        value = law.rsample()
        return plain(value), law.log_prob(value)

    assert torch.autograd.gradcheck(draw, arguments)
    value = kind(*arguments).sample()
    assert torch.autograd.gradcheck(lambda *arguments: kind(*arguments).log_prob(value), arguments)


@every_kind
def test_svi_step(kind, added):
    n = 3 + added

    def model():
        with pyro.plate("items", 2):
            P = pyro.sample("P", kind(0.5, torch.zeros(3, 3)))
        pyro.sample("x", pyro.distributions.Normal(plain(P)[..., 0], 0.5).to_event(2), obs=torch.zeros(2, n))

    def guide():
        loc = pyro.param("loc", torch.zeros(2, 3, 3))
        with pyro.plate("items", 2):
            pyro.sample("P", kind(0.5, loc, 0.5))

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    assert math.isfinite(svi.step())
    assert math.isfinite(svi.step())
    assert (pyro.param("loc") != 0).any()


@every_kind
def test_bad_arguments(kind, added):
    good = torch.zeros(2, 3, 3)
    with pytest.raises(ValueError, match="temperature must be positive and finite, but is -1"):
        kind(-1.0, good)
    with pytest.raises(ValueError, match="loc must be square"):
        kind(1.0, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="loc must have dtype torch.float32 or torch.float64"):
        kind(1.0, good.long())
    bad = good.clone()
    bad[1, 2, 0] = math.inf
    with pytest.raises(ValueError, match="loc of batch item 1 must be finite, but is inf at row 2, column 0"):
        kind(1.0, bad)
    with pytest.raises(ValueError, match="scale must be positive and finite, but is 0.0"):
        kind(1.0, good, 0.0)
    for shape in ((4,), (5, 3, 3)):
        with pytest.raises(ValueError, match="scale of shape .* does not broadcast with loc"):
            kind(1.0, good, torch.ones(shape))
    with pytest.raises(ValueError, match=r"scale of shape \(3, 3\) does not broadcast with loc of shape \(1, 1\)"):
        kind(1.0, torch.zeros(1, 1), torch.ones(3, 3))
    with pytest.raises(ValueError, match="temperature of shape .* does not broadcast"):
        kind(torch.ones(3), good)


@every_kind
def test_bad_values(kind, added):
    law = make(kind, loc=(2, 3, 3))
    with pytest.raises(ValueError, match=r"value must have shape \(..., ., .\), but has \(2, 2\)"):
        law.log_prob(torch.eye(2))
    with pytest.raises(ValueError, match="value must have shape .* but has list"):
        law.log_prob([1.0])
    bad = law.sample().clone()
    bad[1, 0, 0] = math.nan
    with pytest.raises(ValueError, match="value of batch item 1 is not in the support of"):
        law.log_prob(bad)


@pytest.mark.cuda
@every_kind
def test_on_cuda(kind, added):
    law = kind(0.5, torch.zeros(2, 3, 3, device="cuda"))
    value = law.rsample()
    assert value.device.type == law.log_prob(value).device.type == "cuda"

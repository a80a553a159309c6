"""One suite for every law; each test names the one of Pyro's ``test_distributions.py`` that it corresponds to."""

import copy
import pickle

import pyro
import pytest
import torch
from dist_fixture import FIXTURES

from pyro_gs import GumbelSinkhorn


@pytest.fixture(params=FIXTURES, ids=str)
def fixture(request):
    return request.param


@pytest.fixture
def law(fixture):
    return fixture.make()


def deterministic(law):
    return getattr(law, "num_particles", 0) == 0


def test_shapes(fixture, law):  # test_infer_shapes, test_sample_shapes
    event = law.event_shape
    assert law.batch_shape == fixture.batch_shape
    assert law.event_dim == 2
    assert event[0] == event[1]
    for sample_shape in ((), (3,), (2, 3)):
        value = law.sample(torch.Size(sample_shape))
        assert value.shape == sample_shape + law.batch_shape + event
        assert law.log_prob(value).shape == sample_shape + law.batch_shape
    assert type(law).infer_shapes(**fixture.arg_shapes) == (law.batch_shape, event)


def test_samples_lie_in_the_support(law):  # test_support_shape, test_support_is_not_discrete
    value = law.sample(torch.Size((5,)))
    inside = law.support.check(value)
    assert inside.shape == (5, *law.batch_shape)
    assert inside.all()
    assert law.support.event_dim == 2
    assert law.support.is_discrete == (not law.has_rsample)
    assert not law.support.check(value * 0.5).any()


def test_expand(law):  # test_expand_by, test_expand_new_dim, test_expand_twice
    shape = torch.Size((3, 2, *law.batch_shape)) if law.batch_shape[:1] != (1,) else torch.Size((3, 2, 5))
    large = law.expand(shape)
    assert type(large) is type(law)
    assert large.batch_shape == shape
    value = large.sample()
    assert value.shape == shape + law.event_shape
    assert large.log_prob(value).shape == shape
    if deterministic(law):
        assert torch.allclose(large.log_prob(value), law.log_prob(value), atol=1e-4)
    twice = large.expand(torch.Size((4,)) + shape)
    assert type(twice) is type(law)
    assert twice.sample().shape == (4, *shape, *law.event_shape)


def test_to_event_and_mask(law):  # test_to_event, test_mask
    if not law.batch_shape:
        law = law.expand(torch.Size((3,)))
    joint = law.to_event(len(law.batch_shape))
    value = joint.sample()
    assert joint.log_prob(value).shape == ()
    if deterministic(law):
        assert torch.allclose(joint.log_prob(value), law.log_prob(value).sum(), rtol=1e-5)
    masked = law.mask(torch.zeros(law.batch_shape, dtype=torch.bool))
    assert (masked.log_prob(masked.sample()) == 0).all()


def test_copies(law):  # test_pickle, test_deepcopy
    for again in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law)):
        torch.manual_seed(1)
        want = law.sample()
        torch.manual_seed(1)
        value = again.sample()
        assert torch.equal(torch.as_tensor(want), torch.as_tensor(value))
        if deterministic(law):
            assert torch.equal(law.log_prob(want), again.log_prob(value))


def test_same_seed_same_sample(law):
    torch.manual_seed(3)
    one = law.sample()
    torch.manual_seed(3)
    assert torch.equal(one, law.sample())


def test_enumerate_support(law):  # test_enumerate_support_shape
    if not law.has_enumerate_support:
        pytest.skip("continuous")
    wide = law.enumerate_support()
    narrow = law.enumerate_support(expand=False)
    assert wide.shape[1:] == law.batch_shape + law.event_shape
    assert narrow.shape == (len(wide),) + (1,) * len(law.batch_shape) + law.event_shape
    law._validate_args = False
    total = torch.logsumexp(law.log_prob(wide), 0)
    assert torch.allclose(total, torch.zeros(law.batch_shape), atol=1e-5)


def test_in_a_plate_the_class_is_kept(law):
    if len(law.batch_shape) > 1:
        pytest.skip("one plate")
    size = 3 if not law.batch_shape or law.batch_shape == (1,) else law.batch_shape[0]

    def model():
        with pyro.plate("items", size):
            return pyro.sample("P", law)

    site = pyro.poutine.trace(model).get_trace().nodes["P"]
    assert type(site["fn"]) is type(law)
    assert site["value"].shape == (size, *law.event_shape)


def test_validation(law):
    with pytest.raises(ValueError, match="value"):
        law.log_prob(torch.rand(law.batch_shape + law.event_shape) + 0.1)


@pytest.mark.cuda
def test_on_cuda():
    law = GumbelSinkhorn(0.5, torch.randn(3, 5, 5, device="cuda"))
    value = law.rsample()
    assert value.device.type == law.log_prob(value).device.type == "cuda"

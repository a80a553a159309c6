import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

import pyro_gs as pgs

ALLOWED = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()


def site(model, name="P"):
    return poutine.trace(model).get_trace().nodes[name]


def test_uniform_becomes_gumbel_sinkhorn_with_the_mask():
    node = site(pgs.relax(lambda: pyro.sample("P", pgs.UniformPermutation(3, ALLOWED)), temperature=0.5))
    assert isinstance(node["fn"], pgs.GumbelSinkhorn)
    assert torch.equal(node["fn"].logits, torch.zeros(3, 3).masked_fill(~ALLOWED, -torch.inf))
    assert float(node["fn"].temperature) == 0.5
    assert (torch.as_tensor(node["value"])[~ALLOWED] == 0).all()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d.mask(torch.tensor(True)),
        lambda d: d.mask(torch.tensor([True, False])),
        lambda d: d.to_event(1),
        lambda d: d.mask(torch.tensor([True, False])).to_event(1),
        lambda d: d.expand([4, 2]),
        lambda d: dist.torch_distribution.ExpandedDistribution(d, torch.Size([4, 2])),
    ],
)
def test_wrappers_are_kept(wrap):
    hard = wrap(pgs.UniformPermutation(3).expand([2]))
    with pgs.relax(temperature=0.7):
        trace = poutine.trace(lambda: pyro.sample("P", hard)).get_trace()
    soft = trace.nodes["P"]["fn"]
    assert (soft.batch_shape, soft.event_shape) == (hard.batch_shape, hard.event_shape)
    trace.compute_log_prob()
    assert trace.nodes["P"]["log_prob"].shape == hard.batch_shape
    assert ((torch.as_tensor(trace.nodes["P"]["value"]) > 0) & (torch.as_tensor(trace.nodes["P"]["value"]) < 1)).any()
    if "mask" in str(type(hard)).lower():
        assert "mask" in str(type(soft)).lower()


def test_in_a_plate():
    def model():
        with pyro.plate("worms", 4):
            return pyro.sample("P", pgs.UniformPermutation(3))

    node = site(pgs.relax(model))
    assert isinstance(node["fn"], pgs.GumbelSinkhorn)
    assert node["value"].shape == (4, 3, 3)


def test_observed_sites_stay():
    P = torch.eye(3)
    node = site(pgs.relax(lambda: pyro.sample("P", pgs.UniformPermutation(3), obs=P)))
    assert isinstance(node["fn"], pgs.UniformPermutation)

    def model():
        return pyro.sample("P", pgs.UniformPermutation(3))

    for conditioned in (poutine.condition(pgs.relax(model), {"P": P}), pgs.relax(poutine.condition(model, {"P": P}))):
        trace = poutine.trace(conditioned).get_trace()
        assert isinstance(trace.nodes["P"]["fn"], pgs.UniformPermutation)
        assert float(trace.log_prob_sum()) == pytest.approx(-1.791759, abs=1e-5)


def test_other_sites_and_relaxed_priors_stay():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        return pyro.sample("P", pgs.GumbelSinkhorn(0.3, torch.zeros(3, 3)))

    trace = poutine.trace(pgs.relax(model, temperature=2.0)).get_trace()
    assert isinstance(trace.nodes["x"]["fn"], dist.Normal)
    assert float(trace.nodes["P"]["fn"].temperature) == pytest.approx(0.3)


def test_temperature_is_read_at_every_call():
    temperature = [1.0]
    model = pgs.relax(lambda: pyro.sample("P", pgs.UniformPermutation(3)), temperature=lambda: temperature[0])
    assert float(site(model)["fn"].temperature) == 1.0
    temperature[0] = 0.25
    assert float(site(model)["fn"].temperature) == 0.25


def test_signature_passes_through():
    def model(a, *, b):
        return pyro.sample("P", pgs.UniformPermutation(a)).sum() + b

    assert float(pgs.relax(model)(3, b=2.0)) == pytest.approx(5.0, abs=1e-4)


def test_other_laws_need_a_relaxation(monkeypatch):
    class Swap(pgs.UniformPermutation):
        pass

    class Stranger(dist.TorchDistribution):
        arg_constraints = {}  # noqa: RUF012
        support = pgs.constraints.permutation

        def __init__(self):
            super().__init__(torch.Size(), torch.Size((3, 3)))

        def sample(self, sample_shape=()):
            return torch.eye(3)

        def log_prob(self, value):
            return torch.zeros(())

    assert isinstance(site(pgs.relax(lambda: pyro.sample("P", Swap(3))))["fn"], pgs.GumbelSinkhorn)  # by inheritance
    strange = pgs.relax(lambda: pyro.sample("P", Stranger()))
    with pytest.raises(NotImplementedError, match="no relaxation of Stranger at site 'P'.*register_relaxation"):
        strange()
    from pyro_gs.infer import handlers

    monkeypatch.setattr(handlers, "_RELAXATIONS", dict(handlers._RELAXATIONS))
    pgs.register_relaxation(Stranger)(lambda law, temperature: pgs.GumbelSinkhorn(temperature, torch.zeros(3, 3)))
    assert isinstance(site(strange)["fn"], pgs.GumbelSinkhorn)


def test_bad_arguments():
    with pytest.raises(ValueError, match="temperature must be positive and finite, but is 0"):
        pgs.relax(lambda: None, temperature=0)
    with pytest.raises(TypeError, match="model must be callable, but is float"):
        pgs.relax(0.5)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: pgs.GibbsPermutation(torch.randn(2, 3, 3)), pgs.GumbelSinkhorn),
        (lambda: pgs.GumbelMatching(torch.randn(2, 3, 3)), pgs.GumbelSinkhorn),
        (lambda: pgs.PlackettLuce(torch.randn(2, 3)), pgs.RelaxedPlackettLuce),
    ],
)
def test_what_becomes_of_each_law(make, kind):
    law = make()

    def model():
        with pyro.plate("items", 2):
            return pyro.sample("P", law)

    site = poutine.trace(pgs.relax(model, temperature=0.3)).get_trace().nodes["P"]
    assert type(site["fn"]) is kind
    assert site["fn"].batch_shape == (2,)
    assert (site["fn"].temperature == 0.3).all()
    given = "scores" if kind is pgs.RelaxedPlackettLuce else "logits"
    assert torch.equal(getattr(site["fn"], given), getattr(law, given))


def test_a_partial_matching_does_not_stay_hard_in_silence():
    def model(obs=None):
        return pyro.sample("P", pgs.GibbsMatching(torch.zeros(2, 2), unmatched=0.0), obs=obs)

    with pytest.raises(NotImplementedError, match=r"no relaxation of GibbsMatching at site 'P'.*pad_logits"):
        pgs.relax(model)()
    assert torch.equal(pgs.relax(model)(torch.eye(2)), torch.eye(2))  # observed, it stays

import math

import pytest
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit
from scipy import stats

from pyro_gs import GumbelSinkhorn
from pyro_gs.distributions.plackett_luce import PlackettLuce
from pyro_gs.distributions.relaxed import RelaxedPermutation
from pyro_gs.distributions.relaxed_plackett_luce import RelaxedPlackettLuce


def neural_sort(r):
    """The paper's formula, entry by entry, with its logarithm."""
    n = r.shape[-1]
    rows = []
    for i in range(1, n + 1):
        z = [(n + 1 - 2 * i) * r[..., j] - sum((r[..., j] - r[..., k]).abs() for k in range(n)) for j in range(n)]
        rows.append(torch.stack(z, -1).log_softmax(-1))
    log_p = torch.stack(rows, -2)
    return RelaxedPermutation.wrap(log_p.exp(), log_p)


def chart(value):
    """Coordinates t (..., n - 1) of a value, from its first two rows."""
    log_p = value.log_p
    twice = log_p[..., 0, :] - log_p[..., 1, :]
    return (twice[..., :-1] - twice[..., -1:]) / 2


# --- the density


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_n2_is_logistic(tau):
    scores = torch.tensor([0.4, -0.7])
    t = torch.linspace(-20, 20, 9)
    got = RelaxedPlackettLuce(tau, scores).log_prob(neural_sort(torch.stack([t, torch.zeros(9)], -1)))
    want = stats.logistic.logpdf(tau * t.numpy(), loc=1.1) + math.log(tau)
    assert torch.allclose(got, torch.from_numpy(want), atol=1e-10)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
def test_total_mass(tau):
    two = RelaxedPlackettLuce(tau, torch.tensor([0.5, -1.0]))
    t = torch.arange(-40.0, 40.0, 0.25) / tau
    mass = two.log_prob(neural_sort(torch.stack([t, 0 * t], -1))).exp().sum() * 0.25 / tau
    assert float(mass) == pytest.approx(1.0, abs=1e-9)
    three = RelaxedPlackettLuce(tau, torch.tensor([0.5, -1.0, 0.2]))
    a, b = torch.meshgrid(t, t, indexing="ij")
    mass = three.log_prob(neural_sort(torch.stack([a, b, 0 * a], -1))).exp().sum() * (0.25 / tau) ** 2
    assert float(mass) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("tau", [0.2, 1.5])
def test_goodness_of_fit(n, tau):
    law = RelaxedPlackettLuce(tau, torch.randn(n))
    value = law.sample(torch.Size((20_000,)))
    t = tau * chart(value)  # of unit scale, as the test wants
    density = law.log_prob(value).exp() / tau ** (n - 1)
    assert auto_goodness_of_fit(t, density) > 2e-5  # the failure rate


@pytest.mark.usefixtures("float64_only")
def test_the_base_measure_is_that_of_every_temperature():
    # E_q[p / q] = 1 for two laws at different temperatures
    p, q = RelaxedPlackettLuce(1.2, 0.5 * torch.randn(4)), RelaxedPlackettLuce(0.8, torch.zeros(4))
    value = q.sample(torch.Size((40_000,)))
    ratio = (p.log_prob(value) - q.log_prob(value)).exp()
    error = float(ratio.std()) / 200
    assert error < 0.02
    assert abs(float(ratio.mean()) - 1) < 4 * error


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [1, 2, 6])
def test_entropy(n):
    law = RelaxedPlackettLuce(torch.tensor([0.3, 1.0]), torch.randn(n))
    log_p = law.log_prob(law.sample(torch.Size((20_000,))))
    error = log_p.std(0) / 20_000**0.5
    assert ((law.entropy() + log_p.mean(0)).abs() <= 4 * error + 1e-12).all()


def test_one_item():
    law = RelaxedPlackettLuce(0.5, torch.randn(3, 1))
    assert torch.equal(torch.as_tensor(law.sample()), torch.ones(3, 1, 1))
    assert law.log_prob(torch.ones(3, 1, 1)).tolist() == [0.0, 0.0, 0.0]


# --- samples


@pytest.mark.usefixtures("float64_only")
def test_samples_are_the_papers_formula():
    tau, scores = 0.7, torch.randn(5)
    torch.manual_seed(5)
    value = RelaxedPlackettLuce(tau, scores).rsample(torch.Size((4,)))
    torch.manual_seed(5)
    noise = -torch.log(-torch.log(torch.rand(4, 5)))
    want = neural_sort((scores + noise) / tau)
    assert torch.allclose(torch.as_tensor(value), torch.as_tensor(want), atol=1e-10)
    assert torch.allclose(value.log_p, want.log_p, atol=1e-9)


@pytest.mark.usefixtures("float64_only")
def test_zero_temperature_is_plackett_luce():
    scores = torch.randn(3, 4)
    draws = []
    for law in (PlackettLuce(scores), RelaxedPlackettLuce(1e-4, scores), RelaxedPlackettLuce(2.0, scores)):
        torch.manual_seed(7)
        draws.append(law.hard_sample(torch.Size((50,))) if len(draws) == 2 else law.sample(torch.Size((50,))))
    hard, cold, own = draws
    assert torch.allclose(torch.as_tensor(cold), hard, atol=0.05)
    assert torch.equal(own, hard)
    assert torch.equal(RelaxedPlackettLuce(2.0, scores).mode, PlackettLuce(scores).mode)


@pytest.mark.usefixtures("float64_only")
def test_gradients():
    scores, tau = torch.randn(2, 4, requires_grad=True), torch.tensor([0.6, 1.3], requires_grad=True)
    prior = RelaxedPlackettLuce(0.9, torch.zeros(4))
    fixed = RelaxedPlackettLuce(tau.detach(), scores.detach()).sample()

    def draw(s, t):
        torch.manual_seed(3)
        return RelaxedPlackettLuce(t, s).rsample()

    def elbo(s, t):
        value = draw(s, t)
        return prior.log_prob(value) - RelaxedPlackettLuce(t, s).log_prob(value)

    assert torch.autograd.gradcheck(lambda s, t: torch.as_tensor(draw(s, t)) * 1.0, (scores, tau))
    assert torch.autograd.gradcheck(lambda s, t: RelaxedPlackettLuce(t, s).log_prob(fixed), (scores, tau))
    assert torch.autograd.gradcheck(elbo, (scores, tau))
    assert torch.autograd.gradcheck(lambda t: RelaxedPlackettLuce(t, scores.detach()).entropy(), tau)


@pytest.mark.usefixtures("float64_only")
def test_gradient_in_the_value():
    law, r = RelaxedPlackettLuce(0.7, torch.randn(4)), torch.randn(4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: law.log_prob(torch.as_tensor(neural_sort(r)) * 1.0), r)


# --- values that underflow


def test_cold_values_score_under_any_instance():
    law, prior = RelaxedPlackettLuce(0.003, torch.randn(2, 5)), RelaxedPlackettLuce(1.0, torch.zeros(5))
    value = law.rsample()
    assert (torch.as_tensor(value) == 0).any()
    own = law.log_prob(value)
    t = chart(value)
    a = torch.cat([law.scores[:, :-1].double() - 0.003 * t, law.scores[:, -1:].double()], -1)
    want = math.lgamma(5) + 4 * math.log(0.003) + a.sum(-1) - 5 * a.logsumexp(-1)
    assert torch.allclose(own.double(), want, rtol=1e-4)
    assert prior.log_prob(value).isfinite().all()
    for moved in (value.clone(), value.detach(), value.expand(3, 2, 5, 5)[1], value.unsqueeze(0)):
        assert torch.allclose(law.log_prob(moved).reshape(2), own)
    assert torch.allclose(law.to_event(1).log_prob(value), own.sum())
    assert torch.allclose(law.expand(torch.Size((3, 2))).log_prob(value)[1], own)


@pytest.mark.parametrize(("tau", "kind"), [(0.005, torch.float64), (0.5, torch.float32)])
def test_underflowed_values_without_their_logarithm_are_refused(tau, kind):
    law = RelaxedPlackettLuce(tau, torch.randn(300, 6, dtype=kind))
    lost = torch.as_tensor(law.sample()) * 1.0
    assert law.support.check(lost).all()  # rows sum to one, more cannot be said
    with pytest.raises(
        ValueError, match=r"value of batch item .* at row .*, too small for torch.float.. to hold its digits"
    ):
        law.log_prob(lost)


@pytest.mark.usefixtures("float64_only")
def test_float32_scores_like_float64():
    scores = torch.randn(4, 6).float()
    law = RelaxedPlackettLuce(0.02, scores)
    value = law.rsample()
    assert value.dtype == law.log_prob(value).dtype == law.entropy().dtype == law.hard_sample().dtype == torch.float32
    want = RelaxedPlackettLuce(law.temperature.double(), scores.double()).log_prob(value)
    assert torch.allclose(law.log_prob(value).double(), want, rtol=1e-6)


# --- bad input


@pytest.mark.parametrize("tau", [1.0, 0.01])
def test_values_of_another_relaxed_law_are_refused(tau):
    law, value = RelaxedPlackettLuce(tau, torch.zeros(4)), GumbelSinkhorn(tau, torch.randn(2, 4, 4)).sample()
    assert not law.support.check(value).any()
    with pytest.raises(
        ValueError, match="value of batch item 0 is not in the support of RelaxedPlackettLuce: expected a matrix"
    ):
        law.log_prob(value)


def test_bad_values():
    law = RelaxedPlackettLuce(1.0, torch.zeros(2, 3))
    value = torch.as_tensor(law.sample()) * 1.0
    assert law.support.check(value).tolist() == [True, True]
    off = value.clone()
    off[1, 1] = off[1, 1].roll(1)
    assert law.support.check(off).tolist() == [True, False]
    with pytest.raises(ValueError, match="value of batch item 1 is not in the support"):
        law.log_prob(off)
    for wrong in (0.9 * value, -value, torch.full((2, 3, 3), math.nan)):
        with pytest.raises(ValueError, match="value of batch item 0 is not in the support"):
            law.log_prob(wrong)
    with pytest.raises(ValueError, match=r"value must have shape \(..., 3, 3\), but has \(4, 4\)"):
        law.log_prob(torch.eye(4))
    with pytest.raises(ValueError, match=r"value of shape \(5, 3, 3\) does not broadcast with the batch shape \(2,\)"):
        law.log_prob(value[:1].expand(5, 3, 3))
    with pytest.raises(TypeError, match="value must have a floating dtype"):
        law.log_prob(torch.eye(3).long())


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0.0, torch.zeros(3)), ValueError, "temperature must be positive and finite, but is 0.0"),
        ((1e-60, torch.zeros(3, dtype=torch.float32)), ValueError, "temperature must be positive and finite, but is 0.0"),
        ((torch.tensor([1.0, math.nan]), torch.zeros(2, 3)), ValueError, r"temperature .* is nan at \(1,\)"),
        ((torch.ones(4), torch.zeros(3, 2)), ValueError, r"temperature of shape \(4,\) does not broadcast with \(3,\)"),
        (("1", torch.zeros(3)), TypeError, "temperature must be a number or a tensor, but is str"),
        ((1.0, torch.tensor([0.0, -math.inf])), ValueError, "scores has the entry -inf at position 1"),
        ((1.0, torch.arange(3)), TypeError, "scores must have dtype"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        RelaxedPlackettLuce(*arguments)


def test_form():
    law = RelaxedPlackettLuce(torch.tensor([[0.5], [1.0]]), torch.zeros(3, 4))
    assert repr(law) == "RelaxedPlackettLuce(batch_shape=(2, 3), event_shape=(4, 4))"
    assert RelaxedPlackettLuce.infer_shapes(temperature=(2, 1), scores=(3, 4)) == (law.batch_shape, law.event_shape)
    assert repr(law.support) == "UnimodalRowStochastic()"
    empty = RelaxedPlackettLuce(1.0, torch.zeros(0, 3))
    assert empty.log_prob(empty.sample()).shape == (0,)

import math

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from scipy import integrate, stats
from torch.distributions import kl_divergence

from pyro_gs import UniformPermutation, to_matrix
from pyro_gs.distributions.mallows import Mallows
from pyro_gs.distributions.plackett_luce import PlackettLuce
from pyro_gs.distributions.ranking_kl import mallows_kl, plackett_luce_kl, relaxed_plackett_luce_kl
from pyro_gs.distributions.relaxed_plackett_luce import RelaxedPlackettLuce

THETA = torch.tensor([0.0, 1e-8, 0.4, 3.0])


def centers(count, n):
    return to_matrix(torch.stack([torch.randperm(n) for _ in range(count)]))


PAIRS = {
    "Plackett-Luce": lambda n: (PlackettLuce(2 * torch.randn(4, n)), PlackettLuce(torch.randn(4, n))),
    "Plackett-Luce, uniform": lambda n: (PlackettLuce(torch.randn(4, n)), UniformPermutation(n)),
    "Mallows": lambda n: (Mallows(centers(4, n), THETA), Mallows(centers(4, n), THETA.flip(0))),
    "Mallows, one center": lambda n: (Mallows(torch.eye(n), THETA), Mallows(torch.eye(n), 0.7)),
    "Mallows, uniform": lambda n: (Mallows(centers(4, n), THETA), UniformPermutation(n)),
}


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("pair", PAIRS)
def test_is_the_sum_over_all_permutations(pair, n, tol):
    q, p = PAIRS[pair](n)
    values = q.enumerate_support()
    log_q, log_p = q.log_prob(values), p.log_prob(values)
    want = (log_q.exp() * (log_q - log_p)).sum(0)
    got = kl_divergence(q, p)
    assert got.shape == (4,)
    assert torch.allclose(got, want, atol=100 * tol)


@pytest.mark.parametrize("pair", PAIRS)
def test_of_a_law_from_itself_is_zero(pair, tol):
    q, _ = PAIRS[pair](5)
    assert kl_divergence(q, q).abs().max() <= 10 * tol


def test_shapes_broadcast(tol):
    q, p = PlackettLuce(torch.randn(2, 1, 4)), PlackettLuce(torch.randn(3, 4))
    assert kl_divergence(q, p).shape == (2, 3)
    one = kl_divergence(PlackettLuce(q.scores[1, 0]), PlackettLuce(p.scores[2]))
    assert torch.allclose(kl_divergence(q, p)[1, 2], one, atol=tol)
    q, p = Mallows(centers(2, 4)[:, None], 0.5), Mallows(centers(3, 4), torch.tensor([0.1, 0.2, 0.3]))
    one = kl_divergence(Mallows(q.center[1, 0], 0.5), Mallows(p.center[2], 0.3))
    assert torch.allclose(kl_divergence(q, p)[1, 2], one, atol=tol)
    for law, other in (
        (q, p),
        (RelaxedPlackettLuce(0.5, torch.randn(2, 1, 3)), RelaxedPlackettLuce(1.0, torch.randn(3, 3))),
    ):
        small = kl_divergence(law, other)
        large = kl_divergence(law.expand(torch.Size((5, 2, 3))), other.expand(torch.Size((5, 2, 3))))
        assert torch.allclose(large, small.expand(5, 2, 3), atol=10 * tol)
    joint = kl_divergence(law.expand(torch.Size((2, 3))).to_event(2), other.expand(torch.Size((2, 3))).to_event(2))
    assert torch.allclose(joint, small.sum(), atol=100 * tol)


def test_forbidden_pairs_cost_everything(tol):
    masks = torch.ones(2, 3, 3, dtype=torch.bool)
    masks[1, 0, 0] = False
    p = UniformPermutation(3, masks)
    for q in (PlackettLuce(torch.randn(3)), Mallows(torch.eye(3), 1.0)):
        kl = kl_divergence(q, p)
        assert kl[1] == math.inf
        assert float(kl[0]) == pytest.approx(math.log(6) - float(q.entropy()), abs=10 * tol)


# --- relaxed


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("rho", [0.2, 1.0, 2.5])
def test_relaxed_n2_by_quadrature(rho):
    q, p = RelaxedPlackettLuce(0.5, torch.tensor([0.8, -0.3])), RelaxedPlackettLuce(0.5 * rho, torch.tensor([-1.0, 0.2]))

    def integrand(d):
        log_q = stats.logistic.logpdf(d, loc=1.1)
        return math.exp(log_q) * (log_q - math.log(rho) - stats.logistic.logpdf(rho * d, loc=-1.2))

    want = integrate.quad(integrand, -60, 60, points=[0, 1.1], limit=400, epsabs=1e-13, epsrel=1e-12)[0]
    assert float(kl_divergence(q, p)) == pytest.approx(want, abs=1e-9)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("rho", [0.1, 1.0, 3.0])
def test_relaxed_is_the_monte_carlo_mean(n, rho):
    q, p = RelaxedPlackettLuce(0.5, torch.randn(n)), RelaxedPlackettLuce(0.5 * rho, torch.randn(n))
    value = q.sample(torch.Size((20_000,)))
    ratio = q.log_prob(value) - p.log_prob(value)
    error = float(ratio.std()) / 20_000**0.5
    assert float(ratio.mean()) > 4 * error  # a KL that the estimate can tell from zero
    assert abs(float(kl_divergence(q, p)) - float(ratio.mean())) < 4 * error


def test_relaxed_bounds_the_hard_one_and_is_zero_at_home(tol):
    a, b = torch.randn(2, 5, 4)
    kl = kl_divergence(RelaxedPlackettLuce(0.1, a), RelaxedPlackettLuce(0.1, b))
    assert torch.allclose(kl, kl_divergence(RelaxedPlackettLuce(2.0, a), RelaxedPlackettLuce(2.0, b)), atol=100 * tol)
    assert (kl >= kl_divergence(PlackettLuce(a), PlackettLuce(b))).all()
    assert kl_divergence(RelaxedPlackettLuce(0.1, a), RelaxedPlackettLuce(0.1, a)).abs().max() <= 100 * tol


@pytest.mark.usefixtures("float64_only")
def test_gradients():
    a, b = (torch.randn(2, 4, requires_grad=True) for _ in range(2))
    t, t0 = torch.tensor([0.3, 1.0], requires_grad=True), torch.tensor([0.5, 2.0], requires_grad=True)
    center, other = centers(2, 4), centers(2, 4)
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(lambda a, b: plackett_luce_kl(PlackettLuce(a), PlackettLuce(b)), (a, b))
    assert gradcheck(lambda t, t0: mallows_kl(Mallows(center, t), Mallows(other, t0)), (t, t0))
    assert gradcheck(
        lambda t, a, t0, b: relaxed_plackett_luce_kl(RelaxedPlackettLuce(t, a), RelaxedPlackettLuce(t0, b)), (t, a, t0, b)
    )


# --- where there is none


@pytest.mark.parametrize(
    ("q", "p", "text"),
    [
        (PlackettLuce(torch.zeros(17)), PlackettLuce(torch.zeros(17)), "n=17 .* up to 16; estimate it by Monte Carlo"),
        (PlackettLuce(torch.zeros(17)), UniformPermutation(17), "n=17 .* up to 16; estimate it by Monte Carlo"),
        (RelaxedPlackettLuce(0.1, torch.zeros(3)), RelaxedPlackettLuce(2.0, torch.zeros(3)), "ratio is 20; estimate it by"),
    ],
)
def test_not_computed(q, p, text):
    with pytest.raises(NotImplementedError, match=text):
        kl_divergence(q, p)


def test_other_sizes():
    for make in (lambda n: PlackettLuce(torch.zeros(n)), lambda n: Mallows(torch.eye(n), 1.0)):
        for p in (make(3), UniformPermutation(3)):
            with pytest.raises(ValueError, match=r"same event_shape, but have \(4, 4\) and \(3, 3\)"):
                kl_divergence(make(4), p)


def test_the_elbo_uses_it():
    q = RelaxedPlackettLuce(0.5, torch.tensor([0.5, 0.0, -2.0]))
    near, far = RelaxedPlackettLuce(1.0, torch.zeros(3)), RelaxedPlackettLuce(6.0, torch.zeros(3))

    def losses(p):
        elbo = TraceMeanField_ELBO()
        return [elbo.loss(lambda: pyro.sample("P", p), lambda: pyro.sample("P", q)) for _ in range(2)]

    want = float(kl_divergence(q, near))
    assert losses(near) == pytest.approx([want, want], rel=1e-5)  # without the noise of a draw
    one, two = losses(far)  # where it is not computed, by Monte Carlo
    assert one != two

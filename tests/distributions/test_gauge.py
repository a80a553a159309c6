import math

import pytest
import torch
from torch.func import hessian, jacfwd

from pyro_gs import GumbelSinkhorn, log_sinkhorn
from pyro_gs.distributions import edgeworth
from pyro_gs.distributions.edgeworth import laplacian, second_order
from pyro_gs.distributions.relaxed import RelaxedPermutation
from pyro_gs.distributions.spectral import inverse_root, trace_asinh
from pyro_gs.distributions.spherical import LARGEST, by_rule, by_sampling, rule, sampled_weights

pytestmark = pytest.mark.usefixtures("float64_only")
OWN, WARMER, FAR = (0.0, 1.0), (1.0, 2.0), (3.0, 2.0)  # scale of the logits, and prior's over guide's temperature


def points(n, batch, case):
    """Dual points, row-normalised: of a law without logits at the samples of others."""
    scale, ratio = case
    noise = -torch.log(-torch.log(torch.rand(batch, n, n)))
    log_q = log_sinkhorn(-ratio * (scale * torch.randn(batch, n, n) + noise))
    return log_q, torch.full((batch, n), float(n))


def log_integrand(log_q, n_i, m_j, beta):
    return (m_j * beta).sum(-1) - (n_i * torch.logsumexp(log_q + beta[..., None, :], -1)).sum(-1)


def laplace(log_q, n_i):
    n = log_q.shape[-1]
    precision = laplacian((n_i[..., None] * log_q.exp()).mT @ log_q.exp())[..., 1:, 1:]
    return 0.5 * (n - 1) * math.log(2 * math.pi) - 0.5 * torch.logdet(precision)


def trapezoid(log_q, n_i):
    """The integral over three dimensions; the integrand is analytic in a strip of width pi around every axis."""
    step, radius = 0.75, 14 - float(log_q.min())
    axis = step * torch.arange(-math.ceil(radius / step), math.ceil(radius / step) + 1)
    out = []
    for first in axis:
        beta = torch.cartesian_prod(axis, axis)
        beta = torch.cat([torch.zeros(len(beta), 1), first.expand(len(beta), 1), beta], -1)
        out.append(torch.logsumexp(log_integrand(log_q, n_i, n_i, beta), -1))
    return torch.logsumexp(torch.stack(out), 0) + 3 * math.log(step)


def flat(n):
    log_q, n_i = torch.full((1, n, n), -math.log(n)), torch.full((1, n), float(n))
    return log_q, n_i, n * n * math.log(n) + n * math.lgamma(n) - math.lgamma(n * n)


def cycle(n):
    """Two allowed pairs a row, in a cycle of equal entries; the differences of neighbours are logistic with sum zero."""
    allowed = torch.eye(n) + torch.eye(n).roll(1, 1)
    t = torch.arange(-6, 6, 1e-3) + 5e-4
    characteristic = math.pi * t / torch.sinh(math.pi * t)
    density = float((characteristic**n).sum()) * 1e-3 / (2 * math.pi)
    return allowed.log() - math.log(2), n * math.log(4) + math.log(density)


# --- against quadrature and closed forms


def test_four_columns_against_the_trapezoid_rule():
    torch.manual_seed(1)
    # Largest errors of the rule over 50 points: 0.002, 0.005, 0.016; Laplace is off by 0.01, 0.1, 0.6 in the mean
    # (benchmarks/density.py).
    for case, slack in ((OWN, 0.004), (WARMER, 0.008), (FAR, 0.03)):
        log_q, n = points(4, 3, case)
        want = torch.stack([trapezoid(*one) for one in zip(log_q, n, strict=True)])
        assert torch.allclose(by_rule(log_q, n, n), want, atol=slack, rtol=0)
        # 20,000 directions of effective share above 0.8: a standard error below 0.004
        assert torch.allclose(by_sampling(log_q, n, n, 20_000), want, atol=0.016, rtol=0)


def test_second_order_against_the_trapezoid_rule():
    torch.manual_seed(2)
    log_q, n = log_sinkhorn(0.4 * torch.randn(4, 4, 4)), torch.full((4, 4), 4.0)
    want = torch.stack([trapezoid(*one) for one in zip(log_q, n, strict=True)])
    # the third order of the flat matrix is c_4 - 5/64 = -0.0002
    assert torch.allclose(laplace(log_q, n) + second_order(log_q, n), want, atol=0.001, rtol=0)


@pytest.mark.parametrize("n", range(4, LARGEST + 1))
def test_rule_at_the_flat_matrix(n):
    log_q, n_i, want = flat(n)
    assert float(by_rule(log_q, n_i, n_i)) == pytest.approx(want, abs=0.01)  # at order three; 0.009 at n = 8


@pytest.mark.parametrize("n", [10, 20, 64])
def test_second_order_at_the_flat_matrix(n):
    log_q, n_i, want = flat(n)
    assert float(laplace(log_q, n_i) + second_order(log_q, n_i)) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(("n", "slack"), [(5, 0.02), (9, 0.1), (10, 0.03), (20, 0.06), (40, 0.12), (100, 0.35)])
def test_two_allowed_pairs_a_row(n, slack):
    # In the sum over n directions an error of 0.003 each is left (asinh(5 / 8) / 5 for log(4 / sqrt(4 pi))); the form with
    # the constant of the full matrix is 0.24 off at n = 5 and 11 at n = 100. Here through log_prob.
    log_q, want = cycle(n)
    law = GumbelSinkhorn(1.0, log_q)
    value = log_q.exp()
    terms = n * math.lgamma(2) + 2 * n * -math.log(2) + want  # of the noise, of Q, and of the gauge
    ties = laplacian(value.mT @ value)[1:, 1:]
    jacobian = float(torch.logdet(ties)) + 2 * n * math.log(2)
    assert float(law.log_prob(value)) == pytest.approx(terms + jacobian, abs=slack)


@pytest.mark.parametrize(("n", "case", "slack"), [(6, FAR, 0.1), (9, WARMER, 0.02), (9, FAR, 0.08), (12, WARMER, 0.05)])
def test_far_out_against_many_directions(n, case, slack):
    torch.manual_seed(n)
    log_q, n_i = points(n, 5, case)
    want = by_sampling(log_q, n_i, n_i, 10_000)  # to 0.01; its own tests are at n = 4 and below
    got = by_rule(log_q, n_i, n_i) if n <= LARGEST else laplace(log_q, n_i) + second_order(log_q, n_i)
    assert torch.allclose(got, want, atol=slack, rtol=0)
    assert float((laplace(log_q, n_i) - want).abs().max()) > slack  # Laplace fails this


# --- the parts of the two methods


def test_terms_are_those_of_the_expansion():
    # All third and fourth derivatives by automatic differentiation, with counts of a mask.
    torch.manual_seed(3)
    allowed = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0]]).bool()
    n_i, m_j = allowed.sum(-1).double(), allowed.sum(-2).double()
    log_q = torch.log_softmax(torch.randn(4, 4).masked_fill(~allowed, -torch.inf), -1)

    def f(x):
        return log_integrand(log_q, n_i, m_j, torch.cat([torch.zeros(1), x]))

    zero = torch.zeros(3)
    s = torch.linalg.inv(-hessian(f)(zero))
    f3, f4 = jacfwd(hessian(f))(zero), jacfwd(jacfwd(hessian(f)))(zero)
    want = torch.einsum("abcd,ab,cd", f4, s, s) / 8
    want = (
        want + torch.einsum("abc,def,ab,cd,ef", f3, f3, s, s, s) / 8 + torch.einsum("abc,def,ad,be,cf", f3, f3, s, s, s) / 12
    )
    centred = torch.nn.functional.pad(s, (1, 0, 1, 0))
    centred = centred - centred.mean(-1, keepdim=True)
    centred = centred - centred.mean(-2, keepdim=True)
    q = log_q.exp()
    m = edgeworth._terms(q[None], n_i[None], centred[None], ((n_i[:, None] * q).mT @ q)[None])[0]
    assert float((m * centred).sum()) == pytest.approx(float(want), rel=1e-10)
    assert torch.allclose(m, m.mT, atol=1e-12)


@pytest.mark.parametrize("n", range(4, LARGEST + 1))
def test_rule_is_exact_on_the_sphere(n):
    x, w = rule(n)
    assert (w > 0).all()
    assert torch.allclose(x.square().sum(-1), torch.ones(len(x)), atol=1e-12)
    assert torch.allclose(x.sum(-1), torch.zeros(len(x)), atol=1e-12)
    d = n - 1
    a = torch.randn(5, n)
    a = a - a.mean(-1, keepdim=True)
    for degree, moment in ((0, 1.0), (1, 0.0), (2, 1 / d), (3, 0.0), (4, 3 / (d * (d + 2))), (5, 0.0)):
        want = moment * a.norm(dim=-1) ** degree
        assert torch.allclose((a @ x.mT) ** degree @ w, want, atol=1e-12)
    # degree six: the square of sum x^3, over uniform directions
    u = torch.randn(200_000, n)
    u = u - u.mean(-1, keepdim=True)
    skew = ((u / u.norm(dim=-1, keepdim=True)) ** 3).sum(-1) ** 2
    error = float(skew.std()) / len(u) ** 0.5
    assert abs(float(((x**3).sum(-1) ** 2) @ w) - float(skew.mean())) < 4.3 * error  # failure rate 2e-5


@pytest.mark.parametrize("n", [5, 9, 11])
def test_permuting_columns_and_rows_changes_nothing(n):
    log_q, n_i = points(n, 3, WARMER)
    moved = log_q[:, torch.randperm(n)][:, :, torch.randperm(n)]
    if n <= LARGEST:
        assert torch.allclose(by_rule(log_q, n_i, n_i), by_rule(moved, n_i, n_i), atol=1e-7)
    assert torch.allclose(second_order(log_q, n_i), second_order(moved, n_i), atol=1e-9)


@pytest.mark.parametrize("function", [trace_asinh, inverse_root])
@pytest.mark.parametrize("equal", [False, True])
def test_functions_of_matrices_and_their_derivatives(function, equal):
    x = 1.5 * torch.eye(4).expand(2, 4, 4) if equal else torch.randn(2, 4, 4)
    x = x if equal else x @ x.mT + 0.3 * torch.eye(4)
    values, vectors = torch.linalg.eigh(x)
    want = values.asinh().sum(-1) if function is trace_asinh else vectors @ torch.diag_embed(values**-0.5) @ vectors.mT
    assert torch.allclose(function(x), want, atol=1e-12)
    x = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: function(0.5 * (y + y.mT)), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda y: function(0.5 * (y + y.mT)), x)


# --- the estimate


@pytest.mark.parametrize("particles", [1, 3, 8])
def test_estimate_is_unbiased(particles):
    torch.manual_seed(4)
    log_q, n = points(4, 1, FAR)
    want = float(trapezoid(log_q[0], n[0]))
    runs = 2_000
    ratio = (by_sampling(log_q.expand(runs, 4, 4), n.expand(runs, 4), n.expand(runs, 4), particles) - want).exp()
    error = float(ratio.std()) / runs**0.5
    assert error < 0.02
    assert abs(float(ratio.mean()) - 1) < 4.3 * error  # failure rate 2e-5


@pytest.mark.parametrize("n", [5, 9])
def test_weights_keep_their_variance_in_the_tails(n):
    # Of the Gaussian proposal that Laplace gives a share below 0.001 is effective at the worst of such points.
    torch.manual_seed(n)
    log_q, n_i = points(n, 20, (3.0, 5.0))
    log_w = sampled_weights(log_q, n_i, n_i, 500)
    share = (2 * torch.logsumexp(log_w, -1) - torch.logsumexp(2 * log_w, -1)).exp() / 500
    assert float(share.min()) > 0.05


# --- through the density


@pytest.mark.parametrize("n", [5, 8, 10])
@pytest.mark.parametrize("forbid", [False, True])
def test_gradients(n, forbid):
    torch.manual_seed(n)
    allowed = torch.ones(n, n, dtype=torch.bool)
    if forbid:
        allowed = torch.eye(n).bool() | torch.eye(n).roll(1, 1).bool() | (torch.rand(n, n) < 0.3)
    value = GumbelSinkhorn(0.7, torch.zeros(n, n).masked_fill(~allowed, -torch.inf)).sample()
    p = torch.tensor(value.tolist())
    # the value along a cycle of allowed pairs, so that row and column sums stay
    direction = torch.zeros(n, n)
    direction[torch.arange(n), torch.arange(n)] = 1.0
    direction[torch.arange(n), (torch.arange(n) + 1) % n] = -1.0
    size = 0.1 * float(p[allowed].min())

    def f(x, t, s):
        moved = p + size * s * direction
        log_p = torch.where(allowed, torch.where(allowed, moved, 1.0).log(), -torch.inf)
        return GumbelSinkhorn(t, torch.where(allowed, x, -torch.inf)).log_prob(RelaxedPermutation.wrap(moved, log_p))

    inputs = [torch.randn(n, n), torch.tensor(1.3), torch.tensor(0.0)]
    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in inputs], atol=1e-5, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("n", [4, 10])
def test_second_derivatives_at_the_flat_matrix(n):
    # Every eigenvalue is repeated here.
    law, direction = torch.full((n, n), 1 / n), torch.randn(n, n)

    def f(s):
        return GumbelSinkhorn(1.0, s * direction).log_prob(law)

    zero, h = torch.tensor(0.0, requires_grad=True), 1e-3
    (first,) = torch.autograd.grad(f(zero), zero, create_graph=True)
    (second,) = torch.autograd.grad(first, zero)
    want = float(f(torch.tensor(h)) - 2 * f(torch.tensor(0.0)) + f(torch.tensor(-h))) / h**2
    assert float(second) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("n", [4, 9, 10, 30, 70])
@pytest.mark.parametrize("particles", [0, 8])
def test_finite_where_ties_underflow(n, particles):
    logits = torch.randn(n, n, requires_grad=True)
    value = GumbelSinkhorn(0.003, logits).rsample(torch.Size((2,)))
    score = GumbelSinkhorn(1.0, torch.zeros(n, n), particles).log_prob(value)
    assert score.isfinite().all()
    score.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("particles", [0, 4_000])
def test_components_of_a_batch_with_its_own_supports(particles):
    torch.manual_seed(6)
    blocks = [
        [torch.ones(4, 4), torch.ones(10, 10)],
        [torch.ones(5, 5), torch.eye(9) + torch.eye(9).roll(1, 1)],
        [torch.ones(2, 2), torch.ones(12, 12)],
    ]
    order = torch.randperm(14)
    allowed = torch.stack([torch.block_diag(*pair) for pair in blocks])[:, order].bool()
    law = GumbelSinkhorn(0.7, torch.randn(3, 14, 14).masked_fill(~allowed, -torch.inf), particles)
    value = law.sample()
    got = law.log_prob(value)
    for i, pair in enumerate(blocks):
        size, total = len(pair[0]), 0.0
        for part in (slice(0, size), slice(size, 14)):
            rows = law.logits[i][order.argsort()][part, part]
            plain = torch.as_tensor(value)[i][order.argsort()][part, part]
            total = total + GumbelSinkhorn(0.7, rows, particles).log_prob(plain)
        # two estimates with an effective share above 0.6 of the 4,000 directions each
        assert float(got[i]) == pytest.approx(float(total), abs=0.1 if particles else 1e-6)


@pytest.mark.parametrize("e", [0.0, 1e-12, 1e-8, 1e-3, 0.59, 0.61, 2.0])
def test_second_derivative_of_two_columns(e):
    """Smooth where all entries are equal, and across the switch to the closed form."""
    p = torch.full((2, 2), 0.5)

    def score(x):
        return GumbelSinkhorn(1.0, torch.stack([torch.stack([x, x * 0]), torch.zeros(2)])).log_prob(p)

    def slope(x):
        x = torch.tensor(x, requires_grad=True)
        return float(torch.autograd.grad(score(x), x)[0])

    x = torch.tensor(e, requires_grad=True)
    (first,) = torch.autograd.grad(score(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert float(second) == pytest.approx((slope(e + 1e-4) - slope(e - 1e-4)) / 2e-4, rel=1e-6)


def test_three_equal_columns():
    found = GumbelSinkhorn(1.0, torch.zeros(3, 3)).log_prob(torch.full((3, 3), 1 / 3))
    integral = 9 * math.log(3) + 3 * math.lgamma(3) - math.lgamma(9)  # at Q = 1/3
    jacobian = 9 * math.log(3) + math.log(1 / 3)
    assert float(found) == pytest.approx(3 * math.lgamma(3) - 9 * math.log(3) + integral + jacobian, abs=1e-9)

import json
import math
import pathlib

import pytest
import torch
from pyro.distributions.testing.gof import auto_goodness_of_fit
from scipy import integrate, stats
from torch.distributions import biject_to

from pyro_gs import GumbelSinkhorn, SparseGumbelSinkhorn, matching, to_index
from pyro_gs.distributions.relaxed import RelaxedPermutation

GOLDEN = pathlib.Path(__file__).parents[3] / "shared" / "theory" / "golden.json"
PATTERN = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]]).bool()


def complete(block):
    """The doubly stochastic matrix of an upper left block."""
    top = torch.cat([block, 1 - block.sum(-1, keepdim=True)], -1)
    return torch.cat([top, 1 - top.sum(-2, keepdim=True)], -2)


# --- the density


@pytest.mark.usefixtures("float64_only")
@pytest.mark.skipif(not GOLDEN.exists(), reason="the reference values lie beside the repository")
def test_golden_values():
    for case in json.loads(GOLDEN.read_text()):
        logits, log_p = torch.tensor(case["logits"]), torch.tensor(case["log_p"])
        n, tau, want = case["n"], case["temperature"], case["log_prob"]
        value = RelaxedPermutation.wrap(log_p.exp(), log_p)
        # Laplace is stated to err by an sd of 0.01 (n = 5) or less: 0.06 is the largest of the nine by design
        slack = case["tolerance"] if n <= 3 else 0.06
        assert float(GumbelSinkhorn(tau, logits).log_prob(value)) == pytest.approx(want, abs=slack)
        estimate = torch.stack([GumbelSinkhorn(tau, logits, num_particles=20_000).log_prob(value) for _ in range(4)])
        # 80,000 draws with an effective sample size above .8: standard error below 0.003, five of them
        assert float(estimate.mean()) == pytest.approx(want, abs=case["tolerance"] + 0.015 * (n > 3))


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0, 2.0])
def test_n2_is_a_sum_of_two_logistic_variables(tau):
    # Independent derivation: logit P_11 = D / (2 tau) with D = X_11 + X_22 - X_12 - X_21 + L_1 + L_2, and L_1, L_2
    # logistic (differences of Gumbels). The density of L_1 + L_2 by convolution.
    logits = torch.tensor([[0.3, -0.4], [0.1, 0.8]])
    shift = float(logits[0, 0] + logits[1, 1] - logits[0, 1] - logits[1, 0])
    for log_odds in (-30.0, -5.0, -1.0, -1e-3, 0.0, 0.5, 3.0, 40.0):
        s = 2 * tau * log_odds - shift

        def integrand(x, s=s):
            return math.exp(stats.logistic.logpdf(x) + stats.logistic.logpdf(s - x))

        density = integrate.quad(integrand, -200, 200, points=[0, s], limit=400, epsabs=0, epsrel=1e-11)[0]
        log_q = torch.nn.functional.logsigmoid(torch.tensor(log_odds, dtype=torch.float64))
        log_r = torch.nn.functional.logsigmoid(torch.tensor(-log_odds, dtype=torch.float64))
        log_p = torch.stack([torch.stack([log_q, log_r]), torch.stack([log_r, log_q])])
        want = math.log(density) + math.log(2 * tau) - float(log_q + log_r)
        got = GumbelSinkhorn(tau, logits).log_prob(RelaxedPermutation.wrap(log_p.exp(), log_p))
        assert float(got) == pytest.approx(want, abs=1e-8)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_total_mass_n2(tau):
    law = GumbelSinkhorn(tau, torch.tensor([[0.3, -0.4], [0.1, 0.8]]))
    x = (torch.arange(20_000) + 0.5) / 20_000
    mass = law.log_prob(complete(x[:, None, None])).exp().mean()
    assert float(mass) == pytest.approx(1.0, abs=1e-3)  # midpoint rule; integrable singularities at tau = 2


@pytest.mark.usefixtures("float64_only")
def test_total_mass_n3():
    torch.manual_seed(1)
    law = GumbelSinkhorn(1.0, 0.5 * torch.randn(3, 3))
    full = complete(torch.rand(60_000, 2, 2))
    inside = (full > 1e-9).all(-1).all(-1)
    values = torch.zeros(len(full))
    values[inside] = law.log_prob(full[inside]).exp()
    error = float(values.std()) / len(full) ** 0.5
    assert error < 0.03
    assert abs(float(values.mean()) - 1) < 4 * error


@pytest.mark.usefixtures("float64_only")
def test_total_mass_with_a_forbidden_pair():
    torch.manual_seed(2)
    law = GumbelSinkhorn(1.0, (0.5 * torch.randn(3, 3)).masked_fill(~PATTERN, -torch.inf))
    a, b, c = torch.rand(60_000, 3).unbind(-1)  # entries outside a spanning forest: (0, 0), (1, 0), (1, 1)
    zero = torch.zeros_like(a)
    rows = [
        torch.stack([a, 1 - a, zero], -1),
        torch.stack([b, c, 1 - b - c], -1),
        torch.stack([1 - a - b, a - c, b + c], -1),
    ]
    full = torch.stack(rows, -2)
    inside = ((full > 1e-9) | ~PATTERN).all(-1).all(-1)
    values = torch.zeros(len(full))
    values[inside] = law.log_prob(full[inside]).exp()
    error = float(values.std()) / len(full) ** 0.5
    assert error < 0.03
    assert abs(float(values.mean()) - 1) < 4 * error


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [4, 6])
def test_normalisation_by_another_law(n):
    # E_q[p / q] = 1 for any two of these laws, with Laplace errors of some hundredths.
    torch.manual_seed(n)
    p, q = GumbelSinkhorn(1.0, 0.3 * torch.randn(n, n)), GumbelSinkhorn(1.0, torch.zeros(n, n))
    value = q.sample(torch.Size((20_000,)))
    ratio = (p.log_prob(value) - q.log_prob(value)).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert error < 0.05
    assert abs(float(ratio.mean()) - 1) < 4 * error + 0.01


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_normalisation_with_forbidden_pairs(tau):
    # Components of 1, 2, 3 and 4 rows in one law, in shuffled order; samples of q, densities of both.
    torch.manual_seed(8)
    ring = torch.eye(4) + torch.eye(4).roll(1, 1)
    allowed = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), PATTERN.double(), ring).bool()
    allowed = allowed[torch.randperm(10)][:, torch.randperm(10)]
    p = GumbelSinkhorn(tau, (0.3 * torch.randn(10, 10)).masked_fill(~allowed, -torch.inf))
    q = GumbelSinkhorn(tau, torch.zeros(10, 10).masked_fill(~allowed, -torch.inf))
    value = q.sample(torch.Size((2_000,)))
    ratio = (p.log_prob(value) - q.log_prob(value)).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert error < 0.08
    assert abs(float(ratio.mean()) - 1) < 4 * error + 0.01


@pytest.mark.usefixtures("float64_only")
def test_agrees_with_a_histogram_of_its_samples():
    # Shares of P_00 in ten bins: of the law's own samples, and of uniform matrices weighted by the density.
    torch.manual_seed(5)
    law = GumbelSinkhorn(1.0, torch.tensor([[0.5, -0.2, 0.0], [0.0, 0.4, -0.3], [0.2, 0.1, 0.0]]))
    size, bins = 40_000, 10
    full = complete(torch.rand(size, 2, 2))
    inside = (full > 1e-9).all(-1).all(-1)
    weight = torch.zeros(size)
    weight[inside] = law.log_prob(full[inside]).exp()
    own = torch.tensor(law.sample(torch.Size((size,)))[:, 0, 0].tolist())
    z2 = 0.0
    for k in range(bins):
        mine = ((own * bins).long() == k).double()
        theirs = weight * ((full[:, 0, 0] * bins).long() == k)
        variance = (mine.var() + theirs.var()) / size
        z2 += float((mine.mean() - theirs.mean()) ** 2 / variance)
    assert stats.chi2.sf(z2, bins) > 1e-4  # the failure rate, about; the seed is fixed


@pytest.mark.usefixtures("float64_only")
def test_goodness_of_fit_of_log_densities():
    # The mean of log p under p is minus the entropy: compare samples with importance-weighted samples of another law.
    torch.manual_seed(6)
    p, q = GumbelSinkhorn(0.8, torch.randn(3, 3)), GumbelSinkhorn(1.0, torch.zeros(3, 3))
    size = 10_000
    own = p.log_prob(p.sample(torch.Size((size,))))
    other = q.sample(torch.Size((size,)))
    log_p = p.log_prob(other)
    w = torch.softmax(log_p - q.log_prob(other), 0)
    mean = float((w * log_p).sum())
    error = float((w**2 * (log_p - mean) ** 2).sum() + own.var() / size) ** 0.5
    assert abs(float(own.mean()) - mean) < 4 * error


@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_goodness_of_fit_by_pyro(tau):
    """In one dimension (n = 2), and in the two of the tridiagonal mask of n = 3, on coordinates without constraints."""
    band = (torch.arange(3)[:, None] - torch.arange(3)).abs() <= 1
    for logits in (torch.randn(2, 2), torch.randn(3, 3).masked_fill(~band, -torch.inf)):
        law = GumbelSinkhorn(tau, logits)
        value = law.sample((10_000,))
        transform = biject_to(law.support)
        x = transform.inv(value)
        density = (law.log_prob(value) + transform.log_abs_det_jacobian(x, value)).exp()
        assert auto_goodness_of_fit(x, density) > 2e-5


def test_density_ignores_the_gauge(tol):
    logits, value = torch.randn(5, 5), None
    law = GumbelSinkhorn(0.7, logits)
    value = law.sample()
    moved = GumbelSinkhorn(0.7, logits + 3 * torch.randn(5, 1) + 3 * torch.randn(1, 5))
    assert torch.allclose(law.log_prob(value), moved.log_prob(value), atol=1e4 * tol)


def test_permuting_rows_and_columns_permutes_the_law(tol):
    logits = torch.randn(5, 5)
    rows, columns = torch.randperm(5), torch.randperm(5)
    value = GumbelSinkhorn(0.7, logits).sample()
    a = GumbelSinkhorn(0.7, logits).log_prob(value)
    b = GumbelSinkhorn(0.7, logits[rows][:, columns]).log_prob(torch.as_tensor(value)[rows][:, columns])
    assert torch.allclose(a, b, atol=1e4 * tol)


@pytest.mark.usefixtures("float64_only")
def test_components_factor():
    a, b = torch.randn(3, 3), torch.randn(4, 4)
    both = torch.full((7, 7), -torch.inf)
    both[:3, :3], both[3:, 3:] = a, b
    pa, pb = GumbelSinkhorn(0.6, a).sample(), GumbelSinkhorn(0.6, b).sample()
    value = torch.block_diag(torch.as_tensor(pa), torch.as_tensor(pb))
    order = torch.randperm(7)
    want = GumbelSinkhorn(0.6, a).log_prob(pa) + GumbelSinkhorn(0.6, b).log_prob(pb)
    got = GumbelSinkhorn(0.6, both[order]).log_prob(value[order])
    assert torch.allclose(got, want, atol=1e-7)


# --- values that underflow


@pytest.mark.parametrize("tau", [0.05, 0.005])
def test_cold_values_score_under_any_instance(tau):
    logits = torch.randn(2, 5, 5)
    law = GumbelSinkhorn(tau, logits)
    value = law.rsample()
    if tau == 0.005:
        assert (torch.as_tensor(value) == 0).any()
    own = law.log_prob(value)
    assert own.isfinite().all()
    for other in (GumbelSinkhorn(tau, logits), law.expand(torch.Size((3, 2)))):
        assert torch.allclose(other.log_prob(value).reshape(-1, 2)[0], own)
    assert torch.allclose(law.to_event(1).log_prob(value), own.sum())
    assert GumbelSinkhorn(2 * tau, torch.zeros(5, 5)).log_prob(value).isfinite().all()
    for moved in (value.clone(), value.detach(), value.expand(3, 2, 5, 5)[1], value[0:2], value.unsqueeze(0)):
        assert torch.allclose(law.log_prob(moved).reshape(2), own)


@pytest.mark.usefixtures("float64_only")
def test_float32_scores_like_float64():
    logits = torch.randn(4, 6, 6)
    law = GumbelSinkhorn(0.05, logits.float())
    value = law.rsample()
    assert value.dtype == torch.float32
    assert torch.allclose(law.log_prob(value).double(), GumbelSinkhorn(0.05, logits.float().double()).log_prob(value))


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("particles", [0, 16])
def test_a_prior_far_warmer_than_the_value(n, particles):
    value = GumbelSinkhorn(0.003, torch.randn(n, n)).sample(torch.Size((20,)))
    assert GumbelSinkhorn(1.0, torch.zeros(n, n), particles).log_prob(value).isfinite().all()


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_gradients_where_every_tie_underflows(n):
    logits = torch.randn(n, n, requires_grad=True)
    law = GumbelSinkhorn(0.003, logits)
    law.log_prob(law.rsample()).backward()
    assert logits.grad.isfinite().all()


def test_empty_batches():
    law = GumbelSinkhorn(1.0, torch.zeros(0, 3, 3))
    value = law.rsample()
    assert value.shape == (0, 3, 3)
    assert law.log_prob(value).shape == (0,)
    assert law.mode.shape == (0, 3, 3)


def test_underflowed_value_without_its_logarithm_is_refused():
    law = GumbelSinkhorn(0.005, torch.randn(5, 5))
    value = law.sample()
    lost = torch.as_tensor(value) * 1.0
    assert type(lost) is torch.Tensor
    with pytest.raises(ValueError, match="value has a zero at row .* no density; if the entry underflowed"):
        law.log_prob(lost)


def test_an_operation_in_place_drops_the_logarithm():
    value = GumbelSinkhorn(1.0, torch.zeros(3, 3)).sample()
    value.mul_(1.0)
    assert value.log_p is None


def test_arithmetic_gives_plain_tensors():
    value = GumbelSinkhorn(1.0, torch.zeros(3, 3)).sample()
    for result in (value + 0, value @ value, value.sum(-1), value.mT, value.exp()):
        assert type(result) is torch.Tensor


# --- samples


def test_noise_is_finite_whatever_the_uniform_source_returns(monkeypatch):
    rand = torch.rand

    def extreme(*args, **kwargs):
        u = rand(*args, **kwargs)
        u[..., 0, 0], u[..., 0, 1] = 0.0, 1.0
        return u

    monkeypatch.setattr(torch, "rand", extreme)
    logits = torch.zeros(3, 3, requires_grad=True)
    law = GumbelSinkhorn(0.1, logits)
    value = law.rsample()
    law.log_prob(value).backward()
    assert value.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.usefixtures("float64_only")
def test_hard_samples_are_the_cold_limit_of_relaxed_ones():
    logits = torch.randn(4, 4)
    torch.manual_seed(7)
    hard = GumbelSinkhorn(1.0, logits).hard_sample(torch.Size((50,)))
    torch.manual_seed(7)
    cold = GumbelSinkhorn(1e-3, logits).rsample(torch.Size((50,)))
    assert torch.allclose(torch.as_tensor(cold), hard, atol=0.05)


def test_mode_is_the_matching():
    logits = torch.randn(3, 5, 5)
    assert torch.equal(GumbelSinkhorn(1.0, logits).mode, matching(logits))


@pytest.mark.usefixtures("float64_only")
def test_entropy_estimate():
    law = GumbelSinkhorn(1.0, torch.zeros(2, 2))
    # n = 2, tau = 1, X = 0: quadrature over P_11
    x = (torch.arange(40_000) + 0.5) / 40_000
    log_p = law.log_prob(complete(x[:, None, None]))
    want = -float((log_p.exp() * log_p).mean())
    assert float(law.entropy(20_000)) == pytest.approx(want, abs=0.02)


# --- gradients


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("forbid", [False, True])
def test_gradients_in_parameters(n, forbid):
    if forbid and n == 2:
        pytest.skip("a forbidden pair leaves one permutation")
    logits, tau = torch.randn(2, n, n), torch.tensor([0.5, 1.2], requires_grad=True)
    allowed = torch.ones(n, n, dtype=torch.bool)
    allowed[0, n - 1] = not forbid
    value = GumbelSinkhorn(0.8, logits.masked_fill(~allowed, -torch.inf)).sample()

    def f(x, t):
        return GumbelSinkhorn(t, torch.where(allowed, x, -torch.inf)).log_prob(value)

    assert torch.autograd.gradcheck(f, (logits.requires_grad_(), tau), atol=1e-6)


@pytest.mark.usefixtures("float64_only")
def test_gradient_in_the_value():
    law = GumbelSinkhorn(0.7, torch.randn(4, 4))
    p = torch.tensor(law.sample().tolist())
    direction = torch.randn(4, 4)
    direction = direction - direction.mean(0) - direction.mean(1, keepdim=True) + direction.mean()
    step = torch.tensor(0.0, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: law.log_prob(p + 0.01 * s * direction), step)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.05])
@pytest.mark.parametrize("n", [2, 5, 10])
def test_gradient_through_sample_and_density(n, tau):
    logits = torch.randn(n, n, requires_grad=True)
    direction = torch.randn(n, n)

    def f(x):
        torch.manual_seed(3)
        law = GumbelSinkhorn(tau, x)
        value = law.rsample()
        return law.log_prob(value) + GumbelSinkhorn(1.0, torch.zeros(n, n)).log_prob(value)

    (grad,) = torch.autograd.grad(f(logits), logits)
    h = 1e-5 * tau
    with torch.no_grad():
        want = (f(logits + h * direction) - f(logits - h * direction)) / (2 * h)
    assert float((grad * direction).sum()) == pytest.approx(float(want), rel=2e-5, abs=1e-5)


@pytest.mark.usefixtures("float64_only")
def test_gradient_in_a_plain_value_with_forbidden_pairs():
    """Zeros at forbidden pairs have no gradient, and no NaN."""
    law = GumbelSinkhorn(0.7, torch.randn(3, 3).masked_fill(~PATTERN, -torch.inf))
    value = torch.as_tensor(law.sample()).as_subclass(torch.Tensor).requires_grad_()
    (grad,) = torch.autograd.grad(law.log_prob(value), value)
    assert grad.isfinite().all()
    assert (grad[~PATTERN] == 0).all()


def test_importance_estimate_has_the_right_gradient():
    logits = torch.randn(4, 4)
    value = GumbelSinkhorn(1.0, logits).sample()
    grads = []
    for particles in (0, 40_000):
        leaf = logits.clone().requires_grad_()
        GumbelSinkhorn(1.0, leaf, num_particles=particles).log_prob(value).backward()
        grads.append(leaf.grad)
    # the gradient of the Laplace remainder r(P), small at n = 4, is what may remain between them
    assert torch.allclose(*grads, atol=0.05)


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0.0, torch.zeros(3, 3)), ValueError, "temperature must be positive and finite, but is 0.0"),
        ((-1.0, torch.zeros(3, 3)), ValueError, "temperature must be positive and finite, but is -1.0"),
        ((math.inf, torch.zeros(3, 3)), ValueError, "temperature must be positive and finite, but is inf"),
        ((torch.tensor([1.0, math.nan]), torch.zeros(2, 3, 3)), ValueError, r"temperature .* is nan at \(1,\)"),
        ((torch.ones(4), torch.zeros(3, 2, 2)), ValueError, "temperature of shape .4,. does not broadcast"),
        ((1.0, torch.tensor([[0.0, math.nan], [0.0, 0.0]])), ValueError, "logits has the entry nan at row 0, column 1"),
        ((1.0, torch.tensor([[0.0, math.inf], [0.0, 0.0]])), ValueError, "logits has the entry inf"),
        ((1.0, torch.zeros(3)), ValueError, "logits must be square in its last two dimensions"),
        ((1.0, torch.zeros(3, 4)), ValueError, "logits must be square in its last two dimensions"),
        ((1.0, torch.zeros(3, 3, dtype=torch.long)), TypeError, "logits must have dtype torch.float32 or torch.float64"),
        ((1.0, torch.zeros(3, 3, dtype=torch.float16)), TypeError, "logits must have dtype torch.float32 or torch.float64"),
        ((1.0, torch.zeros(3, 3), -1), ValueError, "num_particles must be an integer of at least 0, but is -1"),
        ((1.0, torch.zeros(3, 3), 2.0), ValueError, "num_particles must be an integer"),
        ((1.0, torch.full((2, 2), -math.inf)), ValueError, "logits allows no permutation: the row 0"),
    ],
)
def test_bad_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        GumbelSinkhorn(*arguments)


def test_one_bad_item_in_a_batch_is_named():
    logits = torch.zeros(2, 3, 4, 4)
    logits[1, 2, 0] = -math.inf
    with pytest.raises(ValueError, match=r"logits of batch item \(1, 2\) allows no permutation"):
        GumbelSinkhorn(1.0, logits)
    logits[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match=r"logits of batch item \(1, 2\) has the entry nan"):
        GumbelSinkhorn(1.0, logits)


def test_bad_values():
    law = GumbelSinkhorn(1.0, torch.zeros(2, 3, 3))
    flat = torch.full((2, 3, 3), 1 / 3)
    bad = flat.clone()
    bad[1, 0, 0] = 0.5
    with pytest.raises(ValueError, match="value of batch item 1 is not in the support.*row or column sum is off by 0.17"):
        law.log_prob(bad)
    with pytest.raises(ValueError, match=r"value must have shape \(..., 3, 3\), but has \(4, 4\)"):
        law.log_prob(torch.full((4, 4), 0.25))
    with pytest.raises(ValueError, match="does not broadcast with the batch shape"):
        law.log_prob(flat[:1].expand(5, 3, 3))
    masked = GumbelSinkhorn(1.0, torch.zeros(3, 3).masked_fill(~PATTERN, -math.inf))
    with pytest.raises(ValueError, match="expected zero where logits are -inf, but it is 0.333333 at row 0, column 2"):
        masked.log_prob(flat[0])
    with pytest.raises(ValueError, match="value of batch item 0 has a zero at row 0, column 1"):
        law.log_prob(torch.eye(3))


def test_entries_on_no_permutation_are_dropped_with_a_warning():
    with pytest.warns(UserWarning, match="row 1, column 0, which lies on no permutation"):
        law = GumbelSinkhorn(1.0, torch.tensor([[0.0, -math.inf], [0.0, 0.0]]))
    assert torch.equal(torch.as_tensor(law.sample()), torch.eye(2))
    assert float(law.log_prob(torch.eye(2))) == 0.0
    assert to_index(law.mode).tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore::pyro_gs.SinkhornWarning")
def test_a_density_that_rounding_leaves_nothing_of_is_refused():
    """Found by hostile input; it was NaN."""
    x = torch.diag(torch.tensor([0.0, -1e30, 3e38, 1e30]))
    law = GumbelSinkhorn(1e4, x.expand(2, 4, 4))
    with pytest.raises(ValueError, match="logits differ by so much .* forbid pairs by -inf"):
        law.log_prob(law.rsample())
    with pytest.raises(ValueError, match="logits differ by so much"):
        SparseGumbelSinkhorn(1e4, x, torch.arange(4).expand(4, 4)).entropy()

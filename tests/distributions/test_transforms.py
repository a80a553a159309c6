import copy
import math
import pickle

import pytest
import torch

from pyro_gs import GumbelSinkhorn, constraints, matching
from pyro_gs.distributions.relaxed import RelaxedPermutation, plain
from pyro_gs.distributions.transforms import RoundingTransform, StickBreakingTransform

KINDS = [StickBreakingTransform, RoundingTransform]
every_kind = pytest.mark.parametrize("kind", KINDS)
TEMPERATURE = torch.tensor([[0.2], [1.0]], dtype=torch.float64)


def textbook(beta):
    """The algorithm as Linderman et al. write it, entry by entry in numbers."""
    m = len(beta)
    p = [[0.0] * (m + 1) for _ in range(m + 1)]
    widths = []
    for i in range(m):
        for j in range(m):
            row = 1 - sum(p[i][:j])
            column = [1 - sum(p[k][c] for k in range(i)) for c in range(m + 1)]
            lower, upper = max(0.0, row - sum(column[j + 1 :])), min(row, column[j])
            widths.append(upper - lower)
            p[i][j] = lower + float(beta[i, j]) * (upper - lower)
        p[i][m] = 1 - sum(p[i][:m])
    p[m] = [1 - sum(p[k][c] for k in range(m)) for c in range(m + 1)]
    return torch.tensor(p), torch.tensor(widths)


# --- both


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_round_trip_and_shapes(kind, m, dtype):
    for temperature, batch in ((0.5, ()), (0.5, (3,)), (TEMPERATURE, (2, 3)), (torch.tensor(0.3), (3,))):
        t = kind(temperature)
        x = torch.randn(*batch[-1:], m, m, dtype=dtype)
        y = t(x)
        assert y.dtype == t.inv(y).dtype == t.log_abs_det_jacobian(x, y).dtype == dtype
        assert y.shape == (*batch, *t.forward_shape(x.shape)[-2:])
        assert t.inverse_shape(y.shape)[-2:] == x.shape[-2:]
        assert t.log_abs_det_jacobian(x, y).shape == batch
        assert torch.allclose(t.inv(y), x.expand(*batch, m, m), atol=1e-9 if dtype == torch.float64 else 1e-4)
        assert t.codomain.check(y).all()


@pytest.mark.usefixtures("float64_only")
@every_kind
@pytest.mark.parametrize("m", [1, 2, 4])
def test_jacobian_is_that_of_autograd(kind, m):
    t = kind(0.4)
    for _ in range(3):
        x = torch.randn(m, m)
        jacobian = torch.autograd.functional.jacobian(lambda x: plain(t(x))[:m, :m].reshape(-1), x).reshape(m * m, m * m)
        assert float(t.log_abs_det_jacobian(x, t(x))) == pytest.approx(float(jacobian.slogdet()[1]), abs=1e-10)


@pytest.mark.usefixtures("float64_only")
@every_kind
def test_gradients(kind):
    tau = torch.tensor(0.6, requires_grad=True)
    x = torch.randn(2, 3, 3, requires_grad=True)

    def both(x, tau):
        t = kind(tau)
        y = t(x)
        return plain(y), t.log_abs_det_jacobian(x, y), t.inv(y)

    assert torch.autograd.gradcheck(both, (x, tau))


@every_kind
def test_comparison_cache_and_copies(kind):
    t = kind(0.5)
    assert t == kind(torch.tensor(0.5))
    assert t != kind(0.4)
    assert t != kind(torch.tensor([0.5]))
    assert t != KINDS[1 - KINDS.index(kind)](0.5)
    assert repr(t) == f"{kind.__name__}(temperature=0.5)"
    cached = t.with_cache()
    x = torch.randn(3, 3)
    assert cached == t
    assert cached.with_cache() is cached
    assert cached(x) is cached(x)
    assert cached.inv(cached(x)) is x
    assert copy.deepcopy(t) == pickle.loads(pickle.dumps(t)) == t
    assert t.domain.event_dim == t.codomain.event_dim == 2


@every_kind
def test_bad_values(kind):
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive and finite, but is"):
            kind(bad)
    with pytest.raises(TypeError, match="temperature must be a number or a tensor"):
        kind("1")
    t = kind(torch.ones(2))
    with pytest.raises(ValueError, match="must be square in its last two dimensions"):
        t(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="must have dtype"):
        t(torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="of batch item 1 must be finite, but is nan at row 0, column 1"):
        t(torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, math.nan], [0.0, 0.0]]]))
    with pytest.raises(ValueError, match="does not broadcast"):
        t(torch.zeros(3, 2, 2))


# --- stick-breaking


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("m", [1, 2, 5])
def test_stick_breaking_is_that_of_the_paper(m):
    tau = 0.7
    for _ in range(5):
        psi = 2 * torch.randn(m, m)
        beta = (psi / tau).sigmoid()
        want, widths = textbook(beta)
        P = StickBreakingTransform(tau)(psi)
        assert isinstance(P, RelaxedPermutation)
        assert torch.allclose(plain(P), want, atol=1e-13)
        jacobian = widths.log().sum() + (beta * (1 - beta) / tau).log().sum()
        assert float(StickBreakingTransform(tau).log_abs_det_jacobian(psi, P)) == pytest.approx(float(jacobian), abs=1e-9)


@pytest.mark.usefixtures("float64_only")
def test_stick_breaking_reaches_the_whole_polytope():
    P = GumbelSinkhorn(0.3, torch.zeros(5, 5)).sample(torch.Size((100,)))
    t = StickBreakingTransform(0.5)
    assert torch.allclose(plain(t(t.inv(P))), plain(P), atol=1e-9)


@pytest.mark.usefixtures("float64_only")
def test_stick_breaking_at_low_temperature():
    psi = torch.randn(500, 6, 6)
    P = StickBreakingTransform(0.1)(psi)
    assert float(P.min()) < 1e-20
    assert torch.allclose(StickBreakingTransform(0.1).inv(P), psi, atol=1e-6)
    P = StickBreakingTransform(1e-4)(psi)
    assert ((P - matching(P)).abs() < 1e-6).all(-1).all(-1).float().mean() > 0.9
    assert constraints.doubly_stochastic.check(P).all()


def test_stick_breaking_inverse_on_the_boundary():
    with pytest.raises(ValueError, match="P has a zero at row 0, column 1.*boundary"):
        StickBreakingTransform().inv(torch.eye(3))
    with pytest.raises(ValueError, match="P is not doubly stochastic"):
        StickBreakingTransform().inv(torch.ones(3, 3))


# --- rounding


def test_rounding_is_that_of_the_paper():
    Z = torch.rand(50, 4, 4)
    X = RoundingTransform(0.3)(Z)
    assert torch.allclose(X, 0.3 * Z + 0.7 * matching(Z))
    assert torch.equal(matching(X), matching(Z))
    assert torch.equal(RoundingTransform(1.0)(Z), Z)


def test_rounding_at_a_temperature_above_one():
    with pytest.raises(ValueError, match="temperature must be at most 1 for RoundingTransform, but is 1.5"):
        RoundingTransform(torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize("shape", [(2, 2), (3, 4, 4), (0, 3, 3), (2, 1, 1, 1)])
def test_gradients_of_broken_sticks(shape):
    psi = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    P = StickBreakingTransform(0.7)(psi)
    assert P.shape == (*shape[:-2], shape[-2] + 1, shape[-1] + 1)
    if psi.numel():

        def matrices(x):
            return StickBreakingTransform(0.7)(x).as_subclass(torch.Tensor)

        assert torch.autograd.gradcheck(matrices, (psi,))


def test_gradients_of_a_temperature_that_would_overflow_are_refused():
    """Found by hostile input; they were NaN."""
    tau = torch.tensor(0.5, dtype=torch.float32, requires_grad=True)
    with pytest.raises(ValueError, match=r"Z must be below 1e\+30 in size, .* in torch\.float32 holds, but is 1e\+200"):
        RoundingTransform(tau)(torch.full((2, 2), 1e200, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"temperature must be at least 1\.18e-38 in torch\.float32, .* but is 1e-40"):
        RoundingTransform(torch.tensor(1e-40, dtype=torch.float32))

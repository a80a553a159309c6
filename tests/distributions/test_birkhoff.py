import copy
import math
import pickle

import pyro
import pytest
import torch
from dist_fixture import BLOCKS, TRIDIAGONAL
from pyro.ops.integrator import potential_grad
from torch.distributions import biject_to, transform_to
from torch.distributions.transforms import IndependentTransform

from pyro_gs import GumbelSinkhorn, SinkhornWarning, SupportWarning, constraints
from pyro_gs.distributions import birkhoff
from pyro_gs.distributions.birkhoff import BirkhoffTransform, DivergenceError
from pyro_gs.distributions.relaxed import RelaxedPermutation, plain
from pyro_gs.ops import cycles

CHAIN = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
TWO = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
RING = sum(torch.roll(torch.eye(5), shift, -1) for shift in range(3)).bool()
RING[4, 1] = False
MIXED = torch.stack([TWO, RING, TWO.flip(-1)])  # of 2, 1 and 2 components, all with 5 free entries

CASES = {
    **{f"n={n}": (n, None) for n in (1, 2, 3, 4, 5)},
    "chain": (3, CHAIN),
    "tridiagonal": (4, TRIDIAGONAL),
    "blocks": (4, BLOCKS),
    "two": (5, TWO),
    "mixed": (5, MIXED),
}
case = pytest.mark.parametrize(("n", "allowed"), CASES.values(), ids=CASES)


def other_free_entries(mask):
    """Positions outside a spanning forest that is built in row-major order, by union of labels: not the transform's."""
    label, free = list(range(2 * len(mask))), []
    for row, column in mask.nonzero().tolist():
        a, b = label[row], label[len(mask) + column]
        if a == b:
            free.append((row, column))
        label = [a if x == b else x for x in label]
    return free


def vectors(t, n, *batch, scale=1.0):
    return scale * torch.randn(*batch, t.inverse_shape((n, n))[-1])


@case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_and_shapes(n, allowed, dtype):
    t = BirkhoffTransform(n, allowed)
    items = () if allowed is None else allowed.shape[:-2]
    for batch in (items, (2, *items)):
        y = vectors(t, n, *batch, scale=2.0).to(dtype)
        P = t(y)
        assert isinstance(P, RelaxedPermutation)
        assert P.dtype == t.inv(P).dtype == t.log_abs_det_jacobian(y, P).dtype == dtype
        assert P.shape == t.forward_shape(y.shape) == (*batch, n, n)
        assert t.inv(P).shape == t.inverse_shape(P.shape) == y.shape
        assert t.codomain.check(P).all()
        assert t.log_abs_det_jacobian(y, P).shape == batch
        assert torch.allclose(t.inv(P), y, atol=1e-12 if dtype == torch.float64 else 1e-6, rtol=1e-6)
        again = t(t.inv(plain(P)))  # of the matrix alone
        assert torch.allclose(plain(again), plain(P), atol=1e-10 if dtype == torch.float64 else 1e-6)


@pytest.mark.usefixtures("float64_only")
def test_one_vector_for_all_items_of_a_mask():
    t = BirkhoffTransform(allowed=MIXED)
    y = vectors(t, 5)
    assert t(y).shape == t.forward_shape(y.shape) == (3, 5, 5)
    assert torch.allclose(plain(t(y)), plain(t(y.expand(3, -1))))


def test_number_of_coordinates():
    for n, allowed in CASES.values():
        k = BirkhoffTransform(n, allowed).inverse_shape((n, n))[-1]
        for mask in (torch.ones(n, n) if allowed is None else allowed).reshape(-1, n, n):
            assert k == len(other_free_entries(mask))
    assert BirkhoffTransform(5).inverse_shape((5, 5)) == (16,)


@pytest.mark.usefixtures("float64_only")
def test_by_plain_sinkhorn_iteration():
    x = torch.randn(9)
    P = BirkhoffTransform()(x)
    log_p = P.log_p
    centred = log_p - log_p.mean(-1, keepdim=True)
    centred = centred - centred.mean(-2, keepdim=True)
    assert float(centred.norm()) == pytest.approx(float(x.norm()), abs=1e-9)
    z = centred.exp()
    for _ in range(500):
        z = z / z.sum(-1, keepdim=True)
        z = z / z.sum(-2, keepdim=True)
    assert torch.allclose(plain(P), z, atol=1e-10)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("allowed", [None, TRIDIAGONAL], ids=["full", "tridiagonal"])
def test_coordinates_of_a_law_are_nearly_uncorrelated(allowed):
    logits = torch.randn(4, 4) if allowed is None else torch.randn(4, 4).masked_fill(~allowed, -torch.inf)
    x = BirkhoffTransform(4, allowed).inv(GumbelSinkhorn(1.0, logits).sample(torch.Size((10_000,))))
    spread = torch.linalg.eigvalsh(torch.cov(x.T))
    assert float(spread[-1] / spread[0]) < 2.0  # of the free entries: 17 and 9


@pytest.mark.usefixtures("float64_only")
@case
def test_jacobian_is_that_of_autograd_on_other_free_entries(n, allowed):
    t = BirkhoffTransform(n, allowed)
    y = vectors(t, n, *(() if allowed is None else allowed.shape[:-2]), scale=1.5)
    got = t.log_abs_det_jacobian(y, t(y)).reshape(-1)
    masks = torch.ones(1, n, n) if allowed is None else allowed.reshape(-1, n, n)
    for item, mask in enumerate(masks):
        rows, columns = torch.tensor(other_free_entries(mask), dtype=torch.long).reshape(-1, 2).T

        def free(x, item=item, rows=rows, columns=columns):
            return plain(t(x)).reshape(-1, n, n)[item, rows, columns]

        if n == 1:
            assert float(got[item]) == 0.0
            continue
        jacobian = torch.autograd.functional.jacobian(free, y).reshape(len(rows), len(masks), -1)[:, item]
        assert float(got[item]) == pytest.approx(float(jacobian.slogdet()[1]), abs=1e-8)


@pytest.mark.usefixtures("float64_only")
@case
def test_gradients(n, allowed):
    t = BirkhoffTransform(n, allowed)
    y = vectors(t, n, *(() if allowed is None else allowed.shape[:-2])).requires_grad_()

    def both(y):
        P = t(y)
        return plain(P), t.log_abs_det_jacobian(y, P)

    if y.numel():
        assert torch.autograd.gradcheck(both, y)
        jacobian = torch.autograd.functional.jacobian(lambda y: t.inv(t(y)), y).reshape(y.numel(), -1)
        assert torch.allclose(jacobian, torch.eye(y.numel()), atol=1e-8)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e6])
def test_exact_where_entries_underflow(size):
    t = BirkhoffTransform(n=2)
    y = torch.tensor([size])
    P = t(y)
    want = torch.nn.functional.logsigmoid(torch.tensor([size, -size])).sum()
    assert float(t.log_abs_det_jacobian(y, P)) == pytest.approx(float(want), rel=1e-12)
    # The Jacobian of a matrix that has lost its logarithm is that of y.
    assert float(t.log_abs_det_jacobian(y, plain(P))) == pytest.approx(float(want), rel=1e-9)
    for n, allowed in CASES.values():
        t = BirkhoffTransform(n, allowed)
        y = vectors(t, n, *(() if allowed is None else allowed.shape[:-2]), scale=size).requires_grad_()
        P = t(y)
        assert torch.allclose(t.inv(P), y, rtol=1e-9, atol=1e-9)
        law = GumbelSinkhorn(0.7, torch.zeros(n, n) if allowed is None else torch.where(allowed, 0.0, -torch.inf))
        energy = (law.log_prob(P) + t.log_abs_det_jacobian(y, P)).sum()
        (grad,) = torch.autograd.grad(energy, y)
        assert energy.isfinite()
        assert grad.isfinite().all()


@pytest.mark.usefixtures("float64_only")
def test_total_mass_over_the_coordinates():
    # Laws of components up to three columns have exact densities; the trapezoid rule of a smooth function on the line.
    axis = torch.linspace(-60, 60, 4001)
    t = BirkhoffTransform(n=2)
    law = GumbelSinkhorn(0.5, torch.tensor([[0.3, -0.4], [0.1, 0.8]]))
    P = t(axis[:, None])
    density = (law.log_prob(P) + t.log_abs_det_jacobian(axis[:, None], P)).exp()
    assert float(density.sum() * (axis[1] - axis[0])) == pytest.approx(1.0, abs=1e-9)

    axis = torch.linspace(-25, 25, 51)
    t = BirkhoffTransform(allowed=CHAIN)
    law = GumbelSinkhorn(1.0, (0.5 * torch.randn(3, 3)).masked_fill(~CHAIN, -torch.inf))
    y = torch.cartesian_prod(axis, axis)
    P = t(y)
    density = (law.log_prob(P) + t.log_abs_det_jacobian(y, P)).exp()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=1e-6)


def test_registered():
    for registry in (biject_to, transform_to):
        assert registry(constraints.doubly_stochastic) == BirkhoffTransform()
        assert registry(constraints.DoublyStochastic(CHAIN)) == BirkhoffTransform(3, CHAIN)
        with pytest.raises(NotImplementedError, match="no unconstraining transform.*relax"):
            registry(constraints.permutation)
    law = GumbelSinkhorn(1.0, torch.zeros(4, 3, 3)).to_event(1)
    t = biject_to(law.support)
    assert isinstance(t, IndependentTransform)
    P = law.rsample()
    assert t.inv(P).shape == (4, 4)
    assert t.log_abs_det_jacobian(t.inv(P), P).shape == ()
    assert torch.allclose(plain(t(t.inv(P))), plain(P), atol=1e-5)


def test_as_the_constraint_of_a_parameter():
    start = GumbelSinkhorn(1.0, torch.zeros(3, 3)).sample()
    P = pyro.param("P", start, constraint=constraints.doubly_stochastic)
    assert torch.allclose(plain(P), plain(start), atol=1e-5)
    assert pyro.get_param_store().get_state()["params"]["P"].shape == (4,)


def test_comparison_and_copies():
    full, chain = BirkhoffTransform(3), BirkhoffTransform(3, CHAIN)
    assert full == BirkhoffTransform(3, torch.ones(3, 3).bool())
    assert chain == BirkhoffTransform(allowed=CHAIN)
    assert full != chain
    assert chain != full
    assert chain != BirkhoffTransform(allowed=CHAIN[None])
    assert full != BirkhoffTransform()
    assert full != 1
    assert chain.inv == BirkhoffTransform(allowed=CHAIN).inv
    assert repr(chain) == "BirkhoffTransform(n=3, allowed=<(3, 3)>)"
    for again in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert again == chain
    assert chain.domain.event_dim == 1
    assert chain.codomain.event_dim == 2


@pytest.mark.parametrize("allowed", [None, CHAIN], ids=["full", "chain"])
def test_solves_once(monkeypatch, allowed):
    solves = []
    scale = birkhoff.scale
    monkeypatch.setattr(birkhoff, "scale", lambda *args, **kwargs: solves.append(1) or scale(*args, **kwargs))
    t = BirkhoffTransform(3, allowed)
    y = vectors(t, 3)
    P = t(y)
    t.log_abs_det_jacobian(y, P)
    t.inv(P)
    assert len(solves) == 1
    cached = t.with_cache()
    assert cached.with_cache() is cached
    assert cached == t
    assert cached(y) is cached(y)
    assert cached.inv(cached(y)) is y
    assert len(solves) == 2


def test_a_step_to_infinity_is_a_divergence():
    t = BirkhoffTransform(2)
    for bad in (math.nan, math.inf, 1e9):
        y = torch.tensor([[0.0], [bad]], dtype=torch.float64)
        with pytest.raises(DivergenceError, match=r"x of batch item 1 must be finite.*at position 0"):
            t(y)
        grads, energy = potential_grad(lambda z: t(z["P"]).sum(), {"P": y})
        assert energy.isnan()
        assert (grads["P"] == 0).all()


def test_first_use_in_inference_mode():
    cycles.full_cycles.cache_clear()
    t = BirkhoffTransform()
    with torch.inference_mode():
        t(torch.zeros(9))
    x = torch.zeros(9).requires_grad_()
    t.inv(t(x)).sum().backward()
    assert torch.allclose(x.grad, torch.ones(9))


def test_bad_arguments():
    with pytest.raises(TypeError, match="n must be an integer or None, but is 2.0"):
        BirkhoffTransform(2.0)
    with pytest.raises(ValueError, match="n must be at least 1, but is 0"):
        BirkhoffTransform(0)
    with pytest.raises(TypeError, match="allowed must be a boolean tensor, but has torch.float"):
        BirkhoffTransform(allowed=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"allowed must have shape \(..., 2, 2\) for n=2, but has shape \(3, 3\)"):
        BirkhoffTransform(2, CHAIN)
    with pytest.raises(ValueError, match="allowed allows no permutation"):
        BirkhoffTransform(allowed=torch.tensor([[1, 0], [1, 0]]).bool())
    with pytest.raises(ValueError, match="4 free entries in batch item 0 and 3 in batch item 1"):
        BirkhoffTransform(allowed=torch.stack([BLOCKS, torch.ones(4, 4).bool().triu(-1) & (torch.ones(4, 4).tril(1) > 0)]))
    with pytest.warns(SupportWarning, match="lies on no permutation"):
        t = BirkhoffTransform(allowed=torch.ones(2, 2).tril().bool())
    assert t(torch.zeros(0)).tolist() == torch.eye(2).tolist()


def test_bad_values():
    t = BirkhoffTransform()
    with pytest.raises(ValueError, match=r"x must have shape \(..., \(n - 1\)\^2\) for an n, but has \(2,\)"):
        t(torch.zeros(2))
    with pytest.raises(ValueError, match=r"x must have shape \(..., 4\) for n=3, but has \(\)"):
        BirkhoffTransform(3)(torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"x must have shape \(..., 2\) for BirkhoffTransform"):
        BirkhoffTransform(3, CHAIN).forward_shape((4,))
    with pytest.raises(TypeError, match="x must have dtype"):
        t(torch.zeros(1, dtype=torch.long))
    with pytest.raises(TypeError, match="x must be a torch.Tensor, but is list"):
        t([1.0])
    with pytest.raises(ValueError, match=r"P must be square in its last two dimensions, but has shape \(2, 3\)"):
        t.inv(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"P must have shape \(..., n, n\), but has shape \(2, 3\)"):
        t.inverse_shape((2, 3))
    with pytest.raises(ValueError, match=r"P must have shape \(..., 3, 3\), but has shape \(2, 2\)"):
        BirkhoffTransform(3).inv(torch.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="P of batch item 1 is not doubly stochastic"):
        t.inv(torch.stack([torch.full((2, 2), 0.5), torch.ones(2, 2)]))
    with pytest.raises(ValueError, match="is not doubly stochastic with zeros where not allowed"):
        BirkhoffTransform(3, CHAIN).inv(torch.full((3, 3), 1 / 3))
    with pytest.raises(ValueError, match="P has a zero at row 0, column 1, where an entry is allowed"):
        t.inv(torch.eye(2))


def test_a_solver_that_stops_early_says_so(monkeypatch):
    monkeypatch.setattr(birkhoff, "_MAX_ITER", 1)
    with pytest.warns(SinkhornWarning, match="stopped after 1 Newton steps"):
        BirkhoffTransform(4)(10 * torch.randn(9))


@pytest.mark.cuda
def test_on_cuda():
    t = BirkhoffTransform(allowed=MIXED.cuda())
    y = torch.randn(3, t.inverse_shape((5, 5))[-1], device="cuda")
    assert torch.allclose(t.inv(t(y)), y, atol=1e-4)
    assert t.log_abs_det_jacobian(y, t(y)).device.type == "cuda"

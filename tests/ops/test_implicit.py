"""Derivatives of the converged operator: in every mode, of every order, under every transformation."""

import mpmath
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from pyro_gs import SinkhornWarning, laplacian_logdet, laplacian_solve, log_sinkhorn, matching, sinkhorn, solve_sinkhorn

pytestmark = pytest.mark.usefixtures("float64_only")


def logits(*batch, n=5, masked=False):
    x = torch.randn(*batch, n, n)
    if masked:  # two components, one of them with a forbidden pair
        x[..., :2, 2:] = x[..., 2:, :2] = x[..., 2, 3] = -torch.inf
    return x


def operator(x):
    return sinkhorn(x, temperature=0.5)


def cube(x):
    return operator(x).pow(3).sum()


@pytest.mark.parametrize("masked", [False, True])
def test_modes_agree(masked):
    n = 5
    x, t = logits(n=n, masked=masked), torch.randn(n, n)
    jacobian = jacrev(operator)(x)
    assert torch.allclose(jacfwd(operator)(x).nan_to_num(), jacobian, atol=1e-12)
    assert torch.allclose(jvp(operator, (x,), (t,))[1], (jacobian * t).sum((-2, -1)), atol=1e-12)
    numeric = (operator(x + 1e-6 * t) - operator(x - 1e-6 * t)) / 2e-6
    assert torch.allclose(jvp(operator, (x,), (t,))[1], numeric, atol=1e-8)


def test_second_and_third_derivatives():
    x, t = logits(n=3), torch.randn(3, 3)
    second = hessian(cube)(x)
    assert torch.allclose(second, jacrev(jacrev(cube))(x), atol=1e-12)
    numeric = (grad(cube)(x + 1e-6 * t) - grad(cube)(x - 1e-6 * t)) / 2e-6
    assert torch.allclose((second * t).sum((-2, -1)), numeric, atol=1e-7)
    third = jvp(jacrev(jacrev(cube)), (x,), (t,))[1]
    numeric = (hessian(cube)(x + 1e-5 * t) - hessian(cube)(x - 1e-5 * t)) / 2e-5
    assert torch.allclose(third, numeric, atol=1e-6)


def test_forward_mode_inside_forward_mode_is_refused():
    # torch returns wrong numbers for it without a word.
    for function in (cube, laplacian_logdet):
        with pytest.raises(NotImplementedError, match="take reverse mode for one of the two"):
            jacfwd(jacfwd(function))(log_sinkhorn(logits(n=3)))


@pytest.mark.parametrize("masked", [False, True])
def test_vmap_is_a_loop(masked):
    x = logits(6, 2, masked=masked)
    for function in (operator, grad(cube), lambda z: solve_sinkhorn(z).log_p, lambda z: sinkhorn(z, num_iters=7)):
        want = torch.stack([function(item) for item in x])
        assert torch.allclose(vmap(function)(x), want, atol=1e-12, equal_nan=True)
        moved = vmap(function, in_dims=2)(x.movedim(0, 2))
        assert torch.allclose(moved, want, atol=1e-12, equal_nan=True)
        assert torch.allclose(vmap(vmap(function))(x[None])[0], want, atol=1e-12, equal_nan=True)
    tau = torch.rand(6) + 0.3
    mapped = vmap(lambda z, t: sinkhorn(z, temperature=t))(x, tau)
    assert torch.allclose(mapped, sinkhorn(x, temperature=tau[:, None]), atol=1e-12)
    mapped = vmap(lambda t: sinkhorn(x, temperature=t))(tau)
    assert torch.allclose(mapped[3], sinkhorn(x, temperature=tau[3]), atol=1e-12)


def test_vmap_over_sums():
    x, r = logits(4), torch.rand(4, 5) + 0.5
    mapped = vmap(lambda z, s: solve_sinkhorn(z, row_sums=s, column_sums=s.flip(-1)).log_p)(x, r)
    assert torch.allclose(mapped.exp().sum(-1), r, atol=1e-9)
    mapped = vmap(lambda s: solve_sinkhorn(x[0], row_sums=s, column_sums=s).log_p)(r)
    assert torch.allclose(mapped.exp().sum(-2), r, atol=1e-9)


def test_checks_of_values_are_made_under_vmap_too():
    x = logits(3)
    x[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="logits of batch item 1 has the entry nan at row 2, column 0"):
        vmap(operator)(x)
    with pytest.raises(ValueError, match="temperature must be positive"):
        vmap(lambda t: sinkhorn(torch.zeros(3, 3), temperature=t))(torch.tensor([1.0, -1.0]))


def test_laplacians_under_transformations():
    log_p, b, t = log_sinkhorn(logits(3)), torch.randn(3, 5), torch.randn(5, 5)
    assert torch.allclose(vmap(laplacian_logdet)(log_p), laplacian_logdet(log_p), atol=1e-12)
    assert torch.allclose(vmap(laplacian_solve)(log_p, b), laplacian_solve(log_p, b), atol=1e-12)
    first = jacrev(laplacian_logdet)(log_p[0])
    assert torch.allclose(vmap(grad(laplacian_logdet))(log_p)[0], first, atol=1e-12)
    assert torch.allclose(jvp(laplacian_logdet, (log_p[0],), (t,))[1], (first * t).sum(), atol=1e-12)
    assert torch.allclose(hessian(laplacian_logdet)(log_p[0]), jacrev(jacrev(laplacian_logdet))(log_p[0]), atol=1e-10)
    for argument in (0, 1):
        forward, reverse = (mode(laplacian_solve, argument)(log_p[0], b[0]) for mode in (jacfwd, jacrev))
        assert torch.allclose(forward, reverse, atol=1e-10)


# Dynamo itself looks at attributes that warn.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_gives_the_same(backend):
    def loss(z):
        return (operator(2 * z) * torch.arange(5.0)).sum() ** 2

    x = logits(2)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend)
    leaf = x.clone().requires_grad_()
    compiled(leaf).backward()
    assert torch.allclose(leaf.grad, grad(loss)(x), atol=1e-12)


def exact_gradient(x, tau, weight, digits=80):
    """Gradient in ``x`` of the weighted sum of ``S(x / tau)`` and of its logdet, with so many digits."""
    n = len(x)
    with mpmath.workdps(digits):

        def solve(z):
            v = [mpmath.mpf(0)] * n
            for _ in range(2000):
                p = [[mpmath.e ** (z[i][j] + v[j]) for j in range(n)] for i in range(n)]
                p = [[a / sum(row) for a in row] for row in p]
                lap = mpmath.matrix(n - 1, n - 1)
                for a in range(1, n):
                    for b in range(1, n):
                        lap[a - 1, b - 1] = (a == b) * sum(row[a] for row in p) - sum(row[a] * row[b] for row in p)
                step = mpmath.lu_solve(lap, mpmath.matrix([1 - sum(row[j] for row in p) for j in range(1, n)]))
                largest = max(abs(a) for a in step)
                v = [v[0]] + [v[j] + min(1, 1 / largest) * step[j - 1] if largest else v[j] for j in range(1, n)]
                if largest < mpmath.mpf(10) ** (-digits // 2):
                    return p, lap
            raise AssertionError("the reference did not converge")

        z = [[mpmath.mpf(float(a)) / mpmath.mpf(tau) for a in row] for row in x]
        h, out = mpmath.mpf(10) ** (-digits // 4), torch.zeros(2, n, n)
        for i in range(n):
            for j in range(n):
                values = []
                for sign in (1, -1):
                    z[i][j] += sign * h
                    p, lap = solve(z)
                    z[i][j] -= sign * h
                    total = sum(mpmath.mpf(float(weight[a, b])) * p[a][b] for a in range(n) for b in range(n))
                    values.append((total, mpmath.log(mpmath.det(lap))))
                for k in range(2):
                    out[k, i, j] = float((values[0][k] - values[1][k]) / (2 * h * mpmath.mpf(tau)))
        return out


@pytest.mark.parametrize("n", [2, 3, 4])
def test_gradients_keep_six_digits_at_a_low_temperature(n):
    tau = 0.05
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(n, n) - torch.log(-torch.log(torch.rand(n, n)))
        weight = torch.randn(n, n)
        want = exact_gradient(x, tau, weight)
        got = grad(lambda z, w=weight: (sinkhorn(z, temperature=tau) * w).sum())(x)
        assert torch.allclose(got, want[0], rtol=1e-6, atol=1e-6 * float(want[0].abs().max()))
        got = grad(lambda z: laplacian_logdet(log_sinkhorn(z, temperature=tau)))(x)
        assert torch.allclose(got, want[1], rtol=1e-6, atol=1e-6 * float(want[1].abs().max()))


@pytest.mark.parametrize("tau", [0.01, 0.001, 0.0005])
def test_derivatives_of_entries_below_floating_point(tau):
    # n = 2 has the closed form log P_01 = log sigmoid(-d), d half of x00 + x11 - x01 - x10 over tau: linear down there.
    x = torch.tensor([[2.0, 0.5], [0.3, 1.7]])
    want = torch.tensor([[-0.5, 0.5], [0.5, -0.5]]) / tau

    def f(z):
        return log_sinkhorn(z, temperature=tau)[0, 1]

    for mode in (jacrev, jacfwd):
        assert torch.allclose(mode(f)(x), want, rtol=1e-9)
    assert float(hessian(f)(x).abs().max()) < 1e-6 / tau**2


def test_derivatives_at_a_very_low_temperature_match_differences():
    tau, h = 0.002, 1e-4 * 0.002
    for seed in range(5):
        torch.manual_seed(seed)
        n = 7
        x, weight, t = torch.randn(n, n), torch.randn(n, n), torch.randn(n, n)

        def f(z, w=weight):
            return (log_sinkhorn(z, temperature=tau) * w).sum()

        numeric = float(f(x + h * t) - f(x - h * t)) / (2 * h)
        assert float((grad(f)(x) * t).sum()) == pytest.approx(numeric, rel=1e-5)
        assert float(jvp(f, (x,), (t,))[1]) == pytest.approx(numeric, rel=1e-5)
        assert float(log_sinkhorn(x, temperature=tau).min()) < -800
        logdet = lambda z: laplacian_logdet(log_sinkhorn(z, temperature=tau))  # noqa: E731
        numeric = float(logdet(x + h * t) - logdet(x - h * t)) / (2 * h)
        assert float((grad(logdet)(x) * t).sum()) == pytest.approx(numeric, rel=1e-5)


def test_no_gradient_where_the_solver_was_cut_short():
    x = 30 * torch.randn(2, 20, 20)
    x[0] = 0.0
    x.requires_grad_()
    with pytest.warns(SinkhornWarning, match="for 1 of 2 matrices"):
        p = sinkhorn(x, max_iter=2)
    p[0].square().sum().backward(retain_graph=True)  # the other item's gradient stands
    assert x.grad.isfinite().all()
    with pytest.raises(RuntimeError, match="no gradient: Sinkhorn stopped before its tolerance for 1 of 2 matrices"):
        p[1].square().sum().backward()


def test_gradient_of_truncated_sweeps_is_theirs():
    x = logits(n=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sinkhorn(z, temperature=0.1, num_iters=6), x)
    implicit = grad(lambda z: sinkhorn(z, temperature=0.1)[0, 0])(x.detach())
    sweeps = grad(lambda z: sinkhorn(z, temperature=0.1, num_iters=6)[0, 0])(x.detach())
    assert not torch.allclose(implicit, sweeps, atol=1e-3)


def test_warnings_point_at_the_caller():
    with pytest.warns(SinkhornWarning) as caught:
        sinkhorn(30 * torch.randn(20, 20), max_iter=1)
    assert caught[0].filename == __file__


def test_rare_looks_at_a_device_change_nothing(monkeypatch):
    # On CUDA the host looks every few steps; items that are done meanwhile go on without harm.
    x = torch.stack([scale * torch.randn(250, 250) for scale in (0.1, 1.0, 5.0)])
    x[2, :100, 100:] = x[2, 100:, :100] = -torch.inf
    want, counts = sinkhorn(x, temperature=0.3), solve_sinkhorn(x).iterations
    for module in ("newton", "conjugate"):
        monkeypatch.setattr(f"pyro_gs.ops.{module}.look_every", lambda device, count: count)
    assert torch.allclose(sinkhorn(x, temperature=0.3), want, atol=1e-9)
    found = solve_sinkhorn(x)
    assert found.converged.all()
    assert (found.iterations <= counts + 12).all()  # a look late by up to three steps, at every temperature level
    with pytest.warns(SinkhornWarning):
        assert (solve_sinkhorn(100 * x, max_iter=3).iterations <= 3).all()


@pytest.mark.parametrize("n", [200, 300])
def test_large_matrices_solved_by_iterations_have_the_same_gradient(n, monkeypatch):
    # Conjugate gradients take over from 192 rows; the factorizations must agree with them, masked or not.
    for masked in (False, True):
        x, weight = torch.randn(n, n), torch.randn(n, n)
        if masked:
            x = torch.where((torch.rand(n, n) < 0.3) & (matching(x) == 0), -torch.inf, x)
            x[: n // 2, n // 2 :] = x[n // 2 :, : n // 2] = -torch.inf
            x.diagonal().fill_(0.0)
        grads, values = [], []
        for smallest in (192, 10_000):
            monkeypatch.setattr("pyro_gs.ops.conjugate.SMALLEST", smallest)
            monkeypatch.setattr("pyro_gs.ops.newton.SMALLEST", smallest)
            leaf = x.clone().requires_grad_()
            p = log_sinkhorn(leaf).exp()
            (p * weight).sum().backward()
            grads.append(leaf.grad)
            values.append(p.detach())
        assert torch.allclose(*values, rtol=1e-9, atol=1e-13)
        assert torch.allclose(*grads, rtol=1e-7, atol=1e-11)


def transposed_gap(x, tau, weight):
    """Largest difference of the gradients of ``<weight, log S>`` at a matrix and at its transpose, relative."""
    first = grad(lambda z: (log_sinkhorn(z, temperature=tau) * weight).sum())(x)
    second = grad(lambda z: (log_sinkhorn(z, temperature=tau) * weight.mT).sum())(x.mT.contiguous()).mT
    return float((first - second).abs().max() / first.abs().max())


def test_gradients_of_clusters_do_not_explode():
    # Weak ties of very different sizes in the two directions; partial pivoting would mix their scales.
    n, tau = 30, 0.02
    i = torch.arange(n)
    same, first = (i[:, None] < 15) == (i[None] < 15), i[:, None] < 15
    for seed in range(8):
        torch.manual_seed(seed)
        x = 0.01 * torch.randn(n, n) - torch.where(same, 0.0, torch.where(first, 0.3, 3.0))
        weight, t = torch.randn(n, n), torch.randn(n, n)
        assert transposed_gap(x, tau, weight) < 1e-6

        def f(z, w=weight):
            return (log_sinkhorn(z, temperature=tau) * w).sum()

        numeric = float(f(x + 1e-6 * t) - f(x - 1e-6 * t)) / 2e-6
        assert float((grad(f)(x) * t).sum()) == pytest.approx(numeric, rel=1e-4)


def test_gradients_along_chains_of_ties():
    # Each pivot is harmless by itself; what they lose adds up.
    for seed in range(20):
        torch.manual_seed(seed)
        x, weight = torch.randn(20, 20), torch.randn(20, 20)
        assert transposed_gap(x, 0.01, weight) < 1e-6
        g = grad(lambda z, w=weight: (log_sinkhorn(z, temperature=0.01) * w).sum())(x)
        assert float(g.sum(0).abs().max()) < 1e-6 * float(g.abs().max())


def test_gradient_at_exact_ties():
    # Two entries of a row are one half each, up to rounding.
    x, weight = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), torch.zeros(3, 3)
    weight[1, 0] = 1.0
    got = grad(lambda z: (sinkhorn(z, temperature=0.01) * weight).sum())(x)
    assert float(got[1, 0]) == pytest.approx(12.5, rel=1e-6)


@pytest.mark.parametrize("ways", [(1e-15, 1e-15), (1e-9, 1e-18)])
def test_forward_mode_of_large_weakly_tied_clusters(ways):
    # What conjugate gradients cannot see must not be certified.
    n, k = 200, 100
    x, t = 0.5 * torch.randn(n, n), torch.randn(n, n)
    for block, way in ((x[:k, k:], ways[0]), (x[k:, :k], ways[1])):
        block += torch.log(torch.tensor(way))
    got = jvp(log_sinkhorn, (x,), (t,))[1]
    numeric = (log_sinkhorn(x + 1e-5 * t) - log_sinkhorn(x - 1e-5 * t)) / 2e-5
    assert torch.allclose(got, numeric, atol=1e-6)


def test_loose_tolerance_and_half_precision_have_the_gradient_of_a_fixed_point():
    for seed in range(5):
        torch.manual_seed(seed)
        x, weight = torch.randn(5, 5), torch.randn(5, 5)
        want = grad(lambda z, w=weight: (sinkhorn(z, temperature=0.05) * w).sum())(x)
        got = grad(lambda z, w=weight: (sinkhorn(z, temperature=0.05, tol=0.1) * w).sum())(x)
        assert torch.allclose(got, want, atol=1e-3 * float(want.abs().max()) + 1e-6)
        half = x.half()
        want = grad(lambda z, w=weight: (sinkhorn(z, temperature=0.05) * w).sum())(half.double())
        got = grad(lambda z, w=weight: (sinkhorn(z, temperature=0.05) * w.half()).sum())(half)
        assert torch.allclose(got.double(), want, atol=1e-2 * float(want.abs().max()) + 1e-5)


@pytest.mark.parametrize(("n", "tau", "seeds"), [(10, 0.003, 12), (50, 0.001, 2)])
def test_gradients_through_underflowed_ties_of_clusters(n, tau, seeds):
    # A pair that is far below floating point from two columns which share a row: the shares count.
    for seed in range(seeds):
        torch.manual_seed(seed)
        x = torch.randn(n, n) - torch.log(-torch.log(torch.rand(n, n)))
        assert transposed_gap(x, tau, torch.randn(n, n)) < 1e-8

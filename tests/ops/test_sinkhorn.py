import itertools
import warnings

import mpmath
import pytest
import torch

from pyro_gs import SinkhornWarning, SupportWarning, log_sinkhorn, matching, sinkhorn, solve_sinkhorn
from pyro_gs.ops.sinkhorn import default_tol


def reference(z, digits=150):
    """log S(z) by Newton's method on the dual in high precision (plain iteration would take 1e12 sweeps)."""
    n = len(z)
    with mpmath.workdps(digits):
        k = [[mpmath.mpf(float(x)) for x in row] for row in z]
        v = [mpmath.mpf(0)] * n
        for _ in range(5000):
            p = [[mpmath.e ** (k[i][j] + v[j]) for j in range(n)] for i in range(n)]
            p = [[x / sum(row) for x in row] for row in p]
            hessian = mpmath.matrix(n - 1, n - 1)
            for a in range(1, n):
                for b in range(1, n):
                    hessian[a - 1, b - 1] = (a == b) * sum(row[a] for row in p) - sum(row[a] * row[b] for row in p)
            step = mpmath.lu_solve(hessian, mpmath.matrix([1 - sum(row[j] for row in p) for j in range(1, n)]))
            largest = max(abs(x) for x in step)
            size = min(1, 1 / largest)
            v = [v[0]] + [v[j] + size * step[j - 1] for j in range(1, n)]
            if largest < mpmath.mpf(10) ** -30:
                break
        p = [[mpmath.e ** (k[i][j] + v[j]) for j in range(n)] for i in range(n)]
        return torch.tensor([[float(mpmath.log(x / sum(row))) for x in row] for row in p])


def gumbel(*shape):
    return -torch.log(-torch.log(torch.rand(*shape, dtype=torch.float64))).to(torch.get_default_dtype())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("n", [1, 2, 10, 60])
def test_marginals_reach_the_default_tolerance(temperature, n, dtype):
    logits = torch.randn(5, n, n) + gumbel(5, n, n)
    P = sinkhorn(logits, temperature=temperature)
    assert P.dtype == dtype
    error = max(float((P.double().sum(dim) - 1).abs().max()) for dim in (-2, -1))
    assert error <= 2 * default_tol(dtype) + n * torch.finfo(dtype).eps


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("temperature", [1.0, 0.4, 0.15, 0.05])
def test_equals_high_precision_iteration(temperature):
    for seed in range(3):
        torch.manual_seed(seed)
        logits = torch.randn(4, 4) + gumbel(4, 4)
        want = reference(logits / temperature)
        assert torch.allclose(log_sinkhorn(logits, temperature=temperature), want, atol=1e-8)


@pytest.mark.usefixtures("float64_only")
def test_small_entries_have_right_logarithms():
    # All marginals are right to 17 digits before the first step; both small entries are exp(-55).
    log_p = log_sinkhorn(torch.tensor([[60.0, 20.0], [-20.0, 50.0]]))
    assert log_p[0, 1].item() == pytest.approx(-55.0, abs=1e-12)
    assert log_p[1, 0].item() == pytest.approx(-55.0, abs=1e-12)


@pytest.mark.usefixtures("float64_only")
def test_cold_cuts_balance():
    # At a temperature where entries underflow: for every cut of the columns, the mass that leaves it through the
    # matching equals the mass that enters. Checked in logarithms for single columns.
    torch.manual_seed(1)
    logits = torch.randn(8, 8) + gumbel(8, 8)
    log_p = log_sinkhorn(logits, temperature=0.004)
    assert (log_p.exp() == 0).any()
    row_of = matching(logits).mT.argmax(-1)
    matched = log_p[row_of].masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf)
    out, into = torch.logsumexp(matched, 1), torch.logsumexp(matched, 0)
    assert torch.allclose(out, into, atol=1e-6)


def test_potentials_and_report():
    logits = torch.randn(3, 6, 6)
    solution = solve_sinkhorn(logits)
    again = logits + solution.u[..., :, None] + solution.v[..., None, :]
    assert torch.allclose(again, solution.log_p, atol=1e-5)
    assert (solution.v[..., 0] == 0).all()
    assert solution.converged.shape == solution.residual.shape == solution.iterations.shape == (3,)
    assert solution.converged.all()
    assert solution.iterations.dtype == torch.long


@pytest.mark.usefixtures("float64_only")
def test_general_marginals():
    logits = torch.randn(2, 5, 5)
    r, c = torch.rand(5) + 0.5, torch.rand(2, 5) + 0.5
    c = c * r.sum() / c.sum(-1, keepdim=True)
    p = solve_sinkhorn(logits, row_sums=r, column_sums=c).log_p.exp()
    assert torch.allclose(p.sum(-1), r.expand(2, 5), atol=1e-9)
    assert torch.allclose(p.sum(-2), c, atol=1e-9)


def test_shifts_change_nothing_and_permutations_carry_over():
    x = torch.randn(6, 6)
    shifted = x + 10 * torch.randn(6, 1) + 10 * torch.randn(1, 6)
    rows, columns = torch.randperm(6), torch.randperm(6)
    atol = 1e-9 if x.dtype == torch.float64 else 1e-4
    assert torch.allclose(sinkhorn(x), sinkhorn(shifted), atol=atol)
    assert torch.allclose(sinkhorn(x)[rows][:, columns], sinkhorn(x[rows][:, columns]), atol=atol)
    assert torch.allclose(sinkhorn(x).mT, sinkhorn(x.mT), atol=atol)


def test_limits():
    x = torch.randn(5, 5)
    assert torch.allclose(sinkhorn(x, temperature=1e4), torch.full((5, 5), 0.2), atol=1e-3)
    assert torch.allclose(sinkhorn(x, temperature=1e-3), matching(x), atol=1e-4)
    doubly = sinkhorn(x)
    assert torch.allclose(sinkhorn(doubly.log()), doubly, atol=1e-5)


@pytest.mark.parametrize("dtype_name", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_small_temperature_in_every_dtype(dtype_name, shift):
    # Case 1: a kernel exp(X / tau) would be all zeros.
    kind = getattr(torch, dtype_name)
    if shift and dtype_name in ("float16", "bfloat16"):
        pytest.skip("the input itself is rounded away in half precision")
    x = -(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=kind)) + shift
    x.requires_grad_()
    P = sinkhorn(x, temperature=0.005)
    assert P.dtype == kind
    assert torch.allclose(P.float(), torch.eye(2, dtype=torch.float32), atol=1e-6)
    P.sum().backward()
    assert x.grad.isfinite().all()


def test_forbidden_pairs_are_exact_zeros():
    inf = torch.inf
    x = torch.tensor([[0.0, -inf, -inf], [-inf, 0.0, 1.0], [-inf, 1.0, 0.0]])  # case 2a
    P = sinkhorn(x)
    want = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.2689, 0.7311], [0.0, 0.7311, 0.2689]])
    assert torch.allclose(P, want, atol=1e-4)
    assert torch.equal(P == 0, x == -inf)


def test_entries_on_no_permutation_are_pruned_with_a_warning():
    with pytest.warns(SupportWarning, match="row 1, column 0"):
        P = sinkhorn(torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]))  # case 2b
    assert torch.equal(P, torch.eye(2))


def test_infeasible_mask_names_item_and_rows():
    x = torch.zeros(2, 3, 3)
    x[1, :2, 1:] = -torch.inf  # case 2c in one item of a batch
    with pytest.raises(ValueError, match=r"batch item 1 allows no permutation: the 2 rows \[0, 1\]"):
        sinkhorn(x)
    with pytest.raises(ValueError, match=r"the row 1 may take no column"):
        sinkhorn(torch.tensor([[1.0, 2.0], [-torch.inf, -torch.inf]]))  # case 3


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_gradients_match_finite_differences_twice(temperature):
    x = torch.randn(2, 4, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: log_sinkhorn(z, temperature=temperature), x)
    assert torch.autograd.gradgradcheck(lambda z: sinkhorn(z, temperature=temperature), x)
    tau = torch.tensor([0.7, 1.3], requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: sinkhorn(x.detach(), temperature=t), tau)


@pytest.mark.usefixtures("float64_only")
def test_gradients_through_forbidden_pairs():
    allowed = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    x = torch.randn(5, 5, requires_grad=True)
    tau = torch.tensor(0.5, requires_grad=True)

    def f(z, t):
        return sinkhorn(torch.where(allowed, z, -torch.inf), temperature=t)

    assert torch.autograd.gradcheck(f, (x, tau))
    assert torch.autograd.gradgradcheck(f, (x, tau))
    y = torch.where(allowed, x.detach(), -torch.inf).requires_grad_()
    log_sinkhorn(y).masked_fill(~allowed, 0.0).square().sum().backward()
    assert (y.grad[~allowed] == 0).all()
    assert y.grad.isfinite().all()


@pytest.mark.usefixtures("float64_only")
def test_implicit_gradient_equals_the_unrolled_one():
    # Case 4: to 1e-5 on a 5 x 5 at convergence, also with forbidden entries.
    x = torch.randn(5, 5)
    x[0, 3] = x[4, 1] = -torch.inf
    weight = torch.randn(5, 5)
    grads = []
    for options in ({}, {"num_iters": 2000}):
        leaf = x.clone().requires_grad_()
        (sinkhorn(leaf, **options) * weight).sum().backward()
        grads.append(leaf.grad)
    assert torch.allclose(*grads, atol=1e-9)


@pytest.mark.usefixtures("float64_only")
def test_gradient_of_one_item_does_not_depend_on_another():
    x = torch.randn(2, 4, 4, requires_grad=True)
    sinkhorn(x, temperature=0.3)[0].square().sum().backward()
    alone = x.detach()[0].clone().requires_grad_()
    sinkhorn(alone, temperature=0.3).square().sum().backward()
    assert torch.allclose(x.grad[0], alone.grad, atol=1e-12)
    assert (x.grad[1] == 0).all()


@pytest.mark.usefixtures("float64_only")
def test_cold_gradient():
    # Relative accuracy of a gradient whose entries are tiny: n = 2 has the closed form sigmoid(D / tau).
    a = torch.tensor([[0.9, 0.1], [0.3, 0.6]], requires_grad=True)
    tau = 0.02
    (grad,) = torch.autograd.grad(log_sinkhorn(a, temperature=tau).exp()[0, 1], a)
    d = (a[0, 0] + a[1, 1] - a[0, 1] - a[1, 0]) / 2
    (want,) = torch.autograd.grad(torch.sigmoid(-d / tau), a)
    assert torch.allclose(grad, want, rtol=1e-9, atol=0.0)


def test_truncated_operator_is_the_papers():
    x = torch.randn(3, 5, 5)
    z = x / 0.7
    for _ in range(20):
        z = z - z.logsumexp(-1, keepdim=True)
        z = z - z.logsumexp(-2, keepdim=True)
    assert torch.allclose(log_sinkhorn(x, temperature=0.7, num_iters=20), z, atol=1e-5)


def test_memory_of_the_gradient_does_not_grow_with_the_iterations():
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    counts = []
    for temperature in (1.0, 0.05):
        x = torch.randn(20, 20, requires_grad=True)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            sinkhorn(x, temperature=temperature)
        counts.append(sum(saved))
    assert counts[0] == counts[1]
    assert counts[0] <= 12 * 400


def test_meeting_the_cap_warns_with_the_residual():
    x = 20 * torch.randn(30, 30)
    with pytest.warns(SinkhornWarning, match=r"marginal error of .* above tol=.*temperature 0.1"):
        sinkhorn(x, temperature=0.1, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SinkhornWarning)
        solution = solve_sinkhorn(x, max_iter=1)
    assert not solution.converged
    assert float(solution.residual) > default_tol(x.dtype)
    with pytest.raises(RuntimeError, match="did not converge"):
        solve_sinkhorn(x, max_iter=1, throw=True)


def test_items_of_different_difficulty():
    logits = torch.randn(4, 8, 8) * torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None, None]
    P = sinkhorn(logits, temperature=torch.tensor([1.0, 0.1, 1.0, 0.1]))
    assert torch.allclose(P.sum(-1), torch.ones(4, 8), atol=1e-5)
    assert torch.allclose(P[2], sinkhorn(logits[2]), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, but is 0.0"),
        ({"temperature": -1}, ValueError, "temperature must be positive and finite, but is -1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be positive"),
        ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor, but is str"),
        ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, r"temperature must be .* -2.0 at \(1,\)"),
        ({"temperature": torch.ones(3)}, ValueError, "does not broadcast"),
        ({"tol": 0.0}, ValueError, "tol must be positive"),
        ({"max_iter": 0}, ValueError, "max_iter must be an integer of at least 1, but is 0"),
        ({"num_iters": 2.5}, ValueError, "num_iters must be an integer"),
        ({"num_iters": 5, "tol": 1e-3}, ValueError, "num_iters=5 asks for a fixed number"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        sinkhorn(torch.zeros(2, 3, 3), **options)


def test_bad_logits():
    x = torch.zeros(2, 3, 3)
    x[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="logits of batch item 1 has the entry nan at row 2, column 0"):
        sinkhorn(x)
    with pytest.raises(ValueError, match="logits must be square"):
        sinkhorn(x[:, :2])
    with pytest.raises(TypeError, match="floating"):
        sinkhorn(torch.zeros(3, 3, dtype=torch.int32))


def test_bad_sums():
    x = torch.zeros(2, 3, 3)
    with pytest.raises(ValueError, match=r"row_sums must have shape \(..., 3\)"):
        solve_sinkhorn(x, row_sums=torch.ones(2))
    with pytest.raises(ValueError, match=r"column_sums must be positive and finite, but is 0.0 at \(1,\)"):
        solve_sinkhorn(x, column_sums=torch.tensor([1.0, 0.0, 2.0]))
    with pytest.raises(ValueError, match="same total in every component"):
        solve_sinkhorn(x, row_sums=torch.tensor([1.0, 1.0, 2.0]))


def test_rectangular_problems_are_refused_with_what_makes_them_square():
    x = torch.randn(2, 3, 5)
    with pytest.raises(
        ValueError, match=r"to leave 2 of the columns free, use torch.nn.functional.pad\(logits, \(0, 0, 0, 2\)\)"
    ):
        sinkhorn(x)
    with pytest.raises(ValueError, match=r"2 of the rows free, use torch.nn.functional.pad\(logits, \(0, 2\)\)"):
        matching(x.mT)
    P = sinkhorn(torch.nn.functional.pad(x, (0, 0, 0, 2)))
    assert torch.allclose(P[:, :3].sum(-1), torch.ones(2, 3), atol=1e-5)
    assert (P[:, :3].sum(-2) <= 1 + 1e-5).all()
    assert torch.allclose(P[:, 3], P[:, 4], atol=1e-6)
    other = sinkhorn(torch.nn.functional.pad(x, (0, 0, 0, 2), value=-7.0))
    assert torch.allclose(P, other, atol=1e-5)
    index = matching(torch.nn.functional.pad(x, (0, 0, 0, 2)))[:, :3].argmax(-1)
    best = max(
        itertools.permutations(range(5), 3), key=lambda columns: sum(float(x[0, i, j]) for i, j in enumerate(columns))
    )
    assert tuple(index[0].tolist()) == best


@pytest.mark.cuda
def test_on_cuda():
    x = torch.randn(3, 8, 8, device="cuda", requires_grad=True)
    P = sinkhorn(x, temperature=0.2)
    P.square().sum().backward()
    assert P.device == x.grad.device == x.device
    assert torch.allclose(P.cpu(), sinkhorn(x.detach().cpu(), temperature=0.2), atol=1e-5)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("tau", [0.1, 0.05, 0.02])
def test_cold_gradients_of_logarithms(tau):
    # Every entry of log P weighs in, the tiny ones too: adjoint potentials of 1e20 that nearly agree inside a cluster.
    n, worst = 8, []
    for seed in range(10):
        torch.manual_seed(seed)
        x = torch.randn(n, n) + gumbel(n, n)
        weight, direction = torch.randn(n, n), torch.randn(n, n)

        def f(z, weight=weight):
            return (log_sinkhorn(z, temperature=tau) * weight).sum()

        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf), leaf)
        got, h = float((grad * direction).sum()), 1e-4 * tau
        want = float(f(x + h * direction) - f(x - h * direction)) / (2 * h)
        worst.append(abs(got - want) / max(1.0, abs(want)))
    assert sorted(worst)[-2] < 1e-3  # one in ten may sit at a kink that the difference straddles


def test_the_cap_returns_a_matrix_with_the_residual_that_it_reports():
    x = 30 * torch.randn(30, 30)
    for cap in (1, 2, 3):
        with pytest.warns(SinkhornWarning, match="marginal error"):
            solution = solve_sinkhorn(x, max_iter=cap)
        p = solution.log_p.exp()
        error = max(float((p.sum(dim) - 1).abs().max()) for dim in (-2, -1))
        assert error == pytest.approx(float(solution.residual), rel=1e-3, abs=1e-5)


def test_empty_batch():
    for function in (sinkhorn, log_sinkhorn, matching):
        assert function(torch.zeros(0, 3, 3)).shape == (0, 3, 3)
    assert solve_sinkhorn(torch.zeros(0, 3, 3)).converged.shape == (0,)


def test_overflow_and_sums_with_gradients_are_refused():
    with pytest.raises(ValueError, match="logits / temperature overflows"):
        sinkhorn(torch.randn(3, 3, dtype=torch.float64), temperature=1e-300)
    with pytest.raises(ValueError, match="logits / temperature overflows"):  # to -inf, which would forbid a pair
        sinkhorn(torch.tensor([[0.0, -1e10], [0.0, 0.0]], dtype=torch.float64), temperature=1e-300)
    with pytest.raises(ValueError, match="logits / temperature overflows"):
        sinkhorn(torch.randn(3, 3, dtype=torch.float64), temperature=1e-320)
    with pytest.raises(ValueError, match="overflows"):
        solve_sinkhorn(torch.tensor([[0.0, -1e300], [0.0, 0.0]], dtype=torch.float64))
    with pytest.raises(ValueError, match="row_sums must not require a gradient"):
        solve_sinkhorn(torch.zeros(3, 3), row_sums=torch.ones(3, requires_grad=True))
    with pytest.raises(TypeError, match="column_sums must be a torch.Tensor"):
        solve_sinkhorn(torch.zeros(3, 3), column_sums=[1.0, 1.0, 1.0])


@pytest.mark.usefixtures("float64_only")
def test_a_huge_common_part_of_a_row_does_not_matter():
    logits = torch.zeros(3, 3)
    logits[2] = 1e30
    solution = solve_sinkhorn(logits)
    torch.testing.assert_close(solution.log_p.exp(), torch.full((3, 3), 1 / 3), rtol=0, atol=1e-12)
    assert float(solution.u[2]) == -1e30


@pytest.mark.usefixtures("float64_only")
def test_a_huge_gap_within_a_row_warns_and_gives_no_nan():
    logits = torch.zeros(3, 3)
    logits[2, 1:] = 1e30
    with pytest.warns(SinkhornWarning, match="marginal error"):
        solution = solve_sinkhorn(logits)
    assert not solution.log_p.isnan().any()
    assert not solution.converged

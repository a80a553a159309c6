"""Operators on candidates against the dense ones under the same mask."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.func import jvp, vmap

import pyro_gs as pgs
from pyro_gs import log_sinkhorn, log_sparse_sinkhorn, sinkhorn, sparse_matching, sparse_sinkhorn, to_dense, to_sparse
from pyro_gs.ops.layout import Sparse
from pyro_gs.ops.sparse import nearly_inverse

pytestmark = pytest.mark.usefixtures("float64_only")


def problem(n, k, *batch, noisy=True):
    """Dense logits with at most k pairs a row that all lie on permutations: cyclic shifts of a random one."""
    order = torch.rand(*batch, n).argsort(-1)
    allowed = torch.zeros(*batch, n, n, dtype=torch.bool)
    for shift in torch.randperm(n)[:k].tolist():
        allowed.scatter_(-1, order.roll(shift, -1)[..., None], True)
    x = torch.randn(*batch, n, n)
    if noisy:
        x = x - torch.rand_like(x).log().neg().log()
    return x.masked_fill(~allowed, -torch.inf)


def blocks():
    """Components of one, two and four rows."""
    allowed = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.eye(4) + torch.eye(4).roll(1, 0)) > 0
    return torch.randn(7, 7).masked_fill(~allowed, -torch.inf)


CASES = {
    "small": (lambda: problem(6, 3), 1.0),
    "cold": (lambda: problem(6, 3), 0.05),
    "batch, own candidates": (lambda: problem(20, 4, 2, 3), 0.5),
    "components": (blocks, 0.7),
    "all pairs": (lambda: torch.randn(2, 5, 5), 0.3),
    "one row": (lambda: torch.zeros(1, 1), 1.0),
    "large, cold": (lambda: problem(250, 6), 0.05),
    "large components": (lambda: torch.block_diag(*(blocks().exp() for _ in range(30))).log(), 0.3),
}


@pytest.fixture
def case(request):
    make, temperature = CASES[request.param]
    return make(), temperature


def with_cases(*names):
    return pytest.mark.parametrize("case", names or CASES, indirect=True)


@with_cases()
def test_the_operator_is_the_dense_one(case):
    x, temperature = case
    want = log_sinkhorn(x, temperature=temperature)
    logits, candidates = to_sparse(x)
    found = log_sparse_sinkhorn(logits, candidates, temperature=temperature)
    # to the marginal error, 1e-10, over the condition of the problem
    assert torch.allclose(to_dense(found.exp(), candidates), want.exp(), atol=1e-9)
    assert torch.equal(to_dense(found, candidates, fill=-torch.inf) == -torch.inf, want == -torch.inf)
    assert (found.exp().sum(-1) - 1).abs().max() <= 1e-10
    assert (to_dense(found.exp(), candidates).sum(-2) - 1).abs().max() <= 1e-10


@with_cases()
def test_the_gradient_is_the_dense_one(case):
    x, temperature = case
    logits, candidates = to_sparse(x)
    free = x.masked_fill(x == -torch.inf, 0.0).requires_grad_()
    sparse = free.gather(-1, candidates)
    weight = torch.randn(x.shape)
    total = (sinkhorn(torch.where(x == -torch.inf, x, free), temperature=temperature) * weight).sum()
    (want,) = torch.autograd.grad(total, free)
    p = sparse_sinkhorn(torch.where(logits == -torch.inf, logits, sparse), candidates, temperature=temperature)
    (found,) = torch.autograd.grad((to_dense(p, candidates) * weight).sum(), free)
    assert torch.allclose(found, want, atol=1e-8)


@pytest.mark.parametrize("smallest", [1, 192])
@with_cases("small", "components")
def test_derivatives_against_finite_differences(case, smallest, monkeypatch):
    for module in ("newton", "conjugate"):  # from which size conjugate gradients are taken
        monkeypatch.setattr(f"pyro_gs.ops.{module}.SMALLEST", smallest)
    x, temperature = case
    logits, candidates = to_sparse(x)
    forbidden = logits == -torch.inf
    free = logits.masked_fill(forbidden, 0.0).requires_grad_()

    def operator(z):
        return sparse_sinkhorn(z.masked_fill(forbidden, -torch.inf), candidates, temperature=temperature)

    assert torch.autograd.gradcheck(operator, free)
    assert torch.autograd.gradgradcheck(operator, free, fast_mode=True)
    tangent = torch.randn_like(free)
    _, forward = jvp(operator, (free.detach(),), (tangent,))
    jacobian = torch.autograd.functional.jacobian(operator, free.detach())
    assert torch.allclose(forward, torch.einsum("abcd,cd->ab", jacobian, tangent), atol=1e-10)
    several = free.detach() + torch.randn(3, *free.shape)
    assert torch.allclose(vmap(operator)(several), torch.stack([operator(z) for z in several]), atol=1e-9)
    rows = vmap(torch.func.grad(lambda z: operator(z).square().sum()))(several)
    assert torch.allclose(rows[1], torch.func.grad(lambda z: operator(z).square().sum())(several[1]), atol=1e-8)


def test_gradient_in_the_temperature():
    logits, candidates = to_sparse(problem(6, 3))
    temperature = torch.tensor([0.5, 1.0], requires_grad=True)

    def operator(t):
        return sparse_sinkhorn(logits, candidates, temperature=t)

    assert operator(temperature).shape == (2, 6, 3)
    assert torch.autograd.gradcheck(operator, temperature)


def refuse(*_):
    raise AssertionError("a dense matrix")


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.03])
def test_nothing_is_made_dense(temperature, monkeypatch):
    monkeypatch.setattr(Sparse, "dense", refuse)
    logits, candidates = to_sparse(problem(400, 8))
    logits.requires_grad_()
    p = sparse_sinkhorn(logits, candidates, temperature=temperature)
    p.square().sum().backward()
    columns = torch.zeros(400).scatter_add(0, candidates.flatten(), p.detach().flatten())
    assert (columns - 1).abs().max() <= 1e-10
    # rows of logits may be shifted for nothing, and columns too
    assert logits.grad.sum(-1).abs().max() < 1e-9
    assert torch.zeros(400).scatter_add(0, candidates.flatten(), logits.grad.flatten()).abs().max() < 1e-9


@pytest.mark.parametrize("ties", [0, 200])
def test_where_conjugate_gradients_do_not_end_the_matrix_is_factored(ties, monkeypatch):
    """As a sparse one, or with no ties let, as a dense one."""
    monkeypatch.setattr("pyro_gs.ops.newton._SPARSE_ITERATIONS", 1)
    monkeypatch.setattr("pyro_gs.ops.conjugate._CANDIDATE_ITERATIONS", 1)
    monkeypatch.setattr("pyro_gs.ops.sparse._CANDIDATE_TIES", ties)
    x = problem(200, 5)
    logits, candidates = to_sparse(x)
    if ties:
        monkeypatch.setattr(Sparse, "dense", refuse)
    free = logits.requires_grad_()
    p = sparse_sinkhorn(free, candidates, temperature=0.2)
    (found,) = torch.autograd.grad(p.square().sum(), free)
    _, forward = jvp(lambda z: sparse_sinkhorn(z, candidates, temperature=0.2), (free.detach(),), (torch.ones_like(free),))
    x.requires_grad_()
    want = sinkhorn(x, temperature=0.2)
    (gradient,) = torch.autograd.grad(want.square().sum(), x)
    assert torch.allclose(to_dense(p, candidates), want, atol=1e-9)
    assert torch.allclose(found, gradient.gather(-1, candidates), atol=1e-8)
    assert forward.abs().max() < 1e-9  # a shift of all logits changes nothing


def test_dtypes():
    logits, candidates = to_sparse(problem(30, 4))
    want = sparse_sinkhorn(logits, candidates)
    for dtype, atol in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):  # of logits rounded to it
        found = sparse_sinkhorn(logits.to(dtype), candidates.int())
        assert found.dtype == dtype
        assert torch.allclose(found.double(), want, atol=atol)


def test_a_cap_that_is_met_is_told_and_has_no_gradient():
    logits, candidates = to_sparse(problem(30, 4))
    with pytest.warns(pgs.SinkhornWarning, match="stopped after 1 Newton steps"):
        p = sparse_sinkhorn(logits.requires_grad_(), candidates, temperature=0.1, max_iter=1)
    with pytest.raises(RuntimeError, match="no gradient: Sinkhorn stopped before its tolerance"):
        p.square().sum().backward()


def test_pairs_on_no_permutation_are_dropped():
    logits, candidates = torch.zeros(3, 2), torch.tensor([[0, 1], [1, 2], [1, 2]])
    with pytest.warns(pgs.SupportWarning, match="row 0, column 1, which lies on no permutation"):
        found = log_sparse_sinkhorn(logits, candidates)
    assert found[0].tolist() == [0.0, -torch.inf]


def test_chains_of_weak_ties(monkeypatch):
    """Rows that take from their neighbours alone, cold: solutions are large and conjugate gradients do not end."""
    used = []
    monkeypatch.setattr("pyro_gs.ops.conjugate.nearly_inverse", lambda *args: used.append(True) or nearly_inverse(*args))
    distance = (torch.arange(300)[:, None] - torch.arange(300)).abs()
    x = (2 * torch.randn(300, 300) - distance).masked_fill(distance > 3, -torch.inf)
    logits, candidates = to_sparse(x)
    weight = torch.randn(300, 300)
    (found,) = torch.autograd.grad(
        (to_dense(sparse_sinkhorn(logits.requires_grad_(), candidates, temperature=0.05), candidates) * weight).sum(), logits
    )
    assert used
    (want,) = torch.autograd.grad((sinkhorn(x.requires_grad_(), temperature=0.05) * weight).sum(), x)
    allowed = logits > -torch.inf
    assert torch.allclose(found[allowed], want.gather(-1, candidates)[allowed], atol=1e-8)


# --- matchings


@pytest.mark.parametrize("ties", [False, True])
def test_the_matching_is_a_best_one(ties):
    for n, k in ((1, 1), (2, 2), (7, 3), (60, 5)):
        x = problem(n, min(k, n), 4)
        x = x.round() if ties else x
        logits, candidates = to_sparse(x)
        index = sparse_matching(logits, candidates)
        assert torch.equal(index.sort(-1).values, torch.arange(n).expand(4, n))
        for item, matrix in enumerate(x):
            rows, columns = linear_sum_assignment(matrix, maximize=True)
            best = matrix[rows, columns].sum()
            assert torch.isclose(matrix.gather(-1, index[item, :, None]).sum(), best, atol=1e-12)
            assert ties or index[item].tolist() == columns.tolist()


def test_weights_of_zero_are_pairs():
    index = sparse_matching(torch.zeros(3, 2), torch.tensor([[0, 1], [1, 2], [2, 0]]))
    assert index.tolist() in ([0, 1, 2], [1, 2, 0])


def test_the_matching_does_not_depend_on_shifts_of_rows():
    logits, candidates = to_sparse(problem(40, 4))
    shifted = logits + 1e6 * torch.randn(40, 1)
    assert torch.equal(sparse_matching(logits, candidates), sparse_matching(shifted, candidates))


# --- the way in and out


def test_there_and_back():
    x = problem(9, 4, 2)
    logits, candidates = to_sparse(x)
    assert logits.shape == candidates.shape == (2, 9, 4)
    assert torch.equal(to_dense(logits, candidates, fill=-torch.inf), x)
    zeros, same = to_sparse(x > -torch.inf)
    assert torch.equal(same, candidates)
    assert torch.equal(zeros == 0, logits > -torch.inf)
    leaf = x.masked_fill(x == -torch.inf, 0.0).requires_grad_()
    (gradient,) = torch.autograd.grad(to_sparse(leaf.masked_fill(x == -torch.inf, -torch.inf))[0].exp().sum(), leaf)
    assert torch.allclose(gradient, x.exp())


def test_padding_may_point_anywhere():
    logits = torch.tensor([[1.0, -torch.inf], [0.0, 0.0], [0.5, 0.0]])
    values = [log_sparse_sinkhorn(logits, torch.tensor([[0, column], [1, 2], [2, 1]])) for column in range(3)]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[1], values[2])
    matrix = to_dense(logits, torch.tensor([[0, 0], [1, 2], [2, 1]]), fill=-torch.inf)
    assert matrix[0].tolist() == [1.0, -torch.inf, -torch.inf]


GOOD = torch.tensor([[0, 1], [1, 0]])


@pytest.mark.parametrize(
    ("logits", "candidates", "error", "message"),
    [
        ([0.0], GOOD, TypeError, r"logits must be a torch.Tensor of shape \(..., n, k\), but got list"),
        (torch.zeros(2, 2), [0], TypeError, "candidates must be a torch.Tensor"),
        (torch.zeros(2, 2, dtype=torch.long), GOOD, TypeError, "logits must have a floating dtype"),
        (torch.zeros(2, 2), GOOD.double(), TypeError, "candidates must have an integer dtype, but has torch.float64"),
        (torch.zeros(2), GOOD, ValueError, r"logits must have shape \(..., n, k\) with n and k at least 1"),
        (torch.zeros(2, 0), GOOD[:, :0], ValueError, r"but has \(2, 0\)"),
        (torch.zeros(2, 3), GOOD, ValueError, r"candidates of shape \(2, 2\) do not fit logits of shape \(2, 3\)"),
        (torch.zeros(3, 2, 2), GOOD.expand(2, 2, 2), ValueError, "batch shapes that broadcast"),
        (torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), GOOD, ValueError, "entry nan at row 0, column 1"),
        (torch.zeros(2, 2), GOOD + 1, ValueError, "candidates has column 2 at row 0, place 1; expected 0 to 1"),
        (torch.zeros(2, 2), -GOOD, ValueError, "candidates has column -1 at row 0"),
        (torch.zeros(1, 2, 2), torch.zeros_like(GOOD), ValueError, "of batch item 0 has column 0 twice at row 0"),
        (
            torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]),
            GOOD,
            ValueError,
            r"logits allows no permutation: the 2 rows \[0, 1\] may take only column 0",
        ),
    ],
)
def test_bad_input(logits, candidates, error, message):
    for function in (sparse_sinkhorn, sparse_matching):
        with pytest.raises(error, match=message):
            function(logits, candidates)


def test_bad_options():
    for options, message in [
        ({"temperature": 0.0}, "temperature must be positive and finite"),
        ({"temperature": torch.tensor([1.0, -1.0])}, r"temperature must be positive and finite, but is -1.0 at \(1,\)"),
        ({"tol": -1.0}, "tol must be positive"),
        ({"max_iter": 0}, "max_iter must be an integer of at least 1"),
        ({"temperature": 1e-200}, "overflows"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparse_sinkhorn(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), GOOD, **options)
    with pytest.raises(ValueError, match="logits must be below 1e"):
        sparse_matching(torch.full((2, 2), 1e200), GOOD)
    with pytest.raises(ValueError, match="logits must be square"):
        to_sparse(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="candidates has column 0 twice"):
        to_dense(torch.ones(2, 2), torch.zeros_like(GOOD))


@pytest.mark.cuda
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_on_a_device_it_is_the_same(temperature):
    logits, candidates = to_sparse(problem(300, 6, 2))
    found = []
    for device in ("cpu", "cuda"):
        leaf = logits.to(device).requires_grad_()
        p = sparse_sinkhorn(leaf, candidates.to(device), temperature=temperature)
        (gradient,) = torch.autograd.grad(p.square().sum(), leaf)
        found.append((p.cpu(), gradient.cpu(), sparse_matching(logits.to(device), candidates.to(device)).cpu()))
    for here, there in zip(*found, strict=True):
        assert torch.allclose(here.double(), there.double(), atol=1e-8)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_candidates_of_any_integer_dtype(kind):
    logits, candidates = torch.randn(3, 2), torch.tensor([[0, 1], [1, 2], [2, 0]])
    assert torch.equal(sparse_sinkhorn(logits, candidates.to(kind)), sparse_sinkhorn(logits, candidates))

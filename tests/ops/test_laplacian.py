import mpmath
import pytest
import torch

from pyro_gs import laplacian_logdet, laplacian_solve, log_sinkhorn

pytestmark = pytest.mark.usefixtures("float64_only")


def exact_logdet(log_p, digits=120):
    """logdet of the Laplacian of P'P without its first column, in high precision."""
    n = log_p.shape[-1]
    with mpmath.workdps(digits):
        p = [[mpmath.e ** mpmath.mpf(float(x)) for x in row] for row in log_p]
        weight = [[sum(p[i][a] * p[i][b] for i in range(n)) for b in range(n)] for a in range(n)]
        lap = mpmath.matrix(n - 1, n - 1)
        for a in range(1, n):
            for b in range(1, n):
                lap[a - 1, b - 1] = sum(weight[a][k] for k in range(n) if k != a) if a == b else -weight[a][b]
        return float(mpmath.log(mpmath.det(lap)))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.1, 0.05, 0.02, 0.005])
def test_logdet_keeps_its_digits_at_any_temperature(temperature):
    for seed in range(3):
        torch.manual_seed(seed)
        log_p = log_sinkhorn(3 * torch.randn(6, 6), temperature=temperature)
        want = exact_logdet(log_p, 400)
        assert float(laplacian_logdet(log_p)) == pytest.approx(want, rel=1e-9)


def test_plain_cholesky_would_not_do():
    # The point of all this: the naive formula is wrong in the first digit at a temperature that people use.
    torch.manual_seed(0)
    log_p = log_sinkhorn(3 * torch.randn(6, 6), temperature=0.05)
    p = log_p.exp()[:, :-1]
    naive = torch.linalg.slogdet(torch.eye(5) - p.mT @ p)[1]
    assert abs(float(naive) - exact_logdet(log_p, 400)) > 1


def test_logdet_agrees_with_the_definition():
    log_p = log_sinkhorn(torch.randn(3, 7, 7))
    for column in (0, 3, 6):
        p = torch.cat([log_p.exp()[..., :column], log_p.exp()[..., column + 1 :]], -1)
        want = torch.linalg.slogdet(torch.eye(6) - p.mT @ p)[1]
        assert torch.allclose(laplacian_logdet(log_p), want, atol=1e-11)


def test_components_add():
    a, b = log_sinkhorn(torch.randn(3, 3)), log_sinkhorn(torch.randn(4, 4))
    both = torch.full((7, 7), -torch.inf)
    both[:3, :3], both[3:, 3:] = a, b
    order = torch.randperm(7)
    both = both[order][:, torch.randperm(7)]
    assert float(laplacian_logdet(both)) == pytest.approx(float(laplacian_logdet(a) + laplacian_logdet(b)), abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_gradients(temperature):
    log_p = log_sinkhorn(torch.randn(2, 5, 5), temperature=temperature).requires_grad_()
    b = torch.randn(2, 5)
    assert torch.autograd.gradcheck(laplacian_logdet, log_p)
    assert torch.autograd.gradcheck(laplacian_solve, (log_p, b.requires_grad_()))
    if temperature == 1.0:
        assert torch.autograd.gradgradcheck(laplacian_logdet, log_p)
        assert torch.autograd.gradgradcheck(laplacian_solve, (log_p, b))


def test_gradient_of_logdet_near_a_permutation():
    # d logdet / d log P sums to twice the number of ties in a spanning tree: the logdet is homogeneous in P.
    log_p = log_sinkhorn(3 * torch.randn(8, 8), temperature=0.03).requires_grad_()
    laplacian_logdet(log_p).backward()
    assert log_p.grad.min() >= 0
    assert float(log_p.grad.sum()) == pytest.approx(2 * 7, rel=1e-9)


def test_solve():
    log_p = log_sinkhorn(torch.randn(4, 6, 6), temperature=0.5)
    b = torch.randn(4, 6)
    b = b - b.mean(-1, keepdim=True)
    x = laplacian_solve(log_p, b)
    p = log_p.exp()
    assert torch.allclose(x - (p.mT @ p @ x[..., None])[..., 0], b, atol=1e-10)
    assert (x[:, 0] == 0).all()


def test_bad_input():
    log_p = log_sinkhorn(torch.randn(3, 3))
    with pytest.raises(ValueError, match=r"log_p must be square in its last two dimensions, but has shape \(2, 3\)$"):
        laplacian_logdet(log_p[:2])
    with pytest.raises(TypeError, match="log_p must have dtype torch.float32 or torch.float64"):
        laplacian_logdet(log_p.half())
    with pytest.raises(ValueError, match=r"b must have shape \(..., 3\)"):
        laplacian_solve(log_p, torch.zeros(2))
    with pytest.raises(TypeError, match="b must be a torch.Tensor"):
        laplacian_solve(log_p, [0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"b of shape \(2, 3\) does not broadcast with \(4,\)"):
        laplacian_solve(log_p.expand(4, 3, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="log_p has the entry inf at row 0, column 1"):
        laplacian_logdet(torch.tensor([[0.0, torch.inf], [0.0, 0.0]]))


def test_a_solution_that_overflows_is_refused():
    log_p = log_sinkhorn(torch.eye(4, dtype=torch.float64) * 20)  # nearly the identity: x is 1e8 times b
    b = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    x = laplacian_solve(log_p, b * 1e290)
    assert bool(x.isfinite().all())
    assert float(x.abs().max()) > 1e297
    with pytest.raises(ValueError, match="b of up to 1e\\+305 makes the solution overflow"):
        laplacian_solve(log_p, b * 1e305)
    with pytest.raises(ValueError, match="overflow in torch.float32"):
        laplacian_solve(log_p, b.float() * 1e35)


def test_a_matrix_without_mass_is_refused():
    log_p = torch.zeros(2, 2, 2).log_softmax(-1)
    log_p[1] = -750.0
    for call in (laplacian_logdet, lambda x: laplacian_solve(x, torch.tensor([-1.0, 1.0]))):
        with pytest.raises(ValueError, match=r"the largest entry of row \(1, 0\) is -750, and the sum not one"):
            call(log_p)
    log_p = torch.tensor([[0.0, -5.0], [0.0, -5.0]])
    with pytest.raises(ValueError, match=r"the largest entry of column \(1,\) is -5"):
        laplacian_logdet(log_p)


def test_a_gradient_that_overflows_is_refused():
    log_p = torch.tensor([[0.6, 0.4], [0.4, 0.6]]).log().requires_grad_()
    x = laplacian_solve(log_p, torch.tensor([-1e308, 1e308]) * 0.4)
    with pytest.raises(OverflowError, match="divide b by a constant"):
        torch.autograd.grad(1e10 * x.sum(), log_p)

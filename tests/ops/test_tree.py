"""The basis of cuts against plain linear algebra with hundreds of digits."""

import mpmath
import pytest
import torch

from pyro_gs.ops.tree import CutBasis, spanning_forest

pytestmark = pytest.mark.usefixtures("float64_only")


def weights(n, spread, batch=1):
    """Symmetric logarithms of weights over a range of about ``4 spread`` nats."""
    x = spread * torch.randn(batch, n, n)
    return x + x.mT


def grounded(batch, n):
    out = torch.zeros(batch, n, dtype=torch.bool)
    out[:, 0] = True
    return out


def laplacian(log_w):
    n = len(log_w)
    w = [[mpmath.e ** mpmath.mpf(float(log_w[i, j])) if i != j else mpmath.mpf(0) for j in range(n)] for i in range(n)]
    lap = mpmath.matrix(n - 1, n - 1)
    for a in range(1, n):
        for b in range(1, n):
            lap[a - 1, b - 1] = sum(w[a]) if a == b else -w[a][b]
    return lap


@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_against_many_digits(spread):
    n = 7
    log_w = weights(n, spread, 3)
    basis = CutBasis(log_w, grounded(3, n))
    log_r = basis.log_resistances()
    right = torch.randn(3, n)
    y = basis.drops(basis.received(None, right))
    x, apart = basis.potentials(y), basis.differences(y)
    with mpmath.workdps(1500):
        for item in range(3):
            lap = laplacian(log_w[item])
            assert float(basis.logdet[item]) == pytest.approx(float(mpmath.log(mpmath.det(lap))), rel=1e-12)
            inverse = lap**-1
            for j in range(1, n):
                want = inverse[j - 1, j - 1]
                assert float(log_r[item, 0, j]) == pytest.approx(float(mpmath.log(want)), rel=1e-9, abs=1e-9)
                for k in range(1, j):
                    want = inverse[j - 1, j - 1] + inverse[k - 1, k - 1] - 2 * inverse[j - 1, k - 1]
                    assert float(log_r[item, j, k]) == pytest.approx(float(mpmath.log(want)), rel=1e-9, abs=1e-9)
            if spread < 100:  # potentials are numbers
                exact = inverse * mpmath.matrix([float(a) for a in right[item, 1:]])
                for j in range(1, n):
                    assert float(x[item, j]) == pytest.approx(float(exact[j - 1]), rel=1e-9)
                    for k in range(1, j):
                        assert float(apart[item, j, k]) == pytest.approx(float(exact[j - 1] - exact[k - 1]), rel=1e-7)


def test_forest_is_a_maximum_one_and_below_holds_its_descendants():
    n = 12
    log_w, roots = weights(n, 5.0, 4), torch.zeros(4, n, dtype=torch.bool)
    roots[:, 0] = True
    roots[1, 5] = roots[2, 3] = roots[2, 9] = True  # several components
    for item in range(4):  # no ties between components
        label = torch.arange(n) % int(roots[item].sum())
        label[roots[item]] = torch.arange(int(roots[item].sum()))
        log_w[item][label[:, None] != label[None, :]] = -torch.inf
    parent, order, below = spanning_forest(log_w, roots)
    for item in range(4):
        seen = set()
        for node in order[item].tolist():
            up = int(parent[item, node])
            assert (up == node) == bool(roots[item, node])
            assert up == node or up in seen
            seen.add(node)
        for edge in range(n):
            inside = below[item, :, edge] == 1
            if roots[item, edge]:
                assert not inside.any()
                continue
            assert inside[edge]
            assert not inside[int(parent[item, edge])]
            across = log_w[item][inside][:, ~inside]
            assert float(across.max()) == float(log_w[item, edge, int(parent[item, edge])])


def test_cut_sums_in_logarithms():
    n = 8
    for spread in (1.0, 400.0):
        log_w, log_f = weights(n, spread), spread * torch.randn(1, n, n)
        log_f = torch.minimum(log_f, log_w)  # no flow is above its tie
        basis = CutBasis(log_w, grounded(1, n))
        out, into = basis.log_cut_sums(log_f)
        for edge in range(1, n):
            inside = basis.below[0, :, edge] == 1
            assert float(out[0, edge]) == pytest.approx(float(log_f[0][inside][:, ~inside].logsumexp((0, 1))), rel=1e-12)
            assert float(into[0, edge]) == pytest.approx(float(log_f[0][~inside][:, inside].logsumexp((0, 1))), rel=1e-12)


def test_gaussian_has_the_laplacian_as_precision():
    n, k = 5, 200_000
    log_w = weights(n, 1.0)
    basis = CutBasis(log_w, grounded(1, n))
    draws = basis.gaussian(torch.randn(k, 1, n))[:, 0]
    assert (draws[:, 0] == 0).all()
    w = log_w[0].exp().fill_diagonal_(0.0)
    lap = torch.diag(w.sum(-1)) - w
    covariance, want = draws[:, 1:].mT @ draws[:, 1:] / k, torch.linalg.inv(lap[1:, 1:])
    scale = want.diagonal().sqrt()
    # The standard error of an entry is at most the root of 2 / k of its scale: .003; six of them.
    assert float(((covariance - want) / (scale[:, None] * scale[None, :])).abs().max()) < 0.02

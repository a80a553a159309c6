"""What the docstring of ``sinkhorn`` promises, over every family of logits, size, temperature and dtype, with 20 seeds.

Larger sizes: ``python benchmarks/promise.py``.
"""

import pytest
import torch
from logit_families import FAMILIES, make

from pyro_gs import log_sinkhorn, matching, sinkhorn, solve_sinkhorn

pytestmark = [
    pytest.mark.usefixtures("float64_only"),
    # Some masks have entries on no permutation.
    pytest.mark.filterwarnings("ignore::pyro_gs.SupportWarning"),
]
SEEDS = 20
PROMISE = {torch.float64: 1e-10, torch.float32: 2e-6}


def marginal_error(P):
    return max(float((P.double().sum(dim) - 1).abs().max()) for dim in (-2, -1))


def mixed_differences(log_p, z, floor=-600.0):
    """Largest mixed second difference of ``log P - Z`` over random quadruples at which ``P`` does not underflow.

    It vanishes exactly if that is a sum of a row and a column term.
    """
    n = log_p.shape[-1]
    i, k, j, m = torch.randint(0, n, (4, 4000))
    far = log_p < floor
    d = (log_p - z).masked_fill(far, torch.nan)
    value = d[..., i, j] - d[..., i, m] - d[..., k, j] + d[..., k, m]
    return float(value.nan_to_num(0.0).abs().max())


@pytest.mark.parametrize("kind", ["float64", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_marginals_and_scaling(family, kind):
    dtype = getattr(torch, kind)
    for n in (1, 2, 5, 12, 40):
        x = torch.stack([make(family, n, seed) for seed in range(SEEDS)]).to(dtype)
        for tau in (100.0, 1.0, 0.1, 0.01, 0.001):
            P = sinkhorn(x, temperature=tau)  # a SinkhornWarning would be an error
            assert P.dtype == dtype
            assert P.isfinite().all()
            assert (P[x == -torch.inf] == 0).all()
            assert marginal_error(P) <= PROMISE[dtype], (n, tau)
            if dtype == torch.float64:
                # Potentials are rounded like the logits: by units in the last place of the largest of them.
                z = x.masked_fill(x == -torch.inf, 0.0) / tau
                rounding = 1e-12 + 32 * torch.finfo(dtype).eps * float(z.abs().max())
                assert mixed_differences(P.log(), z) <= rounding, (n, tau)


@pytest.mark.parametrize("family", FAMILIES)
def test_logarithms_balance_every_column(family):
    # In relative terms, entries that underflow included: what a column's matched row gives to other columns equals what
    # the column takes from other rows.
    for n in (2, 5, 12):
        x = torch.stack([make(family, n, seed) for seed in range(SEEDS)])
        for tau in (1.0, 0.1, 0.01, 0.001):
            log_p = log_sinkhorn(x, temperature=tau)
            row_of = matching(log_p.masked_fill(log_p == -torch.inf, -1e300)).mT.argmax(-1)
            flow = log_p.gather(-2, row_of[..., None].expand_as(log_p))
            flow = flow.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
            out, into = torch.logsumexp(flow, -1), torch.logsumexp(flow, -2)
            finite = out > -torch.inf
            assert torch.equal(finite, into > -torch.inf)
            size = float(x.masked_fill(x == -torch.inf, 0.0).abs().max()) / tau
            rounding = 1e-7 + 1000 * torch.finfo(x.dtype).eps * size
            assert float((out - into)[finite].abs().max() if finite.any() else 0.0) <= rounding, (n, tau)


def test_general_marginals_of_every_family():
    for family in FAMILIES:
        for seed in range(3):
            n = 12
            x = make(family, n, seed)
            # Sums of a matrix with the same support, so that they agree in every component.
            inner = sinkhorn(x, temperature=1.0) * torch.rand(n, n)
            r, c = inner.sum(-1), inner.sum(-2)
            for tau in (1.0, 0.05):
                found = solve_sinkhorn(x / tau, row_sums=r, column_sums=c)
                p = found.log_p.exp()
                assert found.converged, (family, tau)
                assert float((p.sum(-1) - r).abs().max()) <= 1e-10, (family, tau)
                assert float((p.sum(-2) - c).abs().max()) <= 1e-10, (family, tau)


def test_items_of_every_family_in_one_batch():
    x = torch.stack([make(family, 12, 0) for family in FAMILIES])
    temperatures = torch.logspace(2, -3, 5)[:, None]
    P = sinkhorn(x, temperature=temperatures)
    assert marginal_error(P) <= 1e-10
    for k in range(len(FAMILIES)):
        for m, tau in enumerate(temperatures[:, 0]):
            assert torch.allclose(P[m, k], sinkhorn(x[k], temperature=tau), atol=1e-8)


def test_low_temperature_gives_the_matching_and_its_dual_potentials():
    for family in ("noisy", "integer", "heavy_tailed", "points_on_a_line", "nearly_blocks"):
        x, tau = make(family, 15, 1), 1e-3
        found = solve_sinkhorn(x / tau)
        u, v = -tau * found.u, -tau * found.v
        slack = u[:, None] + v[None, :] - x
        assert float(slack.min()) > -tau  # feasible up to tau log(1 / P)
        best = float((matching(x) * x).sum())
        assert best == pytest.approx(float(u.sum() + v.sum()), abs=15 * tau * 3)  # no gap but the entropy's
        if family != "integer":  # where ties leave one best matching
            assert torch.equal(sinkhorn(x, temperature=tau) > 0.5, matching(x) > 0.5)


@pytest.mark.cuda
@pytest.mark.parametrize("family", FAMILIES)
def test_on_cuda(family):
    x = torch.stack([make(family, 40, seed) for seed in range(SEEDS)]).cuda()
    for tau in (1.0, 0.01):
        P = sinkhorn(x, temperature=tau)
        assert P.is_cuda
        assert marginal_error(P) <= 1e-10

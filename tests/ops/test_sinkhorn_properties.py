"""Properties of the Sinkhorn operator that hold for every input, on inputs that hypothesis makes up."""

import math
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyro_gs import SinkhornWarning, matching, sinkhorn, solve_sinkhorn
from pyro_gs import log_sinkhorn as warning_log_sinkhorn

pytestmark = [
    pytest.mark.usefixtures("float64_only"),
    # A mask may have entries on no permutation.
    pytest.mark.filterwarnings("ignore::pyro_gs.SupportWarning"),
]
TOL = 1e-10


@st.composite
def problems(draw, forbidden=True, wild=True, largest=8):
    """Logits (n, n) with ties, huge and tiny entries, perhaps forbidden ones, and a temperature."""
    n = draw(st.integers(1, largest))
    tame = [st.floats(-5, 5), st.integers(-3, 3).map(float), st.sampled_from([0.0, -0.0, 1e-12])]
    entry = st.one_of(*tame, st.floats(-1e4, 1e4)) if wild else st.one_of(*tame)
    x = torch.tensor(draw(st.lists(entry, min_size=n * n, max_size=n * n))).reshape(n, n)
    if forbidden and draw(st.booleans()):
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n * n, max_size=n * n))).reshape(n, n)
        order = torch.tensor(draw(st.permutations(range(n))))
        mask[torch.arange(n), order] = True  # one permutation is allowed
        x = torch.where(mask, x, -math.inf)
    return x, draw(st.sampled_from([100.0, 3.0, 1.0, 0.3, 0.1] + [0.01, 0.001] * wild))


vectors = st.lists(st.floats(-100, 100), min_size=8, max_size=8).map(torch.tensor)
examples = settings(max_examples=150, deadline=None, derandomize=True)


def log_sinkhorn(x, **options):
    """With logits over temperature in the millions the smallest entries may miss, with a warning; not looked at here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = warning_log_sinkhorn(x, **options)
    assert float((out.exp().sum(-2) - 1).abs().max()) <= TOL
    assume(not any(issubclass(warning.category, SinkhornWarning) for warning in caught))
    return out


@examples
@given(problems())
def test_doubly_stochastic_with_exact_zeros(problem):
    x, tau = problem
    P = sinkhorn(x, temperature=tau)
    assert P.isfinite().all()
    assert (P >= 0).all()
    for dim in (0, 1):
        assert float((P.sum(dim) - 1).abs().max()) <= TOL
    assert (P[x == -math.inf] == 0).all()
    log_p = log_sinkhorn(x, temperature=tau)
    assert not log_p.isnan().any()
    assert (log_p[x == -math.inf] == -math.inf).all()


@examples
@given(problems(), vectors, vectors)
def test_shifts_of_rows_and_columns_change_nothing(problem, r, c):
    x, tau = problem
    n = len(x)
    shifted = x + r[:n, None] + c[None, :n]
    # In logarithms, which are exact in relative terms: what is left is rounding of the shifted logits.
    a, b = log_sinkhorn(x, temperature=tau), log_sinkhorn(shifted, temperature=tau)
    gap = (a - b)[x > -math.inf].nan_to_num(0.0).abs()
    size = float(shifted.masked_fill(x == -math.inf, 0.0).abs().max()) + 1
    assert float(gap.max()) <= 1e-6 + 2000 * n * torch.finfo(torch.float64).eps * size / tau


@examples
@given(problems(), st.randoms(use_true_random=False))
def test_permutations_and_transposition_carry_over(problem, random):
    x, tau = problem
    n = len(x)
    rows, columns = (torch.tensor(random.sample(range(n), n)) for _ in range(2))
    P = log_sinkhorn(x, temperature=tau)
    slack = 1e-6 + 2000 * n * torch.finfo(torch.float64).eps * float(x.masked_fill(x == -math.inf, 0.0).abs().max()) / tau
    for other, back in (
        (log_sinkhorn(x[rows][:, columns], temperature=tau), P[rows][:, columns]),
        (log_sinkhorn(x.mT, temperature=tau), P.mT),
    ):
        assert torch.equal(other == -math.inf, back == -math.inf)
        assert float((other - back).nan_to_num(0.0).abs().max()) <= slack


@examples
@given(problems())
def test_idempotent_on_doubly_stochastic_input(problem):
    x, tau = problem
    log_p = log_sinkhorn(x, temperature=tau)
    again = log_sinkhorn(log_p)
    assert float((again - log_p).nan_to_num(0.0).abs().max()) <= 1e-6


@examples
@given(problems(forbidden=False))
def test_high_temperature_gives_the_flat_matrix(problem):
    x, _ = problem
    n, size = len(x), float(x.abs().max()) + 1
    P = sinkhorn(x, temperature=1e6 * size)
    assert torch.allclose(P, torch.full_like(P, 1 / n), atol=1e-5)


@examples
@given(problems())
def test_low_temperature_gives_the_matching(problem):
    x, _ = problem
    P, n = sinkhorn(x, temperature=1e-3), len(x)
    # <S(X / tau), X> is within tau n log n of the best matching (Cuturi 2013), which shows also where it has ties.
    best = float(x[matching(x) == 1].sum())
    value = float((P * x.masked_fill(x == -math.inf, 0.0)).sum())
    size = float(x.masked_fill(x == -math.inf, 0.0).abs().max())
    assert best - 1e-3 * n * math.log(n + 1e-9) - 1e-9 * (1 + n * size) <= value <= best + 1e-9 * (1 + n * size)


@examples
@given(problems(), st.floats(0.2, 5.0))
def test_temperature_scales_the_logits(problem, factor):
    x, tau = problem
    a, b = log_sinkhorn(x, temperature=tau), log_sinkhorn(factor * x, temperature=factor * tau)
    size = float(x.masked_fill(x == -math.inf, 0.0).abs().max())
    assert float((a - b).nan_to_num(0.0).abs().max()) <= 1e-6 + 2000 * len(x) * 2.3e-16 * size / tau


@examples
@given(problems(wild=False), st.lists(st.floats(0.1, 10.0), min_size=8, max_size=8).map(torch.tensor))
def test_general_marginals_are_met(problem, weights):
    x, tau = problem
    n = len(x)
    inner = sinkhorn(x, temperature=10.0) * weights[:n, None]
    r, c = inner.sum(-1), inner.sum(-2)
    found = solve_sinkhorn(x / tau, row_sums=r, column_sums=c)
    p = found.log_p.exp()
    assert found.converged
    assert float((p.sum(-1) - r).abs().max()) <= TOL
    assert float((p.sum(-2) - c).abs().max()) <= TOL

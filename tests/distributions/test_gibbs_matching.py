import itertools
import math

import pytest
import torch
from scipy import stats

from pyro_gs import GibbsMatching, GibbsPermutation, log_permanent

INF = torch.inf
LAWS = {
    "square": lambda: GibbsMatching(torch.randn(3, 3)),
    "partial": lambda: GibbsMatching(torch.randn(2, 2, 3), unmatched=torch.randn(2, 2)),
    "rectangular": lambda: GibbsMatching(torch.randn(2, 3), capacities=1),
    "capacities": lambda: GibbsMatching(torch.randn(4, 2), capacities=[3, 2]),
    "both": lambda: GibbsMatching(torch.randn(3, 3), unmatched=0.5, capacities=[2, 0, 1]),
    "must": lambda: GibbsMatching(torch.randn(3, 2), unmatched=torch.tensor([-INF, 0.0, 1.0])),
    "forbidden": lambda: GibbsMatching(
        torch.randn(3, 3).masked_fill(torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]).bool(), -INF), unmatched=0.0
    ),
}


@pytest.fixture(params=LAWS)
def law(request):
    return LAWS[request.param]()


def brute_force(law):
    """Assignments of a law and their weights, by trying all."""
    n, m = law.event_shape
    values, weights = [], []
    for p in itertools.product(range(m + (law.unmatched is not None)), repeat=n):
        if any(p.count(j) > c for j, c in enumerate(law.capacities)):
            continue
        parts = [law.logits[..., i, j] if j < m else law.unmatched[..., i] for i, j in enumerate(p)]
        weight = torch.stack(parts).sum(0)
        if (weight > -INF).any():
            values.append(torch.nn.functional.one_hot(torch.tensor(p), m + 1)[:, :m])
            weights.append(weight)
    return torch.stack(values).to(law.logits), torch.stack(weights)


def test_against_brute_force(law, tol):
    values, weights = brute_force(law)
    support = law.enumerate_support(expand=False).reshape(-1, *law.event_shape)
    assert sorted(map(tuple, support.flatten(1).tolist())) == sorted(map(tuple, values.flatten(1).tolist()))
    wide = values.reshape(-1, *(1,) * len(law.batch_shape), *law.event_shape)
    log_p = law.log_prob(wide)
    assert torch.allclose(law.log_normalizer(), torch.logsumexp(weights, 0), atol=100 * tol)
    assert torch.allclose(log_p, weights.log_softmax(0), atol=100 * tol)
    p = log_p.exp()
    assert torch.allclose(law.marginals(), (p[..., None, None] * wide).sum(0), atol=100 * tol)
    assert torch.allclose(law.mean, law.marginals())
    assert torch.allclose(law.entropy(), -torch.special.xlogy(p, p).sum(0), atol=100 * tol)
    assert torch.allclose(law.log_prob(law.mode), log_p.amax(0), atol=100 * tol)


def test_draws(law):
    values, weights = brute_force(law)
    draws = law.sample(torch.Size((20_000,)))
    assert law.support.check(draws).all()
    items = draws.reshape(20_000, -1, *law.event_shape)
    for item, weight in zip(items.unbind(1), weights.reshape(len(values), -1).unbind(1), strict=True):
        same = (item[:, None] == values).all(-1).all(-1)
        assert same.any(-1).all()
        counts, expected = same.sum(0).double(), 20_000 * weight.double().softmax(0)
        rare = expected < 5
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        keep = expected > 0
        assert stats.chisquare(counts[keep].numpy(), expected[keep].numpy()).pvalue > 2e-5


def test_shapes(law):
    large = law.expand(torch.Size((4, 3, *law.batch_shape)))
    assert type(large) is GibbsMatching
    assert large.expand(torch.Size((5, 4, 3, *law.batch_shape))).sample().shape == (
        5,
        4,
        3,
        *law.batch_shape,
        *law.event_shape,
    )
    value = large.sample(torch.Size((2,)))
    assert torch.allclose(large.log_prob(value), law.log_prob(value))
    assert large.enumerate_support().shape[1:] == large.batch_shape + large.event_shape
    shapes = {"logits": law.logits.shape} | ({} if law.unmatched is None else {"unmatched": law.unmatched.shape})
    assert GibbsMatching.infer_shapes(**shapes) == (law.batch_shape, law.event_shape)
    assert law.to_event(len(law.batch_shape)).log_prob(law.sample()).shape == ()


@pytest.mark.usefixtures("float64_only")
def test_gradients():
    logits, scores = torch.randn(3, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    value = GibbsMatching(logits, scores).mode
    assert torch.autograd.gradcheck(lambda x, s: GibbsMatching(x, s, [2, 1, 1]).log_prob(value), (logits, scores))
    assert torch.autograd.gradcheck(lambda x, s: GibbsMatching(x, s).entropy(), (logits, scores))
    assert torch.autograd.gradcheck(lambda s: GibbsMatching(logits.detach(), s).marginals(), scores)


@pytest.mark.usefixtures("float64_only")
def test_square_is_the_gibbs_permutation():
    logits = 3 * torch.randn(6, 6)
    law, other = GibbsMatching(logits), GibbsPermutation(logits)
    assert torch.allclose(law.marginals(), other.marginals(), atol=1e-12)
    assert float(law.log_normalizer() - log_permanent(logits)) == pytest.approx(0, abs=1e-10)
    assert float(law.entropy() - other.entropy()) == pytest.approx(0, abs=1e-10)


@pytest.mark.usefixtures("float64_only")
def test_nothing_underflows():
    logits = torch.randn(5, 6)
    far = logits + 2000 * torch.randn(5, 1)
    gap = (far - logits)[:, 0].sum()
    assert float(log_permanent(far, capacities=1) - log_permanent(logits, capacities=1) - gap) == pytest.approx(0, abs=1e-9)
    hot = 800 * torch.randn(5, 6)
    law = GibbsMatching(hot, unmatched=400.0)
    assert float(law.log_prob(law.mode)) == pytest.approx(0, abs=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match=r"has prod\(capacities \+ 1\) = 2,097,152 states for logits of shape \(2, 21\)"):
        GibbsMatching(torch.zeros(2, 21))
    with pytest.raises(ValueError, match="capacities sum to 2, fewer than the 3 rows"):
        GibbsMatching(torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"float32 or torch.float64, but has torch.float16"):
        GibbsMatching(torch.zeros(2, 2, dtype=torch.float16))
    law = GibbsMatching(torch.zeros(2, 2), unmatched=0.0)
    with pytest.raises(ValueError, match=r"value must have shape \(..., 2, 2\), but has \(2, 3\)"):
        law.log_prob(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"value is no assignment of rows to columns of capacities \(1, 1\)"):
        law.log_prob(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert law.log_prob(torch.zeros(2, 2)).isfinite()
    must = GibbsMatching(torch.zeros(2, 2))
    assert must.log_prob(torch.zeros(2, 2)) == -INF
    with pytest.raises(ValueError, match="more than the 40320"):
        GibbsMatching(torch.zeros(8, 8), unmatched=0.0).enumerate_support()
    with pytest.raises(ValueError, match="method must be 'exact' with unmatched or capacities, but is 'bethe'"):
        log_permanent(torch.zeros(2, 2), unmatched=0.0, method="bethe")


@pytest.mark.usefixtures("float64_only")
def test_many_rows_and_few_columns():
    """Products over many copies and fillers, which would underflow one by one."""
    for n, m in ((80, 2), (60, 3), (300, 2)):
        logits = 3 * torch.randn(n, m)
        law = GibbsMatching(logits, capacities=n) if m == 2 else None
        found = log_permanent(logits, capacities=n)
        assert float(found - logits.logsumexp(-1).sum()) == pytest.approx(0, abs=1e-9)  # rows choose freely
        if law is not None:
            assert torch.allclose(law.marginals(), logits.softmax(-1), atol=1e-9)
            frequency = law.sample((2_000,)).mean(0)
            error = (law.marginals() * (1 - law.marginals()) / 2_000).sqrt()
            assert ((frequency - law.marginals()).abs() < 5.5 * error + 1e-3).all()
    alone = GibbsMatching(torch.zeros(150, 1), unmatched=0.0)
    assert float(alone.log_normalizer()) == pytest.approx(math.log(151))
    assert float(alone.entropy()) == pytest.approx(math.log(151))
    assert float(GibbsMatching(torch.zeros(1, 1), unmatched=-0.5, capacities=0).log_normalizer()) == -0.5


def test_empty_batches():
    law = GibbsMatching(torch.zeros(0, 2, 3), unmatched=0.0)
    assert law.marginals().shape == (0, 2, 3)
    assert law.entropy().shape == (0,)
    assert law.sample((4,)).shape == (4, 0, 2, 3)
    assert law.enumerate_support().shape == (13, 0, 2, 3)


@pytest.mark.parametrize(("name", "right"), [("marginals", [[0.0, 0.0, 1.0]]), ("entropy", 0.0)])
def test_logits_of_which_rounding_leaves_nothing_are_refused_or_answered_right(name, right):
    """Which of the two depends on the processor's way of summing; where sums lose the 1 the marginals were NaN."""
    law = GibbsMatching(torch.tensor([[0.0, 0.0, 3e38]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    found, refusal = None, ""
    try:
        found = getattr(law, name)()
    except ValueError as error:
        refusal = str(error)
    assert (found is None) == ("logits differ by so much that float64 cannot tell what is left" in refusal)
    assert found is None or torch.equal(found, torch.tensor(right, dtype=torch.float64))
    law = GibbsMatching(torch.tensor([[0.0, 0.0, 1e30]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(law.marginals(), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64))


def test_logits_that_were_given_expanded():
    """Items that share their memory have marginals and gradients each of its own, also where the score differs."""
    shared, weight = torch.randn(1, 3, 2), torch.tensor([1.0, 5.0])
    unmatched = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, -1.0]])
    for given in (shared.expand(2, 3, 2), shared.repeat(2, 1, 1)):
        x = given.detach().requires_grad_()
        for scores in (unmatched, unmatched[:1].expand(2, 3)):
            law, apart = GibbsMatching(x, unmatched=scores), [GibbsMatching(shared[0], unmatched=each) for each in scores]
            assert torch.allclose(law.marginals(), torch.stack([each.marginals() for each in apart]), atol=1e-12)
            (found,) = torch.autograd.grad((weight * law.log_normalizer()).sum(), x)
            assert torch.allclose(found, weight[:, None, None] * law.marginals(), atol=1e-12)

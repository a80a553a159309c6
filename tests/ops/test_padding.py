import itertools

import pytest
import torch

from pyro_gs import GumbelMatching, GumbelSinkhorn, SupportWarning, matching, pad_logits, sinkhorn, unpad

INF = torch.inf


def assignments(n, m, capacities, unmatched):
    """All assignments as matrices (k, n, m)."""
    out = []
    for p in itertools.product(range(m + unmatched), repeat=n):
        if all(p.count(j) <= capacities[j] for j in range(m)):
            out.append(torch.nn.functional.one_hot(torch.tensor(p), m + 1)[:, :m])
    return torch.stack(out).to(torch.get_default_dtype())


PROBLEMS = [
    (3, 3, None, True),
    (2, 4, None, True),
    (4, 2, None, True),
    (2, 4, 1, False),
    (4, 2, [3, 1], False),
    (3, 3, [2, 0, 2], True),
    (3, 2, 7, False),
]


@pytest.mark.parametrize(("n", "m", "capacities", "partial"), PROBLEMS)
def test_matching_is_the_best_assignment(n, m, capacities, partial):
    logits = torch.randn(20, n, m)
    unmatched = torch.randn(20, n) if partial else None
    found = matching(logits, unmatched=unmatched, capacities=capacities)
    limits = capacities if isinstance(capacities, list) else [capacities or 1] * m
    every = assignments(n, m, limits, partial)
    weight = torch.einsum("bij,kij->bk", logits, every)
    if partial:
        weight = weight + torch.einsum("bi,ki->bk", unmatched, 1 - every.sum(-1))
    assert torch.equal(found, every[weight.argmax(-1)])
    assert found.dtype == logits.dtype


@pytest.mark.parametrize(("n", "m", "capacities", "partial"), PROBLEMS)
def test_sinkhorn(n, m, capacities, partial, tol):
    logits = torch.randn(2, n, m)
    unmatched = 0.5 if partial else None
    p = sinkhorn(logits, unmatched=unmatched, capacities=capacities)
    limits = torch.tensor(capacities if isinstance(capacities, list) else [capacities or 1] * m)
    assert p.shape == logits.shape
    assert (p.sum(-2) <= limits + 10 * tol).all()
    assert (p.sum(-1) < 1).all() if partial else torch.allclose(p.sum(-1), torch.ones(2, n), atol=10 * tol)
    hard = matching(logits, unmatched=unmatched, capacities=capacities)
    cold = sinkhorn(logits, temperature=0.002, unmatched=unmatched, capacities=capacities)
    assert torch.allclose(cold, hard, atol=1e-5)  # gaps of the best are above .02: e^-10


@pytest.mark.usefixtures("float64_only")
def test_sinkhorn_is_transport_with_dustbins():
    """A plain scaling of the matrix with one dustbin row and column (Sarlin et al. 2020, equation 7)."""
    logits, unmatched, capacities = torch.randn(3, 4), torch.randn(3), torch.tensor([2.0, 1.0, 1.0, 3.0])
    k = torch.zeros(4, 5)
    k[:3, :4], k[:3, 4] = logits, unmatched
    k = (k / 0.7).exp()
    rows, columns = torch.tensor([1.0, 1.0, 1.0, 7.0]), torch.tensor([2.0, 1.0, 1.0, 3.0, 3.0])
    for _ in range(2_000):
        k = k * (rows / k.sum(-1))[:, None]
        k = k * (columns / k.sum(-2))
    found = sinkhorn(logits, temperature=0.7, unmatched=unmatched, capacities=capacities.long())
    assert torch.allclose(found, k[:3, :4], atol=1e-9)


@pytest.mark.usefixtures("float64_only")
def test_gradient():
    logits, scores = torch.randn(2, 3, 2, requires_grad=True), torch.randn(3, requires_grad=True)
    mask = torch.zeros(3, 2, dtype=torch.bool)
    mask[0, 1] = True

    def value(x, s):
        return sinkhorn(x.masked_fill(mask, -INF), unmatched=s, capacities=[2, 1])

    assert torch.autograd.gradcheck(value, (logits, scores))


def test_forbidden_pairs_and_rows_that_must_be_matched():
    logits = torch.tensor([[0.0, -INF], [1.0, 2.0], [3.0, -INF]])
    found = matching(logits, unmatched=torch.tensor([-INF, 0.0, 0.0]))
    assert found.tolist() == [[1, 0], [0, 1], [0, 0]]
    with pytest.warns(SupportWarning, match=r"permit row 1, column 0, which lies on no assignment"):
        p = sinkhorn(logits, unmatched=torch.tensor([-INF, 0.0, 0.0]))
    assert p[0].tolist() == pytest.approx([1, 0])  # the first row takes the first column in every assignment
    assert p[2, 0] == 0
    assert matching(logits[:2], capacities=1).tolist() == [[1, 0], [0, 1]]


def test_padded_laws():
    logits = torch.randn(2, 3)
    padded = pad_logits(logits, unmatched=0.3)
    law = GumbelSinkhorn(0.5, padded)
    value = law.rsample((5,))
    assert law.log_prob(value).shape == (5,)
    relaxed = unpad(value, (2, 3))
    assert relaxed.shape == (5, 2, 3)
    assert (relaxed.sum(-1) <= 1).all()
    hard = unpad(GumbelMatching(padded).sample((50,)), (2, 3))
    assert (hard.sum(-1) <= 1).all()
    assert (hard.sum(-2) <= 1).all()
    assert unpad(torch.eye(4), (2, 2), capacities=2).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([[0.0]],), TypeError, r"logits must be a torch.Tensor of shape \(..., n, m\), but got list"),
        ((torch.zeros(3),), ValueError, r"logits must have shape \(..., n, m\) with n, m >= 1, but has shape \(3,\)"),
        ((torch.zeros(2, 2, dtype=torch.long),), TypeError, "logits must have a floating dtype"),
        ((torch.tensor([[0.0, torch.nan]]),), ValueError, "logits has the entry nan at row 0, column 1"),
        ((torch.zeros(2, 3), torch.zeros(3)), ValueError, r"unmatched must broadcast to \(2,\), .* shape \(3,\)"),
        ((torch.zeros(2, 3), torch.tensor([0.0, torch.nan])), ValueError, "unmatched is nan for row 1"),
        ((torch.zeros(2, 3), INF), ValueError, "unmatched is inf for row 0; it must be finite, or -inf"),
        ((torch.zeros(2, 3), None, 1.5), TypeError, "capacities must be an integer or 3 of them, but are 1.5"),
        ((torch.zeros(2, 3), None, [1, 2]), ValueError, r"one number of at least 0 for each of the 3 columns, .* \[1, 2\]"),
        ((torch.zeros(2, 3), None, -1), ValueError, r"at least 0 for each of the 3 columns, but are \[-1, -1, -1\]"),
        ((torch.zeros(3, 2), None, 1), ValueError, "capacities sum to 2, fewer than the 3 rows of logits"),
        (
            (torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, -INF], [1.0, -INF]]]), None, 1),
            ValueError,
            r"logits of batch item 1 allow no assignment: the rows \[0, 1\] may take only the columns \[0\], which have 1",
        ),
    ],
)
def test_bad_input(arguments, error, text):
    logits, unmatched, capacities = (*arguments, None, None)[:3]
    with pytest.raises(error, match=text):
        pad_logits(logits, unmatched=unmatched, capacities=capacities)


def test_bad_unpad():
    with pytest.raises(
        ValueError, match=r"P must have shape \(..., N, N\) with N >= 4 for shape=\(2, 2\), but has \(3, 3\)"
    ):
        unpad(torch.eye(3), (2, 2), capacities=2)

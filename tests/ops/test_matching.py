import itertools

import pytest
import torch

from pyro_gs import matching, to_index, to_matrix


def brute_force(scores):
    best = max(itertools.permutations(range(len(scores))), key=lambda p: sum(float(scores[i, j]) for i, j in enumerate(p)))
    return torch.tensor(best)


def test_is_the_best_permutation_of_each_item_of_a_batch():
    scores = torch.randn(3, 2, 5, 5)
    index = to_index(matching(scores))
    assert index.shape == (3, 2, 5)
    for item in itertools.product(range(3), range(2)):
        assert torch.equal(index[item], brute_force(scores[item]))


def test_keeps_dtype_shape_and_convention():
    scores = torch.randn(4, 4, dtype=torch.float16)
    P = matching(scores)
    assert P.dtype == torch.float16
    x = torch.randn(4, 2)
    assert torch.equal(P.to(x) @ x, x[to_index(P)])


def test_inner_product_scores():
    # Case 5 of the users' reports: M at any temperature, and negative entries are fine.
    scores = torch.outer(torch.tensor([1.0, 4.0, 9.0]), torch.tensor([7.0, 2.0, 5.0]))
    for shift in (0.0, -1000.0):
        assert to_index(matching(scores + shift)).tolist() == [1, 2, 0]


def test_matching_of_a_permutation_is_itself():
    P = to_matrix(torch.randperm(7))
    assert torch.equal(matching(P), P)


def test_a_forbidden_pair_is_never_matched():
    scores = torch.tensor([[5.0, -torch.inf], [1e6, 4.0]])
    assert to_index(matching(scores)).tolist() == [0, 1]


def test_infeasible_item_is_named_with_its_rows():
    scores = torch.zeros(2, 3, 3)
    scores[1, :2, 1:] = -torch.inf
    with pytest.raises(
        ValueError, match=r"logits of batch item 1 allows no permutation: the 2 rows \[0, 1\] may take only column 0"
    ):
        matching(scores)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), ValueError, "logits has the entry nan at row 0, column 1"),
        (torch.tensor([[0.0, 0.0], [torch.inf, 0.0]]), ValueError, "logits has the entry inf at row 1, column 0"),
        (torch.zeros(2, 3), ValueError, "logits must be square"),
        (torch.zeros(3), ValueError, "logits must be square"),
        (torch.zeros(2, 2, dtype=torch.long), TypeError, "logits must have a floating dtype"),
        ([[0.0]], TypeError, "logits must be a torch.Tensor"),
    ],
)
def test_bad_input(value, error, text):
    with pytest.raises(error, match=text):
        matching(value)


def test_index_and_matrix_are_inverse():
    index = torch.stack([torch.randperm(6) for _ in range(4)]).reshape(2, 2, 6)
    assert torch.equal(to_index(to_matrix(index)), index)


def test_index_errors():
    with pytest.raises(ValueError, match="batch item 1 is not a permutation of 0, ..., 2"):
        to_matrix(torch.tensor([[0, 1, 2], [0, 0, 2]]))
    with pytest.raises(TypeError, match="index must be an integer tensor"):
        to_matrix(torch.zeros(3))
    with pytest.raises(ValueError, match="P of batch item 0 is not a permutation matrix"):
        to_index(torch.full((1, 2, 2), 0.5))


@pytest.mark.cuda
def test_stays_on_the_device():
    assert matching(torch.randn(2, 5, 5, device="cuda")).device.type == "cuda"

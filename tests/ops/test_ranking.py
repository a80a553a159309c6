import itertools

import pytest
import torch

from pyro_gs import to_matrix
from pyro_gs.ops.ranking import kendall_distance


def pairs_in_another_order(p, q):
    return sum((p.index(a) < p.index(b)) != (q.index(a) < q.index(b)) for a, b in itertools.combinations(range(len(p)), 2))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_counts_pairs_of_items_in_another_order(n):
    rankings = list(itertools.permutations(range(n)))
    values = to_matrix(torch.tensor(rankings))
    got = kendall_distance(values[:, None], values)
    assert got.tolist() == [[pairs_in_another_order(p, q) for q in rankings] for p in rankings]


def test_relabelling_items_changes_nothing_but_moving_positions_does():
    P, Q, R = (to_matrix(torch.tensor(i)) for i in ([0, 1, 2], [1, 0, 2], [0, 2, 1]))
    assert kendall_distance(P @ R, Q @ R) == kendall_distance(P, Q) == 1
    assert kendall_distance(R @ P, R @ Q) == 3


def test_batches_and_dtypes():
    P = to_matrix(torch.stack([torch.randperm(30) for _ in range(6)])).reshape(2, 3, 30, 30)
    got = kendall_distance(P, P[0, 0].long())
    assert got.shape == (2, 3)
    assert got.dtype == torch.long
    assert got[0, 0] == 0
    assert torch.equal(kendall_distance(P.flip(-2), P[0, 0]), 435 - got)


@pytest.mark.parametrize(
    ("P", "Q", "error", "text"),
    [
        (torch.eye(3), [[1.0]], TypeError, "Q must be a torch.Tensor of shape"),
        (torch.zeros(3), torch.eye(3), ValueError, "P must be square in its last two dimensions"),
        (torch.eye(3), torch.eye(3).expand(2, 3, 3) * 0.5, ValueError, "Q of batch item 0 is not a permutation matrix"),
        (torch.eye(3), torch.eye(1), ValueError, r"the same n .* have shapes \(3, 3\) and \(1, 1\)"),
        (torch.eye(2).expand(2, 2, 2), torch.eye(2).expand(3, 2, 2), ValueError, "batches that broadcast"),
    ],
)
def test_bad_arguments(P, Q, error, text):
    with pytest.raises(error, match=text):
        kendall_distance(P, Q)

import pytest
import torch
from torch import nn

from pyro_gs.nn import EachItem
from tutorials.sorting import digits, numbers
from tutorials.sorting.methods import Method, Sorter, Standardized, ordering, right_positions

ALL = {f"numbers-{k}": v for k, v in numbers.METHODS.items()} | {f"digits-{k}": v for k, v in digits.METHODS.items()}


def draw(seed=0):
    return torch.rand(4, 6, generator=torch.Generator().manual_seed(seed))


def sorter(method):
    torch.manual_seed(1)
    each = EachItem(nn.Sequential(nn.Linear(1, 8), nn.ReLU()))
    return Sorter(Standardized(each) if method.standardized else each, 8, 6, method, 0.5)


def test_order_and_right_positions():
    values = torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 4.0]])
    P = ordering(values)
    assert P.tolist()[0] == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert bool(right_positions(P, values).all())
    swapped = P[:, [1, 0, 2]]  # in the first list 1 and 3 change places; in the second two equal values do
    assert right_positions(swapped, values).tolist() == [[False, True, False], [True, True, True]]


@pytest.mark.parametrize("name", ALL)
def test_answers_are_permutations_and_the_loss_has_gradients(name):
    method = ALL[name]
    network, values = sorter(method), draw()
    loss = network.loss(values[..., None], ordering(values).to(values.dtype), item_dim=1)
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert any(bool(g.abs().sum() > 0) for g in gradients)
    P = network.eval().solve(values[..., None])
    assert bool(((P == 0) | (P == 1)).all())
    assert bool((P.sum(-1) == 1).all())
    assert bool((P.sum(-2) == 1).all())


@pytest.mark.parametrize("name", [name for name, method in ALL.items() if not method.inverse])
def test_equivariance(name):
    network, values = sorter(ALL[name]).double().eval(), draw().double()
    permuted = torch.tensor([3, 0, 5, 1, 4, 2])
    items = values[..., None]
    assert torch.equal(network.solve(items[:, permuted]), network.solve(items)[:, permuted])
    if ALL[name].relaxation not in ("odd_even", "bitonic"):  # whose soft matrices depend on the wires
        # 1e-8: Sinkhorn stops at a tolerance, after as many sweeps in another order of rows
        torch.testing.assert_close(
            network.log_p(items[:, permuted]), network.log_p(items)[..., permuted, :], rtol=0, atol=1e-8
        )


def test_the_inverse_target_transposes_matrix_and_answer():
    plain, inverse = Method("", "row", sweeps=20), Method("", "row", sweeps=20, inverse=True)
    values = draw()[..., None]
    torch.testing.assert_close(sorter(inverse).log_p(values), sorter(plain).log_p(values).mT)
    assert torch.equal(sorter(inverse).solve(values), sorter(plain).solve(values).mT)


def test_standardized_features_see_neither_shift_nor_scale():
    network, values = Standardized(EachItem(nn.Identity())).double(), draw().double()[..., None]
    torch.testing.assert_close(network(values), network(100 + 30 * values))
    torch.testing.assert_close(network(values).std(-2, correction=0), torch.ones(4, 1, dtype=torch.float64))


def test_a_relaxation_of_one_number_takes_no_row():
    with pytest.raises(ValueError, match=r"scores='row': soft_sort takes one number, expected 'rank'"):
        Sorter(EachItem(nn.Identity()), 1, 3, Method("", "row", relaxation="soft_sort"), 1.0)

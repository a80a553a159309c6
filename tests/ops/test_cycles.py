import math

import pytest
import torch

from pyro_gs.ops.cycles import full_cycles, masked_cycles
from pyro_gs.ops.support import find_support

CHAIN = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
BLOCKS = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2), torch.ones(3, 3)).bool()
CIRCLE = torch.eye(12).bool() | torch.roll(torch.eye(12), 1, -1).bool()
CPU = torch.device("cpu")
CASES = {
    **{f"n={n}": torch.ones(n, n).bool() for n in (1, 2, 3, 7)},
    "chain": CHAIN,
    "blocks": BLOCKS,
    "circle": CIRCLE,
    "identity": torch.eye(3).bool(),
}
case = pytest.mark.parametrize("mask", CASES.values(), ids=CASES)


def cycles_of(mask):
    return full_cycles(len(mask), CPU) if mask.all() else masked_cycles(find_support(mask), "allowed")


def incidence(mask):
    """One column a row and a column of the mask, one row an allowed entry."""
    rows, columns = mask.nonzero().T
    eye = torch.eye(len(mask), dtype=torch.float64)
    return torch.cat([eye[rows], eye[columns]], -1)


@pytest.mark.usefixtures("float64_only")
@case
def test_coordinates_are_those_of_a_class(mask):
    at = cycles_of(mask)
    x = torch.randn(5, at.k)
    z = at.matrix(x)
    assert (z[:, ~mask] == 0).all()
    z = z + 10 * (torch.randn(5, len(mask), 1) + torch.randn(5, 1, len(mask)))
    assert torch.allclose(at.coordinates(z.masked_fill(~mask, -torch.inf)), x, atol=1e-11)


@pytest.mark.usefixtures("float64_only")
@case
def test_coordinates_are_orthonormal(mask):
    at = cycles_of(mask)
    shifts = incidence(mask)
    z = at.matrix(torch.eye(at.k))[:, mask]
    shortest = z - (shifts @ torch.linalg.pinv(shifts) @ z.T).T
    assert torch.allclose(shortest @ shortest.T, torch.eye(at.k), atol=1e-11)


@pytest.mark.usefixtures("float64_only")
@case
def test_logdet_counts_spanning_forests(mask):
    at = cycles_of(mask)
    shifts = incidence(mask)
    # By the matrix-tree theorem, component by component: the product of eigenvalues over the number of nodes.
    eigenvalues = torch.linalg.eigvalsh(shifts.T @ shifts)
    sizes = (torch.linalg.matrix_power((shifts.T @ shifts > 0).double(), 2 * len(mask)) > 0).sum(-1)
    nodes = sizes.double().log().div(sizes).sum()
    count = eigenvalues[eigenvalues > 1e-9].log().sum() - nodes
    assert float(at.logdet) == pytest.approx(0.5 * float(count), abs=1e-10)
    jacobian = at.matrix(torch.eye(at.k)).flatten(1)
    free = (jacobian != 0).any(0)
    assert float(at.logdet) == pytest.approx(float(jacobian[:, free].slogdet()[1]), abs=1e-10)


def test_nothing_forbidden():
    at = full_cycles(6, CPU)
    assert float(at.logdet) == pytest.approx(5 * math.log(6))
    assert (at.matrix(torch.ones(25, dtype=torch.float64)) != 0).nonzero().amax() == 4


@pytest.mark.usefixtures("float64_only")
def test_large_matrices_keep_their_digits():
    at = full_cycles(100, CPU)
    x = 1e6 * torch.randn(at.k)
    assert torch.allclose(at.coordinates(at.matrix(x)), x, rtol=1e-12, atol=1e-6)


@pytest.mark.usefixtures("float64_only")
def test_batches_of_masks():
    other = BLOCKS.flip(0)
    masks = torch.stack([torch.stack([BLOCKS, other]), torch.stack([other, other])])
    at = masked_cycles(find_support(masks), "allowed")
    x = torch.randn(3, 2, 2, at.k)
    z = at.matrix(x)
    assert torch.allclose(at.coordinates(z), x)
    assert at.logdet.shape == (2, 2)
    for row in range(2):
        for column in range(2):
            one = masked_cycles(find_support(masks[row, column]), "allowed")
            assert torch.allclose(z[:, row, column], one.matrix(x[:, row, column]))
    alike = masked_cycles(find_support(BLOCKS.expand(2, 4, 6, 6)), "allowed")
    assert alike.logdet.shape == ()


def test_items_of_different_numbers():
    masks = torch.stack([CHAIN, torch.eye(3).bool()])
    with pytest.raises(ValueError, match="allowed leaves 2 free entries in batch item 0 and 0 in batch item 1"):
        masked_cycles(find_support(masks), "allowed")

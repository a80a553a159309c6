import pytest
import torch

from pyro_gs import UniformPermutation
from tutorials.jigsaw.measures import measure
from tutorials.jigsaw.networks import NETWORKS, Training, answers, build, encoder
from tutorials.jigsaw.puzzle import scrambled
from tutorials.pictures import Stored, mnist
from tutorials.training import train

EQUIVARIANT = [name for name, kind in NETWORKS.items() if kind.seen != "dense"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def moved(name):
    """Logits of pieces in another order, and logits whose rows are put into that order."""
    network = build(NETWORKS[name], 9, (1, 10, 10)).eval()
    pieces = torch.rand(4, 9, 1, 10, 10)
    P = UniformPermutation(9).expand([4]).sample()
    rows = P.argmax(-1)
    with torch.no_grad():
        other = network.scores(torch.stack([x[row] for x, row in zip(pieces, rows, strict=True)]))
        return other, P @ network.scores(pieces)


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_permuting_pieces_permutes_rows(name):
    found, expected = moved(name)
    assert torch.allclose(found, expected, atol=1e-4)  # float32, if that is the dtype, in another order of sums
    assert not torch.allclose(found, found[:, :1].expand_as(found), atol=1e-4)  # rows differ


def test_the_dense_network_is_not_equivariant():
    found, expected = moved("dense")
    assert not torch.allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize("size", [4, 5, 6, 7, 10, 12, 14, 15, 16, 24])
def test_the_encoder_takes_pieces_of_every_grid(size):
    assert encoder(3, size, size)(torch.zeros(2, 4, 3, size, size)).shape == (2, 4, 128)


def looks_wrong(name, steps):
    """Share of positions that look wrong, of validation digits in 4 x 4 pieces."""
    torch.manual_seed(0)
    network = build(NETWORKS[name], 16, (1, 7, 7))
    train_on, test_on = (Stored(mnist(split)[0]) for split in ("train", "validation"))
    if steps:
        objective = Training(network, NETWORKS[name].loss, train_on, 4, 32)
        train(objective, steps, path=None, seed=0, settings={}, learning_rate=2e-3)
    puzzles = scrambled(test_on.draw(200, generator()), 4, generator())
    return float(measure(puzzles, answers(network.eval(), puzzles.pieces)).equal_wrong.mean())


@pytest.fixture
def _float32():
    torch.set_default_dtype(torch.float32)  # half the time; the next test starts with its own


# Measured: .38, .37 and .14 with 60 steps, .63 of the dense network with as many, .74 to .92 without training.
@pytest.mark.usefixtures("_float32")
@pytest.mark.parametrize(("name", "most"), [("sinkhorn", 0.45), ("attention", 0.45), ("neighbours", 0.25)])
def test_trained_networks_put_most_pieces_right(name, most):
    assert looks_wrong(name, 60) < most


@pytest.mark.usefixtures("_float32")
def test_an_untrained_and_a_dense_network_do_not():
    assert looks_wrong("attention", 0) > 0.7
    assert looks_wrong("dense", 60) > 0.55


def test_another_number_of_pieces():
    network = build(NETWORKS["dense"], 9, (1, 10, 10))
    with pytest.raises(ValueError, match="items: expected 9 pieces, got 4"):
        network.scores(torch.zeros(1, 4, 1, 10, 10))

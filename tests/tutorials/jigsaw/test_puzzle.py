import pytest
import torch

from pyro_gs.nn import assemble
from tutorials.jigsaw.puzzle import cut, join, padded, scrambled


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_pieces_lie_in_reading_order():
    picture = torch.arange(24.0).reshape(1, 4, 6)
    pieces = cut(picture, 2)
    assert pieces.shape == (4, 1, 2, 3)
    assert pieces[:, 0, 0, 0].tolist() == [0, 3, 12, 15]
    assert pieces[1, 0].tolist() == [[3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6])
def test_joining_undoes_cutting(k):
    images = torch.rand(5, 3, 60, 60, generator=generator())
    assert torch.equal(join(cut(images, k)), images)


def test_padding_is_even_and_of_zeros():
    image = torch.ones(1, 28, 28)
    assert torch.equal(padded(image, 4), image)
    by_three = padded(image, 3)
    assert by_three.shape == (1, 30, 30)
    assert torch.equal(by_three[:, 1:29, 1:29], image)
    assert float(by_three.sum()) == 28 * 28
    assert torch.equal(padded(torch.ones(1, 3, 3), 2)[:, :3, :3], torch.ones(1, 3, 3))  # one more at bottom and right


def test_the_target_puts_pieces_in_order():
    puzzles = scrambled(torch.rand(6, 1, 28, 28, generator=generator()), 3, generator(1))
    assert puzzles.pieces.shape == (6, 9, 1, 10, 10)
    assert torch.equal(assemble(puzzles.target, puzzles.pieces, item_dim=3), puzzles.ordered)
    assert len({tuple(index.tolist()) for index in puzzles.index}) == 6
    again = scrambled(torch.rand(6, 1, 28, 28, generator=generator()), 3, generator(1))
    assert torch.equal(again.pieces, puzzles.pieces)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="k=29: expected an integer from 1 to the shorter side of the pictures, 28"):
        padded(torch.zeros(1, 28, 30), 29)
    with pytest.raises(ValueError, match="k=0"):
        padded(torch.zeros(1, 28, 28), 0)
    with pytest.raises(ValueError, match="k=3: expected a divisor of the sides of the pictures, 28 and 30"):
        cut(torch.zeros(1, 28, 30), 3)
    with pytest.raises(ValueError, match="pieces: expected a square number of them, got 5"):
        join(torch.zeros(5, 1, 2, 2))

import itertools

import pytest
import torch

from tutorials.jigsaw.border import border_cost, borders, solve
from tutorials.jigsaw.measures import measure
from tutorials.jigsaw.puzzle import scrambled
from tutorials.pictures import Crops, Stored, mnist, photographs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients():
    """Gradients of two colours in two directions: of one alone pieces along a line of equal shade fit each other too."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 60), indexing="ij")
    return torch.stack([torch.stack([x + c * y * y, y - c * x * y]) for c in (0.0, 0.1, 0.2)])


@pytest.mark.parametrize("k", [2, 3, 4, 5, 6])
def test_gradients_are_solved_exactly(k):
    puzzles = scrambled(gradients(), k, generator())
    assert float(measure(puzzles, solve(puzzles.pieces)).any_wrong.sum()) == 0


def test_of_four_pieces_the_best_arrangement_is_found():
    pieces = torch.rand(20, 4, 2, 3, 3, generator=generator())
    found = borders(pieces, outside=0.0)
    every = torch.tensor(list(itertools.permutations(range(4)))).expand(20, -1, -1)
    costs = border_cost(found, every)
    answer = solve(pieces, outside=0.0).argsort(-1)
    assert torch.allclose(border_cost(found, answer[:, None])[:, 0], costs.amin(-1))


def test_the_cost_of_a_hand_made_arrangement():
    pieces = torch.tensor([[[[[0.0, 1.0], [0.0, 1.0]]], [[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]]])
    pieces = torch.cat([pieces, pieces[:, 2:]], dim=1)  # the third twice
    # 0 left of 1: |1 - 1| and |1 - 0|; 0 above 2: |0| and |1|; 1 above 3: 0; 2 left of 3: 0
    assert float(border_cost(borders(pieces), torch.tensor([[[0, 1, 2, 3]]]))) == pytest.approx(2.0)
    # and to zeros around: on top the ones of the first rows, at the sides those at the left and at the right
    assert float(border_cost(borders(pieces, outside=0.0), torch.tensor([[[0, 1, 2, 3]]]))) == pytest.approx(4.0)


def test_photographs_and_digits_far_above_chance():
    puzzles = scrambled(Crops(photographs("validation")).draw(60, generator()), 2, generator())
    # nearly all of them are solved; by chance one in 24 is
    assert float(measure(puzzles, solve(puzzles.pieces)).any_wrong.mean()) < 0.3
    puzzles = scrambled(Stored(mnist("validation")[0]).draw(60, generator()), 2, generator())
    assert float(measure(puzzles, solve(puzzles.pieces, outside=0.0)).equal_any_wrong.mean()) < 0.1
    # strokes meet in the middle, so without the frame the blank outer borders go together
    assert float(measure(puzzles, solve(puzzles.pieces)).equal_any_wrong.mean()) > 0.9


def test_a_number_that_is_no_square():
    with pytest.raises(ValueError, match="pieces: expected a square number of them, got 3"):
        solve(torch.zeros(1, 3, 1, 2, 2))

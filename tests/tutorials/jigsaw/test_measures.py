import pytest
import torch
from scipy.stats import kendalltau

from tutorials.jigsaw.measures import assembled, mean, measure
from tutorials.jigsaw.puzzle import Puzzles, scrambled


def puzzle(shades, index):
    """One puzzle of pieces of one pixel each, in reading order of these shades, that come as ``index`` says."""
    ordered = torch.tensor(shades)[None, :, None, None, None]
    index = torch.tensor([index])
    return Puzzles(ordered[:, index[0]], ordered, index)


def values(measures):
    return {name: float(x[0]) for name, x in vars(measures).items()}


def test_the_right_answer():
    puzzles = scrambled(
        torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), 3, torch.Generator().manual_seed(1)
    )
    measures = measure(puzzles, puzzles.index)
    for name in ("wrong", "any_wrong", "equal_wrong", "equal_any_wrong", "l1", "l2"):
        assert bool((getattr(measures, name) == 0).all())
    assert bool((measures.kendall == 1).all())
    assert bool((measures.equal_kendall == 1).all())


def test_two_pieces_exchanged():
    puzzles = puzzle([0.1, 0.2, 0.3, 0.7], [2, 0, 3, 1])
    answer = torch.tensor([[2, 3, 0, 1]])  # the pieces of positions 0 and 3 exchanged
    assert torch.equal(assembled(puzzles, answer).flatten(), torch.tensor([0.7, 0.2, 0.3, 0.1]))
    found = values(measure(puzzles, answer))
    assert found["wrong"] == found["equal_wrong"] == 0.5
    assert found["any_wrong"] == found["equal_any_wrong"] == 1
    assert found["kendall"] == found["equal_kendall"] == pytest.approx(kendalltau([3, 1, 2, 0], range(4)).statistic)
    assert found["l1"] == pytest.approx(2 * 0.6 / 4)
    assert found["l2"] == pytest.approx(2 * 0.36 / 4)


def test_identical_pieces_are_exchangeable():
    puzzles = puzzle([0.0, 0.5, 0.0, 0.0], [0, 1, 2, 3])
    blank = values(measure(puzzles, torch.tensor([[3, 1, 0, 2]])))  # the three blank ones in a cycle
    assert blank["wrong"] == 0.75
    assert blank["any_wrong"] == 1
    assert blank["kendall"] < 1
    assert (blank["equal_wrong"], blank["equal_any_wrong"], blank["equal_kendall"]) == (0, 0, 1)
    assert (blank["l1"], blank["l2"]) == (0, 0)


def test_identical_pieces_where_the_picture_is_wrong():
    # 0.5 lies at position 3, blank ones at 0, 1, 2: positions 0 and 2 look right, 1 and 3 do not
    puzzles = puzzle([0.0, 0.5, 0.0, 0.0], [0, 1, 2, 3])
    found = values(measure(puzzles, torch.tensor([[1, 3, 0, 2]])))
    assert found["wrong"] == 1
    assert found["equal_wrong"] == 0.5
    assert found["equal_kendall"] == pytest.approx(kendalltau([0, 3, 2, 1], range(4)).statistic)


def test_the_picture_is_never_more_wrong_than_the_order():
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(50, 1, 8, 8, generator=generator) < 0.1).double()
    puzzles = scrambled(images, 4, generator)
    measures = measure(puzzles, torch.rand(50, 16, generator=generator).argsort(-1))
    assert bool((measures.equal_wrong <= measures.wrong).all())
    assert float((measures.equal_wrong < measures.wrong).double().mean()) > 0.5  # many pieces are blank
    same = (assembled(puzzles, torch.rand(50, 16, generator=generator).argsort(-1)) == puzzles.ordered).all()
    assert not bool(same)
    assert mean(measures)["wrong"] == pytest.approx(float(measures.wrong.mean()))


def test_answers_are_checked():
    puzzles = puzzle([0.0, 0.5, 0.0, 0.0], [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"answer: expected the shape \(1, 4\), got \(4,\)"):
        measure(puzzles, torch.arange(4))
    with pytest.raises(ValueError, match="not a permutation"):
        measure(puzzles, torch.zeros(1, 4, dtype=torch.long))

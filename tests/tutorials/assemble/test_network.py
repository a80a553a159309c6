import pytest
import torch

from pyro_gs import UniformPermutation, to_matrix
from pyro_gs.nn import assemble, scramble
from tutorials.assemble.ceilings import best_for_mean
from tutorials.assemble.network import NETWORKS, Training, answers, build
from tutorials.assemble.tasks import Digits
from tutorials.training import train


@pytest.fixture
def _float32():
    torch.set_default_dtype(torch.float32)  # half the time; the next test starts with its own


@pytest.mark.parametrize("name", list(NETWORKS))
def test_permuting_pieces_permutes_rows(name):
    scores, layer = build(NETWORKS[name], 3)
    pieces, labels = torch.rand(4, 9, 1, 10, 10), torch.tensor([0, 3, 3, 9])
    P = UniformPermutation(9).expand([4]).sample()
    with torch.no_grad():
        logits = scores(pieces, labels)
        found = scores(scramble(P, pieces, item_dim=3), labels)
        assert torch.allclose(found, P @ logits, atol=1e-4)  # float32, if that is the dtype, in another order of sums
        assert torch.allclose(layer.eval()(found), P @ layer(logits), atol=1e-4)
        assert not torch.allclose(scores(pieces, (labels + 1) % 10), logits, atol=1e-2)


@pytest.mark.usefixtures("_float32")
def test_a_trained_network_comes_near_the_best():
    train_on = Digits("train", 4)
    tasks = Digits("validation", 4).draw(300, torch.Generator().manual_seed(0))

    def error(answer):
        parts = assemble(to_matrix(answer), tasks.pieces, item_dim=3)
        return float((parts - tasks.targets).square().mean())

    torch.manual_seed(0)
    scores, layer = build(NETWORKS["sinkhorn"], 4)
    untrained = error(answers(scores, tasks))
    train(Training(scores, layer, train_on, 32), 60, path=None, seed=0, settings={}, learning_rate=2e-3)
    best = error(best_for_mean(tasks, train_on))
    chance = error(torch.rand(300, 16).argsort(-1))
    assert untrained > 0.85 * chance
    # three quarters of the way from chance to the best that can be done with the label alone; untrained ones do not leave
    assert error(answers(scores, tasks)) < best + 0.25 * (chance - best)


def test_labels_are_checked():
    scores, _ = build(NETWORKS["sinkhorn"], 2)
    pieces = torch.zeros(2, 4, 1, 14, 14)
    with pytest.raises(ValueError, match=r"labels: expected 2 integers from 0 to 9, got \[1, 10\]"):
        scores(pieces, torch.tensor([1, 10]))
    with pytest.raises(ValueError, match=r"labels: expected 2 integers from 0 to 9, got \[1\]"):
        scores(pieces, torch.tensor([1]))

import itertools

import torch

from pyro_gs import to_matrix
from pyro_gs.nn import assemble, scramble
from tutorials.assemble.ceilings import best_for, best_for_mean, best_for_nearest, nearest
from tutorials.assemble.tasks import Digits


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def errors(tasks, targets):
    """Squared errors of every arrangement of four pieces against pictures, shape (batch, pictures, 24)."""
    every = torch.tensor(list(itertools.permutations(range(4))))
    arranged = assemble(to_matrix(every), tasks.pieces[:, None], item_dim=3)
    return (arranged[:, None] - targets[:, :, None]).square().mean((-4, -3, -2, -1))


def put(tasks, answer):
    return assemble(to_matrix(answer), tasks.pieces, item_dim=3)


def test_the_best_arrangements_are_those_of_an_exhaustive_search():
    digits = Digits("validation", 2)
    tasks = digits.draw(30, generator())
    error = (put(tasks, best_for(tasks.pieces, tasks.targets)) - tasks.targets).square().flatten(1).mean(1)
    assert torch.allclose(error, errors(tasks, tasks.targets[:, None])[:, 0].amin(-1))
    every = torch.stack([digits.pieces_of(label) for label in tasks.labels.tolist()])
    found = errors(tasks, every)
    expected = found.mean(1).amin(-1)
    mean = put(tasks, best_for_mean(tasks, digits))[:, None]
    assert torch.allclose((mean - every).square().mean((-4, -3, -2, -1)).mean(1), expected)
    l1, l2 = nearest(put(tasks, best_for_nearest(tasks, digits)), tasks.labels, digits)
    assert torch.allclose(l2, found.amin((1, 2)))
    assert bool((l1 > 0).all())


def test_pieces_of_the_target_itself_are_put_right():
    digits = Digits("validation", 4)
    tasks = digits.draw(10, generator())
    P = to_matrix(torch.rand(10, 16, generator=generator()).argsort(-1))
    answer = best_for(scramble(P, tasks.targets, item_dim=3), tasks.targets)
    back = assemble(to_matrix(answer), scramble(P, tasks.targets, item_dim=3), item_dim=3)
    assert torch.equal(back, tasks.targets)


def test_a_picture_of_the_label_is_at_no_distance():
    digits = Digits("validation", 4)
    labels = torch.tensor([3, 7])
    pictures = torch.stack([digits.pieces_of(3)[5], digits.pieces_of(7)[2]])
    l1, l2 = nearest(pictures, labels, digits)
    assert l1.tolist() == [0, 0]
    assert l2.tolist() == [0, 0]
    l1, _ = nearest(pictures, labels.flip(0), digits)
    assert bool((l1 > 0.02).all())

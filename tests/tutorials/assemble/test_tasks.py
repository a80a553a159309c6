import pytest
import torch

from tutorials.assemble.tasks import Digits
from tutorials.jigsaw.puzzle import join


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_targets_are_pictures_of_the_label_and_pieces_are_of_another():
    digits = Digits("validation", 4)
    tasks = digits.draw(200, generator())
    assert tasks.pieces.shape == tasks.targets.shape == (200, 16, 1, 7, 7)
    assert set(tasks.labels.tolist()) == set(range(10))
    pictures = {label: rows(join(digits.pieces_of(label))) for label in range(10)}
    sorted_pieces = {
        tuple(sorted(map(tuple, image.flatten(1).tolist()))): label
        for label in range(10)
        for image in digits.pieces_of(label)
    }
    for pieces, label, target in zip(tasks.pieces, tasks.labels.tolist(), join(tasks.targets), strict=True):
        assert tuple(target.flatten().tolist()) in pictures[label]
        assert sorted_pieces[tuple(sorted(map(tuple, pieces.flatten(1).tolist())))] != label
    assert torch.equal(digits.draw(3, generator(1)).pieces, digits.draw(3, generator(1)).pieces)


def test_parts_and_grids():
    digits = Digits("test", 3)
    assert len(digits.images) == 1000
    assert bool((digits.labels.diff() >= 0).all())
    assert digits.pieces_of(9).shape == (100, 9, 1, 10, 10)
    with pytest.raises(ValueError, match="k=29"):
        Digits("test", 29)

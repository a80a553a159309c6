import numpy as np
import pytest
import torch

from tutorials.pictures import PHOTOGRAPHS, SPLITS, Crops, Stored, photographs


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_photograph_is_there_in_colour_and_in_one_part():
    assert len({(x.name, x.package) for x in PHOTOGRAPHS}) == len(PHOTOGRAPHS)
    assert {x.split for x in PHOTOGRAPHS} == set(SPLITS)
    found = [pixels for split in SPLITS for pixels in photographs(split)]
    assert len(found) == len(PHOTOGRAPHS)
    for pixels in found:
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] == 3
        assert min(pixels.shape[:2]) >= 192  # the largest crop


def test_crops_are_parts_of_the_photograph_at_several_scales():
    column = np.arange(200, dtype=np.uint8)
    ramp = np.repeat(np.broadcast_to(column, (200, 200))[..., None], 3, axis=-1)
    drawn = Crops([ramp], side=48).draw(60, generator()) * 255
    assert drawn.shape == (60, 3, 48, 48)
    steps = drawn[:, 0].diff(dim=-1)
    scales = steps.mean((1, 2)).round()
    assert set(scales.tolist()) == {1, 2, 4}
    # averages of whole numbers, rounded to whole numbers
    assert (steps - scales[:, None, None]).abs().max() < 1 + 1e-6
    mirrored = Crops([ramp], side=48, mirrored=True).draw(60, generator())
    backwards = mirrored[:, 0].diff(dim=-1).mean((1, 2)) < 0
    assert 15 <= int(backwards.sum()) <= 45  # of 60, half expected: beyond 3.8 standard deviations is no accident
    assert torch.equal(mirrored[~backwards] * 255, drawn[~backwards])


def test_draws_are_reproducible():
    source = Crops(photographs("validation"))
    assert torch.equal(source.draw(3, generator(1)), source.draw(3, generator(1)))
    assert not torch.equal(source.draw(3, generator(1)), source.draw(3, generator(2)))


def test_stored_pictures_come_once():
    source = Stored(torch.arange(5.0)[:, None, None].expand(5, 2, 2))
    assert sorted(source.draw(5, generator())[:, 0, 0, 0].tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="count=6: expected an integer from 1 to the 5 pictures of images"):
        source.draw(6, generator())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="photographs: expected at least one, got none"):
        Crops([])
    with pytest.raises(ValueError, match=r"photographs\[0\]: expected at least 48 pixels a side, got \(48, 20\)"):
        Crops([np.zeros((48, 20, 3), dtype=np.uint8)])
    with pytest.raises(ValueError, match=r"images: expected a shape of .*, got \(3, 4\)"):
        Stored(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="split='dev'"):
        photographs("dev")

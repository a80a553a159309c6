import pytest
import torch

from tutorials.pictures import SPLITS, mnist, small_digits


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


@pytest.mark.parametrize(
    ("load", "shape", "sizes"), [(mnist, (28, 28), (3500, 500, 1000)), (small_digits, (8, 8), (1258, 180, 359))]
)
def test_parts_are_disjoint_balanced_and_the_same_every_time(load, shape, sizes):
    parts = {split: load(split) for split in SPLITS}
    for (images, labels), size in zip(parts.values(), sizes, strict=True):
        assert images.shape == (size, *shape)
        assert (float(images.min()), float(images.max())) == (0, 1)
        counts = labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 8  # scikit-learn has 174 to 183 of a label
    assert parts["train"][0].dtype == torch.get_default_dtype()
    first, second, third = (rows(images) for images, _ in parts.values())
    assert not first & second
    assert not first & third
    assert not second & third
    assert torch.equal(load("test")[0], parts["test"][0])
    assert not bool((parts["test"][1].diff() >= 0).all())  # labels are mixed


@pytest.mark.parametrize("load", [mnist, small_digits])
def test_another_split(load):
    with pytest.raises(ValueError, match="split='dev': expected one of train, validation, test"):
        load("dev")

import itertools

import pytest
import torch

from tutorials.pictures import mnist
from tutorials.sorting import digits
from tutorials.sorting.digits import (
    METHODS,
    DigitsJob,
    choose_temperature,
    draw_sets,
    inverse_ceiling,
    load_sorter,
    make_sorter,
    measure,
    run_job,
)


def test_images_show_the_numbers():
    images, values = draw_sets("test", 3, 2, 1, torch.Generator().manual_seed(0))
    assert images.shape == (3, 2, 1, 28, 112)
    assert values.shape == (3, 2)
    pictures, labels = mnist("test")
    for image, value in zip(images.reshape(-1, 28, 112), values.reshape(-1), strict=True):
        for place, digit in enumerate(f"{int(value):04d}"):
            shown = image[:, 28 * place : 28 * (place + 1)]
            assert any(torch.equal(shown, picture.float()) for picture in pictures[labels == int(digit)])


def test_half_the_resolution():
    generator = torch.Generator().manual_seed(0)
    images, values = draw_sets("train", 2, 3, 2, generator)
    whole, same = draw_sets("train", 2, 3, 1, generator.manual_seed(0))
    assert torch.equal(values, same)
    torch.testing.assert_close(images[..., 0, 0, 0], whole[..., 0, :2, :2].mean((-2, -1)))
    assert images.shape == (2, 3, 1, 14, 56)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_ceiling_of_the_inverse_target_counts_square_roots(n):
    orders = list(itertools.permutations(range(n)))
    roots = dict.fromkeys(orders, 0)
    for order in orders:
        roots[tuple(order[i] for i in order)] += 1
    assert inverse_ceiling(n) == pytest.approx(max(roots.values()) / len(orders))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


def job(method):
    return DigitsJob(method, 3, 0, 1.0, 60, 2, 200)


@pytest.mark.parametrize("method", ["row-20", "rank", "neuralsort"])
def test_training_sorts_images_it_has_not_seen(method, folder):
    # chance is 1/6, a standard error of 200 sets 0.035
    found = run_job(job(method), folder)
    untrained = measure(make_sorter(METHODS[method], 3, 0, 1.0, 2).eval(), "test", 3, 2, 200)
    assert found["test_sets"] > 0.45
    assert untrained["test_sets"] < 0.3
    assert found["test_positions"] >= found["test_sets"]


def test_no_training_helps_against_the_inverse_target(folder):
    assert run_job(job("published"), folder)["test_sets"] < 0.45


def test_networks_are_kept(folder):
    run_job(job("rank"), folder)
    sorter = load_sorter(job("rank"), folder)
    assert measure(sorter, "test", 3, 2, 200)["test_sets"] == run_job(job("rank"), folder)["test_sets"]
    assert load_sorter(job("softsort"), folder) is None


def test_choice_of_a_temperature():
    def trial(temperature, share):
        return {"status": "done", "temperature": temperature, "validation_sets": share}

    failed = {"status": "failed", "error": "FloatingPointError: the loss is nan"}
    assert choose_temperature([trial(0.25, 0.3), failed, trial(1.0, 0.5), trial(4.0, 0.5)]) == 1.0
    with pytest.raises(ValueError, match=r"expected a temperature at which training ends, got FloatingPointError: the loss"):
        choose_temperature([failed])
    assert len(digits.TEMPERATURES) == len(set(digits.TEMPERATURES))

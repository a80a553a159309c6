import pytest
import torch

from tutorials.processes import from_first, joined, rank, world_size


def test_alone():
    with joined("cpu") as device:
        assert device == torch.device("cpu")
        assert (rank(), world_size(), from_first("a")) == (0, 1, "a")


@pytest.mark.parametrize("device", ["gpu", "meta", "cpu:x", "cuda:99"])
def test_a_device_that_is_not_here(device):
    with pytest.raises(ValueError, match=f"device='{device}': expected"), joined(device):
        pass

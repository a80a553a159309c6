"""The pictures of the puzzles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tutorials.pictures import (
    Crops,
    Pictures,
    Split,
    Stored,
    celeba,
    full_mnist,
    imagenet,
    mnist,
    photographs,
    small_digits,
)

__all__ = ["DATA", "Data", "source"]


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        about: What it is.
        load: Opens a part of it, from a folder where ``needs_folder``.
        needs_folder: Whether users have to have it.
        outside: What surrounds the pictures, see `tutorials.jigsaw.border.borders`.
    """

    about: str
    load: Callable[..., Pictures]
    needs_folder: bool = False
    outside: float | None = None


def _digits(load: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Pictures]:
    def loaded(*arguments: Any) -> Pictures:
        return Stored(load(*arguments)[0])

    return loaded


def _photographs(split: Split) -> Pictures:
    return Crops(photographs(split), mirrored=split == "train")


DATA: dict[str, Data] = {
    "mnist": Data("5,000 digits of MNIST", _digits(mnist), outside=0.0),
    "digits": Data("1,797 small digits of scikit-learn", _digits(small_digits), outside=0.0),
    "photographs": Data("crops of photographs of scikit-image and scikit-learn", _photographs),
    "full-mnist": Data("the whole of MNIST, from a folder", _digits(full_mnist), needs_folder=True, outside=0.0),
    "celeba": Data("faces of CelebA, from a folder", celeba, needs_folder=True),
    "imagenet": Data("pictures of ImageNet, from a folder", imagenet, needs_folder=True),
}
"""Data sets by the name that ``--data`` takes."""


@functools.cache
def source(name: str, split: Split, folder: Path | None) -> Pictures:
    """Open a part of a data set; once in a process.

    Args:
        name: One of `DATA`.
        split: Which part.
        folder: Where users have it; None for data that packages bring.

    Raises:
        ValueError: If a folder is missing or not wanted, or the data there do not fit.
    """
    data = DATA[name]
    if data.needs_folder != (folder is not None):
        raise ValueError(f"folder={folder!r}: expected {'a folder' if data.needs_folder else 'none'} with data={name!r}")
    return data.load(split) if folder is None else data.load(folder, split)

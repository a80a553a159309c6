"""Photographs that scikit-image and scikit-learn bring, with their licences, split by photograph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tutorials.pictures.digits import Split, check_split

__all__ = ["PHOTOGRAPHS", "Photograph", "photographs"]

PUBLIC_DOMAIN, CC0, CC_BY = "public domain", "CC0 1.0", "CC BY 2.0"


@dataclass(frozen=True)
class Photograph:
    """One photograph and where it comes from.

    Attributes:
        name: In its package.
        package: ``"skimage"`` or ``"sklearn"``.
        licence: As the package states it.
        author: As the package states it.
        split: The part of the data to which all its crops belong.
    """

    name: str
    package: Literal["skimage", "sklearn"]
    licence: str
    author: str
    split: Split

    def pixels(self) -> NDArray[np.uint8]:
        """Colours, shape (height, width, 3)."""
        if self.package == "sklearn":
            from sklearn.datasets import load_sample_image

            return np.asarray(load_sample_image(f"{self.name}.jpg"), dtype=np.uint8)
        from skimage import data

        load: Callable[[], NDArray[np.uint8]] = getattr(data, self.name)
        pixels = load()
        return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)


PHOTOGRAPHS = (
    Photograph("astronaut", "skimage", PUBLIC_DOMAIN, "NASA", "train"),
    Photograph("camera", "skimage", CC0, "Lav Varshney", "train"),
    Photograph("clock", "skimage", PUBLIC_DOMAIN, "Stefan van der Walt", "train"),
    Photograph("coffee", "skimage", CC0, "Rachel Michetti", "train"),
    Photograph("retina", "skimage", CC0, "Mikael Häggström", "train"),
    Photograph("china", "sklearn", CC_BY, "danielbuechele on Flickr, photograph 6061409035", "train"),
    Photograph("rocket", "skimage", PUBLIC_DOMAIN, "SpaceX", "validation"),
    Photograph("chelsea", "skimage", CC0, "Stefan van der Walt", "test"),
    Photograph("coins", "skimage", "no known copyright restrictions", "Brooklyn Museum", "test"),
    Photograph("flower", "sklearn", CC_BY, "vultilion on Flickr, photograph 6056698931", "test"),
)
"""Photographs that lie in the packages with a clear licence; the only scientific one is of an eye.

Left out are textures, and for want of a clear licence the moon, the motorcycles of Middlebury and the faces of LFW.
scikit-learn's list of licences names the author of china.jpg beside flower.jpg too, but links to vultilion's page, which
counts here.
"""


def photographs(split: Split) -> list[NDArray[np.uint8]]:
    """Photographs of a part of the data, each of shape (height, width, 3).

    Raises:
        ValueError: If ``split`` is another.
    """
    check_split(split)
    return [photograph.pixels() for photograph in PHOTOGRAPHS if photograph.split == split]

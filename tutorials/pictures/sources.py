"""Where batches of pictures come from: tensors, crops of large photographs, files that are read when they are drawn."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

__all__ = ["Crops", "Files", "Pictures", "Stored"]

_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow hands others, such as EPS, to programs outside
_SCALES = (1.0, 2.0, 4.0)  # pixels of a photograph on a pixel of a crop, along one axis; as far as it is large enough


class Pictures(Protocol):
    """A source of pictures of one shape (channels, height, width), of torch's default dtype, 0 to 1."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw pictures, shape (count, channels, height, width), the same for the same state of the generator."""


class Stored:
    """Pictures in memory, drawn without repetition.

    Args:
        images: Shape (N, channels, height, width) or (N, height, width).

    Raises:
        ValueError: If the shape is another or there are none; at a draw, if there are fewer than asked for.
    """

    def __init__(self, images: Tensor) -> None:
        if images.dim() not in (3, 4) or images.numel() == 0:
            raise ValueError(f"images: expected a shape of (N, channels, height, width), got {tuple(images.shape)}")
        self._images = images if images.dim() == 4 else images[:, None]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw pictures."""
        return self._images[_rows(count, len(self._images), "images", generator)]


class Crops:
    """Square crops of large photographs: photograph, scale and place at random.

    A crop shows 1, 2 or 4 times as many pixels along each axis as it has, where the photograph is large enough, and is
    averaged down.

    Args:
        photographs: Each of shape (height, width, 3).
        side: Of a crop in pixels.
        mirrored: Whether half of the crops are mirrored, left to right.

    Raises:
        ValueError: If there are none, or one is smaller than a crop.
    """

    def __init__(self, photographs: Sequence[NDArray[np.uint8]], side: int = 48, *, mirrored: bool = False) -> None:
        if not photographs:
            raise ValueError("photographs: expected at least one, got none")
        for number, pixels in enumerate(photographs):
            if min(pixels.shape[:2]) < side:
                raise ValueError(f"photographs[{number}]: expected at least {side} pixels a side, got {pixels.shape[:2]}")
        self._photographs = [Image.fromarray(pixels) for pixels in photographs]
        self._side = side
        self._mirrored = mirrored

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw pictures."""
        which = torch.randint(len(self._photographs), (count,), generator=generator).tolist()
        at = torch.rand(count, 4, generator=generator, dtype=torch.float64).tolist()
        return _tensor([self._crop(self._photographs[i], *numbers) for i, numbers in zip(which, at, strict=True)])

    def _crop(self, photograph: Image.Image, scale: float, x: float, y: float, mirror: float) -> Image.Image:
        fitting = [s for s in _SCALES if s * self._side <= min(photograph.size)]
        length = round(self._side * fitting[int(scale * len(fitting))])
        left, top = (int(place * (size - length + 1)) for place, size in zip((x, y), photograph.size, strict=True))
        box = (left, top, left + length, top + length)
        crop = photograph.resize((self._side, self._side), Image.Resampling.BOX, box)
        return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self._mirrored and mirror < 0.5 else crop


class Files:
    """Picture files, drawn without repetition: the square in the middle of each, resized, in colour.

    Args:
        paths: Of the files: BMP, JPEG, PNG, PPM, TIFF or WebP, of at most 89 million pixels.
        side: Of a picture in pixels.
        mirrored: Whether half of them are mirrored, left to right.
        name: What the errors call them.

    Raises:
        ValueError: If there are none, or ``side`` is below 1; at a draw, if there are fewer than asked for, or a file is
            missing or damaged.
    """

    def __init__(self, paths: Sequence[Path], side: int = 64, *, mirrored: bool = False, name: str = "paths") -> None:
        if not paths:
            raise ValueError(f"{name}: expected at least one picture, found none")
        if side < 1:
            raise ValueError(f"side={side!r}: expected an integer of at least 1")
        self.paths = tuple(paths)
        self._side = side
        self._mirrored = mirrored
        self._name = name

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw pictures."""
        rows = _rows(count, len(self.paths), self._name, generator).tolist()
        mirror = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        return _tensor(
            [self._read(self.paths[row], self._mirrored and m < 0.5) for row, m in zip(rows, mirror, strict=True)]
        )

    def _read(self, path: Path, mirror: bool) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path, formats=_FORMATS) as file:
                    picture: Image.Image = file.convert("RGB")
        except Exception as error:  # its decoders raise what they meet on their way
            raise ValueError(f"{path}: expected a picture, got {type(error).__name__}: {error}") from None
        length = min(picture.size)
        left, top = ((size - length) // 2 for size in picture.size)
        box = (left, top, left + length, top + length)
        picture = picture.crop(box).resize((self._side, self._side), Image.Resampling.BILINEAR)
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else picture


def _rows(count: int, size: int, name: str, generator: torch.Generator) -> Tensor:
    if not 1 <= count <= size:
        raise ValueError(f"count={count!r}: expected an integer from 1 to the {size} pictures of {name}")
    return torch.randperm(size, generator=generator)[:count]


def _tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as a tensor (N, 3, height, width)."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return pixels.permute(0, 3, 1, 2).to(torch.get_default_dtype()) / 255

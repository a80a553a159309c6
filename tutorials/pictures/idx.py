"""Files in the IDX format, in which MNIST is distributed, and MNIST as users have it."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutorials.pictures.digits import Split, check_split

__all__ = ["full_mnist", "read_idx"]

_BYTES = 8  # the code of unsigned bytes in the third byte of the magic number
_VALIDATION = 5_000
_NAMES = {"train": "train", "validation": "train", "test": "t10k"}


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: two zeros, the code 8, the number of dimensions, sizes, values.

    Args:
        path: The file; one that starts as gzip does is unpacked, whatever its name.
        dimensions: How many it should have: 3 for images, 1 for labels.

    Returns:
        The array.

    Raises:
        ValueError: If the file is missing, is no such file, or has fewer or more bytes than it announces.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: expected an IDX file, got {type(error).__name__}: {error}") from None
    magic = bytes([0, 0, _BYTES, dimensions])
    if content[:4] != magic:
        raise ValueError(f"{path}: expected the magic number {magic.hex()}, got {content[:4].hex() or 'nothing'}")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{path}: expected {dimensions} sizes, but the file ends after {len(content)} bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} values, of shape {shape}, got {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def full_mnist(folder: Path, split: Split) -> tuple[Tensor, Tensor]:
    """The whole of MNIST, from its four files (``train-images-idx3-ubyte`` and so on, with ``.gz`` or not).

    The last 5,000 of the 60,000 training digits are for validation; of a smaller file the last twelfth.

    Args:
        folder: Where they are.
        split: Which part.

    Returns:
        Images, shape (N, 28, 28), of torch's default dtype, 0 to 1 (ink); labels, shape (N,), integers 0 to 9.

    Raises:
        ValueError: If ``split`` is another, or a file is missing or damaged.
    """
    check_split(split)
    images = read_idx(_found(folder, f"{_NAMES[split]}-images-idx3-ubyte"), 3)
    labels = read_idx(_found(folder, f"{_NAMES[split]}-labels-idx1-ubyte"), 1)
    if len(images) != len(labels):
        raise ValueError(
            f"{folder}: expected as many labels as images, got {len(labels)} for {len(images)} ({_NAMES[split]})"
        )
    if labels.size and labels.max() > 9:
        row = int(labels.argmax())
        raise ValueError(f"{folder}: expected labels from 0 to 9, got {labels[row]} at {row} ({_NAMES[split]})")
    held_out = min(_VALIDATION, len(images) // 12)
    rows = {"train": slice(len(images) - held_out), "validation": slice(len(images) - held_out, None), "test": slice(None)}
    return (
        torch.tensor(images[rows[split]], dtype=torch.get_default_dtype()) / 255,
        torch.tensor(labels[rows[split]], dtype=torch.int64),
    )


def _found(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise ValueError(f"{folder}: expected {name} or {name}.gz there, found neither")

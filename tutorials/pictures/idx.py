"""Files in the IDX format, in which MNIST is distributed, and MNIST as users have it."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutorials.file_sizes import check_size
from tutorials.pictures.digits import Split, check_split

__all__ = ["full_mnist", "read_idx"]

_BYTES = 8  # the code of unsigned bytes in the third byte of the magic number
_VALIDATION = 5_000
_LARGEST = 2**30  # bytes of an array
_NAMES = {"train": "train", "validation": "train", "test": "t10k"}


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes: two zeros, the code 8, the number of dimensions, sizes, values.

    Args:
        path: The file; one that starts as gzip does is unpacked, whatever its name.
        dimensions: How many it should have: 3 for images, 1 for labels.

    Returns:
        The array.

    Raises:
        ValueError: If the file is missing, is no such file, or has fewer or more bytes than it announces, none or more
            than 1 GiB.
    """
    try:
        check_size(path, _LARGEST)
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not packed:
                return _read_array(path, file, dimensions)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _read_array(path, unpacked, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected an IDX file, got {type(error).__name__}: {error}") from None


def _read_array(path: Path, file: BinaryIO | gzip.GzipFile, dimensions: int) -> NDArray[np.uint8]:
    """Read no more bytes than the header announces, and one."""
    magic = bytes([0, 0, _BYTES, dimensions])
    header = file.read(4 + 4 * dimensions)
    if header[:4] != magic:
        raise ValueError(f"{path}: expected the magic number {magic.hex()}, got {header[:4].hex() or 'nothing'}")
    if len(header) < 4 + 4 * dimensions:
        raise ValueError(f"{path}: expected {dimensions} sizes, but the file ends after {len(header)} bytes")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    size = math.prod(shape)
    if not 1 <= size <= _LARGEST:
        raise ValueError(f"{path}: expected 1 to {_LARGEST} values, got the shape {shape}")
    content = file.read(size + 1)
    if len(content) != size:
        found = str(len(content)) if len(content) < size else "more"
        raise ValueError(f"{path}: expected {size} values, of shape {shape}, got {found}")
    return np.frombuffer(content, np.uint8).reshape(shape)


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
    if images.shape[1:] != (28, 28):
        raise ValueError(f"{folder}: expected images of 28 x 28 pixels, got {images.shape[1:]} ({_NAMES[split]})")
    if len(images) != len(labels):
        raise ValueError(
            f"{folder}: expected as many labels as images, got {len(labels)} for {len(images)} ({_NAMES[split]})"
        )
    if labels.max() > 9:
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

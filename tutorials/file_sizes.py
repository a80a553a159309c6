"""Limits on the files that are read, so that a hostile one is refused before memory is asked for."""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["LARGEST", "check_size", "check_unpacked"]

LARGEST = 2**31
"""Bytes of a file, and of what an archive unpacks to."""


def check_size(path: Path, limit: int = LARGEST) -> None:
    """Refuse what is no plain file (a pipe has no end), and a file that is too large.

    Args:
        path: The file.
        limit: Bytes.

    Raises:
        ValueError: If it is refused; the message names it.
        FileNotFoundError: If there is none.
    """
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"{path}: expected a file, found a folder, a pipe or a device")
    if size > limit:
        raise ValueError(f"{path}: the file has {size} bytes, expected at most {limit}")


def check_unpacked(archive: zipfile.ZipFile) -> None:
    """Refuse an archive that unpacks to too much. A member never gives more bytes than the archive announces.

    Args:
        archive: Any.

    Raises:
        ValueError: If it does.
    """
    size = sum(member.file_size for member in archive.infolist())
    if size > LARGEST:
        raise ValueError(f"it unpacks to {size} bytes, expected at most {LARGEST}")

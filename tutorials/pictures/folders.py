"""Folders of pictures that users have: CelebA and ImageNet. Files are read when they are drawn."""

from __future__ import annotations

from pathlib import Path

from tutorials.file_sizes import check_size
from tutorials.pictures.digits import Split, check_split
from tutorials.pictures.sources import Files

__all__ = ["celeba", "imagenet"]

_PARTITION = "list_eval_partition.txt"
_CODES: dict[str, Split] = {"0": "train", "1": "validation", "2": "test"}
_SUFFIXES = (".jpeg", ".jpg", ".png")
_HELD_OUT = 20  # of the training pictures of a class one in so many is for validation


def celeba(folder: Path, split: Split, side: int = 64) -> Files:
    """Faces of CelebA, aligned: its file ``list_eval_partition.txt`` and the folder ``img_align_celeba`` beside it.

    Args:
        folder: Where both are.
        split: Which part, by that file.
        side: Of the pictures in pixels, see `tutorials.pictures.sources.Files`.

    Returns:
        The pictures; training ones are mirrored at random.

    Raises:
        ValueError: If ``split`` is another, the file is missing, a line of it is not "name part" with a part of 0, 1, 2, or
            a picture that it names is missing; the message names the line.
    """
    check_split(split)
    table, pictures = folder / _PARTITION, folder / "img_align_celeba"
    try:
        check_size(table)
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{table}: expected CelebA's partition, got {reason}") from None
    paths = []
    for number, line in enumerate(lines, 1):
        match line.split():
            case [name, code] if code in _CODES and name == Path(name).name:
                if _CODES[code] == split:
                    paths.append(pictures / name)
                    if not paths[-1].is_file():
                        raise ValueError(f"{table}, line {number}: expected the picture {paths[-1]}, which is not there")
            case _:
                raise ValueError(f"{table}, line {number}: expected a file name and 0, 1 or 2, got {line[:80]!r}")
    return Files(paths, side, mirrored=split == "train", name=f"{table} ({split})")


def imagenet(folder: Path, split: Split, side: int = 64) -> Files:
    """Pictures of ImageNet: ``train`` and ``val`` with a folder for each class (``n01440764`` and so on).

    ``val`` is for tests; of the training pictures of each class, in the order of their names, every twentieth is for
    validation.

    Args:
        folder: Where both are.
        split: Which part.
        side: As `celeba`.

    Returns:
        The pictures; training ones are mirrored at random.

    Raises:
        ValueError: If ``split`` is another, the folder is missing or has no folders of classes, or a class is empty.
    """
    check_split(split)
    top = folder / ("val" if split == "test" else "train")
    if not top.is_dir():
        raise ValueError(f"{top}: expected a folder with one for each class, it is not there")
    paths = []
    for place in sorted(path for path in top.iterdir() if path.is_dir()):
        found = sorted(path for path in place.iterdir() if path.suffix.lower() in _SUFFIXES)
        if not found:
            raise ValueError(f"{place}: expected pictures ({', '.join(_SUFFIXES)}), found none")
        if split != "test":
            found = [path for i, path in enumerate(found) if (i % _HELD_OUT == _HELD_OUT - 1) == (split == "validation")]
        paths.extend(found)
    return Files(paths, side, mirrored=split == "train", name=f"{top} ({split})")

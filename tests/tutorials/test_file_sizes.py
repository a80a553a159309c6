import os
import zipfile

import pytest

from tutorials.file_sizes import LARGEST, check_size, check_unpacked


def test_what_is_no_plain_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: expected a file"):
            check_size(path)
    with pytest.raises(FileNotFoundError, match="none"):
        check_size(tmp_path / "none")


def test_large_files_are_refused(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)  # takes no room on the disk
    with pytest.raises(ValueError, match=f"large: the file has {LARGEST + 1} bytes, expected at most {LARGEST}"):
        check_size(path)
    os.truncate(path, 8)
    check_size(path, 8)
    with pytest.raises(ValueError, match="has 8 bytes, expected at most 7"):
        check_size(path, 7)


def test_an_archive_that_unpacks_to_much_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a", b"text")
        check_unpacked(archive)
        archive.getinfo("a").file_size = LARGEST + 1
        with pytest.raises(ValueError, match=f"unpacks to {LARGEST + 1} bytes"):
            check_unpacked(archive)

"""CSV files with a header: what is read, and what every error names."""

from pathlib import Path

import pytest

from tutorials.celegans.csv_table import read_table, refuse_repeated, table_number


def test_rows_keep_their_line_numbers(tmp_path: Path) -> None:
    """Empty lines are passed over; quotes may hold commas and ends of lines."""
    path = tmp_path / "table.csv"
    path.write_bytes(b'\xef\xbb\xbfname, x \r\n\r\n"a, b",1\r\n"c\nd", 2\r\n')
    header, rows = read_table(path)
    assert header == ["name", "x"]
    assert rows == [(3, ["a, b", "1"]), (5, ["c\nd", "2"])]
    assert table_number(path, 3, "x", " 1e1") == 10.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"a,b\n", "a header and no rows"),
        (b"a;b\n1;2\n", "the header 'a;b' has no commas"),
        (b"a\tb\n1\t2\n", "has no commas"),
        (b"1.0,2.0\n3.0,4.0\n", "the first row holds numbers"),
        (b"a,b\n1,2\n1\n", "row 3 has 1 values, expected 2"),
        ("a,b\n1,2\n".encode("utf-16"), "no CSV in UTF-8 .* save it as one"),
        (b'a,b\n"1,2\n', "no CSV in UTF-8"),
        (b"a,b\n1,2\0\n", "no CSV in UTF-8 .it holds zero bytes"),
        (b"a,b\n1," + b"2" * 1_000_000 + b"\n", "no CSV in UTF-8 .field larger than field limit"),
        ("a,é\n1,2\n".encode("latin-1"), "no CSV in UTF-8 "),
        (b"a,a\n1,2\n", "the header: a given more than once"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"table\.csv: .*{message}"):
        read_table(path)


@pytest.mark.parametrize("text", ["", "x", "nan", "-inf", "1,5", "1_0"])
def test_cells_that_are_no_number(text: str) -> None:
    with pytest.raises(ValueError, match=rf"worm\.csv: row 7, column 'x' holds '{text}', expected a finite number"):
        table_number(Path("worm.csv"), 7, "x", text)


def test_labels_that_come_twice() -> None:
    refuse_repeated("worm", ["a", "b"])
    with pytest.raises(ValueError, match="worm: an empty label, a given more than once"):
        refuse_repeated("worm", ["a", "", "b", "a", ""])


def test_what_is_not_read_for_its_size(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)  # takes no room on the disk
    with pytest.raises(ValueError, match=r"table\.csv: the file has 268435457 bytes, expected at most 268435456"):
        read_table(path)

import io
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tutorials.celegans.recordings import Recording, known_identity, read_recording


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recording(**changes: object) -> Recording:
    """Three neurons over four time steps, to be spoiled by the changes."""
    fields: dict[str, object] = {
        "name": "worm",
        "traces": torch.arange(12, dtype=torch.float64).reshape(4, 3),
        "labels": ("?1", "AVAL", "avbl"),
        "identities": (None, "AVAL", "AVBL"),
        "positions": torch.arange(9, dtype=torch.float64).reshape(3, 3),
        "colors": torch.ones(3, 2, dtype=torch.float64),
        "channels": ("red", "green"),
    }
    return Recording(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("label", "name"),
    [("DA01", "DA1"), (" avfl ", "AVFL"), ("?", None), ("AVAL?", None), ("", None), ("17", None), ("NaN", None)],
)
def test_labels_name_a_neuron_or_none(label: str, name: str | None) -> None:
    assert known_identity(label) == name


def test_csv(tmp_path: Path) -> None:
    """As Excel writes it: with a byte order mark, and with spaces."""
    path = tmp_path / "worm.csv"
    path.write_text("?1,avbl, AVAL ,4\n1,2,3,4\n5,6,7,8\n9,10,11,1e1\n", encoding="utf-8-sig")
    worm = read_recording(path)
    assert worm.name == "worm"
    assert worm.traces.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 10]]
    assert worm.traces.dtype == torch.float64
    assert worm.labels == ("?1", "avbl", "AVAL", "4")
    assert worm.identities == (None, "AVBL", "AVAL", None)
    assert worm.positions is worm.colors is worm.channels is None
    assert read_recording(path, known_names=["aval"]).identities == (None, None, "AVAL", None)


def test_positions_are_matched_by_label(tmp_path: Path) -> None:
    path = write(tmp_path / "worm.csv", "?1,AVAL", "1,2", "3,4")
    places = write(tmp_path / "places.csv", "red,z,label,x,y,green", ".5,3,AVAL,1,2,.6", ".7,6,?1,4,5,.8")
    worm = read_recording(path, positions=places)
    assert worm.positions is not None
    assert worm.colors is not None
    assert worm.positions.tolist() == [[4, 5, 6], [1, 2, 3]]
    assert worm.colors.tolist() == [[0.7, 0.8], [0.5, 0.6]]
    assert worm.channels == ("red", "green")


def test_npz(tmp_path: Path) -> None:
    given = recording()
    assert given.positions is not None
    assert given.colors is not None
    np.savez(
        tmp_path / "worm.npz",
        traces=given.traces.numpy().astype(np.float32),
        labels=np.array(given.labels),
        positions=given.positions.numpy(),
        colors=given.colors.numpy(),
        channels=np.array(given.channels),
    )
    worm = read_recording(tmp_path / "worm.npz")
    assert torch.equal(worm.traces, given.traces)
    assert (worm.labels, worm.identities, worm.channels) == (given.labels, given.identities, given.channels)
    assert worm.positions is not None
    assert torch.equal(worm.positions, given.positions)
    assert worm.colors is not None
    assert torch.equal(worm.colors, given.colors)


def test_neurons_can_be_left_out() -> None:
    worm = recording().without(["AVAL"])
    assert worm.labels == ("?1", "avbl")
    assert worm.identities == (None, "AVBL")
    assert worm.traces.tolist() == [[0, 2], [3, 5], [6, 8], [9, 11]]
    assert worm.positions is not None
    assert worm.positions.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert worm.colors is not None
    assert worm.colors.shape == (2, 2)
    with pytest.raises(ValueError, match="'AVAX' is no label of worm, close ones: AVAL"):
        recording().without(["AVAX"])


def test_what_is_dropped_is_not_looked_at(tmp_path: Path) -> None:
    """A column of times and a trace with gaps, in either file or none."""
    path = write(tmp_path / "worm.CSV", "time,?1,AVAL", "0:00,nan,2", "0:01,3,4")
    places = write(tmp_path / "places.csv", "label,x,y,z", "AVAL,1,2,3", "?1,?,?,?")
    worm = read_recording(path, positions=places, drop=["time", "?1", "absent"])
    assert worm.labels == ("AVAL",)
    assert worm.traces.tolist() == [[2], [4]]
    assert worm.positions is not None
    assert worm.positions.tolist() == [[1, 2, 3]]
    assert worm.dropped == ("time", "?1")
    given = recording()
    assert given.positions is not None
    numbers = {"traces": given.traces.clone().numpy(), "positions": given.positions.numpy()}
    numbers["traces"][0, 0] = np.nan
    np.savez(tmp_path / "worm.npz", labels=np.array(given.labels).astype("S"), **numbers)
    worm = read_recording(tmp_path / "worm.npz", drop=["?1"])
    assert worm.labels == ("AVAL", "avbl")
    assert worm.positions is not None
    assert torch.equal(worm.positions, given.positions[1:])
    assert worm.without(["avbl"]).dropped == ("?1", "avbl")


@pytest.mark.parametrize(
    ("lines", "known_names", "message"),
    [
        ([""], None, r"worm\.csv: the file is empty"),
        (["?1,?2", "1,2", "1"], None, r"worm\.csv: row 3 has 1 values, expected 2"),
        (["?1,?2", "1,2", "1,x"], None, r"row 3, column '\?2' holds 'x', expected a finite number"),
        (["?1,?2", "1,2", "nan,1"], None, r"row 3, column '\?1' holds 'nan', expected a finite number"),
        (["?1,?2", "1,2", ",1"], None, r"row 3, column '\?1' holds '', expected"),
        (["?1,?2", "1,2"], None, "1 time steps, expected at least 2"),
        (["?1,?2"], None, "a header and no rows"),
        (["?1,?1", "1,2", "1,2"], None, r"the header: \?1 given more than once"),
        (["AVAL,aval", "1,2", "1,2"], None, "AVAL given more than once"),
        (["DA1,DA01", "1,2", "1,2"], None, "DA1 given more than once"),
        ([",", "1,2", "1,2"], None, "an empty label given more than once, .* can be "),
        (["0,1,2", "1,2,3", "1,2,4"], None, r"3 columns without a name and 2 rows.*transpose it"),
        (["?1;?2", "1;2", "1;2"], None, "has no commas"),
        (["1.5,2.5", "1,2", "1,2"], None, "the first row holds numbers"),
        (["AVAL,?2", "1,2", "1,2"], ["AVAR"], r"known_names: 'AVAR' is no label of worm\.csv, close ones: AVAL"),
    ],
)
def test_bad_csv(tmp_path: Path, lines: list[str], known_names: list[str] | None, message: str) -> None:
    path = write(tmp_path / "worm.csv", *lines)
    with pytest.raises(ValueError, match=message):
        read_recording(path, known_names=known_names)


def test_bad_bytes_and_bad_endings(tmp_path: Path) -> None:
    path = tmp_path / "worm.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no CSV in UTF-8"):
        read_recording(path)
    with pytest.raises(ValueError, match=r"expected a name that ends with \.csv, \.npz or \.nwb"):
        read_recording(tmp_path / "worm.xlsx")
    with pytest.raises(FileNotFoundError):
        read_recording(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError):
        read_recording(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["label,x,y", "?1,1,2", "AVAL,1,2"], r"places\.csv: no column z"),
        (["label,x,y,z", "?1,1,2,3"], r"no row for AVAL \(1 in all\)"),
        (["label,x,y,z", "?1,1,2,3", "AVAX,1,2,3"], "row 3 places 'AVAX', which has no trace, close labels: AVAL; spell"),
        (["label,x,y,z", "?1,1,2,3", "aval,1,2,3"], "row 3 places 'aval', which has no trace, close labels: AVAL"),
        (["label,x,y,z", "?1,1,2,3", "?1,1,2,3"], r"row 3 gives '\?1' a second time"),
        (["label,x,y,z", "?1,1,2,far", "AVAL,1,2,3"], "row 2, column 'z' holds 'far'"),
    ],
)
def test_bad_positions(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write(tmp_path / "worm.csv", "?1,AVAL", "1,2", "3,4")
    with pytest.raises(ValueError, match=message):
        read_recording(path, positions=write(tmp_path / "places.csv", *lines))


def test_bad_npz(tmp_path: Path) -> None:
    path = tmp_path / "worm.npz"
    np.savez(path, traces=np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"no array 'labels', only \['traces'\]"):
        read_recording(path)
    np.savez(path, traces=np.array([["a", "b"]] * 3), labels=np.array(["?1", "?2"]))
    with pytest.raises(ValueError, match="'traces' has dtype <U1, expected numbers"):
        read_recording(path)
    np.savez(path, traces=np.zeros((4, 2)), labels=np.array(["?1", None], dtype=object))
    with pytest.raises(ValueError, match=r"no readable \.npz of plain arrays"):
        read_recording(path)
    np.savez(path, traces=np.full((400, 2), np.nan), labels=np.array(["?1", "?2"]))
    with pytest.raises(ValueError, match=r"the trace of '\?1' \(column 0\) is nan at time step 0 \(800 such"):
        read_recording(path)
    np.savez(path, traces=np.zeros((4, 2)), labels=np.array(["?1", "?2", "?3"]))
    with pytest.raises(ValueError, match=r"'traces' has shape \(4, 2\), expected \(time steps, 3\) .* transpose it"):
        read_recording(path)
    labels = np.array(["?1", "?2"])
    for key, value, message in (
        ("positions", np.zeros((3, 2)), r"'positions' has shape \(3, 2\), expected \(2, 3\)"),
        ("colors", np.zeros(2), r"'colors' has shape \(2,\), expected \(2, channels\)"),
        ("channels", np.array("red"), r"'channels' has shape \(\), expected one dimension"),
    ):
        np.savez(path, traces=np.zeros((4, 2)), labels=labels, **{key: value})
        with pytest.raises(ValueError, match=message):
            read_recording(path)
    np.savez(path, traces=np.zeros((4, 2)), labels=np.array([b"?1", b"\xff"]))
    with pytest.raises(ValueError, match=r"worm\.npz: 'labels' holds no UTF-8"):
        read_recording(path)
    np.savez(path, traces=np.zeros((4, 2)), labels=np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"))
    with pytest.raises(ValueError, match=r"worm\.npz: 'labels' has dtype datetime64\[D\], expected text"):
        read_recording(path)
    np.savez(path, traces=np.zeros((4, 2)), labels=labels)
    for cut in (path.stat().st_size // 2, 0):
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ValueError, match=r"worm\.npz: no readable \.npz of plain arrays, cut off perhaps"):
            read_recording(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"traces": torch.zeros(4, 3)}, "expected float64"),
        ({"traces": torch.full((4, 3), torch.inf, dtype=torch.float64)}, "is inf at time step 0"),
        ({"labels": ("?1", "?1", "?2")}, r"\?1 given more than once"),
        ({"identities": ("AVAL", "AVAL", None)}, "AVAL given more than once"),
        ({"identities": (None, None)}, "2 identities for 3 traces"),
        ({"positions": torch.zeros(3, 2, dtype=torch.float64)}, r"positions have shape \(3, 2\).*expected \(3, 3\)"),
        ({"positions": torch.full((3, 3), torch.nan, dtype=torch.float64)}, r"positions of '\?1' are \[nan, nan, nan\]"),
        ({"colors": torch.zeros(2, 2, dtype=torch.float64)}, r"colors have shape \(2, 2\)"),
        ({"channels": ("red",)}, "1 channels, expected as many"),
    ],
)
def test_recordings_refuse_fields_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recording(**changes)


def _npz(path: Path, header: dict[str, object], values: bytes) -> None:
    """An .npz whose array of traces has a header of one's own."""
    traces, labels = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(traces, header)
    np.save(labels, np.array(["?1", "?2"]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("traces.npy", traces.getvalue() + values)
        archive.writestr("labels.npy", labels.getvalue())


@pytest.mark.parametrize("shape", [(2**40, 2), (2**62, 2**62), (10**5, 2)])
def test_an_npz_that_announces_more_than_it_has_takes_no_memory(shape: tuple[int, ...], tmp_path: Path) -> None:
    _npz(tmp_path / "worm.npz", {"descr": "<f8", "fortran_order": False, "shape": shape}, b"\0" * 64)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"worm\.npz: no readable .* announces \d+ bytes, of shape .*, and has 64\)"):
        read_recording(tmp_path / "worm.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_an_npz_that_unpacks_to_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutorials.file_sizes.LARGEST", 2**20)
    path = tmp_path / "worm.npz"
    np.savez_compressed(path, traces=np.zeros((2**17, 2)), labels=np.array(["?1", "?2"]))
    assert path.stat().st_size < 2**14
    with pytest.raises(ValueError, match=r"worm\.npz: no readable .*it unpacks to 209\d+ bytes, expected at most 1048576"):
        read_recording(path)


def test_a_pickle_in_an_npz_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(made),)

    path = tmp_path / "worm.npz"
    np.savez(path, traces=np.zeros((4, 2)), labels=np.array([Payload(), "?2"], dtype=object))
    with pytest.raises(ValueError, match=r"worm\.npz: .*labels\.npy holds Python objects"):
        read_recording(path)
    assert not made.exists()


def test_labels_as_long_as_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "worm.csv", "?1," + "a" * 100_000, "1,2", "3,4")
    places = write(tmp_path / "places.csv", "label,x,y,z", "?1,1,2,3", "b" * 100_000 + ",1,2,3")
    with pytest.raises(ValueError, match=r"places\.csv: row 3 places 'b"):  # looking for close ones would take hours
        read_recording(path, positions=places)

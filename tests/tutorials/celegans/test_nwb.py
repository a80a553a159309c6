"""NWB files: what `write_nwb` writes, and the layouts of the community, made with pynwb here."""

import datetime
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutorials.celegans.recordings import Recording, read_recording

h5py = pytest.importorskip("h5py")
pynwb = pytest.importorskip("pynwb")

from tutorials.celegans.nwb import read_nwb, write_nwb  # noqa: E402


def recording() -> Recording:
    generator = torch.Generator().manual_seed(0)
    traces = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    positions = 50 * torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return Recording("worm", traces, ("AVAL", "?2", "DA01", "AVBL?"), ("AVAL", None, "DA1", None), positions)


def build(
    path: Path,
    *,
    module: str = "CalciumActivity",
    series: tuple[str, ...] = ("SignalRawFluor",),
    container: str | None = None,
    labels: list[str] | None = None,
    column: str = "ID_labels",
    voxels: bool = True,
    spacing: list[float] | None = (0.5, 0.5, 2.0),  # type: ignore[assignment]
    unit: str = "micrometers",
    data: np.ndarray | None = None,
) -> Path:
    """A file of three neurons of several voxels, with the parts asked for."""
    nwb = pynwb.NWBFile(
        session_description="test",
        identifier="x",
        session_start_time=datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
    )
    options: dict[str, Any] = {} if spacing is None else {"grid_spacing": list(spacing), "grid_spacing_unit": unit}
    plane = nwb.create_imaging_plane(
        name="CalciumImVol",
        optical_channel=pynwb.ophys.OpticalChannel(name="c", description="c", emission_lambda=525.0),
        description="volume",
        device=nwb.create_device(name="scope"),
        excitation_lambda=488.0,
        indicator="GCaMP",
        location="head",
        **options,
    )
    processing = nwb.create_processing_module(name=module, description="activity")
    segmentation = pynwb.ophys.ImageSegmentation(name="Segmentation")
    processing.add(segmentation)
    table = segmentation.create_plane_segmentation(description="neurons", imaging_plane=plane, name="Neurons")
    if labels is not None:
        table.add_column(name=column, description="names")
    for m in range(3):
        mask = {"voxel_mask": [(m, 2, 3, 1.0), (m + 2, 2, 5, 3.0)]} if voxels else {"image_mask": np.ones((2, 2))}
        table.add_roi(**mask, **({} if labels is None else {column: labels[m]}))
    region = table.create_roi_table_region(description="all but in another order", region=[2, 0, 1])
    parent: Any = processing
    if container is not None:
        parent = getattr(pynwb.ophys, container)(name=container)
        processing.add(parent)
    for name in series:
        one = {"name": name, "data": np.arange(12.0).reshape(4, 3) if data is None else data, "unit": "a.u.", "rois": region}
        if container is None:
            parent.add(pynwb.ophys.RoiResponseSeries(**one, rate=4.0))
        else:
            parent.create_roi_response_series(**one, rate=4.0)
    with pynwb.NWBHDF5IO(str(path), "w") as io:
        io.write(nwb)
    return path


def test_round_trip(tmp_path: Path) -> None:
    given = recording()
    write_nwb(tmp_path / "worm.nwb", given, voxel=0.1)
    worm = read_recording(tmp_path / "worm.nwb")
    assert (worm.name, worm.labels, worm.identities) == (given.name, given.labels, given.identities)
    assert torch.equal(worm.traces, given.traces)
    assert worm.positions is not None
    assert given.positions is not None
    # Half of a voxel, and the rounding of the file's float32.
    torch.testing.assert_close(worm.positions, given.positions - given.positions.amin(0), atol=0.0501, rtol=0)


@pytest.mark.parametrize("unit", ["micrometers", "um", "meters"])
def test_places_are_weighted_centres_in_the_order_of_the_traces(tmp_path: Path, unit: str) -> None:
    spacing = [0.5e-6, 0.5e-6, 2e-6] if unit == "meters" else [0.5, 0.5, 2.0]
    path = build(tmp_path / "worm.nwb", labels=["AVAL", "AVAR", "nan"], spacing=spacing, unit=unit)
    traces, labels, positions = read_nwb(path)
    assert labels == ["?1", "AVAL", "AVAR"]
    assert traces.tolist() == np.arange(12.0).reshape(4, 3).tolist()
    assert positions is not None
    expected = torch.tensor([[m + 1.5, 2, 4.5] for m in (2, 0, 1)]) * torch.tensor([0.5, 0.5, 2.0])
    torch.testing.assert_close(positions, expected.double(), atol=1e-5, rtol=0)  # float32 in the file


@pytest.mark.parametrize(
    ("container", "module"), [("DfOverF", "CalciumActivity"), ("Fluorescence", "ophys"), (None, "ophys")]
)
def test_activity_is_found_wherever_it_is(tmp_path: Path, container: str | None, module: str) -> None:
    path = build(tmp_path / "worm.nwb", container=container, module=module, series=("ReferenceSeries", "SignalSeries"))
    traces, labels, _ = read_nwb(path)
    assert traces.shape == (4, 3)
    assert labels == ["?1", "?2", "?3"]


@pytest.mark.parametrize("column", ["ID_labels", "ROI ids", "labels"])
def test_labels_in_other_columns(tmp_path: Path, column: str) -> None:
    assert read_nwb(build(tmp_path / "worm.nwb", labels=["a", "b", "a?"], column=column))[1] == ["a?", "a", "b"]


def test_repeated_unnamed_labels_are_numbered_but_repeated_names_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "one.nwb", labels=["Q?", "Q?", "AVAL"])
    assert read_recording(path).labels == ("AVAL", "?2", "?3")
    with pytest.raises(ValueError, match="AVAL given more than once"):
        read_recording(build(tmp_path / "two.nwb", labels=["AVAL", "AVAL", "Q?"]))


def test_positions_may_come_from_a_csv(tmp_path: Path) -> None:
    path = build(tmp_path / "worm.nwb", voxels=False, labels=["A1", "A2", "A3"])
    places = tmp_path / "places.csv"
    places.write_text("label,x,y,z\nA1,1,2,3\nA2,4,5,6\nA3,7,8,9\n")
    worm = read_recording(path, positions=places)
    assert worm.positions is not None
    assert worm.positions.tolist() == [[7, 8, 9], [1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voxels": False}, r"worm\.nwb: no places of the neurons, the table 'Neurons' has the columns .*positions=\.\.\."),
        ({"spacing": None}, "grid_spacing of the imaging volume is None"),
        ({"unit": "furlongs"}, "grid_spacing_unit is 'furlongs', expected micrometers or meters"),
        (
            {"series": ()},
            "no activity, expected a RoiResponseSeries in the processing module CalciumActivity; modules: Calcium",
        ),
        ({"series": ("ReferenceTraces",)}, "no activity"),
        ({"series": ("a", "b")}, "several activities .*CalciumActivity/a/a, CalciumActivity/b/b"),
    ],
)
def test_bad_files(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recording(build(tmp_path / "worm.nwb", **options))


def test_gaps_are_named(tmp_path: Path) -> None:
    data = np.zeros((4, 3))
    data[2, 1] = np.nan
    path = build(tmp_path / "worm.nwb", labels=["AVAL", "AVAR", "AVBL"], data=data)
    with pytest.raises(ValueError, match=r"the trace of 'AVAL' \(column 1\) is nan at time step 2"):
        read_recording(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "worm.nwb"
    with pytest.raises(FileNotFoundError):
        read_recording(path)
    (tmp_path / "folder.nwb").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.nwb"):
        read_recording(tmp_path / "folder.nwb")
    for content in (b"", b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"worm\.nwb: no readable NWB file"):
            read_recording(path)
    whole = build(tmp_path / "whole.nwb").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"worm\.nwb: no readable NWB file"):
        read_recording(path)


@pytest.mark.parametrize("rows", [[2, 0, -1], [2, 0, 3]])
def test_regions_that_the_table_does_not_have(rows: list[int], tmp_path: Path) -> None:
    path = build(tmp_path / "worm.nwb")
    with h5py.File(path, "r+") as file:
        file["processing/CalciumActivity/SignalRawFluor/rois"][:] = rows
    with pytest.raises(ValueError, match=r"worm\.nwb: no readable NWB file .*rois") as caught:
        read_nwb(path)
    assert len(str(caught.value)) < 500


def test_traces_of_an_absurd_shape_take_no_memory(tmp_path: Path) -> None:
    path = build(tmp_path / "worm.nwb")
    with h5py.File(path, "r+") as file:
        series = file["processing/CalciumActivity/SignalRawFluor"]
        attributes = dict(series["data"].attrs)
        del series["data"]
        series.create_dataset("data", shape=(2**40, 3), chunks=(2**10, 3), dtype="f8").attrs.update(attributes)
    with pytest.raises(ValueError, match=r"worm\.nwb: SignalRawFluor has shape \(1099511627776, 3\), expected at most"):
        read_nwb(path)


def test_damage_that_shows_when_traces_are_read(tmp_path: Path) -> None:
    path = build(tmp_path / "worm.nwb", data=np.arange(30_000.0).reshape(10_000, 3))
    with h5py.File(path, "r+") as file:
        series = file["processing/CalciumActivity/SignalRawFluor"]
        values, attributes = series["data"][:], dict(series["data"].attrs)
        del series["data"]
        series.create_dataset("data", data=values, chunks=(10_000, 3), compression="gzip").attrs.update(attributes)
        place = series["data"].id.get_chunk_info(0)
    with path.open("r+b") as raw:
        raw.seek(place.byte_offset)
        raw.write(b"\xff" * place.size)
    with pytest.raises(ValueError, match=r"worm\.nwb: no readable NWB file"):
        read_nwb(path)


def test_without_pynwb_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynwb", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-gs\[nwb\]'"):
        read_recording(tmp_path / "worm.nwb")


def test_writing_needs_positions(tmp_path: Path) -> None:
    worm = recording()
    bare = Recording(worm.name, worm.traces, worm.labels, worm.identities)
    with pytest.raises(ValueError, match="recording 'worm' has no positions"):
        write_nwb(tmp_path / "worm.nwb", bare)

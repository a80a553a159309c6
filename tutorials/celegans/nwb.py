"""Recordings in NWB files, as the NeuroPAL community publishes them on DANDI. Needs the extra ``nwb`` (pynwb)."""

from __future__ import annotations

import datetime
import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutorials.celegans.recordings import Recording, known_identity
from tutorials.file_sizes import LARGEST

__all__ = ["read_nwb", "write_nwb"]

_LABEL_COLUMNS = ("ID_labels", "ROI ids", "labels", "label", "neuron", "name")
_MICROMETRES = {
    "um": 1.0,
    "µm": 1.0,
    "micron": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "m": 1e6,
    "meter": 1e6,
    "metre": 1e6,
}


def _pynwb() -> Any:
    try:
        import pynwb
    except ImportError:
        raise ImportError("NWB files need pynwb, which is not installed: pip install 'pyro-gs[nwb]'") from None
    return pynwb


def read_nwb(path: str | Path, *, need_positions: bool = True) -> tuple[Tensor, list[str], Tensor | None]:
    """Read traces, labels and places from an NWB file, with pynwb alone.

    Expected is what Dandisets such as 000776 hold: the processing module ``CalciumActivity`` (or any other) with
    a ``RoiResponseSeries``, by itself or in a ``DfOverF`` or ``Fluorescence``. If there are several, a ``DfOverF``
    goes first, then one named after a signal; those named after a reference are left out.

    - Labels: ``labels`` of an object ``NeuronIDs`` in that module, one a region; else a column ``ID_labels``,
      ``ROI ids``, ``labels``, ``label``, ``neuron`` or ``name`` of the table of regions. Without, all are unknown.
    - Places: ``voxel_mask`` of the table of regions (``PlaneSegmentation`` of NWB or ``VolumeSegmentation`` of
      ndx-multichannel-volume), whose weighted centre times ``grid_spacing`` of its imaging plane or volume counts; else
      columns ``x``, ``y``, ``z``, taken as micrometres.

    The types of ndx-multichannel-volume are read through the specification that each file carries; the package is
    not needed. Colours are not read, since such files hold them in the image only.

    Args:
        path: The file.
        need_positions: Whether a file without places is refused.

    Returns:
        Traces (T + 1, m), labels, and places (m, 3) in micrometres or None.

    Raises:
        ValueError: If it is no NWB file, or holds no activity or, where needed, no places.
        ImportError: If pynwb is not installed.
    """
    path = Path(path)
    pynwb = _pynwb()
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        io = pynwb.NWBHDF5IO(str(path), "r", load_namespaces=True)
    except Exception as error:
        raise ValueError(f"{path.name}: no readable NWB file ({_short(error)})") from None
    with io:
        try:
            return _read(path, io.read(), need_positions)
        except Exception as error:  # pynwb and h5py raise what they meet on their way; data are read late
            if str(error).startswith(f"{path.name}: "):
                raise
            raise ValueError(f"{path.name}: no readable NWB file ({_short(error)})") from None


def _short(error: Exception) -> str:
    """Beginning and end of a message; pynwb puts whole parts of the file between them."""
    text = str(error)
    return text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"


def _read(path: Path, nwb: Any, need_positions: bool) -> tuple[Tensor, list[str], Tensor | None]:
    module, series = _activity(path, nwb)
    for name, data in ((series.name, series.data), (series.rois.name, series.rois.data)):
        if math.prod(np.shape(data)) * np.dtype(np.float64).itemsize > LARGEST:
            raise ValueError(f"{path.name}: {name} has shape {np.shape(data)}, expected at most {LARGEST} bytes")
    table, regions = series.rois.table, np.asarray(series.rois.data[:], dtype=np.int64)
    traces = np.asarray(series.data[:], dtype=np.float64)
    if traces.ndim != 2 or traces.shape[1] != len(regions):
        raise ValueError(
            f"{path.name}: {series.name} has shape {traces.shape}, expected (time steps, {len(regions)}), a column for "
            "each region"
        )
    labels = _labels(path, module, table, regions)
    positions = _positions(path, table, regions) if need_positions else None
    return torch.from_numpy(traces), labels, None if positions is None else torch.from_numpy(positions)


def _activity(path: Path, nwb: Any) -> tuple[Any, Any]:
    """The processing module and the series to read."""
    found = [(module, *pair) for module in nwb.processing.values() for pair in _series(module)]
    inside = [item for item in found if item[0].name == "CalciumActivity"] or found
    signal = [item for item in inside if "reference" not in f"{item[1].name} {item[2].name}".lower()]
    for chosen in (
        [item for item in signal if item[1].neurodata_type == "DfOverF"],
        [item for item in signal if "signal" in f"{item[1].name} {item[2].name}".lower()],
        signal,
    ):
        if len(chosen) == 1:
            return chosen[0][0], chosen[0][2]
    if not signal:
        modules = ", ".join(nwb.processing) or "none"
        raise ValueError(
            f"{path.name}: no activity, expected a RoiResponseSeries in the processing module CalciumActivity; "
            f"modules: {modules}"
        )
    names = ", ".join(f"{item[0].name}/{item[1].name}/{item[2].name}" for item in signal)
    raise ValueError(f"{path.name}: several activities ({names}), expected one that is a DfOverF or named after a signal")


def _series(module: Any) -> Iterator[tuple[Any, Any]]:
    for item in module.data_interfaces.values():
        if item.neurodata_type == "RoiResponseSeries":
            yield item, item
        elif item.neurodata_type in ("DfOverF", "Fluorescence"):
            for series in item.roi_response_series.values():
                yield item, series


def _labels(path: Path, module: Any, table: Any, regions: np.ndarray) -> list[str]:
    listed = module.data_interfaces.get("NeuronIDs")
    if listed is not None and getattr(listed, "labels", None) is not None:
        raw = listed.labels[:]
        if len(raw) != len(regions) and len(raw) == len(table):
            raw = [raw[i] for i in regions]
    else:
        column = next((name for name in _LABEL_COLUMNS if name in table.colnames), None)
        raw = [""] * len(regions) if column is None else [table[column][int(i)] for i in regions]
    if len(raw) != len(regions):
        raise ValueError(f"{path.name}: NeuronIDs holds {len(raw)} labels for {len(regions)} traces, expected one for each")
    words = [_word(label) for label in raw]
    # Unnamed neurons often share an empty label: number them.
    return [
        f"?{m + 1}"
        if known_identity(word) is None and (not word or words.count(word) > 1 or word.lower() == "nan")
        else word
        for m, word in enumerate(words)
    ]


def _word(label: Any) -> str:
    """A label as text; files hold it as text, as bytes or as a list of characters."""
    if isinstance(label, bytes):
        return label.decode().strip()
    return "".join(map(str, label)).strip() if isinstance(label, (list, np.ndarray)) else str(label).strip()


def _positions(path: Path, table: Any, regions: np.ndarray) -> np.ndarray:
    hint = "; or give the places as a CSV (--positions, positions=...)"
    if "voxel_mask" in table.colnames:
        voxels = np.array([_center(table["voxel_mask"][int(i)]) for i in regions])
        places: np.ndarray = voxels * _spacing(path, table, hint)
        return places
    if all(axis in table.colnames for axis in "xyz"):
        return np.array([[float(table[axis][int(i)]) for axis in "xyz"] for i in regions])
    columns = ", ".join(table.colnames) or "none"
    raise ValueError(
        f"{path.name}: no places of the neurons, the table {table.name!r} has the columns {columns}; expected voxel_mask, "
        f"or x, y, z{hint}"
    )


def _center(mask: Any) -> np.ndarray:
    """Weighted centre of a voxel mask, which is one (x, y, z, weight) or a list of them."""
    voxels = np.array([tuple(voxel) for voxel in np.atleast_1d(np.asarray(mask))], dtype=np.float64)
    voxels = voxels.reshape(-1, 4)
    weights = voxels[:, 3] if voxels[:, 3].sum() > 0 else np.ones(len(voxels))
    return np.asarray(np.average(voxels[:, :3], axis=0, weights=weights))


def _spacing(path: Path, table: Any, hint: str) -> np.ndarray:
    """Micrometres a voxel along x, y, z."""
    volume = getattr(table, "imaging_plane", None)
    if volume is None:
        volume = getattr(table, "imaging_volume", None)
    spacing = None if volume is None else getattr(volume, "grid_spacing", None)
    if spacing is None or len(spacing) != 3:
        shown = None if spacing is None else list(spacing)
        raise ValueError(f"{path.name}: grid_spacing of the imaging volume is {shown}, expected the size of a voxel{hint}")
    unit = str(getattr(volume, "grid_spacing_unit", None) or "meters").lower()
    scale = _MICROMETRES.get(unit, _MICROMETRES.get(unit.rstrip("s")))
    if scale is None:
        raise ValueError(f"{path.name}: grid_spacing_unit is {unit!r}, expected micrometers or meters{hint}")
    return scale * np.asarray(spacing[:], dtype=np.float64)


def write_nwb(path: str | Path, recording: Recording, *, rate: float = 4.0, voxel: float = 0.1) -> None:
    """Write a recording as a plain NWB file that `read_nwb` reads: what the example and the tests need.

    Args:
        path: The file.
        recording: With places, which are moved into the positive octant and rounded to voxels. Colours are left out.
        rate: Time steps a second.
        voxel: Edge of a voxel, in micrometres.

    Raises:
        ValueError: If the recording has no places.
        ImportError: If pynwb is not installed.
    """
    if recording.positions is None:
        raise ValueError(f"recording {recording.name!r} has no positions, expected a place for each neuron")
    _pynwb()
    from pynwb import NWBHDF5IO, NWBFile
    from pynwb.ophys import DfOverF, ImageSegmentation, OpticalChannel

    start = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)
    nwb = NWBFile(
        session_description="simulated calcium activity of C. elegans", identifier=recording.name, session_start_time=start
    )
    plane = nwb.create_imaging_plane(
        name="CalciumImVol",
        optical_channel=OpticalChannel(name="GCaMP", description="activity", emission_lambda=525.0),
        description="volume",
        device=nwb.create_device(name="simulation"),
        excitation_lambda=488.0,
        indicator="GCaMP",
        location="whole worm",
        grid_spacing=[voxel] * 3,
        grid_spacing_unit="micrometers",
    )
    module = nwb.create_processing_module(name="CalciumActivity", description="activity of segmented neurons")
    segmentation = ImageSegmentation(name="CalciumSeriesSegmentation")
    module.add(segmentation)
    table = segmentation.create_plane_segmentation(description="one row a neuron", imaging_plane=plane, name="Neurons")
    table.add_column(name="ID_labels", description="names given by a human, or ? and a number")
    voxels = ((recording.positions - recording.positions.amin(0)) / voxel).round().long().tolist()
    for label, (x, y, z) in zip(recording.labels, voxels, strict=True):
        table.add_roi(voxel_mask=[(x, y, z, 1.0)], ID_labels=label)
    region = table.create_roi_table_region(description="all neurons", region=list(range(len(voxels))))
    activity = DfOverF(name="DfOverF")
    module.add(activity)
    activity.create_roi_response_series(
        name="SignalDFoF", data=recording.traces.numpy(), unit="a.u.", rois=region, rate=rate
    )
    with NWBHDF5IO(str(path), "w") as io:
        io.write(nwb)

"""Recordings of real worms: traces, labels, places and colours, read from CSV, ``.npz`` or NWB."""

from __future__ import annotations

import difflib
import math
import re
import zipfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tutorials.celegans.connectome import normalize_name
from tutorials.celegans.csv_table import read_table, refuse_repeated, table_number
from tutorials.file_sizes import check_size, check_unpacked

__all__ = ["Recording", "known_identity", "read_recording"]

_ARRAYS = ("traces", "labels", "positions", "colors", "channels")
_WORD = 100  # letters of a label that close ones are looked for; the time grows with their square
_UNNAMED = re.compile(r"|\?.*|.*\?|[0-9]+|nan", re.IGNORECASE)


def known_identity(label: str) -> str | None:
    """The neuron that a label names, or None where it names none.

    A label that is empty, a whole number, ``nan``, or starts or ends with ``?`` names none.

    Args:
        label: As in a file.

    Returns:
        The name as `normalize_name` spells it. Whether such a neuron exists is not looked at.

    Example:
        >>> known_identity("DA01"), known_identity("?7"), known_identity("AVAL?"), known_identity("12")
        ('DA1', None, None, None)
    """
    return None if _UNNAMED.fullmatch(label.strip()) else normalize_name(label)


def _close(word: str, words: Iterable[str]) -> str:
    upper = {other.upper(): other for other in sorted(words)}
    return (
        ", ".join(upper[match] for match in difflib.get_close_matches(word[:_WORD].upper(), upper, n=3, cutoff=0.5))
        or "none"
    )


@dataclass(frozen=True, eq=False)
class Recording:
    """One worm: m neurons over T + 1 time steps, some of them named.

    Attributes:
        name: Of the recording, in messages and tables.
        traces: Shape (T + 1, m), float64, finite: activity, in any unit, at even time steps.
        labels: The m neurons as the file calls them, each once.
        identities: The name of each neuron where it is known, normalized, no name twice; None where it is not.
        positions: Shape (m, 3), float64: places in micrometres, in any frame; or None.
        colors: Shape (m, c), float64: intensity in each colour channel; or None.
        channels: The c channels by name, or None.
        dropped: Labels that the file has and that were left out.
    """

    name: str
    traces: Tensor
    labels: tuple[str, ...]
    identities: tuple[str | None, ...]
    positions: Tensor | None = None
    colors: Tensor | None = None
    channels: tuple[str, ...] | None = None
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the fields are usable and fit one another."""
        if self.traces.dim() != 2 or self.traces.dtype != torch.float64 or 0 in self.traces.shape:
            raise ValueError(
                f"{self.name}: traces have shape {tuple(self.traces.shape)} and dtype {self.traces.dtype}, "
                "expected float64 of shape (time steps, neurons)"
            )
        times, m = self.traces.shape
        if times < 2:
            raise ValueError(f"{self.name}: {times} time steps, expected at least 2")
        for field, values in (("labels", self.labels), ("identities", self.identities)):
            if len(values) != m:
                raise ValueError(f"{self.name}: {len(values)} {field} for {m} traces, expected one for each")
            refuse_repeated(self.name, [value for value in values if value is not None])
        bad = (~self.traces.isfinite()).nonzero()
        if len(bad):
            step, neuron = bad[0].tolist()
            raise ValueError(
                f"{self.name}: the trace of {self.labels[neuron]!r} (column {neuron}) is "
                f"{self.traces[step, neuron].item()} at time step {step} ({len(bad)} such values in all), expected finite "
                "numbers; interpolate the gaps, or leave the neuron out"
            )
        if self.channels is not None and (self.colors is None or self.colors.shape[-1] != len(self.channels)):
            raise ValueError(f"{self.name}: {len(self.channels)} channels, expected as many as colors has columns")
        for field, tensor, width in (("positions", self.positions, 3), ("colors", self.colors, None)):
            if tensor is None:
                continue
            expected = (m, width if width else tensor.shape[-1])
            if tuple(tensor.shape) != expected or tensor.dtype != torch.float64:
                raise ValueError(
                    f"{self.name}: {field} have shape {tuple(tensor.shape)} and dtype {tensor.dtype}, "
                    f"expected ({m}, {width or 'channels'}) and float64"
                )
            if not bool(tensor.isfinite().all()):
                row = int((~tensor.isfinite()).any(1).nonzero()[0])
                raise ValueError(
                    f"{self.name}: {field} of {self.labels[row]!r} are {tensor[row].tolist()}, expected finite numbers"
                )

    def __repr__(self) -> str:
        """Give the sizes in place of the traces."""
        known = sum(name is not None for name in self.identities)
        return f"Recording({self.name!r}, neurons={len(self.labels)}, known={known}, time_steps={len(self.traces)})"

    def without(self, labels: Collection[str]) -> Recording:
        """Leave out neurons, such as those that the connectome does not have.

        Args:
            labels: Of the neurons to leave out, as the file spells them.

        Raises:
            ValueError: If a label is none of the recording's.
        """
        for label in labels:
            if label not in self.labels:
                raise ValueError(f"labels: {label!r} is no label of {self.name}, close ones: {_close(label, self.labels)}")
        keep = [i for i, label in enumerate(self.labels) if label not in labels]
        return Recording(
            self.name,
            self.traces[:, keep],
            tuple(self.labels[i] for i in keep),
            tuple(self.identities[i] for i in keep),
            None if self.positions is None else self.positions[keep],
            None if self.colors is None else self.colors[keep],
            self.channels,
            (*self.dropped, *labels),
        )


def read_recording(
    path: str | Path,
    *,
    positions: str | Path | None = None,
    known_names: Sequence[str] | None = None,
    drop: Collection[str] = (),
) -> Recording:
    """Read one recording, of a kind told by the ending of its name.

    - ``.csv``: a header of labels, then a row a time step, with a column a neuron.
    - ``.npz``: arrays ``traces`` (T + 1, m) and ``labels`` (m,); ``positions`` (m, 3), ``colors`` (m, c) and
      ``channels`` (c,) if known.
    - ``.nwb``: as `tutorials.celegans.nwb.read_nwb` describes; needs the extra ``nwb``.

    A label that is the name of a neuron gives its identity (`known_identity`); one that starts or ends with ``?``, is
    empty or is a whole number does not.

    Args:
        path: The file.
        positions: A second CSV with the columns ``label``, ``x``, ``y``, ``z`` (micrometres) and, if wanted, one for
            each colour channel; a row for each trace. Replaces the places and colours of the first file.
        known_names: The labels to trust. None trusts all that are names; the others become unknown.
        drop: Labels that are not read, such as those of a column of times or of a trace with gaps. A label that the
            files do not have is passed over.

    Returns:
        The recording, named after the file.

    Raises:
        ValueError: If a file is not as described; the message says where.
        FileNotFoundError: If there is none.
        ImportError: If an NWB file is given and pynwb is not installed.
    """
    path = Path(path)
    colors: Tensor | None = None
    channels: tuple[str, ...] | None = None
    places: Tensor | None = None
    dropped: list[str] = []
    kind = path.suffix.lower()
    if kind == ".csv":
        traces, labels, dropped = _read_traces(path, drop)
    elif kind == ".npz":
        traces, labels, places, colors, channels = _read_npz(path)
    elif kind == ".nwb":
        from tutorials.celegans.nwb import read_nwb

        traces, labels, places = read_nwb(path, need_positions=positions is None)
    else:
        raise ValueError(f"path={str(path)!r}: expected a name that ends with .csv, .npz or .nwb")
    keep = [m for m, label in enumerate(labels) if label not in drop]
    dropped += [label for label in labels if label in drop]
    labels, traces = [labels[m] for m in keep], traces[:, keep]
    places, colors = (None if values is None else values[keep] for values in (places, colors))
    identities = [known_identity(label) for label in labels]
    if known_names is not None:
        trusted = {normalize_name(name) for name in known_names}
        for name in sorted(trusted - set(identities)):
            close = _close(name, {identity for identity in identities if identity})
            raise ValueError(f"known_names: {name!r} is no label of {path.name}, close ones: {close}")
        identities = [identity if identity in trusted else None for identity in identities]
    if positions is not None:
        places, colors, channels = _read_positions(Path(positions), labels, drop)
    return Recording(path.stem, traces, tuple(labels), tuple(identities), places, colors, channels, tuple(dropped))


def _read_traces(path: Path, drop: Collection[str]) -> tuple[Tensor, list[str], list[str]]:
    """Traces and labels of a CSV, without those to drop, and the labels dropped."""
    labels, rows = read_table(path)
    kept = [m for m, label in enumerate(labels) if label not in drop]
    try:
        values = [[table_number(path, line, labels[m], row[m]) for m in kept] for line, row in rows]
    except ValueError as error:
        raise ValueError(
            f"{error}: a row a time step, a column a neuron; interpolate gaps, or drop the column (--drop, drop=...)"
        ) from None
    if len(rows) < len(kept) and all(re.fullmatch(r"[0-9]+", labels[m]) for m in kept):
        raise ValueError(
            f"{path.name}: {len(kept)} columns without a name and {len(rows)} rows, which are neurons in rows perhaps; "
            "expected a row a time step, a column a neuron: transpose it, or label the neurons ?1, ?2, ..."
        )
    dropped = [label for label in labels if label in drop]
    return torch.tensor(values, dtype=torch.float64), [labels[m] for m in kept], dropped


def _read_npz(path: Path) -> tuple[Tensor, list[str], Tensor | None, Tensor | None, tuple[str, ...] | None]:
    check_size(path)
    with path.open("rb") as handle:
        try:
            with zipfile.ZipFile(handle) as archive:
                check_unpacked(archive)
                found = [name.removesuffix(".npy") for name in archive.namelist()]
                arrays = {key: _read_array(archive, f"{key}.npy") for key in _ARRAYS if key in found}
        except Exception as error:  # zipfile, the decompressors and NumPy raise what they meet on their way
            raise ValueError(
                f"{path.name}: no readable .npz of plain arrays, cut off perhaps ({error}); labels have to be text, "
                "np.array(labels, dtype=str)"
            ) from None
    for key in ("traces", "labels"):
        if key not in arrays:
            raise ValueError(f"{path.name}: no array {key!r}, only {sorted(found)}; expected 'traces' and 'labels'")
    numbers = {}
    for key in ("traces", "positions", "colors"):
        if key in arrays:
            if arrays[key].dtype.kind not in "fiu":
                raise ValueError(f"{path.name}: {key!r} has dtype {arrays[key].dtype}, expected numbers")
            numbers[key] = torch.from_numpy(arrays[key].astype(np.float64))
    texts = {}
    for key in ("labels", "channels"):
        if key in arrays:
            if arrays[key].ndim != 1:
                raise ValueError(f"{path.name}: {key!r} has shape {arrays[key].shape}, expected one dimension")
            if arrays[key].dtype.kind not in "USfiu":
                raise ValueError(f"{path.name}: {key!r} has dtype {arrays[key].dtype}, expected text")
            try:
                text = np.char.decode(arrays[key], "utf-8") if arrays[key].dtype.kind == "S" else arrays[key]
            except UnicodeDecodeError as error:
                raise ValueError(f"{path.name}: {key!r} holds no UTF-8 ({error}), expected text") from None
            texts[key] = [str(word).strip() for word in text]
    m = len(texts["labels"])
    for key, expected, fits in (
        ("traces", f"(time steps, {m})", lambda shape: len(shape) == 2 and shape[1] == m),
        ("positions", f"({m}, 3)", lambda shape: shape == (m, 3)),
        ("colors", f"({m}, channels)", lambda shape: len(shape) == 2 and shape[0] == m),
    ):
        if key in numbers and not fits(tuple(numbers[key].shape)):
            raise ValueError(
                f"{path.name}: {key!r} has shape {tuple(numbers[key].shape)}, expected {expected} for {m} labels; "
                "transpose it if it is turned round"
            )
    channels = tuple(texts["channels"]) if "channels" in texts else None
    return numbers["traces"], texts["labels"], numbers.get("positions"), numbers.get("colors"), channels


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of numbers or text, after its announced shape has been held against the bytes there are."""
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} has the format version {version}, expected (1, 0) or (2, 0)")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
        size, announced = archive.getinfo(name).file_size - member.tell(), math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects")
    if size != announced:
        raise ValueError(f"{name} announces {announced} bytes, of shape {shape}, and has {size}")
    with archive.open(name) as member:
        return np.asarray(np.lib.format.read_array(member, allow_pickle=False))


def _read_positions(
    path: Path, labels: Sequence[str], drop: Collection[str]
) -> tuple[Tensor, Tensor | None, tuple[str, ...] | None]:
    header, rows = read_table(path)
    missing = [column for column in ("label", "x", "y", "z") if column not in header]
    if missing:
        raise ValueError(f"{path.name}: no column {', '.join(missing)}; expected label, x, y, z, then colours if any")
    columns = ["x", "y", "z", *(column for column in header if column not in ("label", "x", "y", "z"))]
    found: dict[str, list[float]] = {}
    for line, row in rows:
        cells = dict(zip(header, row, strict=True))
        if cells["label"] in drop:
            continue
        if cells["label"] in found:
            raise ValueError(f"{path.name}: row {line} gives {cells['label']!r} a second time, expected each label once")
        if cells["label"] not in labels:
            raise ValueError(
                f"{path.name}: row {line} places {cells['label']!r}, which has no trace, close labels: "
                f"{_close(cells['label'], labels)}; spell it as there, or drop it (--drop, drop=...)"
            )
        found[cells["label"]] = [table_number(path, line, column, cells[column]) for column in columns]
    absent = [label for label in labels if label not in found]
    if absent:
        raise ValueError(
            f"{path.name}: no row for {', '.join(absent[:5])} ({len(absent)} in all), expected one a trace; add it, or drop "
            "the trace (--drop, drop=...)"
        )
    table = torch.tensor([found[label] for label in labels], dtype=torch.float64)
    return table[:, :3], (table[:, 3:] if len(columns) > 3 else None), (tuple(columns[3:]) or None)

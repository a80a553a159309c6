"""Files that are read, each with a way to write a good one, and what may have become of them on their way to us."""

import dataclasses
import gzip
import io
import json
import os
import pickle
import struct
from collections.abc import Callable

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from tutorials.celegans.nwb import write_nwb
from tutorials.celegans.recordings import Recording, read_recording
from tutorials.pictures.folders import celeba
from tutorials.pictures.idx import read_idx
from tutorials.pictures.sources import Files
from tutorials.records import read_log
from tutorials.training import load_checkpoint, train

TRACES = np.arange(12.0).reshape(4, 3)
LABELS = ("?1", "AVAL", "AVAR")


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


class Fit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.at = torch.nn.Parameter(torch.zeros(3))

    def forward(self, generator, share):
        return (self.at - torch.rand(3, generator=generator)).square().sum()


def table(header, rows):
    return "".join(",".join(map(str, row)) + "\n" for row in [header, *rows]).encode()


def saved(function, *args, **kwargs):
    """What a function writes to a file that it is given."""
    buffer = io.BytesIO()
    function(buffer, *args, **kwargs)
    return buffer.getvalue()


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _pixels(kind):
    image = Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3))
    return lambda folder: saved(image.save, kind)


def _checkpoint(folder):
    path = folder / "good.pt"
    train(Fit(), 2, path=path, seed=0, settings={"n": 3})
    return path.read_bytes()


def _resumed(path):
    return train(Fit(), 2, path=path, seed=0, settings={"n": 3})


def _neurodata(folder):
    path, places = folder / "good.nwb", torch.rand(3, 3, dtype=torch.float64)
    write_nwb(path, Recording("good", torch.from_numpy(TRACES), LABELS, (None, *LABELS[1:]), places))
    return path.read_bytes()


def _places(path):
    recording = path.with_suffix(".recording.csv")
    recording.write_bytes(table(LABELS, TRACES))
    return read_recording(recording, positions=path)


def _partition(path):
    (path.parent / "img_align_celeba").mkdir(exist_ok=True)
    for name in ("1.jpg", "2.jpg"):
        (path.parent / "img_align_celeba" / name).touch()
    return celeba(path.parent, "train").paths


@dataclasses.dataclass(frozen=True)
class Reader:
    """What reads a file of a name; ``good`` gives the content of one that it reads."""

    name: str
    good: Callable
    read: Callable

    def __str__(self):
        return self.name


READERS = [
    Reader("traces.csv", lambda folder: table(LABELS, TRACES), read_recording),
    Reader("places.csv", lambda folder: table(["label", *"xyz"], [(label, 1, 2, 3) for label in LABELS]), _places),
    Reader("worm.npz", lambda folder: saved(np.savez, traces=TRACES, labels=np.array(LABELS)), read_recording),
    Reader("packed.npz", lambda folder: saved(np.savez_compressed, traces=TRACES, labels=np.array(LABELS)), read_recording),
    Reader("worm.nwb", _neurodata, read_recording),
    Reader("images-idx3-ubyte", lambda folder: idx(np.ones((2, 4, 4), np.uint8)), lambda path: read_idx(path, 3)),
    Reader("labels-idx1-ubyte.gz", lambda folder: gzip.compress(idx(np.ones(5, np.uint8))), lambda path: read_idx(path, 1)),
    Reader("list_eval_partition.txt", lambda folder: b"1.jpg 0\n2.jpg 1\n", _partition),
    *(
        Reader(f"picture.{kind}", _pixels(kind), lambda path: Files([path], 4).draw(1, torch.Generator()))
        for kind in ("png", "jpeg", "tiff", "webp")
    ),
    Reader(
        "jobs.jsonl",
        lambda folder: b"".join(json.dumps({"key": key, "status": "done", "x": 1.5}).encode() + b"\n" for key in "ab"),
        read_log,
    ),
    Reader("network.pt", _checkpoint, lambda path: load_checkpoint(path, torch.device("cpu"))),
    Reader("resumed.pt", _checkpoint, _resumed),
]
"""All that reads files from outside."""


@st.composite
def contents(draw, good, made):
    """What a file may hold in place of what it should."""
    kind = draw(st.sampled_from(["cut", "flipped", "flipped", "joined", "random", "pickle", "zeros", "wide", "empty"]))
    if kind == "cut":
        return good[: draw(st.integers(0, len(good) - 1))]
    if kind == "flipped":
        changed = bytearray(good)
        for _ in range(draw(st.integers(1, 8))):
            changed[draw(st.integers(0, len(good) - 1))] = draw(st.sampled_from([0, 255, 128]) | st.integers(0, 255))
        return bytes(changed)
    if kind == "joined":
        place = draw(st.integers(0, len(good)))
        return good[:place] + draw(st.binary(max_size=40) | st.just(b"\0" * 8) | st.just(b'"' * 9)) + good[place:]
    if kind == "random":
        return draw(st.binary(max_size=400))
    if kind == "pickle":
        return draw(st.sampled_from([pickle.dumps(Payload(made)), saved(_save_payload, made)]))
    if kind == "zeros":
        return b"\0" * draw(st.sampled_from([1, 1000, 200_000]))
    if kind == "wide":
        return draw(st.sampled_from([b"7", b"a,", b"[", b"1 "])) * 200_000 + draw(st.sampled_from([b"", b"\n"]))
    return b""


def _save_payload(file, made):
    torch.save({"settings": Payload(made)}, file)

"""Hostile files: each is read as it is or refused by a ValueError that names it, and nothing in it is run.

``--hostile N`` tries N contents for every kind of file.
"""

import math
import warnings

import pytest
import torch
from hostile_files import READERS, contents
from hypothesis import given
from hypothesis import strategies as st
from trials import bounded, trials

pytestmark = pytest.mark.usefixtures("float64_only")


def finite(value):
    """Whether all numbers that were read are finite."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all()) if value.is_floating_point() else True
    if isinstance(value, dict):
        return finite(list(value.values()))
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_read_or_refused_by_name(reader, request, tmp_path):
    tried, made = request.config.hostile_tried, tmp_path / "made"
    path = tmp_path / reader.name
    good = reader.good(tmp_path)
    path.write_bytes(good)
    reader.read(path)

    @trials(request)
    @given(st.data())
    def check(data):
        path.write_bytes(data.draw(contents(good, made)))
        result, refusal = None, None
        try:
            with bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = reader.read(path)
        except ValueError as error:
            refusal = str(error)
        tried["answered" if refusal is None else "refused"] += 1
        if refusal is None:
            assert finite(getattr(result, "traces", result))
        else:
            assert path.stem in refusal  # of a recording's name, which is that of the file
            assert len(refusal) < 2000, "a message as long as the file"
        assert not made.exists(), "code in the file was run"

    check()

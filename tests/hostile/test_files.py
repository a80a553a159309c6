"""Hostile files: each is read as it is or refused by a ValueError that names it, and nothing in it is run.

``--hostile N`` tries N contents for every kind of file.
"""

import math
import signal
import warnings

import pytest
import torch
from hostile_files import READERS, contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile import SECONDS, hung

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

    @settings(
        max_examples=request.config.getoption("--hostile"),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        path.write_bytes(data.draw(contents(good, made)))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = reader.read(path)
        except ValueError as error:
            tried["refused"] += 1
            assert path.stem in str(error)  # of a recording's name, which is that of the file
            assert len(str(error)) < 2000, "a message as long as the file"
        else:
            tried["answered"] += 1
            assert finite(getattr(result, "traces", result))
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        assert not made.exists(), "code in the file was run"

    previous = signal.signal(signal.SIGVTALRM, hung)
    try:
        check()
    finally:
        signal.signal(signal.SIGVTALRM, previous)

import json
import math

import pytest

from tutorials.records import Records, read_log

GOOD = {"key": "a", "status": "done", "x": 1.0}


@pytest.mark.parametrize(
    "line",
    [
        b'{"key": "b", "status": "done", "x": NaN}',
        b'{"key": "b", "status": "done", "x": [-Infinity]}',
        b'{"key": ["b"], "status": "done"}',
        b'{"key": "b", "status": null}',
        b"[" * 100_000,
        b'{"key": "b", "status": "done", "name": "\xff"}',
        b"\0",
    ],
)
def test_lines_that_are_no_record(line, tmp_path):
    log = tmp_path / "jobs.jsonl"
    log.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"jobs\.jsonl, line 2: expected a record in JSON with key and status, got"):
        read_log(log)


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with Records(tmp_path) as records:
        records.append(GOOD)
        with pytest.raises(ValueError, match="not JSON compliant"):
            records.append(GOOD | {"key": "b", "x": [math.inf]})
    assert read_log(tmp_path / "jobs.jsonl") == {"a": GOOD}

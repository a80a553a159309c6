"""The tutorial, from top to bottom at its smallest size, in a process of its own."""

import page_runs
import pytest


@pytest.mark.usefixtures("float64_only")
def test_it_runs_and_draws_its_pictures(tmp_path):
    out = page_runs.printed("tutorials.celegans.identify", tmp_path, pictures=5)
    for words in (
        "candidates a neuron",
        "by the prior",
        "plain SVI",
        "with exchanges and restarts",
        "total variation",
        "are right",
    ):
        assert words in out

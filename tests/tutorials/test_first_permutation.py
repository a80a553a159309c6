"""The first tutorial, from top to bottom at its smallest size, in a process of its own."""

import re

import page_runs
import pytest

MODULE = "tutorials.first_permutation"


@pytest.mark.usefixtures("float64_only")
def test_it_runs_and_draws_its_pictures(tmp_path):
    out = page_runs.printed(MODULE, tmp_path, pictures=6)
    assert re.search(r"log evidence -\d+\.\d+", out)
    for word in ("exact", "swaps", "vi + mcmc", "HMCGibbs", "2.65253e+32 permutations", "expected calibration error"):
        assert word in out


def test_its_page_has_the_length_of_a_page():
    assert 600 <= page_runs.words(MODULE) <= 1500

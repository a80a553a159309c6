"""The first tutorial, from top to bottom at its smallest size."""

import re

import pytest
from page_runs import count_words, run_quick


@pytest.mark.usefixtures("float64_only")
def test_it_runs_and_draws_its_pictures(tmp_path):
    printed = run_quick("first_permutation", tmp_path, pictures=6)
    assert re.search(r"log evidence -\d+\.\d+", printed)
    for word in ("exact", "swaps", "vi + mcmc", "HMCGibbs", "2.65253e+32 permutations", "expected calibration error"):
        assert word in printed


def test_its_page_has_the_length_of_a_page():
    assert 600 <= count_words("first_permutation") <= 1500

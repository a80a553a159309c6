"""The tutorial on tracking, from top to bottom at its smallest size, in a process of its own."""

import re

import page_runs
import pytest

MODULE = "tutorials.tracking"


@pytest.mark.usefixtures("float64_only")
def test_it_runs_draws_its_pictures_and_says_what_is_true_at_any_size(tmp_path):
    out = page_runs.printed(MODULE, tmp_path, pictures=5)
    together, alone = map(float, re.search(r"together (\S+) nats, sum of each alone (\S+)", out).groups())
    assert 0 < together < alone  # subadditive, strictly where frames depend on each other
    distances = dict(re.findall(r"(\w+): (\S+) from the exact marginals", out))
    assert distances.keys() == {"exact", "tempering", "swaps", "SVI"}
    assert float(distances.pop("exact")) == 0
    assert all(0 < float(distance) < 1 for distance in distances.values())
    rights = {name: float(right) for name, right in re.findall(r"([\w ]+): (\S+) of the detections right", out)}
    assert rights.keys() == {"nearest neighbour", "frame by frame", "SVI", "MCMC"}
    # detections of one of nine sources; a tracker that mixed up rows or columns would be right one time in nine
    assert all(right > 0.5 for right in rights.values())


def test_its_page_has_the_length_of_a_page():
    assert 600 <= page_runs.words(MODULE) <= 1300

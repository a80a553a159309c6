"""The tutorial on record linkage, from top to bottom at its smallest size, in a process of its own."""

import re

import page_runs
import pytest

MODULE = "tutorials.linkage"


@pytest.mark.usefixtures("float64_only")
def test_it_runs_draws_its_pictures_and_says_what_is_true_at_any_size(tmp_path):
    out = page_runs.printed(MODULE, tmp_path, pictures=3)
    first, second, both = map(int, re.search(r"(\d+) and (\d+) records, (\d+) people in both", out).groups())
    assert 0 < both < min(first, second)
    table = re.findall(r"^(\S.*?) +(\d+) links, precision (\S+), recall (\S+)$", out, re.MULTILINE)
    scores = {name: (int(links), float(precision), float(recall)) for name, links, precision, recall in table}
    for links, precision, recall in scores.values():
        assert precision * links == pytest.approx(recall * both, abs=0.1)  # both count the right links; three digits
        assert precision > 0.5  # of about five records of a town one is right
    above = [scores[f"MCMC, above {threshold}"][0] for threshold in (0.1, 0.5, 0.9, 0.99)]
    assert above == sorted(above, reverse=True)
    assert scores["MCMC, above 0.5"] == scores["MCMC"]
    assert len(re.findall(r"calibration error 0\.\d{3}", out)) == 4


def test_its_page_has_the_length_of_a_page():
    assert 600 <= page_runs.words(MODULE) <= 1300

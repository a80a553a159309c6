"""The tutorial on rankings, from top to bottom at its smallest size."""

import re

import page_runs
import pytest


@pytest.mark.usefixtures("float64_only")
def test_it_runs_and_prints_what_it_says(tmp_path):
    printed = page_runs.printed("tutorials.ranking", tmp_path, pictures=5)
    # products of factorials of the tie groups, counted by hand: grades 2 3 3 4 4 4 5 5 leave 1! 2! 3! 2! orders
    assert "grades of each judge leave open: 24 8 16 144 720 24 96 144 24" in printed
    assert "marks of each judge leave open: 1 1 1 1 2 1 1 1 2" in printed
    means = re.findall(r"^(marks|grades, \w+|ties broken by number) +(-?[\d.]+) \+- [\d.]+ +-?[\d.]+ \+-", printed, re.M)
    assert [name for name, _ in means] == [
        "marks",
        "grades, summed",
        "ties broken by number",
        "grades, HMCGibbs",
        "grades, SVI",
    ]
    distances = re.findall(r"(Gumbel-Sinkhorn|Plackett-Luce): total variation .* ([\d.]+)$", printed, re.M)
    assert len(distances) == 2
    assert all(0 < float(distance) < 1 for _, distance in distances)


def test_its_page_has_the_length_of_a_page():
    assert 600 <= page_runs.words("tutorials.ranking") <= 1300

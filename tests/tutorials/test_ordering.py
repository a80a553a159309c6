"""The tutorial on causal orders, from top to bottom at its smallest size."""

import re

import page_runs
import pytest


@pytest.mark.usefixtures("float64_only")
def test_it_runs_and_prints_what_it_says(tmp_path):
    printed = page_runs.printed("tutorials.ordering", tmp_path, pictures=4)

    def number(pattern):
        return float(re.search(pattern + r" (-?[\d.e+-]+)", printed)[1])

    # the exact posterior prefers orders in which causes come first, and does not mind the columns' names
    assert number("all arrows point forward:") > 2 * number("of an order drawn blindly:")
    assert number("marginals differ by") < 1e-9
    # the relaxed likelihood is best where no order is
    assert number("centre of the polytope:") > number("largest of all orders:")
    raw, standardised = (float(x) for x in re.findall(r"(?:raw|standardised): posterior ([\d.]+)", printed))
    assert raw > standardised + 0.1
    assert "straight-through" in printed
    assert "not run" not in printed


def test_its_page_has_the_length_of_a_page():
    assert 600 <= page_runs.words("tutorials.ordering") <= 1300

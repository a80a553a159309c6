"""The ranges of versions in pyproject.toml, and the files of constraints that the tests run with."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def requirements():
    """What the package depends on, extras included."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    return [Requirement(text) for text in project["dependencies"]], [Requirement(text) for text in extras]


def pins(name, python):
    """Versions that a file of constraints asks for, with one version of Python."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    found = [pin for pin in found if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len({pin.name for pin in found}) == len(found)
    return {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in found}


def test_the_lowest_versions_are_those_of_the_ranges():
    needed, _ = requirements()
    floors = {each.name: next(part.version for part in each.specifier if part.operator == ">=") for each in needed}
    lowest = pins("constraints-lowest.txt", "3.10")
    assert {name: version.removesuffix(".0") for name, version in lowest.items()} == floors


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_interpreter_has_lowest_versions_in_range(python):
    needed, _ = requirements()
    lowest = pins("constraints-lowest.txt", python)
    assert set(lowest) == {each.name for each in needed}
    assert all(each.specifier.contains(lowest[each.name]) for each in needed)


def test_pinned_versions_are_in_range():
    needed, extras = requirements()
    pinned = pins("constraints.txt", f"{sys.version_info.major}.{sys.version_info.minor}")
    found = [each for each in [*needed, *extras] if each.name.lower() in pinned]
    assert {each.name for each in needed} <= {each.name for each in found}
    assert all(each.specifier.contains(pinned[each.name.lower()]) for each in found)

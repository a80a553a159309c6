import importlib
import inspect
import re
from pathlib import Path

import pytest

import pyro_gs

PAGES = Path(__file__).parents[1] / "docs" / "reference"
DIRECTIVE = re.compile(r"^\.\. auto(class|function|exception|module):: (\S+)$", re.MULTILINE)


def documented():
    return [name for page in sorted(PAGES.glob("*.md")) for _, name in DIRECTIVE.findall(page.read_text())]


def public():
    names = [f"pyro_gs.{name}" for name in pyro_gs.__all__ if name not in ("constraints", "nn")]
    modules = ["pyro_gs.distributions.constraints", "pyro_gs.plotting"]
    return [*names, *modules, *(f"pyro_gs.nn.{name}" for name in pyro_gs.nn.__all__)]


def lookup(path):
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def test_every_public_name_has_its_place():
    names = documented()
    assert len(names) == len(set(names))
    assert set(public()) <= set(names)
    # the others are what public functions take and return; they are imported from their modules
    assert all(name.count(".") > 1 for name in set(names) - set(public()))


@pytest.mark.parametrize("name", documented())
def test_every_documented_object_has_a_docstring(name):
    found = lookup(name)
    text = inspect.getdoc(found) or ""
    assert text, name
    if inspect.isclass(found):
        own = {key: value for key, value in vars(found).items() if not key.startswith("_") and inspect.isfunction(value)}
        missing = [key for key, value in own.items() if not inspect.getdoc(getattr(found, key))]
        assert not missing, f"{name}: {missing}"


@pytest.mark.parametrize("name", public())
def test_every_public_object_has_an_example(name):
    found = lookup(name)
    if inspect.ismodule(found):
        return
    assert ">>> " in inspect.getdoc(found)


def test_the_lists_are_sorted_and_right():
    for module in (pyro_gs, pyro_gs.nn):
        assert module.__all__ == sorted(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)

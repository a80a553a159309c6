"""Fixtures for all tests: dtype, seeds, Pyro's validation and parameter store."""

import collections
import os

import pyro
import pytest
import torch

import pyro_gs  # noqa: F401 - whole, or pytest runs a module whose doctests are asked for alone twice

# The machines that run this have two cores; small matrices gain nothing from threads, and waiting for one costs much, where
# other programs have the cores very much. In the processes that tests start too.
torch.set_num_threads(int(os.environ.get("PYRO_GS_TEST_THREADS", "1")))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Scripts that run from top to bottom when they are imported; tests/tutorials and tests/packaging run them.
_PAGES = ["first_permutation", "tracking", "linkage", "ranking", "ordering", "celegans/identify"]
collect_ignore = [*(f"tutorials/{page}.py" for page in _PAGES), "noxfile.py"]
collect_ignore += ["tests/packaging/smoke.py", "tests/packaging/downstream.py"]


def pytest_addoption(parser):
    parser.addoption("--dtype", choices=["float32", "float64"], default="float64", help="torch's default dtype")
    parser.addoption("--hostile", type=int, default=25, help="hostile inputs for each public function, see tests/hostile")


def pytest_configure(config):
    config.hostile_tried = collections.Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A process of ``-n`` is through: add what it tried."""
    node.config.hostile_tried.update(getattr(node, "workeroutput", {}).get("hostile_tried", {}))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["hostile_tried"] = dict(session.config.hostile_tried)


def pytest_terminal_summary(terminalreporter, config):
    tried = config.hostile_tried
    if tried:
        terminalreporter.write_line(f"hostile inputs: {tried.total()} tried, {dict(tried)}")


def _adam_follows_parameters():
    """Whether torch's Adam counts its steps on the device of the parameters; torch 2.4 does on the default device."""
    with torch.device("meta"):
        parameter = torch.zeros(1, device="cpu", requires_grad=True)
        parameter.grad = torch.zeros(1, device="cpu")
        try:
            torch.optim.Adam([parameter]).step()
        except RuntimeError:
            return False
    return True


def pytest_collection_modifyitems(config, items):
    if any("meta/cpu" in item.name for item in items) and not _adam_follows_parameters():
        skip = pytest.mark.skip(reason="this torch's Adam asks the default device for memory")
        for item in items:
            if "meta/cpu" in item.name:
                item.add_marker(skip)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def dtype(request):
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture(autouse=True)
def _clean_state(request, dtype):
    # Doctests show what a user sees: torch's own default dtype.
    is_doctest = type(request.node).__name__ == "DoctestItem"
    torch.set_default_dtype(torch.float32 if is_doctest else dtype)
    torch.manual_seed(0)
    pyro.clear_param_store()
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def tol(dtype):
    """Absolute tolerance for results that are exact up to rounding of the dtype."""
    return 1e-9 if dtype == torch.float64 else 2e-5


@pytest.fixture
def float64_only(dtype):
    """Skip under ``--dtype float32``: the test compares digits that float32 does not have."""
    if dtype != torch.float64:
        pytest.skip("float64 only")

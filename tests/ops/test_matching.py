import importlib
import itertools
import os
import subprocess
import sys
import threading
import types
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pyro_gs import matching, to_index, to_matrix

ops = importlib.import_module("pyro_gs.ops.matching")


@pytest.fixture(params=["scipy", "lapx"])
def solver(request, monkeypatch):
    """Runs a test with each solver of one item; lapx only where it is installed."""
    if request.param == "scipy":
        monkeypatch.setattr(ops, "_lapx_solver", lambda: None)
    elif ops._lapx_solver() is None:
        pytest.skip("lapx is not installed")
    return request.param


@pytest.fixture
def three_threads(monkeypatch):
    """Lets three threads share even a small batch."""
    monkeypatch.setattr(ops, "_THREADED_ENTRIES", 0)
    monkeypatch.setattr(ops, "_THREADED_N", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def brute_force(scores):
    best = max(itertools.permutations(range(len(scores))), key=lambda p: sum(float(scores[i, j]) for i, j in enumerate(p)))
    return torch.tensor(best)


def test_is_the_best_permutation_of_each_item_of_a_batch():
    scores = torch.randn(3, 2, 5, 5)
    index = to_index(matching(scores))
    assert index.shape == (3, 2, 5)
    for item in itertools.product(range(3), range(2)):
        assert torch.equal(index[item], brute_force(scores[item]))


def test_keeps_dtype_shape_and_convention():
    scores = torch.randn(4, 4, dtype=torch.float16)
    P = matching(scores)
    assert P.dtype == torch.float16
    x = torch.randn(4, 2)
    assert torch.equal(P.to(x) @ x, x[to_index(P)])


def test_inner_product_scores():
    # Case 5 of the users' reports: M at any temperature, and negative entries are fine.
    scores = torch.outer(torch.tensor([1.0, 4.0, 9.0]), torch.tensor([7.0, 2.0, 5.0]))
    for shift in (0.0, -1000.0):
        assert to_index(matching(scores + shift)).tolist() == [1, 2, 0]


def test_matching_of_a_permutation_is_itself():
    P = to_matrix(torch.randperm(7))
    assert torch.equal(matching(P), P)


def test_a_forbidden_pair_is_never_matched():
    scores = torch.tensor([[5.0, -torch.inf], [1e6, 4.0]])
    assert to_index(matching(scores)).tolist() == [0, 1]


def test_infeasible_item_is_named_with_its_rows():
    scores = torch.zeros(2, 3, 3)
    scores[1, :2, 1:] = -torch.inf
    with pytest.raises(
        ValueError, match=r"logits of batch item 1 allows no permutation: the 2 rows \[0, 1\] may take only column 0"
    ):
        matching(scores)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), ValueError, "logits has the entry nan at row 0, column 1"),
        (torch.tensor([[0.0, 0.0], [torch.inf, 0.0]]), ValueError, "logits has the entry inf at row 1, column 0"),
        (torch.zeros(2, 3), ValueError, "logits must be square"),
        (torch.zeros(3), ValueError, "logits must be square"),
        (torch.zeros(2, 2, dtype=torch.long), TypeError, "logits must have a floating dtype"),
        ([[0.0]], TypeError, "logits must be a torch.Tensor"),
    ],
)
def test_bad_input(value, error, text):
    with pytest.raises(error, match=text):
        matching(value)


def draw(kind, batch, n):
    scores = torch.randn(batch, n, n, dtype=torch.float64)
    allowed = torch.rand(batch, n, n) < 0.3
    allowed.scatter_(-1, torch.stack([torch.randperm(n) for _ in range(batch)])[..., None], True)
    return {
        "normal": scores,
        "tied": scores.round(),
        "masked": scores.masked_fill(~allowed, -torch.inf),
        "tied and masked": scores.round().masked_fill(~allowed, -torch.inf),
        "huge": scores * 1e300,
        "huge and masked": (scores * 1e300).masked_fill(~allowed, -torch.inf),
        "of all magnitudes": scores * 10.0 ** torch.randint(-10, 11, scores.shape),
        "nearly equal": 1e6 + 1e-6 * scores,
    }[kind]


def exact_sum(row):
    return sum(map(Fraction, row)) if min(row) > -float("inf") else -float("inf")


def weights(scores, index):
    """Total weight of every item, without rounding."""
    picked = scores.gather(-1, index[..., None])[..., 0]
    assert torch.isfinite(picked).all(), "a forbidden pair is matched"
    return [exact_sum(row) for row in picked.tolist()]


def assert_equal_but_for_rounding(found, best, scores):
    tolerance = Fraction(1e-15) * scores.shape[-1] * Fraction(float(scores[scores.isfinite()].abs().max()))
    assert len(found) == len(best)
    assert max(abs(a - b) for a, b in zip(found, best, strict=True)) <= tolerance


KINDS = ["normal", "tied", "masked", "tied and masked", "huge", "huge and masked", "of all magnitudes", "nearly equal"]


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_the_largest_of_all_permutations(kind, solver):
    scores = draw(kind, 30, 5)
    permutations = torch.tensor(list(itertools.permutations(range(5))))
    totals = (scores.gather(-1, p.expand(30, 5)[..., None])[..., 0].tolist() for p in permutations)
    best = [max(rows) for rows in zip(*([exact_sum(row) for row in rows] for rows in totals), strict=True)]
    assert_equal_but_for_rounding(weights(scores, to_index(matching(scores))), best, scores)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_that_of_scipy(kind, solver):
    for n in (1, 2, 3, 40):
        scores = draw(kind, 12, n)
        scipy = torch.stack([torch.from_numpy(linear_sum_assignment(x.numpy(), maximize=True)[1]) for x in scores])
        assert_equal_but_for_rounding(weights(scores, to_index(matching(scores))), weights(scores, scipy), scores)


@pytest.mark.parametrize("fill", [-1e300, torch.finfo(torch.float64).min])
def test_large_finite_penalties_are_as_good_as_forbidding(fill, solver):
    scores = draw("masked", 20, 12)
    assert torch.equal(matching(scores.clamp_min(fill)), matching(scores))


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 11])
def test_threads_give_the_same_answer(batch, solver, three_threads, monkeypatch):
    scores = draw("masked", batch, 6)
    seen = set()
    real = ops.raise_infeasible, linear_sum_assignment, ops._lapx_solver()

    def record(call):
        def recorded(*args, **kwargs):
            seen.add(threading.get_ident())
            return call(*args, **kwargs)

        return recorded

    monkeypatch.setattr("scipy.optimize.linear_sum_assignment", record(real[1]))
    if solver == "lapx":
        recorded = record(real[2])
        monkeypatch.setattr(ops, "_lapx_solver", lambda: recorded)
    found = to_index(matching(scores))
    assert (threading.get_ident() in seen) == (batch == 1)
    assert torch.equal(found, torch.stack([to_index(matching(x)) for x in scores]))


def test_infeasible_item_in_the_middle_of_a_batch_is_named(solver, three_threads):
    scores = draw("normal", 11, 4).reshape(1, 11, 4, 4)
    for item in (5, 6, 10):  # the first of several, of different threads too
        scores[0, item, :3, 2:] = -torch.inf
    text = (
        r"logits of batch item \(0, 5\) allows no permutation: the 3 rows \[0, 1, 2\] may take only the 2 columns \[0, 1\]"
    )
    with pytest.raises(ValueError, match=text):
        matching(scores)


def test_item_that_lapx_gives_up_on_is_left_to_scipy(monkeypatch):
    def gives_up(*args, **kwargs):
        raise ValueError("reduced costs overflow")

    monkeypatch.setattr(ops, "_lapx_solver", lambda: gives_up)
    scores = draw("normal", 4, 5)
    assert torch.equal(to_index(matching(scores)), torch.stack([brute_force(x) for x in scores]))


FORKED = """
import os, signal, sys
import torch
import pyro_gs.ops.matching as ops
from pyro_gs import matching
if sys.argv[1] == "scipy":
    ops._lapx_solver = lambda: None
ops._THREADED_ENTRIES = 0
torch.set_num_threads(3)
scores = torch.randn(8, 20, 20)  # too small for torch to start threads of its own
first = matching(scores)
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(0 if torch.equal(matching(scores), first) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_forked_after_a_call_can_call_too(solver):
    # Threads that outlived the first call would be missing in the child, which would wait for them.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", FORKED, solver], env=env, cwd=Path(__file__).parents[2], check=True, timeout=120)


def test_other_packages_of_the_name_of_lapx_are_not_used(monkeypatch):
    for module in (None, types.ModuleType("lap")):  # not installed; the package lap
        monkeypatch.setitem(sys.modules, "lap", module)
        assert ops._lapx_solver.__wrapped__() is None
    module.lapjvr_batch = print
    assert ops._lapx_solver.__wrapped__() is print


def test_empty_batch(solver, three_threads):
    assert matching(torch.zeros(0, 3, 3)).shape == (0, 3, 3)


def test_index_and_matrix_are_inverse():
    index = torch.stack([torch.randperm(6) for _ in range(4)]).reshape(2, 2, 6)
    assert torch.equal(to_index(to_matrix(index)), index)


def test_index_errors():
    with pytest.raises(ValueError, match="batch item 1 is not a permutation of 0, ..., 2"):
        to_matrix(torch.tensor([[0, 1, 2], [0, 0, 2]]))
    with pytest.raises(TypeError, match="index must be an integer tensor"):
        to_matrix(torch.zeros(3))
    with pytest.raises(ValueError, match="P of batch item 0 is not a permutation matrix"):
        to_index(torch.full((1, 2, 2), 0.5))


@pytest.mark.cuda
def test_stays_on_the_device():
    assert matching(torch.randn(2, 5, 5, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64])
def test_index_of_any_integer_dtype(kind):
    assert torch.equal(to_matrix(torch.tensor([1, 0, 2]).to(kind)), torch.eye(3)[[1, 0, 2]])

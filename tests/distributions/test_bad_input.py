"""Bad arguments and values of every law: an exception that names the argument, its value and what was expected.

It comes from the constructor, before anything is computed, whether or not validation is on; for bad values, from
``log_prob``. Every parameter of every public law is in the table, which the first test counts. A case is a bad argument,
the exception, and literal parts of its message, which begins with the argument's name.
"""

import inspect

import pyro
import pytest
import torch
from dist_fixture import FIXTURES

from pyro_gs import (
    GibbsMatching,
    GibbsPermutation,
    GumbelMatching,
    GumbelSinkhorn,
    GumbelSinkhornStraightThrough,
    Mallows,
    PlackettLuce,
    RelaxedPlackettLuce,
    RoundingPermutation,
    SparseGumbelSinkhorn,
    StickBreakingPermutation,
    UniformPermutation,
)
from pyro_gs.distributions.relaxed import plain

INF, NAN = float("inf"), float("nan")
TO_FLOAT = "must have dtype torch.float32 or torch.float64, but has "


def put(shape, value, *at):
    out = torch.zeros(shape)
    out[at] = value
    return out


def entries(position, *values):
    """A batch (2, 3, 3), or (2, 3) for vectors, with one bad entry each."""
    shape, at = ((2, 3, 3), (1, 0, 2)) if "row" in position else ((2, 3), (1, 2))
    return [(put(shape, v, *at), ValueError, "of batch item 1", "must be finite", str(v), position) for v in values]


def dtypes(shape):
    kinds = (torch.int64, torch.bool, torch.float16, torch.complex64)
    return [(torch.zeros(shape).to(kind), TypeError, f"{TO_FLOAT}{kind}") for kind in kinds]


def no_tensors(expected):
    return [(v, TypeError, expected, type(v).__name__) for v in ([[0.0]], None, 1.0, "X", torch.zeros(3, 3).numpy())]


def shapes(expected, *bad):
    return [(torch.zeros(shape), ValueError, expected, f"has shape {shape}") for shape in bad]


SQUARE = [(2, 3), (3,), (), (2, 0, 0), (3, 2, 3)]
LOGITS = [
    *entries("at row 0, column 2", NAN, INF),
    (put((2, 3, 3), -INF, 1, 0), ValueError, "of batch item 1 allows no permutation: the row 0 may take no column"),
    (
        put((2, 3, 3), -INF, 1, slice(None), 0),
        ValueError,
        "of batch item 1 allows no permutation: the 3 rows [0, 1, 2] may take only the 2 columns [1, 2]",
    ),
    (
        torch.tensor([[0.0, -INF, -INF], [0.0, -INF, -INF], [0.0, 0.0, 0.0]]),
        ValueError,
        "allows no permutation: the 2 rows [0, 1] may take only column 0",
    ),
    *shapes("must be square in its last two dimensions", *SQUARE),
    *dtypes((3, 3)),
    *no_tensors("must be a torch.Tensor of shape (..., n, n)"),
]
LOC = [
    *entries("at row 0, column 2", NAN, INF, -INF),
    *shapes("must be square in its last two dimensions", *SQUARE),
    *dtypes((3, 3)),
    *no_tensors("must be a torch.Tensor of shape (..., n, n)"),
]
SCORES = [
    *entries("at position 2", NAN, INF, -INF),
    *shapes("must have shape (..., n) with n >= 1", (), (2, 0)),
    *dtypes((3,)),
    *no_tensors("must be a torch.Tensor of shape (..., n)"),
]
TO_MATRIX = "pass pyro_gs.to_matrix(index)"
CENTER = [
    (torch.full((2, 3, 3), 1 / 3), ValueError, "of batch item 0 is not a permutation matrix; every row", TO_MATRIX),
    *[
        (bad, ValueError, "is not a permutation matrix; every row and column must hold a single 1", TO_MATRIX)
        for bad in (torch.full((3, 3), NAN), torch.full((3, 3), INF), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    ],
    *shapes("must be a permutation matrix of shape (..., n, n)", *SQUARE),
    *[(torch.eye(3).to(k), TypeError, f"{TO_FLOAT}{k}") for k in (torch.int64, torch.bool, torch.float16)],
    *no_tensors("must be a permutation matrix of shape (..., n, n)"),
]
N = [
    *[(v, ValueError, f"must be at least 1, but is {v}") for v in (0, -1)],
    *[(v, TypeError, f"must be an integer, but is {v!r}") for v in (3.0, True, None, "3", torch.tensor(3))],
]
ALLOWED = [
    *[(torch.ones(3, 3).to(k), TypeError, f"must be a boolean tensor, but is {k}") for k in (torch.float32, torch.int64)],
    *[(v, TypeError, f"must be a boolean tensor, but is {type(v).__name__}") for v in ([[True]], 1.0)],
    *[
        (torch.ones(shape).bool(), ValueError, f"must have shape (..., 3, 3) for n=3, but has shape {shape}")
        for shape in ((2, 2), (3,), (2, 3))
    ],
    (put((2, 3, 3), 1.0, 0).bool(), ValueError, "of batch item 1 allows no permutation: the row 0 may take no column"),
]
NORMALIZER = [(v, ValueError, "must be one of exact, bethe", f"but is {v!r}") for v in ("x", None, 1)]
AT_MOST_1 = [(v, ValueError, "must be at most 1 for", "but is 2.0") for v in (2.0, torch.tensor([1.0, 2.0]))]


def number(expected, zero=True):
    """A number or a tensor of numbers, for a law of batch shape (2,)."""
    bad = [(-1.5, "-1.5"), (NAN, "nan"), (INF, "inf"), (torch.tensor([1.0, NAN]), "nan at (1,)")]
    bad += [(0.0, "0.0"), (torch.tensor([1.0, 0.0]), "0.0 at (1,)")] if zero else []
    kinds = (torch.int64, torch.bool, torch.complex64)
    return [
        *[(value, ValueError, f"{expected}, but is {text}") for value, text in bad],
        *[(torch.ones(2).to(kind), TypeError, f"must have a floating dtype, but has {kind}") for kind in kinds],
        *[
            (value, TypeError, f"must be a number or a tensor, but is {type(value).__name__}")
            for value in ("1", None, True, [1.0, 2.0], 1j)
        ],
        (torch.ones(5), ValueError, "of shape (5,) does not broadcast with"),
    ]


def count(least):
    return [(v, ValueError, f"must be an integer of at least {least}, but is {v!r}") for v in (-1, 2.5, True, "a", None)]


POSITIVE = number("must be positive and finite")
SINKHORN = {"temperature": POSITIVE, "logits": LOGITS, "num_particles": count(0)}
TABLE = {
    GumbelSinkhorn: SINKHORN,
    GumbelSinkhornStraightThrough: SINKHORN,
    GumbelMatching: {"logits": LOGITS, "num_particles": count(2)},
    GibbsPermutation: {"logits": LOGITS, "normalizer": NORMALIZER},
    UniformPermutation: {"n": N, "allowed": ALLOWED},
    PlackettLuce: {"scores": SCORES},
    RelaxedPlackettLuce: {"temperature": POSITIVE, "scores": SCORES},
    Mallows: {"center": CENTER, "theta": number("must be at least 0 and finite", zero=False)},
    StickBreakingPermutation: {"temperature": POSITIVE, "loc": LOC, "scale": POSITIVE},
    RoundingPermutation: {"temperature": POSITIVE + AT_MOST_1, "loc": LOC, "scale": POSITIVE},
}
CASES = [
    pytest.param(law, name, *case[:2], case[2:], id=f"{law.__name__}-{name}-{position}")
    for law, parameters in TABLE.items()
    for name, cases in parameters.items()
    for position, case in enumerate(cases)
]
LAWS = list(TABLE)


def good(law, dtype=torch.float64):
    """Good arguments, of a law of n = 3 and batch shape (2,)."""
    matrices, vectors = torch.zeros(2, 3, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    given = {
        "temperature": 0.5,
        "logits": matrices,
        "scores": vectors,
        "n": 3,
        "allowed": torch.ones(2, 3, 3).bool(),
        "center": torch.eye(3, dtype=dtype).expand(2, 3, 3),
        "theta": 1.0,
        "loc": matrices[..., :2, :2] if law is StickBreakingPermutation else matrices,
        "scale": 1.0,
    }
    return {name: given[name] for name in TABLE[law] if name in given}


def test_the_table_has_every_parameter_of_every_law():
    # Two take logits of another shape; test_padding.py of the operators, test_gibbs_matching.py and
    # test_sparse_gumbel_sinkhorn.py try their arguments.
    assert set(TABLE) == {fixture.law for fixture in FIXTURES} - {GibbsMatching, SparseGumbelSinkhorn}
    for law, parameters in TABLE.items():
        assert set(parameters) == set(inspect.signature(law.__init__).parameters) - {"self", "validate_args"}
        made = law(**good(law))
        assert (made.batch_shape, made.event_shape) == ((2,), (3, 3))


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(("law", "name", "value", "error", "parts"), CASES)
def test_bad_argument(law, name, value, error, parts, validate):
    with pyro.validation_enabled(validate), pytest.raises(error) as info:
        law(**{**good(law), name: value})
    message = str(info.value)
    assert message.startswith(name)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("value", "text"), [(1e-60, "0.0"), (1e60, "inf")])
@pytest.mark.parametrize(
    ("law", "name"), [(law, name) for law in LAWS for name in ("temperature", "scale", "theta") if name in TABLE[law]]
)
def test_numbers_that_float32_rounds_away(law, name, value, text, as_tensor):
    given = good(law, torch.float32)
    given[name] = torch.tensor(value, dtype=torch.float64) if as_tensor else value
    if name == "theta" and value < 1:
        assert law(**given).log_prob(law(**given).sample()).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"{name} must be .* but is {text}"):
        law(**given)


@pytest.mark.parametrize(
    "value",
    [
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        "P",
        None,
        torch.eye(3).numpy(),
        torch.eye(4),
        torch.ones(3),
        torch.tensor(1.0),
        torch.ones(2, 3, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("law", LAWS)
def test_value_of_no_such_shape(law, value):
    law = law(**good(law))
    for checked in (law, law.expand((4, 2))):
        with pytest.raises(ValueError, match=r"value must have shape \(\.\.\., 3, 3\), but has"):
            checked.log_prob(value)


@pytest.mark.parametrize("law", LAWS)
def test_value_of_another_batch(law):
    law = law(**good(law))
    text = r"value of shape \(5, 3, 3\) does not broadcast with the batch shape \(2,\)"
    with pytest.raises(ValueError, match=text):
        law.log_prob(plain(law.sample())[0].expand(5, 3, 3))


@pytest.mark.parametrize("kind", [torch.complex64, torch.int64, torch.bool])
@pytest.mark.parametrize("law", LAWS)
def test_value_of_another_dtype(law, kind):
    law = law(**good(law))
    value = torch.eye(3).to(kind)
    if not law.has_rsample and kind != torch.complex64:  # permutations may be of any real dtype
        assert torch.equal(law.log_prob(value), law.log_prob(torch.eye(3)).to(law.log_prob(value).dtype))
        return
    with pytest.raises(TypeError, match=f"value must have .*dtype.*but has {kind}"):
        law.log_prob(value)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1.0])
@pytest.mark.parametrize("law", LAWS)
def test_value_with_a_bad_entry(law, bad):
    law = law(**good(law))
    value = plain(law.sample()).clone()
    value[1, 0] = bad
    if isinstance(law, RoundingPermutation) and bad == -1.0:  # whose values are real
        assert not law.log_prob(value).isnan().any()
        return
    # RoundingPermutation's transform calls its argument X
    with pytest.raises(ValueError, match="(value|X) of batch item 1 (is not|must be finite)"):
        law.log_prob(value)


@pytest.mark.parametrize(
    ("law", "name", "forbidden"),
    [(law, name, value) for law in LAWS for name, value in (("logits", -INF), ("allowed", False)) if name in TABLE[law]],
)
def test_value_on_a_forbidden_pair(law, name, forbidden):
    given = good(law)
    given[name] = given[name].clone()
    given[name][1, 0, 1] = forbidden
    law = law(**given)
    swap = torch.eye(3)[[1, 0, 2]]
    if not law.has_rsample:
        assert law.log_prob(swap).isfinite().tolist() == [True, False]
        return
    with pytest.raises(ValueError, match="value of batch item 1 .*expected zero where logits are -inf.*at row 0, column 1"):
        law.log_prob(torch.full((3, 3), 1 / 3))

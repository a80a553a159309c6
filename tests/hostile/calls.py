"""What is called with hostile tensors: each public function and law, with a strategy for every argument."""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable

from hostile_tensors import candidates, index_vectors, masks, permutations, plans, rectangles, squares, temperatures, vectors
from hypothesis import strategies as st

import pyro_gs as pgs
from pyro_gs import nn

PARTICLES = st.sampled_from([5, 30, 2, 1, 12])
COUNTS = st.sampled_from([None] * 4 + [(2, 1)] + [None] * 4)
RAISED = re.compile(r"^    (\w+): ", re.MULTILINE)


def documented(*objects):
    """Exceptions that the docstrings of objects list under ``Raises``."""
    names = set()
    for each in objects:
        section = (inspect.getdoc(each) or "").partition("\nRaises:\n")[2]
        lines = section.splitlines()
        end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
        names |= set(RAISED.findall("\n".join(lines[:end])))
    return names


@dataclasses.dataclass(frozen=True)
class Call:
    """A call and its arguments.

    ``raises``: objects whose docstrings say what may be raised. ``draws``: it uses the global generator. ``looks``: at
    values, so that no NaN passes.
    """

    name: str
    function: Callable
    arguments: dict
    raises: tuple
    draws: bool = False
    looks: bool = True

    def __str__(self):
        return self.name


def call(function, draws=False, looks=True, raises=(), **arguments):
    return Call(function.__qualname__, function, arguments, (function, *raises), draws, looks)


def law(family, **arguments):
    """Make a law, draw, score what was drawn and something else, ask for what it has."""

    def exercise(value, **parameters):
        made = family(**parameters)
        out = {}
        for name in ("marginals", "mode", "mean", "entropy", "temperature", "logits"):
            if name not in dir(made):
                continue
            with contextlib.suppress(NotImplementedError):  # torch's own, of what a law does not have
                got = getattr(made, name)
                out[name] = got() if callable(got) else got
        drawn = made.rsample((2,)) if made.has_rsample else made.sample((2,))
        out |= {"drawn": drawn, "log_prob": made.log_prob(drawn), "expanded": made.expand((2, *made.batch_shape)).sample()}
        out["other"] = made.log_prob(value) if value is not None else None
        return out

    exercise.__qualname__ = family.__name__
    arguments["value"] = st.none() | arguments.pop("value", permutations())
    return Call(family.__name__, exercise, arguments, (family, family.log_prob), draws=True)


CANDIDATES = {"logits": squares(), "candidates": candidates()}
unmatched = st.sampled_from([None, 0.0, -1.0] * 4 + [float("nan"), float("inf"), -float("inf"), "no"] + [30.0, 1.0, 0.0] * 4)
options = {"unmatched": unmatched, "capacities": COUNTS}
_INTS = st.sampled_from([1, 2, 3, 4] * 2 + [0, -1, 2.0, None] + [1, 2, 3, 4] * 2)
_PUSHED = {
    "temperature": temperatures(),
    "loc": squares(forbid=False),
    "scale": temperatures(),
    "value": squares(forbid=False),
}


def _kl(kl):
    def divergence(temperature, q, p, other):
        return kl(pgs.GumbelSinkhorn(temperature, q), pgs.GumbelSinkhorn(other, p))

    divergence.__qualname__ = kl.__name__
    arguments = {"temperature": temperatures(), "q": squares(), "p": squares(), "other": temperatures()}
    return Call(kl.__name__, divergence, arguments, (kl, pgs.GumbelSinkhorn))


def _transform(family, value, **arguments):
    def there_and_back(value, **parameters):
        transform = family(**parameters)
        y = transform(value)
        return y, transform.inv(y), transform.log_abs_det_jacobian(value, y)

    return Call(family.__name__, there_and_back, {"value": value, **arguments}, (family,))


def _layer(value, **options):
    return nn.SinkhornLayer(**options)(value)


CALLS = [
    call(pgs.sinkhorn, logits=squares(), temperature=temperatures(), raises=(pgs.log_sinkhorn,)),
    call(pgs.log_sinkhorn, logits=squares(), temperature=temperatures()),
    Call(
        "log_sinkhorn partial",
        pgs.log_sinkhorn,
        {"logits": rectangles(), "temperature": temperatures(), **options},
        (pgs.log_sinkhorn, pgs.pad_logits),
    ),
    Call(
        "log_sinkhorn sweeps",
        pgs.log_sinkhorn,
        {"logits": squares(), "temperature": temperatures(), "num_iters": st.sampled_from([1, 5, 20, 0, 2, 10])},
        (pgs.log_sinkhorn,),
    ),
    call(pgs.solve_sinkhorn, logits=squares(), row_sums=st.none() | vectors(), column_sums=st.none() | vectors()),
    call(pgs.matching, logits=squares()),
    Call("matching partial", pgs.matching, {"logits": rectangles(), **options}, (pgs.matching, pgs.pad_logits)),
    call(pgs.sparse_sinkhorn, **CANDIDATES, temperature=temperatures(), raises=(pgs.log_sparse_sinkhorn,)),
    call(pgs.log_sparse_sinkhorn, **CANDIDATES, temperature=temperatures()),
    call(pgs.sparse_matching, **CANDIDATES),
    call(pgs.to_sparse, logits=squares() | masks()),
    call(pgs.to_dense, values=squares(), candidates=candidates(), fill=st.sampled_from([0.0, -float("inf")]), looks=False),
    call(pgs.to_index, P=permutations() | squares()),
    call(pgs.to_matrix, index=index_vectors()),
    call(pgs.pad_logits, logits=rectangles(), **options),
    call(
        pgs.unpad,
        P=squares(forbid=False),
        shape=st.sampled_from([(1, 1), (2, 2), (2, 1), (0, 0), (9, 9), (1,), (1.5, 2)]),
        capacities=COUNTS,
        looks=False,
    ),
    call(pgs.log_permanent, logits=squares(), method=st.sampled_from(["exact", "bethe", "sinkhorn_lower", "best"])),
    call(pgs.log_permanent_bounds, logits=squares()),
    call(pgs.laplacian_logdet, log_p=plans(log=True) | squares()),
    call(pgs.laplacian_solve, log_p=plans(log=True), b=vectors()),
    call(pgs.kendall_distance, P=permutations(), Q=permutations()),
    law(pgs.GumbelSinkhorn, temperature=temperatures(), logits=squares(), value=plans() | squares()),
    law(pgs.GumbelSinkhornStraightThrough, temperature=temperatures(), logits=squares()),
    law(pgs.SparseGumbelSinkhorn, temperature=temperatures(), **CANDIDATES, value=plans() | squares()),
    law(pgs.GumbelMatching, logits=squares(), num_particles=PARTICLES),
    law(pgs.GibbsPermutation, logits=squares(), normalizer=st.sampled_from(["exact", "exact", "bethe", "none"])),
    law(pgs.GibbsMatching, logits=rectangles(), value=rectangles(), **options),
    law(pgs.UniformPermutation, n=_INTS, allowed=st.none() | masks()),
    law(pgs.PlackettLuce, scores=vectors()),
    law(pgs.RelaxedPlackettLuce, temperature=temperatures(), scores=vectors(), value=plans() | squares()),
    law(pgs.Mallows, center=permutations(), theta=temperatures()),
    law(pgs.RoundingPermutation, **_PUSHED),
    law(pgs.StickBreakingPermutation, **_PUSHED),
    _kl(pgs.gumbel_noise_kl),
    _kl(pgs.tightened_kl),
    _transform(pgs.BirkhoffTransform, vectors(), n=_INTS),
    _transform(pgs.RoundingTransform, squares(forbid=False), temperature=temperatures()),
    _transform(pgs.StickBreakingTransform, squares(forbid=False), temperature=temperatures()),
    call(pgs.reliability, marginals=plans(), truth=permutations(), bins=st.sampled_from([10, 1, 0, 2.5])),
    Call("summary of a tensor", lambda samples: pgs.summary({"P": samples}), {"samples": permutations()}, (pgs.summary,)),
    Call(
        "SinkhornLayer",
        _layer,
        {
            "value": squares(),
            "temperature": st.sampled_from([1.0, 0.1, 0.0, -1.0, float("nan"), "hot"]),
            "noise": st.sampled_from([0.0, 1.0, -1.0, float("nan")]),
            "hard": st.booleans(),
        },
        (nn.SinkhornLayer, nn.SinkhornLayer.forward),
        draws=True,
    ),
    call(nn.mask_logits, logits=squares(), mask=masks() | masks(square=False), looks=False),
    call(nn.cross_entropy, log_p=plans(log=True) | squares(), target=permutations()),
    call(nn.gumbel_matching_nll, logits=squares(), target=permutations(), num_particles=PARTICLES, draws=True),
    call(nn.reconstruction_loss, P=plans(), items=rectangles(), target=rectangles()),
    call(nn.assemble, P=plans(), items=rectangles()),
    call(nn.scramble, P=plans(), ordered=rectangles()),
]
"""The calls; `test_hostile.py` asks that no public name is left out."""

NOT_CALLED = {
    *("Comparison", "EnumeratedPosterior", "Reliability", "RoundedPosterior", "SinkhornSolution", "Swaps"),
    *("HardenMessenger", "IndexMessenger", "RelaxMessenger"),
    *("AnnealedSVI", "ConstantSchedule", "ExponentialSchedule", "LinearSchedule", "ScoreNetwork"),
    *("plot_reliability", "plot_trace", "register_hard_law", "register_relaxation"),
}
"""Public names that others return, stand behind or are given, and those that keep what they are given."""

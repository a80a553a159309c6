"""The laws that go through the generic suite, in the manner of Pyro's own ``tests/distributions/dist_fixture.py``."""

import dataclasses
from collections.abc import Callable

import torch

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
    to_sparse,
)

TRIDIAGONAL = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()
BLOCKS = torch.block_diag(torch.ones(1, 1), torch.ones(3, 3)).bool()
THREE = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
FULL = torch.ones(3, 3).bool()

SAMPLE, SCORE = frozenset(["sample"]), frozenset(["log_prob"])


@dataclasses.dataclass(frozen=True)
class Fixture:
    """A law and its parameters, drawn anew by every call of ``params``.

    ``exact``: log_prob is no estimate that varies from call to call. ``kl``: a KL divergence to another of the kind is
    registered. ``jit``: what torch.jit.trace can record.
    """

    name: str
    law: type
    params: Callable[[], dict]
    batch_shape: tuple = ()
    exact: bool = True
    kl: bool = True
    jit: frozenset = frozenset()

    def __str__(self):
        return self.name

    def make(self, dtype=None, device=None, **options):
        return self.law(**{name: _moved(value, dtype, device) for name, value in self.params().items()}, **options)


def _moved(value, dtype, device):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def masked(*masks):
    allowed = torch.stack(masks)
    return torch.randn(allowed.shape).masked_fill(~allowed, -torch.inf)


def sparse(*masks):
    logits, candidates = to_sparse(masked(*masks))
    return {"logits": logits, "candidates": candidates}


FIXTURES = [
    Fixture("GumbelSinkhorn", GumbelSinkhorn, lambda: {"temperature": torch.tensor(0.7), "logits": torch.randn(4, 4)}),
    Fixture(
        "GumbelSinkhorn batch",
        GumbelSinkhorn,
        lambda: {"temperature": torch.tensor([[0.5], [1.0], [2.0]]), "logits": torch.randn(2, 4, 4)},
        (3, 2),
    ),
    Fixture("GumbelSinkhorn n=1", GumbelSinkhorn, lambda: {"temperature": 1.0, "logits": torch.zeros(2, 1, 1)}, (2,)),
    Fixture("GumbelSinkhorn n=2", GumbelSinkhorn, lambda: {"temperature": 0.5, "logits": torch.randn(1, 2, 2)}, (1,)),
    Fixture("GumbelSinkhorn n=3", GumbelSinkhorn, lambda: {"temperature": 0.5, "logits": torch.randn(2, 3, 3)}, (2,)),
    Fixture(
        "GumbelSinkhorn own supports",
        GumbelSinkhorn,
        lambda: {"temperature": torch.tensor([1.0, 0.6]), "logits": masked(TRIDIAGONAL, BLOCKS)},
        (2,),
    ),
    Fixture(
        "GumbelSinkhorn importance sampling",
        GumbelSinkhorn,
        lambda: {"temperature": 1.0, "logits": torch.randn(2, 5, 5), "num_particles": 32},
        (2,),
        exact=False,
    ),
    Fixture(
        "GumbelSinkhornStraightThrough",
        GumbelSinkhornStraightThrough,
        lambda: {"temperature": torch.tensor([[0.5], [1.0]]), "logits": masked(TRIDIAGONAL, BLOCKS)},
        (2, 2),
    ),
    Fixture(
        "GumbelSinkhornStraightThrough n=1",
        GumbelSinkhornStraightThrough,
        lambda: {"temperature": 1.0, "logits": torch.zeros(1, 1)},
    ),
    Fixture("SparseGumbelSinkhorn", SparseGumbelSinkhorn, lambda: {"temperature": 0.7, **sparse(TRIDIAGONAL)}, (1,)),
    Fixture(
        "SparseGumbelSinkhorn own candidates",
        SparseGumbelSinkhorn,
        lambda: {"temperature": torch.tensor([[0.5], [1.0]]), **sparse(TRIDIAGONAL, BLOCKS)},
        (2, 2),
    ),
    Fixture(
        "SparseGumbelSinkhorn n=1",
        SparseGumbelSinkhorn,
        lambda: {"temperature": 1.0, "logits": torch.zeros(1, 1), "candidates": torch.zeros(1, 1, dtype=torch.long)},
    ),
    Fixture("GumbelMatching", GumbelMatching, lambda: {"logits": torch.randn(3, 3)}),
    Fixture("GumbelMatching own supports", GumbelMatching, lambda: {"logits": masked(THREE, FULL)}, (2,)),
    Fixture("GumbelMatching n=1", GumbelMatching, lambda: {"logits": torch.zeros(2, 1, 1)}, (2,), jit=SCORE),
    Fixture(
        "GumbelMatching estimate",
        GumbelMatching,
        lambda: {"logits": masked(TRIDIAGONAL), "num_particles": 100},
        (1,),
        exact=False,
    ),
    Fixture("GibbsPermutation", GibbsPermutation, lambda: {"logits": torch.randn(3, 1, 4, 4)}, (3, 1)),
    Fixture("GibbsPermutation own supports", GibbsPermutation, lambda: {"logits": masked(TRIDIAGONAL, BLOCKS)}, (2,)),
    Fixture("GibbsPermutation n=1", GibbsPermutation, lambda: {"logits": torch.zeros(1, 1)}),
    Fixture(
        "GibbsPermutation Bethe",
        GibbsPermutation,
        # equal entries in the component that is too large to be exact, so that drawing from it is quick
        lambda: {"logits": torch.block_diag(torch.ones(21, 21), masked(FULL)[0] + 9).log(), "normalizer": "bethe"},
        kl=False,
    ),
    Fixture("UniformPermutation", UniformPermutation, lambda: {"n": 4, "allowed": TRIDIAGONAL[None]}, (1,), jit=SCORE),
    Fixture(
        "UniformPermutation own supports",
        UniformPermutation,
        lambda: {"n": 4, "allowed": torch.stack([TRIDIAGONAL, BLOCKS])},
        (2,),
        jit=SCORE,
    ),
    Fixture("UniformPermutation full", UniformPermutation, lambda: {"n": 3, "allowed": FULL}, jit=SCORE),
    Fixture("UniformPermutation n=1", UniformPermutation, lambda: {"n": 1, "allowed": FULL[:1, :1]}, jit=SCORE),
    Fixture("PlackettLuce", PlackettLuce, lambda: {"scores": torch.randn(4)}, jit=SAMPLE | SCORE),
    Fixture("PlackettLuce batch", PlackettLuce, lambda: {"scores": torch.randn(3, 2, 4)}, (3, 2), jit=SAMPLE | SCORE),
    Fixture("PlackettLuce n=1", PlackettLuce, lambda: {"scores": torch.randn(2, 1)}, (2,), jit=SAMPLE | SCORE),
    Fixture(
        "RelaxedPlackettLuce",
        RelaxedPlackettLuce,
        lambda: {"temperature": torch.tensor([[0.2], [1.0], [2.0]]), "scores": torch.randn(2, 4)},
        (3, 2),
        jit=SAMPLE | SCORE,
    ),
    Fixture(
        "RelaxedPlackettLuce cold",
        RelaxedPlackettLuce,
        lambda: {"temperature": 0.01, "scores": torch.randn(2, 4)},
        (2,),
        jit=SAMPLE | SCORE,
    ),
    Fixture(
        "RelaxedPlackettLuce n=1",
        RelaxedPlackettLuce,
        lambda: {"temperature": 1.0, "scores": torch.randn(1)},
        jit=SAMPLE | SCORE,
    ),
    Fixture(
        "Mallows",
        Mallows,
        lambda: {"center": torch.eye(4).flip(0), "theta": torch.rand(2)},
        (2,),
        jit=SAMPLE | SCORE,
    ),
    Fixture(
        "Mallows at zero",
        Mallows,
        lambda: {"center": torch.eye(4), "theta": 0.0},
        jit=SAMPLE | SCORE,
    ),
    Fixture("Mallows n=1", Mallows, lambda: {"center": torch.eye(1), "theta": torch.rand(1)}, (1,), jit=SAMPLE | SCORE),
    Fixture(
        "StickBreakingPermutation",
        StickBreakingPermutation,
        lambda: {"temperature": torch.tensor([[0.5], [1.0]]), "loc": torch.randn(2, 3, 3), "scale": 0.2 + torch.rand(3, 3)},
        (2, 2),
        kl=False,
        jit=SAMPLE | SCORE,
    ),
    Fixture(
        "StickBreakingPermutation n=2",
        StickBreakingPermutation,
        lambda: {"temperature": torch.tensor(1.0), "loc": torch.randn(1, 1)},
        kl=False,
        jit=SAMPLE | SCORE,
    ),
    Fixture(
        "RoundingPermutation",
        RoundingPermutation,
        lambda: {
            "temperature": torch.tensor([[0.5], [0.9]]),
            "loc": torch.randn(2, 3, 3),
            "scale": torch.tensor([[[0.2]], [[1.0]]]),
        },
        (2, 2),
        kl=False,
    ),
    Fixture(
        "RoundingPermutation n=1",
        RoundingPermutation,
        lambda: {"temperature": 1.0, "loc": torch.randn(1, 1)},
        kl=False,
    ),
    Fixture(
        "GibbsMatching partial",
        GibbsMatching,
        lambda: {"logits": masked(FULL, THREE), "unmatched": torch.randn(2, 3)},
        (2,),
        kl=False,
    ),
    Fixture("GibbsMatching", GibbsMatching, lambda: {"logits": torch.randn(3, 1, 3, 3)}, (3, 1), kl=False),
]

"""The laws that go through the generic suite, in the manner of Pyro's own ``tests/distributions/dist_fixture.py``."""

import dataclasses
from collections.abc import Callable

import torch

from pyro_gs import (
    GumbelSinkhorn,
    Mallows,
    PlackettLuce,
    RelaxedPlackettLuce,
    UniformPermutation,
)

TRIDIAGONAL = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()
BLOCKS = torch.block_diag(torch.ones(1, 1), torch.ones(3, 3)).bool()


@dataclasses.dataclass
class Fixture:
    name: str
    make: Callable[[], object]
    batch_shape: tuple
    arg_shapes: dict

    def __str__(self):
        return self.name


def _masked(*masks):
    allowed = torch.stack(masks)
    return torch.randn(allowed.shape).masked_fill(~allowed, -torch.inf)


FIXTURES = [
    Fixture("plain", lambda: GumbelSinkhorn(0.7, torch.randn(4, 4)), (), {"temperature": (), "logits": (4, 4)}),
    Fixture(
        "batch",
        lambda: GumbelSinkhorn(torch.tensor([[0.5], [1.0], [2.0]]), torch.randn(2, 4, 4)),
        (3, 2),
        {"temperature": (3, 1), "logits": (2, 4, 4)},
    ),
    Fixture("n=1", lambda: GumbelSinkhorn(1.0, torch.zeros(2, 1, 1)), (2,), {"temperature": (), "logits": (2, 1, 1)}),
    Fixture("n=2", lambda: GumbelSinkhorn(0.5, torch.randn(2, 2, 2)), (2,), {"temperature": (), "logits": (2, 2, 2)}),
    Fixture("n=3", lambda: GumbelSinkhorn(0.5, torch.randn(2, 3, 3)), (2,), {"temperature": (), "logits": (2, 3, 3)}),
    Fixture(
        "forbidden pairs",
        lambda: GumbelSinkhorn(1.0, _masked(TRIDIAGONAL, BLOCKS)),
        (2,),
        {"temperature": (), "logits": (2, 4, 4)},
    ),
    Fixture(
        "importance sampling",
        lambda: GumbelSinkhorn(1.0, torch.randn(2, 5, 5), num_particles=32),
        (2,),
        {"temperature": (), "logits": (2, 5, 5)},
    ),
    Fixture("uniform", lambda: UniformPermutation(4, TRIDIAGONAL[None]), (1,), {"allowed": (1, 4, 4)}),
    Fixture(
        "uniform batch",
        lambda: UniformPermutation(4, torch.stack([TRIDIAGONAL, BLOCKS])),
        (2,),
        {"allowed": (2, 4, 4)},
    ),
    Fixture("Plackett-Luce", lambda: PlackettLuce(torch.randn(4)), (), {"scores": (4,)}),
    Fixture("Plackett-Luce batch", lambda: PlackettLuce(torch.randn(3, 2, 4)), (3, 2), {"scores": (3, 2, 4)}),
    Fixture(
        "relaxed Plackett-Luce",
        lambda: RelaxedPlackettLuce(torch.tensor([[0.01], [1.0], [2.0]]), torch.randn(2, 4)),
        (3, 2),
        {"temperature": (3, 1), "scores": (2, 4)},
    ),
    Fixture("relaxed ranking of one", lambda: RelaxedPlackettLuce(1.0, torch.zeros(2, 1)), (2,), {"scores": (2, 1)}),
    Fixture(
        "Mallows",
        lambda: Mallows(torch.eye(4).flip(0), torch.tensor([0.0, 0.5])),
        (2,),
        {"center": (4, 4), "theta": (2,)},
    ),
    Fixture("Mallows scalar", lambda: Mallows(torch.eye(4), 1.0), (), {"center": (4, 4), "theta": ()}),
]

"""Networks, sets and a change of order that the tests of nn share."""

import torch
from torch import nn

from pyro_gs.nn import (
    DeepSets,
    EachItem,
    EquivariantLinear,
    PositionScores,
    RankScores,
    RowScores,
    ScoreNetwork,
    SetAttention,
)

N, FEATURES = 5, 6
ORDER = torch.tensor([3, 0, 4, 1, 2])
MASK = torch.tensor([[True, False, True, True, False], [True, True, True, True, True], [False, False, False, True, False]])


class Centred(nn.Module):
    """A user's set module, with a batch norm among its items in training."""

    def __init__(self):
        super().__init__()
        self.norm = EachItem(nn.BatchNorm1d(FEATURES))

    def forward(self, x, mask=None):
        return self.norm(x, mask)


ENCODERS = {
    "each item": lambda: EachItem(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh())),
    "batch norm": Centred,
    "linear mean": lambda: EquivariantLinear(FEATURES, FEATURES, "mean"),
    "linear max": lambda: EquivariantLinear(FEATURES, FEATURES, "max"),
    "deep sets": lambda: DeepSets(FEATURES, FEATURES, width=8, depth=3),
    "deep sets max": lambda: DeepSets(FEATURES, FEATURES, width=8, pool="max"),
    "attention": lambda: SetAttention(FEATURES, FEATURES, width=8, heads=2),
}
SCORES = {
    "rows": lambda: RowScores(FEATURES, N),
    "ranks": lambda: RankScores(FEATURES),
    "positions": lambda: PositionScores(FEATURES, width=8),
}


def networks():
    """Score networks of every encoder and every kind of scores."""
    items = {
        f"{name} + {kind}": lambda encoder=encoder, scores=scores: ScoreNetwork(
            EachItem(nn.Linear(FEATURES, FEATURES)), scores(), sets=encoder()
        )
        for name, encoder in ENCODERS.items()
        for kind, scores in SCORES.items()
    }

    def images():
        each = EachItem(nn.Sequential(nn.Conv2d(1, 8, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, FEATURES)), item_dim=3)
        return ScoreNetwork(each, RowScores(FEATURES, N))

    return items | {"images": images}

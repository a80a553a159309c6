"""A network that is not equivariant, after the published idea of DeepPermNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_gs.nn import EachItem

__all__ = ["DensePermutation"]


def refuse_mask(network: nn.Module, mask: object) -> None:
    """Raise ``ValueError`` if a network that takes puzzles of one size is given a mask."""
    if mask is not None:
        raise ValueError(f"mask: {type(network).__name__} takes sets of one size without padding; expected None")


class DensePermutation(nn.Module):
    """Features of all pieces, concatenated as they come, through a hidden layer to all n^2 scores.

    After Santa Cruz et al. 2017, 'DeepPermNet: Visual Permutation Learning': branches with shared weights, two fully
    connected layers over all of them, then Sinkhorn. Other orders of the same pieces are other inputs to it. The published
    network has branches of AlexNet, this one has those of the networks beside it.

    Args:
        items: Of pieces, to ``features`` numbers each.
        features: See ``items``.
        n: Number of pieces.
        width: Of the hidden layer.

    Shapes:
        ``(..., n, *item)`` to logits (..., n, n).

    Raises:
        ValueError: At a call, if the number of pieces is another, or with a mask.
    """

    def __init__(self, items: EachItem, features: int, n: int, width: int = 512) -> None:
        super().__init__()
        self.items = items
        self.hidden = nn.Linear(n * features, width)
        self.scores = nn.Linear(width, n * n)
        self.n = n

    def forward(self, items: Tensor, mask: None = None) -> Tensor:
        """Logits."""
        refuse_mask(self, mask)
        features = self.items(items)
        if features.shape[-2] != self.n:
            raise ValueError(f"items: expected {self.n} pieces, got {features.shape[-2]}")
        scores: Tensor = self.scores(torch.relu(self.hidden(features.flatten(-2))))
        return scores.reshape(*scores.shape[:-1], self.n, self.n)

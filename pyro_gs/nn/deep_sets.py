"""Equivariant layers that mix the pieces through what they have in common (Zaheer et al. 2017, 'Deep Sets')."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_gs.nn.masks import check_mask, zero_padded
from pyro_gs.ops.logits import check_count, check_floating

Pool = Literal["mean", "max"]
_POOLS = ("mean", "max")


class EquivariantLinear(nn.Module):
    """``W x_i + V pool(x) + b`` for every piece (Zaheer et al. 2017).

    Where linear scores follow directly, the pooled part is alike for all pieces, so it adds to columns and changes no
    Sinkhorn matrix: put a nonlinearity in between, as :class:`DeepSets` of depth 2 has.

    Args:
        in_features: size of a piece's features.
        out_features: size of the result's.
        pool: ``"mean"`` or ``"max"`` of the pieces.

    Shapes:
        x (..., n, in_features) and mask (..., n) to (..., n, out_features).

    Raises:
        TypeError: at a call, features that are not floating, a mask not bool.
        ValueError: a size below 1, another ``pool``; at a call, features of another size or a mask that does not fit.

    Example:
        >>> import torch
        >>> EquivariantLinear(8, 16)(torch.zeros(4, 5, 8)).shape
        torch.Size([4, 5, 16])
    """

    def __init__(self, in_features: int, out_features: int, pool: Pool = "mean") -> None:
        super().__init__()
        check_count(in_features, "in_features", least=1)
        check_count(out_features, "out_features", least=1)
        if pool not in _POOLS:
            raise ValueError(f"pool must be one of {_POOLS}, but is {pool!r}")
        self.own = nn.Linear(in_features, out_features)
        self.pooled = nn.Linear(in_features, out_features, bias=False)
        self.pool = pool

    def extra_repr(self) -> str:
        """The pool, in the module's repr."""
        return f"pool={self.pool!r}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of the pieces."""
        check_features(x, self.own.in_features)
        if mask is None:
            common = x.mean(-2, keepdim=True) if self.pool == "mean" else x.amax(-2, keepdim=True)
        else:
            mask = check_mask(mask, x.shape[:-1])
            x = zero_padded(x, mask)
            if self.pool == "mean":
                common = x.sum(-2, keepdim=True) / mask.sum(-1)[..., None, None]
            else:
                common = torch.where(mask[..., None], x, -torch.inf).amax(-2, keepdim=True)
        out: Tensor = self.own(x) + self.pooled(common)
        return out


class DeepSets(nn.Module):
    """Equivariant layers with ReLU between them.

    Args:
        in_features: size of a piece's features.
        out_features: size of the result's.
        width: size in between.
        depth: number of layers, at least 1; 1 is linear.
        pool: ``"mean"`` or ``"max"``.

    Shapes:
        x (..., n, in_features) and mask (..., n) to (..., n, out_features).

    Raises:
        TypeError: at a call, features that are not floating, a mask not bool.
        ValueError: as :class:`EquivariantLinear`.

    Example:
        >>> import torch
        >>> DeepSets(8, 16)(torch.zeros(4, 5, 8)).shape
        torch.Size([4, 5, 16])
    """

    def __init__(self, in_features: int, out_features: int, width: int = 64, depth: int = 2, pool: Pool = "mean") -> None:
        super().__init__()
        check_count(width, "width", least=1)
        check_count(depth, "depth", least=1)
        sizes = [in_features, *[width] * (depth - 1), out_features]
        self.layers = nn.ModuleList(EquivariantLinear(a, b, pool) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of the pieces."""
        for place, layer in enumerate(self.layers):
            x = layer(torch.relu(x) if place else x, mask)
        return x


def check_features(x: Tensor, features: int) -> None:
    """Raise unless features of pieces are a floating tensor of shape (..., n, features) with n >= 1."""
    check_floating(x, "x")
    if x.dim() < 2 or x.shape[-1] != features or x.shape[-2] == 0:
        raise ValueError(f"x must have shape (..., n, {features}) with n >= 1, but has shape {tuple(x.shape)}")

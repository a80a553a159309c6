"""Self-attention among pieces, without positions, so that it is equivariant."""

from __future__ import annotations

from torch import Tensor, nn

from pyro_gs.nn.deep_sets import check_features
from pyro_gs.nn.masks import check_mask, zero_padded
from pyro_gs.ops.logits import check_count


class SetAttention(nn.Module):
    """Blocks of self-attention in which every piece sees every other (Vaswani et al. 2017; for sets Lee et al. 2019).

    Torch's :class:`torch.nn.TransformerEncoderLayer` with the norm first and no dropout, between two linear maps. Attention
    sees a piece's features up to their mean and scale (layer norm); the residual path keeps both.

    Args:
        in_features: size of a piece's features.
        out_features: size of the result's.
        width: size in between, a multiple of ``heads``.
        heads: number of attention heads.
        depth: number of blocks, at least 1.

    Shapes:
        x (..., n, in_features) and mask (..., n) to (..., n, out_features).

    Raises:
        TypeError: at a call, features that are not floating, a mask not bool.
        ValueError: a size below 1, ``width`` no multiple of ``heads``; at a call, features of another size or a mask that
            does not fit.

    Example:
        >>> import torch
        >>> SetAttention(8, 16)(torch.zeros(4, 5, 8)).shape
        torch.Size([4, 5, 16])
    """

    def __init__(self, in_features: int, out_features: int, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "out_features": out_features, "width": width, "heads": heads, "depth": depth}
        for name, value in sizes.items():
            check_count(value, name, least=1)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads={heads}, but is {width}")
        self.into = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.out = nn.Linear(width, out_features)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of the pieces."""
        check_features(x, self.into.in_features)
        batch, padding = x.shape[:-2], None
        if mask is not None:
            mask = check_mask(mask, x.shape[:-1])
            x = zero_padded(x, mask)
            padding = ~mask.reshape(batch.numel(), x.shape[-2])
        h = self.into(x.reshape(batch.numel(), *x.shape[-2:]))
        for block in self.blocks if batch.numel() else ():  # torch's attention fails on an empty batch with a mask
            h = block(h, src_key_padding_mask=padding)
        out: Tensor = self.out(h).reshape(*x.shape[:-1], self.out.out_features)
        return out

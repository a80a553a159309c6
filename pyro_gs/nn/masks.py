"""Sets of different sizes in one tensor: which rows are pieces, and what the others are matched to."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gs.ops.logits import check_floating, check_square, describe, first_position


def check_mask(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of pieces, expanded to the shape of the sets.

    Args:
        mask: bool, broadcasts to ``shape``; True at a piece.
        shape: batch shape and number of rows, (..., n).

    Raises:
        TypeError: not a bool tensor.
        ValueError: does not broadcast, or a set without a piece; the message names it.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor of shape (..., n), True at a piece, but is {kind}")
    try:
        if mask.shape[-1:] != shape[-1:]:
            raise RuntimeError
        mask = mask.expand(shape)
    except RuntimeError:
        raise ValueError(f"mask must broadcast to {tuple(shape)}, the sets, but has shape {tuple(mask.shape)}") from None
    some = mask.any(-1)
    if not bool(some.all()):
        raise ValueError(
            f"mask{describe(first_position(~some) if some.dim() else ())} is False throughout: a set has no piece"
        )
    return mask


def zero_padded(x: Tensor, mask: Tensor, item_dim: int = 1) -> Tensor:
    """Features (..., n, *item) with zeros, and no gradient, where a mask (..., n) has no piece."""
    return torch.where(mask.reshape(*mask.shape, *[1] * item_dim), x, 0.0)


def positions(mask: Tensor) -> Tensor:
    """Where the positions of a set's pieces are: the first k, bool (..., n)."""
    n = mask.shape[-1]
    return torch.arange(n, device=mask.device) < mask.sum(-1, keepdim=True)


def padding_block(mask: Tensor) -> Tensor:
    """What pads and its places, bool (..., n, n): the p-th row that is no piece, and column k + p."""
    n = mask.shape[-1]
    place = mask.sum(-1, keepdim=True) + (~mask).cumsum(-1) - 1
    return ~mask[..., None] & (torch.arange(n, device=mask.device) == place[..., None])


def piece_block(mask: Tensor) -> Tensor:
    """Pieces and their positions, bool (..., n, n)."""
    return mask[..., :, None] & positions(mask)[..., None, :]


def mask_logits(logits: Tensor, mask: Tensor) -> Tensor:
    """Square logits in which only pieces compete, for their k positions.

    Pieces may take the first k columns, with the logits given; the p-th row that pads takes column k + p, and everything
    else is ``-inf``. So Sinkhorn matrices, matchings and laws of the result are those of the k x k logits, plus a one for
    each row that pads. Values are not looked at: entries that pad may hold anything, NaN too.

    Args:
        logits: log-potentials, shape (..., n, n).
        mask: bool, broadcasts to (..., n); True at a piece.

    Returns:
        Tensor of the shape of ``logits``.

    Raises:
        TypeError: ``logits`` not floating, ``mask`` not bool.
        ValueError: shapes that do not fit, or a set without a piece.

    Example:
        >>> import torch
        >>> mask_logits(torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [4.0, 3.0, 0.0]]), torch.tensor([True, False, True]))
        tensor([[1., 2., -inf],
                [-inf, -inf, 0.],
                [4., 3., -inf]])
    """
    check_square(logits, "logits")
    check_floating(logits, "logits")
    mask = check_mask(mask, logits.shape[:-1])
    return torch.where(piece_block(mask), logits, torch.where(padding_block(mask), 0.0, -torch.inf).to(logits.dtype))

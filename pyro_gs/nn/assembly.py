"""Applying a matrix to a set: pieces to positions, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gs.nn.each_item import check_items
from pyro_gs.ops.logits import check_count, check_floating, check_square


def assemble(P: Tensor, items: Tensor, *, item_dim: int = 1) -> Tensor:
    """Pieces at their positions, ``P.mT @ items``: position j holds ``sum_i P[i, j] items[i]``.

    With a permutation matrix the piece that is matched to j, with a relaxed one a mixture. The inverse of :func:`scramble`
    for permutation matrices. The device and dtype of both must agree.

    Args:
        P: shape (..., n, n), rows pieces, columns positions; its batch broadcasts with that of ``items``, so may have
            leading dimensions of draws.
        items: pieces, shape ``(..., n, *item)``.
        item_dim: number of dimensions of a piece.

    Returns:
        Tensor of shape broadcast batch + ``(n, *item)``.

    Raises:
        TypeError: not floating, or different dtypes.
        ValueError: shapes that do not fit, a NaN or infinity.

    Example:
        >>> import torch
        >>> P = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])  # the first piece belongs second
        >>> assemble(P, torch.tensor([20.0, 30.0, 10.0]), item_dim=0)
        tensor([10., 20., 30.])
    """
    _check(P, items, item_dim, "items")
    return _apply(P.mT, items, item_dim)


def scramble(P: Tensor, ordered: Tensor, *, item_dim: int = 1) -> Tensor:
    """What is in order as pieces, ``P @ ordered``: piece i is ``sum_j P[i, j] ordered[j]``, ``ordered[index[i]]`` if hard.

    Args:
        P: as :func:`assemble`.
        ordered: shape ``(..., n, *item)``.
        item_dim: as :func:`assemble`.

    Returns:
        Tensor of shape broadcast batch + ``(n, *item)``.

    Raises:
        TypeError: as :func:`assemble`.
        ValueError: as :func:`assemble`.

    Example:
        >>> import torch
        >>> P = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
        >>> scramble(P, torch.tensor([10.0, 20.0, 30.0]), item_dim=0)
        tensor([20., 30., 10.])
    """
    _check(P, ordered, item_dim, "ordered")
    return _apply(P, ordered, item_dim)


def _check(P: Tensor, items: Tensor, item_dim: int, name: str) -> None:
    check_count(item_dim, "item_dim", least=0)
    check_square(P, "P")
    check_floating(P, "P")
    check_items(P, 1, "P")
    check_items(items, item_dim, name)
    if items.dtype != P.dtype:
        raise TypeError(f"{name} must have the dtype of P, {P.dtype}, but has {items.dtype}")
    lead = items.shape[: items.dim() - item_dim]
    try:
        if lead[-1] != P.shape[-1]:
            raise RuntimeError
        torch.broadcast_shapes(P.shape[:-2], lead[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name} must have shape (..., {P.shape[-1]}, *item) with {item_dim} dimensions of an item and a batch that "
            f"broadcasts with that of P, {tuple(P.shape[:-2])}, but has shape {tuple(items.shape)}"
        ) from None


def _apply(matrix: Tensor, items: Tensor, item_dim: int) -> Tensor:
    item = items.shape[items.dim() - item_dim :]
    flat = items.reshape(*items.shape[: items.dim() - item_dim], item.numel())
    out = matrix @ flat
    return out.reshape(*out.shape[:-1], *item)

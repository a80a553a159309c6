"""One module applied to every piece alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_gs.nn.masks import check_mask
from pyro_gs.ops.logits import check_count, check_floating, describe, first_position


class EachItem(nn.Module):
    """A module of single pieces, shared by all pieces of all sets.

    The module sees one batch of pieces, without what pads, so that statistics of a batch norm are of pieces only and what
    pads may hold anything.

    Args:
        module: from ``(b, *item)`` to (b, features).
        item_dim: number of dimensions of a piece: 1 for vectors, 3 for images with channels, 0 for numbers.

    Shapes:
        items ``(..., n, *item)`` and mask (..., n) to (..., n, features); zeros where the mask is False.

    Raises:
        TypeError: ``module`` is no module; at a call, items that are not floating, or a mask not bool.
        ValueError: ``item_dim`` negative; at a call, items without a dimension of pieces, NaN or infinite (the message names
            the piece), a mask that does not fit, or a module that returns another shape.

    Example:
        >>> import torch
        >>> cnn = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 8))
        >>> EachItem(cnn, item_dim=3)(torch.zeros(16, 9, 1, 7, 7)).shape
        torch.Size([16, 9, 8])
    """

    def __init__(self, module: nn.Module, item_dim: int = 1) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module of single pieces, but is {type(module).__name__}")
        check_count(item_dim, "item_dim", least=0)
        self.module = module
        self.item_dim = item_dim

    def forward(self, items: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features of every piece."""
        check_items(items, self.item_dim, mask=mask)
        lead = items.shape[: items.dim() - self.item_dim]
        flat = items.reshape(lead.numel(), *items.shape[len(lead) :])
        if mask is None:
            found = self._features(flat)
        else:
            chosen = check_mask(mask, lead).reshape(-1)
            real = self._features(flat[chosen])
            found = real.new_zeros(len(flat), real.shape[-1]).index_put((chosen,), real)
        return found.reshape(*lead, found.shape[-1])

    def _features(self, flat: Tensor) -> Tensor:
        out: Tensor = self.module(flat)
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(flat):
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"module must return shape ({len(flat)}, features) for {len(flat)} pieces, but returns {found}")
        return out


def check_items(items: Tensor, item_dim: int, name: str = "items", *, mask: Tensor | None = None) -> None:
    """Raise unless pieces (..., n, *item) are a floating tensor that is finite where a mask has a piece.

    Raises:
        TypeError: not a floating tensor.
        ValueError: too few dimensions, no pieces, or a value that is NaN or infinite.
    """
    if not isinstance(items, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (..., n, *item), but is {type(items).__name__}")
    check_floating(items, name)
    lead = items.shape[: max(items.dim() - item_dim, 0)]
    if not lead or lead[-1] == 0:
        raise ValueError(
            f"{name} must have shape (..., n, *item) with n >= 1 and {item_dim} dimensions of an item, but has shape "
            f"{tuple(items.shape)}"
        )
    bad = ~items.detach().isfinite()
    if mask is not None:
        mask = check_mask(mask, torch.Size(lead))
        bad = bad & mask.reshape(*lead, *[1] * item_dim)
    if bool(bad.any()):
        at = first_position(bad)
        *item, row = at[: len(lead)]
        raise ValueError(f"{name}{describe(tuple(item))} must be finite, but row {row} holds {float(items.detach()[at])}")

"""What :func:`torch.func.vmap` does with a function of whole batches: one more batch dimension, in front."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def apply_batched(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """The vmap rule of an autograd function whose arguments all have the same batch shape, or are no tensors.

    Args:
        function: the :class:`torch.autograd.Function`.
        info: torch's description of the vmap.
        in_dims: the mapped dimension of every argument, or None.
        args: arguments of the function.

    Returns:
        The outputs, and the mapped dimension of each.
    """
    front = []
    for arg, dim in zip(args, in_dims, strict=True):
        if not isinstance(arg, Tensor):
            front.append(arg)
        elif dim is None:
            front.append(arg.unsqueeze(0).expand(info.batch_size, *arg.shape))
        else:
            front.append(arg.movedim(dim, 0))
    out = function.apply(*front)
    return out, (0 if isinstance(out, Tensor) else (0,) * len(out))

"""Functions of whole batches under the transformations of :mod:`torch.func`, and under tracing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_nested_forward_mode() -> None:
    """Raise under forward mode inside forward mode, where torch loses the outer tangents of an autograd function.

    Raises:
        NotImplementedError: names what to take instead.
    """
    if torch.compiler.is_compiling():
        return
    stack = torch._C._functorch.get_interpreter_stack() or []
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
        raise NotImplementedError(
            "torch gives wrong values for forward mode inside forward mode (jvp of jvp, jacfwd of jacfwd) of an autograd "
            "function; take reverse mode for one of the two, as torch.func.hessian does"
        )


def refuse_tracing(what: str) -> None:
    """Raise while :func:`torch.jit.trace` records, which would keep what depends on values as a constant.

    Args:
        what: the function, as messages name it.

    Raises:
        NotImplementedError: names what to take instead.
    """
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise NotImplementedError(
            f"torch.jit.trace cannot record {what}, which looks at values; take Trace_ELBO in place of JitTrace_ELBO (so of "
            "every Jit class), jit_compile=False in HMC and NUTS"
        )


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


def own_memory(x: Tensor, event_dim: int) -> Tensor:
    """A parameter as given, or, if it has a gradient and expanded batch dimensions (stride 0), a copy.

    So that what :func:`unexpanded` cuts is only what a law has expanded itself: it hands the gradient of all items to the
    first of them, which is right for what was expanded, and wrong for a tensor that was given like this.
    """
    batch = range(x.dim() - event_dim)
    shared = x.requires_grad and any(x.stride(dim) == 0 and x.shape[dim] > 1 for dim in batch)
    return x.contiguous() if shared else x


def unexpanded(x: Tensor, event_dim: int) -> Tensor:
    """The tensor with expanded batch dimensions (stride 0) cut to size one."""
    for dim in range(x.dim() - event_dim):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x

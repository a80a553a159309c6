"""Integrals over the plane by the trapezoid rule, for batches of integrands with exponential tails."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 4_000_000  # numbers held at once


def log_plane_integral(
    log_f: Callable[..., Tensor], arguments: tuple[Tensor, ...], radius: Tensor, step: float, max_nodes: float = math.inf
) -> Tensor:
    """Logarithms of integrals over R^2 of a batch of positive functions.

    For an analytic integrand the rule's error falls exponentially with the step's inverse. An item whose square needs more
    than ``max_nodes`` nodes along an axis gets a larger step instead.

    Args:
        log_f: of nodes (k, 2) and the arguments of b items; the logarithm of the integrand, shape (b, k).
        arguments: tensors with a leading dimension of items.
        radius: half the side of the square, around zero, that holds the mass of each item, (g,).
        step: distance of the nodes.
        max_nodes: along an axis.

    Returns:
        Tensor of shape (g,), differentiable in the arguments; nothing of the nodes is kept for the backward pass.
    """
    size = max(x[0].numel() for x in arguments) if len(radius) else 1

    def rule(spacing: float, count: int, *parts: Tensor) -> Tensor:
        axis = spacing * torch.arange(-count, count + 1, dtype=radius.dtype, device=radius.device)
        return torch.logsumexp(log_f(torch.cartesian_prod(axis, axis), *parts), -1) + 2 * math.log(spacing)

    out = []
    order = radius.argsort()
    start = 0
    while start < len(order):
        nodes = min(2 * float(radius[order[start]]) / step, max_nodes) + 3
        part = order[start : start + max(1, int(_CHUNK / (size * nodes**2)))]
        wide = float(radius[part[-1]])
        spacing = max(step, 2 * wide / max_nodes)
        count, parts = math.ceil(wide / spacing), [x[part] for x in arguments]
        if any(x.requires_grad for x in arguments) and torch.is_grad_enabled():
            out.append(checkpoint(rule, spacing, count, *parts, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(rule(spacing, count, *parts))
        start += len(part)
    return torch.cat(out)[order.argsort()] if out else radius

"""Constraints for relaxed and hard permutations; both have ``event_dim = 2`` and are aware of forbidden pairs."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.constraints import Constraint

# Error of a marginal that a dtype's Sinkhorn result, summed in that dtype, may show.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


class DoublyStochastic(Constraint):
    """Non-negative matrices whose rows and columns sum to one (1e-6 in float64, 1e-4 in float32 and below).

    Args:
        allowed: bool, shape (..., n, n); entries outside must be exactly zero. None allows all.
    """

    is_discrete = False
    event_dim = 2

    def __init__(self, allowed: Tensor | None = None) -> None:
        self.allowed = allowed
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Bool of the batch shape of ``value`` (broadcast with that of ``allowed``)."""
        tolerance = _TOLERANCE.get(value.dtype, 1e-2)
        good = (value >= 0).all(-1).all(-1)
        for dim in (-2, -1):
            good = good & ((value.sum(dim) - 1).abs() <= tolerance).all(-1)
        if self.allowed is not None:
            good = good & ((value == 0) | self.allowed).all(-1).all(-1)
        return good

    def __repr__(self) -> str:
        return "DoublyStochastic()" if self.allowed is None else f"DoublyStochastic(allowed={tuple(self.allowed.shape)})"


class Permutation(Constraint):
    """Permutation matrices.

    Args:
        allowed: bool, shape (..., n, n); pairs outside must not be matched. None allows all.
    """

    is_discrete = True
    event_dim = 2

    def __init__(self, allowed: Tensor | None = None) -> None:
        self.allowed = allowed
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Bool of the batch shape of ``value`` (broadcast with that of ``allowed``)."""
        good = ((value == 0) | (value == 1)).all(-1).all(-1)
        good = good & (value.sum(-1) == 1).all(-1) & (value.sum(-2) == 1).all(-1)
        if self.allowed is not None:
            good = good & ((value == 0) | self.allowed).all(-1).all(-1)
        return good

    def __repr__(self) -> str:
        return "Permutation()" if self.allowed is None else f"Permutation(allowed={tuple(self.allowed.shape)})"


def _no_transform(constraint: Permutation) -> NoReturn:
    raise NotImplementedError(
        f"{constraint} has no unconstraining transform, so a site with it is not for NUTS, HMC or guides such as "
        "AutoNormal; relax the model, pyro_gs.relax(model), or hide the site from them: "
        "poutine.block(model, hide=['P']) with its name"
    )


biject_to.register(Permutation, _no_transform)
transform_to.register(Permutation, _no_transform)

doubly_stochastic = DoublyStochastic()
permutation = Permutation()

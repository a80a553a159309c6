"""Constraints for relaxed and hard permutations, with ``event_dim = 2``; all but the last know of forbidden pairs."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.constraints import Constraint

from pyro_gs.distributions.relaxed import carries_log, log_of, plain
from pyro_gs.ops.ranking import log_neural_sort, neural_sort_scores

# Error of a marginal that a dtype's Sinkhorn result may show; rounding of its sum comes on top.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}


def _tolerance(value: Tensor) -> float:
    """Of the sums of rows of ``value`` (..., n, n)."""
    return _TOLERANCE.get(value.dtype, 1e-2) + value.shape[-1] * torch.finfo(value.dtype).eps


class DoublyStochastic(Constraint):
    """Non-negative matrices whose rows and columns sum to one.

    Up to 1e-6 in float64, 1e-4 in float32 and 1e-2 in half precision, plus n units of rounding.

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
        tolerance = _tolerance(value)
        good = (value >= 0).all(-1).all(-1)
        for dim in (-2, -1):
            good = good & ((value.sum(dim) - 1).abs() <= tolerance).all(-1)
        if self.allowed is not None:
            good = good & ((value == 0) | self.allowed).all(-1).all(-1)
        return good

    def __repr__(self) -> str:
        return "DoublyStochastic()" if self.allowed is None else f"DoublyStochastic(allowed={tuple(self.allowed.shape)})"


class SparseDoublyStochastic(Constraint):
    """Entries, at the candidates of each row, of doubly stochastic matrices; tolerances are those of the dense ones.

    Args:
        candidates: long, shape (..., n, k), the column of each entry.
        allowed: bool, shape (..., n, k); entries outside must be exactly zero.
    """

    is_discrete = False
    event_dim = 2

    def __init__(self, candidates: Tensor, allowed: Tensor) -> None:
        self.candidates = candidates
        self.allowed = allowed
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Bool of the batch shape of ``value`` (broadcast with that of ``candidates``)."""
        tolerance = _tolerance(value)
        shape = torch.broadcast_shapes(value.shape, self.candidates.shape)
        value = plain(value).expand(shape)
        index = self.candidates.expand(shape).flatten(-2)
        columns = torch.zeros_like(value[..., 0]).scatter_add(-1, index, value.flatten(-2))
        good = ((value >= 0) & ((value == 0) | self.allowed)).all(-1).all(-1)
        for sums in (value.sum(-1), columns):
            good = good & ((sums - 1).abs() <= tolerance).all(-1)
        return good

    def __repr__(self) -> str:
        return f"SparseDoublyStochastic(candidates={tuple(self.candidates.shape)})"


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


class PartialMatching(Constraint):
    """Matrices of zeros and ones whose rows have at most a one, and whose columns have at most as many as their capacity.

    Args:
        capacities: of the m columns.
        matched: bool, shape (..., n); rows that must have a one. None for all.
        allowed: bool, shape (..., n, m); pairs outside must not be matched. None allows all.
    """

    is_discrete = True
    event_dim = 2

    def __init__(self, capacities: tuple[int, ...], matched: Tensor | None = None, allowed: Tensor | None = None) -> None:
        self.capacities = capacities
        self.matched = matched
        self.allowed = allowed
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Bool of the batch shape of ``value`` (broadcast with those of ``matched`` and ``allowed``)."""
        good = ((value == 0) | (value == 1)).all(-1).all(-1)
        rows, columns = value.sum(-1), value.sum(-2)
        good = good & (columns <= torch.tensor(self.capacities, device=value.device)).all(-1)
        good = good & ((rows == 1) if self.matched is None else (rows <= 1) & ((rows == 1) | ~self.matched)).all(-1)
        if self.allowed is not None:
            good = good & ((value == 0) | self.allowed).all(-1).all(-1)
        return good

    def __repr__(self) -> str:
        return f"PartialMatching(capacities={self.capacities})"


class UnimodalRowStochastic(Constraint):
    """Row-stochastic matrices that NeuralSort returns, the values of ``RelaxedPlackettLuce``.

    Non-negative, with rows that sum to one and ``log P[i, j] - log P[i + 1, j] = 2 r_j`` up to a number of the row, for the
    one ``r`` whose NeuralSort is ``P`` (Grover et al. 2019). Sums to 1e-6 in float64 and 1e-4 in float32 and below, and
    logarithms, in units of ``1 + |log P|``, as well. Columns need not sum to one. Of a value with entries that underflowed,
    without the logarithm that samples carry, only the rows are checked.
    """

    is_discrete = False
    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        """Bool of the batch shape of ``value``."""
        tolerance = _tolerance(value)
        p, log_p = plain(value).detach(), log_of(value).detach()
        good = (p >= 0).all(-1).all(-1) & ((p.sum(-1) - 1).abs() <= tolerance).all(-1)
        gap = (log_neural_sort(neural_sort_scores(log_p)) - log_p).abs()
        close = (gap <= tolerance * (1 + log_p.abs())).all(-1).all(-1)
        return good & (close | underflowed(value).any(-1).any(-1))

    def __repr__(self) -> str:
        return "UnimodalRowStochastic()"


def underflowed(value: Tensor) -> Tensor:
    """Entries too small for the dtype to hold their digits, of a value that does not carry its logarithm; bool."""
    if carries_log(value):
        return torch.zeros(value.shape, dtype=torch.bool, device=value.device)
    p = plain(value).detach()
    return p < torch.finfo(p.dtype).tiny


def _no_transform(constraint: Constraint) -> NoReturn:
    raise NotImplementedError(
        f"{constraint} has no unconstraining transform, so a site with it is not for NUTS, HMC or guides such as "
        "AutoNormal; relax the model, pyro_gs.relax(model), or hide the site from them: "
        "poutine.block(model, hide=['P']) with its name"
    )


for _kind in (Permutation, PartialMatching, SparseDoublyStochastic, UnimodalRowStochastic):
    biject_to.register(_kind, _no_transform)
    transform_to.register(_kind, _no_transform)

doubly_stochastic = DoublyStochastic()
permutation = Permutation()
unimodal_row_stochastic = UnimodalRowStochastic()

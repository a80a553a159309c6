"""What all laws over permutation matrices share."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.matrix_law import MatrixLaw
from pyro_gs.distributions.relaxed import RelaxedPermutation
from pyro_gs.ops.batching import own_memory
from pyro_gs.ops.logits import check_logits, check_magnitude, describe, first_position
from pyro_gs.ops.matching import to_matrix
from pyro_gs.ops.permanent import log_count
from pyro_gs.ops.support import Support, find_support

ENUMERATION_LIMIT = math.factorial(8)
_Law = TypeVar("_Law", bound="PermutationLaw")


class PermutationLaw(MatrixLaw):
    """Base of the laws over permutation matrices: support, expansion, checks of values and enumeration.

    A law sets ``_support`` and its parameters before it calls ``super().__init__``, names in ``_expanded`` the attributes
    that have the batch shape, with the number of their event dimensions, and in ``_kept`` those that expansion copies. It
    writes ``_log_prob`` for values that are checked.
    """

    has_enumerate_support = True

    _support: Support
    _expanded: ClassVar[dict[str, int]] = {}
    _kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self, batch_shape: torch.Size, n: int, validate_args: bool | None) -> None:
        super().__init__(batch_shape, torch.Size((n, n)), validate_args)

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.event_shape[-1]

    @property
    def _like(self) -> Tensor:
        """A tensor of the dtype and on the device of samples; the first parameter."""
        value: Tensor = getattr(self, next(iter(self._expanded)))
        return value

    @torch_constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.Permutation:
        """Permutation matrices, with forbidden pairs unmatched."""
        return constraints.Permutation(self._support.allowed)

    def expand(self: _Law, batch_shape: Any, _instance: _Law | None = None) -> _Law:
        """The same law with a larger batch shape; class and parameters are kept."""
        new: _Law = type(self).__new__(type(self)) if _instance is None else _instance
        batch_shape = torch.Size(batch_shape)
        for name, event_dim in self._expanded.items():
            value: Tensor = getattr(self, name)
            setattr(new, name, value.expand(batch_shape + value.shape[value.dim() - event_dim :]))
        for name in self._kept:
            setattr(new, name, getattr(self, name))
        new._support = self._support.expand(batch_shape)
        PermutationLaw.__init__(new, batch_shape, self.n, self._validate_args)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of permutation matrices, shape broadcast of their batch with the batch shape.

        Args:
            value: shape (..., n, n).

        Returns:
            ``-inf`` for a permutation with a forbidden pair.

        Raises:
            TypeError: complex values.
            ValueError: another event shape or a batch that does not broadcast; with validation, no permutation matrix.
        """
        bound = value.bound if isinstance(value, RelaxedPermutation) else None
        if bound is not None:  # of AutoGumbelMatching
            return -bound(self)
        self._check_value(value)
        # A value from a relaxed law carries a logarithm that is of no use here.
        inside = constraints.Permutation(self._support.allowed).check(value)
        return torch.where(inside, self._log_prob(value), -torch.inf)

    def _log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _check_value(self, value: Tensor) -> None:
        check_value_shape(value, self.event_shape, self.batch_shape)
        if value.is_complex():
            raise TypeError(f"value must have a real dtype, but has {value.dtype}")
        if not self._validate_args:
            return
        good = constraints.permutation.check(value)
        if not bool(good.all()):
            item = first_position(~good) if good.dim() else ()
            text = f"value{describe(item)} is not a permutation matrix, which {type(self).__name__} expects"
            if isinstance(value, RelaxedPermutation):
                text += "; it is a relaxed value, so relax the model too: SVI(pyro_gs.relax(model), guide, ...)"
            raise ValueError(text)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All permutations that some batch item allows, shape (count,) + batch_shape + (n, n).

        In lexicographic order of their index form. With ``expand=False`` the batch dimensions have size one. An item's
        log-probability of a permutation that only another item allows is ``-inf``.

        Raises:
            ValueError: more than 8! = 40,320 of them.
        """
        n, like = self.n, self._like
        allowed = self._support.allowed
        union = torch.ones(n, n, dtype=torch.bool, device="cpu") if allowed is None else allowed.reshape(-1, n, n).any(0)
        index = list_permutations(union, type(self).__name__)
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        values = to_matrix(index.to(like.device), dtype=dtype)
        values = values.reshape((-1,) + (1,) * len(self.batch_shape) + tuple(self.event_shape))
        return values.expand((-1, *self.batch_shape, *self.event_shape)) if expand else values


def check_value_shape(value: Tensor, event_shape: torch.Size, batch_shape: torch.Size) -> torch.Size:
    """Batch shape that a value (..., n, n) and a law have together.

    Raises:
        ValueError: another event shape, or a batch that does not broadcast.
    """
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-2:] != event_shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"value must have shape (..., {event_shape[0]}, {event_shape[1]}), but has {found}")
    try:
        return torch.Size(torch.broadcast_shapes(value.shape[:-2], batch_shape))
    except RuntimeError:
        raise ValueError(
            f"value of shape {tuple(value.shape)} does not broadcast with the batch shape {tuple(batch_shape)}"
        ) from None


class LogitsLaw(PermutationLaw):
    """A law over permutation matrices with logits (..., n, n), finite or ``-inf`` where a pair is forbidden.

    Pairs that lie on no permutation have ``-inf`` too, without a warning: they had no probability.
    """

    arg_constraints = {"logits": torch_constraints.independent(torch_constraints.real, 2)}  # noqa: RUF012
    _expanded = {"logits": 2}  # noqa: RUF012

    logits: Tensor

    def __init__(self, logits: Tensor, validate_args: bool | None) -> None:
        check_logits(logits, half=False)
        check_magnitude(logits, "logits")
        self._support = find_support(logits.detach() > -torch.inf, warn=False)
        allowed = self._support.allowed
        self.logits = own_memory(logits, 2) if allowed is None else torch.where(allowed, logits, -torch.inf)
        super().__init__(logits.shape[:-2], logits.shape[-1], validate_args)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shape of ``logits``."""
        logits = torch.Size(arg_shapes["logits"])
        return logits[:-2], logits[-2:]


def list_permutations(allowed: Tensor, law: str = "the law") -> Tensor:
    """Index form of all permutations that a mask (n, n) allows, in lexicographic order, long (count, n).

    Raises:
        ValueError: more than :data:`ENUMERATION_LIMIT`; names the law and the number.
    """
    n = allowed.shape[-1]
    count = float(log_count(find_support(allowed, warn=False), allowed)[0].exp())
    if count > ENUMERATION_LIMIT * (1 + 1e-9):
        raise ValueError(
            f"{law} with n={n} has about {count:.6g} permutations, more than the {ENUMERATION_LIMIT} that "
            "enumerate_support lists; use SVI with AutoGumbelSinkhorn or MCMC"
        )
    if bool(allowed.all()):
        return torch.tensor(list(itertools.permutations(range(n))), device="cpu")
    options = [row.nonzero()[:, 0].tolist() for row in allowed.cpu()]
    last_row = {j: max(i for i in range(n) if j in options[i]) for j in range(n)}
    partial: list[tuple[int, ...]] = [()]
    for i, columns in enumerate(options):
        due = {j for j in range(n) if last_row[j] <= i}  # no later row may take them
        partial = [(*p, j) for p in partial for j in columns if j not in p and due <= {*p, j}]
    return torch.tensor(partial, device="cpu")

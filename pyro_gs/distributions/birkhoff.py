r"""The Birkhoff polytope, and its faces, as a space without constraints.

Every matrix ``Z`` on the allowed entries, up to adding numbers to rows and to columns, is one doubly stochastic matrix
``S(Z)`` (``docs/density.md``). So the polytope has the coordinates of these classes (:mod:`pyro_gs.ops.cycles`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.ops.integrator import register_exception_handler
from torch import Tensor
from torch.distributions import Transform, biject_to, transform_to
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.relaxed import RelaxedPermutation, log_of, plain
from pyro_gs.ops.cycles import Cycles, full_cycles, masked_cycles
from pyro_gs.ops.implicit import scale
from pyro_gs.ops.laplacian import component_logdet
from pyro_gs.ops.logits import check_floating, check_square, describe, first_position
from pyro_gs.ops.sinkhorn import default_tol, warn_unconverged
from pyro_gs.ops.support import Support, find_support

_MAX_ITER = 500
_LARGEST = 1e7  # coordinate; above 1e6 small entries are wrong now and then, with a warning


class DivergenceError(ValueError):
    """Coordinates that are not finite, or beyond 1e7. HMC and NUTS take such a step as divergent and reject it.

    Example:
        >>> import torch
        >>> import pyro_gs as pgs
        >>> pgs.BirkhoffTransform(2)(torch.tensor([1e9]))
        Traceback (most recent call last):
            ...
        pyro_gs.distributions.birkhoff.DivergenceError: x must be finite and at most 1e+07 in size, but has the entry ...
    """


class BirkhoffTransform(Transform):
    r"""Bijection between vectors and doubly stochastic matrices with the allowed entries.

    ``P = S(Z)`` is the Sinkhorn limit of the matrix ``Z`` whose rows and columns sum to zero and which has the coordinates
    ``x`` in an orthonormal basis of such matrices; the inverse takes those of ``log P``, whatever numbers have to be added
    to its rows and columns. The basis is the one nearest to the free entries of ``Z``: those outside a spanning forest of
    the allowed entries, with nothing forbidden the upper left (n - 1) x (n - 1) block. The Jacobian, with respect to
    Lebesgue measure on the free entries of ``P`` (that of :meth:`GumbelSinkhorn.log_prob`), is

    ``log |dP / dx| = sum log P - logdet(I - P'^T P') + log c``,

    where a prime drops a column of every component, the sum is over allowed entries (``docs/density.md``), and ``c^2`` is
    the number of their spanning forests: ``c = n^(n - 1)`` if nothing is forbidden. Another choice of free entries of ``P``
    changes it by nothing.

    Orthonormal coordinates of :class:`GumbelSinkhorn` are nearly uncorrelated. Its free entries are not: at n = 10 and
    temperature 1 the condition number of their covariance is 134 instead of 1.7, and the best normal law without
    correlations is 36 nats further from the best one with, instead of 0.4.

    The matrices carry ``log P``, so that the inverse and the Jacobian are exact where entries underflow. Gradients are those
    of :func:`pyro_gs.log_sinkhorn`. It is registered as ``biject_to`` and ``transform_to`` of
    ``pyro_gs.constraints.DoublyStochastic``, so Pyro's autoguides, HMC and NUTS run on a relaxed site.

    Args:
        n: number of rows; None to take it from the values where nothing is forbidden.
        allowed: bool, shape (..., n, n); None allows all. Items may allow different entries, but not different numbers of
            free ones. Entries that lie on no permutation are forbidden with a warning.
        cache_size: 1 to remember the last pair of values, as for every transform of torch.

    Shapes:
        Vectors (..., k) to matrices (..., n, n), with ``k = |S| - 2n + c`` for ``|S|`` allowed entries in ``c`` components:
        (n - 1)^2 if nothing is forbidden. Batches broadcast with that of ``allowed``.

    Raises:
        TypeError: ``n`` is no integer, or ``allowed`` not boolean.
        ValueError: ``n`` < 1 or not that of ``allowed``, an item without a permutation, or items with different ``k``.
        DivergenceError: in a call, ``x`` has an entry that is not finite, or beyond 1e7.

    Example:
        >>> import torch
        >>> t = BirkhoffTransform(n=2)
        >>> P = t(torch.tensor([1.0]))
        >>> P
        RelaxedPermutation([[0.7311, 0.2689],
                            [0.2689, 0.7311]])
        >>> t.inv(P)
        tensor([1.])
        >>> t.log_abs_det_jacobian(torch.tensor([1.0]), P).exp()  # P_11 = sigmoid(x)
        tensor(0.1966)
    """

    domain = torch_constraints.real_vector
    bijective = True

    def __init__(self, n: int | None = None, allowed: Tensor | None = None, cache_size: int = 0) -> None:
        if n is not None and (isinstance(n, bool) or not isinstance(n, int)):
            raise TypeError(f"n must be an integer or None, but is {n!r}")
        if n is not None and n < 1:
            raise ValueError(f"n must be at least 1, but is {n}")
        support = None
        if allowed is not None:
            check_square(allowed, "allowed")
            if allowed.dtype != torch.bool:
                raise TypeError(f"allowed must be a boolean tensor, but has {allowed.dtype}")
            if n is not None and n != allowed.shape[-1]:
                raise ValueError(f"allowed must have shape (..., {n}, {n}) for n={n}, but has shape {tuple(allowed.shape)}")
            n = allowed.shape[-1]
            support = find_support(allowed, "allowed")
        self.n = n
        self._support = None if support is None or support.full else support
        self._masked = None if self._support is None else masked_cycles(self._support, "allowed")
        super().__init__(cache_size=cache_size)

    @property
    def allowed(self) -> Tensor | None:
        """Bool (..., n, n), pruned to entries that lie on permutations; None if nothing is forbidden."""
        return None if self._support is None else self._support.allowed

    @torch_constraints.dependent_property(is_discrete=False, event_dim=2)
    def codomain(self) -> constraints.DoublyStochastic:
        """Doubly stochastic matrices, zero where not allowed."""
        return constraints.DoublyStochastic(self.allowed)

    def with_cache(self, cache_size: int = 1) -> BirkhoffTransform:
        """The same transform with another cache size."""
        if self._cache_size == cache_size:
            return self
        return BirkhoffTransform(self.n, self.allowed, cache_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BirkhoffTransform) or self.n != other.n:
            return False
        mine, theirs = self.allowed, other.allowed
        if mine is None or theirs is None:
            return mine is theirs
        return torch.equal(mine, theirs)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        allowed = "None" if self.allowed is None else f"<{tuple(self.allowed.shape)}>"
        return f"BirkhoffTransform(n={self.n}, allowed={allowed})"

    def forward_shape(self, shape: Any) -> torch.Size:
        """Shape of the matrices of vectors of a shape."""
        n, _ = self._plan(torch.Size(shape), torch.device("cpu"))
        return torch.Size((*self._batch(torch.Size(shape)[:-1]), n, n))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Shape of the vectors of matrices of a shape."""
        shape = torch.Size(shape)
        n = self._rows(shape)
        k = (n - 1) ** 2 if self._masked is None else self._masked.k
        return torch.Size((*self._batch(shape[:-2]), k))

    def _batch(self, shape: torch.Size) -> torch.Size:
        return shape if self._support is None else torch.broadcast_shapes(shape, self._support.shape[:-2])

    def _plan(self, shape: torch.Size, device: torch.device) -> tuple[int, Cycles]:
        """``n`` and the coordinates for vectors of a shape."""
        k = shape[-1] if len(shape) else None
        if self._masked is not None:
            assert self.n is not None
            if k != self._masked.k:
                raise ValueError(f"x must have shape (..., {self._masked.k}) for {self}, but has {tuple(shape)}")
            return self.n, self._masked
        n = self.n if self.n is not None or k is None else 1 + math.isqrt(k)
        if n is None or k != (n - 1) ** 2:
            wanted = "(..., (n - 1)^2) for an n" if self.n is None else f"(..., {(self.n - 1) ** 2}) for n={self.n}"
            raise ValueError(f"x must have shape {wanted}, but has {tuple(shape)}")
        return n, full_cycles(n, device)

    def _rows(self, shape: torch.Size) -> int:
        """``n`` for matrices of a shape."""
        if len(shape) < 2 or shape[-1] != shape[-2] or not shape[-1] or self.n not in (None, shape[-1]):
            n = "n" if self.n is None else self.n
            raise ValueError(f"P must have shape (..., {n}, {n}), but has shape {tuple(shape)}")
        return shape[-1]

    def _whole(self, shape: torch.Size) -> Support:
        """The support of matrices of a shape."""
        return Support(shape) if self._support is None else self._support.expand(shape[:-2])

    def _call(self, x: Tensor) -> Tensor:
        log_p = self._log(x)
        return RelaxedPermutation.wrap(log_p.exp().to(x.dtype), log_p)

    def _log(self, x: Tensor) -> Tensor:
        """``log P``, float64."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, but is {type(x).__name__}")
        check_floating(x, "x", half=False)
        n, at = self._plan(x.shape, x.device)
        inside = x.detach().abs() <= _LARGEST
        if not bool(inside.all()):
            where = first_position(~inside)
            value = float(x.detach()[where])
            raise DivergenceError(
                f"x{describe(where[:-1])} must be finite and at most {_LARGEST:g} in size, but has the entry {value} at "
                f"position {where[-1]}"
            )
        batch = self._batch(x.shape[:-1])
        support = self._whole(torch.Size((*batch, n, n)))
        z = at.matrix(x.double().expand(*batch, at.k))
        if support.allowed is not None:
            z = z.masked_fill(~support.allowed, -torch.inf)
        tol = default_tol(x.dtype)
        found = scale(z, support, tol=tol, max_iter=_MAX_ITER, relative=True)
        warn_unconverged(tol, found, None)
        return found.log_p

    def _inverse(self, P: Tensor) -> Tensor:
        check_square(P, "P")
        n = self._rows(P.shape)
        check_floating(P, "P", half=False)
        batch = self._batch(P.shape[:-2])
        log_p = log_inside(P, self.codomain, repr(self)).expand(*batch, n, n)
        at = self._masked or full_cycles(n, P.device)
        return at.coordinates(log_p).to(P.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |dP / dx|`` on the free entries of ``P = y``, of the batch shape.

        Args:
            x: vectors, shape (..., k); looked at only where an entry of ``y`` has underflowed and lost its logarithm.
            y: their matrices, shape (..., n, n).
        """
        n = self._rows(y.shape)
        log_p = log_of(y).expand(*self._batch(y.shape[:-2]), n, n)
        if bool(_lost(log_p, self.allowed).any()):
            log_p = self._log(x)
        support = self._whole(log_p.shape)
        if support.allowed is not None:
            log_p = torch.where(support.allowed, log_p, -torch.inf)
        finite = log_p if support.allowed is None else torch.where(support.allowed, log_p, 0.0)
        at = self._masked or full_cycles(n, y.device)
        return (finite.sum((-2, -1)) - component_logdet(log_p, support) + at.logdet).to(y.dtype)


def log_inside(P: Tensor, polytope: constraints.DoublyStochastic, user: str) -> Tensor:
    """``log P`` in float64 of matrices inside the Birkhoff polytope, or inside a face of it.

    Args:
        P: shape (..., n, n); its own logarithm is taken if it carries one.
        polytope: with the allowed entries.
        user: who expects them, for messages.

    Raises:
        ValueError: not doubly stochastic, or a zero where an entry is allowed; names the batch item.
    """
    good = polytope.check(plain(P).detach())
    if not bool(good.all()):
        item = first_position(~good) if good.dim() else ()
        raise ValueError(f"P{describe(item)} is not doubly stochastic with zeros where not allowed, as {user} expects")
    log_p = log_of(P)
    lost = _lost(log_p, polytope.allowed)
    if bool(lost.any()):
        *index, row, column = first_position(lost)
        raise ValueError(
            f"P{describe(tuple(index))} has a zero at row {row}, column {column}, where an entry is allowed, so it lies "
            "on the boundary of the polytope; if the entry underflowed, use the tensor itself that the transform or "
            "rsample returned, which carries its logarithm"
        )
    return log_p


def _lost(log_p: Tensor, allowed: Tensor | None) -> Tensor:
    """Where an allowed entry is zero."""
    lost = log_p.detach() == -torch.inf
    return lost if allowed is None else lost & allowed


def _transform(constraint: constraints.DoublyStochastic) -> BirkhoffTransform:
    return BirkhoffTransform(allowed=constraint.allowed)


biject_to.register(constraints.DoublyStochastic, _transform)
transform_to.register(constraints.DoublyStochastic, _transform)
register_exception_handler("birkhoff_divergence", lambda error: isinstance(error, DivergenceError))

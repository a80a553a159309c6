r"""The two transformations of Linderman et al. (2018), published rivals of the Sinkhorn operator, to compare with.

Linderman, Mena, Cooper, Paninski and Cunningham, *Reparameterizing the Birkhoff polytope for variational permutation
inference*, AISTATS 2018 (arXiv 1710.09508): stick-breaking, and rounding toward permutation matrices. As their
temperature falls to zero their values are drawn to the vertices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Transform
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.birkhoff import log_inside
from pyro_gs.distributions.relaxed import RelaxedPermutation, log_of
from pyro_gs.ops.logits import broadcast_batch, check_floating, check_square, check_temperature, describe, first_position
from pyro_gs.ops.matching import matching

_LARGEST_MIXED = 1e30  # of a float64 value, where a temperature in float32 has a gradient


class _Tempered(Transform):
    """A bijection of square matrices with a temperature."""

    domain = torch_constraints.independent(torch_constraints.real, 2)
    bijective = True

    def __init__(self, temperature: float | Tensor = 1.0, cache_size: int = 0) -> None:
        check_temperature(temperature)
        self.temperature = temperature
        super().__init__(cache_size=cache_size)

    def with_cache(self, cache_size: int = 1) -> _Tempered:
        """The same transform with another cache size."""
        return self if self._cache_size == cache_size else type(self)(self.temperature, cache_size)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return False
        mine, theirs = torch.as_tensor(self.temperature), torch.as_tensor(other.temperature)
        return mine.shape == theirs.shape and bool((mine == theirs).all())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        tau = self.temperature
        return f"{type(self).__name__}(temperature={tau.tolist() if isinstance(tau, Tensor) else tau})"

    def _checked(self, value: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """The value, broadcast, and the temperature, of shape (..., 1, 1), in float64."""
        check_square(value, name)
        check_floating(value, name, half=False)
        finite = value.detach().isfinite()
        if not bool(finite.all()):
            *item, row, column = where = first_position(~finite)
            raise ValueError(
                f"{name}{describe(tuple(item))} must be finite, but is {float(value[where])} at row {row}, column {column}"
            )
        if isinstance(self.temperature, Tensor) and self.temperature.requires_grad and value.numel():
            dtype, size = self.temperature.dtype, float(value.detach().abs().amax())
            if value.dtype == torch.float64 and dtype != torch.float64 and size >= _LARGEST_MIXED:
                raise ValueError(
                    f"{name} must be below {_LARGEST_MIXED:g} in size, so that the gradient of a temperature in {dtype} "
                    f"holds, but is {size:g}"
                )
        tau = torch.as_tensor(self.temperature, dtype=torch.float64, device=value.device)
        batch = broadcast_batch(tau, value, name)
        return value.double().expand(*batch, *value.shape[-2:]), tau[..., None, None]


class StickBreakingTransform(_Tempered):
    r"""Stick-breaking: (n - 1) x (n - 1) matrices to the inside of the Birkhoff polytope (Linderman et al. 2018).

    The upper left block of ``P`` is filled row by row. Given the entries before it, an entry may lie between

    ``lower = max(0, 1 - sum_{k<j} p_ik - sum_{m>j} (1 - sum_{k<i} p_km))`` and
    ``upper = min(1 - sum_{k<j} p_ik, 1 - sum_{k<i} p_kj)``,

    outside of which its row or its column could not be completed, and is ``lower + beta_ij (upper - lower)`` with
    ``beta = sigmoid(psi / temperature)``. The last row and column take what is left. The Jacobian is triangular:

    ``log |dP / dpsi| = sum log((upper - lower) beta (1 - beta) / temperature)``

    with respect to Lebesgue measure on the upper left block. As the temperature falls, ``P`` tends to the vertex that the
    signs of ``psi`` choose. The transformation treats rows and columns by their order: a law of it changes with their names.

    A baseline: :class:`BirkhoffTransform` has no order, and knows forbidden pairs. Computed in float64; the inverse and the
    Jacobian subtract nothing, and the way there only what is left of a row from what is left of a column. So ``psi`` comes
    back to 1e-8 at temperatures down to 0.1 of its spread; at 0.05 one entry in 1,000 is lost to rounding.

    Args:
        temperature: positive, a number or a tensor that broadcasts with the batch shape; ``psi`` is divided by it.
        cache_size: 1 to remember the last pair of values, as for every transform of torch.

    Shapes:
        (..., n - 1, n - 1) to (..., n, n), n at least 2.

    Raises:
        TypeError: a temperature, or in a call a value, that is no floating number.
        ValueError: a temperature that is not positive and finite; in a call, a value that is not square, not finite or, for
            the inverse, on the boundary of the polytope.

    Example:
        >>> import torch
        >>> t = StickBreakingTransform(temperature=0.5)
        >>> P = t(torch.zeros(2, 2))
        >>> P
        RelaxedPermutation([[0.5000, 0.2500, 0.2500],
                            [0.2500, 0.3750, 0.3750],
                            [0.2500, 0.3750, 0.3750]])
        >>> t.inv(P).abs().max() < 1e-6
        tensor(True)
        >>> t.log_abs_det_jacobian(torch.zeros(2, 2), P)
        tensor(-4.4466)
    """

    codomain = constraints.doubly_stochastic

    def forward_shape(self, shape: Any) -> torch.Size:
        """One more row and column."""
        return torch.Size((*shape[:-2], shape[-2] + 1, shape[-1] + 1))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """One row and column less."""
        return torch.Size((*shape[:-2], shape[-2] - 1, shape[-1] - 1))

    def _call(self, psi: Tensor) -> Tensor:
        value, tau = self._checked(psi, "psi")
        share, rest = (value / tau).sigmoid(), (-value / tau).sigmoid()
        P = _break_sticks(share.reshape(-1, *share.shape[-2:]), rest.reshape(-1, *rest.shape[-2:]))
        P = P.reshape(*value.shape[:-2], *P.shape[-2:])
        return RelaxedPermutation.wrap(P.to(psi.dtype), P.log())

    def _inverse(self, P: Tensor) -> Tensor:
        _, tau = self._checked(P, "P")
        taken, left = _shares(log_inside(P, self.codomain, repr(self)))
        return (tau * (taken - left)).to(P.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |dP / dpsi|`` on the upper left block, of the batch shape.

        Args:
            x: the matrices ``psi``, not looked at.
            y: those of ``P``, shape (..., n, n).
        """
        _, tau = self._checked(y, "P")
        taken, left = _shares(log_of(y))
        terms = taken + left - torch.logaddexp(taken, left) - tau.log()
        return terms.sum((-2, -1)).to(y.dtype)


class _BreakSticks(torch.autograd.Function):
    """The doubly stochastic matrices of the shares that entries take of their sticks: (k, m, m) twice to (k, m + 1, m + 1).

    Every entry needs those before it: a loop over numbers, which Python does 50 times faster than one over tensors (four
    matrices of 111 rows). Each step is a choice among linear functions, which the way back repeats. First derivatives only.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, rest: Tensor) -> Tensor:
        ctx.save_for_backward(share, rest)
        results = [_fill(*matrices) for matrices in zip(share.tolist(), rest.tolist(), strict=True)]
        ctx.choices = [choices for _, choices in results]
        n = share.shape[-1] + 1
        return share.new_tensor([P for P, _ in results]).reshape(len(results), n, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        share, rest = ctx.saved_tensors
        items = zip(grad.tolist(), share.tolist(), rest.tolist(), ctx.choices, strict=True)
        back = [_fill_back(*item) for item in items]
        return share.new_tensor([d for d, _ in back]).reshape(share.shape), share.new_tensor([d for _, d in back]).reshape(
            share.shape
        )


_break_sticks: Callable[[Tensor, Tensor], Tensor] = _BreakSticks.apply


_Rows = list[list[float]]


def _fill(share: _Rows, rest: _Rows) -> tuple[_Rows, list[list[tuple[float, int, bool, bool]]]]:
    """One matrix; and of every entry in the block what its stick was, which bound it came from, and two comparisons."""
    n = len(share) + 1
    columns, P, choices = [1.0] * n, [], []
    for i in range(n - 1):
        # What is left of the row, of the columns from j on less that row, and of the columns after j.
        row, beyond, entries, chosen = 1.0, float(n - 1 - i), [], []
        after = list(itertools.accumulate(reversed(columns)))[-2::-1]
        for j, (others, s, t) in enumerate(zip(after, share[i], rest[i], strict=True)):
            column = columns[j]
            bounds = (row, beyond, column, others)
            width = min(bounds)
            taken, left = s * width, t * width
            more, longer = row > others, row > column
            chosen.append((width, bounds.index(width), more, longer))
            entries.append(taken + row - others if more else taken)
            beyond = taken if more else taken + others - row
            columns[j] = left if longer else left + column - row
            row = left + row - column if longer else left
        columns[-1] = beyond
        P.append([*entries, row])
        choices.append(chosen)
    P.append(columns)
    return P, choices


def _fill_back(
    grad: _Rows, share: _Rows, rest: _Rows, choices: list[list[tuple[float, int, bool, bool]]]
) -> tuple[_Rows, _Rows]:
    """Gradients of the shares from that of the matrix."""
    n = len(share) + 1
    d_columns, d_share, d_rest = list(grad[-1]), [], []
    for i in reversed(range(n - 1)):
        d_row, d_beyond = grad[i][-1], d_columns[-1]
        d_columns[-1] = 0.0
        d_others = [0.0] * n  # of column j through `after`: those of all entries before it
        shares, rests = [0.0] * (n - 1), [0.0] * (n - 1)
        for j in reversed(range(n - 1)):
            width, bound, more, longer = choices[i][j]
            d_entry, d_column = grad[i][j], d_columns[j]
            d_taken, d_left = d_entry + d_beyond, d_column + d_row
            shares[j], rests[j] = d_taken * width, d_left * width
            d_bounds = [0.0, 0.0, 0.0, 0.0]
            d_bounds[bound] = d_taken * share[i][j] + d_left * rest[i][j]
            change, swap = (d_entry if more else -d_beyond), (d_row if longer else -d_column)
            d_row = d_bounds[0] + change + swap
            d_beyond = d_bounds[1]
            d_columns[j] = d_bounds[2] - swap
            d_others[j + 1] = d_bounds[3] - change
        d_columns = [d + e for d, e in zip(d_columns, itertools.accumulate(d_others), strict=True)]
        d_share.append(shares)
        d_rest.append(rests)
    return d_share[::-1], d_rest[::-1]


def _shares(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of ``p - lower`` and of ``upper - p``, each (..., n - 1, n - 1), without a subtraction.

    With an entry ``p``, what follows it in its row ``r``, in its column ``c`` and below both ``d``, the first is
    ``min(p, d)`` and the second ``min(r, c)``.
    """
    right, below = _after(log_p, -1), _after(log_p, -2)
    return torch.minimum(log_p[..., :-1, :-1], _after(right, -2)), torch.minimum(right[..., :-1, :], below[..., :, :-1])


def _after(log_p: Tensor, dim: int) -> Tensor:
    """Logarithm of the sum of all entries after each, without the last."""
    return log_p.narrow(dim, 1, log_p.shape[dim] - 1).flip(dim).logcumsumexp(dim).flip(dim)


class RoundingTransform(_Tempered):
    r"""Rounding: square matrices toward their nearest permutation matrix (Linderman et al. 2018).

    ``X = temperature Z + (1 - temperature) M(Z)`` with the matching ``M``, which is the nearest permutation matrix.
    Piecewise linear, one to one, with Jacobian ``temperature^(n^2)``. Its image is the set of ``X`` for which
    ``Z = (X - (1 - temperature) M(X)) / temperature`` has ``M(Z) = M(X)``: a region around every permutation matrix,
    apart from the others. ``X`` is *near* a vertex of the Birkhoff polytope, not in the polytope: its entries may be
    negative and its rows do not sum to one.

    A baseline. The inverse does not check that it was given a point of the image; :class:`RoundingPermutation` does.

    Args:
        temperature: above 0 and at most 1, a number or a tensor that broadcasts with the batch shape; 1 leaves all as it is.
        cache_size: 1 to remember the last pair of values, as for every transform of torch.

    Shapes:
        (..., n, n) to (..., n, n).

    Raises:
        TypeError: a temperature, or in a call a value, that is no floating number.
        ValueError: a temperature that is not in (0, 1], or so small that its reciprocal overflows; in a call, a value that
            is not square or not finite, or too large for the gradient of a temperature in float32.

    Example:
        >>> import torch
        >>> t = RoundingTransform(temperature=0.5)
        >>> X = t(torch.tensor([[0.8, 0.4], [0.2, 0.6]]))
        >>> X
        tensor([[0.9000, 0.2000],
                [0.1000, 0.8000]])
        >>> t.inv(X)
        tensor([[0.8000, 0.4000],
                [0.2000, 0.6000]])
        >>> t.log_abs_det_jacobian(X, X)
        tensor(-2.7726)
    """

    codomain = torch_constraints.independent(torch_constraints.real, 2)

    def __init__(self, temperature: float | Tensor = 1.0, cache_size: int = 0) -> None:
        super().__init__(temperature, cache_size)
        if isinstance(temperature, Tensor):
            largest = float(temperature.detach().max()) if temperature.numel() else 0.0
        else:
            largest = float(temperature)
        if largest > 1:
            raise ValueError(f"temperature must be at most 1 for {type(self).__name__}, but is {largest}")
        if isinstance(temperature, Tensor) and temperature.numel():
            smallest, tiny = float(temperature.detach().min()), torch.finfo(temperature.dtype).tiny
            if smallest < tiny:
                raise ValueError(
                    f"temperature must be at least {tiny:.3g} in {temperature.dtype}, or its reciprocal overflows, but is "
                    f"{smallest:.3g}"
                )

    def _call(self, Z: Tensor) -> Tensor:
        value, tau = self._checked(Z, "Z")
        return (tau * value + (1 - tau) * matching(value)).to(Z.dtype)

    def _inverse(self, X: Tensor) -> Tensor:
        value, tau = self._checked(X, "X")
        return ((value - (1 - tau) * matching(value)) / tau).to(X.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``n^2 log temperature``, of the batch shape.

        Args:
            x: the matrices ``Z``, not looked at.
            y: those of ``X``, shape (..., n, n).
        """
        value, tau = self._checked(y, "X")
        return (value.shape[-1] ** 2 * tau.log()).expand(*value.shape[:-2], 1, 1)[..., 0, 0].to(y.dtype)

r"""Partial matchings and one-to-many assignments as perfect matchings of a larger, square problem.

Every row takes one column, or stays unmatched at a score; a column takes as many rows as its capacity. The square problem
has a copy of a column for every row that it may take, one column for every row that may stay unmatched, and rows of zeros
that take what is left over::

    X  with column j repeated c_j times  |  s  repeated n times
    0                                    |  0

Its perfect matchings are the assignments, each several times over: copies are interchangeable, and so are rows of zeros.
With capacities of one, m columns and rows that may all stay unmatched, an assignment of r rows stands for ``n! m! / r!``.
The Sinkhorn operator of it is optimal transport with a dustbin row and a dustbin column (Sarlin et al. 2020, 'SuperGlue',
equation 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor

from pyro_gs.ops.batching import own_memory
from pyro_gs.ops.logits import check_entries, check_floating, check_magnitude, describe, first_position, warn_user
from pyro_gs.ops.support import SupportWarning, find_support, hall_violator, unravel

Capacities = int | Sequence[int] | Tensor


class Assignment:
    """What is to be assigned: checked logits, scores and capacities.

    Args:
        logits: log-potentials, shape (..., n, m), larger is better; ``-inf`` forbids a pair.
        unmatched: score of a row that stays unmatched, a number or a tensor that broadcasts to (..., n); ``-inf``, or
            None for all, where a row must be matched.
        capacities: how many rows a column may take, an integer for all or one for each of the m columns; by default 1.
        half: accept float16 and bfloat16.

    Attributes:
        logits: shape batch + (n, m), with ``unmatched`` broadcast.
        unmatched: shape batch + (n,), or None.
        capacities: m integers, at most n.

    Raises:
        TypeError: ``logits`` or ``unmatched`` is not floating, ``capacities`` are not integers.
        ValueError: NaN or +inf, a wrong shape, a negative capacity.
    """

    def __init__(
        self,
        logits: Tensor,
        unmatched: float | Tensor | None = None,
        capacities: Capacities | None = None,
        *,
        half: bool = True,
    ) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits must be a torch.Tensor of shape (..., n, m), but got {type(logits).__name__}")
        if logits.dim() < 2 or 0 in logits.shape[-2:]:
            raise ValueError(f"logits must have shape (..., n, m) with n, m >= 1, but has shape {tuple(logits.shape)}")
        check_floating(logits, "logits", half=half)
        check_entries(logits, "logits")
        check_magnitude(logits, "logits")
        logits = own_memory(logits, 2)
        n, m = logits.shape[-2:]
        self.capacities = _checked_capacities(capacities, n, m)
        self.unmatched: Tensor | None = None
        if unmatched is not None:
            if not isinstance(unmatched, Tensor) and (isinstance(unmatched, bool) or not isinstance(unmatched, Real)):
                raise TypeError(f"unmatched must be a number or a tensor, but is {type(unmatched).__name__}")
            scores = torch.as_tensor(unmatched, dtype=None if isinstance(unmatched, Tensor) else logits.dtype)
            check_floating(scores, "unmatched")
            check_magnitude(scores, "unmatched")
            scores = own_memory(scores.to(logits), 1)
            try:
                batch = torch.broadcast_shapes(scores.shape, logits.shape[:-1])[:-1]
                scores = scores.expand(*batch, n)
            except RuntimeError:
                raise ValueError(
                    f"unmatched must broadcast to {tuple(logits.shape[:-1])}, one score for each row of logits, but has "
                    f"shape {tuple(scores.shape)}"
                ) from None
            detached = scores.detach()
            bad = detached.isnan() | (detached == torch.inf)
            if bool(bad.any()):
                *item, row = where = first_position(bad)
                raise ValueError(
                    f"unmatched{describe(tuple(item))} is {float(detached[where])} for row {row}; it must be finite, or "
                    "-inf where a row must be matched"
                )
            logits = logits.expand(*batch, n, m)
            if detached.numel() == 0 or bool((detached > -torch.inf).any()):
                self.unmatched = scores
        self.logits = logits

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self.logits.shape[-2], self.logits.shape[-1]

    def padded(self, *, warn: bool = False) -> Tensor:
        """The square logits, shape batch + (N, N), with what lies on no assignment forbidden.

        Args:
            warn: whether to warn of allowed pairs that are.

        Raises:
            ValueError: an item has no assignment; names the rows that share too few places.

        Warns:
            SupportWarning: an allowed pair lies on no assignment.
        """
        n, _ = self.shape
        copies = self.copies()
        blocks = [self.logits.index_select(-1, copies)]
        if self.unmatched is not None:
            blocks.append(self.unmatched[..., None].expand(*self.logits.shape[:-1], n))
        top = torch.cat(blocks, -1)
        places = top.shape[-1]
        if places < n:
            raise ValueError(
                f"capacities sum to {places}, fewer than the {n} rows of logits, and no row may stay unmatched; raise "
                "capacities or give unmatched a score"
            )
        z = torch.cat([top, top.new_zeros(*top.shape[:-2], places - n, places)], -2)
        allowed = z.detach() > -torch.inf
        if bool(allowed.all()):
            return z
        try:
            support = find_support(allowed, warn=False)
        except ValueError:
            self._raise_infeasible(allowed)
        if support.allowed is None:
            return z
        dropped = (allowed & ~support.allowed)[..., :n, : len(copies)]
        if warn and bool(dropped.any()):
            *item, row, column = first_position(dropped)
            warn_user(
                f"logits{describe(tuple(item))} permit row {row}, column {int(copies[column])}, which lies on no "
                "assignment; such entries are forbidden from here on",
                SupportWarning,
            )
        return z.masked_fill(~support.allowed, -torch.inf)

    def usable(self) -> Tensor:
        """Pairs that lie on an assignment, bool (..., n, m); raises as :meth:`padded`."""
        n = self.shape[0]
        capacity = torch.tensor(self.capacities, device=self.logits.device)
        z = self.padded().detach()
        first = (capacity.cumsum(0) - capacity).clamp(max=z.shape[-1] - 1)
        return (z[..., :n, first] > -torch.inf) & (capacity > 0)

    def copies(self) -> Tensor:
        """The column of each copy, long."""
        return torch.repeat_interleave(torch.tensor(self.capacities, device=self.logits.device))

    def _raise_infeasible(self, allowed: Tensor) -> NoReturn:
        batch, size = allowed.shape[:-2], allowed.shape[-1]
        for item, mask in enumerate(allowed.reshape(-1, size, size)):
            try:
                rows, _ = hall_violator(mask)
            except ValueError:
                continue
            rows = [row for row in rows if row < self.shape[0]]
            copies = self.copies()
            columns = sorted({int(copies[c]) for c in mask[rows].any(0).nonzero()[:, 0].tolist() if c < len(copies)})
            places = sum(self.capacities[column] for column in columns)
            raise ValueError(
                f"logits{describe(unravel(item, batch))} allow no assignment: the rows {rows} may take only the columns "
                f"{columns}, which have {places} places, and may not stay unmatched"
            ) from None
        raise AssertionError("every item has an assignment")


def _checked_capacities(capacities: Capacities | None, n: int, m: int) -> tuple[int, ...]:
    if capacities is None:
        return (1,) * m
    values = capacities.tolist() if isinstance(capacities, Tensor) else capacities
    if not isinstance(values, Sequence):
        values = [values] * m
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise TypeError(f"capacities must be an integer or {m} of them, but are {capacities!r}")
    if len(values) != m or min(values) < 0:
        raise ValueError(f"capacities must be one number of at least 0 for each of the {m} columns, but are {list(values)}")
    return tuple(min(value, n) for value in values)


def pad_logits(logits: Tensor, *, unmatched: float | Tensor | None = None, capacities: Capacities | None = None) -> Tensor:
    r"""Square logits whose perfect matchings are the partial or one-to-many assignments of ``logits``.

    For every law here that takes square logits: ``GumbelSinkhorn(temperature, pad_logits(logits, unmatched=-1.0))`` is a
    relaxed partial matching, ``GumbelMatching`` of the same its limit, with Gumbel noise of their own on copies and on
    what fills up; :func:`unpad` reads their values. :func:`pyro_gs.matching`, :func:`pyro_gs.sinkhorn` and
    :func:`pyro_gs.log_permanent` do this by themselves, and ``GibbsMatching`` is the Gibbs law of assignments, each counted
    once.

    Args:
        logits: log-potentials, shape (..., n, m), larger is better; ``-inf`` forbids a pair.
        unmatched: score of a row that stays unmatched, a number or a tensor that broadcasts to (..., n); ``-inf``, or
            None for all, where a row must be matched.
        capacities: how many rows a column may take, an integer for all or one for each of the m columns; by default 1. More
            than n count as n.

    Returns:
        Tensor of shape (..., N, N): N is the sum of the capacities, plus n if rows may stay unmatched.

    Raises:
        TypeError: ``logits`` or ``unmatched`` not floating, ``capacities`` no integers.
        ValueError: NaN or +inf, a wrong shape, a negative capacity, or an item without an assignment; names the item and the
            rows that share too few places.
        RuntimeError: under a transform of ``torch.func``, which hides values; give a batch.

    Warns:
        SupportWarning: an allowed pair lies on no assignment; it is forbidden.

    Example:
        >>> import torch
        >>> X = torch.tensor([[3.0, 0.0], [2.0, -1.0]])
        >>> Z = pad_logits(X, unmatched=1.0)
        >>> Z.shape
        torch.Size([4, 4])
        >>> from pyro_gs import matching
        >>> unpad(matching(Z), (2, 2))  # the second row stays unmatched
        tensor([[1., 0.],
                [0., 0.]])
    """
    return Assignment(logits, unmatched, capacities).padded(warn=True)


def unpad(P: Tensor, shape: tuple[int, int], *, capacities: Capacities | None = None) -> Tensor:
    """The assignment, or its relaxation, that a matrix for :func:`pad_logits` stands for.

    Args:
        P: shape (..., N, N), from a law or an operator of padded logits.
        shape: ``(n, m)`` of the logits.
        capacities: as given to :func:`pad_logits`.

    Returns:
        Tensor of shape (..., n, m): entry i, j is the share of row i that column j takes. Values are not looked at.

    Raises:
        ValueError: ``shape`` is no pair of positive integers, or ``P`` too small for it and ``capacities``.

    Example:
        >>> import torch
        >>> from pyro_gs import sinkhorn
        >>> P = sinkhorn(pad_logits(torch.zeros(2, 2), unmatched=0.0))
        >>> unpad(P, (2, 2))
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """
    good = isinstance(shape, Sequence) and len(shape) == 2 and all(isinstance(k, int) and k > 0 for k in shape)
    if not good:
        raise ValueError(f"shape must be (n, m), the number of rows and of columns of the logits, but is {shape!r}")
    n, m = shape
    copies = torch.repeat_interleave(torch.tensor(_checked_capacities(capacities, n, m), device="cpu"))
    if not isinstance(P, Tensor) or P.dim() < 2 or P.shape[-2] != P.shape[-1] or P.shape[-1] < max(n, len(copies)):
        found = tuple(P.shape) if isinstance(P, Tensor) else type(P).__name__
        raise ValueError(
            f"P must have shape (..., N, N) with N >= {max(n, len(copies))} for shape={tuple(shape)}, but has {found}"
        )
    if copies.tolist() == list(range(m)):
        return P[..., :n, :m]
    out = P.new_zeros(*P.shape[:-2], n, m)
    return out.index_add(-1, copies.to(P.device), P[..., :n, : len(copies)])

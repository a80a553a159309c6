"""Sparse candidates: logits (..., n, k) of the k columns that each row may take, and operators that see no others.

Where each of n rows may take k << n columns, a matrix (..., n, n) is mostly forbidden pairs. Here a problem is ``logits``
(..., n, k) with ``candidates``, long (..., n, k), the column of each; a row with fewer than k candidates is padded with
logits of ``-inf``, whose column is any. Columns are 0 to n - 1 and differ within a row but for padding.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from pyro_gs.ops.batching import refuse_tracing
from pyro_gs.ops.implicit import scale
from pyro_gs.ops.layout import Sparse
from pyro_gs.ops.logits import (
    check_entries,
    check_floating,
    check_magnitude,
    check_square,
    check_temperature,
    describe,
    first_position,
)
from pyro_gs.ops.sinkhorn import (
    check_options,
    check_overflow,
    check_temperature_kind,
    default_tol,
    scaled_problem,
    warn_unconverged,
)
from pyro_gs.ops.support import Support, find_candidate_support


def to_sparse(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the allowed pairs alone, and their columns.

    Args:
        logits: shape (..., n, n), ``-inf`` where forbidden; or bool, the allowed pairs, which get logits of zero.

    Returns:
        Logits (..., n, k) and candidates (..., n, k), k the largest number of pairs allowed in a row (at least one);
        columns rise along a row, and padding is last. Gradients flow through the logits.

    Raises:
        TypeError: neither a floating nor a boolean tensor.
        ValueError: not square, NaN or +inf.
        RuntimeError: under a transform of ``torch.func``, which hides values; give a batch.

    Example:
        >>> import torch
        >>> logits, candidates = to_sparse(torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]]).bool())
        >>> logits
        tensor([[0., 0., -inf],
                [0., 0., 0.],
                [0., -inf, -inf]])
        >>> candidates[1]
        tensor([0, 1, 2])
    """
    check_square(logits, "logits")
    if logits.dtype == torch.bool:
        zeros = torch.zeros(logits.shape, device=logits.device)
        logits = zeros.masked_fill(~logits, -torch.inf)
    check_floating(logits, "logits")
    check_entries(logits, "logits")
    allowed = logits.detach() > -torch.inf
    width = max(1, int(allowed.sum(-1).max())) if allowed.numel() else 1
    candidates = allowed.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :width]
    return logits.gather(-1, candidates), candidates


def to_dense(values: Tensor, candidates: Tensor, *, fill: float = 0.0) -> Tensor:
    """Matrices of values at candidates.

    Args:
        values: shape (..., n, k): logits, a relaxed or a hard matching.
        candidates: long, shape (..., n, k), the column of each; batch shapes broadcast.
        fill: the value of all other pairs, ``-torch.inf`` for logits. Values equal to it count as padding.

    Returns:
        Tensor of shape (..., n, n).

    Raises:
        TypeError: ``values`` not floating, ``candidates`` not of an integer dtype.
        ValueError: shapes that do not fit, a column out of range or twice in a row.

    Example:
        >>> import torch
        >>> to_dense(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0, 1], [1, 0]]))
        tensor([[0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    values, candidates = _fitted(values, candidates, "values")
    present = values.detach() != fill
    _check_distinct(candidates, present)
    return at_columns(values, candidates, present, fill=fill)


def at_columns(values: Tensor, candidates: Tensor, allowed: Tensor, *, fill: float) -> Tensor:
    """Matrices (..., n, n) of values (..., n, k) where allowed, of ``fill`` elsewhere."""
    *batch, n, _ = values.shape
    out = torch.full((*batch, n, n + 1), fill, dtype=values.dtype, device=values.device)
    return out.scatter(-1, torch.where(allowed, candidates, n), values)[..., :n]  # padding goes to what is cut off


def log_sparse_sinkhorn(
    logits: Tensor,
    candidates: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    tol: float | None = None,
    max_iter: int | None = None,
) -> Tensor:
    r"""Logarithm of the Sinkhorn operator on candidates, ``log S(logits / temperature)``.

    The operator of :func:`pyro_gs.log_sinkhorn` where pairs that are no candidates are forbidden, in time and memory of the
    candidates alone as long as conjugate gradients converge. A matrix on which they do not (at low temperature, where few
    pairs are left) is factored as a sparse one, and only where that fills up, or on a GPU, as a dense one, with n^2 numbers.
    Entries are right to the marginal error, in absolute and
    not in relative terms. Derivatives are implicit, of any order, in both modes.

    Args:
        logits: log-potentials, shape (..., n, k), larger is better; ``-inf`` forbids a pair, or pads a row.
        candidates: integers, shape (..., n, k), the column of each; batch shapes broadcast.
        temperature: positive; a number or a tensor that broadcasts to the batch shape.
        tol: largest error of a marginal, by default 1e-10 in float64 and 2e-6 in float32.
        max_iter: cap on Newton steps, by default 500.

    Returns:
        Tensor (..., n, k) of the dtype and device of ``logits``; ``-inf`` where forbidden.

    Raises:
        TypeError: ``logits`` not floating, ``candidates`` not of an integer dtype.
        ValueError: NaN or +inf, a column out of range or twice in a row, no permutation, a bad temperature or option.
        RuntimeError: in the backward pass, no solution to differentiate at.
        NotImplementedError: forward mode inside forward mode, or under ``torch.jit.trace``.

    Warns:
        SinkhornWarning: the cap was met before the tolerance.
        SupportWarning: allowed pairs lie on no permutation; they come out as ``-inf``.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, -torch.inf]])
        >>> candidates = torch.tensor([[0, 1], [0, 1], [2, 0]])
        >>> log_sparse_sinkhorn(logits, candidates).exp()
        tensor([[0.6225, 0.3775],
                [0.3775, 0.6225],
                [1.0000, 0.0000]])
    """
    check_temperature_kind(temperature)
    check_options(tol, max_iter)
    logits, candidates = _fitted(logits, candidates, "logits")
    logits, z, about = scaled_problem(logits, temperature)
    tol = default_tol(logits.dtype) if tol is None else tol
    found = scale(
        z, None, tol=tol, max_iter=max_iter or 500, relative=False, layout=Sparse(candidates),
        checks=(functools.partial(_check_values, candidates=candidates), logits.detach(), about),
        report=functools.partial(warn_unconverged, tol),
    )  # fmt: skip
    return found.log_p.to(logits.dtype)


def sparse_sinkhorn(
    logits: Tensor,
    candidates: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    tol: float | None = None,
    max_iter: int | None = None,
) -> Tensor:
    """The Sinkhorn operator on candidates, ``S(logits / temperature)``.

    See :func:`log_sparse_sinkhorn` for arguments, gradient, errors and warnings.

    Returns:
        Tensor (..., n, k) of the dtype and device of ``logits``: rows sum to one, and so does what each column gets.

    Example:
        >>> import torch
        >>> X = torch.tensor([[2.0, 0.0], [1.0, 0.0]])
        >>> sparse_sinkhorn(X, torch.tensor([[0, 1], [0, 1]]), temperature=0.5)
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])
    """
    return log_sparse_sinkhorn(logits, candidates, temperature=temperature, tol=tol, max_iter=max_iter).exp()


def sparse_matching(logits: Tensor, candidates: Tensor) -> Tensor:
    """Columns of the matching of the largest total weight among candidates.

    Solved exactly by :func:`scipy.sparse.csgraph.min_weight_full_bipartite_matching` (Jonker and Volgenant 1987), item by
    item on the host. Piecewise constant, so the result carries no gradient.

    Args:
        logits: log-potentials, shape (..., n, k), larger is better; ``-inf`` forbids a pair, or pads a row.
        candidates: integers, shape (..., n, k), the column of each; batch shapes broadcast.

    Returns:
        Long (..., n): the column of each row, a permutation of 0 to n - 1.

    Raises:
        TypeError: ``logits`` not floating, ``candidates`` not of an integer dtype.
        ValueError: NaN or +inf, magnitudes of 1e150 and more, a column out of range or twice in a row, or no permutation;
            names the batch item and rows that share too few columns.
        RuntimeError: under a transform of ``torch.func``, which hides values; give a batch.
        NotImplementedError: under ``torch.jit.trace``.

    Example:
        >>> import torch
        >>> sparse_matching(torch.tensor([[2.0, 0.0], [3.0, 2.5]]), torch.tensor([[0, 1], [0, 1]]))
        tensor([0, 1])
    """
    logits, candidates, support = check_problem(logits, candidates)
    return candidates.gather(-1, best_candidates(logits, candidates, support)[..., None])[..., 0]


def best_candidates(logits: Tensor, candidates: Tensor, support: Support) -> Tensor:
    """Place (..., n), long, of the best candidate of each row; of a problem that is checked, of one batch shape."""
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching  # slow to load, so not with the package

    refuse_tracing("a matching")
    n, k = logits.shape[-2:]
    assert support.allowed is not None
    scores, columns, allowed = (
        part.detach().cpu().expand(logits.shape).reshape(-1, n, k).numpy()
        for part in (logits.double(), candidates, support.allowed)
    )
    out = np.empty(scores.shape[:2], dtype=np.int64)
    for item, (score, column, mask) in enumerate(zip(scores, columns, allowed, strict=True)):
        row, _ = np.nonzero(mask)
        cost = score.max(-1, keepdims=True, where=mask, initial=-np.inf) - np.where(mask, score, 0.0)
        weight = cost[mask] + max(1.0, float(cost[mask].max()))  # scipy takes a weight of zero for no pair
        graph = csr_matrix((weight, (row, column[mask])), shape=(n, n))
        rows, best = min_weight_full_bipartite_matching(graph)
        taken = np.empty(n, dtype=np.int64)
        taken[rows] = best
        out[item] = ((column == taken[:, None]) & mask).argmax(-1)
    return torch.from_numpy(out).reshape(logits.shape[:-1]).to(logits.device)


def check_problem(logits: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Support]:
    """Logits and candidates of one shape (..., n, k), and the pairs that lie on a permutation.

    Raises:
        TypeError: ``logits`` not floating, ``candidates`` not of an integer dtype.
        ValueError: NaN, +inf, too large, columns that are no candidates, no permutation.
    """
    logits, candidates = _fitted(logits, candidates, "logits")
    check_magnitude(logits, "logits")
    return logits, candidates, _support(logits.detach(), candidates)


def _fitted(values: Tensor, candidates: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Both at the shape (..., n, k) that they broadcast to, candidates as long and in their range.

    Raises:
        TypeError: values not floating, candidates no integers.
        ValueError: shapes that do not fit, a column out of range.
    """
    check_floating(_tensor(values, name), name)
    kind = _tensor(candidates, "candidates").dtype
    if kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise TypeError(f"candidates must have an integer dtype, but has {kind}")
    if values.dim() < 2 or 0 in values.shape[-2:]:
        raise ValueError(f"{name} must have shape (..., n, k) with n and k at least 1, but has {tuple(values.shape)}")
    try:
        if candidates.dim() < 2 or candidates.shape[-2:] != values.shape[-2:]:
            raise RuntimeError
        shape = torch.broadcast_shapes(candidates.shape, values.shape)
    except RuntimeError:
        raise ValueError(
            f"candidates of shape {tuple(candidates.shape)} do not fit {name} of shape {tuple(values.shape)}; expected "
            "the same last two dimensions, and batch shapes that broadcast"
        ) from None
    n, candidates = shape[-2], candidates.long()
    outside = (candidates < 0) | (candidates >= n)
    if bool(outside.any()):
        *item, row, place = at = first_position(outside)
        raise ValueError(
            f"candidates{describe(tuple(item))} has column {int(candidates[at])} at row {row}, place "
            f"{place}; expected 0 to {n - 1}, for padding too"
        )
    return values.expand(shape), candidates.expand(shape)


def _check_distinct(candidates: Tensor, present: Tensor) -> None:
    """Raise ``ValueError`` if a row has a column twice among those present; both of one shape (..., n, k)."""
    n, k = candidates.shape[-2:]
    padding = n + torch.arange(k, device=candidates.device)
    ranked = torch.where(present, candidates, padding).sort(-1).values
    twice = ranked[..., 1:] == ranked[..., :-1]
    if bool(twice.any()):
        *item, row, _ = at = first_position(twice)
        raise ValueError(
            f"candidates{describe(tuple(item))} has column {int(ranked[at])} twice at row {row}; pad rows by -inf in logits"
        )


def _support(logits: Tensor, candidates: Tensor) -> Support:
    """Look at entries; the pairs that lie on a permutation."""
    check_entries(logits, "logits")
    allowed = logits > -torch.inf
    _check_distinct(candidates, allowed)
    return find_candidate_support(allowed, candidates)


def _check_values(z: Tensor, logits: Tensor, temperature: float | Tensor, *_: None, candidates: Tensor) -> Support:
    """As :func:`check_problem`, of what a transformation shows inside the solver only."""
    check_temperature(temperature)
    support = _support(logits, candidates.expand(logits.shape))
    check_overflow(z, logits)
    return support


def _tensor(value: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (..., n, k), but got {type(value).__name__}")
    return value

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
    broadcast_batch,
    check_entries,
    check_floating,
    check_magnitude,
    check_square,
    check_temperature,
    describe,
    first_position,
)
from pyro_gs.ops.sinkhorn import check_options, check_overflow, default_tol, scaled_logits, warn_unconverged
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
    check_floating(_tensor(values, "values"), "values")
    candidates = check_candidates(candidates, values.detach() != fill, "values")
    batch, n = candidates.shape[:-2], candidates.shape[-2]
    values = values.expand(candidates.shape)
    out = torch.full((*batch, n, n + 1), fill, dtype=values.dtype, device=values.device)
    place = torch.where(values.detach() != fill, candidates, n)  # padding goes to a column that is cut off
    return out.scatter(-1, place, values)[..., :n]


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
    candidates alone as long as conjugate gradients converge; a matrix on which they do not (at low temperature, where few
    pairs are left) is factored as a dense one, with n^2 numbers. Entries are right to the marginal error, in absolute and
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
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
    else:
        check_floating(temperature, "temperature")
        check_temperature(temperature)
    check_options(tol, max_iter)
    logits, candidates, support = check_problem(logits, candidates)
    if isinstance(temperature, Tensor) and temperature.dim():
        batch = broadcast_batch(temperature, logits)
        logits = logits.expand(*batch, *logits.shape[-2:])
    assert support.allowed is not None  # of candidates
    z = scaled_logits(logits.masked_fill(~support.allowed, -torch.inf), temperature)
    check_overflow(z, z.detach())
    tol = default_tol(logits.dtype) if tol is None else tol
    found = scale(
        z, support, tol=tol, max_iter=max_iter or 500, relative=False, layout=Sparse(candidates),
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
        >>> sparse_sinkhorn(X, torch.tensor([[0, 1], [0, 1]]), temperature=0.05)
        tensor([[1.0000e+00, 4.5398e-05],
                [4.5398e-05, 1.0000e+00]])
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


def check_problem(logits: Tensor, candidates: Tensor, *, warn: bool = True) -> tuple[Tensor, Tensor, Support]:
    """Logits and candidates of one shape (..., n, k), and the pairs that lie on a permutation.

    Raises:
        TypeError: ``logits`` not floating, ``candidates`` not of an integer dtype.
        ValueError: NaN, +inf, too large, columns that are no candidates, no permutation.
    """
    check_floating(_tensor(logits, "logits"), "logits")
    allowed = logits.detach() > -torch.inf
    if logits.dim() >= 2:
        check_entries(logits, "logits")
        check_magnitude(logits, "logits")
    candidates = check_candidates(candidates, allowed, "logits")
    logits = logits.expand(candidates.shape)
    return logits, candidates, find_candidate_support(logits.detach() > -torch.inf, candidates, warn=warn)


def check_candidates(candidates: Tensor, allowed: Tensor, name: str) -> Tensor:
    """Candidates as long, of the shape (..., n, k) that they and what they belong to broadcast to.

    Args:
        candidates: integers (..., n, k).
        allowed: bool (..., n, k), which are no padding.
        name: of what they belong to, for messages.

    Raises:
        TypeError: no integers.
        ValueError: another shape, a column out of range, or one twice in a row.
    """
    kind = _tensor(candidates, "candidates").dtype
    if kind == torch.bool or kind.is_floating_point or kind.is_complex:
        raise TypeError(f"candidates must have an integer dtype, but has {kind}")
    if allowed.dim() < 2 or 0 in allowed.shape[-2:]:
        raise ValueError(f"{name} must have shape (..., n, k) with n and k at least 1, but has {tuple(allowed.shape)}")
    try:
        if candidates.dim() < 2 or candidates.shape[-2:] != allowed.shape[-2:]:
            raise RuntimeError
        shape = torch.broadcast_shapes(candidates.shape, allowed.shape)
    except RuntimeError:
        raise ValueError(
            f"candidates of shape {tuple(candidates.shape)} do not fit {name} of shape {tuple(allowed.shape)}; expected "
            "the same last two dimensions, and batch shapes that broadcast"
        ) from None
    n = shape[-2]
    outside = (candidates < 0) | (candidates >= n)
    if bool(outside.any()):
        *item, row, place = first_position(outside)
        raise ValueError(
            f"candidates{describe(tuple(item))} has column {int(candidates[(*item, row, place)])} at row {row}, place "
            f"{place}; expected 0 to {n - 1}, for padding too"
        )
    candidates, allowed = candidates.long().expand(shape), allowed.expand(shape)
    padding = n + torch.arange(shape[-1], device=candidates.device)
    ranked = torch.where(allowed, candidates, padding).sort(-1).values
    twice = ranked[..., 1:] == ranked[..., :-1]
    if bool(twice.any()):
        *item, row, place = first_position(twice)
        raise ValueError(
            f"candidates{describe(tuple(item))} has column {int(ranked[(*item, row, place)])} twice at row {row}; pad rows "
            "by -inf in logits"
        )
    return candidates


def _tensor(value: Tensor, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (..., n, k), but got {type(value).__name__}")
    return value

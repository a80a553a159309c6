"""The matching operator ``M``: maximum-weight matchings of a batch, and the change between matrix and index.

Convention: ``P[i, j] = 1`` says that row ``i`` is matched to column ``j``, so ``P @ x == x[index]`` for
``index = to_index(P)``.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_gs.ops.batching import refuse_tracing
from pyro_gs.ops.logits import check_logits, check_square, describe, first_position
from pyro_gs.ops.padding import Assignment, Capacities, unpad
from pyro_gs.ops.support import raise_infeasible

_THREADED_ENTRIES = 2**21  # of a batch, 15 ms or more; for less, torch's own idle threads keep the cores busy too long
_THREADED_N = 20  # below it a solve is so short that threads mostly wait for each other


def matching(logits: Tensor, *, unmatched: float | Tensor | None = None, capacities: Capacities | None = None) -> Tensor:
    r"""Permutation matrix of the largest total weight, ``M(X) = argmax_P <P, X>``.

    ``M`` is the limit of the Sinkhorn operator at zero temperature, ``M(X) = lim S(X / tau)`` (Mena et al. 2018,
    Theorem 1). It is piecewise constant, so the result carries no gradient. Solved exactly, item by item, after a single
    transfer to the host: by lapx where it is installed (``pip install 'pyro-gs[fast]'``), else by
    :func:`scipy.optimize.linear_sum_assignment`. Large batches are shared among ``torch.get_num_threads()`` threads.
    Where several permutations have the largest weight, the two solvers may return different ones.

    **Partial and one-to-many.** With ``unmatched`` a row may stay unmatched at a score, with ``capacities`` a column may
    take several rows; then logits may be rectangular, columns may stay free, and the result is the assignment of the
    largest total weight and score (:func:`pyro_gs.pad_logits`).

    Args:
        logits: log-potentials, shape (..., n, n), larger is better; ``-inf`` forbids a pair. Half precision is
            solved in double precision like every other dtype. With ``unmatched`` or ``capacities``, shape (..., n, m).
        unmatched: score of a row that stays unmatched, a number or a tensor that broadcasts to (..., n).
        capacities: how many rows a column may take, an integer for all or one for each of the m columns.

    Returns:
        Tensor of the shape of ``logits``: permutation matrices, with the dtype and device of ``logits``; with
        ``unmatched`` or ``capacities`` zeros and ones of which rows have at most one, columns at most their capacity.

    Raises:
        TypeError: ``logits`` is not a floating tensor.
        ValueError: ``logits`` is not square, has a NaN or +inf, or allows no permutation; the message names the
            batch item and, for the last, the rows of a Hall violator (rows that share too few columns).
        RuntimeError: under a transform of ``torch.func``, which hides values; give a batch.

    Example:
        >>> import torch
        >>> scores = torch.outer(torch.tensor([1.0, 4.0, 9.0]), torch.tensor([7.0, 2.0, 5.0]))
        >>> to_index(matching(scores))
        tensor([1, 2, 0])
    """
    if unmatched is not None or capacities is not None:
        problem = Assignment(logits, unmatched, capacities)
        best = to_matrix(solve_assignment(problem.padded()), dtype=logits.dtype)
        return unpad(best, problem.shape, capacities=problem.capacities)
    check_logits(logits)
    return to_matrix(solve_assignment(logits), dtype=logits.dtype)


def solve_assignment(logits: Tensor) -> Tensor:
    """The best column of every row, long (..., n) on the device of ``logits``, which are taken as checked."""
    refuse_tracing("a matching")
    n = logits.shape[-1]
    scores = logits.detach().to("cpu", torch.float64).reshape(-1, n, n).numpy()
    index = np.empty(scores.shape[:2], dtype=np.int64)
    lapx = _lapx_solver()
    from scipy.optimize import linear_sum_assignment  # slow to load, so not with the package

    def solve(start: int, stop: int) -> None:
        if lapx is not None:
            try:
                # Its own threads would outlive the call, and hang a process that forks later.
                _, columns = lapx(-scores[start:stop], return_cost=False, n_threads=1)
                np.concatenate(columns, out=index[start:stop].reshape(-1))
                return
            except ValueError:  # an item without a permutation, or an overflow; scipy says which
                pass
        for item in range(start, stop):
            try:
                index[item] = linear_sum_assignment(scores[item], maximize=True)[1]
            except ValueError:
                raise_infeasible(torch.from_numpy(scores[item] != -np.inf), logits.shape[:-2], item)

    batch = len(scores)
    threads = min(torch.get_num_threads(), batch)
    if threads < 2 or n < _THREADED_N or scores.size < _THREADED_ENTRIES:
        solve(0, batch)
    else:
        step = math.ceil(batch / (8 * threads))  # small parts, so that a core that is busy elsewhere delays little
        starts = range(0, batch, step)
        with ThreadPoolExecutor(threads) as pool:  # its results come in order, so the first infeasible item is named
            list(pool.map(solve, starts, (min(start + step, batch) for start in starts)))
    return torch.from_numpy(index).reshape(logits.shape[:-1]).to(logits.device)


@functools.cache
def _lapx_solver() -> Callable[..., Any] | None:
    """The batch solver of lapx 0.11 or later, if installed; the package lap has a module of the same name without it."""
    try:
        solver: Callable[..., Any] | None = getattr(importlib.import_module("lap"), "lapjvr_batch", None)
    except ImportError:
        return None
    return solver


def to_index(P: Tensor) -> Tensor:
    """Index form of permutation matrices.

    Args:
        P: permutation matrices, shape (..., n, n), any dtype.

    Returns:
        Tensor of shape (..., n), dtype long: ``index[i]`` is the column that row ``i`` is matched to.

    Raises:
        ValueError: an item is not a permutation matrix; the message names it.

    Example:
        >>> import torch
        >>> to_index(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([1, 0])
    """
    check_square(P, "P")
    ones = P == 1
    good = (ones | (P == 0)).all(-1).all(-1) & (ones.sum(-1) == 1).all(-1) & (ones.sum(-2) == 1).all(-1)
    if not bool(good.all()):
        where = first_position(~good) if good.dim() else ()
        raise ValueError(
            f"P{describe(where)} is not a permutation matrix; every row and column must hold a single 1 and zeros else"
        )
    return ones.to(torch.uint8).argmax(-1)


def to_matrix(index: Tensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Permutation matrices of index vectors, the inverse of :func:`to_index`.

    Args:
        index: shape (..., n), an integer dtype; every item a permutation of 0, ..., n - 1.
        dtype: of the result, by default torch's default dtype.
        device: of the result, by default that of ``index``.

    Returns:
        Tensor of shape (..., n, n).

    Raises:
        TypeError: ``index`` is not an integer tensor.
        ValueError: an item is not a permutation; the message names it.

    Example:
        >>> import torch
        >>> to_matrix(torch.tensor([1, 0]))
        tensor([[0., 1.],
                [1., 0.]])
    """
    if not isinstance(index, Tensor) or index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        kind = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an integer tensor of shape (..., n), but is {kind}")
    if index.dim() < 1 or index.shape[-1] == 0:
        raise ValueError(f"index must have shape (..., n) with n >= 1, but has shape {tuple(index.shape)}")
    n, index = index.shape[-1], index.long()
    good = (index.sort(-1).values == torch.arange(n, device=index.device)).all(-1)
    if not bool(good.all()):
        where = first_position(~good) if good.dim() else ()
        raise ValueError(f"index{describe(where)} is not a permutation of 0, ..., {n - 1}: {index[where].tolist()}")
    out = torch.zeros((*index.shape, n), dtype=dtype or torch.get_default_dtype(), device=index.device)
    out.scatter_(-1, index[..., None], 1.0)
    return out if device is None else out.to(device)

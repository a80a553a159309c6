r"""Permanents of non-negative matrices: exact by subset recursion, and the Bethe approximation.

``perm(A) = sum over permutations of prod_i A[i, s(i)]``; for a 0/1 mask it counts the allowed permutations. The
recursion over subsets of columns (Ryser 1963 calls it expansion by rows) adds non-negative terms only, so unlike
inclusion-exclusion it keeps every digit; it costs ``n 2^n``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EXACT_LIMIT = 20
"""Largest number of rows for the exact recursion (2^20 sums)."""

Array = NDArray[np.float64]


def log_subset_table(log_a: Array) -> Array:
    """Log-permanents of the first ``|S|`` rows against every subset ``S`` of columns, indexed by bit mask."""
    n = log_a.shape[0]
    subsets = np.arange(1 << n)
    size = np.zeros(1 << n, dtype=np.int64)
    for j in range(n):
        size += (subsets >> j) & 1
    table = np.full(1 << n, -np.inf)
    table[0] = 0.0
    order = np.argsort(size, kind="stable")
    starts = np.searchsorted(size[order], np.arange(n + 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        for count in range(1, n + 1):
            level = order[starts[count] : starts[count + 1]]
            terms = np.full((n, len(level)), -np.inf)
            for j in range(n):
                inside = (level >> j) & 1 == 1
                terms[j, inside] = log_a[count - 1, j] + table[level[inside] ^ (1 << j)]
            top = terms.max(0)
            safe = np.where(np.isfinite(top), top, 0.0)
            table[level] = np.log(np.exp(terms - safe).sum(0)) + safe
    return table


def exact_log_permanent(log_a: Array) -> float:
    """Log-permanent of one matrix (n, n) given by logarithms, n at most :data:`EXACT_LIMIT`.

    Raises:
        ValueError: too large.
    """
    n = log_a.shape[0]
    if n > EXACT_LIMIT:
        raise ValueError(f"log_a has {n} rows; the exact permanent is limited to {EXACT_LIMIT}")
    return float(log_subset_table(log_a)[-1])


def bethe_log_permanent(log_a: Array, *, tol: float = 1e-10, max_iter: int = 10_000) -> float:
    """Bethe approximation of the log-permanent, a lower bound (Vontobel 2013; Gurvits 2011), by message passing.

    Args:
        log_a: logarithms of a non-negative matrix (n, n) with total support, every row and column with at least two
            allowed entries.
        tol: largest change of a message at which to stop.
        max_iter: cap on sweeps; convergence is guaranteed in the limit.
    """
    a = torch.from_numpy(np.asarray(log_a, dtype=np.float64))
    allowed = a > -torch.inf
    down = torch.zeros_like(a)

    def others(x: Tensor, dim: int) -> Tensor:
        """Log-sum over all other allowed entries of the row or column, without cancellation."""
        n = x.shape[0]
        x = torch.where(allowed, x, -torch.inf)
        x = x if dim == 1 else x.T
        wide = x[:, None, :].expand(n, n, n).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
        out = torch.logsumexp(wide, -1)
        return out if dim == 1 else out.T

    for _ in range(max_iter):
        across = -others(a + down, 1)
        new = -others(a + across, 0)
        change = torch.where(allowed, new - down, 0.0).abs().max()
        down = new
        if change < tol:
            break
    log_odds = a + across + down
    b = torch.where(allowed, torch.sigmoid(log_odds), 0.0)
    log_b = torch.where(allowed, torch.nn.functional.logsigmoid(log_odds), 0.0)
    log_rest = torch.where(allowed, torch.nn.functional.logsigmoid(-log_odds), 0.0)
    energy = torch.where(allowed, a, 0.0)
    return float((b * (energy - log_b) + (1 - b) * log_rest).sum())


@functools.lru_cache(maxsize=256)
def count_permutations(packed: bytes, n: int) -> tuple[float, bool]:
    """Log-number of permutations that a connected mask (n, n) with total support allows, and whether it is exact.

    The mask comes packed by ``numpy.packbits``, so that results can be remembered.
    """
    mask = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n * n).reshape(n, n).astype(bool)
    with np.errstate(divide="ignore"):
        log_a = np.log(mask.astype(np.float64))
    if mask.all():
        return float(torch.lgamma(torch.tensor(n + 1.0, dtype=torch.float64))), True
    if n <= EXACT_LIMIT:
        return exact_log_permanent(log_a), True
    return bethe_log_permanent(log_a), False

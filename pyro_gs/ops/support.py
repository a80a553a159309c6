"""Forbidden pairs: which entries lie on a permutation, how the rest falls apart, and why none may exist.

A mask has *total support* if each of its entries lies on some perfect matching. The Sinkhorn operator exists exactly
on such masks. With one perfect matching in hand, an allowed entry lies on another one exactly if its row and its
column belong to the same strongly connected component of the matched graph (Dulmage and Mendelsohn 1958); these
components are also the blocks into which every law over the mask's permutations factors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, maximum_bipartite_matching
from torch import Tensor

from pyro_gs.ops.logits import describe, warn_user


class SupportWarning(UserWarning):
    """Allowed pairs that lie on no permutation were dropped.

    They have probability zero under every law. To look for a mistake in a mask rather than go on:

    Example:
        >>> import warnings
        >>> import torch
        >>> import pyro_gs as pgs
        >>> allowed = torch.tensor([[True, True], [False, True]])  # row 1 needs column 1, so row 0 cannot have it
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", pgs.SupportWarning)
        ...     pgs.UniformPermutation(2, allowed)
        Traceback (most recent call last):
            ...
        pyro_gs.ops.support.SupportWarning: allowed permits row 0, column 1, which lies on no permutation...
    """


class Support:
    """The allowed entries of a batch of matrices and the components they fall into.

    Attributes:
        allowed: bool (..., n, n), pruned to total support; None where every entry of every item is allowed.
        component: long (..., n), the component of each column, a number from 0 to n - 1, or None as above.
        row_component: long (..., n), the component of each row.
        grounded: bool (..., n), True at the first column of every component; the gauge is fixed there.
        shape: the shape (..., n, n).
    """

    def __init__(
        self,
        shape: torch.Size,
        allowed: Tensor | None = None,
        row_component: Tensor | None = None,
        component: Tensor | None = None,
        grounded: Tensor | None = None,
    ) -> None:
        self.shape = shape
        self.allowed = allowed
        self.row_component = row_component
        self.component = component
        self.grounded = grounded

    @property
    def full(self) -> bool:
        """Whether nothing is forbidden."""
        return self.allowed is None

    def reshape(self, shape: tuple[int, ...]) -> Support:
        """The same items under another batch shape (``shape`` includes the event dimensions)."""
        size = torch.Size(shape)
        if self.full:
            return Support(size)
        parts = [self.row_component, self.component, self.grounded]
        vectors = [None if part is None else part.reshape(size[:-1]) for part in parts]
        assert self.allowed is not None
        return Support(size, self.allowed.reshape(size), *vectors)

    def select(self, items: Tensor) -> Support:
        """Items of a flat batch (shape (b, n, n)) by a boolean or index tensor."""
        count = int(items.sum()) if items.dtype == torch.bool else items.shape[0]
        size = torch.Size((count, *self.shape[-2:]))
        if self.full:
            return Support(size)
        parts = [self.allowed, self.row_component, self.component, self.grounded]
        return Support(size, *[None if part is None else part[items] for part in parts])

    def first(self, dim: int) -> Support:
        """The first item along a batch dimension, which is kept."""
        size = torch.Size((*self.shape[:dim], 1, *self.shape[dim + 1 :]))
        parts = [self.allowed, self.row_component, self.component, self.grounded]
        return Support(size, *[None if part is None else part.narrow(dim, 0, 1) for part in parts])

    def expand(self, batch_shape: torch.Size) -> Support:
        """The same items, expanded to a larger batch shape."""
        size = torch.Size(batch_shape) + self.shape[-2:]
        if self.full:
            return Support(size)
        assert self.allowed is not None
        parts = [self.row_component, self.component, self.grounded]
        vectors = [None if part is None else part.expand(size[:-1]) for part in parts]
        return Support(size, self.allowed.expand(size), *vectors)


@functools.lru_cache(maxsize=4096)
def _decompose(packed: bytes, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Pruned mask, row labels and column labels of one mask, or None where no permutation is allowed."""
    mask = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n * n).reshape(n, n).astype(bool)
    labels = component_labels(csr_matrix(mask))
    return None if labels is None else (mask & (labels[0][:, None] == labels[1][None, :]), *labels)


def component_labels(graph: csr_matrix) -> tuple[np.ndarray, np.ndarray] | None:
    """Component of every row and of every column of the allowed pairs (n, n), or None where no permutation is allowed."""
    n = graph.shape[0]
    match = maximum_bipartite_matching(graph, perm_type="column")  # column of each row, -1 for none
    if (match < 0).any():
        return None
    # Row i reaches row k if it may take k's column: cycles of this graph turn one matching into another.
    _, labels = connected_components(graph[:, match], directed=True, connection="strong")
    column_labels = np.empty(n, dtype=np.int64)
    column_labels[match] = labels
    return labels.astype(np.int64), column_labels


def find_support(allowed: Tensor, name: str = "logits", *, prune: bool = True, warn: bool = True) -> Support:
    """Total support and components of a batch of masks.

    Results are remembered by the mask's content, so that a law built at every step of an optimization pays once.

    Args:
        allowed: bool, shape (..., n, n).
        name: the argument's name in messages.
        prune: drop entries that lie on no permutation; otherwise they raise.
        warn: whether to warn of what is dropped.

    Raises:
        ValueError: an item allows no permutation (names the item and the rows of a Hall violator), or, with
            ``prune=False``, has entries that lie on no permutation.
    """
    if bool(allowed.all()):
        return Support(allowed.shape)
    n = allowed.shape[-1]
    flat = allowed.detach().to("cpu").reshape(-1, n, n).numpy()
    masks, rows, columns = np.empty_like(flat), np.empty(flat.shape[:2], np.int64), np.empty(flat.shape[:2], np.int64)
    for item, mask in enumerate(flat):
        parts = _decompose(np.packbits(mask).tobytes(), n)
        if parts is None:
            raise_infeasible(torch.from_numpy(mask), allowed.shape[:-2], item, name)
        masks[item], rows[item], columns[item] = parts
    if not (masks == flat).all():
        item, row, column = (int(i) for i in np.argwhere(masks != flat)[0])
        text = _off_every_permutation(name, unravel(item, allowed.shape[:-2]), row, column, int((masks != flat).sum()))
        if not prune:
            raise ValueError(text)
        if warn:
            warn_user(f"{text}; they are forbidden from here on", SupportWarning)
    earlier = np.arange(n)[:, None] > np.arange(n)[None, :]
    first = ~((columns[:, :, None] == columns[:, None, :]) & earlier).any(-1)

    def restore(part: np.ndarray, shape: torch.Size) -> Tensor:
        return torch.from_numpy(part).reshape(shape).to(allowed.device)

    vector = allowed.shape[:-1]
    return Support(
        allowed.shape, restore(masks, allowed.shape), restore(rows, vector), restore(columns, vector), restore(first, vector)
    )


def _off_every_permutation(name: str, item: tuple[int, ...], row: int, column: int, count: int) -> str:
    return f"{name}{describe(item)} permits row {row}, column {column}, which lies on no permutation ({count} such entries)"


@functools.lru_cache(maxsize=64)
def _decompose_candidates(
    columns: bytes, packed: bytes, n: int, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Pruned entries, row labels, column labels and first columns of components, or None without a permutation."""
    column = np.frombuffer(columns, dtype=np.int64).reshape(n, k)
    allowed = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n * k).reshape(n, k).astype(bool)
    row, _ = np.nonzero(allowed)
    labels = component_labels(csr_matrix((np.ones(len(row), dtype=bool), (row, column[allowed])), shape=(n, n)))
    if labels is None:
        return None
    first = np.zeros(n, dtype=bool)
    first[np.unique(labels[1], return_index=True)[1]] = True
    return allowed & (labels[0][:, None] == labels[1][column]), *labels, first


def find_candidate_support(allowed: Tensor, columns: Tensor, *, warn: bool = True) -> Support:
    """As :func:`find_support`, of the candidates of rows; shapes (..., n, n) of the result are (..., n, k).

    Args:
        allowed: bool, shape (..., n, k).
        columns: long, of the same shape, the column of each candidate.
        warn: whether to warn of what is dropped.

    Raises:
        ValueError: an item allows no permutation; names the item and the rows of a Hall violator.
    """
    n, k = allowed.shape[-2:]
    flat, place = (part.detach().cpu().reshape(-1, n, k).numpy() for part in (allowed, columns))
    masks, rows, ends = np.empty_like(flat), np.empty(flat.shape[:2], np.int64), np.empty(flat.shape[:2], np.int64)
    first = np.empty(flat.shape[:2], bool)
    for item, (mask, column) in enumerate(zip(flat, place, strict=True)):
        parts = _decompose_candidates(column.astype(np.int64).tobytes(), np.packbits(mask).tobytes(), n, k)
        if parts is None:
            matrix = torch.zeros(n, n, dtype=torch.bool, device="cpu")
            matrix[torch.from_numpy(np.nonzero(mask)[0]), torch.from_numpy(column[mask])] = True
            raise_infeasible(matrix, allowed.shape[:-2], item)
        masks[item], rows[item], ends[item], first[item] = parts
    dropped = masks != flat
    if warn and dropped.any():
        item, row, where = (int(i) for i in np.argwhere(dropped)[0])
        at = unravel(item, allowed.shape[:-2])
        text = _off_every_permutation("logits", at, row, int(place[item, row, where]), int(dropped.sum()))
        warn_user(f"{text}; they are forbidden from here on", SupportWarning)
    vector = allowed.shape[:-1]
    shapes = (allowed.shape, vector, vector, vector)
    tensors = (torch.from_numpy(part).reshape(shape) for part, shape in zip((masks, rows, ends, first), shapes, strict=True))
    return Support(allowed.shape, *(part.to(allowed.device) for part in tensors))


def unravel(item: int, batch_shape: torch.Size) -> tuple[int, ...]:
    """Batch position of a flat item number."""
    return tuple(int(i) for i in np.unravel_index(item, tuple(batch_shape))) if len(batch_shape) else ()


def hall_violator(allowed: Tensor) -> tuple[list[int], list[int]]:
    """Rows that together may take fewer columns than they are, and those columns.

    Args:
        allowed: bool, shape (n, n), without a perfect matching.

    Returns:
        Rows and columns, both sorted; more rows than columns (Hall 1935).

    Raises:
        ValueError: the mask has a perfect matching.
    """
    mask = allowed.cpu().numpy()
    match = maximum_bipartite_matching(csr_matrix(mask), perm_type="column")
    free = np.flatnonzero(match < 0)
    if len(free) == 0:
        raise ValueError("allowed has a perfect matching, so no rows violate Hall's condition")
    row_of = {int(column): row for row, column in enumerate(match) if column >= 0}
    rows, columns, frontier = {int(free[0])}, set[int](), [int(free[0])]
    while frontier:
        for column in np.flatnonzero(mask[frontier.pop()]):
            if int(column) not in columns:
                columns.add(int(column))
                row = row_of[int(column)]  # matched, or the matching could grow
                if row not in rows:
                    rows.add(row)
                    frontier.append(row)
    return sorted(rows), sorted(columns)


def raise_infeasible(allowed: Tensor, batch_shape: torch.Size, item: int, name: str = "logits") -> NoReturn:
    """Raise the error for a mask (n, n) without a perfect matching, naming a Hall violator."""
    rows, columns = hall_violator(allowed)
    shared = "no column"
    if columns:
        shared = f"only column {columns[0]}" if len(columns) == 1 else f"only the {len(columns)} columns {columns}"
    short = f"the row {rows[0]}" if len(rows) == 1 else f"the {len(rows)} rows {rows}"
    hint = " (entries of -inf are forbidden)" if name.startswith("log") else ""
    raise ValueError(f"{name}{describe(unravel(item, batch_shape))} allows no permutation: {short} may take {shared}{hint}")


def component_sums(values: Tensor, support: Support, *, rows: bool = False) -> Tensor:
    """Sums over the columns (or rows) of each component, by component number; zero at unused numbers.

    Args:
        values: shape (..., n), with leading dimensions beyond those of ``support`` allowed.
        support: of shape (..., n, n).
        rows: whether ``values`` belong to rows.

    Returns:
        Tensor of shape (..., n).
    """
    label = support.row_component if rows else support.component
    if label is None:
        out = torch.zeros_like(values)
        out[..., 0] = values.sum(-1)
        return out
    return torch.zeros_like(values).scatter_add(-1, label.expand(values.shape), values)


def component_sizes(support: Support) -> Tensor:
    """Number of rows of every component by its number, zero at unused ones, long (..., n); one item if all is allowed."""
    n = support.shape[-1]
    if support.component is None:
        return torch.tensor([n] + [0] * (n - 1), device="cpu")
    return component_sums(torch.ones_like(support.component), support)


def rows_of_component(support: Support, like: Tensor) -> Tensor:
    """Number of rows of the component that each row belongs to, long (..., n)."""
    if support.row_component is None:
        return torch.full_like(like[..., 0], like.shape[-1], dtype=torch.long)
    return component_sizes(support).gather(-1, support.row_component)


class Block(NamedTuple):
    """The components of one size of a flattened batch of matrices.

    Attributes:
        size: number of rows, s.
        item: the matrix that each of the g components belongs to, long (g,).
        rows: long (g, s).
        columns: long (g, s).
    """

    size: int
    item: Tensor
    rows: Tensor
    columns: Tensor

    def of(self, x: Tensor) -> Tensor:
        """The components of matrices (..., n, n), shape (g, s, s)."""
        n = x.shape[-1]
        return x.reshape(-1, n, n)[self.item[:, None, None], self.rows[:, :, None], self.columns[:, None, :]]


def blocks(support: Support, device: torch.device) -> Iterator[Block]:
    """Components of a batch, size by size, the smallest first."""
    n, count = support.shape[-1], math.prod(support.shape[:-2])
    if support.component is None or support.row_component is None:
        all_of_them = torch.arange(n, device=device).expand(count, n)
        yield Block(n, torch.arange(count, device=device), all_of_them, all_of_them)
        return
    sizes = component_sizes(support).reshape(-1, n)
    for size in sizes.unique().tolist():
        if size:
            item, label = (sizes == size).nonzero(as_tuple=True)
            members = [
                (part.reshape(-1, n)[item] == label[:, None]).nonzero()[:, 1].reshape(-1, size)
                for part in (support.row_component, support.component)
            ]
            yield Block(size, item, *members)

r"""Coordinates of matrices that count only up to adding numbers to rows and to columns.

The allowed entries are the edges of a graph between rows and columns. What row and column shifts leave of a matrix is its
alternating sums around cycles, ``k = |S| - 2n + c`` numbers for ``|S|`` entries in ``c`` components. Each class of matrices
has one that is zero on a given spanning forest; the other entries of it are free. The coordinates ``x`` are orthonormal: of
the length of the shortest matrix in the class, that whose rows and columns sum to zero. In terms of the free entries ``y``
they are ``x = G^(1/2) y``, where ``G - I`` adds numbers to rows and columns.

The free entries themselves would be poor coordinates. For a matrix of independent entries they are correlated, by the
entries of the forest that all of them contain: with nothing forbidden the condition number of ``G`` is ``n^2``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from pyro_gs.ops.logits import describe
from pyro_gs.ops.support import Support, unravel

_NULL = 1e-12  # eigenvalues that are zero up to rounding


class Cycles:
    """Coordinates for the matrices (..., n, n) of one mask or of a batch of masks.

    Attributes:
        n: number of rows.
        k: number of coordinates.
        logdet: ``log |dy / dx|``, float64, (...).

    Args:
        n: number of rows.
        free: flat positions of the free entries in increasing order, (..., k).
        edge: of each node (rows, then columns) the flat position of the entry to its parent in the forest, (..., 2n).
        parent: of each node, (..., 2n); roots are their own.
        level: distance of each node from its root, (..., 2n).
        there: ``K`` (..., 2n, 2n) with ``G^(1/2) = I + N K N'``, where ``N`` adds numbers of nodes to the free entries.
        back: the same for ``G^(-1/2)``.
        logdet: as above.
    """

    def __init__(
        self,
        n: int,
        free: Tensor,
        edge: Tensor,
        parent: Tensor,
        level: Tensor,
        there: Tensor,
        back: Tensor,
        logdet: Tensor,
    ) -> None:
        self.n, self.k, self.logdet = n, free.shape[-1], logdet
        self._free, self._edge, self._parent, self._level = free, edge, parent, level
        self._depth = int(level.max())
        self._there, self._back = there, back

    def matrix(self, x: Tensor) -> Tensor:
        """A matrix (..., n, n) with the coordinates ``x`` (..., k), zero outside the free entries."""
        return self._placed(self._stretched(x, self._back))

    def coordinates(self, z: Tensor) -> Tensor:
        """The coordinates (..., k) of matrices (..., n, n) that are finite where allowed."""
        batch = z.shape[:-2]
        entries = z.reshape(*batch, self.n**2)
        edge, parent, level = (part.expand(*batch, 2 * self.n) for part in (self._edge, self._parent, self._level))
        edge = entries.gather(-1, edge)
        shift = torch.zeros_like(edge)
        for step in range(1, self._depth + 1):
            shift = torch.where(level == step, -edge - shift.gather(-1, parent), shift)
        y = entries.gather(-1, self._free.expand(*batch, self.k))
        return self._stretched(self._shifted(y, shift), self._there)

    def _placed(self, y: Tensor) -> Tensor:
        """The matrix (..., n, n) with the free entries ``y`` (..., k) and zeros."""
        flat = y.new_zeros(*y.shape[:-1], self.n**2).scatter(-1, self._free.expand(y.shape), y)
        return flat.reshape(*y.shape[:-1], self.n, self.n)

    def _shifted(self, y: Tensor, shift: Tensor) -> Tensor:
        """Free entries ``y`` (..., k) of a matrix to whose rows and columns (..., 2n) numbers are added."""
        free = self._free.expand(y.shape)
        return y + shift.gather(-1, free // self.n) + shift.gather(-1, self.n + free % self.n)

    def _stretched(self, y: Tensor, kernel: Tensor) -> Tensor:
        """``y + N K N' y``."""
        whole = self._placed(y)
        sums = torch.cat([whole.sum(-1), whole.sum(-2)], -1)
        return self._shifted(y, (sums[..., None, :] @ kernel)[..., 0, :])


@functools.lru_cache(maxsize=64)
def full_cycles(n: int, device: torch.device) -> Cycles:
    """Coordinates of matrices (n, n) with nothing forbidden; the free entries are the upper left block, row by row."""
    return _cycles(n, _parts(np.packbits(np.ones((n, n), bool)).tobytes(), n), (), device)


def masked_cycles(support: Support, name: str) -> Cycles:
    """Coordinates of a batch of masks; without batch dimensions if all items are alike.

    Raises:
        ValueError: items have different numbers of coordinates; names two.
    """
    assert support.allowed is not None
    n, batch, device = support.shape[-1], support.shape[:-2], support.allowed.device
    items = [_parts(np.packbits(mask).tobytes(), n) for mask in support.allowed.cpu().reshape(-1, n, n).numpy()]
    if all(item is items[0] for item in items):
        return _cycles(n, items[0], (), device)
    sizes = [len(item[0]) for item in items]
    other = next((number for number, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        first, second = (describe(unravel(number, batch)).removeprefix(" of ") for number in (0, other))
        raise ValueError(
            f"{name} leaves {sizes[0]} free entries in {first} and {sizes[other]} in {second}, so no tensor holds both; "
            "give the items sites of their own, or entries so that the numbers agree"
        )
    return _cycles(n, tuple(np.stack(part) for part in zip(*items, strict=True)), batch, device)


def _cycles(n: int, parts: tuple[np.ndarray, ...], batch: tuple[int, ...], device: torch.device) -> Cycles:
    with torch.inference_mode(False):  # they may be remembered, and used under autograd later
        tensors = [torch.from_numpy(part) for part in parts]
        lead = 1 if batch else 0
        return Cycles(n, *(part.reshape((*batch, *part.shape[lead:])).to(device) for part in tensors))


@functools.lru_cache(maxsize=128)
def _parts(packed: bytes, n: int) -> tuple[np.ndarray, ...]:
    """What :class:`Cycles` takes, of one mask."""
    mask = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n * n).reshape(n, n).astype(bool)
    free, edge, parent, level = _forest(mask)
    # G = I - N L^+ N' with the Laplacian L = N_S' N_S of all entries; so G^p = I + N R f(R' N' N R) R' N' where L^+ = R R'
    # and f(t) = ((1 - t)^p - 1) / t.
    eigenvalue, vector = np.linalg.eigh(_gram(mask))
    keep = eigenvalue > _NULL * n
    root = vector[:, keep] / np.sqrt(eigenvalue[keep])
    left = np.zeros(n * n, bool)
    left[free] = True
    t, vector = np.linalg.eigh(root.T @ _gram(left.reshape(n, n)) @ root)
    root, t = root @ vector, np.maximum(t, 0.0)
    kernels = []
    for power in (0.5, -0.5):
        f = np.where(t > _NULL, np.expm1(power * np.log1p(-t)) / np.maximum(t, _NULL), -power)
        kernels.append((root * f) @ root.T)
    return free, edge, parent, level, *kernels, np.asarray(-0.5 * np.log1p(-t).sum())


def _gram(mask: np.ndarray) -> np.ndarray:
    """``N' N`` (2n, 2n) for the entries of a mask."""
    rows, columns = np.diag(mask.sum(1)), np.diag(mask.sum(0))
    return np.block([[rows, mask], [mask.T, columns]]).astype(float)


def _forest(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Free entries, edges, parents and levels of a mask, by breadth-first search from the last row, last nodes first."""
    n = len(mask)
    parent, level, seen = np.arange(2 * n), np.zeros(2 * n, np.int64), np.zeros(2 * n, bool)
    for root in range(n - 1, -1, -1):
        if seen[root]:
            continue
        seen[root] = True
        queue = [root]
        for node in queue:
            near = np.flatnonzero(mask[node])[::-1] + n if node < n else np.flatnonzero(mask[:, node - n])[::-1]
            near = near[~seen[near]]
            seen[near], parent[near], level[near] = True, node, level[node] + 1
            queue.extend(near.tolist())
    nodes = np.arange(2 * n)
    edge = np.where(level > 0, np.minimum(nodes, parent) * n + np.maximum(nodes, parent) - n, 0)
    left = mask.reshape(-1).copy()
    left[edge[level > 0]] = False
    return np.flatnonzero(left), edge, parent, level

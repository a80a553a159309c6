"""How the entries of a matrix are laid out: all n x n of them, or those of the k candidates of each row.

What the Sinkhorn solver does with a matrix beyond arithmetic on its entries is to add along rows and along columns. Entries
are (b, n, w): w = n with :data:`DENSE`, w = k with :class:`Sparse`, where a sum along columns is a scatter.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NOTHING = 1e-290  # diagonal of a column that is tied to no other


class Dense:
    """All entries, (b, n, n)."""

    def take(self, items: Tensor) -> Dense:
        """The layout of some items of a flat batch."""
        return self

    def flat(self, batch_shape: torch.Size) -> Dense:
        """The layout of a batch that has been made flat."""
        return self

    def at_entries(self, x: Tensor) -> Tensor:
        """Values (b, n) of columns at the entries, to broadcast with (b, n, w)."""
        return x[:, None, :]

    def by_row(self, p: Tensor, x: Tensor) -> Tensor:
        """Products ``P x`` with values (b, m, n) of columns, (b, m, n)."""
        return x @ p.mT

    def by_column(self, p: Tensor, y: Tensor) -> Tensor:
        """Products ``P' y`` with values (b, m, n) of rows, (b, m, n)."""
        return y @ p

    def column_sums(self, p: Tensor) -> Tensor:
        """Sums (b, n) of entries along columns."""
        return p.sum(-2)

    def laplacian(self, p: Tensor, r: Tensor | None) -> Callable[[Tensor], Tensor]:
        """``x -> (diag(c) - P' diag(1/r) P) x`` for x (b, m, n); ``r`` are row sums (b, n), None for ones."""
        scale = None if r is None else (1 / r)[:, None, :]
        weight = p.sum(-2)[:, None, :]

        def apply(x: Tensor) -> Tensor:
            y = x @ p.mT
            return weight * x - (y if scale is None else scale * y) @ p

        return apply

    def diagonal(self, p: Tensor, r: Tensor | None) -> Tensor:
        """Diagonal (b, n) of the Laplacian."""
        out: Tensor = p.sum(-2) - torch.linalg.vecdot(p, p if r is None else p / r[..., None], dim=-2)
        return out

    def column_logsumexp(self, z: Tensor) -> Tensor:
        """Logarithms (b, n) of sums of exponentials along columns."""
        return torch.logsumexp(z, -2)

    def column_max(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """The largest entry of every column and its row, (b, n) each."""
        top, row = p.max(-2)
        return top, row

    def dense(self, p: Tensor, fill: float = 0.0) -> Tensor:
        """As matrices (b, n, n), with ``fill`` outside the entries."""
        return p

    def gather(self, matrix: Tensor) -> Tensor:
        """Entries of matrices (b, n, n)."""
        return matrix


class Sparse(Dense):
    """The candidates of each row.

    Args:
        columns: long (..., n, k), the column of each; a row's columns differ but where an entry is zero.
    """

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns

    def take(self, items: Tensor) -> Sparse:
        """The layout of some items of a flat batch."""
        return Sparse(self.columns[items])

    def flat(self, batch_shape: torch.Size) -> Sparse:
        """The layout of a batch that has been made flat."""
        n, k = self.columns.shape[-2:]
        return Sparse(self.columns.expand(*batch_shape, n, k).reshape(-1, n, k))

    def at_entries(self, x: Tensor) -> Tensor:
        """Values (b, n) of columns at the entries, (b, n, k)."""
        return x.gather(-1, self.columns.flatten(1)).reshape(self.columns.shape)

    def by_row(self, p: Tensor, x: Tensor) -> Tensor:
        """Products ``P x`` with values (b, m, n) of columns, (b, m, n)."""
        index = self.columns.flatten(1)[:, None, :].expand(-1, x.shape[1], -1)
        out: Tensor = (x.gather(-1, index).unflatten(-1, self.columns.shape[-2:]) * p[:, None]).sum(-1)
        return out

    def by_column(self, p: Tensor, y: Tensor) -> Tensor:
        """Products ``P' y`` with values (b, m, n) of rows, (b, m, n)."""
        index = self.columns.flatten(1)[:, None, :].expand(-1, y.shape[1], -1)
        return torch.zeros_like(y).scatter_add_(-1, index, (y[..., None] * p[:, None]).flatten(-2))

    def column_sums(self, p: Tensor) -> Tensor:
        """Sums (b, n) of entries along columns."""
        return torch.zeros_like(p[..., 0]).scatter_add_(-1, self.columns.flatten(1), p.flatten(1))

    def laplacian(self, p: Tensor, r: Tensor | None) -> Callable[[Tensor], Tensor]:
        """As of all entries, by differences to the largest entry of a row, so that weak ties keep their digits."""
        apart = self.apart(p, r)
        index = self.columns.flatten(1)[:, None, :]

        def apply(x: Tensor) -> Tensor:
            flow = (p[:, None] * apart(x)).flatten(-2)
            return torch.zeros_like(x).scatter_add_(-1, index.expand(-1, x.shape[1], -1), flow)

        return apply

    def apart(self, p: Tensor, r: Tensor | None) -> Callable[[Tensor], Tensor]:
        """``x -> x_j - sum_k P_ik x_k / r_i``, for x (b, m, n) at the entries, (b, m, n, k)."""
        index = self.columns.flatten(1)[:, None, :]
        top = self.columns.gather(-1, p.argmax(-1, keepdim=True))[..., 0][:, None, :]
        share = (p if r is None else p / r[..., None])[:, None]

        def apply(x: Tensor) -> Tensor:
            count = x.shape[1]
            e: Tensor = x.gather(-1, index.expand(-1, count, -1)).unflatten(-1, p.shape[1:])
            e = e - x.gather(-1, top.expand(-1, count, -1))[..., None]
            return e - (share * e).sum(-1, keepdim=True)

        return apply

    def diagonal(self, p: Tensor, r: Tensor | None) -> Tensor:
        """Diagonal (b, n) of the Laplacian, without subtraction; infinite for a column that is tied to no other."""
        total = p.sum(-1, keepdim=True)
        best = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.argmax(-1, keepdim=True), True)
        rest = torch.where(best, p.masked_fill(best, 0.0).sum(-1, keepdim=True), total - p)
        out = self.column_sums(p * (rest if r is None else rest / r[..., None]))
        return out.masked_fill(out < _NOTHING, torch.inf)

    def column_logsumexp(self, z: Tensor) -> Tensor:
        """Logarithms (b, n) of sums of exponentials along columns, of which none is empty."""
        top = torch.full_like(z[..., 0], -torch.inf).scatter_reduce_(-1, self.columns.flatten(1), z.flatten(1), "amax")
        return self.column_sums((z - self.at_entries(top)).exp()).log() + top

    def column_max(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """The largest entry of every column and its row, (b, n) each."""
        index = self.columns.flatten(1)
        top = torch.zeros_like(p[..., 0]).scatter_reduce_(-1, index, p.flatten(1), "amax")
        size, n, _ = p.shape
        row = torch.arange(n, device=p.device)[:, None].expand_as(p)
        row = torch.where((p == self.at_entries(top)) & (p > 0), row, 0)
        first = torch.zeros(size, n, dtype=torch.long, device=p.device).scatter_reduce_(-1, index, row.flatten(1), "amax")
        return top, first

    def dense(self, p: Tensor, fill: float = 0.0) -> Tensor:
        """As matrices (b, n, n), with ``fill`` outside the entries; entries of ``fill`` may have any column."""
        n = p.shape[-2]
        out = torch.full((len(p), n, n), fill, dtype=p.dtype, device=p.device)
        # Padding may point to the column of a candidate, and must not write over it.
        return out.scatter_reduce_(-1, self.columns, p, "sum" if fill == 0 else "amax")

    def gather(self, matrix: Tensor) -> Tensor:
        """Entries of matrices (b, n, n)."""
        return matrix.gather(-1, self.columns)


DENSE = Dense()

"""The classical way: the arrangement whose neighbouring borders differ least."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Borders", "border_cost", "borders", "solve"]

_BEAMS = 256
_POWER = 0.3
_CHUNK = 64  # puzzles at a time, for memory


@dataclass(frozen=True)
class Borders:
    """How badly pieces fit, sums of ``|difference|^0.3`` along borders.

    Attributes:
        right: With the second piece to the right of the first, shape (batch, n, n).
        below: With the second piece below the first, shape (batch, n, n).
        outside: Of a piece at a position with what surrounds the picture, shape (batch, n, n), rows pieces, columns
            positions.
        earlier: Whether the second piece is identical to the first and comes before it, shape (batch, n, n).
    """

    right: Tensor
    below: Tensor
    outside: Tensor
    earlier: Tensor


def borders(pieces: Tensor, outside: float | None = None) -> Borders:
    """Compare the borders of every two pieces.

    Args:
        pieces: Shape (batch, n, channels, height, width) with n a square number.
        outside: Value of the pixels around the picture, if it is known: 0 for digits, on black ground.

    Raises:
        ValueError: If n is no square number.
    """
    n = pieces.shape[1]
    k = round(n**0.5)
    if k * k != n:
        raise ValueError(f"pieces: expected a square number of them, got {n}")
    values = pieces.double()
    left, right, upper, lower = (values[..., 0], values[..., -1], values[..., 0, :], values[..., -1, :])
    frame = values.new_zeros(len(pieces), n, k, k)
    if outside is not None:
        for edge, side in (
            (frame[..., 0], left),
            (frame[..., -1], right),
            (frame[..., 0, :], upper),
            (frame[..., -1, :], lower),
        ):
            edge += _misfit(side.flatten(2), torch.as_tensor(outside))[..., None]
    flat = values.flatten(2)
    same = torch.cdist(flat, flat, p=float("inf")) == 0
    return Borders(
        right=_misfit(right.flatten(2)[:, :, None], left.flatten(2)[:, None]),
        below=_misfit(lower.flatten(2)[:, :, None], upper.flatten(2)[:, None]),
        outside=frame.flatten(2),
        earlier=same & torch.ones(n, n, dtype=torch.bool, device=pieces.device).tril(-1),
    )


def border_cost(found: Borders, order: Tensor) -> Tensor:
    """Misfit of whole arrangements.

    Args:
        found: Of the pieces.
        order: The piece at each position, shape (batch, m, n), of m arrangements of each puzzle.

    Returns:
        Sums over neighbours, and over the frame, shape (batch, m).
    """
    n = order.shape[-1]
    k = round(n**0.5)
    batch = torch.arange(len(order), device=order.device)[:, None, None]
    grid = order.reshape(*order.shape[:2], k, k)
    across = found.right[batch, grid[..., :-1].flatten(2), grid[..., 1:].flatten(2)].sum(-1)
    down = found.below[batch, grid[..., :-1, :].flatten(2), grid[..., 1:, :].flatten(2)].sum(-1)
    return across + down + found.outside[batch, order, torch.arange(n, device=order.device)].sum(-1)


def solve(pieces: Tensor, outside: float | None = None) -> Tensor:
    """Arrange pieces so that the borders of neighbours differ little.

    A beam search in reading order keeps the 256 best partial arrangements, identical pieces counted as one; the best whole
    arrangement is improved by exchanges of two pieces until none helps. Up to 3 x 3 pieces the search is close to
    exhaustive. The problem is a quadratic assignment with two terms, of which ``scipy.optimize.quadratic_assignment`` takes
    one. The exponent 0.3 is that of Pomeranz, Shemesh and Ben-Shahar 2011, 'A fully automated greedy square jigsaw puzzle
    solver'.

    Args:
        pieces: As `borders`.
        outside: As `borders`.

    Returns:
        The position of each piece, shape (batch, n).

    Raises:
        ValueError: As `borders`.
    """
    return torch.cat([_solved(borders(part, outside)) for part in pieces.split(_CHUNK)])


def _misfit(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs().pow(_POWER).sum(-1)


def _solved(found: Borders) -> Tensor:
    return _exchanged(found, _searched(found)).argsort(-1)


def _searched(found: Borders) -> Tensor:
    """The piece at each position, shape (batch, n), by beam search."""
    batch, n, _ = found.right.shape
    k = round(n**0.5)
    rows = torch.arange(batch, device=found.right.device)[:, None]
    orders = torch.zeros(batch, 1, 0, dtype=torch.long, device=found.right.device)
    costs = found.right.new_zeros(batch, 1)
    free = torch.ones(batch, 1, n, dtype=torch.bool, device=found.right.device)
    for position in range(n):
        waits = (found.earlier[:, None] & free[:, :, None]).any(-1)  # an identical piece comes first
        total = costs[..., None] + found.outside[:, None, :, position]
        if position % k:
            total = total + found.right[rows, orders[..., -1]]
        if position >= k:
            total = total + found.below[rows, orders[..., position - k]]
        total = total.masked_fill(~free | waits, torch.inf)
        costs, chosen = total.flatten(1).topk(min(_BEAMS, total[0].numel()), largest=False)
        parent, piece = chosen // n, chosen % n
        orders = torch.cat([orders[rows, parent], piece[..., None]], -1)
        free = free[rows, parent].scatter(-1, piece[..., None], False)
    return orders[:, 0]


def _exchanged(found: Borders, order: Tensor) -> Tensor:
    """Arrangements improved by the best exchange of two pieces, again and again."""
    batch, n = order.shape
    if n == 1:
        return order
    rows = torch.arange(batch, device=order.device)
    pairs = list(itertools.combinations(range(n), 2))
    moves = torch.arange(n, device=order.device).repeat(len(pairs), 1)
    for move, (a, b) in zip(moves, pairs, strict=True):
        move[a], move[b] = b, a
    cost = border_cost(found, order[:, None])[:, 0]
    while True:
        tried = order[:, moves]
        best, which = border_cost(found, tried).min(-1)
        better = best < cost * (1 - 1e-12)  # by more than rounding, so that it ends
        if not bool(better.any()):
            return order
        order = torch.where(better[:, None], tried[rows, which], order)
        cost = torch.where(better, best, cost)

"""What can be attained: exact arrangements of pieces for given pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gs import to_index
from pyro_gs.ops.matching import matching
from tutorials.assemble.tasks import Digits, Tasks

__all__ = ["best_for", "best_for_mean", "best_for_nearest", "nearest"]

_CHUNK = 10_000_000  # numbers in the logits of the tasks that are looked at together, for memory


def best_for(pieces: Tensor, targets: Tensor) -> Tensor:
    """The arrangement with the smallest squared error against a picture: an assignment problem, solved exactly.

    Args:
        pieces: Shape (batch, n, channels, height, width).
        targets: Pictures in pieces in reading order, of the same shape.

    Returns:
        The position of each piece, shape (batch, n).
    """
    return to_index(matching(pieces.flatten(2) @ targets.flatten(2).mT))


def best_for_mean(tasks: Tasks, digits: Digits) -> Tensor:
    """The arrangement with the smallest squared error against the mean picture of the label.

    By ``E |A - Y|^2 = |A - E Y|^2 + var Y`` that is the best expected error against a random picture of the label: no
    network that is told the label alone arranges better for the training pictures, on average.

    Args:
        tasks: The tasks.
        digits: Whose mean pictures.

    Returns:
        The position of each piece, shape (batch, n).
    """
    means = torch.stack([digits.pieces_of(label).mean(0) for label in range(10)]).to(tasks.pieces)
    return best_for(tasks.pieces, means[tasks.labels])


def best_for_nearest(tasks: Tasks, digits: Digits) -> Tensor:
    """The arrangement that comes nearest to any picture of the label, by squared error: no arrangement comes nearer.

    Args:
        tasks: The tasks.
        digits: Among whose pictures.

    Returns:
        The position of each piece, shape (batch, n).
    """
    out = torch.empty(tasks.pieces.shape[:2], dtype=torch.long, device=tasks.pieces.device)
    for label in tasks.labels.unique().tolist():
        pictures = digits.pieces_of(label).to(tasks.pieces).flatten(2)
        size = pictures.square().sum((1, 2))
        at_once = max(1, _CHUNK // (len(pictures) * pictures.shape[1] ** 2))
        for rows in (tasks.labels == label).nonzero()[:, 0].split(at_once):
            pieces = tasks.pieces[rows].flatten(2)
            logits = pieces[:, None] @ pictures.mT  # (tasks, pictures, n, n)
            matrices = matching(logits)
            error = size - 2 * (matrices * logits).sum((-2, -1))  # less the size of the pieces, the same for all
            out[rows] = to_index(matrices[torch.arange(len(rows), device=rows.device), error.argmin(1)])
    return out


def nearest(pictures: Tensor, labels: Tensor, digits: Digits) -> tuple[Tensor, Tensor]:
    """Differences to the nearest picture of the label.

    Args:
        pictures: In pieces in reading order, shape (batch, n, channels, height, width).
        labels: Shape (batch,).
        digits: Among whose pictures.

    Returns:
        The smallest mean absolute and the smallest mean squared difference, over pixels, each of shape (batch,); they may be
        those of different pictures.
    """
    l1, l2 = torch.empty_like(labels, dtype=pictures.dtype), torch.empty_like(labels, dtype=pictures.dtype)
    for label in labels.unique().tolist():
        of_label = labels == label
        a, b = pictures[of_label].flatten(1), digits.pieces_of(label).to(pictures).flatten(1)
        l1[of_label] = torch.cdist(a, b, p=1.0).amin(1) / a.shape[1]
        l2[of_label] = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").amin(1).square() / a.shape[1]
    return l1, l2

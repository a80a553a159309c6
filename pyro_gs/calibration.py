"""Whether probabilities of a posterior over permutations are as often right as they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_gs.distributions.constraints import permutation
from pyro_gs.ops.logits import check_floating, check_square, describe, first_position
from pyro_gs.ops.matching import to_index

_EDGE = 1e-6
"""Probabilities of one half among twins come out as .4999999999 or .5; they belong together."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """Probabilities beside how often what they were given to is true, over bins of equal width that are not empty.

    Attributes:
        lower: shape (bins,), left edges, the right one ``width`` further.
        width: of a bin.
        count: shape (bins,), long: answers in the bin.
        confidence: shape (bins,): mean probability of these answers.
        accuracy: shape (bins,): share of them that is right.

    Example:
        >>> import torch
        >>> from pyro_gs import reliability
        >>> marginals = torch.tensor([[0.95, 0.05], [0.05, 0.95]])
        >>> curve = reliability(marginals, torch.eye(2))
        >>> curve.confidence, curve.accuracy, round(curve.calibration_error, 2)
        (tensor([0.9500]), tensor([1.]), 0.05)
    """

    lower: Tensor
    width: float
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def calibration_error(self) -> float:
        """Mean gap between confidence and accuracy over answers, the expected calibration error (Naeini et al. 2015)."""
        return float((self.count * (self.confidence - self.accuracy).abs()).sum() / self.count.sum())

    def corrected(self, confidence: Tensor) -> Tensor:
        """How often answers given with these probabilities are right, as far as the curve tells.

        Isotonic regression (Zadrozny and Elkan 2002): the monotone function nearest to the curve, each bin weighted by its
        answers, straight between the bins' mean confidences and constant beyond the first and the last. Each bin counts one
        answer more than it has, right with the bin's mean confidence: few answers change little, and none makes certain.

        Args:
            confidence: probabilities, of any shape.

        Returns:
            Tensor of the same shape, dtype and device.

        Raises:
            TypeError: ``confidence`` is no floating tensor.
            ValueError: a value of it is not within [0, 1].
        """
        if not isinstance(confidence, Tensor):
            raise TypeError(f"confidence must be a tensor, but is {type(confidence).__name__}")
        check_floating(confidence, "confidence")
        outside = ~((confidence >= 0) & (confidence <= 1))
        if bool(outside.any()):
            value = float(confidence[first_position(outside)] if confidence.dim() else confidence)
            raise ValueError(f"confidence must be within [0, 1], but has {value:g}")
        count, order, accuracy = (x.double().cpu().numpy() for x in (self.count, self.confidence, self.accuracy))
        from scipy.optimize import isotonic_regression  # slow to load, so not with the package

        rates = isotonic_regression((count * accuracy + order) / (count + 1), weights=count + 1).x
        value = np.interp(confidence.detach().double().cpu().numpy(), order, rates)
        return torch.as_tensor(value, dtype=confidence.dtype, device=confidence.device)


def reliability(
    marginals: Tensor, truth: Tensor, bins: int = 10, *, answer: Tensor | None = None, rows: Tensor | None = None
) -> Reliability:
    """Reliability curve: of the answers given with probability p, the share that is right.

    Args:
        marginals: shape (..., n, n), posterior probability that a row is matched to a column; rows sum to one.
        truth: permutation matrices that broadcast to this shape.
        bins: number of bins of [0, 1]; a probability that is below an edge by rounding, 1e-6, counts above it.
        answer: permutation matrices, the answers whose probabilities are tested; by default each row's likeliest column.
        rows: bool, shape (..., n), broadcast: the rows that count, by default all.

    Returns:
        The curve, and by its ``calibration_error`` the expected calibration error.

    Raises:
        TypeError: an argument is not a tensor, or ``rows`` not bool.
        ValueError: a row of ``marginals`` is no probability vector, ``truth`` or ``answer`` no permutation, shapes do not
            broadcast, ``bins`` is no positive integer, no row counts.

    Example:
        >>> import torch
        >>> curve = reliability(torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.eye(2), bins=4)
        >>> curve.lower, curve.accuracy, round(curve.calibration_error, 3)
        (tensor([0.7500]), tensor([1.]), 0.1)
    """
    check_marginals(marginals)
    right = check_permutation(truth, "truth", marginals.shape)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be an integer of at least 1, but is {bins!r}")
    if answer is None:
        column = marginals.argmax(-1)
    else:
        column = check_permutation(answer, "answer", marginals.shape)
    sure = marginals.gather(-1, column[..., None])[..., 0]
    hit = (column == right).to(sure.dtype)
    if rows is not None:
        if not isinstance(rows, Tensor) or rows.dtype != torch.bool:
            kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows must be a tensor of dtype torch.bool and shape (..., n), but is {kind}")
        counted = _broadcast(rows, "rows", sure.shape)
        if not bool(counted.any()):
            raise ValueError("rows must hold at least one True, but no row counts")
        sure, hit = sure[counted], hit[counted]
    sure, hit = sure.reshape(-1), hit.reshape(-1)
    which = ((sure + _EDGE) * bins).long().clamp(max=bins - 1)
    count = torch.bincount(which, minlength=bins)
    used = count > 0
    total = [torch.zeros_like(count, dtype=sure.dtype).index_add(0, which, x)[used] / count[used] for x in (sure, hit)]
    lower = torch.arange(bins, dtype=sure.dtype, device=sure.device)[used] / bins
    return Reliability(lower, 1 / bins, count[used], *total)


def recalibrate(
    marginals: Tensor, curve: Reliability, *, answer: Tensor | None = None, allowed: Tensor | None = None
) -> Tensor:
    """Correct the probabilities of a posterior's answers by a reliability curve of answers like them.

    Where the truth is not known, the curve may come from data that are simulated from the model and fitted in the same way,
    a parametric bootstrap. The answer of each row gets the probability that :meth:`Reliability.corrected` says; the rest of
    the row is scaled to what is left, or spread evenly over the other allowed columns where there was no rest. So another
    column may become the likeliest.

    Args:
        marginals: shape (..., n, n), posterior probability that a row is matched to a column; rows sum to one.
        curve: of answers whose truth is known.
        answer: permutation matrices, the answers; by default each row's likeliest column.
        allowed: bool, broadcasts to the same shape: columns that a row may take, by default all. A row with one column
            stays as it is.

    Returns:
        Shape (..., n, n). Rows sum to one, columns need not.

    Raises:
        TypeError: an argument is not a tensor, ``curve`` no :class:`Reliability`, or ``allowed`` not bool.
        ValueError: a row of ``marginals`` is no probability vector or has mass where not allowed, ``answer`` is no
            permutation, or shapes do not broadcast.

    Example:
        >>> import torch
        >>> curve = reliability(torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.eye(2).flip(0))
        >>> recalibrate(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), curve)  # both answers like these were wrong
        tensor([[0.3000, 0.7000],
                [0.7000, 0.3000]])
    """
    check_marginals(marginals)
    if not isinstance(curve, Reliability):
        raise TypeError(f"curve must be a Reliability, as pyro_gs.reliability gives, but is {type(curve).__name__}")
    if allowed is None:
        open_columns = torch.ones((), dtype=torch.bool, device=marginals.device).expand(marginals.shape)
    elif not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        kind = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
        raise TypeError(f"allowed must be a boolean tensor that broadcasts to (..., n, n), but is {kind}")
    else:
        open_columns = _broadcast(allowed, "allowed", marginals.shape)
    outside = (marginals > 0) & ~open_columns
    if bool(outside.any()):
        place = first_position(outside)
        raise ValueError(f"marginals must be zero where not allowed, but has {float(marginals[place]):g} at {place}")
    if answer is None:
        column = marginals.argmax(-1)
    else:
        column = check_permutation(answer, "answer", marginals.shape)
    here = torch.nn.functional.one_hot(column, marginals.shape[-1]).bool()
    sure = marginals.gather(-1, column[..., None])
    wanted = curve.corrected(sure)
    rest = torch.where(here, 0.0, marginals)
    others = open_columns & ~here
    left = rest.sum(-1, keepdim=True)
    rest = torch.where(left > 0, rest / left.clamp(min=torch.finfo(rest.dtype).tiny), others / others.sum(-1, keepdim=True))
    choice = others.any(-1, keepdim=True)
    return torch.where(choice, torch.where(here, wanted, (1 - wanted) * rest), marginals)


def check_marginals(marginals: Any) -> None:
    """Raise unless it is a floating tensor (..., n, n) whose rows are probability vectors, up to 1e-3 in their sum."""
    check_square(marginals, "marginals")
    check_floating(marginals, "marginals")
    good = (marginals >= 0).all(-1) & ((marginals.sum(-1) - 1).abs() <= 1e-3)
    if not bool(good.all()):
        *item, row = first_position(~good)
        raise ValueError(
            f"row {row}{describe(tuple(item))} of marginals must be probabilities that sum to one, but is "
            f"{marginals[first_position(~good)].tolist()[:8]}{'...' if marginals.shape[-1] > 8 else ''}"
        )


def check_permutation(value: Any, name: str, shape: torch.Size) -> Tensor:
    """Index of permutation matrices that broadcast to a shape, (..., n) of its batch.

    Raises:
        TypeError: not a tensor.
        ValueError: no permutation matrices, or they do not broadcast.
    """
    check_square(value, name)
    good = permutation.check(value)
    if not bool(good.all()):
        raise ValueError(f"{name}{describe(first_position(~good) if good.dim() else ())} is not a permutation matrix")
    return to_index(_broadcast(value, name, shape))


def _broadcast(value: Tensor, name: str, shape: torch.Size) -> Tensor:
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to shape {tuple(shape)}, but has shape {tuple(value.shape)}") from None

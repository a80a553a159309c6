"""Log evidence from log likelihoods at a ladder of their powers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MIN_SAMPLES = 16


class LogEvidence(NamedTuple):
    """Estimates of the log evidence in nats, with standard errors from the scatter of the draws.

    Attributes:
        thermodynamic: integral of the mean log likelihood over the powers; ``-inf`` where the likelihood is zero at
            permutations of the prior.
        thermodynamic_error: its standard error, without the error from the spacing of the powers.
        stepping_stone: sum of the logarithms of the mean ratios of neighbours.
        stepping_stone_error: its standard error.
    """

    thermodynamic: float
    thermodynamic_error: float
    stepping_stone: float
    stepping_stone_error: float


def estimate_log_evidence(powers: Tensor, likelihood: Tensor) -> LogEvidence:
    """Thermodynamic integration and stepping stone.

    The first is the trapezoid rule with the correction ``- gap^2 / 12 (V(b + gap) - V(b))`` of every interval, V the
    variance of the log likelihood (Friel, Hurn and Wyse 2014); the second the product of the means of ``L^gap`` at
    the lower power of every interval (Xie et al. 2011). Standard errors by batch means, with as many batches as the root of
    the number of draws, so that correlations along the chain and between powers count.

    Args:
        powers: ascending from 0 to 1, float64 (R,).
        likelihood: log likelihoods, float64 (draws, R, chains), at least 16 draws of independent chains.

    Example:
        >>> import torch
        >>> flat = torch.full((16, 3, 1), -2.0, dtype=torch.float64)
        >>> estimate_log_evidence(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), flat)[::2]
        (-2.0, -2.0)
    """
    gap = powers.diff()[:, None]
    below = gap * likelihood[:, :-1]
    peak = below.amax((0, 2), keepdim=True).clamp(min=torch.finfo(below.dtype).min)
    ratio = (below - peak).exp()
    mean = ratio.mean((0, 2), keepdim=True)
    stone = float((mean.log() + peak).sum())
    stone_error = _standard_error((ratio / mean).sum(1)) if bool((mean > 0).all()) else math.inf
    if not bool(likelihood.isfinite().all()):
        return LogEvidence(-math.inf, math.inf, stone, stone_error)
    spread = (likelihood - likelihood.mean((0, 2), keepdim=True)) ** 2
    draws = (gap * (likelihood[:, 1:] + likelihood[:, :-1]) / 2 - gap**2 / 12 * spread.diff(dim=1)).sum(1)
    return LogEvidence(float(draws.mean()), _standard_error(draws), stone, stone_error)


def _standard_error(draws: Tensor) -> float:
    """Standard error of the mean of correlated draws (S, chains) of independent chains, by batch means."""
    batches = math.isqrt(len(draws))
    size = len(draws) // batches
    means = draws[len(draws) - batches * size :].reshape(batches, size, -1).mean((1, 2))
    return float(means.std() / math.sqrt(batches))

"""Exact sums over the rankings of the Plackett-Luce law: its marginals, entropy and divergences.

A ranking arises position by position: whatever remains is drawn with odds ``exp(scores)``. So what remains after ``k``
draws is a Markov chain over subsets of items, and what adds up over positions needs 2^n subsets, not n! rankings.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from pyro_gs.ops.ranking import centered
from pyro_gs.ops.subsets import Level, levels

SUBSET_LIMIT = 16
"""Largest number of items for sums over subsets (2^16 of them, with 2^19 transitions)."""

_TABLE = 2**22  # numbers in what is computed at once
_STEP = 0.2  # of the trapezoid rule up to n = 18; the integrand is analytic in a strip of width pi
_CROWD = 0.85  # times n^-1/2: the step for more items, among which a position is as narrow as that
_BELOW, _ABOVE = 4.0, 38.0  # a Gumbel variable is outside its location by this much with probability below 1e-16
_CERTAIN = 50.0  # a gap of scores that is reversed with probability 2e-22
_EXPONENT = 6.0  # exp(-exp(x)) is 1e-175 there; beyond it exp(x) overflows before the product falls to zero


def ranking_log_prob(ordered: Tensor) -> Tensor:
    """``sum_i s_i - logsumexp_{k >= i} s_k`` of scores (..., n) in ranked order."""
    rest = ordered.flip(-1).logcumsumexp(-1).flip(-1)
    return (ordered - rest).sum(-1)


def position_probabilities(scores: Tensor) -> Tensor:
    r"""Probabilities that item ``j`` is at position ``i`` of a Plackett-Luce ranking, for any n.

    Given the Gumbel variable ``g`` of item ``j``, the others are above it independently, each with probability
    ``1 - exp(-exp(s_k - g))``, so their number is Poisson-binomial. Its generating polynomial is evaluated at the roots of
    unity of an odd order (no factor vanishes there), integrated over ``g`` by the trapezoid rule, whose error falls
    exponentially with the inverse of its step, and transformed back.

    Args:
        scores: float64, shape (..., n).

    Returns:
        Tensor of shape (..., n, n), right to about 1e-13, differentiable. Time n^2 times the range of the scores (gaps
        above 50 count as 50) and, for more than 18 items, the root of n.
    """
    batch, n = scores.shape[:-1], scores.shape[-1]
    if not scores.numel():
        return scores.new_zeros(*batch, n, n)
    s = _without_gaps(scores.reshape(-1, n))
    order = n | 1
    angle = -2 * math.pi / order * torch.arange(order // 2 + 1, dtype=s.dtype, device=s.device)
    root = torch.polar(torch.ones_like(angle), angle)
    step = min(_STEP, _CROWD / math.sqrt(n))
    low = s.detach().amin(-1, keepdim=True) - _BELOW
    steps = torch.arange(math.ceil((_ABOVE - float(low.amin())) / step), dtype=s.dtype, device=s.device) * step

    def part(s: Tensor, g: Tensor) -> Tensor:
        x = (s[..., None] - g[:, None]).clamp(max=_EXPONENT)
        rate = x.exp()
        below, above = (-rate).exp(), -torch.expm1(-rate)
        factor = (below[..., None] + above[..., None] * root).log()
        others = (factor.sum(1, keepdim=True) - factor).exp()
        return ((x - rate).exp()[..., None] * others).sum(-2)

    size = max(1, _TABLE // (s.numel() * len(root)))
    total = torch.zeros((*s.shape, len(root)), dtype=root.dtype, device=s.device)
    for g in steps.split(size):
        total = total + checkpoint(part, s, low + g, use_reentrant=False, preserve_rng_state=False)
    found: Tensor = torch.fft.irfft(step * total, order)[..., :n]
    return found.clamp(min=0.0).mT.reshape(*batch, n, n)  # of rounding


def _without_gaps(s: Tensor) -> Tensor:
    """Scores (b, n) with the largest at zero and no gap between neighbours above what decides their order."""
    ordered, order = s.sort(-1, descending=True)
    gaps = (ordered[:, 1:] - ordered[:, :-1]).clamp(min=-_CERTAIN)
    return torch.nn.functional.pad(gaps.cumsum(-1), (1, 0)).gather(-1, order.argsort(-1))


def ranking_entropy(scores: Tensor) -> Tensor:
    """Entropy (...) in nats of the Plackett-Luce law with scores (..., n), n at most :data:`SUBSET_LIMIT`."""
    return _sum_over_choices(scores, None)


def ranking_divergence(scores: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence (...) in nats of two Plackett-Luce laws, n at most :data:`SUBSET_LIMIT`.

    Args:
        scores: of the first law, under which the expectation is, shape (..., n).
        other: of the second law, of the same shape.
    """
    return _sum_over_choices(scores, other)


def _sum_over_choices(scores: Tensor, other: Tensor | None) -> Tensor:
    """By the chain rule: expected entropy (or divergence) of the choice at each position, given what remains."""
    batch, n = scores.shape[:-1], scores.shape[-1]
    s = centered(scores).reshape(-1, n)
    o = s if other is None else centered(other).reshape(-1, n)
    size = max(1, _TABLE >> n)
    parts = zip(s.split(size), o.split(size), strict=True) if len(s) else ()
    return torch.cat([_walk(a.T, None if other is None else b.T) for a, b in parts] or [s.sum(-1)]).reshape(batch)


def _walk(s: Tensor, other: Tensor | None) -> Tensor:
    """Sum (b,) over the subsets that may remain of their probability times the cost of the choice; scores are (n, b)."""
    n = len(s)
    steps = [level.to(s.device) for level in levels((1,) * n, n)]
    log_weight, cost = _choices(s, other, steps)
    chance = torch.ones_like(s[:1])
    total = cost[-1][0]
    for k, level in enumerate(steps[: n - 1]):
        rest = log_weight[n - k - 1].flip(0)  # what remains, in the order of what is taken
        reached = s.new_zeros(level.states, s.shape[1])
        for before, column in zip(level.before, level.column, strict=True):
            odds = s.index_select(0, column) - rest.index_select(0, before)
            reached = reached + chance.index_select(0, before) * odds.exp()
        chance = reached
        total = total + (chance * cost[n - k - 2].flip(0)).sum(0)
    return total


def _choices(s: Tensor, other: Tensor | None, steps: list[Level]) -> tuple[list[Tensor], list[Tensor]]:
    """Log total weight of every subset of 1, ..., n items, and entropy (or divergence) of a choice from it.

    A choice from a subset is one between its first item and the rest, then one from the rest, so no digit is lost.
    """
    weight, cost, weight_other = [s], [torch.zeros_like(s)], other
    for level in steps[1:]:
        before, column = level.before[0], level.column[0]
        new, rest = s.index_select(0, column), weight[-1].index_select(0, before)
        log_new, log_rest = logsigmoid(new - rest), logsigmoid(rest - new)
        if other is None or weight_other is None:
            cost_new, cost_rest = -log_new, -log_rest
        else:
            new_other, rest_other = other.index_select(0, column), weight_other.index_select(0, before)
            cost_new = log_new - logsigmoid(new_other - rest_other)
            cost_rest = log_rest - logsigmoid(rest_other - new_other)
            weight_other = torch.logaddexp(new_other, rest_other)
        cost.append(log_new.exp() * cost_new + log_rest.exp() * (cost_rest + cost[-1].index_select(0, before)))
        weight.append(torch.logaddexp(new, rest))
    return weight, cost


def mean_log_mixture(log_weight: Tensor, power: Tensor) -> Tensor:
    r"""``E log sum_j w_j E_j^power`` for ``E_j`` iid exponential variables of mean one.

    ``E log X`` is the integral of ``exp(-v) - E exp(-v X)`` over ``dv / v``, a one-dimensional one since the Laplace
    transform of a sum of independent variables is a product, here of values of one function, ``E exp(-y E^power)``. Both
    are computed by the trapezoid rule on a logarithmic axis.

    Args:
        log_weight: float64, shape (b, n).
        power: float64, > 0, shape (b,).

    Returns:
        Tensor (b,), right to about 1e-13, differentiable. Time and memory grow with n times the square of ``power``.
    """
    if not len(log_weight):
        return log_weight.sum(-1)
    top = log_weight.detach().amax(-1, keepdim=True)
    largest = max(1.0, float(power.detach().amax()))
    # The outer integrand rises from the mean of the mixture times e^x and falls by e^(-1 / power) a unit; the inner one is
    # analytic in a strip of width pi / max(1, power).
    first = -_ABOVE - math.lgamma(1 + largest) - math.log(log_weight.shape[-1])
    x = torch.arange(first, _ABOVE * largest + _BELOW, _STEP, dtype=top.dtype, device=top.device)
    z = torch.arange(-_ABOVE, _BELOW, _STEP / largest, dtype=top.dtype, device=top.device)
    density = (z - z.exp()).exp() * (_STEP / largest)
    size = max(1, _TABLE // (log_weight.numel() * len(z)))

    def part(log_weight: Tensor, power: Tensor, x: Tensor) -> Tensor:
        y = x[:, None] + (log_weight - top)[:, None, :]  # (b, x, n)
        exponent = (y[..., None] + power[:, None, None, None] * z).clamp(max=_EXPONENT)
        product = ((-exponent.exp()).exp() @ density).log().sum(-1).exp()
        return ((-x.clamp(max=_EXPONENT).exp()).exp() - product).sum(-1)

    total = torch.zeros_like(power)
    for piece in x.split(size):
        total = total + checkpoint(part, log_weight, power, piece, use_reentrant=False, preserve_rng_state=False)
    return top[:, 0] + _STEP * total

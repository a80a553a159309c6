"""Doubt about neurons that the data cannot tell apart, put back into marginals that are too sure of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_gs.ops.sinkhorn import sinkhorn
from tutorials.celegans.exchange import ExchangeSearch
from tutorials.celegans.worms import Worms

__all__ = ["exchange_probabilities", "with_exchanges"]

_LARGEST = 30.0
"""Nats: the log odds of an exchange are held to be no larger, so that Sinkhorn's iteration converges. Odds beyond it are
those of an answer that is no optimum."""


def exchange_probabilities(search: ExchangeSearch, index: Tensor, observed: Tensor) -> Tensor:
    """How likely two labels should change places, seen from one point of the posterior.

    In the posterior restricted to two labels that change places in one of the sets of ``search.sets``, with up to five worms
    all there are, each set S has a probability in proportion to e^gain(S), with gain 0 where they stay. Summed over the sets
    that hold a worm this gives the odds of each pair of labels there. Beside odds of one for staying, Sinkhorn's iteration
    makes probabilities of all pairs of a worm together. That is exact for a single pair and for a class of labels that are
    all alike, an approximation where pairs overlap otherwise; longer cycles are left out.

    Args:
        search: Of the log joint.
        index: Shape (J, n), long: the permutations, an optimum if the probabilities are to be those of a posterior.
        observed: Shape (J, n), bool: the rows of them that are neurons.

    Returns:
        Shape (J, n, n), float64, symmetric and doubly stochastic: probability that what has the first label should have
        the second.

    Raises:
        ValueError: If a gain is no finite number.
    """
    worms, n = index.shape
    gains, swaps, chosen = search.gains(index)
    if not np.isfinite(gains).all():
        raise ValueError(f"search gives gains such as {gains[~np.isfinite(gains)][0]}, expected finite numbers")
    sets = search.sets[chosen]
    if not observed.all():
        # a worm that shows neither label comes along in some sets: those that differ by it are one and the same
        shown = observed.gather(1, index.argsort(1)).numpy()
        sets = sets & (shown[:, swaps].any(-1).T)
        _, first = np.unique(np.concatenate([swaps, sets], 1), axis=0, return_index=True)
        gains, swaps, sets = gains[first], swaps[first], sets[first]
    pair = swaps[:, 0] * n + swaps[:, 1]
    log_odds = torch.empty(worms, n, n, dtype=torch.float64)
    for j in range(worms):
        inside, outside = np.full(n * n, -np.inf), np.zeros(n * n)
        moves = sets[:, j]
        np.logaddexp.at(inside, pair[moves], gains[moves])
        np.logaddexp.at(outside, pair[~moves], gains[~moves])
        one_way = torch.from_numpy(np.minimum(inside - outside, _LARGEST)).view(n, n)
        log_odds[j] = torch.maximum(one_way, one_way.T).fill_diagonal_(0.0)
    return sinkhorn(log_odds)


def with_exchanges(marginals: Tensor, index: Tensor, search: ExchangeSearch, worms: Worms) -> Tensor:
    """Marginals after a random exchange of two labels, see `exchange_probabilities`.

    A guide that has settled on one mode says of twins, two neurons with the same partners, that each is what the mode
    says; the posterior is even between them. Doubt about pairs that the marginals hold already counts twice: of twins that
    changes nothing, of others it makes too much.

    Args:
        marginals: Shape (J, n, n), float64: of a posterior around ``index``.
        index: Shape (J, n), long: its mode.
        search: Of the log joint.
        worms: Their candidates and the neurons that each shows.

    Returns:
        Shape (J, n, n): rows sum to one; zero where not allowed: a row keeps what an exchange would put there.
    """
    exchange = exchange_probabilities(search, index, worms.observed)
    moved = torch.where(worms.allowed, marginals @ exchange, 0.0)
    kept = (~worms.allowed).to(marginals.dtype) @ exchange  # by row and label: how much would go where it may not
    return moved + marginals * kept

"""The model as Pyro programs: in full, and with everything but the permutations integrated out."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_gs import UniformPermutation
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.worms import Worms

__all__ = ["collapsed_model", "full_model"]


def full_model(worms: Worms, connectome: Connectome) -> Tensor:
    """Worms on one connectome, each in an order of its own: ``Y_t = (P W P' + D) Y_{t-1} + noise``.

    Sites: ``W``, the weights of the connections, shape (edges,); ``P``, shape (J, n, n), in the plate ``worms``, its
    first rows the neurons that the worm shows; the factor ``place``, what speaks for each candidate beside the activity;
    ``Y``, the recordings after the first moment, shape (J, T, n). What neurons that a worm does not show send to the
    others is part of the noise. ``D`` is diagonal, the worms' ``persistence``, zero in simulations.

    Args:
        worms: the recordings and candidates; their truth is not looked at.
        connectome: the network.

    Returns:
        The permutations, shape (J, n, n).
    """
    edges = connectome.adjacency.nonzero(as_tuple=True)
    prior = dist.Normal(worms.traces.new_zeros(len(edges[0])), worms.weight_scale).to_event(1)
    weights = pyro.sample("W", prior)
    n = worms.num_neurons
    W = weights.new_zeros((*weights.shape[:-1], n, n))
    W[..., edges[0], edges[1]] = weights
    before, after = worms.traces[:, :-1], worms.traces[:, 1:]
    moments = torch.arange(before.shape[1]) < worms.lengths.unsqueeze(-1)
    recorded = moments.unsqueeze(-1) & worms.observed.unsqueeze(-2)
    with pyro.plate("worms", worms.num_worms):
        P: Tensor = pyro.sample("P", UniformPermutation(n, allowed=worms.allowed))
        P = P.to(W.dtype)
        pyro.factor("place", (P * worms.logits).sum((-2, -1)))
        mean = before @ (P @ W.unsqueeze(-3) @ P.mT).mT + worms.persistence.unsqueeze(1) * before
        pyro.sample("Y", dist.Normal(mean, worms.sigma).mask(recorded).to_event(2), obs=after)
    return P


def collapsed_model(evidence: CollapsedEvidence, allowed: Tensor, logits: Tensor | None = None) -> Tensor:
    """The same model with ``W`` integrated out; the recordings enter through their sufficient statistics.

    Sites: ``P``, shape (J, n, n), in the plate ``worms``; the factor ``place``, what speaks for each candidate beside
    the activity; the factor ``Y``, the log evidence of all worms given ``P``.
    At hard permutations the two models agree exactly; at relaxed ones they are different extensions.

    Args:
        evidence: of the recordings, as a function of the permutations.
        allowed: candidates, bool, shape (J, n, n).
        logits: log-potentials of the prior of ``P``, float64, shape (J, n, n); None for the uniform law.

    Returns:
        The permutations, shape (J, n, n).
    """
    with pyro.plate("worms", allowed.shape[0], dim=-1):
        P: Tensor = pyro.sample("P", UniformPermutation(allowed.shape[-1], allowed=allowed))
        if logits is not None:
            pyro.factor("place", (P * logits).sum((-2, -1)))
    # One number for all worms, which share W: outside of their plate, to the left of its dimension.
    pyro.factor("Y", evidence(torch.as_tensor(P, dtype=torch.float64))[..., None])
    return P

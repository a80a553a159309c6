"""Variational inference with a Gumbel-Sinkhorn guide and a Gaussian one for the weights, as in the paper."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from torch import Tensor

import pyro_gs as pgs
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import Statistics, log_likelihood
from tutorials.celegans.identification import Identification, Run, check_initial, match_allowed, onehot
from tutorials.celegans.svi import Ascent, falling
from tutorials.celegans.worms import Worms

__all__ = ["fit", "weights_model"]

SAMPLES = 1
"""Samples of the permutations and weights in a step."""

STEP_SIZES = (0.1, 0.01)
"""Adam's step size at the start and the end of the run, geometric in between; the weights are in units of their prior."""

INITIAL_SPREAD = 0.2
"""Standard deviation of the weights at the start, in units of the prior's; their mean starts at zero."""

MARGINAL_SAMPLES = 200
"""Hard samples behind the posterior marginals."""

INITIAL_LOGIT = 3.0
"""Logit that an initial assignment gets above the others."""


def weights_model(worms: Worms, adjacency: Tensor, statistics: Statistics) -> Tensor:
    """``full_model`` with the recordings as sufficient statistics, and weights in units of their prior.

    Sites: ``V``, shape (edges,), ``W = weight_scale V``; ``P``, shape (J, n, n), in the plate ``worms``; the factors
    ``place``, what speaks for each candidate beside the activity, and ``Y``, the log likelihood of all worms.

    Args:
        worms: the candidates, logits and scales.
        adjacency: of the network, bool, shape (n, n).
        statistics: of the recordings.

    Returns:
        The permutations, shape (J, n, n).
    """
    edges, n = adjacency.nonzero(as_tuple=True), worms.num_neurons
    zero = worms.traces.new_zeros(len(edges[0]))
    V = pyro.sample("V", dist.Normal(zero, 1.0).to_event(1))
    W = V.new_zeros((*V.shape[:-1], n, n))
    W[..., edges[0], edges[1]] = worms.weight_scale * V
    with pyro.plate("worms", worms.num_worms, dim=-1):
        P: Tensor = pyro.sample("P", pgs.UniformPermutation(n, allowed=worms.allowed))
        pyro.factor("place", (P * worms.logits).sum((-2, -1)))
    P = torch.as_tensor(P, dtype=torch.float64)
    if W.dim() > 2:  # the dimension of the plate, in which W is one for all
        W = W.squeeze(-3)
    pyro.factor("Y", log_likelihood(P, W, statistics, worms.sigma)[..., None])
    return P


def fit(
    worms: Worms,
    connectome: Connectome,
    *,
    seed: int = 0,
    budget: float | None = None,
    steps: int | None = None,
    progress: bool = False,
    initial: Tensor | None = None,
) -> Identification:
    """Fit ``AutoGumbelSinkhorn`` for P and ``AutoNormal`` for W; KL of the noise (the paper's) and of the Gaussians.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of Adam steps, or None. The run ends at whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation that starts `INITIAL_LOGIT` above the rest. None starts flat.

    Returns:
        Marginals are averages of hard samples of the guide; the objective is the ELBO, averaged since the last snapshot.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("VI with Gaussian W", budget=budget, steps=steps, progress=progress)
    data = (worms, connectome.adjacency, Statistics.from_worms(worms))
    permutations = pgs.AutoGumbelSinkhorn(poutine.block(weights_model, expose=["P"]), init_scale=0.0, objective="noise_kl")
    start = init_to_value(values={"V": worms.traces.new_zeros(int(connectome.adjacency.sum()))})
    guide = AutoGuideList(weights_model)
    guide.append(AutoNormal(poutine.block(weights_model, hide=["P"]), init_loc_fn=start, init_scale=INITIAL_SPREAD))
    guide.append(permutations)
    loss = TraceMeanField_ELBO(num_particles=SAMPLES, vectorize_particles=True, max_plate_nesting=1)
    ascent = Ascent(pgs.relax(weights_model), guide, seed=seed, loss=loss)
    guide(*data)
    if initial is not None:
        permutations.set_logits("P", torch.where(worms.allowed, INITIAL_LOGIT * onehot(initial), -math.inf))
    for _ in run:
        ascent.step(falling(*STEP_SIZES, run.fraction), *data)
        if run.due:
            run.record(ascent.elbo(), pgs.to_index(permutations.median()["P"]))
    marginals = permutations.hard_sample((MARGINAL_SAMPLES,))["P"].double().mean(0)
    index = match_allowed(marginals, worms.allowed)
    extra = {"steps": float(run.step)}
    return Identification("VI with Gaussian W", marginals, index, run.history, run.seconds, extra)

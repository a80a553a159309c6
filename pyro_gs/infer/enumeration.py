"""Exact posteriors over permutations by going through all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_gs.distributions.permutation_law import ENUMERATION_LIMIT, list_permutations
from pyro_gs.infer.handlers import name_sites
from pyro_gs.infer.log_joint import LogJoint, PermutationSite
from pyro_gs.infer.randomness import randomness_kept
from pyro_gs.ops.permanent import log_count
from pyro_gs.ops.support import find_support

LIMIT = math.factorial(9)
"""States of all sites and items together that are enumerated at most."""

_CHUNK = 2**22
"""Numbers of the matrices that are scored in one run of the model."""


@dataclasses.dataclass(frozen=True, eq=False)
class EnumeratedPosterior:
    """The posterior over the joint support of all permutation sites.

    Attributes:
        log_evidence: log-probability of the data, a scalar in nats; None where it is not known, after
            :func:`permutation_posterior`.
        log_probs: log-probabilities of the K states, float64 (K,), in lexicographic order.
        permutations: matrices of the states by site, (K, ..., n, n).
        marginals: probability that row i is matched to column j by site, (..., n, n).

    Example:
        >>> import pyro, pyro_gs as pgs
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(2))
        ...     pyro.factor("f", P[..., 0, 0])
        >>> posterior = pgs.enumerate_posterior(model)
        >>> posterior.permutations["P"].shape
        torch.Size([2, 2, 2])
        >>> posterior.marginals["P"]
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])
    """

    log_evidence: Tensor | None
    log_probs: Tensor
    permutations: dict[str, Tensor]
    marginals: dict[str, Tensor]

    @property
    def map(self) -> dict[str, Tensor]:
        """The most probable state, a dict of matrices (..., n, n)."""
        best = int(self.log_probs.argmax())
        return {name: value[best] for name, value in self.permutations.items()}

    @property
    def entropy(self) -> Tensor:
        """Of the posterior over states, in nats."""
        entropy: Tensor = torch.special.entr(self.log_probs.exp()).sum()
        return entropy

    def sample(self, sample_shape: Any = ()) -> dict[str, Tensor]:
        """Independent draws, a dict of matrices sample_shape + (..., n, n)."""
        shape = torch.Size(sample_shape)
        chosen = torch.multinomial(self.log_probs.exp(), max(1, shape.numel()), replacement=True)[: shape.numel()]
        return {name: value[chosen].reshape(shape + value.shape[1:]) for name, value in self.permutations.items()}


@randomness_kept()
def enumerate_posterior(model: Callable[..., Any], *args: Any, **kwargs: Any) -> EnumeratedPosterior:
    """The exact posterior over a model's permutations.

    The joint support is the product over all sites and the items of their plates, each with the permutations that its
    prior allows. The model is run on batches of it, or state by state where it does not broadcast. Random states are put
    back in the end.

    Args:
        model: a Pyro model whose latent sites are all permutations. Handlers go around it, as in
            ``poutine.condition(model, data)``; those around this call do not reach it.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        Log evidence, probabilities of all states, marginals, MAP and draws.

    Raises:
        TypeError: ``model`` is no function.
        ValueError: no latent permutation site, other latent sites (named, with what to write), more than 8! = 40,320
            permutations of a site's item or more than 9! = 362,880 states in all (with their number), no state of
            positive density, or a density that is NaN.

    Warns:
        VectorizationWarning: the model does not broadcast over candidate permutations.

    Example:
        >>> import pyro, torch, pyro_gs as pgs
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.factor("f", P.diagonal(dim1=-2, dim2=-1).sum(-1))
        >>> posterior = enumerate_posterior(model)
        >>> posterior.map["P"].diagonal(), posterior.log_probs.exp()[0], posterior.log_evidence
        (tensor([1., 1., 1.]), tensor(0.6642, dtype=torch.float64), tensor(1.6174, dtype=torch.float64))
    """
    joint = LogJoint(model, args, kwargs)
    joint.refuse_others(
        "enumerate_posterior",
        "sum the permutations out and sample the others, MCMC(NUTS(pyro_gs.indexed(model)), ...), of which "
        "pyro_gs.permutation_posterior takes the permutations' posterior, or fix them by poutine.condition",
    )
    states = _States(joint)
    log_p = states.score({})
    log_evidence = torch.logsumexp(log_p, 0)
    if log_evidence == -torch.inf:
        raise ValueError(f"none of the {len(log_p)} permutations of {name_sites(list(joint.sites))} has positive density")
    return states.posterior(log_p - log_evidence, log_evidence)


@randomness_kept()
def permutation_posterior(
    model: Callable[..., Any], samples: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> EnumeratedPosterior:
    """The posterior over a model's permutations from posterior draws of its other latent sites.

    The mean over the draws of the exact conditional posterior, as of draws by ``NUTS(pyro_gs.indexed(model))``.

    Args:
        model: the plain model, without ``indexed``.
        samples: draws of all its other latent sites, (S, ...) each, such as ``mcmc.get_samples()``; further entries are
            ignored.
        *args: the model's arguments.
        **kwargs: its keyword arguments.

    Returns:
        As :func:`enumerate_posterior`, without the evidence.

    Raises:
        TypeError: ``model`` is no function.
        ValueError: as :func:`enumerate_posterior`; ``samples`` lacks a site, has draws of another shape, of different
            numbers or none, or one at which no permutation has positive density.

    Example:
        >>> import pyro, pyro_gs as pgs, torch
        >>> import pyro.distributions as dist
        >>> def model():
        ...     weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        ...     P = pyro.sample("P", pgs.UniformPermutation(2))
        ...     pyro.factor("f", weight * P[..., 0, 0])
        >>> permutation_posterior(model, {"weight": torch.tensor([0.0, 1.0])}).marginals["P"]  # means of .5 and .7311
        tensor([[0.6155, 0.3845],
                [0.3845, 0.6155]])
    """
    joint = LogJoint(model, args, kwargs)
    draws, count = _check_draws(joint, samples)
    states = _States(joint)
    total = torch.zeros(len(states), dtype=torch.float64, device="cpu")
    for k in range(count):
        log_p = states.score({name: value[k] for name, value in draws.items()})
        if log_p.max() == -torch.inf:
            raise ValueError(f"none of the {len(log_p)} permutations has positive density at draw {k} of samples")
        total += log_p.softmax(0)
    return states.posterior((total / count).log(), None)


def _check_draws(joint: LogJoint, samples: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Draws of all latent sites beside the permutations, and their number."""
    if not joint.others:
        raise ValueError("the model has no latent sites beside its permutations; use enumerate_posterior(model, ...)")
    missing = [name for name in joint.others if name not in samples]
    if missing:
        raise ValueError(f"samples must have draws of the latent sites {name_sites(missing)} of the model")
    draws = {name: samples[name] for name in joint.others}
    for name, value in draws.items():
        shape = tuple(joint.others[name]["value"].shape)
        if value.dim() == 0 or value.shape[1:] != shape or len(value) == 0:
            raise ValueError(
                f"samples['{name}'] must have shape {('draws', *shape)} with at least one draw, but has {tuple(value.shape)}"
            )
    sizes = {len(value) for value in draws.values()}
    if len(sizes) > 1:
        raise ValueError(f"samples must have the same number of draws of every site, but has {sorted(sizes)}")
    return draws, sizes.pop()


class _States:
    """All states of a model's permutation sites."""

    def __init__(self, joint: LogJoint) -> None:
        self._joint = joint
        _refuse_many(list(joint.sites.values()))
        lists = {name: _lists(site) for name, site in joint.sites.items()}
        flat = [rows for items in lists.values() for rows in items]
        grid = torch.cartesian_prod(*(torch.arange(len(rows), device="cpu") for rows in flat)).reshape(-1, len(flat))
        chosen = iter(rows[grid[:, k]] for k, rows in enumerate(flat))
        self._index = {name: torch.stack([next(chosen) for _ in items], 1) for name, items in lists.items()}

    def __len__(self) -> int:
        return len(next(iter(self._index.values())))

    def _values(self, start: int, stop: int) -> dict[str, Tensor]:
        return {
            name: site.to_value(self._index[name][start:stop].to(site.device)) for name, site in self._joint.sites.items()
        }

    @torch.no_grad()
    def score(self, others: Mapping[str, Tensor]) -> Tensor:
        """Log joint densities, float64 (K,)."""
        width = sum(site.num_items * site.n**2 for site in self._joint.sites.values())
        step = max(1, _CHUNK // width)
        parts = []
        for start in range(0, len(self), step):
            stop = min(start + step, len(self))
            parts.append(self._joint.evaluate(self._values(start, stop), others, stop - start).total.sum(0))
        return torch.cat(parts).cpu()

    def posterior(self, log_probs: Tensor, log_evidence: Tensor | None) -> EnumeratedPosterior:
        """The posterior of normalized log-probabilities (K,)."""
        permutations = self._values(0, len(self))
        device = next(iter(permutations.values())).device
        log_probs = log_probs.to(device)
        log_evidence = None if log_evidence is None else log_evidence.to(device)
        weights = log_probs.exp()
        marginals = {name: torch.tensordot(weights.to(value), value, 1) for name, value in permutations.items()}
        return EnumeratedPosterior(log_evidence, log_probs, permutations, marginals)


def _refuse_many(sites: list[PermutationSite]) -> None:
    """Raise where there are too many states, before any is listed."""
    total = 0.0
    for site in sites:
        masks = _masks(site)
        log_counts = log_count(find_support(masks, warn=False), masks)[0]
        if math.exp(log_counts.max()) > ENUMERATION_LIMIT:
            list_permutations(masks[log_counts.argmax()], f"site '{site.name}'")  # raises
        total += float(log_counts.sum()) * (site.num_items // len(masks))
    if total > math.log(LIMIT) + 1e-9:
        size = f"{round(math.exp(total)):,}" if total < math.log(1e15) else f"about 1e{total / math.log(10):.0f}"
        raise ValueError(
            f"the permutations of {name_sites([site.name for site in sites])} have {size} states together, more than the "
            f"{LIMIT:,} that are enumerated; use MCMC with SwapMetropolis or SVI with AutoGumbelSinkhorn, or enumerate "
            "independent items of a plate one by one"
        )


def _masks(site: PermutationSite) -> Tensor:
    """Allowed pairs of every item, bool (items, n, n), or (1, n, n) where all are alike."""
    return torch.ones(1, site.n, site.n, dtype=torch.bool, device="cpu") if site.allowed is None else site.allowed.cpu()


def _lists(site: PermutationSite) -> list[Tensor]:
    """Permutations of every item in index form, long (count, n) each."""
    lists = [list_permutations(mask, f"site '{site.name}'") for mask in _masks(site)]
    return lists * (site.num_items // len(lists))

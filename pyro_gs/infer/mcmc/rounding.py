"""Hard permutations from draws of a relaxed model, with importance weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_gs.distributions.matching_integral import EstimateWarning
from pyro_gs.distributions.relaxed import log_of
from pyro_gs.infer.handlers import name_sites
from pyro_gs.infer.log_joint import LogJoint
from pyro_gs.infer.randomness import randomness_kept
from pyro_gs.ops.logits import warn_user
from pyro_gs.ops.matching import matching

_CHUNK = 2**20
_FEW = 20.0


@dataclasses.dataclass(frozen=True, eq=False)
class RoundedPosterior:
    """Weighted hard permutations; ``summary`` takes it.

    Attributes:
        permutations: matrices by site, (S, ..., n, n).
        log_probs: normalized log weights of the draws, float64 (S,).
        marginals: weighted means of the matrices by site, (..., n, n).
        others: the draws of all other latent sites, (S, ...), which have the same weights.
        effective_sample_size: ``1 / sum w^2``, how many draws of equal weight they are worth, before autocorrelation.

    Example:
        >>> import pyro, pyro_gs as pgs, torch
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(2))
        ...     pyro.factor("f", P[..., 0, 0])
        >>> R = pgs.GumbelSinkhorn(0.5, torch.zeros(2, 2)).rsample((100,))
        >>> posterior = pgs.round_samples(model, {"P": R})
        >>> posterior.permutations["P"].shape
        torch.Size([100, 2, 2])
        >>> 20 < posterior.effective_sample_size < 100
        True
    """

    permutations: dict[str, Tensor]
    log_probs: Tensor
    marginals: dict[str, Tensor]
    others: dict[str, Tensor]
    effective_sample_size: float


class _Rest(LogJoint):
    """The log joint density without the permutations' priors, which the rounded draws have from the relaxed ones."""

    def _counts(self, name: str, node: Any) -> bool:
        return name not in self.sites


@torch.no_grad()
@randomness_kept()
def round_samples(model: Callable[..., Any], samples: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> RoundedPosterior:
    r"""Round draws of a relaxed model to permutations, weighted to the posterior of the plain one.

    Draws ``R`` of ``MCMC(NUTS(relax(model, temperature)))`` have the density ``p_0(R) L(R)``, with ``L`` the likelihood.
    Their matchings ``M(log R)`` with weights ``L(M(log R)) / L(R)`` have the law ``p_0(R) L(M(log R))``: the posterior of
    the plain model under the prior ``M(X_0 + eps)``. That is the model's own for ``GumbelMatching`` and for
    ``UniformPermutation`` without forbidden pairs, and near it for others (:func:`pyro_gs.relax`). The lower the
    temperature, the evener the weights, and the harder it is for NUTS.

    Args:
        model: the plain model, without ``relax``.
        samples: draws of all latent sites, (S, ...) each, the permutations' relaxed, such as ``mcmc.get_samples()``.
        *args: the model's arguments.
        **kwargs: its keyword arguments.

    Returns:
        Permutations with weights.

    Raises:
        TypeError: ``model`` is no function.
        ValueError: ``samples`` lacks a latent site or has another shape, or no draw has positive weight.

    Warns:
        EstimateWarning: the weights leave fewer than 20 effective draws.

    Example:
        >>> import pyro, torch, pyro_gs as pgs
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(2))
        ...     pyro.factor("f", P[..., 0, 0])
        >>> R = pgs.GumbelSinkhorn(0.5, torch.zeros(2, 2)).rsample((100,))
        >>> round_samples(model, {"P": R}).permutations["P"].shape
        torch.Size([100, 2, 2])
    """
    joint = _Rest(model, args, kwargs)
    names = [*joint.sites, *joint.others]
    missing = [name for name in names if name not in samples]
    if missing:
        raise ValueError(f"samples must have draws of the latent sites {name_sites(missing)} of the model")
    sizes = {len(samples[name]) for name in names}
    if len(sizes) > 1:
        raise ValueError(f"samples must have the same number of draws of every site, but has {sorted(sizes)}")
    relaxed: dict[str, Tensor] = {}
    for name, site in joint.sites.items():
        expected = (*site.item_shape, site.n, site.n)
        if samples[name].shape[1:] != expected:
            raise ValueError(
                f"samples['{name}'] must have shape (S, {str(expected)[1:-1]}), but has {tuple(samples[name].shape)}"
            )
        relaxed[name] = samples[name]
    hard = {name: matching(log_of(value)).to(value.dtype) for name, value in relaxed.items()}
    others = {name: samples[name] for name in joint.others}
    log_weights = _log_rest(joint, hard, others) - _log_rest(joint, relaxed, others)
    total = torch.logsumexp(log_weights, 0)
    if not bool(total.isfinite()):
        raise ValueError(f"none of the {len(log_weights)} draws has positive density at its rounded permutations")
    log_probs = log_weights - total
    size = float(torch.exp(-torch.logsumexp(2 * log_probs, 0)))
    if size < _FEW:
        warn_user(
            f"the weights of {len(log_probs)} rounded draws leave {size:.1f} effective ones; sample the relaxed model at a "
            "lower temperature, or the permutations themselves, MCMC(pyro_gs.SwapMetropolis(model))",
            EstimateWarning,
        )
    marginals = {name: torch.tensordot(log_probs.exp().to(value), value, 1) for name, value in hard.items()}
    return RoundedPosterior(hard, log_probs, marginals, others, size)


def _log_rest(joint: LogJoint, values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Tensor:
    """Log densities of all sites but the permutations, float64 (S,)."""
    count = len(next(iter(values.values())))
    # Other sites have a value of their own in every draw, so the draws cannot share a run of the model.
    step = 1 if others else max(1, _CHUNK // max(1, sum(value[0].numel() for value in values.values())))
    parts = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        part = {name: value[start:stop] for name, value in values.items()}
        rest = {name: value[start] for name, value in others.items()}
        parts.append(joint.evaluate(part, rest, stop - start).total.sum(0))
    return torch.cat(parts)

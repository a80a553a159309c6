"""What an inference hands over: samples by site, with chains or without, or weighted permutations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_gs.distributions.constraints import doubly_stochastic
from pyro_gs.distributions.relaxed import plain
from pyro_gs.ops.logits import first_position
from pyro_gs.ops.matching import solve_assignment, to_index

Samples = Mapping[str, Tensor]


@runtime_checkable
class WeightedPermutations(Protocol):
    """A posterior over K joint values of the permutation sites, as an exact enumeration gives it.

    Attributes:
        permutations: by site, shape (K, ..., n, n).
        log_probs: shape (K,), log-probabilities that sum to one, in nats.
    """

    @property
    def permutations(self) -> Mapping[str, Tensor]: ...  # noqa: D102

    @property
    def log_probs(self) -> Tensor: ...  # noqa: D102


def by_chain(samples: Any, *, group_by_chain: bool = False) -> dict[str, Tensor]:
    """Samples by site with the dimensions of chains and draws in front.

    Args:
        samples: a Pyro ``MCMC`` that was run, or a dict of tensors by site, each with the draws in the first dimension.
        group_by_chain: of a dict: the first dimension counts chains, the second draws. Not for an ``MCMC``, which knows.

    Returns:
        Dict of tensors of shape (chains, draws, ...), floating, without gradient.

    Raises:
        TypeError: neither of both, or a site is not a real tensor.
        ValueError: the ``MCMC`` was not run; no sites, no draws; sites differ in chains or draws; a NaN or infinity (the
            message names site and draw).
    """
    if hasattr(samples, "get_samples"):
        if getattr(samples, "_samples", samples) is None:
            raise ValueError("samples is an MCMC that has not been run; run it first: mcmc.run(...)")
        samples, group_by_chain = samples.get_samples(group_by_chain=True), True
    if not isinstance(samples, Mapping):
        hint = "; of a guide take draws: guide.hard_sample((1000,))" if hasattr(samples, "hard_sample") else ""
        raise TypeError(
            "samples must be a Pyro MCMC after run or a dict of tensors by site, for example {'P': draws}, but is "
            f"{type(samples).__name__}{hint}"
        )
    if not samples:
        raise ValueError("samples must hold at least one site, but is an empty dict")
    lead = 2 if group_by_chain else 1
    wanted = "(chains, draws, ...)" if group_by_chain else "(draws, ...)"
    out: dict[str, Tensor] = {}
    sizes: dict[torch.Size, str] = {}
    for name, value in samples.items():
        if not isinstance(value, Tensor) or value.is_complex():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"samples[{name!r}] must be a real torch.Tensor of shape {wanted}, but is {kind}")
        if value.dim() < lead or 0 in value.shape[:lead]:
            raise ValueError(f"samples[{name!r}] must have shape {wanted} with a draw, but has shape {tuple(value.shape)}")
        sizes.setdefault(value.shape[:lead], name)
        value = plain(value).detach()
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
        finite = value.isfinite()
        if not bool(finite.all()):
            where = first_position(~finite)
            raise ValueError(f"samples[{name!r}]{list(where)} is {float(value[where])}; expected finite samples")
        out[name] = value if group_by_chain else value[None]
    if len(sizes) > 1:
        (one, first), (two, second) = list(sizes.items())[:2]
        raise ValueError(
            f"all sites must have the same leading dimensions {wanted}, but samples[{first!r}] has {tuple(one)} and "
            f"samples[{second!r}] has {tuple(two)}"
        )
    return out


def permutation_sites(samples: Samples, sites: Iterable[str] | None = None) -> list[str]:
    """Names of the sites whose every draw is a permutation or a doubly stochastic matrix.

    Args:
        samples: by site, shape (chains, draws, ...).
        sites: names to take in place of a search; each has to be one.

    Raises:
        ValueError: none is found; a name is not a site; a draw of a named site, or one among good draws of another, is
            not doubly stochastic (the message names it).
    """
    names = list(samples) if sites is None else [sites] if isinstance(sites, str) else list(sites)
    found = []
    for name in names:
        if name not in samples:
            raise ValueError(f"sites names {name!r}, but samples has the sites {list(samples)}")
        value = samples[name]
        if value.dim() < 4 or value.shape[-1] != value.shape[-2] or value.shape[-1] == 0:
            if sites is not None:
                raise ValueError(f"site {name!r} must have draws of shape (..., n, n), but has {tuple(value.shape[2:])}")
            continue
        good = doubly_stochastic.check(value)
        if bool(good.all()):
            found.append(name)
        elif sites is not None or bool(good.any()):
            where = list(first_position(~good))
            others = [other for other in samples if other != name]
            hint = "" if sites is not None else f"; if the site is no permutation, leave it out: sites={others!r}"
            raise ValueError(
                f"chain, draw and batch item {where} of site {name!r} is neither a permutation matrix nor doubly "
                f"stochastic{hint}"
            )
    if not found:
        shapes = ", ".join(f"{name!r} {tuple(value.shape[2:])}" for name, value in samples.items())
        raise ValueError(
            f"no site holds permutation matrices; a draw of each has the shape {shapes}; draws with a dimension of chains "
            "need group_by_chain=True, draws without one need it False"
        )
    return found


def is_hard(value: Tensor) -> bool:
    """Whether all entries are zero or one."""
    return bool(((value == 0) | (value == 1)).all())


def columns(value: Tensor) -> Tensor:
    """Column of each row, (..., n, n) to (..., n) long; of relaxed permutations by the matching of their logarithm."""
    if is_hard(value):
        return to_index(value)
    return solve_assignment(value.clamp(min=torch.finfo(value.dtype).tiny).log())


def hamming(value: Tensor, reference: Tensor) -> Tensor:
    """Share of rows in which permutations differ, ``1 - <P, Q> / n``: (..., n, n) to (...), 0 to 1; also of relaxed ones."""
    return 1 - (value * reference).sum((-1, -2)) / value.shape[-1]


def check_log_density(log_density: Tensor, lead: torch.Size) -> Tensor:
    """Log density of draws as (chains, draws).

    Raises:
        TypeError: not a floating tensor.
        ValueError: another shape (of one chain, (draws,) will do), a NaN or infinity.
    """
    if not isinstance(log_density, Tensor) or not log_density.is_floating_point():
        kind = log_density.dtype if isinstance(log_density, Tensor) else type(log_density).__name__
        raise TypeError(f"log_density must be a floating tensor of shape {tuple(lead)}, but is {kind}")
    value = log_density.detach()
    if value.dim() == 1 and lead[0] == 1:
        value = value[None]
    if value.shape != lead:
        raise ValueError(f"log_density must have shape {tuple(lead)}, but has shape {tuple(log_density.shape)}")
    if not bool(value.isfinite().all()):
        where = first_position(~value.isfinite())
        raise ValueError(f"log_density{list(where)} is {float(value[where])}; expected finite values")
    return value

"""What guides over permutation sites share: discovery of the sites, their masks and plates, hard draws."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_gs.infer.handlers import is_permutation_law, name_sites, unwrap
from pyro_gs.infer.hardening import hard_law


class AutoPermutationGuide(AutoGuide):
    """Base of the automatic guides whose permutation sites are independent of each other.

    A subclass says in :meth:`_init_site` what parameters a site has and in :meth:`_law` which law they make.

    Args:
        model: a Pyro model whose latent sites are permutations, hard or relaxed.
        create_plates: as in Pyro's ``AutoGuide``.

    Raises:
        TypeError: ``model`` is no function.
        ValueError: at the first call, a model without a permutation site, or with other latent sites (the message names
            them).
        NotImplementedError: at the first call, a plate that is gone through in turn (``for i in plate``).
    """

    def __init__(self, model: Callable[..., Any], *, create_plates: Callable[..., Any] | None = None) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function, but is {type(model).__name__}")
        super().__init__(model, create_plates=create_plates)
        self._allowed: dict[str, Tensor | None] = {}

    def _init_site(self, name: str, site: dict[str, Any], allowed: Tensor) -> None:
        """Make the parameters of a site.

        Args:
            name: of the site.
            site: its node in the prototype's trace; ``site["value"]`` has the dtype and device to follow, and parameters
                take ``site["fn"].event_dim``, which plates count from.
            allowed: bool (..., n, n), the allowed pairs at the full size of the site's plates.
        """
        raise NotImplementedError

    def _law(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dist.TorchDistribution:
        """The law of a site with event shape (n, n): inside its plates at their subsample, outside at their full size.

        Args:
            name: of the site.
            args: of the model.
            kwargs: of the model.
        """
        raise NotImplementedError

    def _prepare(self, plates: Mapping[str, Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before :meth:`_law` at these arguments, outside the plates.

        Args:
            plates: those of the call by name, or None before a call of :meth:`_law` at their full size.
            args: of the model.
            kwargs: of the model.
        """

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        try:
            self._check_sites()
            for name, site in self._stochastic_nodes():
                allowed = self._full_mask(name, site, args, kwargs)
                self._allowed[name] = None if bool(allowed.all()) else allowed
                self._init_site(name, site, allowed)
        except Exception:
            self.prototype_trace = None  # the next call is a first call again
            raise

    def _check_sites(self) -> None:
        sites, kind = dict(self._stochastic_nodes()), type(self).__name__
        others = [name for name, site in sites.items() if not is_permutation_law(site["fn"])]
        if others and len(others) < len(sites):
            keep = [name for name in sites if name not in others]
            raise ValueError(
                f"{kind} handles permutation sites only, but the model has the latent sites "
                f"{name_sites(others)} too; use AutoGuideList with "
                f"{kind}(poutine.block(model, expose={keep!r})) and, for example, "
                f"AutoNormal(poutine.block(model, hide={keep!r}))"
            )
        if len(others) == len(sites):
            found = f" among {name_sites(others)}" if others else ""
            raise ValueError(
                f"{kind} found no latent permutation site in the model{found}; sample one, for example "
                "P = pyro.sample('P', pyro_gs.UniformPermutation(n))"
            )

    def _full_mask(self, name: str, site: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The allowed pairs of a site at the full size of its plates."""
        value, shape = site["value"], _full_shape(site)
        partial = [f for f in site["cond_indep_stack"] if (f.full_size or f.size) != f.size]
        if not partial:
            return allowed_pairs(site).clone()
        # The prior's mask may differ between the items of a subsampled plate: visit them all, block by block.
        allowed = torch.ones(shape, dtype=torch.bool, device=value.device)
        blocks = [
            [(torch.arange(f.size, device="cpu") + start).remainder(f.full_size) for start in range(0, f.full_size, f.size)]
            for f in partial
        ]
        for indices in itertools.product(*blocks):
            chosen = {frame.name: index for frame, index in zip(partial, indices, strict=True)}
            trace = self._trace_model(chosen, args, kwargs)
            places = [torch.arange(size, device="cpu") for size in shape]
            for frame, index in zip(partial, indices, strict=True):
                places[frame.dim - site["fn"].event_dim] = index
            mask = allowed_pairs(trace.nodes[name])
            allowed[torch.meshgrid(*(place.to(value.device) for place in places), indexing="ij")] = mask
        return allowed

    @torch.no_grad()
    def _trace_model(self, chosen: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A trace of the model at chosen indices of its subsampled plates."""
        with poutine.block(), _ChooseSubsample(chosen):
            return poutine.trace(self.model).get_trace(*args, **kwargs)

    def _masked(self, name: str, free: Tensor) -> Tensor:
        """``-inf`` at the forbidden pairs of a site, at the full size of its plates or at their subsample."""
        allowed = self._allowed[name]
        if allowed is None:
            return free
        if allowed.shape != free.shape:
            allowed = pyro.subsample(allowed, event_dim=self._event_dim(name))
        return torch.where(allowed, free, -torch.inf)

    def _event_dim(self, name: str) -> int:
        """Event dimensions of a site: 2, and what ``to_event`` adds."""
        trace: Any = self.prototype_trace
        event_dim: int = trace.nodes[name]["fn"].event_dim
        return event_dim

    def _require_setup(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                f"{type(self).__name__} has not seen the model's arguments yet; call guide(*args) or SVI.step first"
            )

    def _require_site(self, name: str) -> None:
        names = [site for site, _ in self._sites()]
        if name not in names:
            raise KeyError(f"no permutation site '{name}' in this guide; it has {name_sites(names)}")

    def _stochastic_nodes(self) -> Iterator[tuple[str, Any]]:
        trace: Any = self.prototype_trace
        yield from trace.iter_stochastic_nodes()

    def _sites(self) -> Iterator[tuple[str, Any]]:
        self._require_setup()
        yield from self._stochastic_nodes()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every permutation site; a dict of the values by site name."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        self._prepare(plates, args, kwargs)
        result = {}
        for name, site in self._stochastic_nodes():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                law = self._law(name, args, kwargs)
                extra = site["fn"].event_dim - 2
                result[name] = pyro.sample(name, law.to_event(extra) if extra > 0 else law)
        return result

    def _see(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set up from arguments that are given before the guide was called."""
        if self.prototype_trace is None and (args or kwargs):
            self._setup_prototype(*args, **kwargs)

    @torch.no_grad()
    def hard_sample(self, sample_shape: Any = (), *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the hard permutations that the guide's laws stand for (:func:`harden`).

        Args:
            sample_shape: of the draws.
            *args: of the model; needed where the guide depends on them, or was not called yet.
            **kwargs: likewise.

        Returns:
            Dict by site of sample_shape + (..., n, n) permutation matrices, at the full size of the plates.

        Raises:
            RuntimeError: the guide has not been called yet, and no arguments are given.
        """
        self._see(args, kwargs)
        self._prepare(None, args, kwargs)
        shape = torch.Size(sample_shape)
        return {name: hard_law(self._law(name, args, kwargs)).sample(shape) for name, _ in self._sites()}

    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Nothing, as permutations have no order: in an ``AutoGuideList`` the quantiles are those of the other parts.

        Raises:
            NotImplementedError: the guide is not part of an ``AutoGuideList``.
        """
        if self.master is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no quantiles, as permutations have no order; take guide.median() for the best "
                "matching and the mean of guide.hard_sample((1000,)) for the probabilities of pairs"
            )
        return {}


def _full_shape(site: dict[str, Any]) -> torch.Size:
    """Shape (..., n, n) of a site at the full size of its plates."""
    shape = list(site["value"].shape)
    for frame in site["cond_indep_stack"]:
        shape[frame.dim - site["fn"].event_dim] = frame.full_size or frame.size
    return torch.Size(shape)


def allowed_pairs(site: Any) -> Tensor:
    """Allowed pairs of a site's permutation law, of the shape and on the device of its value."""
    value: Tensor = site["value"]
    allowed: Tensor | None = unwrap(site["fn"]).support.allowed
    if allowed is None:
        allowed = torch.ones((), dtype=torch.bool, device=value.device)
    return allowed.expand(value.shape)


class _ChooseSubsample(Messenger):
    """Sets the indices of subsampled plates."""

    def __init__(self, chosen: dict[str, Tensor]) -> None:
        super().__init__()
        self.chosen = chosen

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample) and msg["name"] in self.chosen:
            msg["value"] = self.chosen[msg["name"]].to(msg["fn"].device)

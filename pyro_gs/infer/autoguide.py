"""The automatic guide with Gumbel-Sinkhorn laws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import pyro
import torch
from pyro.distributions import constraints as pyro_constraints
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_gs.distributions.gumbel_matching import GumbelMatching
from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.infer.handlers import Temperature, name_sites
from pyro_gs.infer.initialization import InitLogits, check_site_logits, start_logits
from pyro_gs.infer.objective import GuideGumbelSinkhorn, Objective, check_objective
from pyro_gs.infer.permutation_guide import AutoPermutationGuide, allowed_pairs
from pyro_gs.ops.logits import check_count, check_temperature
from pyro_gs.ops.matching import matching

SiteTemperature = Temperature | Callable[[], Temperature]
Network = Callable[..., Tensor]


class AutoGumbelSinkhorn(AutoPermutationGuide):
    """Guide whose permutation sites are independent Gumbel-Sinkhorn laws.

    Sites are those whose law has permutation matrices or doubly stochastic matrices as support. Give it the plain model
    or the relaxed one, and give ``SVI`` the relaxed one::

        guide = AutoGumbelSinkhorn(model)
        svi = SVI(relax(model), guide, Adam({"lr": 0.1}), Trace_ELBO())

    Pairs that a site's prior forbids are forbidden in the guide. Other latent variables need a guide of their own,
    joined by ``AutoGuideList``::

        guide = AutoGuideList(model)
        guide.append(AutoGumbelSinkhorn(poutine.block(model, expose=["P"])))
        guide.append(AutoNormal(poutine.block(model, hide=["P"])))

    Hard permutations from either: ``Predictive(model, guide=harden(guide), num_samples=100)``.

    **Parameters.** By default a site has free logits, one a pair. With ``rank=r`` they are ``U V^T`` of two matrices
    (..., n, r): 2 n r parameters in place of n^2, for large n; the law is still sampled from n x n logits. With ``logits``
    they are a function of the model's arguments (amortization), whose parameters SVI trains if it is a module::

        class Net(torch.nn.Module):
            def forward(self, x, y):  # the arguments of the model
                return self.embed(y) @ self.embed(x).mT

        guide = AutoGumbelSinkhorn(model, logits=Net())

    As those of all autoguides, parameters are kept in Pyro's parameter store under the name of the class
    (``AutoGumbelSinkhorn.free_logits.P``), so a second guide in the same store takes over and changes those of the first.
    Before another fit write ``pyro.clear_param_store()``; to keep both guides, give each a store of its own::

        with pyro.get_param_store().scope() as first:
            ...  # make the guide and fit it
        with pyro.get_param_store().scope(first):
            ...  # use it

    A guide with ``logits`` runs the model once a call, for the pairs that its prior forbids at these arguments. As with
    other autoguides, plates keep the sizes of the first call unless ``create_plates`` says otherwise.

    Args:
        model: a Pyro model.
        temperature: of the guide's laws: a positive number, a tensor that broadcasts with the sites' batch shapes,
            a function of no arguments, or a dict of these by site; it can be set anew at any time, as
            ``infer/annealing.py`` does.
        init_scale: standard deviation of the initial logits around zero, where ``init_logits`` says nothing.
        objective: ``"density"`` (true relaxed densities), ``"tightened_kl"`` or ``"noise_kl"`` (the paper's); see
            ``infer/objective.py`` for what each bounds.
        num_particles: importance sample of the guide's density, 0 for Laplace.
        hard: draw permutation matrices ``M(X + eps)`` with the gradients of the relaxed draws (straight-through, biased),
            so that the likelihood is that of the plain model; give ``SVI`` the relaxed model still.
        init_logits: initial logits of a site at the full size of its plates, ``-inf`` exactly where its prior forbids: a
            dict by site, or a function of its name and its allowed pairs (bool), such as :func:`init_to_matching`,
            which may return None.
        rank: of the logits, at least 1.
        logits: a function of the model's arguments that returns the logits (..., n, n) of the only site, or a dict of
            such functions by site. A plate's items may come at its full size or at that of the subsample.
        create_plates: as in Pyro's ``AutoGuide``.

    Raises:
        TypeError: ``logits`` are no functions; at a call, what they return is no tensor.
        ValueError: a bad ``temperature``, ``init_scale``, ``objective``, ``num_particles`` or ``rank``; ``init_logits`` with
            ``rank``, or for a site whose ``logits`` are a function; at the first call, a model without a permutation site,
            or with other latent sites (the message names them), unknown sites in a dict, initial logits that do not fit;
            at any call, logits of another shape than the site's.
        NotImplementedError: at the first call, a plate that is gone through in turn (``for i in plate``).

    Example:
        >>> import pyro, torch
        >>> from pyro_gs import UniformPermutation
        >>> def model():
        ...     return pyro.sample("P", UniformPermutation(3))
        >>> guide = AutoGumbelSinkhorn(model, init_logits={"P": 3 * torch.eye(3)})
        >>> guide()["P"].shape
        torch.Size([3, 3])
        >>> guide.median()["P"]
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        temperature: SiteTemperature | Mapping[str, SiteTemperature] = 1.0,
        init_scale: float = 0.01,
        objective: Objective = "density",
        num_particles: int = 0,
        *,
        hard: bool = False,
        init_logits: InitLogits | None = None,
        rank: int | None = None,
        logits: Network | Mapping[str, Network] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if isinstance(init_scale, bool) or not isinstance(init_scale, (int, float)) or not 0 <= init_scale < float("inf"):
            raise ValueError(f"init_scale must be a finite number of at least 0, but is {init_scale!r}")
        check_objective(objective)
        check_count(num_particles, "num_particles", least=0)
        if rank is not None:
            check_count(rank, "rank", least=1)
            if init_scale == 0:
                raise ValueError("init_scale must be positive with rank, as zero factors have no gradient, but is 0")
            if init_logits is not None:
                raise ValueError("init_logits cannot be given with rank: logits of a low rank cannot take any value")
        networks = dict(logits) if isinstance(logits, Mapping) else {None: logits} if logits is not None else {}
        bad = [network for network in networks.values() if not callable(network)]
        if bad:
            raise TypeError(f"logits must be a function of the model's arguments, but is {type(bad[0]).__name__}")
        super().__init__(model, create_plates=create_plates)
        self.temperature = temperature
        self.objective: Objective = objective
        self.num_particles = num_particles
        self.hard = hard
        self._init_scale = float(init_scale)
        self._init_logits = init_logits
        self._rank = rank
        self.networks = PyroModule()
        self._network_names: dict[str | None, str] = {}  # attributes of self.networks, as site names may have dots
        for place, (name, network) in enumerate(networks.items()):
            self._network_names[name] = f"net_{place}"
            setattr(self.networks, f"net_{place}", network)

    @property
    def temperature(self) -> SiteTemperature | Mapping[str, SiteTemperature]:
        """Temperature of the guide's laws, as it was set."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: SiteTemperature | Mapping[str, SiteTemperature]) -> None:
        for each in value.values() if isinstance(value, Mapping) else [value]:
            check_temperature(each() if callable(each) else each)
        if self.prototype_trace is not None and isinstance(value, Mapping):
            self._check_names("temperature", value, complete=True)
        self._temperature = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":  # PyroModule's __setattr__ would pass the property by for tensors
            AutoGumbelSinkhorn.temperature.fset(self, value)  # type: ignore[attr-defined]
        elif name == "_temperature":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _check_names(self, argument: str, by_site: Mapping[Any, Any], *, complete: bool = False) -> None:
        names = [name for name, _ in self._stochastic_nodes()]
        unknown = [name for name in by_site if name not in names]
        missing = [name for name in names if name not in by_site] if complete else []
        if unknown or missing:
            what = f"names {name_sites(unknown)}, no site" if unknown else f"says nothing of {name_sites(missing)}"
            raise ValueError(f"{argument} {what}; the permutation sites are {name_sites(names)}")

    def _check_sites(self) -> None:
        super()._check_sites()
        names = [name for name, _ in self._stochastic_nodes()]
        if None in self._network_names:
            if len(names) > 1:
                raise ValueError(
                    f"logits must be a dict by site, as the model has several: {{'{names[0]}': ..., '{names[1]}': ...}}"
                )
            self._network_names = {names[0]: self._network_names[None]}
        self._check_names("logits", self._network_names)
        if isinstance(self._temperature, Mapping):
            self._check_names("temperature", self._temperature, complete=True)
        if isinstance(self._init_logits, Mapping):
            self._check_names("init_logits", self._init_logits)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.free_logits = PyroModule()
        self.left_factors, self.right_factors = PyroModule(), PyroModule()
        super()._setup_prototype(*args, **kwargs)

    def _init_site(self, name: str, site: dict[str, Any], allowed: Tensor) -> None:
        start = start_logits(self._init_logits, name, allowed)
        if name in self._network_names:
            if start is not None:
                raise ValueError(f"init_logits cannot start site '{name}', whose logits are a function of the arguments")
            return
        like, event_dim = site["value"], site["fn"].event_dim
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()

        def noise(shape: torch.Size, scale: float) -> PyroParam:
            return PyroParam(scale * torch.randn(shape, dtype=dtype, device=like.device), pyro_constraints.real, event_dim)

        if self._rank is None:
            free = noise(allowed.shape, self._init_scale)
            if start is not None:
                free = PyroParam(_finite(start).to(like.device, dtype), pyro_constraints.real, event_dim)
            deep_setattr(self.free_logits, name, free)
        else:  # entries of U V^T have the standard deviation init_scale
            shape, scale = (*allowed.shape[:-1], self._rank), self._init_scale**0.5 / self._rank**0.25
            deep_setattr(self.left_factors, name, noise(torch.Size(shape), scale))
            deep_setattr(self.right_factors, name, noise(torch.Size(shape), scale))

    def _logits(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Logits of a site, at the subsample of its plates inside them, else at their full size."""
        if name in self._network_names:
            return self._amortized(name, args, kwargs)
        if self._rank is None:
            free: Tensor = attrgetter(name)(self.free_logits)
        else:
            left, right = attrgetter(name)(self.left_factors), attrgetter(name)(self.right_factors)
            free = left @ right.mT
        return self._masked(name, free)

    def _prepare(self, plates: Mapping[str, Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the pairs that the priors of amortized sites forbid at these arguments."""
        if not self._network_names:
            return
        plates = plates or {}
        chosen = {name: plate._indices for name, plate in plates.items() if plate.subsample_size < plate.size}
        trace = self._trace_model(chosen, args, kwargs)
        for name in self._network_names:
            site = trace.nodes[name]
            if chosen:
                self._allowed[str(name)] = allowed_pairs(site)
            else:
                self._allowed[str(name)] = self._full_mask(str(name), site, args, kwargs)

    def _amortized(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        free = getattr(self.networks, self._network_names[name])(*args, **kwargs)
        if not isinstance(free, Tensor):
            raise TypeError(f"logits of site '{name}' must return a tensor (..., n, n), but returns {type(free).__name__}")
        want = self._allowed[name]
        assert want is not None  # of _prepare
        trace: Any = self.prototype_trace
        event_dim = self._event_dim(name)
        sizes = {frame.dim - event_dim: frame.full_size for frame in trace.nodes[name]["cond_indep_stack"]}
        full = torch.Size(sizes.get(place - want.dim(), size) for place, size in enumerate(want.shape))
        if free.shape == full != want.shape:
            free = pyro.subsample(free, event_dim=event_dim)
        if free.shape != want.shape:
            or_full = f" or {tuple(full)}" if full != want.shape else ""
            raise ValueError(
                f"logits of site '{name}' must return shape {tuple(want.shape)}{or_full}, but return {tuple(free.shape)}"
            )
        return torch.where(want, free, -torch.inf)

    def _law(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GuideGumbelSinkhorn:
        temperature = self._temperature[name] if isinstance(self._temperature, Mapping) else self._temperature
        if callable(temperature):
            temperature = temperature()
        logits = self._logits(name, args, kwargs)
        return GuideGumbelSinkhorn(self.objective, temperature, logits, self.num_particles, hard=self.hard)

    def logits(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of a site's law at the full size of its plates, shape (..., n, n), ``-inf`` where forbidden.

        Args:
            name: the site.
            *args: of the model; needed where the logits are a function of them.
            **kwargs: likewise.

        Raises:
            RuntimeError: the guide has not been called yet, and no arguments are given.
            KeyError: no such site.
        """
        self._see(args, kwargs)
        self._require_site(name)
        self._prepare(None, args, kwargs)
        return self._logits(name, args, kwargs)

    @torch.no_grad()
    def set_logits(self, name: str, logits: Tensor) -> None:
        """Set the logits of a site's law, for a start of one's own or a move between optimizer steps.

        Args:
            name: the site.
            logits: shape of :meth:`logits`, finite or ``-inf`` exactly where that is.

        Raises:
            RuntimeError: the guide has not been called yet.
            KeyError: no such site.
            NotImplementedError: the logits are a low-rank product or a function of the arguments.
            ValueError: another shape, NaN or +inf, or other forbidden pairs than the prior's.
        """
        self._require_site(name)
        if name in self._network_names:
            raise NotImplementedError(
                f"the logits of site '{name}' are a function of the model's arguments; change guide.networks"
            )
        if self._rank is not None:
            raise NotImplementedError(
                f"the logits of site '{name}' are low rank, U V^T of rank {self._rank}, and cannot take any value; change "
                f"guide.left_factors.{name} and guide.right_factors.{name}, or make the guide without rank"
            )
        check_site_logits(name, logits, self.logits(name) > -torch.inf)
        attrgetter(name)(self.free_logits).copy_(_finite(logits))

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The matching of each site's logits, a dict of permutation matrices (..., n, n).

        Args:
            *args: of the model; needed where the logits are a function of them, or the guide was not called yet.
            **kwargs: likewise.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._prepare(None, args, kwargs)
        return {name: matching(self._logits(name, args, kwargs)) for name, _ in self._sites()}

    @torch.no_grad()
    def relaxed_sample(self, sample_shape: Any = (), *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the relaxed laws, a dict of sample_shape + (..., n, n) doubly stochastic matrices.

        Args:
            sample_shape: of the draws.
            *args: as for :meth:`hard_sample`.
            **kwargs: likewise.

        Raises:
            RuntimeError: the guide has not been called yet, and no arguments are given.
        """
        self._see(args, kwargs)
        self._prepare(None, args, kwargs)
        shape = torch.Size(sample_shape)
        return {name: GumbelSinkhorn.rsample(self._law(name, args, kwargs), shape) for name, _ in self._sites()}

    def marginals(self, num_samples: int = 1000, *args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Probabilities of the pairs under hard draws, and their standard errors; see :meth:`GumbelMatching.marginals`.

        Args:
            num_samples: number of draws, at least 2.
            *args: as for :meth:`hard_sample`.
            **kwargs: likewise.

        Returns:
            Dict by site of two tensors (..., n, n).

        Raises:
            RuntimeError: the guide has not been called yet, and no arguments are given.
        """
        self._see(args, kwargs)
        self._prepare(None, args, kwargs)
        return {
            name: GumbelMatching(self._logits(name, args, kwargs).detach()).marginals(num_samples)
            for name, _ in self._sites()
        }


def _finite(logits: Tensor) -> Tensor:
    """Zero in place of ``-inf``, which the mask puts back."""
    return logits.masked_fill(logits == -torch.inf, 0.0)

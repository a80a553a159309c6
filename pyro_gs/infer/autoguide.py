"""An automatic guide over latent permutations."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from pyro.distributions import constraints as pyro_constraints
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_gs.infer.handlers import Temperature
from pyro_gs.infer.objective import GuideGumbelSinkhorn, Objective, check_objective
from pyro_gs.infer.permutation_guide import AutoPermutationGuide
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.logits import check_logits, check_temperature
from pyro_gs.ops.matching import matching


class AutoGumbelSinkhorn(AutoPermutationGuide):
    """Guide whose permutation sites are independent Gumbel-Sinkhorn laws with free logits.

    Sites are those whose law has permutation matrices or doubly stochastic matrices as support. Give it the plain model
    or the relaxed one, and give ``SVI`` the relaxed one::

        guide = AutoGumbelSinkhorn(model)
        svi = SVI(relax(model), guide, Adam({"lr": 0.1}), Trace_ELBO())

    Pairs that a site's prior forbids are forbidden in the guide. Other latent variables need a guide of their own,
    joined by ``AutoGuideList``::

        guide = AutoGuideList(model)
        guide.append(AutoGumbelSinkhorn(poutine.block(model, expose=["P"])))
        guide.append(AutoNormal(poutine.block(model, hide=["P"])))

    Args:
        model: a Pyro model.
        temperature: of the guide's laws: a positive number, a tensor that broadcasts with the sites' batch shapes, or
            a function of no arguments; it can be set anew at any time, as ``infer/annealing.py`` does.
        init_scale: standard deviation of the initial logits around zero.
        objective: ``"density"`` (true relaxed densities), ``"tightened_kl"`` or ``"noise_kl"`` (the paper's); see
            ``infer/objective.py`` for what each bounds.
        num_particles: importance sample of the guide's density, 0 for Laplace.
        create_plates: as in Pyro's ``AutoGuide``.

    Raises:
        ValueError: a bad ``temperature``, ``init_scale`` or ``objective``; at the first call, a model without a
            permutation site, or with other latent sites (the message names them).
    """

    def __init__(
        self,
        model: Callable[..., Any],
        temperature: Temperature | Callable[[], Temperature] = 1.0,
        init_scale: float = 0.01,
        objective: Objective = "density",
        num_particles: int = 0,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if isinstance(init_scale, bool) or not isinstance(init_scale, (int, float)) or not 0 <= init_scale < float("inf"):
            raise ValueError(f"init_scale must be a finite number of at least 0, but is {init_scale!r}")
        check_objective(objective)
        if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 0:
            raise ValueError(f"num_particles must be an integer of at least 0, but is {num_particles!r}")
        super().__init__(model, create_plates=create_plates)
        self.temperature = temperature
        self.objective: Objective = objective
        self.num_particles = num_particles
        self._init_scale = float(init_scale)

    @property
    def temperature(self) -> Temperature | Callable[[], Temperature]:
        """Temperature of the guide's laws, as it was set."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: Temperature | Callable[[], Temperature]) -> None:
        check_temperature(value() if callable(value) else value)
        self._temperature = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature":  # PyroModule's __setattr__ would pass the property by for tensors
            AutoGumbelSinkhorn.temperature.fset(self, value)  # type: ignore[attr-defined]
        elif name == "_temperature":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.free_logits = PyroModule()
        super()._setup_prototype(*args, **kwargs)

    def _init_site(self, name: str, site: dict[str, Any], allowed: Tensor) -> None:
        like = site["value"]
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        init = self._init_scale * torch.randn(allowed.shape, dtype=dtype, device=like.device)
        deep_setattr(self.free_logits, name, PyroParam(init, pyro_constraints.real, 2))

    def _named(self, name: str) -> Tensor:
        free: Tensor = attrgetter(name)(self.free_logits)
        return free

    def _law(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GuideGumbelSinkhorn:
        temperature = self._temperature() if callable(self._temperature) else self._temperature
        logits = self._masked(name, self._named(name))
        return GuideGumbelSinkhorn(self.objective, temperature, logits, self.num_particles)

    def logits(self, name: str) -> Tensor:
        """Logits of a site's law at the full size of its plates, shape (..., n, n), ``-inf`` where forbidden.

        Raises:
            RuntimeError: the guide has not been called yet.
            KeyError: no such site.
        """
        self._require_site(name)
        return self._masked(name, self._named(name))

    @torch.no_grad()
    def set_logits(self, name: str, logits: Tensor) -> None:
        """Set the logits of a site's law, for a start of one's own or a move between optimizer steps.

        Args:
            name: the site.
            logits: shape of :meth:`logits`, finite or ``-inf`` exactly where that is.

        Raises:
            RuntimeError: the guide has not been called yet.
            KeyError: no such site.
            ValueError: another shape, NaN or +inf, or other forbidden pairs than the prior's.
        """
        now = self.logits(name)
        check_logits(logits)
        if logits.shape != now.shape:
            raise ValueError(f"logits must have shape {tuple(now.shape)} for site '{name}', but has {tuple(logits.shape)}")
        if not torch.equal(logits == -torch.inf, now == -torch.inf):
            raise ValueError(f"logits must be -inf exactly at the pairs that the prior of site '{name}' forbids")
        self._named(name).copy_(logits.masked_fill(logits == -torch.inf, 0.0))

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The matching of each site's logits, a dict of permutation matrices (..., n, n)."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return {name: matching(self.logits(name)) for name, _ in self._sites()}

    @torch.no_grad()
    def hard_sample(self, sample_shape: Any = ()) -> dict[str, Tensor]:
        """Draws of ``M(X + eps)``, the zero-temperature limit, a dict of sample_shape + (..., n, n) matrices.

        Raises:
            RuntimeError: the guide has not been called yet.
        """
        out = {}
        for name, _ in self._sites():
            logits = self.logits(name)
            shape = torch.Size(sample_shape) + logits.shape
            out[name] = matching(logits.double() + gumbel_noise(shape, logits)).to(logits.dtype)
        return out

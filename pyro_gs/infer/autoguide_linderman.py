"""Automatic guides with the two laws of Linderman et al. (2018), baselines to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from pyro.distributions import constraints as pyro_constraints
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints as torch_constraints
from torch.distributions import register_kl

from pyro_gs.distributions import constraints
from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.distributions.matrix_law import MatrixLaw
from pyro_gs.distributions.pushed_normal import PushedNormal
from pyro_gs.distributions.relaxed import RelaxedPermutation
from pyro_gs.distributions.rounding import RoundingPermutation
from pyro_gs.distributions.stick_breaking import StickBreakingPermutation
from pyro_gs.distributions.transforms import RoundingTransform
from pyro_gs.distributions.uniform_permutation import UniformPermutation
from pyro_gs.infer.handlers import unwrap
from pyro_gs.infer.hardening import register_hard_law
from pyro_gs.infer.permutation_guide import AutoPermutationGuide
from pyro_gs.ops.logits import check_temperature
from pyro_gs.ops.matching import matching
from pyro_gs.ops.sinkhorn import log_sinkhorn, sinkhorn


def _check_positive(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, but is {value!r}")


class _AutoLinderman(AutoPermutationGuide):
    """Guide with a free matrix and free standard deviations for each site, and one temperature.

    Args:
        model: a Pyro model.
        temperature: of the laws, a number.
        init_scale: initial standard deviation of the normal variables, positive.
        create_plates: as in Pyro's ``AutoGuide``.
    """

    _removed = 0  # rows that the free matrix lacks

    def __init__(
        self,
        model: Callable[..., Any],
        temperature: float,
        init_scale: float,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_temperature(temperature)
        _check_positive(init_scale, "init_scale")
        super().__init__(model, create_plates=create_plates)
        self.temperature = temperature  # the law checks what it is set to
        self._init_scale = float(init_scale)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self.locs, self.scales = PyroModule(), PyroModule()
        super()._setup_prototype(*args, **kwargs)

    def _init_site(self, name: str, site: dict[str, Any], allowed: Tensor) -> None:
        if not bool(allowed.all()):
            raise ValueError(
                f"{type(self).__name__} has no forbidden pairs, but the prior of site '{name}' forbids "
                f"{int((~allowed).sum())}; use AutoGumbelSinkhorn"
            )
        if allowed.shape[-1] <= self._removed:
            raise ValueError(
                f"{type(self).__name__} has nothing to learn of site '{name}', whose matrices have a single row; take a "
                "constant"
            )
        like, event_dim = site["value"], site["fn"].event_dim
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        shape = (*allowed.shape[:-2], *(size - self._removed for size in allowed.shape[-2:]))
        free = torch.zeros(shape, dtype=dtype, device=like.device)
        deep_setattr(self.locs, name, PyroParam(free, pyro_constraints.real, event_dim))
        deep_setattr(self.scales, name, PyroParam(free + self._init_scale, pyro_constraints.positive, event_dim))

    def _law(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PushedNormal:
        raise NotImplementedError

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The matching of what each site's law makes of its mean, a dict of permutation matrices (..., n, n).

        Args:
            *args: of the model; needed where the guide was not called yet.
            **kwargs: likewise.
        """
        self._see(args, kwargs)
        laws = {name: self._law(name, args, kwargs) for name, _ in self._sites()}
        return {name: matching(law.transform(law.loc)) for name, law in laws.items()}


class AutoStickBreaking(_AutoLinderman):
    """Guide whose permutation sites are independent stick-breaking laws (:class:`StickBreakingPermutation`).

    Use and objective are those of :class:`AutoGumbelSinkhorn` with true densities::

        SVI(relax(model), AutoStickBreaking(model), Adam({"lr": 0.1}), Trace_ELBO())

    The prior is what ``relax`` makes of the model's, a Gumbel-Sinkhorn law; its density and the guide's are with respect to
    the same measure, so the ELBO bounds the evidence of the relaxed model, the same number whichever guide is fitted to
    it. Hard draws are the matchings of relaxed ones; under them the prior is ``M(X_0 + eps)``.

    The law depends on the order of rows and columns, and cannot forbid pairs.

    Args:
        model: a Pyro model.
        temperature: of the laws, a positive number; it can be set anew at any time, as ``AnnealedSVI`` does. At 0.05 of the
            standard deviations or less, densities are lost to rounding.
        init_scale: initial standard deviation of the normal variables, positive.
        create_plates: as in Pyro's ``AutoGuide``.

    Raises:
        ValueError: a bad ``temperature`` or ``init_scale``; at the first call, forbidden pairs, a single row, or as
            :class:`AutoGumbelSinkhorn`.
        NotImplementedError: as :class:`AutoGumbelSinkhorn`.

    Example:
        >>> import pyro, torch
        >>> def model():
        ...     return pyro.sample("P", UniformPermutation(3))
        >>> guide = AutoStickBreaking(model)
        >>> guide()["P"].sum(-1)
        tensor([1., 1., 1.], grad_fn=...)
        >>> guide.hard_sample((7,))["P"].shape
        torch.Size([7, 3, 3])
    """

    _removed = 1

    def __init__(
        self,
        model: Callable[..., Any],
        temperature: float = 1.0,
        init_scale: float = 1.0,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, temperature, init_scale, create_plates=create_plates)

    def _law(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StickBreakingPermutation:
        return StickBreakingPermutation(self.temperature, attrgetter(name)(self.locs), attrgetter(name)(self.scales))


class GuideRounding(RoundingPermutation):
    """The rounding law in a guide, which brings a prior of its own kind along.

    The ``log_prob`` of its own draws is zero, and that of the model's relaxed uniform prior is minus the KL divergence to
    ``RoundingPermutation(temperature, 1 / n, prior_scale)``: in closed form, as both are normal laws pushed through the same
    bijection.

    Args:
        temperature: as in :class:`RoundingPermutation`.
        loc: as in :class:`RoundingPermutation`.
        scale: as in :class:`RoundingPermutation`.
        prior_scale: standard deviation of the prior, positive.
    """

    def __init__(self, temperature: float, loc: Tensor, scale: Tensor, prior_scale: float) -> None:
        self.prior_scale = prior_scale
        super().__init__(temperature, loc, scale)

    def expand(self, batch_shape: Any, _instance: PushedNormal | None = None) -> GuideRounding:
        """The same law with a larger batch shape."""
        new: GuideRounding = self._get_checked_instance(GuideRounding, _instance)
        new.prior_scale = self.prior_scale
        super().expand(batch_shape, _instance=new)
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """As :meth:`RoundingPermutation.rsample`; the values know the KL divergence."""
        value = super().rsample(sample_shape)
        fixed, batch = value.detach(), value.shape[:-2]
        # Entries may be negative: the logarithm is that of a matrix with the same matching.
        return RelaxedPermutation.wrap(value, lambda: log_sinkhorn(fixed.double()), lambda p: self._bound(p, batch))

    def log_prob(self, value: Tensor) -> Tensor:
        """As :meth:`RoundingPermutation.log_prob`; zero for its own draws."""
        bound = value.bound if isinstance(value, RelaxedPermutation) else None
        return super().log_prob(value) if bound is None else -bound(self)

    def _bound(self, p: Any, batch: torch.Size) -> Tensor:
        if p is self:
            return torch.zeros(batch, dtype=self.loc.dtype, device=self.loc.device)
        _check_uniform(p)
        return self.kl().expand(batch)

    def kl(self) -> Tensor:
        """The KL divergence to the prior, of the batch shape."""
        ratio = self.scale / self.prior_scale
        shift = (self.loc - 1 / self.loc.shape[-1]) / self.prior_scale
        return ((ratio.square() + shift.square() - 1) / 2 - ratio.log()).sum((-2, -1))


def _check_uniform(prior: Any, name: str = "P") -> None:
    uniform = (isinstance(prior, UniformPermutation) and prior._support.full) or (
        isinstance(prior, GumbelSinkhorn) and bool((prior.logits == prior.logits[..., :1, :1]).all())
    )
    if not uniform:
        raise ValueError(
            f"AutoRounding brings its own prior, which stands for the uniform one, but the prior of site '{name}' is "
            f"{type(prior).__name__} with other probabilities; use AutoGumbelSinkhorn, or UniformPermutation(n) with a "
            f"pyro.factor of {name}"
        )


class AutoRounding(_AutoLinderman):
    r"""Guide whose permutation sites are independent rounding laws (:class:`RoundingPermutation`).

    ``X = temperature Z + (1 - temperature) M(Z)`` with ``Z`` normal around ``pyro_gs.sinkhorn(logits)``, with free logits
    and standard deviations. Values are matrices near the vertices of the polytope, not in it: entries may be negative::

        SVI(relax(model), AutoRounding(model), Adam({"lr": 0.1}), Trace_ELBO())

    A Gumbel-Sinkhorn prior has no density at such values. So the guide brings a prior of its own kind, in place of what
    ``relax`` makes of a uniform one: ``RoundingPermutation(temperature, 1 / n, prior_scale)``, whose hard permutations
    ``M(Z)`` are uniform, as the entries of ``Z`` are independent with one law. Its temperature is the guide's, and the KL
    divergence is closed form. The ELBO bounds the evidence of the model with that relaxed prior, and is not to be compared
    with the ELBO of a guide that keeps ``relax``'s.

    Args:
        model: a Pyro model with uniform priors.
        temperature: of the laws, above 0 and at most 1; it can be set anew at any time, as ``AnnealedSVI`` does.
        init_scale: initial standard deviation of the entries of ``Z``, positive.
        prior_scale: standard deviation of the entries of ``Z`` under the prior, positive.
        create_plates: as in Pyro's ``AutoGuide``.

    Raises:
        ValueError: a bad ``temperature``, ``init_scale`` or ``prior_scale``; at the first call, a prior that is not uniform
            over all permutations, or as :class:`AutoGumbelSinkhorn`.
        NotImplementedError: as :class:`AutoGumbelSinkhorn`.

    Example:
        >>> import pyro, torch
        >>> def model():
        ...     return pyro.sample("P", UniformPermutation(3))
        >>> guide = AutoRounding(model, temperature=0.1)
        >>> X = guide()["P"]
        >>> (X - X.round()).abs().max() < 0.2
        tensor(True)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        temperature: float = 0.5,
        init_scale: float = 0.25,
        prior_scale: float = 0.5,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        _check_positive(prior_scale, "prior_scale")
        RoundingTransform(temperature)
        super().__init__(model, temperature, init_scale, create_plates=create_plates)
        self.prior_scale = float(prior_scale)

    def _init_site(self, name: str, site: dict[str, Any], allowed: Tensor) -> None:
        super()._init_site(name, site, allowed)
        _check_uniform(unwrap(site["fn"]), name)

    def _law(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GuideRounding:
        loc = sinkhorn(attrgetter(name)(self.locs))
        return GuideRounding(self.temperature, loc, attrgetter(name)(self.scales), self.prior_scale)


class MatchingOf(MatrixLaw):
    """The law of ``M(X)`` with ``X`` of another law over matrices; to draw from.

    Args:
        law: with event shape (n, n).
    """

    arg_constraints = {}  # noqa: RUF012

    def __init__(self, law: PushedNormal) -> None:
        self.law = law
        super().__init__(law.batch_shape, law.event_shape)

    @torch_constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.Permutation:
        """Permutation matrices."""
        return constraints.permutation

    def expand(self, batch_shape: Any, _instance: MatchingOf | None = None) -> MatchingOf:
        """The same law with a larger batch shape."""
        return MatchingOf(self.law.expand(batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape sample_shape + batch_shape + (n, n)."""
        return matching(self.law.rsample(sample_shape).as_subclass(Tensor))

    def log_prob(self, value: Tensor) -> Tensor:
        """Not known.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"the probabilities of the matchings of {type(self.law).__name__} are not known")


register_hard_law(PushedNormal)(MatchingOf)


def _rounding_kl(q: GuideRounding, p: Any) -> Tensor:
    return q._bound(p, q.batch_shape)


for _prior in (GumbelSinkhorn, UniformPermutation):
    register_kl(GuideRounding, _prior)(_rounding_kl)

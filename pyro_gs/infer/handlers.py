"""``relax``: the same model with its permutation sites relaxed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Independent

from pyro_gs.distributions import constraints
from pyro_gs.distributions.gibbs_permutation import GibbsPermutation
from pyro_gs.distributions.gumbel_matching import GumbelMatching
from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.distributions.plackett_luce import PlackettLuce
from pyro_gs.distributions.relaxed import RelaxedPermutation
from pyro_gs.distributions.relaxed_plackett_luce import RelaxedPlackettLuce
from pyro_gs.distributions.uniform_permutation import UniformPermutation
from pyro_gs.ops.logits import check_temperature

Temperature = float | Tensor
Relaxation = Callable[[Any, Temperature], dist.TorchDistribution]
_RELAXATIONS: dict[type, Relaxation] = {}
_F = TypeVar("_F", bound=Callable[..., Any])

INDEX_OF = "pyro_gs_index_of"
"""Key of a site's ``infer`` that marks it as the index of a permutation."""


def register_relaxation(law: type) -> Callable[[Relaxation], Relaxation]:
    """Decorator that tells :func:`relax` what becomes of a law over permutation matrices.

    Args:
        law: the class of the discrete law; its subclasses follow unless registered themselves.

    Raises:
        TypeError: ``law`` is no class, or what is decorated no function.

    Example:
        >>> import torch
        >>> class NearIdentity(UniformPermutation):
        ...     pass
        >>> @register_relaxation(NearIdentity)
        ... def relax_near_identity(law, temperature):
        ...     return GumbelSinkhorn(temperature, 2 * torch.eye(law.n))
    """
    if not isinstance(law, type):
        raise TypeError(f"law must be a class of distributions, but is {law!r}")

    def decorate(relaxation: Relaxation) -> Relaxation:
        if not callable(relaxation):
            raise TypeError(f"what is registered must be a function of a law and a temperature, but is {relaxation!r}")
        _RELAXATIONS[law] = relaxation
        return relaxation

    return decorate


@register_relaxation(UniformPermutation)
def _relax_uniform(law: UniformPermutation, temperature: Temperature) -> GumbelSinkhorn:
    return GumbelSinkhorn(temperature, law.log_weights, validate_args=law._validate_args)


@register_relaxation(GibbsPermutation)
@register_relaxation(GumbelMatching)
def _relax_logits(law: GibbsPermutation | GumbelMatching, temperature: Temperature) -> GumbelSinkhorn:
    return GumbelSinkhorn(temperature, law.logits, validate_args=law._validate_args)


@register_relaxation(PlackettLuce)
def _relax_ranking(law: PlackettLuce, temperature: Temperature) -> RelaxedPlackettLuce:
    return RelaxedPlackettLuce(temperature, law.scores, validate_args=law._validate_args)


def is_permutation_law(fn: Any) -> bool:
    """Whether a distribution's support is a permutation matrix, hard or relaxed."""
    support = fn.support
    while isinstance(support, torch.distributions.constraints.independent):
        support = support.base_constraint
    return isinstance(support, (constraints.Permutation, constraints.DoublyStochastic))


def unwrap(fn: Any) -> Any:
    """The law inside ``Masked``, ``Independent`` and ``Expanded`` distributions."""
    while isinstance(fn, (dist.MaskedDistribution, Independent, ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def rewrap(fn: Any, relaxed: Callable[[Any], Any]) -> Any:
    """A distribution with another law inside its ``Masked``, ``Independent`` and ``Expanded`` wrappers."""
    if isinstance(fn, dist.MaskedDistribution):
        return rewrap(fn.base_dist, relaxed).mask(fn._mask)
    if isinstance(fn, Independent):
        return rewrap(fn.base_dist, relaxed).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return rewrap(fn.base_dist, relaxed).expand(fn.batch_shape)
    return relaxed(fn)


def _read(temperature: Temperature | Callable[[], Temperature]) -> Temperature:
    return temperature() if callable(temperature) else temperature


def given_values(msg: Any) -> list[Any]:
    """Values that a site is observed or conditioned at, also by handlers outside of the one that asks."""
    data: list[Any] = [getattr(m.data, "nodes", m.data) for m in _PYRO_STACK if isinstance(m, ConditionMessenger)]
    given = [part[msg["name"]] for part in data if msg["name"] in part] + ([msg["value"]] if msg["is_observed"] else [])
    return [value["value"] if isinstance(value, dict) else value for value in given]


class RelaxMessenger(Messenger):
    """Effect handler behind :func:`relax`; also a context manager.

    Example:
        >>> import pyro
        >>> with RelaxMessenger(temperature=0.5):
        ...     P = pyro.sample("P", UniformPermutation(3))
        >>> bool((P > 0).all())
        True
    """

    def __init__(self, temperature: Temperature | Callable[[], Temperature] = 1.0) -> None:
        super().__init__()
        check_temperature(_read(temperature))
        self.temperature = temperature

    def _pyro_sample(self, msg: Any) -> None:
        law = unwrap(msg["fn"])
        if not isinstance(getattr(law, "support", None), (constraints.Permutation, constraints.PartialMatching)):
            return
        name = msg["name"]
        if any(not isinstance(value, RelaxedPermutation) for value in given_values(msg)):
            return  # an observed permutation is no latent variable: it keeps its law; HMC conditions on relaxed ones
        relaxation = next((_RELAXATIONS[kind] for kind in type(law).__mro__ if kind in _RELAXATIONS), None)
        if relaxation is None:
            known = ", ".join(sorted(kind.__name__ for kind in _RELAXATIONS))
            raise NotImplementedError(
                f"relax knows no relaxation of {type(law).__name__} at site '{name}', only of {known}; register one with "
                f"@pyro_gs.register_relaxation({type(law).__name__}), or write a GumbelSinkhorn into the model (for a "
                "partial matching GumbelSinkhorn(temperature, pyro_gs.pad_logits(...)), whose value pyro_gs.unpad reads)"
            )
        temperature = _read(self.temperature)
        check_temperature(temperature)
        msg["infer"] = {key: value for key, value in msg["infer"].items() if key != "enumerate"}
        msg["fn"] = rewrap(msg["fn"], lambda base: relaxation(base, temperature))


def relax(model: Callable[..., Any] | None = None, temperature: Temperature | Callable[[], Temperature] = 1.0) -> Any:
    r"""The model with its permutation sites relaxed to Gumbel-Sinkhorn laws.

    ``UniformPermutation(n, allowed)`` becomes ``GumbelSinkhorn(temperature, X)`` with ``X`` zero where allowed and
    ``-inf`` elsewhere, ``GumbelMatching(X)`` and ``GibbsPermutation(X)`` become ``GumbelSinkhorn(temperature, X)``, others
    what :func:`register_relaxation` says. Wrappers (``mask``, ``to_event``, ``expand``, plates) are kept. Observed
    permutations, and ``GumbelSinkhorn`` priors written into the model, stay as they are. A relaxed site is continuous, so
    it is no longer marked for enumeration, as by ``config_enumerate``.

    As the temperature falls the relaxed prior tends to ``M(X + eps)``. That is ``GumbelMatching(X)`` itself; for the others
    it is an approximation, ``M(eps)`` being uniform only where nothing is forbidden.

    Args:
        model: a Pyro model; without it a context manager is returned.
        temperature: of the relaxed priors: positive, a number, a tensor that broadcasts with the sites' batch
            shapes, or a function of no arguments that is read at every call.

    Returns:
        A callable with the model's signature.

    Raises:
        TypeError: ``model`` is no function.
        ValueError: ``temperature`` is not positive and finite.
        NotImplementedError: at a call, a site's law has no registered relaxation.

    Example:
        >>> import pyro, torch
        >>> def model():
        ...     return pyro.sample("P", UniformPermutation(3))
        >>> relax(model, temperature=0.5)().sum(-1)
        tensor([1., 1., 1.])
    """
    if model is not None and not callable(model):
        raise TypeError(f"model must be callable, but is {type(model).__name__}; for a context use relax(temperature=...)")
    messenger = RelaxMessenger(temperature)
    return messenger if model is None else messenger(model)


def name_sites(names: list[str]) -> str:
    """Site names for a message."""
    return ", ".join(f"'{name}'" for name in names)

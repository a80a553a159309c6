"""``harden``: a guide over relaxed permutations, drawing hard ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger

from pyro_gs.distributions import constraints
from pyro_gs.distributions.gumbel_matching import GumbelMatching
from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.distributions.plackett_luce import PlackettLuce
from pyro_gs.distributions.relaxed_plackett_luce import RelaxedPlackettLuce
from pyro_gs.infer.handlers import rewrap, unwrap

_F = TypeVar("_F", bound=Callable[..., Any])
_HARD_LAWS: dict[type, Callable[[Any], dist.TorchDistribution]] = {
    GumbelSinkhorn: lambda law: GumbelMatching(law.logits, validate_args=law._validate_args),
    RelaxedPlackettLuce: lambda law: PlackettLuce(law.scores, validate_args=law._validate_args),
}


def register_hard_law(law: type) -> Callable[[_F], _F]:
    """Decorator that tells :func:`harden` which law over permutation matrices a relaxed law stands for.

    Args:
        law: the class of the relaxed law; its subclasses follow unless registered themselves.

    Example:
        >>> class Warm(GumbelSinkhorn):
        ...     pass
        >>> @register_hard_law(Warm)
        ... def harden_warm(law):
        ...     return GumbelMatching(law.logits)
    """

    def decorate(hard: _F) -> _F:
        _HARD_LAWS[law] = hard
        return hard

    return decorate


def hard_law(law: Any) -> dist.TorchDistribution:
    """The law of the hard permutations that a relaxed law stands for; a hard law is its own.

    Raises:
        NotImplementedError: none is registered.
    """
    if isinstance(law.support, constraints.Permutation):
        return law  # type: ignore[no-any-return]
    make = next((_HARD_LAWS[kind] for kind in type(law).__mro__ if kind in _HARD_LAWS), None)
    if make is None:
        known = ", ".join(sorted(kind.__name__ for kind in _HARD_LAWS))
        raise NotImplementedError(
            f"harden knows no hard law of {type(law).__name__}, only of {known}; register one with "
            f"@register_hard_law({type(law).__name__})"
        )
    return make(law)


class HardenMessenger(Messenger):
    """Effect handler behind :func:`harden`; also a context manager.

    Example:
        >>> import pyro, torch
        >>> with HardenMessenger():
        ...     pyro.sample("P", GumbelSinkhorn(0.5, 9 * torch.eye(2)))
        tensor([[1., 0.],
                [0., 1.]])
    """

    def _pyro_sample(self, msg: Any) -> None:
        law = unwrap(msg["fn"])
        relaxed = (constraints.DoublyStochastic, constraints.SparseDoublyStochastic, constraints.UnimodalRowStochastic)
        if isinstance(law, tuple(_HARD_LAWS)) or isinstance(getattr(law, "support", None), relaxed):
            msg["fn"] = rewrap(msg["fn"], hard_law)


def harden(guide: Callable[..., Any] | None = None) -> Any:
    r"""The guide with its relaxed permutation sites drawn from their zero-temperature laws, the reverse of ``relax``.

    ``GumbelSinkhorn(temperature, X)`` becomes ``GumbelMatching(X)`` and ``RelaxedPlackettLuce(temperature, scores)`` becomes
    ``PlackettLuce(scores)``; other sites stay as they are. So hard permutations reach the plain model::

        Predictive(model, guide=harden(guide), num_samples=100)(*args)

    Any guide will do, an ``AutoGuideList`` with continuous parts too. The draws are of a guide fitted to the relaxed model,
    which is not the posterior of the plain one (``docs/objectives.md``).

    Args:
        guide: a Pyro guide; without it a context manager is returned.

    Returns:
        A callable with the guide's signature.

    Raises:
        NotImplementedError: at a call, a relaxed law without a registered hard one.

    Example:
        >>> import pyro, torch
        >>> def guide():
        ...     return pyro.sample("P", GumbelSinkhorn(0.5, 9 * torch.eye(2)))
        >>> harden(guide)()
        tensor([[1., 0.],
                [0., 1.]])
    """
    if guide is not None and not callable(guide):
        raise TypeError(f"guide must be callable, but is {type(guide).__name__}; for a context use harden()")
    messenger = HardenMessenger()
    return messenger if guide is None else messenger(guide)

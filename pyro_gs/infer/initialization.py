"""Where the logits of an automatic guide start."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_gs.distributions import constraints
from pyro_gs.infer.handlers import name_sites
from pyro_gs.ops.logits import check_logits, check_temperature

InitLogits = Mapping[str, Tensor] | Callable[[str, Tensor], Tensor | None]


def check_site_logits(name: str, logits: Tensor, allowed: Tensor) -> None:
    """Raise unless logits fit a site.

    Args:
        name: of the site.
        logits: to be checked.
        allowed: bool (..., n, n), the pairs that the site's prior allows.

    Raises:
        TypeError: no floating tensor.
        ValueError: another shape, NaN or +inf, or ``-inf`` elsewhere than at the forbidden pairs.
    """
    check_logits(logits)
    if logits.shape != allowed.shape:
        raise ValueError(f"logits must have shape {tuple(allowed.shape)} for site '{name}', but has {tuple(logits.shape)}")
    if not torch.equal(logits > -torch.inf, allowed.to(logits.device)):
        raise ValueError(f"logits must be -inf exactly at the pairs that the prior of site '{name}' forbids")


def start_logits(init: InitLogits | None, name: str, allowed: Tensor) -> Tensor | None:
    """What ``init_logits`` says of a site, checked; None where it says nothing."""
    if init is None:
        return None
    logits = init.get(name) if isinstance(init, Mapping) else init(name, allowed)
    if logits is not None:
        check_site_logits(name, logits, allowed)
    return logits


def init_to_matching(matrices: Mapping[str, Tensor], strength: float = 5.0) -> Callable[[str, Tensor], Tensor | None]:
    """Logits that favour given matchings, for ``AutoGumbelSinkhorn(init_logits=...)``.

    The logits are ``strength`` at the matched pairs and zero at the others. Sites that are not named start as by default.

    Args:
        matrices: permutation matrices (..., n, n) by site, at the full size of its plates.
        strength: of the matched pairs' logits, positive, in nats.

    Returns:
        A function of a site's name and its allowed pairs.

    Raises:
        TypeError: ``matrices`` is no mapping; at the call, allowed pairs that are not booleans.
        ValueError: a matrix is no permutation, or ``strength`` is not positive; at the guide's first call, another shape
            than the site's, or a matched pair that its prior forbids.

    Example:
        >>> init = init_to_matching({"P": torch.eye(2)})
        >>> init("P", torch.ones(2, 2).bool())
        tensor([[5., 0.],
                [0., 5.]])
    """
    if not isinstance(matrices, Mapping):
        raise TypeError(f"matrices must be a mapping of sites to matrices, but is {type(matrices).__name__}")
    check_temperature(strength, "strength")
    bad = [name for name, P in matrices.items() if not bool(constraints.permutation.check(P).all())]
    if bad:
        raise ValueError(f"matrices must be permutation matrices, but those of {name_sites(bad)} are not")

    def init(name: str, allowed: Tensor) -> Tensor | None:
        if name not in matrices:
            return None
        if allowed.dtype != torch.bool:
            raise TypeError(f"allowed must have dtype bool, but has {allowed.dtype}")
        P = matrices[name].to(allowed.device)
        P = P if P.is_floating_point() else P.to(torch.get_default_dtype())
        if P.shape != allowed.shape:
            raise ValueError(f"matrices['{name}'] must have shape {tuple(allowed.shape)}, but has {tuple(P.shape)}")
        if bool((P[~allowed] != 0).any()):
            raise ValueError(f"matrices['{name}'] matches a pair that the prior of site '{name}' forbids")
        return torch.where(allowed, strength * P, -torch.inf)

    return init

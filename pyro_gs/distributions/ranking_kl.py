r"""Kullback-Leibler divergences between ranking laws, all of them exact, registered for ``kl_divergence``.

| function | pair | status |
| --- | --- | --- |
| :func:`plackett_luce_kl` | PlackettLuce, PlackettLuce | exact for n up to 16 |
| :func:`plackett_luce_uniform_kl` | PlackettLuce, UniformPermutation | exact for n up to 16 |
| :func:`relaxed_plackett_luce_kl` | RelaxedPlackettLuce, RelaxedPlackettLuce | exact by quadrature, for any n |
| :func:`mallows_kl` | Mallows, Mallows | exact for any n and any two centers |
| :func:`mallows_uniform_kl` | Mallows, UniformPermutation | exact for any n |

Where one is not computed it raises ``NotImplementedError``; the mean of ``q.log_prob(P) - p.log_prob(P)`` over draws of
``q`` estimates it. Pyro's ``TraceMeanField_ELBO`` then does so by itself; it takes reparametrized guides only, here the
relaxed law.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, register_kl

from pyro_gs.distributions.mallows import Mallows
from pyro_gs.distributions.plackett_luce import PlackettLuce
from pyro_gs.distributions.relaxed_plackett_luce import EULER, RelaxedPlackettLuce
from pyro_gs.distributions.uniform_permutation import UniformPermutation
from pyro_gs.ops import mallows as forms
from pyro_gs.ops.batching import unexpanded
from pyro_gs.ops.plackett_luce import SUBSET_LIMIT, mean_log_mixture, ranking_divergence, ranking_entropy
from pyro_gs.ops.ranking import centered

_RATIO = 10.0  # of temperatures: the quadrature takes time that grows with its square


def joint_batch(q: Distribution, p: Distribution) -> torch.Size:
    """Batch shape of a divergence.

    Raises:
        TypeError: an argument is no distribution.
        ValueError: event shapes differ, or batch shapes do not broadcast.
    """
    for name, law in (("q", q), ("p", p)):
        if not isinstance(law, Distribution):
            raise TypeError(f"{name} must be a distribution, but is {type(law).__name__}")
    if q.event_shape != p.event_shape:
        raise ValueError(
            f"q and p must have the same event_shape, but have {tuple(q.event_shape)} and {tuple(p.event_shape)}"
        )
    try:
        return torch.Size(torch.broadcast_shapes(q.batch_shape, p.batch_shape))
    except RuntimeError:
        raise ValueError(
            f"q and p must have batch shapes that broadcast, but have {tuple(q.batch_shape)} and {tuple(p.batch_shape)}"
        ) from None


def _check_subsets(n: int) -> None:
    if n > SUBSET_LIMIT:
        raise NotImplementedError(
            f"the KL divergence of PlackettLuce with n={n} is not computed: it is exact for n up to {SUBSET_LIMIT}; "
            "estimate it by Monte Carlo, the mean of q.log_prob(P) - p.log_prob(P) over draws P of q"
        )


def plackett_luce_kl(q: PlackettLuce, p: PlackettLuce) -> Tensor:
    """Exact KL divergence of two Plackett-Luce laws, in nats, of the broadcast batch shape.

    Sums over the 2^n subsets of items that may remain; non-negative terms, differentiable.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: n > 16.

    Example:
        >>> import torch
        >>> plackett_luce_kl(PlackettLuce(torch.tensor([1.0, 0.0])), PlackettLuce(torch.zeros(2)))
        tensor(0.1109)
    """
    batch = joint_batch(q, p)
    _check_subsets(q.n)
    scores, other = torch.broadcast_tensors(unexpanded(q.scores, 1).double(), unexpanded(p.scores, 1).double())
    return ranking_divergence(scores, other).to(q.scores.dtype).expand(batch)


def _to_uniform(entropy: Tensor, q: Distribution, p: UniformPermutation) -> Tensor:
    """``log n!`` minus the entropy; infinite where a pair is forbidden, for ``q`` gives every permutation some mass."""
    batch = joint_batch(q, p)
    n = p.n
    kl = (math.lgamma(n + 1) - entropy.double()).clamp(min=0.0)  # of rounding
    full = p.allowed.all(-1).all(-1)
    return torch.where(full, kl, torch.inf).to(entropy.dtype).expand(batch)


def plackett_luce_uniform_kl(q: PlackettLuce, p: UniformPermutation) -> Tensor:
    """Exact KL divergence of a Plackett-Luce law from the uniform one, in nats, of the broadcast batch shape.

    Returns:
        ``log n! - entropy``; ``inf`` where ``p`` forbids a pair.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: n > 16.

    Example:
        >>> import torch
        >>> plackett_luce_uniform_kl(PlackettLuce(torch.tensor([1.0, 0.0])), UniformPermutation(2))
        tensor(0.1109)
    """
    joint_batch(q, p)
    _check_subsets(q.n)
    return _to_uniform(ranking_entropy(unexpanded(q.scores, 1).double()), q, p).to(q.scores.dtype)


def relaxed_plackett_luce_kl(q: RelaxedPlackettLuce, p: RelaxedPlackettLuce) -> Tensor:
    r"""Exact KL divergence of two relaxed Plackett-Luce laws, in nats, of the broadcast batch shape.

    With ``rho = p.temperature / q.temperature``, ``D = p.scores - rho q.scores``, ``E_j`` iid exponential and ``gamma``
    Euler's constant,

    ``-(n - 1) log rho - n psi(n) + n gamma (rho - 1) - sum D + n E log sum_j exp(D_j) E_j^rho``

    where the last term is a one-dimensional integral, computed by quadrature to about 1e-13 times n. At equal temperatures
    the divergence does not depend on them. By data processing it bounds that of the hard laws then.

    Raises:
        ValueError: the event shapes differ.
        NotImplementedError: ``p.temperature`` above 10 times ``q.temperature``.

    Example:
        >>> import torch
        >>> q = RelaxedPlackettLuce(0.5, torch.tensor([1.0, 0.0]))
        >>> relaxed_plackett_luce_kl(q, RelaxedPlackettLuce(0.5, torch.zeros(2)))
        tensor(0.1640)
    """
    batch, n = joint_batch(q, p), q.event_shape[-1]
    rho = unexpanded(p.temperature, 0).double() / unexpanded(q.temperature, 0).double()
    if bool((rho > _RATIO).any()):
        raise NotImplementedError(
            f"the KL divergence of RelaxedPlackettLuce is computed for p.temperature up to {_RATIO:g} times "
            f"q.temperature, but the ratio is {float(rho.detach().max()):g}; estimate it by Monte Carlo, the "
            "mean of q.log_prob(P) - p.log_prob(P) over draws P of q"
        )
    d = centered(unexpanded(p.scores, 1)) - rho[..., None] * centered(unexpanded(q.scores, 1))
    rho = rho.expand(d.shape[:-1])
    mixture = mean_log_mixture(d.reshape(-1, n), rho.reshape(-1)).reshape(rho.shape)
    constant = EULER * (rho - 1) - torch.digamma(torch.tensor(float(n), dtype=rho.dtype, device=rho.device))
    kl = n * (mixture + constant) - d.sum(-1) - (n - 1) * rho.log()
    return kl.clamp(min=0.0).to(q.scores.dtype).expand(batch)  # of rounding


def mallows_kl(q: Mallows, p: Mallows) -> Tensor:
    """Exact KL divergence of two Mallows laws with any centers, in nats, of the broadcast batch shape.

    The expected distance of a draw of ``q`` to the center of ``p`` is a sum over pairs of items, whose order under ``q`` has
    a probability in closed form (Mallows 1957). Differentiable in both ``theta``.

    Raises:
        ValueError: the event shapes differ.

    Example:
        >>> import torch
        >>> mallows_kl(Mallows(torch.eye(2), 1.0), Mallows(torch.eye(2).flip(0), 1.0))
        tensor(0.4621)
    """
    batch, n = joint_batch(q, p), q.n
    theta, theta_0 = unexpanded(q.theta, 0).double(), unexpanded(p.theta, 0).double()
    item, rank = torch.broadcast_tensors(unexpanded(q.center, 2).argmax(-1), unexpanded(p.center, 2).argmax(-2))
    other = rank.gather(-1, item)  # rank in p's center of the items in the order of q's
    swapped = forms.swap_probabilities(theta, n)
    first, second = torch.triu_indices(n, n, 1, device=swapped.device)
    reverse = swapped[..., second - first - 1]
    distance = torch.where(other[..., first] < other[..., second], reverse, 1 - reverse).sum(-1)
    log_ratio = forms.log_normalizer(theta_0, n) - forms.log_normalizer(theta, n)
    kl = log_ratio + theta_0 * distance - theta * forms.mean_distance(theta, n)
    return kl.clamp(min=0.0).to(q.center.dtype).expand(batch)  # of rounding


def mallows_uniform_kl(q: Mallows, p: UniformPermutation) -> Tensor:
    """Exact KL divergence of a Mallows law from the uniform one, in nats, of the broadcast batch shape.

    Returns:
        ``log n! - entropy``; ``inf`` where ``p`` forbids a pair.

    Raises:
        ValueError: the event shapes differ.

    Example:
        >>> import torch
        >>> mallows_uniform_kl(Mallows(torch.eye(2), 1.0), UniformPermutation(2))
        tensor(0.1109)
    """
    return _to_uniform(q.entropy(), q, p)


register_kl(PlackettLuce, PlackettLuce)(plackett_luce_kl)
register_kl(PlackettLuce, UniformPermutation)(plackett_luce_uniform_kl)
register_kl(RelaxedPlackettLuce, RelaxedPlackettLuce)(relaxed_plackett_luce_kl)
register_kl(Mallows, Mallows)(mallows_kl)
register_kl(Mallows, UniformPermutation)(mallows_uniform_kl)

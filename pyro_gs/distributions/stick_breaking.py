"""The stick-breaking law of Linderman et al. (2018)."""

from __future__ import annotations

from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.pushed_normal import PushedNormal
from pyro_gs.distributions.transforms import StickBreakingTransform


class StickBreakingPermutation(PushedNormal):
    r"""Doubly stochastic matrix by breaking sticks of normal logits (Linderman et al. 2018), a baseline.

    ``psi = loc + scale * N(0, 1)``, ``beta = sigmoid(psi / temperature)``, and ``P`` by :class:`StickBreakingTransform`. The
    density is closed form, with respect to Lebesgue measure on the upper left (n - 1) x (n - 1) block, as that of
    :class:`pyro_gs.GumbelSinkhorn`. The temperature divides ``psi``, so the law tends to one on permutation matrices as it
    falls to zero; only its ratios with ``loc`` and ``scale`` matter.

    The law depends on the order of rows and columns, and has no forbidden pairs. Where the temperature is 0.05 of ``scale``
    or less, rounding spoils the density of some samples, and far below, entries underflow to zero, which has no density and
    raises (:class:`StickBreakingTransform`).

    Args:
        temperature: positive, a number or a tensor that broadcasts with the batch shape.
        loc: mean of ``psi``, shape (..., n - 1, n - 1), float32 or float64.
        scale: standard deviation of ``psi``, positive; a number or a tensor that broadcasts with ``loc``.
        validate_args: validate values in :meth:`log_prob`; by default Pyro's setting.

    Shapes:
        batch_shape ``broadcast(temperature.shape, loc.shape[:-2], scale.shape[:-2])``, event_shape (n, n).

    Raises:
        TypeError: integer or half precision ``loc``.
        ValueError: ``loc`` is not square or not finite, ``scale`` or ``temperature`` not positive and finite, or their
            shapes do not broadcast. Messages name the batch item.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> d = StickBreakingPermutation(0.5, torch.zeros(7, 2, 2))
        >>> d.batch_shape, d.event_shape
        (torch.Size([7]), torch.Size([3, 3]))
        >>> P = d.rsample()
        >>> P.sum(-1)[0]
        tensor([1., 1., 1.])
        >>> d.log_prob(P).shape
        torch.Size([7])
    """

    _kind = StickBreakingTransform
    _added = 1

    @torch_constraints.dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> constraints.DoublyStochastic:
        """Doubly stochastic matrices."""
        return constraints.doubly_stochastic

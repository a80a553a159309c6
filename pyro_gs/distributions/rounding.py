"""The rounding law of Linderman et al. (2018)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions.pushed_normal import PushedNormal
from pyro_gs.distributions.transforms import RoundingTransform
from pyro_gs.ops.matching import matching

_SLACK = 8.0  # units of rounding, of the largest entry of Z, per row: what may tell M(Z) from M(X) by mistake


class RoundingPermutation(PushedNormal):
    r"""Normal matrix moved toward its nearest permutation matrix (Linderman et al. 2018), a baseline.

    ``Z = loc + scale * N(0, 1)`` and ``X = temperature Z + (1 - temperature) M(Z)`` with the matching ``M``
    (:class:`RoundingTransform`). The density with respect to Lebesgue measure on all n x n entries is that of the normal,

    ``log q(X) = sum log N(Z; loc, scale) - n^2 log temperature``,  ``Z = (X - (1 - temperature) M(X)) / temperature``

    where ``M(Z) = M(X)``, and minus infinity elsewhere: the image of the transform has gaps between the vertices.

    ``X`` lies near the vertices of the Birkhoff polytope and not in it, so the support is that of real matrices. The paper
    lets the Sinkhorn operator put the mean ``loc`` into the polytope, ``loc = pyro_gs.sinkhorn(logits)``, and the noise may
    leave it; any finite ``loc`` is accepted here.

    Args:
        temperature: above 0 and at most 1, a number or a tensor that broadcasts with the batch shape; 1 is the normal law.
        loc: mean of ``Z``, shape (..., n, n), float32 or float64.
        scale: standard deviation of ``Z``, positive; a number or a tensor that broadcasts with ``loc``.
        validate_args: validate values in :meth:`log_prob`; by default Pyro's setting.

    Shapes:
        batch_shape ``broadcast(temperature.shape, loc.shape[:-2], scale.shape[:-2])``, event_shape (n, n).

    Raises:
        TypeError: integer or half precision ``loc``.
        ValueError: ``loc`` is not square or not finite, ``scale`` not positive and finite, ``temperature`` not in (0, 1], or
            shapes that do not broadcast. Messages name the batch item.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> d = RoundingPermutation(0.1, torch.full((7, 3, 3), 1 / 3), scale=0.2)
        >>> X = d.rsample()
        >>> (X - X.round()).abs().max() < 0.2
        tensor(True)
        >>> d.log_prob(X).shape
        torch.Size([7])
        >>> d.log_prob(torch.full((3, 3), 1 / 3))[0]  # between the vertices
        tensor(-inf)
    """

    _kind = RoundingTransform

    support = torch_constraints.independent(torch_constraints.real, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, of the batch of ``value`` broadcast with the batch shape; ``-inf`` outside the transform's image.

        Args:
            value: shape (..., n, n).

        Raises:
            TypeError: a value that is not of dtype float32 or float64.
            ValueError: another event shape, or an entry that is not finite.
        """
        density = super().log_prob(value)
        return torch.where(self._reached(value.detach()), density, -torch.inf)

    @torch.no_grad()
    def _reached(self, X: Tensor) -> Tensor:
        """Whether ``M(Z) = M(X)``, up to rounding of ``X``: whether ``M(X)`` has the largest weight under ``Z`` too."""
        Z = self.transform.inv(X).double()
        weight, largest = ((Z * matching(part)).sum((-2, -1)) for part in (X.expand(Z.shape), Z))
        scale = X.abs().amax((-2, -1)).clamp(min=1.0) / self.temperature
        slack = _SLACK * X.shape[-1] * torch.finfo(X.dtype).eps * scale
        reached: Tensor = weight >= largest - slack
        return reached

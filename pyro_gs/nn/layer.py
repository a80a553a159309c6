"""The Sinkhorn operator as the last layer of a network."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor, nn

from pyro_gs.nn.masks import mask_logits
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.logits import check_count, check_floating, check_logits, check_square, check_temperature
from pyro_gs.ops.matching import matching
from pyro_gs.ops.sinkhorn import default_tol, log_sinkhorn, sinkhorn


class SinkhornLayer(nn.Module):
    r"""Logits to doubly stochastic matrices, ``S((X + noise * eps) / temperature)`` with ``eps`` iid Gumbel(0, 1).

    With ``noise=0`` a Sinkhorn network, with ``noise=1`` a Gumbel-Sinkhorn network (Mena et al. 2018, Section 4). In eval
    mode there is no noise, as with dropout; for draws there take ``GumbelSinkhorn(temperature, logits)``. The operator runs
    to convergence, unless ``num_iters`` asks for the paper's truncated one.

    Temperature and noise may be set between calls, for example by a schedule; they are no part of ``state_dict``.

    Args:
        temperature: a positive number.
        noise: factor of the Gumbel noise in training, a number of at least 0.
        num_samples: draws of the noise for every set; the result has a leading dimension of that size, in eval mode too
            (of equal matrices). None: one draw, no dimension.
        hard: permutation matrices ``M(X + noise * eps)`` whose gradient is that of the relaxed matrix (straight-through,
            biased; Bengio, Leonard and Courville 2013).
        num_iters: exactly this many sweeps in place of convergence; rows do not sum to one then.

    Shapes:
        logits (..., n, n) and mask (..., n) to (..., n, n), or (num_samples, ..., n, n).

    Raises:
        TypeError: ``temperature`` or ``noise`` is no number, ``hard`` no bool; at a call, ``logits`` not floating or
            ``mask`` not bool.
        ValueError: ``temperature`` not positive, ``noise`` negative, not finite, a count below 1; at a call, logits that are
            not square, NaN or +inf, or allow no permutation, or a mask that does not fit.
        RuntimeError: in the backward pass, no solution to differentiate at, as :func:`pyro_gs.log_sinkhorn`.

    Warns:
        SinkhornWarning, SupportWarning: as :func:`pyro_gs.log_sinkhorn`.

    Example:
        >>> import torch
        >>> layer = SinkhornLayer(temperature=0.5, noise=1.0, num_samples=4)
        >>> layer(torch.zeros(7, 3, 3)).shape
        torch.Size([4, 7, 3, 3])
        >>> layer.eval()(torch.zeros(2, 2), torch.tensor([True, False]))[0]
        tensor([[1., 0.],
                [0., 1.]])
    """

    def __init__(
        self,
        temperature: float = 1.0,
        noise: float = 0.0,
        num_samples: int | None = None,
        *,
        hard: bool = False,
        num_iters: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_samples", num_samples), ("num_iters", num_iters)):
            if value is not None:
                check_count(value, name, least=1)
        if not isinstance(hard, bool):
            raise TypeError(f"hard must be True or False, but is {hard!r}")
        self.temperature = temperature
        self.noise = noise
        self.num_samples = num_samples
        self.hard = hard
        self.num_iters = num_iters

    @property
    def temperature(self) -> float:
        """Temperature, positive."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = _checked(value, "temperature", zero=False)

    @property
    def noise(self) -> float:
        """Factor of the Gumbel noise in training."""
        return self._noise

    @noise.setter
    def noise(self, value: float) -> None:
        self._noise = _checked(value, "noise", zero=True)

    def extra_repr(self) -> str:
        """The options, in the module's repr."""
        return (
            f"temperature={self.temperature:g}, noise={self.noise:g}, num_samples={self.num_samples}, hard={self.hard}, "
            f"num_iters={self.num_iters}"
        )

    def forward(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The matrices."""
        z = self._perturbed(logits, mask)
        soft = self._solve(sinkhorn, z, logits.dtype)
        if self.hard:
            soft = matching(z).to(soft.dtype) + (soft - soft.detach())
        return self._with_samples(soft, logits)

    def log_p(self, logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logarithm of the relaxed matrices, of a draw of its own, right where entries underflow; ``-inf`` where forbidden.

        With ``num_iters`` it is that of the truncated operator. ``hard`` plays no part.
        """
        return self._with_samples(self._solve(log_sinkhorn, self._perturbed(logits, mask), logits.dtype), logits)

    def _perturbed(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """Logits with the mask and, in training, with noise; float64 then, in which the noise is drawn."""
        if mask is not None:
            logits = mask_logits(logits, mask)
        check_square(logits, "logits")
        check_floating(logits, "logits")
        if not self.training or self.noise == 0:
            return logits  # whose values the operator looks at, under vmap too
        check_logits(logits)
        return logits.double() + self.noise * gumbel_noise(self._shape(logits), logits)

    def _solve(self, operator: Callable[..., Tensor], z: Tensor, dtype: torch.dtype) -> Tensor:
        tol = default_tol(dtype) if self.num_iters is None else None
        return operator(z, temperature=self.temperature, tol=tol, num_iters=self.num_iters).to(dtype)

    def _shape(self, logits: Tensor) -> torch.Size:
        return logits.shape if self.num_samples is None else torch.Size((self.num_samples, *logits.shape))

    def _with_samples(self, out: Tensor, logits: Tensor) -> Tensor:
        return out.expand(self._shape(logits))


def _checked(value: float, name: str, *, zero: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, but is {type(value).__name__}")
    check_temperature(value, name, zero=zero)
    return float(value)

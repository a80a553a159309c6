"""The law of the matching of logits with Gumbel noise, the zero-temperature limit of the Gumbel-Sinkhorn law."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_gs.distributions.matching_integral import (
    ESTIMATE_ROWS,
    EXACT_ROWS,
    log_matching_probability,
    log_pair_probability,
)
from pyro_gs.distributions.permutation_law import LogitsLaw
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.logits import check_count
from pyro_gs.ops.matching import matching
from pyro_gs.ops.sinkhorn import log_sinkhorn
from pyro_gs.ops.support import component_sizes


class GumbelMatching(LogitsLaw):
    r"""Random permutation matrix ``M(X + eps)`` with ``eps`` iid Gumbel(0, 1).

    The perturb-and-MAP law of Mena et al. (2018, Section 3), to which ``GumbelSinkhorn(temperature, X)`` tends as the
    temperature falls. It does not change when a number is added to a row or to a column of the logits. It is no Gibbs law:
    with ``Q(b)`` the softmax of the rows of ``X + b``, b added to the columns and zero at one of them,

    ``p(P) = integral of prod_(P_ij = 1) Q(b)_ij det(I - Q(b) P^T)' db``

    over ``R^(n - 1)``, the prime dropping a row and its column (``docs/matching_law.md``): the Gibbs weight ``exp <X, P>``
    times a factor of the permutation.

    - **Samples** are exact: noise and a matching.
    - **log_prob** is exact for components of at most three rows (closed form and quadrature). Above, it is an
      importance-sampling estimate of that integral, whose exponential is unbiased and which varies from call to call, the
      more the larger n and the logits (``benchmarks/matching_law.py`` measures by how much, and the time); equal
      permutations in one call get the same estimate. Components of more than 32 rows, or of three and more with an entry of
      ``S(X)`` below ``e^-90``, raise.
    - :meth:`log_prob_bounds` are two bounds in closed form, for any n.
    - :meth:`marginals` are Monte Carlo estimates with their standard errors.

    Args:
        logits: ``X``, log-potentials, shape (..., n, n), float32 or float64; larger is better, ``-inf`` forbids.
        num_particles: size of the importance sample in :meth:`log_prob` above three rows, and of its three pilot runs.
        validate_args: validate values; by default Pyro's setting.

    Raises:
        TypeError: ``logits`` of an integer or half-precision dtype.
        ValueError: NaN or +inf in ``logits``, not square, no permutation allowed, ``num_particles`` below 2.
        NotImplementedError: in :meth:`log_prob`, a component of more than 32 rows, or logits so far apart that the integral
            is not taken; names the alternatives.

    Warns:
        EstimateWarning: in :meth:`log_prob`, an estimate rests on fewer than eight effective draws.

    Example:
        >>> import torch
        >>> d = GumbelMatching(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        >>> d.log_prob(d.enumerate_support()).exp()
        tensor([0.6613, 0.3387])
    """

    _kept = ("num_particles",)

    def __init__(self, logits: Tensor, num_particles: int = 1000, validate_args: bool | None = None) -> None:
        check_count(num_particles, "num_particles", least=2)
        self.num_particles = num_particles
        super().__init__(logits, validate_args)

    @property
    def is_exact(self) -> Tensor:
        """Whether log_prob is exact, bool of the batch shape."""
        good = component_sizes(self._support).amax(-1) <= EXACT_ROWS
        return good.to(self.logits.device).expand(self.batch_shape)

    def _log_prob(self, value: Tensor) -> Tensor:
        self._check_size()
        batch = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        index = value.detach().to(torch.uint8).argmax(-1).expand(batch + self.event_shape[:1])
        if self._support.allowed is not None:
            x = self.logits.expand(batch + self.event_shape)
            inside = (x.gather(-1, index[..., None]) > -torch.inf).all(-1).all(-1)
            if not bool(inside.all()):  # any allowed permutation; the caller puts -inf
                index = torch.where(inside[..., None], index, matching(x).argmax(-1))
        return log_matching_probability(self.logits, self._support, index, self.num_particles).to(self.logits.dtype)

    def log_prob_bounds(self, value: Tensor) -> tuple[Tensor, Tensor]:
        r"""A lower and an upper bound of the log-probability, each of the shape of :meth:`log_prob`.

        Lower: ``sum log S(X)_ij`` over the matched pairs. For any b added to the columns, a row whose largest entry of
        ``X + eps + b`` is at its match in every row makes the permutation the best; the largest such probability over b is
        that of ``S``.

        Upper: the permutation beats every exchange of the columns of two rows, and exchanges of disjoint pairs of rows are
        independent; the product of their probabilities over disjoint pairs, chosen one after the other by the smallest.

        Raises:
            ValueError: as :meth:`log_prob`.
        """
        self._check_value(value)
        log_s = log_sinkhorn(self.logits)
        chosen = value != 0
        lower = torch.where(chosen, log_s, 0.0).sum((-2, -1))
        batch = lower.shape
        x = self.logits.double().expand(batch + self.event_shape)
        index = value.detach().to(torch.uint8).argmax(-1).expand(batch + self.event_shape[:1])
        taken = x.gather(-1, index[..., None, :].expand(x.shape))  # column of row k, as seen by row i
        own = taken.diagonal(dim1=-2, dim2=-1)
        gain = own[..., :, None] + own[..., None, :] - taken - taken.mT
        impossible = (own == -torch.inf).any(-1)
        gain = torch.where(impossible[..., None, None], torch.inf, gain)
        pairs = log_pair_probability(gain)
        open_pairs = torch.ones(self.n, self.n, dtype=torch.bool, device=x.device).triu(1).expand(x.shape)
        upper = torch.zeros_like(own[..., 0])
        for _ in range(self.n // 2):
            flat = torch.where(open_pairs, pairs, torch.inf).flatten(-2)
            best = flat.argmin(-1, keepdim=True)
            upper = upper + flat.gather(-1, best)[..., 0]
            row = torch.arange(self.n, device=x.device)
            left = (row != best // self.n) & (row != best % self.n)
            open_pairs = open_pairs & left[..., :, None] & left[..., None, :]
        low, high = (torch.where(impossible, -torch.inf, bound).to(self.logits.dtype) for bound in (lower, upper))
        return low, high

    def _check_size(self) -> None:
        sizes = component_sizes(self._support)
        size = int(sizes.max()) if sizes.numel() else 0
        if size > ESTIMATE_ROWS:
            raise NotImplementedError(
                f"GumbelMatching.log_prob is exact up to {EXACT_ROWS} rows in a component and estimated up to "
                f"{ESTIMATE_ROWS}, but one has {size}; take log_prob_bounds, the density of GumbelSinkhorn at a low "
                "temperature, or GibbsPermutation with the same logits"
            )

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape sample_shape + batch_shape + (n, n)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return matching(self.logits.detach().double() + gumbel_noise(shape, self.logits)).to(self.logits.dtype)

    @torch.no_grad()
    def marginals(self, num_samples: int = 1000) -> tuple[Tensor, Tensor]:
        """Monte Carlo estimate of the probabilities that row i is matched to column j, and its standard error.

        Args:
            num_samples: number of draws, at least 2.

        Returns:
            Two tensors of shape batch_shape + (n, n). Where no draw, or every draw, has a pair, the standard error is that
            of ``(hits + 1) / (draws + 2)`` and not zero.
        """
        check_count(num_samples, "num_samples", least=2)
        mean = self.sample(torch.Size((num_samples,))).mean(0)
        hits = (mean * num_samples + 1) / (num_samples + 2)
        error = torch.where((mean == 0) | (mean == 1), hits * (1 - hits), mean * (1 - mean)) / num_samples
        error = torch.where(self.logits > -torch.inf, error, 0.0)
        return mean, error.sqrt()

    @property
    def mode(self) -> Tensor:
        """The matching of the logits, of shape batch_shape + (n, n).

        The permutation that the law contracts to when the logits grow; above n = 2 not always the most probable one.
        """
        return matching(self.logits)

    def entropy(self, num_samples: int = 256) -> Tensor:
        """Entropy in nats, of the batch shape: exact for n of at most 3, else the mean of ``-log_prob`` over draws.

        Args:
            num_samples: number of draws above n = 3; the standard error falls with its root. Not differentiable there.
        """
        check_count(num_samples, "num_samples", least=1)
        if self.n <= EXACT_ROWS:
            log_p = self.log_prob(self.enumerate_support())
            return -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0.0)).sum(0)
        with torch.no_grad():
            return -self.log_prob(self.sample(torch.Size((num_samples,)))).mean(0)

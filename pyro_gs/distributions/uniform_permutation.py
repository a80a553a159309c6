"""The uniform law over the permutations that a mask allows."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions.permutation_law import PermutationLaw
from pyro_gs.ops.batching import unexpanded
from pyro_gs.ops.matching import matching, to_matrix
from pyro_gs.ops.matching_samples import sample_matchings
from pyro_gs.ops.permanent import log_count, marginals
from pyro_gs.ops.support import find_support


class UniformPermutation(PermutationLaw):
    """Uniform law over permutation matrices, all of them or those that ``allowed`` permits.

    Each component of the allowed entries is independent of the others, and treated alone:

    - **Sampling** is exact for components without a forbidden entry and for those of at most 20 rows. A larger one with
      forbidden entries is drawn by Markov chain Monte Carlo from the matching of random scores
      (``ops/matching_samples.py``); its stationary law is uniform, a finite run is close to it.
    - **log_prob** is minus the log-permanent of the mask: exact in the same cases, else its Bethe approximation
      (Vontobel 2013), a lower bound of the permanent, so the log-probability is then too large by a constant that does
      not depend on the permutation. :attr:`is_exact` says which, and ``log_permanent_bounds(law.log_weights)`` bounds it.

    The same law under ``pyro_gs.relax`` becomes ``GumbelSinkhorn(temperature, 0)`` with ``-inf`` where forbidden. At
    zero temperature that is ``M(eps)``, which is uniform only where nothing is forbidden.

    Args:
        n: number of rows.
        allowed: bool, shape (..., n, n), gives the batch shape; None allows all pairs.
        validate_args: validate values; by default Pyro's setting.

    Raises:
        TypeError: ``n`` is not an integer or ``allowed`` not boolean.
        ValueError: ``n`` < 1, ``allowed`` of another shape, or an item of it without a perfect matching (the message
            names the item and the rows of a Hall violator).

    Example:
        >>> import torch
        >>> d = UniformPermutation(3)
        >>> d.log_prob(torch.eye(3)).exp()
        tensor(0.1667)
        >>> d.enumerate_support().shape
        torch.Size([6, 3, 3])
    """

    arg_constraints = {"allowed": torch_constraints.independent(torch_constraints.boolean, 2)}  # noqa: RUF012
    _expanded = {"allowed": 2}  # noqa: RUF012

    allowed: Tensor

    def __init__(self, n: int, allowed: Tensor | None = None, validate_args: bool | None = None) -> None:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n must be an integer, but is {n!r}")
        if n < 1:
            raise ValueError(f"n must be at least 1, but is {n}")
        if allowed is None:
            allowed = torch.ones(n, n, dtype=torch.bool)
        elif not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            kind = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
            raise TypeError(f"allowed must be a boolean tensor, but is {kind}")
        elif allowed.dim() < 2 or allowed.shape[-2:] != (n, n):
            raise ValueError(f"allowed must have shape (..., {n}, {n}) for n={n}, but has shape {tuple(allowed.shape)}")
        self._support = find_support(allowed, "allowed")
        self.allowed = allowed if self._support.allowed is None else self._support.allowed
        super().__init__(allowed.shape[:-2], n, validate_args)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shape of ``allowed``, which must be given."""
        allowed = torch.Size(arg_shapes["allowed"])
        return allowed[:-2], allowed[-2:]

    @property
    def is_exact(self) -> Tensor:
        """Whether samples and log-probabilities are exact, bool of the batch shape."""
        return self._counts[1]

    @functools.cached_property
    def _counts(self) -> tuple[Tensor, Tensor]:
        """Log-number of allowed permutations and its exactness, of the batch shape."""
        return log_count(self._support, self.allowed)

    def _log_prob(self, value: Tensor) -> Tensor:
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        return -self._counts[0].to(dtype).expand(torch.broadcast_shapes(value.shape[:-2], self.batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape sample_shape + batch_shape + (n, n), in torch's default dtype."""
        shape = self._extended_shape(torch.Size(sample_shape))
        index = sample_matchings(self.log_weights, self._support, math.prod(sample_shape))
        return to_matrix(index.reshape(shape[:-1]))

    def entropy(self) -> Tensor:
        """Log-number of allowed permutations in nats, of the batch shape; exact where :attr:`is_exact`."""
        return self._counts[0].to(torch.get_default_dtype())

    @property
    def log_weights(self) -> Tensor:
        """Logits of the law as a Gibbs law, zero where allowed and ``-inf`` elsewhere, shape batch_shape + (n, n)."""
        small = unexpanded(self.allowed, 2)
        return torch.zeros(small.shape, device=small.device).masked_fill(~small, -torch.inf).expand(self.allowed.shape)

    def marginals(self) -> Tensor:
        """Exact probabilities that row i is matched to column j, shape batch_shape + (n, n).

        Raises:
            ValueError: a component with forbidden pairs has more than 20 rows.
        """
        if self._support.allowed is None:
            return torch.full(self.batch_shape + self.event_shape, 1.0 / self.n, device=self.allowed.device)
        return marginals(self.log_weights, self._support).to(torch.get_default_dtype())

    @property
    def mean(self) -> Tensor:
        """The :meth:`marginals`."""
        return self.marginals()

    @property
    def mode(self) -> Tensor:
        """An allowed permutation, all being as probable, of shape batch_shape + (n, n)."""
        return matching(self.log_weights)

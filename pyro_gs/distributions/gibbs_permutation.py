"""The Gibbs law over permutations, ``p(P)`` proportional to ``exp <X, P>``."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_gs.distributions.permutation_law import LogitsLaw
from pyro_gs.ops.matching import matching, to_matrix
from pyro_gs.ops.matching_samples import sample_matchings
from pyro_gs.ops.permanent import EXACT_LIMIT, Method, balanced_normalizer, check_method, in_dtype, log_normalizer, marginals
from pyro_gs.ops.support import component_sizes


class GibbsPermutation(LogitsLaw):
    r"""Random permutation matrix with ``p(P) = exp <X, P> / perm(exp X)``.

    The exponential family over permutations, whose log-normalizer is the log-permanent and whose mean is the matrix of
    marginals. It does not change when a number is added to a row or to a column of the logits. Pyro's ``OneOneMatching``
    is this law on index vectors: see :meth:`to_one_one_matching`.

    - **log_prob**, :meth:`marginals` and :meth:`entropy` are exact for components of at most 20 rows. Larger ones raise,
      unless ``normalizer`` names another method of :func:`pyro_gs.log_permanent`; then they are what follows from that
      bound in place of the log-permanent (``"bethe"`` and ``"sinkhorn_lower"`` make log-probabilities too large,
      ``"bethe_upper"`` and ``"sinkhorn_upper"`` too small), by a number that does not depend on the permutation.
    - **Samples** are exact in the same components, whatever the normalizer. Larger ones are drawn by Markov chain Monte
      Carlo: block Gibbs in blocks of eight rows where nothing is forbidden, else the chain of Jerrum and Sinclair
      (``ops/matching_samples.py``). A finite run is close to the law, but for sharp logits with several modes that differ by
      a cycle of more than eight rows: their shares stay near those of its start, ``M(X + eps)``.

    Under ``pyro_gs.relax`` the law becomes ``GumbelSinkhorn(temperature, logits)``, whose zero-temperature limit
    ``M(X + eps)`` is another law with the same logits.

    Args:
        logits: ``X``, log-potentials, shape (..., n, n), float32 or float64; larger is better, ``-inf`` forbids.
        normalizer: a method of :func:`pyro_gs.log_permanent`.
        validate_args: validate values; by default Pyro's setting.

    Raises:
        TypeError: ``logits`` of an integer or half-precision dtype.
        ValueError: NaN or +inf in ``logits``, not square, no permutation allowed, an unknown ``normalizer``. Later, where
            something exact is asked for, a component of more than 20 rows.

    Example:
        >>> import torch
        >>> d = GibbsPermutation(torch.eye(3))
        >>> d.log_prob(d.enumerate_support()).exp().sum()
        tensor(1.0000)
        >>> d.marginals()[0]
        tensor([0.7541, 0.1230, 0.1230])
    """

    _kept = ("normalizer",)

    def __init__(self, logits: Tensor, normalizer: Method = "exact", validate_args: bool | None = None) -> None:
        check_method(normalizer, "normalizer")
        self.normalizer: Method = normalizer
        super().__init__(logits, validate_args)

    @property
    def log_weights(self) -> Tensor:
        """Logits of the law as a Gibbs law, which are ``logits``."""
        return self.logits

    @property
    def is_exact(self) -> Tensor:
        """Whether samples are exact, and probabilities with the normalizer ``"exact"``; bool of the batch shape."""
        good = component_sizes(self._support).amax(-1) <= EXACT_LIMIT
        return good.to(self.logits.device).expand(self.batch_shape)

    def log_normalizer(self) -> Tensor:
        """Log-permanent by the law's method, nats, of the batch shape.

        Raises:
            ValueError: the method is ``"exact"`` and a component has more than 20 rows.
            OverflowError: it is too large for the dtype.
        """
        total = log_normalizer(self.logits, self._support, self.normalizer)
        return in_dtype(total, self.logits.dtype, "the log-normalizer")

    def _log_prob(self, value: Tensor) -> Tensor:
        z, total, _ = balanced_normalizer(self.logits, self._support, self.normalizer)
        allowed = z > -torch.inf
        chosen = (value.double() * torch.where(allowed, z, 0.0)).sum((-2, -1))
        if value.requires_grad:  # in the matrix it is that of the linear extension, the logits: z has other constants
            offsets = torch.where(allowed, self.logits - z, 0.0).detach()
            chosen = chosen + ((value - value.detach()).double() * offsets).sum((-2, -1))
        return (chosen - total).to(self.logits.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape sample_shape + batch_shape + (n, n)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        index = sample_matchings(self.logits.detach(), self._support, math.prod(sample_shape))
        return to_matrix(index.reshape(shape[:-1]), dtype=self.logits.dtype)

    def marginals(self) -> Tensor:
        """Probabilities that row i is matched to column j, shape batch_shape + (n, n), differentiable once.

        The gradient of the log-permanent. With the normalizer ``"bethe"`` or ``"bethe_upper"`` the Bethe beliefs; with one
        of the Sinkhorn family ``S(logits)``.

        Raises:
            ValueError: the normalizer is ``"exact"`` and a component has more than 20 rows.
        """
        return marginals(self.logits, self._support, self.normalizer).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        """The :meth:`marginals`."""
        return self.marginals()

    @property
    def variance(self) -> Tensor:
        """Variance of every entry, ``m (1 - m)``."""
        mean = self.marginals()
        return mean * (1 - mean)

    @property
    def mode(self) -> Tensor:
        """The matching of the logits, a most probable permutation, of shape batch_shape + (n, n)."""
        return matching(self.logits)

    def entropy(self) -> Tensor:
        """``log perm(exp X) - <X, marginals>``, nats, of the batch shape; differentiable once.

        Raises:
            ValueError: the normalizer is ``"exact"`` and a component has more than 20 rows.
        """
        z, total, _ = balanced_normalizer(self.logits, self._support, self.normalizer)
        mean = marginals(self.logits, self._support, self.normalizer)
        return (total - (torch.where(z > -torch.inf, z, 0.0) * mean).sum((-2, -1))).to(self.logits.dtype)

    def to_one_one_matching(self, bp_iters: int | None = None) -> dist.OneOneMatching:
        """The same law on index vectors, as Pyro has it; its values are ``to_index(P)``.

        Args:
            bp_iters: as there; with enough of them its log-normalizer is ``log_permanent(method="sinkhorn_bethe")``.

        Raises:
            ValueError: the law has a batch shape, which ``OneOneMatching`` has not.
        """
        if self.batch_shape:
            raise ValueError(
                f"OneOneMatching has no batches, but this law has batch_shape {tuple(self.batch_shape)}; convert its items, "
                "GibbsPermutation(logits[i]).to_one_one_matching()"
            )
        return dist.OneOneMatching(self.logits, bp_iters=bp_iters)

    @classmethod
    def from_one_one_matching(cls, law: dist.OneOneMatching, validate_args: bool | None = None) -> GibbsPermutation:
        """Pyro's law on index vectors as this law on matrices; its values are ``to_matrix(index)``.

        The normalizer is exact, or ``"sinkhorn_bethe"`` where ``law`` has ``bp_iters``.

        Raises:
            TypeError: ``law`` is no ``OneOneMatching``.
        """
        if not isinstance(law, dist.OneOneMatching):
            raise TypeError(f"law must be a pyro.distributions.OneOneMatching, but is {type(law).__name__}")
        return cls(law.logits, "exact" if law.bp_iters is None else "sinkhorn_bethe", validate_args)

"""The Plackett-Luce law of rankings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions.permutation_law import PermutationLaw
from pyro_gs.ops.batching import own_memory, unexpanded
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.matching import to_matrix
from pyro_gs.ops.plackett_luce import SUBSET_LIMIT, position_probabilities, ranking_entropy, ranking_log_prob
from pyro_gs.ops.ranking import centered, check_scores
from pyro_gs.ops.support import Support


class PlackettLuce(PermutationLaw):
    r"""Ranking by successive choices: the first item has odds ``exp(scores)``, the second those among the rest, and so on.

    ``p(P) = prod_i exp(s_{k_i}) / sum_{l >= i} exp(s_{k_l})`` with ``k_i`` the item at position ``i`` (Luce, 'Individual
    choice behavior', 1959; Plackett, 'The analysis of permutations', 1975). Values are matrices with ``P[i, j] = 1`` where
    position ``i`` of the ranking holds item ``j``, so ``P @ x`` lists ``x`` in ranked order.

    Everything is exact: :meth:`log_prob`; :meth:`sample`, which sorts ``scores`` plus Gumbel noise (Yellott 1977);
    :meth:`marginals` for any n; :meth:`entropy` and the registered KL divergences (``distributions/ranking_kl.py``) for
    n up to 16. :class:`RelaxedPlackettLuce` is the law whose zero-temperature limit this is.

    Args:
        scores: log-weights, shape (..., n), float32 or float64, finite; larger is earlier. The law does not depend on a
            number added to all of them.
        validate_args: validate values; by default Pyro's setting.

    Shapes:
        batch_shape ``scores.shape[:-1]``, event_shape (n, n). Samples have the dtype of ``scores``.

    Raises:
        TypeError: ``scores`` is not a float32 or float64 tensor.
        ValueError: no items, or an entry that is not finite; the message names the batch item and the position.

    Example:
        >>> import torch
        >>> d = PlackettLuce(torch.tensor([0.0, 1.0, 2.0]))
        >>> d.mode @ torch.arange(3.0)
        tensor([2., 1., 0.])
        >>> d.log_prob(d.mode).exp()  # e^2 / (1 + e + e^2) times e / (1 + e)
        tensor(0.4863)
        >>> d.marginals()[0]  # of being first
        tensor([0.0900, 0.2447, 0.6652])
    """

    arg_constraints = {"scores": torch_constraints.independent(torch_constraints.real, 1)}  # noqa: RUF012
    _expanded = {"scores": 1}  # noqa: RUF012

    scores: Tensor

    def __init__(self, scores: Tensor, validate_args: bool | None = None) -> None:
        check_scores(scores)
        self.scores = own_memory(scores, 1)
        batch_shape, n = scores.shape[:-1], scores.shape[-1]
        self._support = Support(torch.Size((*batch_shape, n, n)))
        super().__init__(batch_shape, n, validate_args)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shape of ``scores``."""
        scores = torch.Size(arg_shapes["scores"])
        return scores[:-1], scores[-1:] * 2

    def _log_prob(self, value: Tensor) -> Tensor:
        ordered = (value.double() @ centered(self.scores)[..., None])[..., 0]
        return ranking_log_prob(ordered).to(self.scores.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Exact draws, shape sample_shape + batch_shape + (n, n)."""
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        with torch.no_grad():
            return _descending(centered(self.scores) + gumbel_noise(shape, self.scores), self.scores.dtype)

    @property
    def mode(self) -> Tensor:
        """The most probable ranking, by descending scores (the first of equal ones first), batch_shape + (n, n)."""
        return _descending(self.scores.detach(), self.scores.dtype)

    def marginals(self) -> Tensor:
        r"""Exact probabilities that position i holds item j, shape batch_shape + (n, n), differentiable.

        The first row is ``softmax(scores)``. One-dimensional quadrature over the Gumbel variable of item ``j``, given which
        the number of items above it is Poisson-binomial; right to about 1e-13, or the rounding of the dtype. Takes time and
        memory of n^2 times some hundred points, more where scores are far apart.

        Example:
            >>> import torch
            >>> PlackettLuce(torch.zeros(4)).marginals()[2]
            tensor([0.2500, 0.2500, 0.2500, 0.2500])
        """
        found = position_probabilities(unexpanded(self.scores, 1).double())
        return found.to(self.scores.dtype).expand(self.batch_shape + self.event_shape)

    @property
    def mean(self) -> Tensor:
        """The :meth:`marginals`."""
        return self.marginals()

    def entropy(self) -> Tensor:
        """Exact entropy in nats, of the batch shape, differentiable; sums over the 2^n subsets that may remain.

        Raises:
            NotImplementedError: n > 16.

        Example:
            >>> import torch
            >>> PlackettLuce(torch.zeros(3)).entropy().exp()
            tensor(6.)
        """
        if self.n > SUBSET_LIMIT:
            raise NotImplementedError(
                f"the entropy of PlackettLuce with n={self.n} is not computed: it is exact for n up to {SUBSET_LIMIT}; "
                "estimate it by Monte Carlo, -law.log_prob(law.sample((1000,))).mean(0)"
            )
        return ranking_entropy(unexpanded(self.scores, 1)).to(self.scores.dtype).expand(self.batch_shape)


def _descending(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices that sort scores (..., n) in descending order."""
    return to_matrix(scores.sort(dim=-1, descending=True, stable=True).indices, dtype=dtype)

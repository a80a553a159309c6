"""The relaxed Plackett-Luce law: NeuralSort of perturbed scores, with its exact density."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.matrix_law import MatrixLaw
from pyro_gs.distributions.permutation_law import check_value_shape
from pyro_gs.distributions.plackett_luce import PlackettLuce
from pyro_gs.distributions.relaxed import RelaxedPermutation, log_of
from pyro_gs.ops.batching import own_memory
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.logits import cast_temperature, check_floating, describe, first_position
from pyro_gs.ops.ranking import broadcast_parameter, centered, check_scores, log_neural_sort, neural_sort_scores

EULER = 0.5772156649015329


class RelaxedPlackettLuce(MatrixLaw):
    r"""Relaxed random ranking: NeuralSort of ``scores`` plus Gumbel noise, reparametrized.

    With ``s = scores + G``, ``G`` iid Gumbel(0, 1), row ``i`` of a sample (counted from 1) is

    ``softmax(((n + 1 - 2 i) s - A 1) / temperature)``,  ``A_jk = |s_j - s_k|``

    (Grover, Wang, Zweig and Ermon, 'Stochastic optimization of sorting networks via continuous relaxations', ICLR 2019,
    equations 5 and 8). As the temperature falls to zero it tends to the matrix that sorts ``s`` in descending order, a
    draw of ``PlackettLuce(scores)``. Rows sum to one and columns need not.

    **Density.** A sample depends on ``r = s / temperature`` up to a common shift and determines it:
    ``log P[i, j] - log P[i + 1, j] = 2 r_j`` up to a number of the row. So the values form one manifold of dimension
    n - 1, the same for every temperature, with the chart ``t_j = r_j - r_n``, ``j < n``. :meth:`log_prob` is the exact
    density with respect to Lebesgue measure on ``t``, that of differences of Gumbel variables:

    ``log p = lgamma(n) + (n - 1) log(temperature) + sum_j a_j - n logsumexp_j a_j``,  ``a_j = scores_j - temperature t_j``

    with ``t_n = 0``. The base measure is the same for all instances, so differences of log-densities, as in an ELBO, are
    right between any two of them.

    **Values.** A value from :meth:`rsample` carries ``log P`` with it and scores exactly even where entries underflow,
    also under another instance. Any other value is scored by its logarithm.

    Args:
        temperature: > 0, a number or a tensor that broadcasts with the batch shape.
        scores: log-weights, shape (..., n), float32 or float64, finite; larger is earlier.
        validate_args: validate values in :meth:`log_prob`; by default Pyro's setting.

    Shapes:
        batch_shape ``broadcast(temperature.shape, scores.shape[:-1])``, event_shape (n, n).

    Raises:
        TypeError: ``scores`` is not a float32 or float64 tensor, ``temperature`` neither a number nor a tensor.
        ValueError: an entry of ``scores`` that is not finite, ``temperature`` not positive and finite, or shapes that do
            not broadcast. Messages name the batch item.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> d = RelaxedPlackettLuce(0.5, torch.zeros(7, 3))
        >>> d.batch_shape, d.event_shape
        (torch.Size([7]), torch.Size([3, 3]))
        >>> P = d.rsample()
        >>> P.sum(-1)[0]
        tensor([1., 1., 1.])
        >>> d.log_prob(P).shape
        torch.Size([7])
    """

    arg_constraints = {  # noqa: RUF012
        "temperature": torch_constraints.positive,
        "scores": torch_constraints.independent(torch_constraints.real, 1),
    }
    has_rsample = True

    temperature: Tensor
    scores: Tensor

    def __init__(self, temperature: float | Tensor, scores: Tensor, validate_args: bool | None = None) -> None:
        check_scores(scores)
        tau = cast_temperature(temperature, scores)
        batch_shape, n = broadcast_parameter(tau, "temperature", scores.shape[:-1], "scores"), scores.shape[-1]
        self.temperature = tau.expand(batch_shape)
        self.scores = own_memory(scores, 1).expand((*batch_shape, n))
        super().__init__(batch_shape, torch.Size((n, n)), validate_args)

    @torch_constraints.dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> constraints.UnimodalRowStochastic:
        """The row-stochastic matrices that NeuralSort returns."""
        return constraints.unimodal_row_stochastic

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shapes of ``temperature`` and ``scores``."""
        scores = torch.Size(arg_shapes["scores"])
        return torch.broadcast_shapes(torch.Size(arg_shapes.get("temperature", ())), scores[:-1]), scores[-1:] * 2

    def expand(self, batch_shape: Any, _instance: RelaxedPlackettLuce | None = None) -> RelaxedPlackettLuce:
        """The same law with a larger batch shape; class and parameters are kept."""
        new: RelaxedPlackettLuce = self._get_checked_instance(RelaxedPlackettLuce, _instance)
        batch_shape = torch.Size(batch_shape)
        new.temperature = self.temperature.expand(batch_shape)
        new.scores = self.scores.expand(batch_shape + self.scores.shape[-1:])
        super(RelaxedPlackettLuce, new).__init__(batch_shape, self.event_shape, self._validate_args)
        return new

    @property
    def mode(self) -> Tensor:
        """The ranking by descending scores, a permutation matrix of shape batch_shape + (n, n).

        It is the most probable vertex that the law contracts to as the temperature falls, not the maximum of the density.
        """
        return PlackettLuce(self.scores).mode

    def entropy(self) -> Tensor:
        """Exact differential entropy in nats with respect to Lebesgue measure on ``t``, of the batch shape.

        ``n (psi(n) + gamma) - lgamma(n) - (n - 1) log(temperature)``, with ``gamma`` Euler's constant; the scores only move
        the law.
        """
        n = torch.tensor(float(self.event_shape[-1]), dtype=torch.float64, device=self.scores.device)
        constant = n * (torch.digamma(n) + EULER) - torch.lgamma(n)
        return (constant - (n - 1) * self.temperature.double().log()).to(self.scores.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparametrized draws, shape sample_shape + batch_shape + (n, n)."""
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        noisy = centered(self.scores) + gumbel_noise(shape, self.scores)
        log_p = log_neural_sort(noisy / self.temperature.double()[..., None])
        return RelaxedPermutation.wrap(log_p.exp().to(self.scores.dtype), log_p)

    def hard_sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the zero-temperature limit ``PlackettLuce(scores)``, shape sample_shape + batch_shape + (n, n)."""
        return PlackettLuce(self.scores).sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density on the manifold of NeuralSort, shape broadcast of the batch of ``value`` with the batch shape.

        Args:
            value: shape (..., n, n).

        Raises:
            TypeError: not a floating tensor.
            ValueError: another event shape, a batch that does not broadcast, or an entry that underflowed (zero or
                below the smallest normal number) and lost its logarithm; with validation, a value that NeuralSort does
                not return.
        """
        batch = check_value_shape(value, self.event_shape, self.batch_shape)
        check_floating(value, "value")
        if self._validate_args:
            self._check_support(value)
        lost = constraints.underflowed(value)
        if bool(lost.any()):
            *item, row, column = position = first_position(lost)
            raise ValueError(
                f"value{describe(tuple(item))} is {float(value[position].detach()):g} at row {row}, column {column}, too "
                f"small for {value.dtype} to hold its digits, so it has no density; score the tensor that rsample returned "
                "itself, which carries its logarithm, or use float64 or a higher temperature"
            )
        log_p = log_of(value)
        n, tau = self.event_shape[-1], self.temperature.double()
        a = centered(self.scores) - tau[..., None] * neural_sort_scores(log_p)
        out = math.lgamma(n) + (n - 1) * tau.log() + a.sum(-1) - n * a.logsumexp(-1)
        return out.expand(batch).to(self.scores.dtype)

    def _check_support(self, value: Tensor) -> None:
        good = self.support.check(value)
        if not bool(good.all()):
            item = first_position(~good) if good.dim() else ()
            raise ValueError(
                f"value{describe(item)} is not in the support of {type(self).__name__}: expected a matrix that NeuralSort "
                "returns, as RelaxedPlackettLuce samples it (rows that sum to one and a log P whose rows differ by "
                "multiples of one vector); a doubly stochastic matrix of another relaxed law has no density here, so "
                "guide and model must both use this law"
            )

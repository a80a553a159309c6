"""The Gumbel-Sinkhorn distribution over the candidates of each row."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.distributions.matrix_law import MatrixLaw
from pyro_gs.distributions.permutation_law import check_value_shape
from pyro_gs.distributions.relaxed import RelaxedPermutation, log_of, plain
from pyro_gs.ops.candidates import at_columns, best_candidates, check_problem
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.implicit import scale
from pyro_gs.ops.layout import Sparse
from pyro_gs.ops.logits import broadcast_batch, cast_temperature, check_count, check_floating, describe, first_position
from pyro_gs.ops.sinkhorn import default_tol, log_sinkhorn, scaled_logits, warn_unconverged

_MAX_ITER = 500


class SparseGumbelSinkhorn(MatrixLaw):
    r"""Relaxed random permutation ``S((X + eps) / tau)`` where each row has k candidates, in time and memory of n k numbers.

    The law of :class:`pyro_gs.GumbelSinkhorn` with all other pairs forbidden. A value holds, at place ``[i, c]``, how much
    row ``i`` is matched to column ``candidates[i, c]``, so ``(P[..., None] * x[candidates]).sum(-2)`` is what the matrix
    makes of items x (n, d).

    **In SVI.** A model whose prior is this law without logits, a guide whose logits are parameters, and the KL in place of
    log densities::

        def model(x, y, candidates):
            P = pyro.sample("P", SparseGumbelSinkhorn(1.0, torch.zeros(candidates.shape), candidates))
            pyro.sample("y", dist.Normal((P[..., None] * x[candidates]).sum(-2), 0.1).to_event(2), obs=y)

        def guide(x, y, candidates):
            X = pyro.param("X", lambda: -(y[:, None] - x[candidates]).norm(dim=-1))
            pyro.sample("P", SparseGumbelSinkhorn(1.0, X, candidates))

        SVI(model, guide, Adam({"lr": 0.1}), TraceMeanField_ELBO())

    ``kl_divergence`` is the tightened one (:func:`pyro_gs.tightened_kl`), :func:`pyro_gs.gumbel_noise_kl` the paper's.

    **Density.** :meth:`log_prob`, which ``Trace_ELBO`` asks for, is that of the dense law, with matrices (n, n) and in time
    of n^3: for small n.

    Args:
        temperature: ``tau`` > 0, a number or a tensor that broadcasts with the batch shape.
        logits: ``X``, log-potentials, shape (..., n, k), float32 or float64; larger is better, ``-inf`` forbids, and pads
            rows of fewer candidates.
        candidates: integers, shape (..., n, k), the column of each, 0 to n - 1; batch shapes broadcast.
        validate_args: validate values in :meth:`log_prob`; by default Pyro's setting.

    Shapes:
        batch_shape ``broadcast(temperature.shape, logits.shape[:-2], candidates.shape[:-2])``, event_shape (n, k).

    Raises:
        TypeError: integer or half precision ``logits``, ``candidates`` not of an integer dtype.
        ValueError: NaN or +inf in ``logits``, entries of 1e150 and more, a column out of range or twice in a row, no
            permutation allowed, ``temperature`` not positive and finite. Messages name the batch item.
        RuntimeError: in the backward pass of a draw, no solution to differentiate at.

    Warns:
        SupportWarning: allowed pairs lie on no permutation; they are forbidden.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> candidates = torch.tensor([[0, 1], [1, 2], [2, 0]])
        >>> d = SparseGumbelSinkhorn(0.5, torch.zeros(3, 2), candidates)
        >>> d.rsample().sum(-1)
        tensor([1., 1., 1.])
        >>> d.hard_sample((2,))
        tensor([[0, 1, 2],
                [1, 2, 0]])
    """

    arg_constraints = {  # noqa: RUF012
        "temperature": torch_constraints.positive,
        "logits": torch_constraints.independent(torch_constraints.real, 2),
        "candidates": torch_constraints.independent(torch_constraints.nonnegative_integer, 2),
    }
    has_rsample = True

    temperature: Tensor
    logits: Tensor
    candidates: Tensor

    def __init__(
        self, temperature: float | Tensor, logits: Tensor, candidates: Tensor, validate_args: bool | None = None
    ) -> None:
        if isinstance(logits, Tensor):
            check_floating(logits, "logits", half=False)
        logits, candidates, support = check_problem(logits, candidates)
        tau = cast_temperature(temperature, logits)
        batch_shape = broadcast_batch(tau, logits)
        event_shape = logits.shape[-2:]
        assert support.allowed is not None  # of candidates
        self._support = support.expand(batch_shape)
        self.temperature = tau.expand(batch_shape)
        self.logits = torch.where(support.allowed, logits, -torch.inf).expand(batch_shape + event_shape)
        self.candidates = candidates.expand(batch_shape + event_shape)
        super().__init__(batch_shape, event_shape, validate_args)

    @torch_constraints.dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> constraints.SparseDoublyStochastic:
        """Entries of doubly stochastic matrices at the candidates, zero where ``logits`` are ``-inf``."""
        return constraints.SparseDoublyStochastic(self.candidates, self._allowed)

    @property
    def _allowed(self) -> Tensor:
        assert self._support.allowed is not None
        return self._support.allowed

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shapes of ``temperature``, ``logits`` and ``candidates``."""
        logits = torch.Size(arg_shapes["logits"])
        temperature, candidates = (torch.Size(arg_shapes.get(name, ())) for name in ("temperature", "candidates"))
        return torch.broadcast_shapes(temperature, logits[:-2], candidates[:-2]), logits[-2:]

    def expand(self, batch_shape: Any, _instance: SparseGumbelSinkhorn | None = None) -> SparseGumbelSinkhorn:
        """The same law with a larger batch shape; class and parameters are kept."""
        new: SparseGumbelSinkhorn = self._get_checked_instance(SparseGumbelSinkhorn, _instance)
        batch_shape = torch.Size(batch_shape)
        new.temperature = self.temperature.expand(batch_shape)
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        new.candidates = self.candidates.expand(batch_shape + self.event_shape)
        new._support = self._support.expand(batch_shape)
        super(SparseGumbelSinkhorn, new).__init__(batch_shape, self.event_shape, self._validate_args)
        return new

    def to_dense(self) -> GumbelSinkhorn:
        """The same law over matrices (n, n)."""
        logits = at_columns(self.logits, self.candidates, self._allowed, fill=-torch.inf)
        return GumbelSinkhorn(self.temperature, logits, validate_args=self._validate_args)

    @property
    def mode(self) -> Tensor:
        """The matching of the logits, ones at the candidates taken, of shape batch_shape + (n, k).

        It is the vertex that the law contracts to as the temperature falls, not the maximum of the density.
        """
        best = best_candidates(self.logits, self.candidates, self._support)
        return torch.zeros_like(self.logits.detach()).scatter(-1, best[..., None], 1.0)

    def entropy(self, num_samples: int = 64) -> Tensor:
        """Monte Carlo estimate of the differential entropy, ``-mean log_prob``, of the batch shape; for small n.

        Args:
            num_samples: number of draws, at least 1; the standard error falls with its root. Differentiable.

        Raises:
            ValueError: ``num_samples`` is no integer of at least 1, or logits of which rounding leaves no density.
        """
        check_count(num_samples, "num_samples", least=1)
        return -self.log_prob(self.rsample(torch.Size((num_samples,)))).mean(0)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparametrized draws, shape sample_shape + batch_shape + (n, k).

        Warns:
            SinkhornWarning: the solver missed its tolerance (see :func:`pyro_gs.sparse_sinkhorn`).
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        z = scaled_logits(self.logits, self.temperature, gumbel_noise(shape, self.logits))
        tol = default_tol(self.logits.dtype)
        support, layout = self._support.expand(shape[:-2]), Sparse(self.candidates)
        found = scale(z, support, tol=tol, max_iter=_MAX_ITER, relative=False, layout=layout)
        warn_unconverged(tol, found, self.temperature)
        make = functools.partial(_exact_log, z, self.candidates.expand(shape), self._allowed.expand(shape))
        return RelaxedPermutation.wrap(found.log_p.exp().to(self.logits.dtype), make)

    @torch.no_grad()
    def hard_sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the zero-temperature limit ``M(X + eps)``: the column of each row.

        Returns:
            Long, sample_shape + batch_shape + (n,).
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        noisy = self.logits.double() + gumbel_noise(shape, self.logits)
        candidates = self.candidates.expand(shape)
        return candidates.gather(-1, best_candidates(noisy, candidates, self._support)[..., None])[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, that of the dense law, shape broadcast of the batch of ``value`` with the batch shape.

        Args:
            value: shape (..., n, k).

        Raises:
            ValueError: another event shape, not doubly stochastic, mass on a forbidden pair, a zero at an allowed pair, or
                logits of which rounding leaves no density.
        """
        batch = check_value_shape(value, self.event_shape, self.batch_shape)
        check_floating(value, "value")
        if self._validate_args:
            good = self.support.check(plain(value).detach())
            if not bool(good.all()):
                item = first_position(~good) if good.dim() else ()
                raise ValueError(
                    f"value{describe(item)} is not in the support of {type(self).__name__}: expected entries of a doubly "
                    "stochastic matrix at the candidates, and zero where logits are -inf"
                )
        shape = batch + self.event_shape
        allowed, candidates = self._allowed.expand(shape), self.candidates.expand(shape)
        log_p = at_columns(log_of(value).expand(shape), candidates, allowed, fill=-torch.inf)
        logits = at_columns(self.logits.expand(shape), candidates, allowed, fill=-torch.inf)
        law = GumbelSinkhorn(self.temperature, logits, validate_args=False)
        return law.log_prob(RelaxedPermutation.wrap(log_p.exp(), log_p))


def _exact_log(z: Tensor, candidates: Tensor, allowed: Tensor) -> Tensor:
    """``log S(z)`` with all entries exact, by the dense operator."""
    log_p = log_sinkhorn(at_columns(z, candidates, allowed, fill=-torch.inf)).gather(-1, candidates)
    return torch.where(allowed, log_p, -torch.inf)

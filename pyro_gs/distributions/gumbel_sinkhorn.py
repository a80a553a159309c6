"""The Gumbel-Sinkhorn distribution with its true density."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.gauge import log_integral
from pyro_gs.distributions.matrix_law import MatrixLaw
from pyro_gs.distributions.permutation_law import check_value_shape
from pyro_gs.distributions.relaxed import RelaxedPermutation, log_of, plain
from pyro_gs.ops.batching import own_memory
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.implicit import ROUNDING, scale, unresolved
from pyro_gs.ops.laplacian import component_logdet
from pyro_gs.ops.layout import DENSE, Dense
from pyro_gs.ops.logits import (
    broadcast_batch,
    cast_temperature,
    check_count,
    check_floating,
    check_logits,
    describe,
    first_position,
    without_offsets,
)
from pyro_gs.ops.matching import matching
from pyro_gs.ops.sinkhorn import default_tol, scaled_logits, warn_unconverged
from pyro_gs.ops.support import Support, component_sums, find_support

_MAX_ITER = 500


class GumbelSinkhorn(MatrixLaw):
    r"""Relaxed random permutation ``P = S((X + eps) / tau)`` with ``eps`` iid Gumbel(0, 1).

    ``S`` is the Sinkhorn operator, run to convergence; as ``tau`` falls to zero the law tends to that of the matching
    ``M(X + eps)`` (Mena et al. 2018, Section 3). Samples are doubly stochastic matrices, reparametrized.

    **Density.** :meth:`log_prob` is the density with respect to Lebesgue measure on the free coordinates, the upper
    left (n - 1) x (n - 1) block. With ``Q = S(X - tau log P)``, a prime dropping a column,

    ``log p(P) = (n - 1)^2 log tau + C_n + sum log Q - 1/2 logdet(I - Q'^T Q') - sum log P + logdet(I - P'^T P') + r(P)``

    where ``r`` is what a Laplace approximation of a log-concave integral of dimension n - 1 leaves over. It is computed
    exactly for n = 2 (closed form) and n = 3 (quadrature). With ``num_particles=0`` it is the second order of Laplace's
    expansion for n = 4 to 64, up to 9 with a fixed quadrature where that falls short; above, a constant of the mask. Where
    pairs are forbidden, n is the size of a component. With nothing forbidden an error of at most 0.001 nats in the mean is
    left at the law's own samples. Where a prior without logits at temperature 1 scores samples of
    ``GumbelSinkhorn(0.5, X)``, ``X = 3 N(0, 1)``, it is below 0.01 nats for n up to 9, 0.1 for 10 and 20 and 0.15 for 100
    (of Laplace 0.3 to 0.6 up to 20); at 0.2 in place of 0.5 it is 0.1, 0.6 and 4. Above n = 9 it grows without a bound as
    entries of ``Q`` vanish, under colder samples or sharper logits, and asks for ``num_particles``. With two allowed pairs
    a row it is 0.1 nats or less up to n = 40, where Laplace is off by 4 (``python benchmarks/density.py``). With
    ``num_particles=K`` the integral is estimated from ``K`` random directions; the estimate of the density (not of its
    logarithm) is unbiased, of finite variance, and varies from call to call. The derivation is in ``docs/density.md``.

    **Forbidden pairs.** Entries of ``-inf`` in ``logits`` are exactly zero in every sample. The allowed entries fall
    apart into components; the density is the product of theirs, with respect to Lebesgue measure on the allowed entries
    outside a spanning forest of each. Allowed entries that lie on no permutation are forbidden with a warning.

    **Values.** A value that comes from :meth:`rsample` carries ``log P`` with it and scores exactly even where
    entries underflow, also under another instance. Any other value is scored by its logarithm.

    Args:
        temperature: ``tau`` > 0, a number or a tensor that broadcasts with the batch shape.
        logits: ``X``, log-potentials, shape (..., n, n), float32 or float64; larger is better, ``-inf`` forbids.
            The law depends on them only up to adding a number to a row or to a column.
        num_particles: number of directions in the estimate of :meth:`log_prob`, 0 for a deterministic value.
        validate_args: validate values in :meth:`log_prob`; by default Pyro's setting.

    Shapes:
        batch_shape ``broadcast(temperature.shape, logits.shape[:-2])``, event_shape (n, n).

    Raises:
        TypeError: integer or half precision ``logits``.
        ValueError: NaN or +inf in ``logits``, not square, no permutation allowed, ``temperature`` not positive and
            finite, ``num_particles`` negative. Messages name the batch item.
        RuntimeError: in the backward pass of a draw, no solution to differentiate at: logits that differ by far too much.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> d = GumbelSinkhorn(0.5, torch.zeros(7, 3, 3))
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
        "logits": torch_constraints.independent(torch_constraints.real, 2),
    }
    has_rsample = True

    temperature: Tensor
    logits: Tensor

    def __init__(
        self,
        temperature: float | Tensor,
        logits: Tensor,
        num_particles: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        check_logits(logits, half=False)
        tau = cast_temperature(temperature, logits)
        if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 0:
            raise ValueError(f"num_particles must be an integer of at least 0, but is {num_particles!r}")
        batch_shape = broadcast_batch(tau, logits)
        event_shape = logits.shape[-2:]
        self._support = find_support(logits.detach() > -torch.inf).expand(batch_shape)
        self.temperature = tau.expand(batch_shape)
        logits = own_memory(logits, 2).expand(batch_shape + event_shape)
        allowed = self._support.allowed
        self.logits = logits if allowed is None else torch.where(allowed, logits, -torch.inf)
        self.num_particles = num_particles
        super().__init__(batch_shape, event_shape, validate_args)

    def __repr__(self) -> str:
        shape = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"{type(self).__name__}({shape}, num_particles={self.num_particles})"

    @torch_constraints.dependent_property(is_discrete=False, event_dim=2)
    def support(self) -> constraints.DoublyStochastic:
        """Doubly stochastic matrices that are zero where ``logits`` are ``-inf``."""
        return constraints.DoublyStochastic(self._support.allowed)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shapes of ``temperature`` and ``logits``."""
        logits = torch.Size(arg_shapes["logits"])
        temperature = torch.Size(arg_shapes.get("temperature", ()))
        return torch.broadcast_shapes(temperature, logits[:-2]), logits[-2:]

    def expand(self, batch_shape: Any, _instance: GumbelSinkhorn | None = None) -> GumbelSinkhorn:
        """The same law with a larger batch shape; class and parameters are kept."""
        new: GumbelSinkhorn = self._get_checked_instance(GumbelSinkhorn, _instance)
        batch_shape = torch.Size(batch_shape)
        new.temperature = self.temperature.expand(batch_shape)
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        new.num_particles = self.num_particles
        new._support = self._support.expand(batch_shape)
        super(GumbelSinkhorn, new).__init__(batch_shape, self.event_shape, self._validate_args)
        return new

    @property
    def mode(self) -> Tensor:
        """The matching of the logits, a permutation matrix of shape batch_shape + (n, n).

        It is the vertex that the law contracts to as the temperature falls, not the maximum of the density.
        """
        return matching(self.logits)

    def entropy(self, num_samples: int = 64) -> Tensor:
        """Monte Carlo estimate of the differential entropy, ``-mean log_prob``, of the batch shape.

        Args:
            num_samples: number of draws, at least 1; the standard error falls with its root. Differentiable.

        Raises:
            ValueError: ``num_samples`` is no integer of at least 1, or logits of which rounding leaves no density.
        """
        check_count(num_samples, "num_samples", least=1)
        return -self.log_prob(self.rsample(torch.Size((num_samples,)))).mean(0)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparametrized draws, shape sample_shape + batch_shape + (n, n).

        A draw is a tensor that carries its logarithm, for :meth:`log_prob`. To save one so that ``torch.load`` reads it with
        ``weights_only=True``, save ``draw.as_subclass(torch.Tensor)``, a plain tensor without it.

        Warns:
            SinkhornWarning: the solver missed its tolerance (see :func:`pyro_gs.sinkhorn`).
        """
        return self._relaxed(self._perturbed(sample_shape))

    def _perturbed(self, sample_shape: Any) -> Tensor:
        """``(X + eps) / tau`` in float64 up to a shift of every row."""
        noise = gumbel_noise(self._extended_shape(torch.Size(sample_shape)), self.logits)
        return scaled_logits(self.logits, self.temperature, noise)

    def _relaxed(self, z: Tensor) -> RelaxedPermutation:
        support = self._support.expand(z.shape[:-2])
        tol = default_tol(self.logits.dtype)
        found = scale(z, support, tol=tol, max_iter=_MAX_ITER, relative=False)
        warn_unconverged(tol, found, self.temperature)
        make = functools.partial(_exact_log, z, support, found.v.detach(), tol)
        return RelaxedPermutation.wrap(found.log_p.exp().to(self.logits.dtype), make)

    def hard_sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of the zero-temperature limit ``M(X + eps)``, shape sample_shape + batch_shape + (n, n)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return matching(self.logits.detach().double() + gumbel_noise(shape, self.logits)).to(self.logits.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of doubly stochastic matrices, shape broadcast of their batch with the batch shape.

        Args:
            value: shape (..., n, n).

        Raises:
            ValueError: another event shape, not doubly stochastic, mass on a forbidden pair, or a zero at an
                allowed pair (a matrix on the boundary, or one whose entries underflowed and lost their logarithm), or
                logits of which rounding leaves no density.
            RuntimeError: under a transform of ``torch.func``; take ``torch.autograd``, and batch dimensions.
        """
        bound = value.bound if isinstance(value, RelaxedPermutation) else None
        if bound is not None:
            return -bound(self)
        log_p, batch = self._checked_log(value)
        support = self._support.expand(batch)
        x = without_offsets(self.logits.double())[0].expand(batch + self.event_shape)
        tau = self.temperature.double()
        if support.allowed is not None:
            x = torch.where(support.allowed, x, 0.0)
            finite = torch.where(support.allowed, log_p, 0.0)
        else:
            finite = log_p
        if x.numel() and float(x.detach().abs().amax()) * torch.finfo(x.dtype).eps > ROUNDING:
            raise unresolved()
        log_k = x - tau[..., None, None] * finite
        gauge, dof = _dual_terms(log_k, support, self.num_particles)
        jacobian = component_logdet(log_p, support) - finite.sum((-2, -1))
        return (dof * tau.log() + gauge + jacobian).to(self.logits.dtype)

    def _checked_log(self, value: Tensor) -> tuple[Tensor, torch.Size]:
        """``log(value)`` on the support in float64, broadcast, and its batch shape."""
        batch = check_value_shape(value, self.event_shape, self.batch_shape)
        check_floating(value, "value")
        if self._validate_args:
            self._check_value(plain(value).detach())
        log_p = log_of(value).expand(batch + self.event_shape)
        allowed = self._support.allowed
        lost = log_p.detach() == -torch.inf
        if allowed is not None:
            lost = lost & allowed
        if bool(lost.any()):
            *item, row, column = first_position(lost)
            raise ValueError(
                f"value{describe(tuple(item))} has a zero at row {row}, column {column}, where a match is allowed, so it "
                "has no density; if the entry underflowed, score the tensor that rsample returned itself, which carries "
                "its logarithm, or use float64 or a higher temperature"
            )
        if allowed is not None:
            log_p = torch.where(allowed, log_p, -torch.inf)
        return log_p, batch

    def _check_value(self, value: Tensor) -> None:
        good = constraints.DoublyStochastic(self._support.allowed).check(value)
        if bool(good.all()):
            return
        item = first_position(~good) if good.dim() else ()
        one = value.expand(good.shape + self.event_shape)[item]
        allowed = self._support.allowed
        if allowed is not None:
            outside = (one != 0) & ~allowed.expand(good.shape + self.event_shape)[item]
            if bool(outside.any()):
                row, column = first_position(outside)
                raise ValueError(
                    f"value{describe(item)} is not in the support of {type(self).__name__}: expected zero where logits are "
                    f"-inf, but it is {float(one[row, column]):g} at row {row}, column {column}"
                )
        error = max(float((one.sum(dim) - 1).abs().max()) for dim in (-2, -1))
        raise ValueError(
            f"value{describe(item)} is not in the support of {type(self).__name__}: expected a doubly stochastic matrix, "
            f"but its smallest entry is {float(one.min()):g} and a row or column sum "
            f"is off by {error:.2g}"
        )


def _exact_log(z: Tensor, support: Support, v: Tensor, tol: float) -> Tensor:
    """``log S(z)`` with all entries exact, started from column potentials that are right to ``tol``."""
    return scale(z, support, tol=tol, max_iter=_MAX_ITER, relative=True, start=v).log_p


def allowed_counts(support: Support, like: Tensor, layout: Dense = DENSE) -> tuple[Tensor, Tensor]:
    """Number of allowed entries in every row and in every column, float64, (..., n) each."""
    if support.allowed is None:
        n = float(support.shape[-1])
        full = torch.full(support.shape[:-1], n, dtype=torch.float64, device=like.device)
        return full, full
    n, w = support.shape[-2:]
    columns = layout.flat(support.shape[:-2]).column_sums(support.allowed.double().reshape(-1, n, w))
    return support.allowed.sum(-1).double(), columns.reshape(support.shape[:-1])


def _dual_terms(log_k: Tensor, support: Support, num_particles: int) -> tuple[Tensor, Tensor]:
    """All terms of the log density but the Jacobian and log tau; and the power of tau.

    ``log_k`` is ``X - tau log P``, finite, float64, (..., n, n); values outside the support do not matter.
    """
    n = log_k.shape[-1]
    rows, columns = counts = allowed_counts(support, log_k)
    allowed = support.allowed
    z = log_k if allowed is None else torch.where(allowed, log_k, -torch.inf)
    tol, limit = default_tol(torch.float64), _MAX_ITER
    if allowed is None:
        log_q = scale(z, support, tol=tol, max_iter=limit, relative=True).log_p
        total, dof = log_q.sum((-2, -1)), torch.full_like(log_q[..., 0, 0], float((n - 1) ** 2))
    else:
        scaled = scale(z, support, rows, columns, tol=tol * n, max_iter=limit, relative=False).log_p
        log_q = scaled - rows.log()[..., None]
        total = torch.where(allowed, log_q, 0.0).sum((-2, -1))
        groups = (component_sums(torch.ones_like(rows), support) > 0).sum(-1)
        dof = rows.sum(-1) - 2 * n + groups
    logdet = component_logdet(log_q + 0.5 * rows.log()[..., None], support)
    integral = log_integral(log_q, support, logdet, num_particles, counts)
    return torch.lgamma(rows).sum(-1) + total + integral, dof

"""Evidence of the worm model: the weights integrated out, from statistics that do not grow with time.

Per worm, everything but the permutation enters through ``Y0' Y0``, ``Y1' Y0`` and ``|Y1|^2``. Brought into
canonical order and summed over worms,

    B = sum_j P_j' gram_j P_j,        C = sum_j P_j' cross_j P_j,

they are all that the weights see: row ``i`` of ``W``, supported on the parents ``A_i``, is Gaussian with
precision ``L = I / s^2 + B[A_i, A_i] / sigma^2`` and mean ``L^-1 b``, ``b = C[i, A_i] / sigma^2``.

A worm that does not show all neurons has rows of zeros for those it misses. It then says nothing of the rows of ``W`` that
drive neurons it does not show, so that row ``i`` has a ``B`` of its own, summed over the worms that show ``i``; what its
unseen neurons send to the others counts as noise. That last is an approximation: exact would be a Kalman filter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tutorials.celegans.connectome import Connectome
from tutorials.celegans.worms import Worms


@dataclass(frozen=True)
class Statistics:
    """What the likelihood needs of the recordings, in each worm's own order.

    Attributes:
        gram: ``Y0' Y0``, shape ``(J, n, n)``, where ``Y0`` are the first ``T`` of ``T + 1`` time steps.
        cross: ``Y1' Y0``, shape ``(J, n, n)``, where ``Y1`` are the last ``T`` time steps.
        energy: ``|Y1|^2``, shape ``(J,)``.
        count: Numbers in ``Y1`` that were recorded, over all worms.
        observed: Which neurons each worm shows, bool, shape ``(J, n)``, or None where all worms show all.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    count: int
    observed: Tensor | None = None

    @classmethod
    def from_worms(cls, worms: Worms) -> "Statistics":
        """Sum up the recordings of worms, of whatever lengths and numbers of neurons."""
        return cls.from_traces(worms.traces, lengths=worms.lengths, observed=worms.observed, persistence=worms.persistence)

    @classmethod
    def from_traces(
        cls,
        traces: Tensor,
        *,
        lengths: Tensor | None = None,
        observed: Tensor | None = None,
        persistence: Tensor | None = None,
    ) -> "Statistics":
        """Sum up recordings.

        Args:
            traces: shape ``(J, T + 1, n)``, one row a time step; zero where nothing was recorded.
            lengths: number of transitions in each worm, long, shape ``(J,)``; None for ``T``.
            observed: which neurons each worm shows, bool, shape ``(J, n)``; None for all.
            persistence: share of each neuron's activity that is left a time step later, shape ``(J, n)``; it is taken from
                ``Y1``, which from then on is what the network and the noise did. None for zero.

        Raises:
            ValueError: If ``traces`` is not a floating tensor of three dimensions with at least two time
                steps.
        """
        if traces.dim() != 3 or not traces.is_floating_point() or traces.shape[1] < 2:
            raise ValueError(
                f"traces has shape {tuple(traces.shape)} and dtype {traces.dtype}; "
                "expected a floating tensor (worms, time steps, neurons) with at least 2 time steps"
            )
        before, after = traces[:, :-1], traces[:, 1:]
        worms, steps, n = before.shape
        if lengths is None:
            lengths = torch.full((worms,), steps)
        if observed is None:
            observed = torch.ones(worms, n, dtype=torch.bool)
        last = torch.arange(steps, device=traces.device) >= lengths.unsqueeze(-1)
        before = before.masked_fill(last.unsqueeze(-1), 0.0)  # a last moment is nobody's past
        if persistence is not None:
            after = after - persistence.unsqueeze(1) * before
        count = int((lengths * observed.sum(1)).sum())
        energy = after.square().sum((1, 2))
        return cls(before.mT @ before, after.mT @ before, energy, count, None if bool(observed.all()) else observed)

    @property
    def num_worms(self) -> int:
        """Number of worms ``J``."""
        return self.gram.shape[0]

    @property
    def size(self) -> int:
        """Number of neurons ``n``."""
        return self.gram.shape[-1]


def log_likelihood(P: Tensor, W: Tensor, statistics: Statistics, sigma: float) -> Tensor:
    """``log p(Y | W, P)``, all constants included.

    Args:
        P: Permutations, shape ``(..., J, n, n)``. A relaxed ``P`` gets the same quadratic form.
        W: Weights in canonical order, shape ``(n, n)`` or ``(..., n, n)``; ``W[i, k]`` is what ``k`` sends to
            ``i``.
        statistics: Sums over the recordings.
        sigma: Standard deviation of the noise, in the units of the traces.

    Returns:
        Shape ``(...)``.
    """
    C = congruences(P, statistics)[1]
    if statistics.observed is None:
        power = (W * (W @ congruences(P, statistics)[0])).sum((-2, -1))
    else:
        W_each = W.unsqueeze(-3)
        rows = (W_each * (W_each @ worm_congruences(P, statistics)[0])).sum(-1)
        power = (shown(P, statistics.observed) * rows).sum((-2, -1))
    quadratic = statistics.energy.sum() - 2 * (W * C).sum((-2, -1)) + power
    return _noise_constant(statistics, sigma) - quadratic / (2 * sigma**2)


def _noise_constant(statistics: Statistics, sigma: float) -> float:
    return -0.5 * statistics.count * math.log(2 * math.pi * sigma**2)


def shown(P: Tensor, observed: Tensor) -> Tensor:
    """How much of each neuron each worm shows: the columns of ``P`` summed over rows that were observed.

    Args:
        P: Shape ``(..., J, n, n)``.
        observed: Shape ``(J, n)``, bool.

    Returns:
        Shape ``(..., J, n)``; zero or one at permutations.
    """
    return (observed.to(P.dtype).unsqueeze(-2) @ P).squeeze(-2)


class _Congruences(torch.autograd.Function):
    """The two sums of `congruences`: ``(S, J, n, n)`` to twice ``(S, n, n)``; the first by worm, ``(S, J, n, n)``, if asked.

    The products with the statistics run sample by sample: broadcasting them would copy the statistics.
    """

    @staticmethod
    def forward(ctx: Any, P: Tensor, gram: Tensor, cross: Tensor, by_worm: bool) -> tuple[Tensor, Tensor]:
        stacked = P.flatten(1, 2)
        gram_p = _each(gram, P)
        cross_p = _each(cross, P).flatten(1, 2)
        if not by_worm:
            gram_p = gram_p.flatten(1, 2)
        ctx.by_worm = by_worm
        ctx.save_for_backward(stacked, gram_p, cross_p, cross)
        return torch.matmul(P.mT if by_worm else stacked.mT, gram_p), torch.bmm(stacked.mT, cross_p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dB: Tensor, dC: Tensor) -> tuple[Tensor, None, None, None]:
        stacked, gram_p, cross_p, cross = ctx.saved_tensors
        shape = (len(stacked), *cross.shape)
        dP = torch.matmul(gram_p, dB + dB.mT).reshape(stacked.shape).baddbmm_(cross_p, dC.mT)
        dP = dP.reshape(shape)
        dP += _each(cross.mT, torch.bmm(stacked, dC).reshape(shape))
        return dP, None, None, None


_apply_congruences: Callable[..., tuple[Tensor, Tensor]] = _Congruences.apply


def _each(matrices: Tensor, samples: Tensor) -> Tensor:
    """``matrices @ samples[s]`` for each ``s``: ``(J, n, n)`` and ``(S, J, n, n)`` to ``(S, J, n, n)``."""
    out = torch.empty_like(samples, memory_format=torch.contiguous_format)
    for source, target in zip(samples, out, strict=True):
        torch.bmm(matrices, source, out=target)
    return out


def _check_stack(P: Tensor, statistics: Statistics) -> None:
    expected = statistics.gram.shape
    if P.shape[-3:] != expected or P.dtype != statistics.gram.dtype:
        raise ValueError(
            f"P has shape {tuple(P.shape)} and dtype {P.dtype}; "
            f"expected (..., {', '.join(map(str, expected))}) and {statistics.gram.dtype}"
        )


def congruences(P: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Statistics in canonical order, summed over worms.

    Args:
        P: Permutations or relaxed ones, shape ``(..., J, n, n)``.
        statistics: Sums over the recordings, in each worm's own order.

    Returns:
        ``B = sum_j P_j' gram_j P_j`` and ``C = sum_j P_j' cross_j P_j``, both ``(..., n, n)``. First
        derivatives only.

    Raises:
        ValueError: If the last three dimensions of ``P`` are not those of the statistics, or its dtype
            differs.
    """
    return _congruences(P, statistics, by_worm=False)


def worm_congruences(P: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """As `congruences`, but with the ``P_j' gram_j P_j`` of each worm, ``(..., J, n, n)``, in place of their sum."""
    return _congruences(P, statistics, by_worm=True)


def _congruences(P: Tensor, statistics: Statistics, *, by_worm: bool) -> tuple[Tensor, Tensor]:
    _check_stack(P, statistics)
    batch = P.shape[:-3]
    B, C = _apply_congruences(P.reshape(-1, *P.shape[-3:]), statistics.gram, statistics.cross, by_worm)
    return B.reshape(*batch, *B.shape[1:]), C.reshape(*batch, *C.shape[1:])


@dataclass(frozen=True)
class _Bucket:
    """Rows with about the same number of parents ``d``, padded to the largest.

    Padded places read entry 0 and are masked; their diagonal is ``1 / s^2``, which ``logdet(s^2 L)`` does not
    see.
    """

    rows: Tensor  # (R,)
    parents: Tensor  # (R, D)
    pairs: Tensor  # (R * D * D,) flat places of B
    entries: Tensor  # (R * D,) flat places of C
    pair_scale: Tensor  # (R, D, D): 1 / sigma^2, 0 where padded
    entry_scale: Tensor  # (R, D): the same


@dataclass(frozen=True)
class _Posterior:
    """Gaussian posterior of one bucket of rows: ``factor`` is the lower Cholesky factor of the precision."""

    factor: Tensor  # (S, R, D, D)
    linear: Tensor  # (S, R, D)


def _bucket(adjacency: Tensor, rows: Sequence[int], noise_precision: float) -> _Bucket:
    n = adjacency.shape[0]
    index = torch.as_tensor(rows, device=adjacency.device)
    width = int(adjacency[index].sum(1).max())
    order = adjacency[index].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    real = adjacency[index].gather(1, order)
    parents = torch.where(real, order, 0)
    scale = real.to(torch.float64) * noise_precision
    return _Bucket(
        rows=index,
        parents=parents,
        pairs=(parents[:, :, None] * n + parents[:, None, :]).flatten(),
        entries=(index[:, None] * n + parents).flatten(),
        pair_scale=scale[:, :, None] * real[:, None, :],
        entry_scale=scale,
    )


def _gathered(bucket: _Bucket, B: Tensor) -> Tensor:
    """``B[A_i, A_i]`` of each row: ``(..., n, n)`` to ``(..., R, D, D)``."""
    return B.flatten(-2)[..., bucket.pairs].reshape(*B.shape[:-2], *bucket.pair_scale.shape)


def _solve(bucket: _Bucket, B: Tensor, C: Tensor, seen: Tensor | None, prior_precision: float) -> _Posterior:
    """Posterior of rows; ``B`` is ``(S, n, n)``, or ``(S, J, n, n)`` with ``seen``, ``(S, J, n)``, its weights by row."""
    if seen is None:
        L = _gathered(bucket, B) * bucket.pair_scale
    else:
        L = torch.zeros_like(bucket.pair_scale).expand(len(B), *bucket.pair_scale.shape).clone()
        for worm in range(B.shape[1]):
            L += _gathered(bucket, B[:, worm]) * seen[:, worm, bucket.rows, None, None]
        L *= bucket.pair_scale
    L.diagonal(dim1=-2, dim2=-1).add_(prior_precision)
    linear = C.flatten(1)[:, bucket.entries].reshape(len(C), *bucket.entry_scale.shape) * bucket.entry_scale
    return _Posterior(torch.linalg.cholesky(L), linear)


class _RowEvidence(torch.autograd.Function):
    """``sum_i 1/2 b_i' L_i^-1 b_i - 1/2 logdet(s^2 L_i)``, shape ``(S,)``, of what `_solve` takes."""

    @staticmethod
    def forward(
        ctx: Any, B: Tensor, C: Tensor, seen: Tensor | None, buckets: Sequence[_Bucket], prior_precision: float
    ) -> Tensor:
        value = B.new_zeros(B.shape[0])
        saved = []
        for bucket in buckets:
            posterior = _solve(bucket, B, C, seen, prior_precision)
            inverse = torch.cholesky_inverse(posterior.factor)
            mean = (inverse @ posterior.linear.unsqueeze(-1)).squeeze(-1)
            value += 0.5 * (posterior.linear * mean).sum((1, 2))
            value -= posterior.factor.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))
            value += 0.5 * math.log(prior_precision) * mean[0].numel()
            saved += [inverse, mean]
        ctx.buckets = buckets
        ctx.partial = seen is not None
        ctx.save_for_backward(*saved, *([] if seen is None else [B, seen]))
        ctx.shapes = B.shape, C.shape
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        dB, dC = grad.new_zeros(ctx.shapes[0]), grad.new_zeros(ctx.shapes[1])
        saved = ctx.saved_tensors[: 2 * len(ctx.buckets)]
        d_seen = torch.zeros_like(ctx.saved_tensors[-1]) if ctx.partial else None
        for bucket, inverse, mean in zip(ctx.buckets, saved[::2], saved[1::2], strict=True):
            scale = -0.5 * grad[:, None, None, None]
            second = torch.addcmul(inverse, mean.unsqueeze(-1), mean.unsqueeze(-2)) * bucket.pair_scale * scale
            first = mean * bucket.entry_scale * grad[:, None, None]
            for sample in range(grad.shape[0]):
                dC[sample].view(-1).scatter_add_(0, bucket.entries, first[sample].flatten())
                if d_seen is None:
                    dB[sample].view(-1).scatter_add_(0, bucket.pairs, second[sample].flatten())
                    continue
                B, seen = ctx.saved_tensors[-2:]
                for worm in range(B.shape[1]):
                    weighted = second[sample] * seen[sample, worm, bucket.rows, None, None]
                    dB[sample, worm].view(-1).scatter_add_(0, bucket.pairs, weighted.flatten())
                    d_seen[sample, worm, bucket.rows] += (second[sample] * _gathered(bucket, B[sample, worm])).sum((1, 2))
        return dB, dC, d_seen, None, None


_apply_row_evidence: Callable[..., Tensor] = _RowEvidence.apply


class CollapsedEvidence:
    """``log p(Y | P)`` with the shared weights integrated out; differentiable once, also at relaxed ``P``.

    At permutations this is the exact log evidence, constants included. At relaxed ``P`` it is the same
    formula, the continuation that the variational methods climb.

    Args:
        adjacency: Bool, shape ``(n, n)``; ``adjacency[i, k]``: ``k`` sends to ``i``, so row ``i`` of ``W``
            has weight ``k``.
        statistics: Sums over the recordings.
        sigma: Standard deviation of the noise, in the units of the traces.
        weight_scale: Standard deviation ``s`` of the prior of each weight.

    Raises:
        ValueError: If the shapes disagree or a scale is not positive and finite.
    """

    def __init__(self, adjacency: Tensor, statistics: Statistics, sigma: float, weight_scale: float) -> None:
        n = statistics.size
        if adjacency.shape != (n, n) or adjacency.dtype != torch.bool:
            raise ValueError(
                f"adjacency has shape {tuple(adjacency.shape)} and dtype {adjacency.dtype}; "
                f"expected ({n}, {n}) and torch.bool"
            )
        for name, value in (("sigma", sigma), ("weight_scale", weight_scale)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value!r}: expected a positive finite number")
        self.adjacency = adjacency
        self.statistics = statistics
        self.sigma = float(sigma)
        self.weight_scale = float(weight_scale)
        self._prior_precision = 1 / self.weight_scale**2
        degrees = adjacency.sum(1).tolist()
        widths = range(max(degrees).bit_length() + 1)
        groups = [[i for i, d in enumerate(degrees) if d > 0 and (d - 1).bit_length() == w] for w in widths]
        self._buckets = [_bucket(adjacency, rows, 1 / self.sigma**2) for rows in groups if rows]
        self._constant = _noise_constant(statistics, self.sigma)
        self._constant -= float(statistics.energy.sum()) / (2 * self.sigma**2)

    @classmethod
    def of_worms(cls, worms: Worms, connectome: Connectome) -> "CollapsedEvidence":
        """Of recordings on a network, with the worms' own scales."""
        return cls(connectome.adjacency, Statistics.from_worms(worms), worms.sigma, worms.weight_scale)

    def __call__(self, P: Tensor) -> Tensor:
        """Log evidence of ``P``, shape ``(..., J, n, n)`` to ``(...)``.

        Raises:
            ValueError: If shape or dtype of ``P`` are not those of the statistics.
        """
        _check_stack(P, self.statistics)
        samples = P.reshape(-1, *P.shape[-3:])
        value = _apply_row_evidence(*self._sums(samples), self._buckets, self._prior_precision)
        return self._constant + value.reshape(P.shape[:-3])

    def _sums(self, P: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What `_solve` reads: ``(S, J, n, n)`` to ``B``, ``C`` and ``seen``."""
        if self.statistics.observed is None:
            return *congruences(P, self.statistics), None
        return *worm_congruences(P, self.statistics), shown(P, self.statistics.observed)

    @torch.no_grad()
    def posterior_weights(self, P: Tensor) -> Tensor:
        """Posterior mean of ``W`` given one stack ``P``: ``(J, n, n)`` to ``(n, n)``, zero off the edges."""
        return self._weights(P, None, draw=False)

    @torch.no_grad()
    def sample_weights(self, P: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw of ``W`` given one stack ``P``: ``(J, n, n)`` to ``(n, n)``, zero off the edges."""
        return self._weights(P, generator, draw=True)

    def _weights(self, P: Tensor, generator: torch.Generator | None, *, draw: bool) -> Tensor:
        B, C, seen = self._sums(P.unsqueeze(0))
        W = torch.zeros_like(C[0])
        for bucket in self._buckets:
            posterior = _solve(bucket, B, C, seen, self._prior_precision)
            factor, linear = posterior.factor[0], posterior.linear[0].unsqueeze(-1)
            white = torch.linalg.solve_triangular(factor, linear, upper=False)
            if draw:
                white += torch.randn(white.shape, generator=generator, dtype=white.dtype, device=white.device)
            weights = torch.linalg.solve_triangular(factor.mT, white, upper=True).squeeze(-1)
            real = bucket.entry_scale > 0
            W.flatten()[bucket.entries[real.flatten()]] = weights[real]
        return W

    def log_posterior_weights(self, P: Tensor, W: Tensor) -> Tensor:
        """``log p(W | Y, P)`` of weights on the edges, for one stack ``P`` (J, n, n): a scalar."""
        B, C, seen = self._sums(P.unsqueeze(0))
        value = B.new_zeros(())
        for bucket in self._buckets:
            posterior = _solve(bucket, B, C, seen, self._prior_precision)
            factor, real = posterior.factor[0], bucket.entry_scale > 0
            mean = torch.cholesky_solve(posterior.linear[0].unsqueeze(-1), factor).squeeze(-1)
            weights = W.flatten()[bucket.entries].reshape(real.shape)
            white = (factor.mT @ ((weights - mean) * real).unsqueeze(-1)).squeeze(-1)
            log_factor = factor.diagonal(dim1=-2, dim2=-1).log()
            value += ((log_factor - 0.5 * white.square() - 0.5 * math.log(2 * math.pi)) * real).sum()
        return value

    def log_prior_weights(self, W: Tensor) -> Tensor:
        """``log p(W)`` of weights on the edges, shape ``(n, n)`` to ``()``."""
        weights = W[self.adjacency]
        constant = math.log(2 * math.pi * self.weight_scale**2)
        return -0.5 * (weights.square() / self.weight_scale**2 + constant).sum()

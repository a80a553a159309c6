r"""The gauge integral in polar coordinates: along rays by quadrature, over directions by a fixed rule or at random.

In a frame ``beta = r A u`` with ``u`` on the unit sphere of the ``d``-dimensional space of vectors that sum to zero,

    I = |A| area(sphere) mean_u integral over r of r^(d-1) exp f(r A u),

for any ``A``. Along a ray the integrand is log-concave, and quadrature has it however far its tails are from a Gaussian's;
what depends on the direction is bounded, varies little if the frame fits, and is averaged over

- the directions of a rule that is symmetric under permutations of the columns: cuts (one column against the rest, three
  against the rest) and pairs (one column against another), 26 points for four columns and 240 for nine. It is exact to
  degree five, and for the second order of the flat matrix, of degree six (Stroud 1971, Approximate Calculation of Multiple
  Integrals, for rules on the sphere; Genz and Monahan 1999, A stochastic algorithm for high-dimensional integrals over
  unbounded regions with Gaussian weight, for the polar form);
- random directions, with weights that make the estimate unbiased. They are bounded, so their variance is finite.

The frame is the inverse root of a Laplacian whose ties ``w`` are replaced by those of the Gaussian with about the integral
over two columns so tied: about ``w`` where it is of order one and ``1 / log(1 / w)^2`` far below, for near a vertex the
integrand is a plateau of that width and the curvature at its top says nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_gs.distributions.edgeworth import floored, laplacian
from pyro_gs.distributions.spectral import inverse_root
from pyro_gs.ops.laplacian import log_tie_weights

LARGEST = 9  # columns that the rule serves
_NODES = 12  # of Gauss and Legendre, on either side of the peak of a ray
_DROP = 18.0  # nats below the peak where a ray is cut off
_SPAN = 4.0  # the peaks lie within this many e-folds of where those of a Gaussian do
_CHUNK = 2_000_000
_BEND = 0.72  # of the ties: with this the integral over two columns is met to a tenth at any tie
_FORBIDDEN = -1e300
_LOWEST = -600.0  # a row of products may be that small


def bent_ties(log_q: Tensor, n_i: Tensor) -> Tensor:
    """Ties between columns, those that vanish pulled up to the inverse square of their logarithm, (b, k, k).

    ``(asinh(a) / asinh(a / sqrt(w)))^2`` with ``a = 0.72``.
    """
    finite = torch.where(log_q > -torch.inf, log_q, _FORBIDDEN)  # -inf in every row would have no gradient
    log_w = log_tie_weights(finite + 0.5 * n_i.log()[..., None])
    tied = log_w > 0.5 * _FORBIDDEN
    x = math.log(_BEND) - 0.5 * torch.where(tied, log_w, 0.0)
    width = x + torch.log1p((1 + (-2 * x).exp()).sqrt())  # asinh(exp(x))
    return torch.where(tied, (math.asinh(_BEND) / width).square(), 0.0)


def _closed(ties: Tensor) -> Tensor:
    """Laplacian (b, k, k) of ties, with eigenvalue one at the constant vector."""
    return laplacian(ties) + 1 / ties.shape[-1]


@functools.lru_cache(maxsize=16)
def rule(size: int) -> tuple[Tensor, Tensor]:
    """Directions (m, size), unit vectors that sum to zero, and their weights (m,), positive with sum one.

    Exact on the sphere for ``sum x^4`` and ``(sum x^3)^2``: all that a polynomial of degree five, or the second-order term
    of the flat matrix, comes down to by symmetry. For nine columns the cuts with one column get no weight and are left out.
    """
    orbits = []
    for count in (1, min(3, size - 2)):
        rows = np.array([[i in chosen for i in range(size)] for chosen in itertools.combinations(range(size), count)])
        orbits.append(np.unique(np.concatenate([rows, ~rows]), axis=0) - 0.5)
    pairs = np.zeros((size * (size - 1), size))
    for row, (i, j) in zip(pairs, itertools.permutations(range(size), 2), strict=True):
        row[i], row[j] = 1.0, -1.0
    orbits.append(pairs)
    orbits = [x - x.mean(-1, keepdims=True) for x in orbits]
    orbits = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in orbits]
    moments = [[1.0, (x**4).sum(-1).mean(), ((x**3).sum(-1) ** 2).mean()] for x in orbits]
    d, s, c = size - 1, 1 - 1 / size, -1 / size  # the Gaussian has variance s and covariance c
    fourth = 3 * size * s**2 / (d * (d + 2))
    third = size * (15 * s**3 + (size - 1) * (9 * s**2 * c + 6 * c**3)) / (d * (d + 2) * (d + 4))
    weights = np.linalg.solve(np.array(moments).T, [1.0, fourth, third])
    kept = [(x, w) for x, w in zip(orbits, weights, strict=True) if w > 1e-12]
    points = np.concatenate([x for x, _ in kept])
    share = np.concatenate([np.full(len(x), w / len(x)) for x, w in kept])
    return torch.from_numpy(points), torch.from_numpy(share)


def by_rule(log_q: Tensor, n_i: Tensor, m_j: Tensor) -> Tensor:
    """Logarithm of the gauge integral by the fixed rule.

    Args:
        log_q: row-normalised connected components of 4 to 9 columns, float64, (b, k, k), with the mode at zero; -inf
            where forbidden.
        n_i: allowed entries of every row, (b, k).
        m_j: of every column.

    Returns:
        Tensor of shape (b,), differentiable.

    Example:
        >>> import math, torch
        >>> q, n = torch.full((1, 4, 4), -math.log(4.0), dtype=torch.float64), torch.full((1, 4), 4.0, dtype=torch.float64)
        >>> exact = 16 * math.log(4) + 4 * math.lgamma(4) - math.lgamma(16)
        >>> abs(float(by_rule(q, n, n)) - exact) < 0.002
        True
    """
    size = log_q.shape[-1]
    points, weights = (x.to(log_q.device) for x in rule(size))

    def locate(log_q: Tensor, n_i: Tensor, m_j: Tensor) -> tuple[Tensor, Tensor]:
        return _panels(_Integrand(log_q, n_i, m_j, points @ inverse_root(_closed(bent_ties(log_q, n_i)))))

    def evaluate(log_q: Tensor, n_i: Tensor, m_j: Tensor, r: Tensor, log_weight: Tensor) -> Tensor:
        root = inverse_root(_closed(bent_ties(log_q, n_i)))
        rays = _log_rays(_Integrand(log_q, n_i, m_j, points @ root), r, log_weight)
        return torch.logsumexp(rays + weights.log(), -1) + torch.logdet(root)

    out = _in_chunks(locate, evaluate, 2 * _NODES * len(points) * size, log_q, n_i, m_j)
    return out + _log_area(size - 1) + 0.5 * math.log(size)


def by_sampling(log_q: Tensor, n_i: Tensor, m_j: Tensor, num_particles: int) -> Tensor:
    """Logarithm of an unbiased estimate of the gauge integral, the mean of :func:`sampled_weights`.

    Args:
        log_q: row-normalised connected components, float64, (b, k, k), with the mode at zero; -inf where forbidden.
        n_i: allowed entries of every row, (b, k).
        m_j: of every column.
        num_particles: number of directions.

    Returns:
        Tensor of shape (b,).
    """
    return torch.logsumexp(sampled_weights(log_q, n_i, m_j, num_particles), -1) - math.log(num_particles)


def sampled_weights(log_q: Tensor, n_i: Tensor, m_j: Tensor, num_particles: int) -> Tensor:
    """Logarithms of weights whose mean is an unbiased estimate of the gauge integral, (b, num_particles).

    Three directions in four are those of the Gaussian of Laplace's approximation, with entries below 1e-6 raised to that;
    one in four, at the least one, that of the Gaussian of the frame. The weights are those of the mixture (Veach and Guibas
    1995). Directions are held fixed under differentiation, so the gradient of the estimate is unbiased too.

    Args:
        log_q: as for :func:`by_sampling`, like the others.
        n_i: (b, k).
        m_j: (b, k).
        num_particles: number of directions.
    """
    d = log_q.shape[-1] - 1
    bent = -(-num_particles // 4)
    counts = (bent, num_particles - bent)
    with torch.no_grad():
        q = floored(log_q, n_i)
        frames = (bent_ties(log_q, n_i), (n_i[..., None] * q).mT @ q)
        factors = [torch.linalg.cholesky(laplacian(ties)[:, 1:, 1:]) for ties in frames]
        rays = []
        for factor, count in zip(factors, counts, strict=True):
            noise = torch.randn(len(q), d, count, dtype=q.dtype, device=q.device)
            rays.append(torch.linalg.solve_triangular(factor.mT, noise, upper=True))
        x = torch.cat(rays, -1)
        x = x / (factors[0].mT @ x).norm(dim=-2, keepdim=True)
        density = [
            factor.diagonal(0, -2, -1).log().sum(-1, keepdim=True) - d * (factor.mT @ x).norm(dim=-2).log()
            for factor in factors
        ]
        shares = torch.tensor(counts, dtype=q.dtype, device=q.device) / num_particles
        mixture = torch.logsumexp(torch.stack(density, -1) + shares.log(), -1)
        x = torch.nn.functional.pad(x.mT, (1, 0))
    cost = 2 * _NODES * log_q.shape[-1]

    def locate(*args: Tensor) -> tuple[Tensor, Tensor]:
        return _panels(_Integrand(*args))

    def evaluate(log_q: Tensor, n_i: Tensor, m_j: Tensor, x: Tensor, r: Tensor, log_weight: Tensor) -> Tensor:
        return _log_rays(_Integrand(log_q, n_i, m_j, x), r, log_weight)

    directions = x.split(max(1, _CHUNK // cost), 1)
    parts = [_in_chunks(locate, evaluate, cost * y.shape[1], log_q, n_i, m_j, y) for y in directions]
    return torch.cat(parts, -1) - mixture + _log_area(d)


def _log_area(d: int) -> float:
    """Logarithm of the area of the unit sphere of a space of dimension ``d``."""
    return math.log(2) + 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d)


def _in_chunks(
    locate: Callable[..., tuple[Tensor, Tensor]], evaluate: Callable[..., Tensor], cost: int, *args: Tensor
) -> Tensor:
    """``evaluate(*args, *locate(*args))`` of items (b, ...), a bounded number at a time.

    Where there are several chunks, nothing of their nodes is kept for the backward pass. What ``locate`` returns is constant
    under differentiation.
    """
    out = []
    chunks = [x.split(max(1, _CHUNK // cost)) for x in args]
    for pieces in zip(*chunks, strict=True):
        with torch.no_grad():
            found = locate(*pieces)
        if len(chunks[0]) > 1 and torch.is_grad_enabled() and args[0].requires_grad:
            out.append(checkpoint(evaluate, *pieces, *found, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(evaluate(*pieces, *found))
    return torch.cat(out)


class _Integrand:
    """``f(beta) = sum_j m_j beta_j - sum_i n_i log sum_j q_ij exp(beta_j)`` at ``beta = r x``, and its derivative in ``r``.

    Args:
        log_q: (b, k, k).
        n_i: (b, k).
        m_j: (b, k).
        x: directions, (b, m, k).
    """

    def __init__(self, log_q: Tensor, n_i: Tensor, m_j: Tensor, x: Tensor) -> None:
        self.x = x - x.amax(-1, keepdim=True)  # adding a number to beta changes nothing
        self.log_q, self.q, self.n, self.m = log_q, log_q.exp(), n_i[..., None], m_j[..., None]

    def _beta(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials (b, m * s, k), at most zero, at radii (b, m, s), and the items in which products would underflow."""
        beta = (r[..., None] * self.x[:, :, None, :]).flatten(1, 2)
        return beta, (beta.detach().amin((-2, -1)) < _LOWEST).nonzero()[:, 0]

    def __call__(self, r: Tensor) -> Tensor:
        """Values (b, m, s) at radii (b, m, s)."""
        beta, far = self._beta(r)
        total = beta.exp() @ self.q.mT
        if len(far):
            total = total.index_fill(0, far, 1.0)
        rows = total.log()
        if len(far):  # one row at a time to bound memory
            one = [torch.logsumexp(beta[far] + row[:, None], -1) for row in self.log_q[far].unbind(1)]
            rows = rows.index_copy(0, far, torch.stack(one, -1))
        return (beta @ self.m - rows @ self.n)[..., 0].reshape(r.shape)

    def slope(self, r: Tensor) -> Tensor:
        """Derivatives (b, m) at radii (b, m)."""
        beta, far = self._beta(r[..., None])
        weight = beta.exp()
        mean = ((weight * self.x) @ self.q.mT) / (weight @ self.q.mT)
        if len(far):
            x = self.x[far]
            one = [(torch.softmax(beta[far] + row[:, None], -1) * x).sum(-1) for row in self.log_q[far].unbind(1)]
            mean[far] = torch.stack(one, -1)
        return (self.x @ self.m - mean @ self.n)[..., 0]


def _panels(f: _Integrand) -> tuple[Tensor, Tensor]:
    """Radii and logarithms of weights, (b, m, s) each, of two Gauss-Legendre panels on every ray.

    They meet at the peak of ``r^d exp f``. On the left that falls at least as ``r^d`` less the fall of ``f``, which is at
    most ``d`` nats; on the right, where ``f`` may fall off a cliff, the end is found by bisection.
    """
    d = f.x.shape[-1] - 1
    peak = torch.full_like(f.x[..., 0], 0.5 * math.log(d))
    for step in range(7):
        rising = d + peak.exp() * f.slope(peak.exp()) > 0
        peak = peak + torch.where(rising, 1.0, -1.0) * _SPAN / 2 ** (step + 1)
    value = f(peak.exp()[..., None])[..., 0]
    bound = math.log1p(_DROP / d + math.sqrt(2 * _DROP / d))  # reached where f falls in proportion to r
    right = torch.full_like(peak, bound)
    for step in range(5):
        end = peak + right - bound / 2 ** (step + 1)
        low = d * (end - peak) + f(end.exp()[..., None])[..., 0] - value < -_DROP
        right = torch.where(low, end - peak, right)
    middle = peak.exp()
    ends = torch.stack([middle * ((value - _DROP) / d).exp(), middle, middle * right.exp()], -1)
    nodes, weights = (torch.from_numpy(a).to(peak) for a in np.polynomial.legendre.leggauss(_NODES))
    half = 0.5 * ends.diff(dim=-1)[..., None]
    r = (ends[..., :-1, None] + half * (1 + nodes)).flatten(-2)
    return r, (half * weights).flatten(-2).log()


def _log_rays(f: _Integrand, r: Tensor, log_weight: Tensor) -> Tensor:
    """Logarithms (b, m) of the integrals of ``r^(d - 1) exp f(r x)`` over ``r``."""
    return torch.logsumexp((f.x.shape[-1] - 2) * r.log() + log_weight + f(r), -1)

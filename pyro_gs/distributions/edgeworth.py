r"""The second-order term of the Laplace expansion of the gauge integral, direction by direction.

With ``S`` the inverse Hessian of minus the log integrand ``f`` at its mode, the expansion reads (Tierney and Kadane 1986;
Kolassa 2006, Section 6)

    log I = Laplace + 1/8 f4_abcd S_ab S_cd + 1/8 f3_abc f3_def S_ab S_cd S_ef + 1/12 f3_abc f3_def S_ad S_be S_cf + ...

Derivatives of ``f`` are minus the cumulants of the categorical laws that the rows of ``q`` are, ``n_i`` times each, so
everything is a product of matrices. The three terms are ``tr(S M)`` with a symmetric matrix ``M``, hence the sum of the
eigenvalues of ``M`` whitened by ``S``: what each direction adds. Along a direction whose tie vanishes the eigenvalue grows
like the inverse of the tie and the truth only like its logarithm: each eigenvalue ``x`` counts ``asinh(5 x) / 5``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gs.distributions.spectral import trace_asinh

# Chosen at the samples of the tables in docs/density.md, n = 9 to 20; two columns a row, where x is 1/8, ask for .24.
_SCALE = 0.2
_FLOOR = 1e-6


def floored(log_q: Tensor, n_i: Tensor) -> Tensor:
    """``exp(log_q)`` with 1e-6 of every row spread over its ``n_i`` allowed entries, (b, k, k)."""
    spread = torch.where(log_q > -torch.inf, _FLOOR / n_i[..., None], 0.0)
    return (1 - _FLOOR) * log_q.exp() + spread


def laplacian(ties: Tensor) -> Tensor:
    """Laplacian (b, k, k) of symmetric ties; their diagonal does not matter."""
    ties = ties - torch.diag_embed(ties.diagonal(0, -2, -1))
    return torch.diag_embed(ties.sum(-1)) - ties


def second_order(log_q: Tensor, n_i: Tensor) -> Tensor:
    """Logarithm of the gauge integral less its Laplace approximation, to second order.

    Entries below 1e-6 count as about that: for ties that much weaker it is a part of what is missing, and bounded, with
    rounding up to 1e-3.

    Args:
        log_q: row-normalised connected components, float64, (b, k, k), with the mode at zero; -inf where forbidden.
        n_i: allowed entries of every row, (b, k).

    Returns:
        Tensor of shape (b,), differentiable any number of times.

    Example:
        >>> import math, torch
        >>> q = torch.full((1, 20, 20), -math.log(20.0), dtype=torch.float64)
        >>> second_order(q, torch.full((1, 20), 20.0, dtype=torch.float64))  # exact: 0.0831181
        tensor([0.0831], dtype=torch.float64)
    """
    q = floored(log_q, n_i)
    ties = (n_i[..., None] * q).mT @ q
    factor = torch.linalg.cholesky(laplacian(ties)[..., 1:, 1:])
    s = torch.nn.functional.pad(torch.cholesky_inverse(factor), (1, 0, 1, 0))
    s = s - s.mean(-1, keepdim=True)
    s = s - s.mean(-2, keepdim=True)
    white = torch.linalg.solve_triangular(factor, _terms(q, n_i, s, ties)[..., 1:, 1:], upper=False)
    white = torch.linalg.solve_triangular(factor, white.mT, upper=False)
    return _SCALE * trace_asinh(0.5 * (white + white.mT) / _SCALE)


def _terms(q: Tensor, n_i: Tensor, s: Tensor, ties: Tensor) -> Tensor:
    """The matrix ``M`` of the module, (b, k, k).

    Row ``i`` sees the columns' potentials less their mean under ``q_i``; ``mixed[i, c]`` and ``t[i, k]`` are the
    covariances of that mean with the potential of column ``c`` and with the mean of row ``k``.

    Args:
        q: (b, k, k).
        n_i: (b, k).
        s: covariances of potentials, (b, k, k), with rows and columns that sum to zero.
        ties: ``q^T diag(n) q``.
    """
    n = n_i[..., None]
    w = n * q
    mixed = q @ s
    t = mixed @ q.mT
    own = t.diagonal(0, -2, -1)[..., None]
    variance = s.diagonal(0, -2, -1)[..., None, :] - 2 * mixed + own
    variance = variance - (q * variance).sum(-1, keepdim=True)
    # fourth cumulants with two places filled: the fourth moments less one of the products, and the other two products
    weighted = (w * mixed).mT
    cross = weighted @ q
    paired = ties * s - cross - cross.mT + (w * own).mT @ q
    # third cumulants, each with two of its own places filled, and joined by the last
    v = (w * variance).sum(-2)
    y = (s @ v[..., None]).mT
    y = y - (q * y).sum(-1, keepdim=True)
    weight = w * (y / 12 - variance / 8)
    cross = weight.mT @ q
    joined = torch.diag_embed(weight.sum(-2)) - cross - cross.mT + v[..., :, None] * v[..., None, :] / 24
    return joined + paired / 4 + _triple(q, w, n, s, mixed, t) / 12


def _triple(q: Tensor, w: Tensor, n: Tensor, s: Tensor, mixed: Tensor, t: Tensor) -> Tensor:
    """Third cumulants of all pairs of rows joined in three places, one of them open, (b, k, k).

    ``sum_ik n_i n_k sum_cd q_ic q_kd C_cd^2 (e_c - q_i)(e_d - q_k)'``, ``C_cd = s_cd - mixed_id - mixed_kc + t_ik`` the
    covariance of what row ``i`` sees of ``c`` and row ``k`` of ``d``; the square is multiplied out.
    """
    m = w.sum(-2)[..., :, None]
    wt, squared = w.mT, mixed.square()
    product = wt @ mixed
    through = wt @ t
    square_of_t = wt @ t.square()
    square = wt @ squared
    half = square * m.mT - 2 * s * product * m.mT - 2 * (wt @ (mixed * through.mT))
    both = m * m.mT * s.square() + half + half.mT + square_of_t @ w + 2 * s * (through @ w) + 2 * product * product.mT
    rows = squared @ wt
    one = m * (s.square() @ wt) + wt @ rows - 2 * (s * product) @ wt
    one = one + n.mT * (2 * mixed.mT * through - m * squared.mT - square_of_t)
    none = w @ s.square() @ wt - n * rows - (n * rows).mT + n * n.mT * t.square()
    single = one @ q
    return both - single - single.mT + q.mT @ none @ q

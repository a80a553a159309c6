r"""The Sinkhorn operator ``S``, converged, with its implicit gradient.

``S(X / tau)`` is the doubly stochastic matrix ``exp(X / tau + u 1' + 1 v')``. Its potentials maximise the concave dual

    f(v) = sum_j c_j v_j - sum_i r_i logsumexp_j(Z_ij + v_j),        Z = X / tau,

which :func:`solve_sinkhorn` does by damped Newton steps, each followed by one plain sweep, from high temperature down
(Sinkhorn and Knopp 1967 for the operator; Brauer, Clason, Lorenz and Wirth 2017 for Newton on the dual). The Hessian
is the graph Laplacian of :mod:`pyro_gs.ops.laplacian`; the gradient of the result is one more solve with it, so memory
does not depend on the number of iterations. All of it happens in float64, whatever the dtype of the input.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor

from pyro_gs.ops.batching import apply_batched
from pyro_gs.ops.implicit import SinkhornSolution, SinkhornWarning, scale
from pyro_gs.ops.logits import (
    broadcast_batch,
    check_floating,
    check_logits,
    check_square,
    check_temperature,
    first_position,
    warn_user,
)
from pyro_gs.ops.padding import Assignment, Capacities
from pyro_gs.ops.support import Support, component_sums, find_support

_DEFAULT_TOL = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def may_forbid(logits: Tensor) -> bool:
    """Whether an entry is ``-inf``; True where a transformation or the compiler hides the values."""
    detached = logits.detach()
    if torch.compiler.is_compiling():
        return True
    try:
        return detached.numel() > 0 and bool(detached.amin() == -torch.inf)
    except RuntimeError:  # under vmap, which has no single answer
        return True


def scaled_logits(logits: Tensor, temperature: float | Tensor, noise: Tensor | None = None) -> Tensor:
    """``(logits + noise) / temperature`` in float64 up to a shift of every row, ``-inf`` where ``logits`` are.

    No gradient is NaN. The largest entry of a row is subtracted first, so that a large common shift is not rounded at the
    scale of its quotient; ``S`` and its derivatives do not depend on it. ``noise`` may have more batch dimensions.
    """
    top = logits.detach().amax(-1, keepdim=True).double()
    z = logits.double() - torch.where(top.isfinite(), top, 0.0)
    forbidden = z.detach() == -torch.inf if may_forbid(logits) else None
    if forbidden is not None:
        z = z.masked_fill(forbidden, 0.0)
    if noise is not None:
        z = z + noise
    z = z / (temperature.double()[..., None, None] if isinstance(temperature, Tensor) else float(temperature))
    return z if forbidden is None else z.masked_fill(forbidden, -torch.inf)


def scaled_problem(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    """Logits with the batch of a temperature too, :func:`scaled_logits` of them, and the temperature, detached."""
    if not isinstance(temperature, Tensor):
        return logits, scaled_logits(logits, temperature), temperature
    if temperature.dim():
        logits = logits.expand(*broadcast_batch(temperature, logits), *logits.shape[-2:])
    return logits, scaled_logits(logits, temperature), temperature.detach()


def check_temperature_kind(temperature: float | Tensor) -> None:
    """Raise for a bad number or a tensor that is not floating; a tensor's values are looked at inside the solver."""
    if isinstance(temperature, Tensor):
        check_floating(temperature, "temperature")
    else:
        check_temperature(temperature)


def check_options(tol: float | None, max_iter: int | None, num_iters: int | None = None) -> None:
    """Raise ``ValueError`` for a bad tolerance, cap or number of sweeps."""
    if tol is not None and (isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < math.inf):
        raise ValueError(f"tol must be positive and finite, but is {tol}")
    for name, value in (("max_iter", max_iter), ("num_iters", num_iters)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, but is {value!r}")
    if num_iters is not None and not (tol is None and max_iter is None):
        raise ValueError(
            f"num_iters={num_iters} asks for a fixed number of sweeps, so tol and max_iter must be None, "
            f"but are tol={tol}, max_iter={max_iter}"
        )


def default_tol(dtype: torch.dtype) -> float:
    """Marginal error that a dtype is solved to: 1e-10 in float64, 2e-6 in float32."""
    return _DEFAULT_TOL[dtype]


def warn_unconverged(tol: float, solution: SinkhornSolution, temperature: float | Tensor | None) -> None:
    """Issue a :class:`SinkhornWarning` if an item of a solution missed its tolerance, ``ValueError`` if it has NaN."""
    if bool(solution.converged.all()):
        return
    worst = float(solution.residual.max())
    count = int((~solution.converged).sum())
    if math.isnan(worst):
        quotient = "logits" if temperature is None else "logits / temperature"
        raise ValueError(
            f"{quotient} differ by so much that float64 cannot tell what is left of them, in "
            f"{int(solution.residual.isnan().sum())} of {solution.converged.numel()} matrices; forbid pairs by -inf"
        )
    about = "logits as given" if temperature is None else _temperature_range(temperature)
    warn_user(
        f"Sinkhorn stopped after {int(solution.iterations.max())} Newton steps with a marginal error of {worst:.2e}, "
        f"above tol={tol:.1e}, for {count} of {solution.converged.numel()} matrices ({about}); raise max_iter, tol or "
        "the temperature",
        SinkhornWarning,
    )


def _temperature_range(temperature: float | Tensor) -> str:
    if not isinstance(temperature, Tensor):
        return f"temperature {temperature:g}"
    temperature = temperature.detach()
    low, high = float(temperature.min()), float(temperature.max())
    return f"temperature {low:g}" if low == high else f"temperatures {low:g} to {high:g}"


def solve_sinkhorn(
    logits: Tensor,
    *,
    row_sums: Tensor | None = None,
    column_sums: Tensor | None = None,
    tol: float | None = None,
    max_iter: int | None = None,
    throw: bool = False,
) -> SinkhornSolution:
    r"""Scale ``exp(logits)`` to given row and column sums, and say how well that went.

    Finds potentials with ``log P = logits + u[:, None] + v[None, :]``. Entries of ``-inf`` stay forbidden; allowed
    entries that lie on no permutation are forbidden too, with a :class:`SupportWarning`.

    Differentiation: ``log_p`` carries the implicit derivatives of :func:`log_sinkhorn`; ``u`` and ``v`` carry none.
    With sums of one the logarithms are as exact as there; with others they are where no group of columns is tied to the
    rest by less than 1e-6.

    Args:
        logits: shape (..., n, n), without NaN and +inf.
        row_sums: positive, shape (..., n), by default ones.
        column_sums: positive, shape (..., n), by default ones; must have the total of ``row_sums``, in every
            component of the entries that lie on a permutation. Neither may require a gradient.
        tol: largest error of a marginal, by default 1e-10 in float64 and 2e-6 in float32.
        max_iter: cap on Newton steps, by default 500.
        throw: raise instead of warn when the cap is met.

    Returns:
        A :class:`SinkhornSolution`; ``converged`` is honest also where no warning is wanted.

    Raises:
        TypeError: not a floating tensor.
        ValueError: bad logits, no permutation allowed, sums that are not positive or do not agree, bad options.
        RuntimeError: with ``throw=True``, not converged.

    Warns:
        SinkhornWarning: not converged, with the residual.

    Example:
        >>> import torch
        >>> solution = solve_sinkhorn(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
        >>> solution.log_p.exp()
        tensor([[0.2689, 0.7311],
                [0.7311, 0.2689]])
        >>> bool(solution.converged)
        True
    """
    check_square(logits, "logits")
    check_floating(logits, "logits")
    check_options(tol, max_iter)
    for name, sums in (("row_sums", row_sums), ("column_sums", column_sums)):
        if sums is not None:
            _check_shape(sums, name, logits)
            with contextlib.suppress(RuntimeError):  # under vmap, which hides values, they are looked at inside
                _check_sums(sums, name)
    tol = default_tol(logits.dtype) if tol is None else tol
    slack = max((100 * torch.finfo(s.dtype).eps for s in (row_sums, column_sums) if s is not None), default=0.0)

    def report(found: SinkhornSolution, _: None) -> None:
        if throw and not bool(found.converged.all()):
            raise RuntimeError(
                f"solve_sinkhorn did not converge: marginal error {float(found.residual.max()):.2e} > tol={tol:.1e}"
            )
        warn_unconverged(tol, found, None)

    top = logits.detach().amax(-1).double()
    top = torch.where(top.isfinite(), top, 0.0)
    found = scale(
        logits.double() - top[..., None], None, row_sums, column_sums, tol=tol, max_iter=max_iter or 500, relative=True,
        checks=(functools.partial(_check_problem, slack=slack), logits.detach(), None), report=report,
    )  # fmt: skip
    dtype = logits.dtype
    return found._replace(
        log_p=found.log_p.to(dtype), u=(found.u - top).to(dtype), v=found.v.to(dtype), residual=found.residual.to(dtype)
    )


def _check_problem(
    z: Tensor,
    logits: Tensor,
    temperature: float | Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    slack: float = 0.0,
) -> Support:
    """Look at values; the support of the logits."""
    check_logits(logits)
    if temperature is not None:
        check_temperature(temperature)
    check_overflow(z, logits)
    support = find_support(logits > -torch.inf)
    for name, sums in (("row_sums", rows), ("column_sums", columns)):
        if sums is not None:
            _check_sums(sums, name)
    if rows is not None or columns is not None:
        _check_totals(rows, columns, z, support, slack)
    return support


def check_overflow(z: Tensor, logits: Tensor) -> None:
    """Raise if logits / temperature is beyond what a float64 sum can hold."""
    detached = z.detach()
    if z.numel() and not bool(torch.where(logits > -torch.inf, detached, 0.0).abs().amax() < 1e150):
        raise ValueError(
            "logits / temperature overflows: expected magnitudes below 1e150; rescale logits or raise temperature"
        )


def _check_shape(sums: Tensor, name: str, logits: Tensor) -> None:
    n = logits.shape[-1]
    if not isinstance(sums, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (..., {n}), but is {type(sums).__name__}")
    check_floating(sums, name)
    if sums.requires_grad:
        raise ValueError(f"{name} must not require a gradient: the solution is differentiated in logits only")
    if sums.dim() < 1 or sums.shape[-1] != n:
        raise ValueError(f"{name} must have shape (..., {n}) to fit logits, but has shape {tuple(sums.shape)}")
    try:
        torch.broadcast_to(sums, logits.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(sums.shape)} does not broadcast to {tuple(logits.shape[:-1])}, the batch of logits"
        ) from None


def _check_sums(sums: Tensor, name: str) -> None:
    bad = ~((sums > 0) & (sums < torch.inf))
    if bool(bad.any()):
        where = first_position(bad)
        raise ValueError(f"{name} must be positive and finite, but is {float(sums[where])} at {where}")


def _check_totals(rows: Tensor | None, columns: Tensor | None, z: Tensor, support: Support, slack: float) -> None:
    r, c = (torch.ones_like(z[..., 0]) if sums is None else sums for sums in (rows, columns))
    gap = component_sums(r, support, rows=True) - component_sums(c, support)
    bad = gap.abs() > slack * r.sum(-1, keepdim=True)
    if bool(bad.any()):
        where = first_position(bad)
        raise ValueError(
            "row_sums and column_sums must have the same total in every component of the entries that lie on a permutation "
            "(the others are not used), but differ by "
            f"{float(gap[where]):g} in item {where[:-1]}"
        )


def log_sinkhorn(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    tol: float | None = None,
    max_iter: int | None = None,
    num_iters: int | None = None,
    unmatched: float | Tensor | None = None,
    capacities: Capacities | None = None,
) -> Tensor:
    r"""Logarithm of the Sinkhorn operator, ``log S(logits / temperature)``.

    ``S`` scales ``exp(logits / temperature)`` to row and column sums of one (Mena et al. 2018, equation 1). It does not
    change under ``logits + r[:, None] + c[None, :]``. Exact in relative terms: entries far below the marginal error, and
    below what ``exp`` can hold, have logarithms right to about 1e-7 and to rounding of ``logits / temperature``.

    **Promise.** For n up to 2,000, temperatures from 100 down to 0.001 and logits up to 1e4 in size, with ties, forbidden
    entries, components or noise: no marginal is off by more than 1e-10 in float64 or 2e-6 in float32; the result is that
    scaling of ``exp(logits / temperature)``, of logits within rounding of those given, and not merely some doubly
    stochastic matrix; no NaN; and if not, a :class:`SinkhornWarning` says so (``tests/ops/test_sinkhorn_promise.py``,
    ``benchmarks/promise.py``).

    **Differentiation.** Implicit, one linear solve whatever the number of iterations, any number of times, by reverse and
    forward mode (``torch.func.jvp``, but not forward mode inside forward mode, which torch gets wrong for custom functions)
    and under ``torch.func.vmap``; ``torch.compile`` leaves the solver as it is. The gradient is exactly zero at forbidden
    entries, and exact in relative terms like the entries, also where they underflow. If the solver was cut short by
    ``max_iter`` at a marginal error above 2e-6, the backward pass of such an item raises ``RuntimeError``. With
    ``num_iters`` the sweeps are unrolled and the gradient is theirs.

    **Partial and one-to-many.** With ``unmatched`` a row may stay unmatched at a score, with ``capacities`` a column may
    take several rows; then logits may be rectangular. The result is optimal transport with a dustbin row and column (Sarlin
    et al. 2020), whose limit at zero temperature is ``matching`` with the same arguments: rows sum to at most one (to one
    where they must be matched), columns to at most their capacity (:func:`pyro_gs.pad_logits`).

    **Rectangular problems.** For n rows and m > n columns, of which m - n stay free, add m - n rows of zeros, which take
    the free columns: ``torch.nn.functional.pad(logits, (0, 0, 0, m - n))``, and read the first n rows of the result. By
    invariance to shifts of rows any constant does. Their rows sum to one and their columns to at most one.

    Args:
        logits: log-potentials (not probabilities), shape (..., n, n), larger is better; ``-inf`` forbids a pair.
        temperature: positive; a number or a tensor that broadcasts to the batch shape.
        tol: largest error of a marginal, by default 1e-10 in float64 and 2e-6 in float32 (half precision is computed
            in float64 inside and cast back). Larger ones than 2e-6 save nothing: the solver goes on to there, where the
            gradient is that of what is returned.
        max_iter: cap on Newton steps, by default 500.
        num_iters: instead of converging, take exactly this many sweeps (a row and a column normalisation each), the
            paper's truncated operator; its rows do not sum to one.
        unmatched: score of a row that stays unmatched, a number or a tensor that broadcasts to (..., n); divided by the
            temperature like the logits, of shape (..., n, m) then.
        capacities: how many rows a column may take, an integer for all or one for each of the m columns.

    Returns:
        Tensor of the shape, dtype and device of ``logits``; ``-inf`` where forbidden.

    Raises:
        TypeError: not a floating tensor.
        ValueError: bad logits or temperature, or a mask that allows no permutation.
        RuntimeError: in the backward pass, no solution to differentiate at.
        NotImplementedError: forward mode inside forward mode.

    Warns:
        SinkhornWarning: the cap was met before the tolerance.
        SupportWarning: allowed entries lie on no permutation; they come out as ``-inf``.

    Example:
        >>> import torch
        >>> X = torch.tensor([[0.0, 1.0, 3.0], [0.0, 2.0, 2.0]])  # two rows, three columns: one stays free
        >>> log_sinkhorn(torch.nn.functional.pad(X, (0, 0, 0, 1))).exp()[:2].sum(-1)
        tensor([1., 1.])
    """
    options = (temperature, tol, max_iter, num_iters)
    if unmatched is None and capacities is None:
        return _operator(logits, *options, relative=True)
    problem = Assignment(logits, unmatched, capacities)
    log_p = _operator(problem.padded(warn=True), *options, relative=True)
    return _of_columns(log_p, problem)


def sinkhorn(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    tol: float | None = None,
    max_iter: int | None = None,
    num_iters: int | None = None,
    unmatched: float | Tensor | None = None,
    capacities: Capacities | None = None,
) -> Tensor:
    """The Sinkhorn operator ``S(logits / temperature)``: a doubly stochastic matrix.

    See :func:`log_sinkhorn` for arguments, gradient, errors, warnings and what is promised. Entries are right to ``tol``;
    where the matrix is a permutation up to small entries these are right in relative terms, for n up to 64, so that the
    gradient is right to six digits of its largest entry.

    Returns:
        Tensor of the shape, dtype and device of ``logits``; exactly zero where forbidden.

    Example:
        >>> import torch
        >>> X = -torch.tensor([[1.0, 2.0], [2.0, 1.0]])
        >>> sinkhorn(X, temperature=0.005)
        tensor([[1., 0.],
                [0., 1.]])
    """
    options = (temperature, tol, max_iter, num_iters)
    if unmatched is None and capacities is None:
        return _operator(logits, *options, relative=False).exp()
    problem = Assignment(logits, unmatched, capacities)
    return _of_columns(_operator(problem.padded(warn=True), *options, relative=False), problem).exp()


def _of_columns(log_p: Tensor, problem: Assignment) -> Tensor:
    """What columns take, from a solution of the padded problem: their copies are alike."""
    n = problem.shape[0]
    capacity = torch.tensor(problem.capacities, device=log_p.device)
    first = (capacity.cumsum(0) - capacity).clamp(max=log_p.shape[-1] - 1)
    out = log_p[..., :n, first] + capacity.to(log_p.dtype).log()
    return out.masked_fill(capacity == 0, -torch.inf)


def _operator(
    logits: Tensor,
    temperature: float | Tensor,
    tol: float | None,
    max_iter: int | None,
    num_iters: int | None,
    *,
    relative: bool,
) -> Tensor:
    check_square(logits, "logits")
    check_floating(logits, "logits")
    check_temperature_kind(temperature)
    check_options(tol, max_iter, num_iters)
    logits, z, about = scaled_problem(logits, temperature)
    if num_iters is not None:
        return _sweeps(z, logits.detach(), about, num_iters).to(logits.dtype)
    tol = default_tol(logits.dtype) if tol is None else tol
    found = scale(
        z, None, tol=tol, max_iter=max_iter or 500, relative=relative,
        checks=(_check_problem, logits.detach(), about),
        report=functools.partial(warn_unconverged, tol),
    )  # fmt: skip
    return found.log_p.to(logits.dtype)


def _sweeps(z: Tensor, logits: Tensor, temperature: float | Tensor, count: int) -> Tensor:
    """``count`` plain sweeps, each a row and a column normalisation, that autograd follows."""
    # Looking at values would break the capture of a CUDA graph; there the first, uncaptured calls have done it.
    if not (z.is_cuda and torch.cuda.is_current_stream_capturing()):
        allowed = _Checked.apply(z.detach(), logits, temperature)
        if may_forbid(logits):
            z = z.masked_fill(~allowed, -torch.inf)
    for _ in range(count):
        z = z - torch.logsumexp(z, -1, keepdim=True)
        z = z - torch.logsumexp(z, -2, keepdim=True)
    return z


class _Checked(torch.autograd.Function):
    """Checks of values, and the pruned support (..., n, n), also where a transformation hides the values."""

    @staticmethod
    def forward(z: Tensor, logits: Tensor, temperature: float | Tensor) -> Tensor:
        """Check."""
        allowed = _check_problem(z, logits, temperature, None, None).allowed
        return torch.ones_like(z, dtype=torch.bool) if allowed is None else allowed.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to keep."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, None, None]:
        """No gradient."""
        return None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """One more batch dimension."""
        return apply_batched(_Checked, info, in_dims, args)

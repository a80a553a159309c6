r"""Functions of symmetric matrices that can be differentiated where eigenvalues coincide, as often as one likes.

The derivative of an eigenvector divides by differences of eigenvalues; that of ``X^(-1/2)`` and of ``tr asinh X`` does
not. With ``A = X^(-1/2)``, ``A dA + dA A = -A^2 dX A^2``, a Sylvester equation, and the derivative of a solution of one is
the solution of another (Higham 2008, Functions of Matrices, Chapter 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _function(x: Tensor, values: Callable[[Tensor], Tensor]) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(x)
    out: Tensor = (vectors * values(eigenvalues)[..., None, :]) @ vectors.mT
    return out


class _Sylvester(torch.autograd.Function):
    """Solution of ``a x + x a = right`` for symmetric positive definite ``a``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, right: Tensor) -> Tensor:
        """In the eigenvectors of ``a``."""
        eigenvalues, vectors = torch.linalg.eigh(a)
        inner = (vectors.mT @ right @ vectors) / (eigenvalues[..., :, None] + eigenvalues[..., None, :])
        out: Tensor = vectors @ inner @ vectors.mT
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep ``a`` and the solution."""
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The operator is its own adjoint."""
        a, x = ctx.saved_tensors
        y = _Sylvester.apply(a, grad)
        return -(y @ x.mT + x.mT @ y), y

    @staticmethod
    def jvp(ctx: Any, a_t: Tensor, right_t: Tensor) -> Tensor:
        """Solve for the tangent less what the change of ``a`` does to ``x``."""
        a, x = ctx.saved_tensors
        return _Sylvester.apply(a, right_t - a_t @ x - x @ a_t)  # type: ignore[no-any-return]


class _InverseRoot(torch.autograd.Function):
    """``x^(-1/2)`` of symmetric positive definite matrices (..., n, n)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """From eigenvalues."""
        return _function(x, torch.rsqrt)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the root."""
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def _change(root: Tensor, direction: Tensor) -> Tensor:
        square = root @ root
        return _Sylvester.apply(root, -square @ (0.5 * (direction + direction.mT)) @ square)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The derivative is its own adjoint."""
        return _InverseRoot._change(ctx.saved_tensors[0], grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        """See the module."""
        return _InverseRoot._change(ctx.saved_tensors[0], tangent)


class _Slope(torch.autograd.Function):
    """``(1 + x^2)^(-1/2)``, the derivative of ``asinh``, of symmetric matrices (..., n, n)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """From eigenvalues: the square of ``x`` would lose those below 1e-8 of the largest."""
        return _function(x, lambda v: torch.rsqrt(1 + v * v))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep input and output."""
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """That of the inverse root, through the square."""
        x, slope = ctx.saved_tensors
        change = _InverseRoot._change(slope, grad)
        out: Tensor = change @ x + x @ change
        return out

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        """That of the inverse root, of the square."""
        x, slope = ctx.saved_tensors
        return _InverseRoot._change(slope, tangent @ x + x @ tangent)


class _TraceAsinh(torch.autograd.Function):
    """Sum of ``asinh`` of the eigenvalues, (...)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Eigenvalues alone."""
        out: Tensor = torch.linalg.eigvalsh(x).asinh().sum(-1)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the matrix."""
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The derivative of ``asinh``, of the matrix."""
        out: Tensor = grad[..., None, None] * _Slope.apply(ctx.saved_tensors[0])
        return out

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        """Its inner product with the tangent."""
        out: Tensor = (_Slope.apply(ctx.saved_tensors[0]) * tangent).sum((-2, -1))
        return out


def inverse_root(x: Tensor) -> Tensor:
    """``x^(-1/2)``, the symmetric one.

    Args:
        x: symmetric positive definite, float64, (..., n, n).

    Returns:
        Tensor of shape (..., n, n), differentiable any number of times.

    Example:
        >>> import torch
        >>> inverse_root(4 * torch.eye(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    return _InverseRoot.apply(x)  # type: ignore[no-any-return]


def trace_asinh(x: Tensor) -> Tensor:
    """Sum of ``asinh`` over the eigenvalues.

    Args:
        x: symmetric, float64, (..., n, n).

    Returns:
        Tensor of shape (...), differentiable any number of times.

    Example:
        >>> import torch
        >>> trace_asinh(torch.eye(2))
        tensor(1.7627)
    """
    return _TraceAsinh.apply(x)  # type: ignore[no-any-return]

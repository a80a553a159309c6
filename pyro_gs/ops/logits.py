"""What logits and a temperature must be before anything is computed from them."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import sys
import warnings
from pathlib import Path

import pyro
import torch
from torch import Tensor

from pyro_gs.ops.batching import own_memory

_LARGEST = 1e150
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


NOT_THE_USERS = (
    *(f"{path}{os.sep}" for path in (Path(__file__).parents[1], Path(torch.__file__).parent, Path(pyro.__file__).parent)),
    contextlib.__file__,
)
"""How the names of files begin in which no user has a line."""


def warn_user(message: str, category: type[Warning]) -> None:
    """Warn as of the line outside this package, Pyro and torch that led here."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(NOT_THE_USERS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def describe(index: tuple[int, ...]) -> str:
    """Name a batch position for a message: ``''`` for a single matrix, else ``' of batch item (1, 2)'``."""
    if not index:
        return ""
    return f" of batch item {index[0] if len(index) == 1 else index}"


def check_square(value: Tensor, name: str) -> None:
    """Raise unless ``value`` is a tensor of shape (..., n, n) with n >= 1."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (..., n, n), but got {type(value).__name__}")
    if value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] == 0:
        hint = _padding_hint(value, name)
        raise ValueError(f"{name} must be square in its last two dimensions, but has shape {tuple(value.shape)}{hint}")


def _padding_hint(value: Tensor, name: str) -> str:
    """What makes a rectangular problem square: rows (or columns) that take what is left over."""
    if name != "logits" or value.dim() < 2 or 0 in value.shape[-2:]:  # of no use to what is a matrix of probabilities
        return ""
    n, m = value.shape[-2:]
    pad = f"(0, 0, 0, {m - n})" if m > n else f"(0, {n - m})"
    what = "columns" if m > n else "rows"
    return f"; to leave {abs(m - n)} of the {what} free, use torch.nn.functional.pad(logits, {pad})"


def check_floating(value: Tensor, name: str, *, half: bool = True) -> None:
    """Raise ``TypeError`` unless ``value`` has a floating dtype (with ``half=False``: float32 or float64)."""
    kinds = _FLOATS if half else _FLOATS[2:]
    if value.dtype not in kinds:
        wanted = "a floating dtype" if half else "dtype torch.float32 or torch.float64"
        hint = "" if value.is_complex() else f"; convert it, for example {name}.double()"
        raise TypeError(f"{name} must have {wanted}, but has {value.dtype}{hint}")


def first_position(bad: Tensor) -> tuple[int, ...]:
    """Index of the first True of a boolean tensor."""
    return tuple(int(i) for i in bad.nonzero()[0])


def check_logits(logits: Tensor, name: str = "logits", *, half: bool = True) -> None:
    """Raise unless ``logits`` is a floating (..., n, n) tensor without NaN and without +inf.

    Args:
        logits: log-potentials, shape (..., n, n); ``-inf`` forbids a pair.
        name: the argument's name in messages.
        half: accept float16 and bfloat16.

    Raises:
        TypeError: not a tensor, or not a floating dtype.
        ValueError: not square, or an entry is NaN or +inf; the message names its position and batch item.
    """
    check_square(logits, name)
    check_floating(logits, name, half=half)
    check_entries(logits, name)


def check_entries(logits: Tensor, name: str) -> None:
    """Raise ``ValueError`` if an entry of a tensor (..., n, m) is NaN, +inf, or so large that sums may overflow."""
    if logits.numel() == 0:
        return
    detached = logits.detach()
    # One reduction (and one host transfer) in the good case: a maximum is NaN or +inf if any entry is.
    if bool((detached.amax() < torch.inf).item()):
        return
    bad = detached.isnan() | (detached == torch.inf)
    position = first_position(bad)
    batch, (row, column) = position[:-2], position[-2:]
    value = float(detached[position])
    raise ValueError(
        f"{name}{describe(batch)} has the entry {value} at row {row}, column {column}; entries must be finite, "
        "or -inf to forbid a pair"
    )


def check_magnitude(x: Tensor, name: str) -> None:
    """Raise ``ValueError`` if a finite entry is 1e150 or more in size, beyond which sums and products may overflow."""
    x = x.detach()
    if x.dtype == torch.float64 and x.numel():
        size = torch.where(x.isfinite(), x, 0.0).abs()
        if not bool(size.amax() < _LARGEST):
            at = first_position(size >= _LARGEST)
            raise ValueError(
                f"{name} must be below {_LARGEST:g} in size, so that sums hold, but is {float(x[at]):g} at {at}"
            )


def without_offsets(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (..., n, m) less the largest entry of every row and then of every column, which are taken as constants.

    What rows and columns have in common says nothing of a law, and would cost digits.

    Returns:
        The difference, none above zero, and what rows (..., n) and columns (..., m) had.
    """
    rows = x.detach().amax(-1)
    y = x - rows[..., None]
    columns = y.detach().amax(-2)
    return y - columns[..., None, :], rows, columns


def check_temperature(temperature: float | Tensor, name: str = "temperature", *, zero: bool = False) -> None:
    """Raise unless a temperature is a positive (with ``zero``: non-negative) finite number or a floating tensor of such."""
    wanted = "at least 0 and finite" if zero else "positive and finite"
    if isinstance(temperature, Tensor):
        check_floating(temperature, name)
        bad = ~(((temperature >= 0) if zero else (temperature > 0)) & (temperature < torch.inf))
        if bool(bad.any()):
            where = first_position(bad) if bad.dim() else ()
            at = f" at {where}" if where else ""
            raise ValueError(f"{name} must be {wanted}, but is {float(temperature[where].detach())}{at}")
    elif isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, but is {type(temperature).__name__}")
    elif not 0 <= float(temperature) < math.inf or (temperature == 0 and not zero):
        raise ValueError(f"{name} must be {wanted}, but is {temperature}")


def cast_temperature(temperature: float | Tensor, like: Tensor, name: str = "temperature", *, zero: bool = False) -> Tensor:
    """A temperature with the dtype and device of ``like``, checked before and after.

    Raises:
        TypeError: as :func:`check_temperature`.
        ValueError: likewise, also where the dtype rounds it to zero or to infinity.
    """
    check_temperature(temperature, name, zero=zero)
    tau = torch.as_tensor(temperature, dtype=like.dtype, device=like.device)
    try:
        check_temperature(tau, name, zero=zero)
    except ValueError as error:
        raise ValueError(f"{error} in {like.dtype}") from None
    return own_memory(tau, 0)


def check_count(value: int, name: str, *, least: int) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, but is {value!r}")


def broadcast_batch(temperature: Tensor, logits: Tensor, name: str = "logits") -> torch.Size:
    """Batch shape of logits (..., n, n), or what else ``name`` says, at a tensor of temperatures.

    Raises:
        ValueError: the two do not broadcast.
    """
    try:
        return torch.Size(torch.broadcast_shapes(temperature.shape, logits.shape[:-2]))
    except RuntimeError:
        raise ValueError(
            f"temperature of shape {tuple(temperature.shape)} does not broadcast with {tuple(logits.shape[:-2])}, the batch "
            f"shape of {name}"
        ) from None

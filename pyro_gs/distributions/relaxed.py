"""Relaxed permutations that remember their logarithm.

At low temperature most entries of a relaxed sample are below what floating point can hold, and its density cannot be
computed from it. So :class:`RelaxedPermutation` is a tensor that carries ``log P`` along: through a trace, through
replay into another law's ``log_prob``, and through the operations that only move or copy it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro.ops.provenance import ProvenanceTensor, detach_provenance, extract_provenance, track_provenance
from torch import Tensor
from torch.utils._pytree import tree_map

# Operations that copy, move or select without changing a number: done to the logarithm as well.
_CARRIED = {
    "clone", "detach", "contiguous", "expand", "expand_as", "broadcast_to", "to", "double", "float", "cpu", "cuda",
    "reshape", "view", "unsqueeze", "squeeze", "flatten", "unflatten", "movedim", "index_select", "__getitem__",
}  # fmt: skip


_CONVERSIONS = {"to", "double", "float", "cpu", "cuda"}
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class _Log:
    """A logarithm, or a function that computes it when it is first needed, with gradients as at the time of its making."""

    def __init__(self, source: Tensor | Callable[[], Tensor], version: int) -> None:
        self.source = source
        self.version = version
        self.grad = torch.is_grad_enabled()

    def __call__(self) -> Tensor:
        if not isinstance(self.source, Tensor):
            with torch.set_grad_enabled(self.grad):
                self.source = self.source()
        return self.source


class _Link(torch.autograd.Function):
    """A logarithm that came along, as a function of a value that became a leaf."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, log_p: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return log_p.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        return torch.where(value > 0, grad / value.clamp(min=torch.finfo(value.dtype).tiny), 0.0), None


def _version(value: Tensor) -> int:
    """Number of changes in place, through whichever view."""
    with torch._C.DisableTorchFunctionSubclass():
        return 0 if value.is_inference() else value._version


class RelaxedPermutation(Tensor):
    """A doubly stochastic tensor (..., n, n) with its logarithm; a hard one has that of the relaxed one behind it.

    Copies, moves, expansions and selections of batch items keep the logarithm; every other operation returns a plain
    tensor, and a change in place, through a view too, drops it.
    """

    _log: _Log | None
    bound: Callable[[Any], Tensor] | None

    @staticmethod
    def wrap(
        p: Tensor, log_p: Tensor | Callable[[], Tensor], bound: Callable[[Any], Tensor] | None = None
    ) -> RelaxedPermutation:
        """Attach a logarithm, or a function that computes it when it is first needed.

        Args:
            p: shape (..., n, n).
            log_p: its logarithm, float64, or a function of no arguments that returns it.
            bound: what a guide with a KL objective puts in place of log densities (``infer/objective.py``); copies and
                selections lose it.
        """
        out = p.as_subclass(RelaxedPermutation)
        out._log = _Log(log_p, _version(out))
        out.bound = bound
        return out

    @property
    def log_p(self) -> Tensor | None:
        """The logarithm, float64, or None after an operation in place."""
        log = self.__dict__.get("_log")
        return None if log is None or log.version != _version(self) else log()

    @property
    def log_source(self) -> Callable[[], Tensor]:
        """The logarithm as a function, which computes it when it is first called."""
        log: Callable[[], Tensor] = self.__dict__["_log"]
        return log

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` on plain tensors; carry the logarithm along where that is right."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        source = args[0] if args and isinstance(args[0], RelaxedPermutation) else None
        if source is None:
            return out
        log = source.__dict__.get("_log")
        if func == _SET_DATA:
            source._log = source.bound = None
        elif (
            log is not None
            and log.version == _version(source)
            and name in _CARRIED
            and isinstance(out, Tensor)
            and out.shape[-2:] == source.shape[-2:]
        ):

            def moved() -> Tensor:
                log_p: Tensor = log()
                if name in _CONVERSIONS:  # the logarithm stays in float64
                    return log_p.to(out.device)
                with torch._C.DisableTorchFunctionSubclass():
                    result: Tensor = func(*tree_map(lambda x: log_p if x is source else x, args), **kwargs)
                    return result

            return RelaxedPermutation.wrap(out, moved)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Copy the logarithm too; like every tensor, only without a history."""
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        log_p = None if self.log_p is None else copy.deepcopy(self.log_p.detach(), memo)
        out = _rebuild(copy.deepcopy(plain(self), memo), log_p)
        memo[id(self)] = out
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle with the logarithm, without the functions."""
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(Tensor)
        return (_rebuild, (plain, self.log_p))


def _rebuild(p: Tensor, log_p: Tensor | None) -> Tensor:
    return p if log_p is None else RelaxedPermutation.wrap(p, log_p)


def plain(value: Tensor) -> Tensor:
    """The value without its subclass."""
    if isinstance(value, RelaxedPermutation):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    return value


def carries_log(value: Tensor) -> bool:
    """Whether a logarithm travels with the value."""
    value = detach_provenance(value)
    return isinstance(value, RelaxedPermutation) and value.log_p is not None


def log_of(value: Tensor) -> Tensor:
    """``log(value)`` in float64: the one that travelled with it, else computed."""
    if isinstance(value, ProvenanceTensor):  # as in pyro.render_model
        inner: Any
        inner, provenance = extract_provenance(value)
        return track_provenance(log_of(inner), provenance)  # type: ignore[no-any-return]
    if isinstance(value, RelaxedPermutation):
        log_p = value.log_p
        if log_p is not None:
            if value.requires_grad and not log_p.requires_grad:
                return _Link.apply(plain(value).double(), log_p)  # type: ignore[no-any-return]
            return log_p
    p = plain(value).double()
    inside = p > 0  # where no pair is allowed the logarithm has no gradient
    return torch.where(inside, torch.where(inside, p, 1.0).log(), -torch.inf)

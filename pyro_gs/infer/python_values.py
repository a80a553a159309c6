"""Whether a function makes Python values of some tensors, which ties what it does to the values at hand."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pyro_gs.ops.logits import NOT_THE_USERS

_READERS = {
    *(Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__complex__, Tensor.__contains__),
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.is_nonzero, Tensor.equal, Tensor.allclose),
    *(torch.is_nonzero, torch.equal, torch.allclose),
}

_METHODS = (torch._tensor.__file__, torch.overrides.__file__)
"""Files of torch between a line and a method that is written in Python, such as ``__contains__``."""


class PythonValues(TorchFunctionMode):
    """Follows tensors through torch's functions; a context manager.

    What a function makes of tensors that are followed is followed too, and a tensor into which they are written. What comes
    by way of numpy, of a ``torch.autograd.Function``, or of a view into which they are copied, is lost.

    Args:
        followed: tensors.

    Attributes:
        read_at: file and line outside of torch, Pyro and this package that first made a Python value of one, as by ``if``,
            ``float``, ``torch.equal`` or ``numpy``; None if none has.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2), torch.ones(2)
        >>> with PythonValues([a]) as values:
        ...     first = "yes" if (b + 1).sum() > 0 else "no"
        >>> values.read_at is None
        True
        >>> with PythonValues([a]) as values:
        ...     first = "yes" if (a + 1).sum() > 0 else "no"
        >>> values.read_at is None
        False
    """

    def __init__(self, followed: Iterable[Tensor]) -> None:
        super().__init__()
        self._followed = {id(tensor): tensor for tensor in followed}  # kept, so that no other gets their ids
        self.read_at: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self._followed and any(id(leaf) in self._followed for leaf in tree_leaves((args, kwargs))):
            made = args[0] if func is Tensor.__setitem__ else found
            self._followed.update((id(leaf), leaf) for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
            if self.read_at is None and func in _READERS:
                frame = sys._getframe(1)
                while frame.f_back is not None and frame.f_code.co_filename in _METHODS:
                    frame = frame.f_back
                if not frame.f_code.co_filename.startswith(NOT_THE_USERS):
                    self.read_at = f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
        return found

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        self._followed = {}

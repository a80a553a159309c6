"""Random states that are put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from pyro.util import get_rng_state, set_rng_state

__all__ = ["randomness_kept"]


@contextlib.contextmanager
def randomness_kept() -> Iterator[None]:
    """Put back the states of torch's, NumPy's and Python's generators in the end, also after an exception.

    For what runs a model, which draws, in order to say something that is not random.

    Example:
        >>> import torch
        >>> state = torch.get_rng_state()
        >>> with randomness_kept():
        ...     _ = torch.rand(3)
        >>> torch.equal(torch.get_rng_state(), state)
        True
    """
    state, cuda = get_rng_state(), list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            set_rng_state(state)

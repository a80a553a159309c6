"""One process of several that torchrun has started, or the only one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed

__all__ = ["from_first", "joined", "rank", "world_size"]

T = TypeVar("T")


@contextlib.contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Join the processes of ``torchrun``, if there are any, while the block runs.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. Of several processes on ``"cuda"`` each takes the one of its local
            rank. They talk through NCCL there, and through gloo on processors.

    Yields:
        The device of this process.

    Raises:
        ValueError: If there is no such device here.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: expected 'cpu', 'cuda' or 'cuda:1', got {error}") from None
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: expected 'cpu', 'cuda' or 'cuda:1'")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: expected a device that is here; torch sees {torch.cuda.device_count()} GPUs")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield place
        return
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    torch.distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield place
    finally:
        torch.distributed.destroy_process_group()


def world_size() -> int:
    """How many processes have joined; 1 outside of `joined`."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, counted from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def from_first(value: T) -> T:
    """What the first process has given, in all of them; each must call it."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]

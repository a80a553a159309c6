"""Training that a kill does not harm, on one process or several."""

from __future__ import annotations

import contextlib
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from tutorials.file_sizes import check_size, check_unpacked
from tutorials.processes import from_first, rank, world_size

__all__ = ["load_checkpoint", "train"]

_SMOOTHING = 0.98  # of the loss that the bar shows


def train(
    objective: nn.Module,
    steps: int,
    *,
    path: Path | None,
    seed: int,
    settings: Mapping[str, Any],
    learning_rate: float = 1e-3,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    title: str | None = None,
    every: float = 30.0,
) -> list[float]:
    """Minimize a loss by Adam.

    The checkpoint holds parameters, buffers, optimizer, losses and the states of the random number generators; a run that
    was killed goes on from the last one and ends in the same numbers as one that was not (on one machine). One that is
    complete is loaded and no step is done.

    Under ``torchrun`` (see `tutorials.processes.joined`) gradients are averaged over the processes, whose generators have
    seeds of their own: the loss is that of as many batches a step as there are processes.

    Args:
        objective: Its ``forward(generator, share)`` draws a batch with a ``torch.Generator`` of the processor and returns a
            scalar loss; ``share`` is the part of the steps that is done, from 0 to 1. Random numbers of torch's global
            generator (noise of a layer) are reproducible too. In eval mode afterwards.
        steps: At least 1.
        path: Of the checkpoint; None for none.
        seed: Of generators, not of the objective's parameters, which are there already.
        settings: What the checkpoint must agree with, as JSON holds it.
        learning_rate: Of Adam.
        scheduler: Makes a learning rate schedule, which steps after every step.
        title: Of a progress bar; None for no bar.
        every: Seconds between checkpoints.

    Returns:
        Losses of all steps, of this process's batches.

    Raises:
        ValueError: If ``steps`` is below 1, or the checkpoint is damaged, of other settings or of another number of
            processes.
        FloatingPointError: If a loss is not finite.
    """
    if steps < 1:
        raise ValueError(f"steps={steps!r}: expected an integer of at least 1")
    device = next(objective.parameters()).device
    wanted = {**settings, "steps": steps, "seed": seed, "processes": world_size()}
    optimizer = Adam(objective.parameters(), lr=learning_rate)
    schedule = None if scheduler is None else scheduler(optimizer)
    generator = torch.Generator().manual_seed(_process_seed(seed))
    losses: list[float] = []

    def save() -> None:
        own = _of_all((losses, generator.get_state(), torch.get_rng_state(), _device_state(device)))
        if path is None or rank() != 0:
            return
        part = path.with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {"settings": wanted, "processes": own}
        content |= {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
        content |= {"scheduler": None if schedule is None else schedule.state_dict()}
        torch.save(content, part)
        os.replace(part, path)

    objective.train()
    with _own_randomness(seed, device):
        if path is not None and path.exists():
            content = _load(path, device, wanted)
            try:
                objective.load_state_dict(content["objective"])
                optimizer.load_state_dict(content["optimizer"])
                if schedule is not None:
                    schedule.load_state_dict(content["scheduler"])
                before, of_batches, everywhere, on_device = content["processes"][rank()]
                losses.extend(before)
                generator.set_state(of_batches)
                torch.set_rng_state(everywhere)
                if on_device is not None:
                    torch.cuda.set_rng_state(on_device, device)
            except Exception as error:
                raise _damaged(path, error) from None
        step = objective if world_size() == 1 else DistributedDataParallel(objective)
        shown = _mean(losses)
        bar = tqdm(total=steps, initial=len(losses), desc=title, disable=title is None or rank() != 0, unit="step")
        with bar:
            saved = time.monotonic()
            while len(losses) < steps:
                loss: Tensor = step(generator, len(losses) / steps)
                value = float(loss.detach())
                if not abs(value) < float("inf"):
                    raise FloatingPointError(
                        f"{title or 'training'}: the loss is {value} at step {len(losses) + 1} of {steps}; "
                        "a lower learning rate or a higher temperature may help"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if schedule is not None:
                    schedule.step()
                losses.append(value)
                shown = value if shown is None else _SMOOTHING * shown + (1 - _SMOOTHING) * value
                bar.update()
                bar.set_postfix(loss=f"{shown:.4g}", refresh=False)
                if from_first(time.monotonic() - saved > every) or len(losses) == steps:
                    save()
                    saved = time.monotonic()
    objective.eval()
    return losses


def _process_seed(seed: int) -> int:
    return seed + 1_000_003 * rank()


def _device_state(device: torch.device) -> Tensor | None:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _mean(losses: list[float]) -> float | None:
    recent = losses[-100:]
    return sum(recent) / len(recent) if recent else None


def _of_all(value: Any) -> list[Any]:
    """What every process gives, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded, and as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=True):
        torch.manual_seed(_process_seed(seed))
        yield


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What `train` has saved: settings, states of the processes, objective, optimizer and schedule.

    Args:
        path: The file.
        device: Where tensors go.

    Raises:
        ValueError: If it is no such file. Code in it is not run.
        FileNotFoundError: If there is none.
    """
    check_size(path)
    try:
        with zipfile.ZipFile(path) as archive:
            check_unpacked(archive)
            if (member := archive.testzip()) is not None:  # torch does not look at the checksums
                raise ValueError(f"{member} is damaged")
        content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        for name in ("settings", "objective", "optimizer"):
            if not isinstance(content[name], Mapping):
                raise TypeError(f"{name} is of type {type(content[name]).__name__}")
        processes: list[tuple[Any, ...]] = [
            ([float(loss) for loss in losses], *(state if state is None else state.cpu() for state in states))
            for losses, *states in content["processes"]
        ]
        if not all(math.isfinite(loss) for losses, *_ in processes for loss in losses):
            raise ValueError("losses are not finite")
    except Exception as error:  # zipfile, torch and its unpickler raise what they meet on their way
        raise _damaged(path, error) from None
    return {**content, "processes": processes}


def _load(path: Path, device: torch.device, wanted: Mapping[str, Any]) -> dict[str, Any]:
    content = load_checkpoint(path, device)
    found = content["settings"]
    different = [name for name in {**wanted, **found} if wanted.get(name, "nothing") != found.get(name, "nothing")]
    if different:
        values = ", ".join(f"{name}={found.get(name)!r} in place of {wanted.get(name)!r}" for name in different)
        raise ValueError(f"{path}: expected a checkpoint of this run, got one with {values}; remove it or take another")
    return content


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: expected a checkpoint, got {type(error).__name__}: {error}; remove the file")

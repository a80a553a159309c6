"""Tells which digit a picture shows: trained on real digits only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutorials.pictures import mnist
from tutorials.training import train

__all__ = ["accuracy_on_real", "classified", "trained"]

_BATCH = 64


class _Training(nn.Module):
    def __init__(self, network: nn.Module, device: str) -> None:
        super().__init__()
        self.network = network
        images, labels = mnist("train")
        self._images, self._labels = images[:, None].to(device), labels.to(device)

    def forward(self, generator: torch.Generator, share: float) -> Tensor:
        """Cross entropy of a batch whose digits are shifted by up to two pixels."""
        rows = torch.randint(len(self._images), (_BATCH,), generator=generator).to(self._images.device)
        x, y = torch.randint(-2, 3, (2,), generator=generator).tolist()
        return F.cross_entropy(self.network(self._images[rows].roll((x, y), (-2, -1))), self._labels[rows])


def trained(steps: int, *, path: Path | None, device: str = "cpu", title: str | None = None) -> nn.Module:
    """The classifier: two convolutions and two linear layers.

    Args:
        steps: Of training, with batches of 64.
        path: Of its checkpoint; None for none.
        device: Where it is.
        title: Of a progress bar; None for none.

    Returns:
        From pictures (batch, 1, 28, 28) to logits (batch, 10).

    Raises:
        ValueError: As `tutorials.training.train`.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10)),
        ).to(device)
    settings = {"what": "classifier", "device": torch.device(device).type}
    train(_Training(network, device), steps, path=path, seed=0, settings=settings, title=title)
    return network


@torch.no_grad()
def classified(network: nn.Module, images: Tensor) -> Tensor:
    """Labels of pictures (batch, 1, 28, 28)."""
    return torch.cat([network(part).argmax(-1) for part in images.split(500)])


def accuracy_on_real(network: nn.Module) -> float:
    """Share of the real test digits that it tells right."""
    images, labels = mnist("test")
    device = next(network.parameters()).device
    return float((classified(network, images[:, None].to(device)).cpu() == labels).double().mean())

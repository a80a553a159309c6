"""Recordings with and without places, for the tests of preparation and of its doubts."""

import torch

from tutorials.celegans.connectome import Connectome, load_connectome
from tutorials.celegans.recordings import Recording, known_identity


def network(n: int = 20) -> Connectome:
    """The first neurons of the real table, so that places are real."""
    return load_connectome().thin(n, torch.Generator().manual_seed(0))


def recording(
    labels: list[str], *, steps: int = 30, seed: int = 0, places: torch.Tensor | None = None, name: str = "worm"
) -> Recording:
    generator = torch.Generator().manual_seed(seed)
    traces = 5 + 3 * torch.randn(steps, len(labels), generator=generator, dtype=torch.float64)
    return Recording(name, traces, tuple(labels), tuple(map(known_identity, labels)), places)


def placed(connectome: Connectome, index: list[int], *, known: int = 4, spread: float = 2.0) -> Recording:
    """A worm that shows the neurons of an index, the first of them named, near their places."""
    labels = [connectome.names[i] if m < known else f"?{m}" for m, i in enumerate(index)]
    noise = torch.randn(len(index), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return recording(labels, places=connectome.position[index] + spread * noise)

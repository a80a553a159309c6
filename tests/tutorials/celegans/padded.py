import dataclasses

import torch

from tutorials.celegans.worms import Worms


def show_less(worms: Worms, sizes: list[int], seed: int = 0) -> Worms:
    """Worms that show their first few neurons only, for different times, and bring logits."""
    n = worms.num_neurons
    observed = torch.arange(n) < torch.tensor(sizes)[:, None]
    known = worms.known & observed
    taken = (worms.allowed & known[..., None]).any(1, keepdim=True)
    times = worms.traces.shape[1]
    lengths = torch.arange(times - 1, times - 1 - len(sizes), -1)
    recorded = (torch.arange(times) <= lengths[:, None]).unsqueeze(-1) & observed.unsqueeze(1)
    logits = torch.randn(worms.allowed.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return dataclasses.replace(
        worms,
        traces=worms.traces * recorded,
        allowed=worms.allowed | (~observed[..., None] & ~taken),
        known=known,
        observed=observed,
        logits=logits * observed[..., None],
        lengths=lengths,
    )

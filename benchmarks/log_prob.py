"""Times ``log_prob`` of ``GumbelSinkhorn`` (Laplace) against its ``rsample``, forward and backward each.

The gradient of ``log_prob`` goes through the sample too, as in an ELBO.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from pyro_gs import GumbelSinkhorn

CASES = ((10, 200), (30, 50), (100, 5), (279, 1))  # rows, batch
TEMPERATURES = (1.0, 0.5, 0.2, 0.1, 0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=7, help="seeds per cell (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| n | batch | temperature | rsample, ms | log_prob, ms | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for n, batch in CASES:
        x = torch.randn(batch, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for temperature in TEMPERATURES:
            times: tuple[list[float], list[float]] = ([], [])
            for seed in range(args.repeats + 1):  # the first is a warm-up
                torch.manual_seed(seed)
                logits = x.clone().requires_grad_()
                law = GumbelSinkhorn(temperature, logits)
                start = time.perf_counter()
                law.rsample().square().sum().backward()
                times[0].append(1e3 * (time.perf_counter() - start))
                sample = law.rsample()
                start = time.perf_counter()
                law.log_prob(sample).sum().backward()
                times[1].append(1e3 * (time.perf_counter() - start))
            sampling, scoring = (median(t[1:]) for t in times)
            print(
                f"| {n} | {batch} | {temperature} | {sampling:.1f} | {scoring:.1f} | {scoring / sampling:.1f} |", flush=True
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

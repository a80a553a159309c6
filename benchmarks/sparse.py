"""Candidates beside forbidden pairs: ``pyro_gs.sparse_sinkhorn`` and its law against the dense ones under the same mask.

python benchmarks/sparse.py

Rows are points of a cube, moved a little, columns the points; each row may take the k nearest. Logits are minus the
distance over the movement, with Gumbel noise for the operator. Both see the same noise, take turns, and are compared:
values and gradients have to agree. ``draw`` is the operator at noisy logits, ``gradient`` that and a backward pass,
``step`` what an SVI step does (make both laws, draw, Gaussian likelihood of the items, KL of the noise, backward),
``matching`` the hard matching. Seconds are processor time of one thread. Memory is the growth of the peak of a process
of its own over a step.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from memory import peak_of_process, run_apart
from torch import Tensor

import pyro_gs as pgs

FIELDS = ("n", "k", "temperature", "what", "dense_s", "sparse_s", "ratio", "dense_mb", "sparse_mb", "gap")
SIZES, QUICK = (500, 1000, 2000), (60,)
TEMPERATURES = (1.0, 0.1)
K = 30
METHODS = ("dense", "sparse")


class Scene:
    """A matching problem with k candidates a row."""

    def __init__(self, n: int, k: int) -> None:
        torch.manual_seed(0)
        self.x = torch.rand(n, 3, dtype=torch.float64)
        moved = 0.2 * n ** (-1 / 3)
        order = torch.randperm(n)
        self.y = self.x[order] + moved * torch.randn(n, 3, dtype=torch.float64)
        distance = torch.cdist(self.y, self.x)
        nearest = distance.scatter(-1, order[:, None], 0.0).topk(k, largest=False).indices  # the truth is a candidate
        self.candidates = nearest
        self.logits = -distance.gather(-1, nearest) / moved
        with warnings.catch_warnings():  # pairs that lie on no permutation, which a law would tell of
            warnings.simplefilter("ignore", pgs.SupportWarning)
            self.logits = pgs.SparseGumbelSinkhorn(1.0, self.logits, nearest).logits
        self.noise = -torch.empty_like(self.logits).exponential_().log()

    def dense(self, values: Tensor) -> Tensor:
        """Values at candidates as a matrix, ``-inf`` elsewhere."""
        return pgs.to_dense(values, self.candidates, fill=-torch.inf)


def calls(scene: Scene, temperature: float, method: str) -> dict[str, Callable[[], Tensor]]:
    """By name, what is timed; each returns what is compared."""
    candidates = scene.candidates
    logits, noisy = scene.logits, scene.logits + scene.noise
    if method == "dense":
        logits, noisy = scene.dense(logits), scene.dense(noisy)
    allowed = logits > -torch.inf
    zeros = torch.where(allowed, 0.0, -torch.inf)
    free = torch.where(allowed, logits, 0.0).requires_grad_()

    def at_candidates(values: Tensor) -> Tensor:
        return values.gather(-1, candidates) if method == "dense" else values

    def operator(z: Tensor) -> Tensor:
        if method == "dense":
            return pgs.sinkhorn(z, temperature=temperature)
        return pgs.sparse_sinkhorn(z, candidates, temperature=temperature)

    def made_of(p: Tensor) -> Tensor:
        return p @ scene.x if method == "dense" else (p[..., None] * scene.x[candidates]).sum(-2)

    def law(t: float, z: Tensor) -> pgs.GumbelSinkhorn | pgs.SparseGumbelSinkhorn:
        return pgs.GumbelSinkhorn(t, z) if method == "dense" else pgs.SparseGumbelSinkhorn(t, z, candidates)

    def draw() -> Tensor:
        return at_candidates(operator(noisy))

    def gradient() -> Tensor:
        z = noisy.clone().requires_grad_()
        (out,) = torch.autograd.grad((made_of(operator(z)) - scene.y).square().sum(), z)
        return at_candidates(out)

    def step() -> Tensor:
        q, p = law(temperature, torch.where(allowed, free, -torch.inf)), law(1.0, zeros)
        loss = 50 * (made_of(q.rsample()) - scene.y).square().sum() + pgs.gumbel_noise_kl(q, p)
        return at_candidates(torch.autograd.grad(loss, free)[0])

    def matching() -> Tensor:
        best = pgs.to_index(pgs.matching(noisy)) if method == "dense" else pgs.sparse_matching(noisy, candidates)
        return best.double()

    return {"draw": draw, "gradient": gradient, "step": step, "matching": matching}


def seconds(found: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Median processor time of every call; they take turns, after a turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(repeats + 1):
        for name, call in found.items():
            start = time.process_time()
            call()
            if turn:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def peak_of_step(n: int, k: int, temperature: float, method: str) -> float:
    """Megabytes that the peak of this process grows by in a step."""
    calls(Scene(60, min(k, 30)), temperature, method)["step"]()  # loads whatever is loaded late
    step = calls(Scene(n, k), temperature, method)["step"]
    base = peak_of_process(reset=True)
    step()
    return (peak_of_process() - base) / 1e6


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3, help="timings a cell (default: 3)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="rows (default: 500 1000 2000)")
    parser.add_argument("--quick", action="store_true", help="smoke test; writes figures only where --out says")
    parser.add_argument("--out", type=Path, help="where the csv goes (default: results/sparse.csv beside the script)")
    parser.add_argument("--memory", nargs=4, metavar=("N", "K", "TEMPERATURE", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.out is None and not args.quick:
        args.out = Path(__file__).parent / "results" / "sparse.csv"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(1)
    if args.memory:
        n, k, temperature, method = args.memory
        print(json.dumps({"mb": peak_of_step(int(n), int(k), float(temperature), method)}))
        return 0
    rows = []
    print(f"k = {K} candidates a row, float64, one thread, torch {torch.__version__}\n")
    print("| $n$ | temperature | what | dense s | sparse s | ratio | dense MB | sparse MB | largest difference |")
    print("| --- " * 9 + "|")
    for n in QUICK if args.quick else args.sizes:
        k = min(K, n // 3)
        scene = Scene(n, k)
        for temperature in TEMPERATURES:
            both = {method: calls(scene, temperature, method) for method in METHODS}
            for what in both["dense"]:
                if what == "matching" and temperature != TEMPERATURES[0]:
                    continue
                gap = float("nan")  # of a step, which draws other noise in a matrix than at candidates
                if what != "step":
                    one, other = (both[method][what]() for method in METHODS)
                    gap = float((one - other).abs().max())
                spent = seconds({method: both[method][what] for method in METHODS}, args.repeats)
                ratio = spent["dense"] / spent["sparse"]
                megabytes = {method: float("nan") for method in METHODS}
                if what == "step":
                    megabytes = {m: _memory(n, k, temperature, m) for m in METHODS}
                row = [n, k, temperature, what, spent["dense"], spent["sparse"], ratio, *megabytes.values(), gap]
                rows.append([f"{x:.4g}" if isinstance(x, float) else x for x in row])
                cells = [n, f"{temperature:g}", what, f"{spent['dense']:.3g}", f"{spent['sparse']:.3g}", f"{ratio:.1f}"]
                cells += ["" if x != x else f"{x:.0f}" for x in megabytes.values()]
                print("| " + " | ".join(map(str, [*cells, "" if gap != gap else f"{gap:.0e}"])) + " |", flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([FIELDS, *rows])
        print(f"\nwrote {args.out.name}")
    return 0


def _memory(n: int, k: int, temperature: float, method: str) -> float:
    return float(run_apart(__file__, ["--memory", n, k, temperature, method])["mb"] or 0.0)


if __name__ == "__main__":
    raise SystemExit(main())

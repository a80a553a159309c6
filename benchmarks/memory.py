"""Peak memory of one call, forward and backward, in a process of its own: ``python benchmarks/memory.py ours 100 float64``.

Prints json: the growth of the peak of the resident set, and of what torch allocates, in numbers of the input's dtype per
entry of the input. Both count whatever the call leaves behind, which is the result and the gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import peers
import torch

import pyro_gs

TEMPERATURE = 0.1
SWEEPS = 200  # cap of the peers; what a peer needs that unrolls its iterations grows with their number


def measure(name: str, n: int, batch: int, dtype: torch.dtype, device: str) -> dict[str, float | None]:
    """Peak memory beyond the input; the call is run twice, once for the process and once for torch."""
    options = {"dtype": dtype, "device": device, "temperature": TEMPERATURE, "backward": True, "max_sweeps": SWEEPS}
    method = peers.find_methods([name], device)[0][name]
    method(peers.make_problem(8, 2, **options))()  # loads and warms whatever is loaded late
    call = method(peers.make_problem(n, batch, **options))
    numbers = n * n * peers.looped_items(name, batch) * torch.empty((), dtype=dtype).element_size()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        call()
        return {"process": None, "torch": (torch.cuda.max_memory_allocated() - base) / numbers}
    base = peak_of_process(reset=True)
    result = call()
    process = (peak_of_process() - base) / numbers
    del result
    return {"process": process, "torch": None if name == peers.OTT else _torch_peak(call) / numbers}


def peak_of_process(*, reset: bool = False) -> int:
    """Bytes; on Linux since the last reset, because ``ru_maxrss`` starts there with what the parent process held."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _torch_peak(call: peers.Call) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


def in_own_process(name: str, n: int, batch: int, dtype: str, device: str, timeout: float = 600) -> dict[str, float | None]:
    """Run this file for one method; raises as :func:`run_apart`."""
    arguments = [name, n, dtype, "--batch", batch, "--device", device, "--threads", torch.get_num_threads()]
    return run_apart(__file__, arguments, timeout)


def run_apart(script: str, arguments: Sequence[object], timeout: float = 600) -> dict[str, float | None]:
    """What a script prints as json on its last line, run in a process of its own.

    Raises:
        RuntimeError: it failed or took too long.
    """
    root = str(Path(pyro_gs.__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Blocks of this size and above go back to the system when they are freed, so that they count again.
    env = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, *map(str, arguments)]
    try:
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=True)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(error.stderr.strip().rsplit("\n", 1)[-1]) from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {timeout:g} s") from None
    return json.loads(run.stdout.strip().rsplit("\n", 1)[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("method", choices=peers.NAMES)
    parser.add_argument("n", type=int)
    parser.add_argument("dtype", choices=["float32", "float64"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(json.dumps(measure(args.method, args.n, args.batch, getattr(torch, args.dtype), args.device)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

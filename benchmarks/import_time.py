"""How long ``import pyro_gs`` takes beyond what it imports of Pyro: median of fresh interpreters.

python benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

SCRIPT = """
import time
start = time.perf_counter()
import pyro, pyro.distributions, pyro.infer, pyro.infer.autoguide
middle = time.perf_counter()
import pyro_gs
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    runs = []
    for _ in range(9):
        output = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
        runs.append([float(x) for x in output.split()])
    own, others = (statistics.median(times) for times in zip(*((b, a) for a, b in runs), strict=True))
    print(
        f"Pyro {others:.2f} s, pyro_gs {own:.2f} s beyond it, ratio {own / others:.2f}; median of {len(runs)} interpreters"
    )


if __name__ == "__main__":
    main()

import json
import os
import subprocess
import sys
from pathlib import Path

import pyro_gs

SCRIPT = """
import json, random, sys, warnings
import numpy, torch
import pyro, pyro.distributions, pyro.infer, pyro.infer.autoguide
import scipy.sparse.csgraph  # which adds a warning filter

def state():
    return [
        str(torch.get_default_dtype()), str(torch.get_default_device()), torch.is_grad_enabled(), torch.get_num_threads(),
        torch.get_rng_state().tolist(), hash(random.getstate()), str(numpy.random.get_state()),
        str([each for each in warnings.filters if "sympy" not in str(each)]),  # torch 2.4 loads it with torch.func
        torch.distributions.Distribution._validate_args, sorted(pyro.get_param_store().keys()), pyro.settings.get(),
        str(numpy.geterr()), sys.getrecursionlimit(),
    ]

before = state()
import pyro_gs
print(json.dumps({"same": state() == before, "loaded": sorted(sys.modules)}))
"""


def test_import_loads_nothing_slow_and_leaves_the_rest_as_it_was():
    environment = os.environ | {"PYTHONPATH": str(Path(pyro_gs.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["same"]
    slow = {"torch._dynamo", "scipy.optimize", "scipy.stats", "scipy.special", "matplotlib", "arviz_stats", "lapx", "pandas"}
    assert not slow & set(found["loaded"])

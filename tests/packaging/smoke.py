"""What a new environment must be able to do; run with its interpreter, away from the checkout."""

import importlib.metadata
import pathlib
import sys

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_gs as pgs

assert pathlib.Path(sys.prefix).resolve() in pathlib.Path(pgs.__file__).resolve().parents, pgs.__file__
assert importlib.metadata.version("pyro-gs") == pgs.__version__

pyro.set_rng_seed(0)
x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 2.0]])
truth = torch.tensor([3, 0, 4, 1, 2])
y = x[truth] + 0.1 * torch.randn(5, 2)


def model(x, y):
    P = pyro.sample("P", pgs.UniformPermutation(5))
    pyro.sample("y", dist.Normal(P @ x, 0.1).to_event(2), obs=y)


guide = pgs.AutoGumbelSinkhorn(model, temperature=0.5)
svi = SVI(pgs.relax(model, temperature=0.5), guide, Adam({"lr": 0.1}), Trace_ELBO())
for _ in range(200):
    svi.step(x, y)
mcmc = MCMC(pgs.SwapMetropolis(model), num_samples=200, warmup_steps=100, disable_progbar=True)
mcmc.run(x, y)
exact = pgs.enumerate_posterior(model, x, y)
for found in (guide.median()["P"], pgs.summary(mcmc)["P"].map, pgs.summary(exact)["P"].map):
    assert pgs.to_index(found).tolist() == truth.tolist(), found

layer = pgs.nn.SinkhornLayer(temperature=1.0)
assert torch.allclose(layer(torch.randn(2, 4, 4)).sum(-1), torch.ones(2, 4), atol=1e-5)
print("pyro_gs", pgs.__version__, "with torch", torch.__version__, "and pyro", pyro.__version__)

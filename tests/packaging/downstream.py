"""A user's program with annotations, for mypy; never run."""

import pyro
import torch
from torch import Tensor
from typing_extensions import assert_type

import pyro_gs as pgs


def model(scores: Tensor) -> Tensor:
    P: Tensor = pyro.sample("P", pgs.GibbsPermutation(scores))
    return P


law = pgs.GumbelSinkhorn(torch.tensor(0.5), torch.zeros(3, 3))
assert_type(law.log_prob(law.rsample()), Tensor)
assert_type(pgs.sinkhorn(torch.zeros(3, 3)), Tensor)
assert_type(pgs.solve_sinkhorn(torch.zeros(3, 3)).iterations, Tensor)
assert_type(pgs.matching(torch.zeros(3, 3)), Tensor)
exact = pgs.enumerate_posterior(model, torch.zeros(3, 3))
assert_type(exact.marginals["P"], Tensor)
assert_type(pgs.summary(exact)["P"].map, Tensor)
guide = pgs.AutoGumbelSinkhorn(model, temperature=0.5)
assert_type(guide.logits("P"), Tensor)
assert_type(pgs.nn.SinkhornLayer(temperature=1.0).forward(torch.zeros(3, 3)), Tensor)

pgs.sinkhorn("logits")  # error: argument
pgs.matching(torch.zeros(3, 3), temperature=1.0)  # error: no such argument
print(pgs.sinkhrn)  # error: no such name

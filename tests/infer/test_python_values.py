"""Who makes Python values of tensors that depend on others."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_gs as pgs
from pyro_gs.infer.python_values import PythonValues


def written(P):
    scores = torch.zeros(2)
    scores[0] = P[0, 0]
    return float(scores.sum())


READERS = {
    "written": written,
    "added in place": lambda P: float(torch.zeros(3).add_(P[0]).sum()),
    "if": lambda P: 1 if (P == torch.eye(3)).all() else 0,
    "not": lambda P: not P[0, 0],
    "float": lambda P: float(P[0, 0]),
    "int": lambda P: int(P[0, 0]),
    "item": lambda P: P[0, 0].item(),
    "index": lambda P: [1, 2][P[0, 0].long()],
    "range": lambda P: range(P[0, 0].long()),
    "in": lambda P: 1.0 in P[0],
    "max": lambda P: max(P[0]),
    "tolist": lambda P: P.tolist(),
    "numpy": lambda P: P.numpy(),
    "asarray": lambda P: np.asarray(P),
    "equal": lambda P: torch.equal(P, torch.eye(3)),
    "method equal": lambda P: P.equal(torch.eye(3)),
    "allclose": lambda P: torch.allclose(P, torch.eye(3)),
    "after a handful of operations": lambda P: float(torch.stack([(P @ P).argmax(-1).double().sum(), torch.ones(())]).max()),
}


@pytest.mark.parametrize("name", READERS)
def test_values_are_seen(name):
    P = torch.eye(3)
    with PythonValues([P]) as values:
        READERS[name](P)
    assert values.read_at.startswith("test_python_values.py, line ")


@pytest.mark.parametrize(
    "call",
    [
        lambda P: torch.where(P[0, 0] > 0, P.sum(), P.mean()),
        lambda P: (P.shape, P.dim(), len(P), P.dtype, P.is_floating_point(), P.requires_grad, P.stride()),
        lambda P: pgs.to_index(P),
        lambda P: pgs.matching(P),
        lambda P: pgs.GibbsPermutation(P.double()).log_prob(torch.eye(3)),
        lambda P: dist.Normal(P, 1.0, validate_args=True).log_prob(P + 1),
        lambda P: float(torch.ones(3).sum()),
    ],
)
def test_what_libraries_look_at_is_theirs(call):
    P = torch.eye(3)
    with PythonValues([P]) as values:
        call(P)
    assert values.read_at is None

"""The model that the inference tests share: match noisy points to their originals; enumerable."""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch

import pyro_gs as pgs


def noisy_points(n, scale, seed):
    """Points (n, 2) and the same in another order with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    y = x[torch.randperm(n, generator=generator)] + scale * torch.randn(n, 2, generator=generator)
    return x, y


def model(x, y, scale, allowed=None):
    P = pyro.sample("P", pgs.UniformPermutation(len(x), allowed))
    pyro.sample("y", dist.Normal(P.to(x) @ x, scale).to_event(2), obs=y)


def log_likelihood(P, x, y, scale):
    return dist.Normal(P.to(x) @ x, scale).log_prob(y).sum((-2, -1))


def exact(x, y, scale):
    """Log evidence under the uniform prior, marginals (n, n), permutations and their probabilities."""
    perms = pgs.to_matrix(torch.tensor(list(itertools.permutations(range(len(x))))))
    score = log_likelihood(perms, x, y, scale)
    weight = torch.softmax(score, 0)
    evidence = float(torch.logsumexp(score, 0)) - math.lgamma(len(x) + 1)
    return evidence, torch.einsum("k,kij->ij", weight, perms), perms, weight

"""The model that the inference tests share: match noisy points to their originals; enumerable."""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

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


def no_guide(*args):
    """TraceEnum_ELBO wants a guide."""


def brute_force(model, args, lists):
    """Log evidence and probabilities by a trace for every state of sites with lists of matrices."""
    log_p = []
    for state in itertools.product(*lists.values()):
        data = dict(zip(lists, state, strict=True))
        with pyro.validation_enabled(False):
            log_p.append(poutine.trace(poutine.condition(model, data)).get_trace(*args).log_prob_sum())
    log_p = torch.stack(log_p)
    return torch.logsumexp(log_p, 0), torch.softmax(log_p, 0)


def all_matrices(n):
    """All permutation matrices in lexicographic order, (n!, n, n)."""
    return pgs.to_matrix(torch.tensor(list(itertools.permutations(range(n)))))

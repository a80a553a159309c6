"""Oracles for laws over permutations: everything by going through all n! of them."""

import torch
from scipy import stats


def enumerated(law):
    """All permutations (count, ..., n, n) and their log-probabilities (count, ...)."""
    values = law.enumerate_support()
    return values, law.log_prob(values)


def mean_by_enumeration(law):
    values, log_p = enumerated(law)
    return (log_p.exp()[..., None, None] * values).sum(0)


def entropy_by_enumeration(law):
    log_p = enumerated(law)[1]
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(0)


def chi_square(law, size):
    """p-value of draws of a law without batch shape against its own probabilities; cells of fewer than 5 are joined."""
    values, log_p = enumerated(law)
    code = law.n ** torch.arange(law.n)
    cells = {int(c): i for i, c in enumerate((values.argmax(-1) * code).sum(-1))}
    found = [cells[int(c)] for c in (law.sample(torch.Size((size,))).argmax(-1) * code).sum(-1)]
    counts = torch.bincount(torch.tensor(found), minlength=len(values)).double()
    expected = size * log_p.double().exp()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    if not bool(counts[~keep].sum() == 0):
        return 0.0
    return stats.chisquare(counts[keep].numpy(), (expected[keep] * size / expected[keep].sum()).numpy()).pvalue

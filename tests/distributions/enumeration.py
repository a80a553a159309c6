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
    """p-value of draws of a law without batch shape against its own probabilities."""
    return p_value(law.sample(torch.Size((size,))).argmax(-1), law)


def p_value(index, law):
    """p-value of draws in index form (size, n) against the probabilities of a law; cells of fewer than 5 are joined.

    If they are too few even together, the next smallest cell takes them in.
    """
    values, log_p = enumerated(law)
    code = law.n ** torch.arange(law.n)
    cells = {int(c): i for i, c in enumerate((values.argmax(-1) * code).sum(-1))}
    found = [cells[int(c)] for c in (index * code).sum(-1)]
    return goodness_of_fit(torch.bincount(torch.tensor(found), minlength=len(values)), log_p.exp())


def goodness_of_fit(counts, probability):
    """p-value of counts (cells,) of independent draws against probabilities (cells,); cells are joined as above."""
    counts = counts.double()
    size = float(counts.sum())
    expected = size * probability.double()
    rare = expected < 5
    if 0 < float(expected[rare].sum()) < 5 and not bool(rare.all()):
        rare = rare | (expected == expected[~rare].min())
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    if int(keep.sum()) < 2:  # one permutation has all the mass, and nothing is left to compare
        return 1.0
    if not bool(counts[~keep].sum() == 0):
        return 0.0
    return stats.chisquare(counts[keep].numpy(), (expected[keep] * size / expected[keep].sum()).numpy()).pvalue

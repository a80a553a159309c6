"""Whether what a call with hostile tensors returned is right, by definition or by going through all permutations."""

import itertools

import torch

import pyro_gs as pgs

ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}


def all_permutations(n):
    """(n!, n, n) in float64."""
    return torch.eye(n, dtype=torch.float64)[torch.tensor(list(itertools.permutations(range(n))), dtype=torch.int64)]


def weights(P, logits):
    """Sums of logits at ones of permutations, ``-inf`` where a forbidden pair is among them: (count, ...)."""
    return torch.where(P.unflatten(0, (-1,) + (1,) * (logits.dim() - 2)) > 0, logits.double(), 0.0).sum((-2, -1))


def rounding(logits):
    """Of sums of entries that large, in their dtype."""
    size = torch.where(logits.isfinite(), logits, 0).detach().double().abs()
    return ROUNDING[logits.dtype] * (1 + (float(size.amax()) if size.numel() else 0.0))


def close(found, expected, logits):
    """Up to rounding of what was given: of the dtype, and of sums of entries that large."""
    return torch.allclose(found.double(), expected.double(), rtol=ROUNDING[logits.dtype], atol=rounding(logits))


def is_permutation(P):
    ones = (P == 0) | (P == 1)
    return bool(ones.all()) and bool((P.sum(-1) == 1).all()) and bool((P.sum(-2) == 1).all())


def is_doubly_stochastic(P, tolerance):
    one = torch.ones((), dtype=torch.float64)
    sums = [P.double().sum(dim) for dim in (-1, -2)]
    return bool((P >= 0).all()) and all(torch.allclose(each, one, rtol=0, atol=tolerance) for each in sums)


def dense(values, candidates, fill):
    """By a loop over rows, as `pyro_gs.to_dense` ought to."""
    n = values.shape[-2]
    out = values.detach().new_full((*torch.broadcast_shapes(values.shape[:-2], candidates.shape[:-2]), n, n), fill)
    values, candidates = (each.detach().expand(*out.shape[:-2], *each.shape[-2:]) for each in (values, candidates))
    for place in itertools.product(*map(range, values.shape)):
        out[(*place[:-1], int(candidates[place]))] = values[place]
    return out


def operator(log):
    """Rows and columns sum to one, and what is forbidden stays so; the operator warns where it did not get there."""

    def check(given, P):
        P, logits = P.exp() if log else P, given["logits"]
        temperature = given["temperature"]
        temperature = temperature.shape if isinstance(temperature, torch.Tensor) else ()
        assert P.shape == torch.broadcast_shapes(logits.shape, (*temperature, 1, 1))
        assert is_doubly_stochastic(P, ROUNDING[P.dtype])
        assert bool((P[(logits == -torch.inf).expand(P.shape)] == 0).all())

    return check


def sparse_operator(log):
    def check(given, values):
        dense_given = {**given, "logits": dense(given["logits"], given["candidates"], -torch.inf)}
        operator(False)(dense_given, dense(values.exp() if log else values, given["candidates"], 0.0))

    return check


def best_matching(given, P, logits=None):
    logits = given["logits"] if logits is None else logits
    assert P.dtype == logits.dtype
    assert is_permutation(P)
    every = weights(all_permutations(logits.shape[-1]), logits)
    assert close(torch.where(P > 0, logits.double(), 0.0).sum((-2, -1)), every.amax(0), logits)


def best_of_candidates(given, index):
    logits = dense(given["logits"], given["candidates"], -torch.inf)
    best_matching(given, pgs.to_matrix(index, dtype=logits.dtype), logits)


def permanent(given, found):
    logits = given["logits"]
    exact = torch.logsumexp(weights(all_permutations(logits.shape[-1]), logits), 0)
    if given["method"] == "exact":
        assert close(found, exact, logits)
    elif given["method"] == "sinkhorn_lower":
        assert bool((found <= exact + rounding(logits)).all())


def bounds(given, found):
    lower, upper = found
    logits = given["logits"]
    exact = torch.logsumexp(weights(all_permutations(logits.shape[-1]), logits), 0)
    assert bool((lower <= exact + rounding(logits)).all())
    assert bool((exact <= upper + rounding(logits)).all())


def kendall(given, found):
    P, Q = ((given[name] != 0).byte().argmax(-2) for name in ("P", "Q"))  # the position of every item
    P, Q = torch.broadcast_tensors(P, Q)
    pairs = itertools.combinations(range(P.shape[-1]), 2)
    apart = [((P[..., i] < P[..., j]) != (Q[..., i] < Q[..., j])).long() for i, j in pairs]
    assert torch.equal(found.long(), sum(apart) if apart else torch.zeros(P.shape[:-1], dtype=torch.int64))


def index_of(given, index):
    assert torch.equal(pgs.to_matrix(index, dtype=given["P"].dtype), given["P"])


def matrix_of(given, P):
    assert is_permutation(P)
    assert torch.equal(P.argmax(-1), given["index"].long())


def dense_of(given, matrix):
    candidates = given["candidates"]
    expected = dense(given["values"], candidates, given["fill"])
    assert torch.allclose(matrix.detach(), expected, rtol=0, atol=0, equal_nan=True)


def of_law(*, hard, logits=True, exact=False):
    """Draws are permutations or doubly stochastic, keep to allowed pairs; means too; probabilities where they are known."""

    def check(given, out):
        drawn, value = out["drawn"], given.get("logits") if logits else None
        if hard:
            assert is_permutation(drawn)
            assert is_permutation(out["expanded"])
        else:
            assert is_doubly_stochastic(drawn, ROUNDING[drawn.dtype])
        for name in {"marginals", "mean"} & set(out):
            mean = out[name][0] if isinstance(out[name], tuple) else out[name]
            assert is_doubly_stochastic(mean, 10 * ROUNDING[drawn.dtype])
        if "mode" in out and hard:
            assert is_permutation(out["mode"])
        if value is not None:
            assert bool((drawn[(value == -torch.inf).expand(drawn.shape)] == 0).all())
            assert out["log_prob"].shape == drawn.shape[:-2]
        if exact and given.get("normalizer", "exact") == "exact":
            total = torch.logsumexp(weights(all_permutations(value.shape[-1]), value), 0)
            expected = torch.where(drawn > 0, value.double(), 0.0).sum((-2, -1)) - total
            assert close(out["log_prob"], expected, value)

    return check


def divergence(given, found):
    """Not negative, and zero of a law from itself."""
    assert bool((found >= -ROUNDING[found.dtype] * (1 + found.abs())).all())


RIGHT = {
    "sinkhorn": operator(False),
    "log_sinkhorn": operator(True),
    "sparse_sinkhorn": sparse_operator(False),
    "log_sparse_sinkhorn": sparse_operator(True),
    "matching": best_matching,
    "sparse_matching": best_of_candidates,
    "log_permanent": permanent,
    "log_permanent_bounds": bounds,
    "kendall_distance": kendall,
    "to_index": index_of,
    "to_matrix": matrix_of,
    "to_dense": dense_of,
    "GumbelSinkhorn": of_law(hard=False),
    "GumbelMatching": of_law(hard=True),
    "GibbsPermutation": of_law(hard=True, exact=True),
    "UniformPermutation": of_law(hard=True, logits=False),
    "PlackettLuce": of_law(hard=True, logits=False),
    "Mallows": of_law(hard=True, logits=False),
    "gumbel_noise_kl": divergence,
    "tightened_kl": divergence,
}
"""By the name of the call: of its arguments and what it returned."""

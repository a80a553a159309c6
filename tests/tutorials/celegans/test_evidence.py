import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from tutorials.celegans.evidence import CollapsedEvidence, Statistics, congruences, log_likelihood

SIGMA, SCALE = 0.7, 0.4


def problem(
    n: int = 6, worms: int = 2, steps: int = 5, *, seed: int = 0
) -> tuple[Tensor, Tensor, Statistics, CollapsedEvidence]:
    """Adjacency with all in-degrees from 0 to n - 1, traces, their statistics and the evidence."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(n, n, generator=generator).argsort(1)
    adjacency = order < torch.arange(n)[:, None]
    traces = torch.randn(worms, steps + 1, n, generator=generator, dtype=torch.float64)
    statistics = Statistics.from_traces(traces)
    return adjacency, traces, statistics, CollapsedEvidence(adjacency, statistics, SIGMA, SCALE)


def random_hard(*shape: int, seed: int = 1) -> Tensor:
    index = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return torch.nn.functional.one_hot(index, shape[-1]).double()


def random_soft(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64).softmax(-1)


def dense_log_evidence(adjacency: Tensor, worms: list[Tensor], P: Tensor) -> Tensor:
    """The activity of a canonical neuron in all worms that show it is Gaussian: one vector of all their times.

    Each worm is (T_j + 1, m_j), a column for each neuron it shows.
    """
    total = torch.zeros((), dtype=torch.float64)
    for i, parents in enumerate(adjacency):
        X, y = [], []
        for traces, permutation in zip(worms, P, strict=True):
            shown = permutation[: traces.shape[1]]
            canonical = traces @ shown
            if bool(shown[:, i].any()):
                X.append(canonical[:-1][:, parents])
                y.append(canonical[1:, i])
        if not y:
            continue
        past, now = torch.cat(X), torch.cat(y)
        covariance = SIGMA**2 * torch.eye(len(now), dtype=torch.float64) + SCALE**2 * past @ past.mT
        law = torch.distributions.MultivariateNormal(torch.zeros(len(now), dtype=torch.float64), covariance)
        total += law.log_prob(now)
    return total


def partial_problem() -> tuple[Tensor, list[Tensor], Statistics, CollapsedEvidence]:
    """Three worms of five, six and four of six neurons, for 5, 3 and 5 transitions."""
    adjacency, traces, _, _ = problem(worms=3)
    sizes, lengths = [5, 6, 4], torch.tensor([5, 3, 5])
    observed = torch.arange(6) < torch.tensor(sizes)[:, None]
    moments = torch.arange(6) <= lengths[:, None]
    padded = traces * observed[:, None, :] * moments[:, :, None]
    statistics = Statistics.from_traces(padded, lengths=lengths, observed=observed)
    worms = [traces[j, : int(lengths[j]) + 1, : sizes[j]] for j in range(3)]
    return adjacency, worms, statistics, CollapsedEvidence(adjacency, statistics, SIGMA, SCALE)


def brute_force(adjacency: Tensor, statistics: Statistics, P: Tensor) -> Tensor:
    """The collapsed formula row by row, by plain autograd, for one stack P."""
    B = (P.mT @ statistics.gram @ P).sum(0)
    C = (P.mT @ statistics.cross @ P).sum(0)
    value = -statistics.energy.sum() / (2 * SIGMA**2)
    value = value - 0.5 * statistics.count * math.log(2 * math.pi * SIGMA**2)
    for i, mask in enumerate(adjacency):
        parents = mask.nonzero().flatten()
        L = torch.eye(len(parents), dtype=torch.float64) / SCALE**2 + B[parents][:, parents] / SIGMA**2
        b = C[i, parents] / SIGMA**2
        value = value + 0.5 * b @ torch.linalg.solve(L, b) - 0.5 * torch.logdet(SCALE**2 * L)
    return value


def test_statistics_are_the_sums_they_claim() -> None:
    _, traces, statistics, _ = problem(n=3, worms=2, steps=4)
    for j in range(2):
        gram, cross, energy = torch.zeros(3, 3).double(), torch.zeros(3, 3).double(), 0.0
        for t in range(4):
            gram += torch.outer(traces[j, t], traces[j, t])
            cross += torch.outer(traces[j, t + 1], traces[j, t])
            energy += float(traces[j, t + 1] @ traces[j, t + 1])
        torch.testing.assert_close(statistics.gram[j], gram)
        torch.testing.assert_close(statistics.cross[j], cross)
        assert float(statistics.energy[j]) == pytest.approx(energy)
    assert (statistics.count, statistics.num_worms, statistics.size) == (2 * 4 * 3, 2, 3)


def test_statistics_do_not_grow_with_time() -> None:
    """Recordings cut in two and added up count like one, which is all that a step's cost depends on."""
    traces = torch.randn(2, 101, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = Statistics.from_traces(traces)
    parts = [Statistics.from_traces(traces[:, :41]), Statistics.from_traces(traces[:, 40:])]
    both = Statistics(*(getattr(parts[0], f) + getattr(parts[1], f) for f in ("gram", "cross", "energy", "count")))
    adjacency, P = torch.ones(4, 4, dtype=torch.bool), random_hard(2, 4)
    values = [CollapsedEvidence(adjacency, statistics, SIGMA, SCALE)(P) for statistics in (whole, both)]
    torch.testing.assert_close(*values)
    assert whole.gram.shape == parts[0].gram.shape


def test_evidence_is_the_dense_gaussian_density() -> None:
    adjacency, traces, _, evidence = problem()
    for seed in range(3):
        P = random_hard(2, 6, seed=seed)
        torch.testing.assert_close(evidence(P), dense_log_evidence(adjacency, list(traces), P), rtol=1e-11, atol=1e-11)


def test_evidence_of_worms_that_show_less_is_the_dense_gaussian_density() -> None:
    adjacency, worms, _, evidence = partial_problem()
    for seed in range(5):
        P = random_hard(3, 6, seed=seed)
        torch.testing.assert_close(evidence(P), dense_log_evidence(adjacency, worms, P), rtol=1e-11, atol=1e-11)


def test_order_of_the_rows_that_were_not_observed_does_not_matter() -> None:
    _, _, _, evidence = partial_problem()
    P = random_hard(3, 6)
    exchanged = P.clone()
    exchanged[2, 4:] = P[2, [5, 4]]
    torch.testing.assert_close(evidence(P), evidence(exchanged), rtol=1e-13, atol=1e-13)


def test_bayes_holds_for_worms_that_show_less() -> None:
    adjacency, _, statistics, evidence = partial_problem()
    P = random_hard(3, 6)
    W = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * adjacency
    parts = log_likelihood(P, W, statistics, SIGMA) + evidence.log_prior_weights(W)
    torch.testing.assert_close(evidence(P), parts - evidence.log_posterior_weights(P, W), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_gradcheck_of_worms_that_show_less(batch: tuple[int, ...]) -> None:
    _, _, _, evidence = partial_problem()
    assert torch.autograd.gradcheck(evidence, (random_soft(*batch, 3, 6).requires_grad_(),))


def test_general_formula_equals_the_sum_where_all_worms_show_all() -> None:
    adjacency, _, statistics, evidence = problem()
    general = dataclasses.replace(statistics, observed=torch.ones(2, 6, dtype=torch.bool))
    soft = random_soft(2, 6)
    soft = soft / soft.sum(-2, keepdim=True)  # columns sum to one: each worm shows all of each neuron
    torch.testing.assert_close(CollapsedEvidence(adjacency, general, SIGMA, SCALE)(soft), evidence(soft))


def test_evidence_obeys_bayes_for_any_weights() -> None:
    """``log p(Y | P) = log p(Y | W, P) + log p(W) - log p(W | Y, P)``."""
    adjacency, _, statistics, evidence = problem()
    P = random_hard(2, 6)
    for seed in range(3):
        W = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * adjacency
        parts = log_likelihood(P, W, statistics, SIGMA) + evidence.log_prior_weights(W)
        torch.testing.assert_close(evidence(P), parts - evidence.log_posterior_weights(P, W), rtol=1e-11, atol=1e-11)


def test_likelihood_is_the_sum_over_time() -> None:
    adjacency, traces, statistics, _ = problem()
    P = random_hard(3, 2, 6)
    W = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * adjacency
    values = log_likelihood(P, W, statistics, SIGMA)
    assert values.shape == (3,)
    for stack, value in zip(P, values, strict=True):
        mean = traces[:, :-1] @ (stack @ W @ stack.mT).mT
        expected = torch.distributions.Normal(mean, SIGMA).log_prob(traces[:, 1:]).sum()
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("make", [random_hard, random_soft])
def test_evidence_and_gradient_equal_brute_force(make: object) -> None:
    adjacency, _, statistics, evidence = problem()
    P = make(2, 6).requires_grad_()  # type: ignore[operator]
    fast, slow = evidence(P), brute_force(adjacency, statistics, P)
    torch.testing.assert_close(fast, slow)
    (expected,) = torch.autograd.grad(slow, P)
    (actual,) = torch.autograd.grad(fast, P)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_evidence_gradcheck(batch: tuple[int, ...]) -> None:
    _, _, _, evidence = problem(n=4)
    assert torch.autograd.gradcheck(evidence, (random_soft(*batch, 2, 4).requires_grad_(),))


def test_congruences_gradcheck_without_symmetry() -> None:
    """A function of B that is not symmetric in its two indices still gets the right gradient."""
    _, _, statistics, _ = problem(n=3)
    weights = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(P: Tensor) -> Tensor:
        B, C = congruences(P, statistics)
        return (weights[0] * B).sum() + (weights[1] * C).square().sum()

    assert torch.autograd.gradcheck(value, (random_soft(2, 2, 3).requires_grad_(),))


def test_evidence_takes_batches_item_by_item() -> None:
    _, _, _, evidence = problem()
    P = random_soft(3, 2, 2, 6)
    values = evidence(P)
    assert values.shape == (3, 2)
    for a, b in itertools.product(range(3), range(2)):
        torch.testing.assert_close(values[a, b], evidence(P[a, b]))
    assert evidence(P.expand(4, 3, 2, 2, 6, 6)).shape == (4, 3, 2)


def test_evidence_does_not_care_about_the_names_of_neurons() -> None:
    """Renaming the identities in network and permutations alike changes nothing."""
    adjacency, _, statistics, evidence = problem()
    P, order = random_hard(2, 6), torch.tensor([3, 1, 5, 0, 2, 4])
    renamed = CollapsedEvidence(adjacency[order][:, order], statistics, SIGMA, SCALE)
    torch.testing.assert_close(renamed(P[..., order]), evidence(P))


def test_evidence_without_edges_is_that_of_noise() -> None:
    _, traces, statistics, _ = problem()
    empty = CollapsedEvidence(torch.zeros(6, 6, dtype=torch.bool), statistics, SIGMA, SCALE)
    P = random_soft(2, 6).requires_grad_()
    expected = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), SIGMA).log_prob(traces[:, 1:]).sum()
    torch.testing.assert_close(empty(P), expected)
    (gradient,) = torch.autograd.grad(empty(P), P)
    assert not gradient.any()


def test_posterior_weights_maximize_the_joint_density() -> None:
    adjacency, _, statistics, evidence = problem()
    P = random_hard(2, 6)
    mean = evidence.posterior_weights(P).requires_grad_()
    assert not mean[~adjacency].any()
    joint = log_likelihood(P, mean, statistics, SIGMA) + evidence.log_prior_weights(mean)
    (gradient,) = torch.autograd.grad(joint, mean)
    assert gradient[adjacency].abs().max() < 1e-10


def test_sampled_weights_have_the_posterior_mean_and_covariance() -> None:
    adjacency, _, statistics, evidence = problem(n=4, steps=20)
    P, generator = random_hard(2, 4), torch.Generator().manual_seed(0)
    draws = torch.stack([evidence.sample_weights(P, generator) for _ in range(4000)])
    assert not draws[:, ~adjacency].any()
    weights = draws[:, adjacency]

    def joint(free: Tensor) -> Tensor:
        W = torch.zeros(4, 4, dtype=torch.float64).masked_scatter(adjacency, free)
        return log_likelihood(P, W, statistics, SIGMA) + evidence.log_prior_weights(W)

    hessian = torch.autograd.functional.hessian(joint, torch.zeros(weights.shape[1], dtype=torch.float64))
    covariance = torch.linalg.inv(-hessian)
    error = (weights.mean(0) - evidence.posterior_weights(P)[adjacency]) / covariance.diagonal().sqrt()
    assert error.abs().max() < 4.9 / 4000**0.5  # six weights, failure rate 6e-6
    torch.testing.assert_close(torch.cov(weights.mT), covariance, rtol=0, atol=0.12 * float(covariance.diagonal().max()))


def test_sampling_weights_is_determined_by_the_generator() -> None:
    _, _, _, evidence = problem()
    P = random_hard(2, 6)
    first, again = (evidence.sample_weights(P, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)


def test_bad_input_is_named() -> None:
    adjacency, traces, statistics, evidence = problem()
    with pytest.raises(ValueError, match=r"traces has shape \(6, 6\)"):
        Statistics.from_traces(traces[0])
    with pytest.raises(ValueError, match="at least 2 time steps"):
        Statistics.from_traces(traces[:, :1])
    with pytest.raises(ValueError, match=r"adjacency has shape \(5, 5\).*expected \(6, 6\) and torch\.bool"):
        CollapsedEvidence(adjacency[:5, :5], statistics, SIGMA, SCALE)
    with pytest.raises(ValueError, match=r"adjacency .*dtype torch\.float64"):
        CollapsedEvidence(adjacency.double(), statistics, SIGMA, SCALE)
    with pytest.raises(ValueError, match=r"sigma=0\.0: expected a positive finite number"):
        CollapsedEvidence(adjacency, statistics, 0.0, SCALE)
    with pytest.raises(ValueError, match="weight_scale=inf"):
        CollapsedEvidence(adjacency, statistics, SIGMA, math.inf)
    with pytest.raises(ValueError, match=r"P has shape \(6, 6\).*expected \(\.\.\., 2, 6, 6\)"):
        evidence(torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"P has .*dtype torch\.float32.*torch\.float64"):
        evidence(random_hard(2, 6).float())

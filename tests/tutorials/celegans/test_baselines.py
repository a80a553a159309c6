import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from padded import show_less
from scipy import stats
from torch import Tensor

from tutorials.celegans import vi_mcmc, weights_vi
from tutorials.celegans.baselines import (
    fit_collapsed_mcmc,
    fit_gibbs_mcmc,
    fit_map_faq,
    fit_naive_vi,
    fit_rounding_vi,
    fit_stick_breaking_vi,
    fit_tempered_mcmc,
)
from tutorials.celegans.baselines.gibbs_mcmc import GibbsSwapChain, swap_changes
from tutorials.celegans.baselines.map_faq import mask_center, regressions
from tutorials.celegans.baselines.naive_vi import relaxed_rows, row_kl
from tutorials.celegans.collapsed_chain import CollapsedSwapChain
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence, Statistics, log_likelihood
from tutorials.celegans.identification import Identification, Run, match_allowed, onehot, random_allowed
from tutorials.celegans.worms import Worms, simulate, swap_pairs

FAILURE_RATE = 2e-5
METHODS = {
    "naive_vi": fit_naive_vi,
    "map_faq": fit_map_faq,
    "map_exchanges": functools.partial(fit_map_faq, exchange=True),
    "gibbs_mcmc": fit_gibbs_mcmc,
    "collapsed_mcmc": fit_collapsed_mcmc,
    "tempered_mcmc": fit_tempered_mcmc,
    "rounding_vi": fit_rounding_vi,
    "stick_breaking_vi": fit_stick_breaking_vi,
    "weights_vi": weights_vi.fit,
    "vi_mcmc": vi_mcmc.fit,
}
Fit = Callable[..., Identification]

every_method = pytest.mark.parametrize("fit", METHODS.values(), ids=METHODS)


# A posterior small enough to list


def small_connectome(n: int, seed: int = 0) -> Connectome:
    """A cycle with random chords, one neuron a parent of itself."""
    generator = torch.Generator().manual_seed(seed)
    adjacency = torch.rand(n, n, generator=generator) < 0.3
    adjacency[torch.arange(n), torch.arange(n) - 1] = True
    adjacency.fill_diagonal_(False)
    adjacency[0, 0] = True
    position = torch.zeros(n, 3, dtype=torch.float64)
    position[:, 1] = torch.arange(n)
    return Connectome(tuple(f"X{i + 1}" for i in range(n)), adjacency, position, "small")


class Enumerated:
    """All allowed permutations of one or two worms of four neurons, their posterior, and exact draws."""

    def __init__(self, worms: int, sizes: list[int] | None) -> None:
        connectome = small_connectome(4)
        simulated = simulate(connectome, worms=worms, steps=3, known=0.0, eta=0.75, spectral_factor=1.2, seed=3)
        if sizes is not None:
            simulated = show_less(simulated, sizes)
        self.allowed, self.logits = simulated.allowed, simulated.logits
        statistics = Statistics.from_worms(simulated)
        self.evidence = CollapsedEvidence(connectome.adjacency, statistics, simulated.sigma, simulated.weight_scale)
        rows = torch.arange(4)
        single = [
            [p for p in itertools.permutations(range(4)) if bool(mask[rows, torch.tensor(p)].all())] for mask in self.allowed
        ]
        self.states = torch.tensor(list(itertools.product(*single)))  # (K, J, 4)
        self.number = {tuple(state.flatten().tolist()): k for k, state in enumerate(self.states)}
        log_joint = [
            self.evidence(onehot(part)) + (onehot(part) * self.logits).sum((1, 2, 3)) for part in self.states.split(500)
        ]
        self.probs = torch.cat(log_joint).softmax(0).numpy()

    def draw(self, rng: np.random.Generator) -> Tensor:
        return self.states[int(rng.choice(len(self.probs), p=self.probs))]

    def state(self, index: np.ndarray) -> int:
        return self.number[tuple(index.flatten().tolist())]


def p_value(counts: np.ndarray, probs: np.ndarray) -> float:
    """Chi-square test; states that are expected fewer than 10 times are taken together."""
    expected = probs * counts.sum()
    rare = expected < 10
    observed, wanted = counts[~rare], expected[~rare]
    if rare.any():
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    return float(stats.chisquare(observed, wanted * (observed.sum() / wanted.sum())).pvalue)


@pytest.fixture(
    scope="module", params=[(1, None), (2, None), (2, [3, 4])], ids=["1 worm", "2 worms", "2 worms, one shows less"]
)
def enumerated(request: pytest.FixtureRequest) -> Enumerated:
    return Enumerated(*request.param)


def test_the_enumerated_posterior_is_neither_flat_nor_a_point(enumerated: Enumerated) -> None:
    """What the tests of invariance need in order to notice anything."""
    probs = enumerated.probs
    entropy = -(probs * np.log(probs)).sum()
    assert 0.2 * math.log(len(probs)) < entropy < 0.96 * math.log(len(probs))
    assert not bool(enumerated.allowed.all())


def test_collapsed_swaps_leave_the_posterior_invariant(enumerated: Enumerated) -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(len(enumerated.probs))
    moved = 0
    for seed in range(4000):
        start = enumerated.draw(rng)
        chain = CollapsedSwapChain(enumerated.evidence, enumerated.allowed, start, seed, enumerated.logits)
        chain.step(4)
        counts[enumerated.state(chain.index)] += 1
        moved += not np.array_equal(chain.index, start.numpy())
    assert moved > 1000
    assert p_value(counts, enumerated.probs) > FAILURE_RATE


def test_gibbs_swaps_leave_the_posterior_invariant(enumerated: Enumerated) -> None:
    """P from its posterior, W from its conditional, then swaps: P has its posterior again."""
    rng = np.random.default_rng(1)
    counts = np.zeros((2, len(enumerated.probs)))
    moved = 0
    for seed in range(4000):
        start = enumerated.draw(rng)
        chain = GibbsSwapChain(enumerated.evidence, enumerated.allowed, start, seed, proposals=6, logits=enumerated.logits)
        for k in range(2):
            chain.step()
            counts[k, enumerated.state(chain.index)] += 1
        moved += not np.array_equal(chain.index, start.numpy())
    assert moved > 1000
    assert min(p_value(row, enumerated.probs) for row in counts) > FAILURE_RATE


def test_a_test_of_invariance_has_power(enumerated: Enumerated) -> None:
    """Counts from the uniform law on the same states are refused."""
    rng = np.random.default_rng(2)
    K = len(enumerated.probs)
    assert p_value(np.bincount(rng.integers(K, size=4000), minlength=K), enumerated.probs) < 1e-10


@pytest.mark.parametrize("kernel", ["collapsed", "gibbs"])
def test_long_chains_find_the_posterior_from_a_wrong_start(enumerated: Enumerated, kernel: str) -> None:
    exact = np.einsum("k,kjmi->jmi", enumerated.probs, onehot(enumerated.states).numpy())
    start = enumerated.states[int(enumerated.probs.argmin())]
    total = np.zeros_like(exact)
    if kernel == "collapsed":
        collapsed = CollapsedSwapChain(enumerated.evidence, enumerated.allowed, start, 0, enumerated.logits)
        for _ in range(6000):
            collapsed.step(5)
            total += np.eye(4)[collapsed.index]
    else:
        gibbs = GibbsSwapChain(enumerated.evidence, enumerated.allowed, start, 0, proposals=15, logits=enumerated.logits)
        for _ in range(6000):
            gibbs.step()
            total += np.eye(4)[gibbs.index]
    assert np.abs(total / 6000 - exact).max() < 0.04


# Swaps, one by one


@pytest.fixture(params=[None, [12, 8]], ids=["all shown", "one shows less"])
def middle_sized(request: pytest.FixtureRequest) -> tuple[Worms, CollapsedEvidence]:
    connectome = small_connectome(12)
    worms = simulate(connectome, worms=2, steps=40, known=0.1, eta=0.6)
    if request.param is not None:
        worms = show_less(worms, request.param)
    statistics = Statistics.from_worms(worms)
    return worms, CollapsedEvidence(connectome.adjacency, statistics, worms.sigma, worms.weight_scale)


def log_joint(worms: Worms, evidence: CollapsedEvidence, index: Tensor) -> float:
    P = onehot(index)
    return float(evidence(P) + (P * worms.logits).sum())


def test_collapsed_swaps_are_scored_exactly_and_undone_exactly(middle_sized: tuple[Worms, CollapsedEvidence]) -> None:
    worms, evidence = middle_sized
    assert worms.truth is not None
    chain = CollapsedSwapChain(evidence, worms.allowed, worms.truth, 0, worms.logits)
    value = log_joint(worms, evidence, worms.truth)
    assert chain.log_evidence == pytest.approx(value, abs=1e-8)
    swapped = 0
    for worm, first, second in chain.pairs.tolist():
        for accept in (False, True):  # refused whatever the score, then accepted
            before = chain.index.copy(), chain.log_evidence
            took = chain.propose(worm, first, second, -math.inf if accept else math.inf)
            if took:
                before[0][worm, [first, second]] = before[0][worm, [second, first]]
                swapped += 1
            else:
                assert chain.log_evidence == before[1]
            assert np.array_equal(chain.index, before[0])
            value = log_joint(worms, evidence, torch.from_numpy(chain.index))
            assert chain.log_evidence == pytest.approx(value, abs=1e-8)
    assert swapped > 20
    assert (chain.accepted, chain.proposed) == (swapped, 2 * len(chain.pairs))
    assert bool(worms.allowed.gather(2, torch.from_numpy(chain.index).unsqueeze(2)).all())


def test_collapsed_swaps_are_accepted_by_the_metropolis_rule(middle_sized: tuple[Worms, CollapsedEvidence]) -> None:
    """A log uniform number just below the change of the evidence accepts, one just above refuses."""
    worms, evidence = middle_sized
    assert worms.truth is not None
    value = log_joint(worms, evidence, worms.truth)
    for first, second in swap_pairs(worms.allowed[1], worms.observed[1]).tolist():
        other = worms.truth.clone()
        other[1, [first, second]] = other[1, [second, first]]
        if not bool(worms.allowed.gather(2, other.unsqueeze(2)).all()):
            continue
        change = log_joint(worms, evidence, other) - value
        for shift, expected in ((-1e-6, True), (1e-6, False)):
            chain = CollapsedSwapChain(evidence, worms.allowed, worms.truth, 0, worms.logits)
            assert chain.propose(1, first, second, change + shift) is expected


def test_swap_changes_are_the_difference_of_the_sums() -> None:
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, 3, 5, 5))
    pairs = np.array(list(itertools.permutations(range(5), 2)))
    changes = swap_changes(A, B, pairs[:, 0], pairs[:, 1])
    for (p, q), change in zip(pairs, changes, strict=True):
        order = np.arange(5)
        order[[p, q]] = q, p
        assert change == pytest.approx((A[:, order][:, :, order] * B).sum() - (A * B).sum(), abs=1e-12)


def test_gibbs_swaps_are_those_of_a_plain_metropolis_loop(middle_sized: tuple[Worms, CollapsedEvidence]) -> None:
    """Scoring in blocks gives what a loop over all proposals gives that computes every likelihood afresh."""
    worms, evidence = middle_sized
    assert worms.truth is not None
    W = evidence.sample_weights(onehot(worms.truth), torch.Generator().manual_seed(0))
    start = random_allowed(worms.allowed, torch.Generator().manual_seed(1))
    chain = GibbsSwapChain(evidence, worms.allowed, start, 7, proposals=300, logits=worms.logits)
    chain.swap(W)

    rng, index, accepted, valid = np.random.default_rng(7), start.clone(), 0, 0
    for worm in range(2):
        pairs = swap_pairs(worms.allowed[worm], worms.observed[worm]).numpy()
        proposals = pairs[rng.integers(len(pairs), size=300)].tolist()
        log_uniform = np.log1p(-rng.random(300))
        for (p, q), u in zip(proposals, log_uniform, strict=True):
            other = index.clone()
            other[worm, [p, q]] = index[worm, [q, p]]
            if not bool(worms.allowed.gather(2, other.unsqueeze(2)).all()):
                continue
            valid += 1
            both = log_likelihood(onehot(torch.stack([index, other])), W, evidence.statistics, evidence.sigma)
            places = (onehot(torch.stack([index, other])) * worms.logits).sum((1, 2, 3))
            if u < float((both + places)[1] - (both + places)[0]):
                index, accepted = other, accepted + 1
    assert accepted > 10
    assert chain.index.tolist() == index.tolist()
    assert (chain.accepted, chain.valid, chain.proposed) == (accepted, valid, 600)


def test_chains_stand_still_where_everything_is_known() -> None:
    connectome = small_connectome(6)
    worms = simulate(connectome, worms=2, steps=10, known=1.0)
    assert worms.truth is not None
    for fit in METHODS.values():
        result = fit(worms, connectome, steps=3)
        assert torch.equal(result.index, worms.truth)
        assert torch.equal(result.marginals, onehot(worms.truth))


# What every method promises


@pytest.fixture(scope="module", params=[None, [7, 9]], ids=["all shown", "one shows less"])
def tiny(request: pytest.FixtureRequest) -> tuple[Worms, Connectome]:
    connectome = small_connectome(9)
    worms = simulate(connectome, worms=2, steps=200, known=0.2, eta=0.5, spectral_factor=1.5)
    return worms if request.param is None else show_less(worms, request.param), connectome


def check(result: Identification, worms: Worms, steps: int) -> None:
    assert result.marginals.shape == worms.allowed.shape
    assert result.marginals.dtype == torch.float64
    torch.testing.assert_close(result.marginals.sum(-1), torch.ones_like(result.marginals[..., 0]))
    assert bool((result.marginals >= 0).all())
    assert not result.marginals[~worms.allowed].any()
    for index in [result.index, *(snapshot.index for snapshot in result.history)]:
        assert index.dtype == torch.long
        assert torch.equal(index.sort(-1).values, torch.arange(9).expand(2, 9))
        assert bool(worms.allowed.gather(2, index.unsqueeze(2)).all())
    assert torch.equal(result.index, match_allowed(result.marginals, worms.allowed))
    assert [snapshot.step for snapshot in result.history] == list(range(1, steps + 1))
    seconds = [snapshot.seconds for snapshot in result.history]
    assert sorted(seconds) == seconds
    assert seconds[-1] <= result.seconds
    assert all(math.isfinite(snapshot.objective) for snapshot in result.history)
    assert all(isinstance(value, float) and math.isfinite(value) for value in result.extra.values())


@every_method
def test_method_returns_an_identification(fit: Fit, tiny: tuple[Worms, Connectome]) -> None:
    check(fit(*tiny, steps=20), tiny[0], 20)


@every_method
def test_method_repeats_itself_and_never_looks_at_the_truth(fit: Fit, tiny: tuple[Worms, Connectome]) -> None:
    worms, connectome = tiny
    blind = dataclasses.replace(worms, truth=None, weights=None)
    first, again = fit(worms, connectome, steps=12, seed=1), fit(blind, connectome, steps=12, seed=1)
    assert torch.equal(first.marginals, again.marginals)
    assert torch.equal(first.index, again.index)
    assert [s.objective for s in first.history] == [s.objective for s in again.history]
    other = fit(worms, connectome, steps=12, seed=2)
    assert [s.objective for s in first.history] != [s.objective for s in other.history]


@every_method
def test_method_stops_when_its_budget_is_spent(
    fit: Fit, tiny: tuple[Worms, Connectome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "clock", staticmethod(time.process_time))  # which other jobs do not change
    result = fit(*tiny, budget=0.4)
    assert 0.4 <= result.seconds < 2.0
    assert 5 <= len(result.history) <= 130  # two runs where a chain follows the guide
    assert fit(*tiny, budget=60.0, steps=3).seconds < 20


@every_method
def test_method_finds_the_truth_of_an_easy_problem(fit: Fit) -> None:
    connectome = small_connectome(9)
    worms = simulate(connectome, worms=3, steps=2000, known=0.5, eta=0.4, spectral_factor=1.3, seed=0)
    assert worms.truth is not None
    assert float((fit(worms, connectome, steps=150).index == worms.truth).double().mean()) > 0.9


@every_method
def test_method_finds_the_neurons_of_a_worm_that_shows_fewer(fit: Fit) -> None:
    connectome = small_connectome(9)
    worms = simulate(connectome, worms=3, steps=2000, known=0.5, eta=0.4, spectral_factor=1.3, seed=1)
    worms = dataclasses.replace(show_less(worms, [9, 7, 8]), logits=torch.zeros(3, 9, 9, dtype=torch.float64))
    assert worms.truth is not None
    # single swaps given W leave one of the chains in a cycle of three
    assert float((fit(worms, connectome, steps=150).index == worms.truth)[worms.observed].double().mean()) > 0.85


@every_method
def test_logits_decide_where_the_recording_cannot(fit: Fit) -> None:
    connectome = small_connectome(9)
    worms = simulate(connectome, worms=2, steps=2, known=0.0, eta=0.4, spectral_factor=1.3, seed=0)
    assert worms.truth is not None
    told = dataclasses.replace(worms, logits=12 * onehot(worms.truth))
    right = [float((fit(w, connectome, steps=60).index == w.truth).double().mean()) for w in (worms, told)]
    assert right[0] < 0.7
    assert right[1] > 0.9


@every_method
def test_method_starts_where_it_is_told(fit: Fit) -> None:
    connectome = small_connectome(9)
    worms = simulate(connectome, worms=2, steps=2000, known=0.3, eta=0.4, spectral_factor=1.3, seed=1)
    assert worms.truth is not None
    result = fit(worms, connectome, steps=1, initial=worms.truth)
    assert torch.equal(result.index, worms.truth)
    assert torch.equal(result.history[0].index, worms.truth)


@every_method
def test_progress_shows_the_objective_and_no_accuracy(
    fit: Fit, tiny: tuple[Worms, Connectome], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(*tiny, steps=3)
    assert capsys.readouterr().err == ""
    fit(*tiny, steps=3, progress=True)
    shown = capsys.readouterr().err
    assert "objective" in shown
    assert "accuracy" not in shown


@every_method
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "budget=None and steps=None: expected seconds, a number of steps or both"),
        ({"budget": 0.0}, r"budget=0\.0: expected a positive finite number of seconds"),
        ({"budget": math.inf}, "budget=inf"),
        ({"steps": 0}, "steps=0: expected an integer of at least 1"),
        ({"steps": 2.5}, r"steps=2\.5: expected an integer"),
        ({"steps": 1, "initial": torch.arange(9)}, r"initial has shape \(9,\).*expected \(2, 9\)"),
        (
            {"steps": 1, "initial": torch.zeros(2, 9, dtype=torch.float32)},
            r"initial has .*dtype torch\.float32",
        ),
        (
            {"steps": 1, "initial": torch.zeros(2, 9, dtype=torch.long)},
            r"initial: expected each row to be a permutation",
        ),
        (
            {"steps": 1, "initial": torch.arange(9).expand(2, 9)},
            r"initial\[0, \d\] is \d, expected an identity",
        ),
    ],
)
def test_method_refuses_bad_arguments(
    fit: Fit, tiny: tuple[Worms, Connectome], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(*tiny, **arguments)


# Parts of the methods


def test_rows_are_relaxed_on_their_candidates() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf], [-math.inf, 2.0, -math.inf], [0.5, 0.0, 1.0]], dtype=torch.float64)
    rows = relaxed_rows(logits.expand(20_000, 3, 3), 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rows.sum(-1), torch.ones(20_000, 3, dtype=torch.float64))
    assert not rows[:, logits == -math.inf].any()
    hard = torch.nn.functional.one_hot(rows.argmax(-1), 3).double().mean(0)
    torch.testing.assert_close(hard, logits.softmax(-1), atol=0.02, rtol=0)  # Gumbel's maximum: 5.6 standard errors


def test_row_kl_is_that_of_categorical_laws() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf], [-math.inf, 2.0, -math.inf], [0.5, 0.0, 1.0]], dtype=torch.float64)
    expected = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=row[row > -math.inf]),
            torch.distributions.Categorical(logits=torch.zeros_like(row[row > -math.inf])),
        )
        for row in logits
    )
    uniform = torch.where(logits > -math.inf, 0.0, -math.inf)
    torch.testing.assert_close(row_kl(logits, uniform), expected)
    torch.testing.assert_close(row_kl(logits, logits - 1.0), torch.zeros((), dtype=torch.float64))
    free = logits.clone().nan_to_num(neginf=0.0)

    def value(free: Tensor) -> Tensor:
        return row_kl(torch.where(logits > -math.inf, free, -math.inf), uniform)

    assert torch.autograd.gradcheck(value, (free.requires_grad_(),))


def test_regressions_recover_the_weights_in_each_worms_order() -> None:
    connectome = small_connectome(6)
    worms = simulate(connectome, worms=2, steps=20_000, spectral_factor=1.5)
    assert worms.truth is not None
    assert worms.weights is not None
    P = onehot(worms.truth)
    estimates = regressions(worms, Statistics.from_traces(worms.traces))
    torch.testing.assert_close(estimates, P @ worms.weights @ P.mT, atol=0.04, rtol=0)


@pytest.mark.filterwarnings("error")
def test_mask_center_is_doubly_stochastic_even_where_candidates_lie_on_no_permutation() -> None:
    allowed = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 1, 1]]).bool()
    center = mask_center(allowed)
    expected = torch.tensor([[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(center, expected)


def test_map_never_goes_down() -> None:
    connectome = small_connectome(9)
    worms = simulate(connectome, worms=2, steps=50, known=0.2, eta=0.5)
    objectives = [snapshot.objective for snapshot in fit_map_faq(worms, connectome, steps=30).history]
    assert sorted(objectives) == objectives
    evidence = CollapsedEvidence(connectome.adjacency, Statistics.from_traces(worms.traces), worms.sigma, worms.weight_scale)
    result = fit_map_faq(worms, connectome, steps=30)
    assert evidence(onehot(result.index)).item() == pytest.approx(result.history[-1].objective)


def test_random_allowed_permutations_reach_every_one() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool().expand(200, 3, 3)
    index = random_allowed(mask, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in index.tolist()} == {(0, 1, 2), (1, 0, 2), (0, 2, 1)}

import dataclasses

import pytest
import torch

from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence, Statistics
from tutorials.celegans.worms import Worms, accuracy, chance_accuracy, simulate, swap_pairs


def ring(n: int = 8) -> Connectome:
    """Neurons in a row along the body, each a parent of the next two, the last of the first."""
    adjacency = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        adjacency[(i + 1) % n, i] = adjacency[(i + 2) % n, i] = True
    position = torch.zeros(n, 3, dtype=torch.float64)
    position[:, 1] = torch.arange(n)
    return Connectome(tuple(f"AV{chr(65 + i)}L" for i in range(n)), adjacency, position, "ring")


def tiny(**changes: object) -> Worms:
    """Two worms of three neurons, to be spoiled by the changes."""
    fields: dict[str, object] = {
        "traces": torch.zeros(2, 5, 3, dtype=torch.float64),
        "allowed": torch.ones(2, 3, 3, dtype=torch.bool),
        "known": torch.zeros(2, 3, dtype=torch.bool),
        "truth": torch.tensor([[0, 1, 2], [2, 0, 1]]),
        "sigma": 1.0,
        "weight_scale": 0.5,
    }
    return Worms(**(fields | changes))  # type: ignore[arg-type]


def test_simulation_has_the_shapes_and_the_scale_it_promises() -> None:
    worms = simulate(ring(), worms=3, steps=20, spectral_factor=2.5)
    assert worms.traces.shape == (3, 21, 8)
    assert (worms.num_worms, worms.num_neurons) == (3, 8)
    assert worms.weights is not None
    assert float(torch.linalg.eigvals(worms.weights).abs().max()) == pytest.approx(1 / 2.5)
    assert not worms.weights[~ring().adjacency].any()


def test_simulation_is_determined_by_its_seed() -> None:
    first, again, other = (simulate(ring(), steps=5, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.traces, again.traces)
    assert not torch.equal(first.traces, other.traces)


def test_traces_follow_the_model_in_each_worms_order() -> None:
    worms = simulate(ring(), worms=2, steps=20_000, known=0.0, sigma=0.5)
    assert worms.truth is not None
    assert worms.weights is not None
    for traces, index in zip(worms.traces, worms.truth, strict=True):
        P = torch.eye(8, dtype=torch.float64)[index]
        noise = traces[1:] - traces[:-1] @ (P @ worms.weights @ P.mT).mT
        covariance = noise.mT @ noise / len(noise)
        torch.testing.assert_close(covariance, 0.25 * torch.eye(8, dtype=torch.float64), atol=0.015, rtol=0)
        assert noise.mean(0).abs().max() < 0.02


def test_traces_are_stationary_from_the_start() -> None:
    """Over many worms, the covariance of the first time step solves ``S = W S W' + sigma^2 I``."""
    worms = simulate(ring(4), worms=40_000, steps=2, known=0.0, spectral_factor=1.2)
    assert worms.truth is not None
    assert worms.weights is not None
    first = torch.empty_like(worms.traces[:, 0]).scatter_(1, worms.truth, worms.traces[:, 0])
    covariance = first.mT @ first / len(first)
    expected = worms.weights @ covariance @ worms.weights.mT + torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, atol=0.1, rtol=0.05)


def test_sigma_alone_cancels() -> None:
    """It scales all activity, exactly by a power of two, and the evidence by a factor that no permutation changes."""
    one, four = (simulate(ring(), steps=50, sigma=sigma) for sigma in (1.0, 4.0))
    assert torch.equal(4 * one.traces, four.traces)
    assert torch.equal(one.allowed, four.allowed)
    assert one.weight_scale == four.weight_scale
    P = torch.eye(8, dtype=torch.float64)[torch.stack([torch.randperm(8) for _ in range(4)])]
    values = []
    for worms in (one, four):
        assert worms.truth is not None
        evidence = CollapsedEvidence(ring().adjacency, Statistics.from_worms(worms), worms.sigma, worms.weight_scale)
        values.append(float(evidence(P) - evidence(torch.eye(8, dtype=torch.float64)[worms.truth])))
    assert values[0] == pytest.approx(values[1], rel=1e-9)  # nats; rounding only


def test_measurement_noise_is_added_to_the_traces_alone() -> None:
    clean, noisy = (simulate(ring(), steps=5000, measurement_noise=noise) for noise in (0.0, 0.5))
    assert clean.weights is not None
    assert noisy.weights is not None
    assert torch.equal(clean.weights, noisy.weights)
    assert torch.equal(clean.allowed, noisy.allowed)
    noise = noisy.traces - clean.traces
    # 160,000 numbers: the standard error of the deviation is .0009, of a mean over 5,001 time steps .007
    assert float(noise.std()) == pytest.approx(0.5, abs=0.005)
    assert noise.mean(1).abs().max() < 0.04
    lag = (noise[:, 1:] * noise[:, :-1]).mean()
    assert abs(float(lag)) < 0.003  # white, while the activity is not


def test_unseen_neurons_are_rows_at_the_end() -> None:
    all_seen, worms = (simulate(ring(10), worms=3, steps=20, known=0.3, eta=0.3, unseen=u) for u in (0.0, 0.4))
    assert worms.truth is not None
    assert all_seen.truth is not None
    assert worms.observed.tolist() == [[True] * 6 + [False] * 4] * 3
    assert worms.known.sum(1).tolist() == [3, 3, 3]
    assert not worms.known[:, 6:].any()
    for j in range(3):
        hidden = set(worms.truth[j, 6:].tolist())
        for m in range(6):  # the same activity and candidates under the same name
            identity = int(worms.truth[j, m])
            before = all_seen.truth[j].tolist().index(identity)
            assert torch.equal(worms.traces[j, :, m], all_seen.traces[j, :, before])
            assert set(worms.allowed[j, m].nonzero().flatten().tolist()) == set(
                all_seen.allowed[j, before].nonzero().flatten().tolist()
            )
            assert not worms.known[j, m] or identity not in hidden
        free = set(range(10)) - set(worms.truth[j, worms.known[j].nonzero().flatten()].tolist())
        spare = {tuple(worms.allowed[j, m].nonzero().flatten().tolist()) for m in range(6, 10)}
        assert len(spare) == 1
        # Identities that one neuron must have, since it has no other, are on no permutation with another row.
        forced = {int(worms.truth[j, m]) for m in range(6) if worms.allowed[j, m].sum() == 1}
        assert hidden <= set(spare.pop()) == free - forced
    assert len({tuple(sorted(worms.truth[j, 6:].tolist())) for j in range(3)}) > 1  # not the same in each worm


def test_orders_differ_between_worms() -> None:
    truth = simulate(ring(), worms=4, steps=2).truth
    assert truth is not None
    assert len({tuple(row) for row in truth.tolist()}) == 4


@pytest.mark.parametrize(("known", "count"), [(0.0, 0), (0.2, 2), (0.3, 2), (0.33, 3), (1.0, 8)])
def test_known_neurons_have_the_truth_alone_and_keep_it_to_themselves(known: float, count: int) -> None:
    worms = simulate(ring(), worms=3, steps=2, known=known, eta=0.5)
    assert worms.truth is not None
    assert worms.known.sum(1).tolist() == [count] * 3
    for j in range(3):
        for m in worms.known[j].nonzero().flatten().tolist():
            identity = int(worms.truth[j, m])
            assert worms.allowed[j, m].nonzero().flatten().tolist() == [identity]
            assert worms.allowed[j, :, identity].nonzero().flatten().tolist() == [m]


def test_candidates_are_the_identities_nearer_than_eta() -> None:
    connectome = ring()
    worms = simulate(connectome, steps=2, known=0.0, eta=0.3)
    assert worms.truth is not None
    for j, m, i in [(0, 0, 0), (1, 3, 5), (2, 7, 7), (3, 1, 2)]:
        distance = abs(connectome.body[worms.truth[j, m]] - connectome.body[i])
        assert bool(worms.allowed[j, m, i]) == bool(distance < 0.3)
    assert worms.allowed.sum(-1).max() == 5  # 2 of 7 steps to each side


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"known": 1.2}, r"known=1\.2: expected a share within \[0, 1\]"),
        ({"known": -0.1}, r"known=-0\.1"),
        ({"known": float("nan")}, r"known=nan"),
        ({"eta": 0.0}, r"eta=0\.0: expected a positive finite number"),
        ({"eta": float("inf")}, r"eta=inf"),
        ({"worms": 0}, r"worms=0: expected an integer of at least 1"),
        ({"worms": 2.0}, r"worms=2\.0: expected an integer"),
        ({"steps": 1}, r"steps=1: expected an integer of at least 2"),
        ({"sigma": -1.0}, r"sigma=-1\.0: expected a positive finite number"),
        ({"sigma": float("nan")}, r"sigma=nan"),
        ({"measurement_noise": -0.1}, r"measurement_noise=-0\.1: expected a finite number of at least 0"),
        ({"measurement_noise": float("nan")}, r"measurement_noise=nan"),
        ({"unseen": 1.1}, r"unseen=1\.1: expected a share within \[0, 1\]"),
        ({"unseen": 0.9}, r"unseen=0\.9: 7 of 8 neurons, expected at most 6 with known=0\.2"),
        ({"unseen": 1.0, "known": 0.0}, r"unseen=1\.0: 8 of 8 neurons, expected at most 7 with known=0\.0"),
        ({"spectral_factor": 1.0}, r"spectral_factor=1\.0: expected a finite number above 1"),
        ({"spectral_factor": float("inf")}, r"spectral_factor=inf"),
    ],
)
def test_simulation_refuses_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(ring(), **arguments)  # type: ignore[arg-type]


def test_simulation_refuses_a_network_without_cycles() -> None:
    connectome = ring()
    lower = dataclasses.replace(connectome, adjacency=connectome.adjacency.tril(-1))
    with pytest.raises(ValueError, match="no cycle"):
        simulate(lower)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_traces_must_be_finite(bad: float) -> None:
    traces = torch.zeros(2, 5, 3, dtype=torch.float64)
    traces[1, 4, 2] = bad
    with pytest.raises(ValueError, match=rf"traces\[1, 4, 2\] is {bad} \(worm 1, time step 4, neuron 2; 1 such"):
        tiny(traces=traces)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"traces": torch.zeros(5, 3, dtype=torch.float64)}, r"traces has shape \(5, 3\)"),
        ({"traces": torch.zeros(2, 1, 3, dtype=torch.float64)}, "at least 2 time steps"),
        ({"traces": torch.zeros(2, 5, 3, dtype=torch.float32)}, r"dtype torch\.float32, expected float64"),
        (
            {"allowed": torch.ones(2, 3, 4, dtype=torch.bool)},
            r"allowed has shape \(2, 3, 4\).*expected \(2, 3, 3\)",
        ),
        ({"allowed": torch.ones(2, 3, 3)}, r"allowed has .*expected \(2, 3, 3\) and torch\.bool"),
        ({"known": torch.zeros(3, dtype=torch.bool)}, r"known has shape \(3,\)"),
        ({"truth": torch.tensor([[0, 1, 2]])}, r"truth has shape \(1, 3\)"),
        ({"truth": torch.tensor([[0, 1, 1], [0, 1, 2]])}, r"truth: expected each row to be a permutation"),
        (
            {"allowed": ~torch.eye(3, dtype=torch.bool).expand(2, 3, 3)},
            r"truth\[0, 0\] is 0, expected an identity",
        ),
        ({"allowed": torch.zeros(2, 3, 3, dtype=torch.bool)}, "neuron 0 of worm 0 has 0 candidates"),
        (
            {"known": torch.ones(2, 3, dtype=torch.bool)},
            "known: neuron 0 of worm 0 has 3 candidates, expected exactly one",
        ),
        ({"weights": torch.zeros(2, 2, dtype=torch.float64)}, r"weights has shape \(2, 2\)"),
        ({"sigma": 0.0}, r"sigma=0\.0: expected a positive finite number"),
        ({"weight_scale": float("nan")}, "weight_scale=nan"),
    ],
)
def test_worms_refuse_fields_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_some_of_the_worms() -> None:
    worms = simulate(ring(), worms=3, steps=9, known=0.25, eta=0.5, unseen=0.25, seed=0)
    traces = worms.traces.clone()
    traces[0, 5:] = 0
    worms = dataclasses.replace(worms, traces=traces, lengths=torch.tensor([4, 9, 9]))
    both = worms.take([2, 0])
    for name in ("allowed", "known", "truth", "observed", "logits", "lengths", "persistence", "traces"):
        assert torch.equal(getattr(both, name), getattr(worms, name)[[2, 0]])
    assert both.sigma == worms.sigma
    assert torch.equal(worms.take([0]).traces, worms.traces[:1, :5])  # no longer than the recording


def test_accuracy_counts_every_observed_neuron() -> None:
    truth = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    index = torch.tensor([[0, 1, 3, 2], [3, 2, 1, 0]])
    assert accuracy(index, truth) == 0.75
    with pytest.raises(ValueError, match=r"index has shape \(4,\), expected that of truth, \(2, 4\)"):
        accuracy(index[0], truth)


def test_swap_pairs_share_two_candidates() -> None:
    allowed = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]).bool()
    assert swap_pairs(allowed).tolist() == [[0, 1], [1, 2]]


def test_chance_accuracy_agrees_with_enumeration() -> None:
    """Of the three permutations of a tridiagonal mask, the identity has 3 right, the two others 1."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
    worms = tiny(allowed=mask.expand(2, 3, 3), truth=torch.arange(3).expand(2, 3))
    assert chance_accuracy(worms, chains=200, sweeps=200) == pytest.approx(5 / 9, abs=0.01)


def test_chance_accuracy_without_a_mask_is_one_in_n() -> None:
    worms = simulate(ring(10), steps=2, known=0.0, eta=2.0)
    assert chance_accuracy(worms) == pytest.approx(0.1, abs=0.01)


def test_chance_accuracy_counts_known_neurons() -> None:
    assert chance_accuracy(simulate(ring(), steps=2, known=1.0)) == 1.0
    half = chance_accuracy(simulate(ring(10), steps=2, known=0.5, eta=2.0))
    assert half == pytest.approx(0.5 + 0.5 / 5, abs=0.01)


def test_chance_accuracy_needs_truth() -> None:
    with pytest.raises(ValueError, match=r"worms\.truth is None"):
        chance_accuracy(tiny(truth=None))

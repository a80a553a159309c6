"""Exchanges as Metropolis moves: exact scores, exact undoing, the right target; and the power's way up."""

import itertools

import numpy as np
import pytest
import torch
from padded import show_less
from test_baselines import FAILURE_RATE, Enumerated, log_joint, p_value, small_connectome

from tutorials.celegans.baselines.tempered_mcmc import ANNEALED, _power
from tutorials.celegans.collapsed_chain import CollapsedSwapChain, ExchangeChain
from tutorials.celegans.evidence import CollapsedEvidence, Statistics
from tutorials.celegans.worms import simulate


@pytest.mark.parametrize("sizes", [None, [3, 4]], ids=["all shown", "one shows less"])
def test_exchanges_leave_the_posterior_invariant(sizes):
    small = Enumerated(2, sizes)
    rng = np.random.default_rng(3)
    counts = np.zeros(len(small.probs))
    moved = 0
    for seed in range(1500):
        start = small.draw(rng)
        chain = ExchangeChain(small.evidence, small.allowed, start, seed, small.logits)
        chain.exchange(4)
        counts[small.state(chain.index)] += 1
        moved += not np.array_equal(chain.index, start.numpy())
    assert moved > 150
    assert p_value(counts, small.probs) > FAILURE_RATE


@pytest.mark.parametrize("sizes", [None, [12, 8, 10]], ids=["all shown", "some show less"])
def test_exchanges_are_scored_exactly_and_undone_exactly(sizes):
    connectome = small_connectome(12)
    worms = simulate(connectome, worms=3, steps=40, known=0.1, eta=0.6)
    if sizes is not None:
        worms = show_less(worms, sizes)
    evidence = CollapsedEvidence(connectome.adjacency, Statistics.from_worms(worms), worms.sigma, worms.weight_scale)
    chain = ExchangeChain(evidence, worms.allowed, worms.truth, 0, worms.logits)
    value = log_joint(worms, evidence, worms.truth)
    several = 0
    for a, b in itertools.combinations(range(12), 2):
        members = chain.exchangeable(a, b)
        if not len(members):
            continue
        before = chain.index.copy()
        assert not chain.propose_exchange(members, a, b, np.inf)
        assert np.array_equal(chain.index, before)
        assert chain.log_evidence == pytest.approx(value, abs=1e-8)
        assert chain.propose_exchange(members, a, b, -np.inf)
        assert np.array_equal((chain.index != before).sum(1) > 0, np.isin(np.arange(3), members))
        value = log_joint(worms, evidence, torch.from_numpy(chain.index))
        assert chain.log_evidence == pytest.approx(value, abs=1e-8)
        assert np.array_equal(chain.exchangeable(a, b), members)  # what makes the proposal symmetric
        several += len(members) > 1
    assert several > 10
    assert bool(worms.allowed.gather(2, torch.from_numpy(chain.index).unsqueeze(2)).all())


def test_the_power_rises_to_one():
    powers = [_power(fraction, 1000) for fraction in np.linspace(0, ANNEALED - 1e-9, 50)]
    assert powers[0] == 0.04
    assert powers == sorted(powers)
    assert 0.11 < powers[-1] < 0.12
    assert _power(ANNEALED, 1000) == 1.0
    assert _power(0.0, 30) == 1.0  # so few transitions never count for less


def test_exchanges_undo_what_swaps_in_single_worms_cannot():
    # Two identities exchanged in every worm: the weights have learned it.
    connectome = small_connectome(12)
    worms = simulate(connectome, worms=3, steps=2000, known=0.0, eta=0.5, spectral_factor=1.3, seed=2)
    evidence = CollapsedEvidence(connectome.adjacency, Statistics.from_worms(worms), worms.sigma, worms.weight_scale)
    start = ExchangeChain(evidence, worms.allowed, worms.truth, 0)
    truth = start.log_evidence
    for a, b in ((4, 5), (8, 9)):
        assert start.propose_exchange(np.arange(3), a, b, -np.inf)
    confused = torch.from_numpy(start.index)
    assert start.log_evidence < truth - 50
    swaps, exchanges = (kind(evidence, worms.allowed, confused, 1) for kind in (CollapsedSwapChain, ExchangeChain))
    swaps.step(4000)
    exchanges.exchange(4000)
    assert swaps.log_evidence < truth - 50
    assert exchanges.log_evidence > truth - 20

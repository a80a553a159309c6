"""Worms simulated from an answer, and probabilities corrected by them."""

import dataclasses

import pytest
import torch
from padded import show_less

from tutorials.celegans import gumbel_sinkhorn
from tutorials.celegans.connectome import load_connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.identification import onehot, random_allowed
from tutorials.celegans.recalibration import recalibrated, simulate_like, simulated_reliability
from tutorials.celegans.report import score
from tutorials.celegans.worms import simulate

pytestmark = pytest.mark.usefixtures("float64_only")


def make(neurons=24, **options):
    torch.set_default_dtype(torch.float64)
    connectome = load_connectome().thin(neurons, torch.Generator().manual_seed(0))
    return connectome, simulate(connectome, worms=2, seed=0, **options)


def test_simulated_worms_have_the_answer_as_their_truth():
    connectome, worms = make(steps=2000, known=0.2, eta=0.3)
    worms = show_less(worms, [24, 20])
    index = worms.truth
    again = simulate_like(worms, connectome, index, seed=3)
    for name in ("allowed", "known", "observed", "logits", "lengths", "persistence"):
        assert torch.equal(getattr(again, name), getattr(worms, name))
    assert torch.equal(again.truth, index)
    hidden = ~again.observed.unsqueeze(1) | (torch.arange(2001) > again.lengths.unsqueeze(-1)).unsqueeze(-1)
    assert not bool(again.traces[hidden.expand_as(again.traces)].any())
    # the activity follows the weights: the evidence is highest at the answer, far above other allowed permutations
    evidence = CollapsedEvidence.of_worms(again, connectome)
    others = [random_allowed(worms.allowed, torch.Generator().manual_seed(seed)) for seed in range(5)]
    assert all(float(evidence(onehot(index))) > float(evidence(onehot(other))) + 20 for other in others)
    other = simulate_like(worms, connectome, index, seed=4)
    assert not torch.equal(other.traces, again.traces)


def test_persistent_activity_stays_bounded():
    connectome, worms = make(steps=300, known=0.2, eta=0.3)
    worms = dataclasses.replace(worms, persistence=torch.full_like(worms.persistence, 0.9), weight_scale=1.0)
    again = simulate_like(worms, connectome, worms.truth)
    assert bool(again.traces.isfinite().all())
    assert float(again.traces.abs().max()) < 1e3


def test_probabilities_that_are_too_high_come_down():
    """Plain SVI without candidates to go by is sure of answers that are wrong; on worms like these it is so too."""
    connectome, worms = make(neurons=30, steps=1000, known=0.0, eta=1.0)
    options = {"steps": 300, "exchange": False, "restarts": False}
    result = gumbel_sinkhorn.fit(worms, connectome, seed=0, **options)
    curve = simulated_reliability(gumbel_sinkhorn.fit, worms, connectome, result.index, seeds=(1, 2), **options)
    assert int(curve.count.sum()) == 2 * int((worms.observed & ~worms.known).sum())
    corrected = recalibrated(result, worms, curve)
    before, after = score(result, worms), score(corrected, worms)
    assert before.accuracy == after.accuracy
    assert before.calibration_error > 0.15
    assert after.calibration_error < before.calibration_error - 0.05
    assert torch.equal(corrected.marginals[worms.known], result.marginals[worms.known])
    torch.testing.assert_close(corrected.marginals.sum(-1), torch.ones(2, 30))


def test_nothing_to_correct_where_all_are_known():
    connectome, worms = make(neurons=12, steps=50, known=1.0, eta=0.3)
    result = gumbel_sinkhorn.fit(worms, connectome, steps=2)
    assert simulated_reliability(gumbel_sinkhorn.fit, worms, connectome, result.index, steps=2) is None
    assert recalibrated(result, worms, None) is result


def test_neurons_without_a_choice_do_not_count():
    """Of unknown neurons with one candidate a method is always sure and right; that says nothing about the others."""
    connectome, worms = make(neurons=12, steps=50, known=0.0, eta=0.3)
    allowed = worms.allowed.clone()
    allowed[:, :8] = onehot(worms.truth)[:, :8].bool()
    worms = dataclasses.replace(worms, allowed=allowed)
    result = gumbel_sinkhorn.fit(worms, connectome, steps=2)
    curve = simulated_reliability(gumbel_sinkhorn.fit, worms, connectome, result.index, steps=2)
    choice = worms.allowed.sum(-1) > 1
    assert 0 < int(choice.sum()) <= 8
    assert int(curve.count.sum()) == int(choice.sum())
    corrected = recalibrated(result, worms, curve)
    assert torch.equal(corrected.marginals[~choice], result.marginals[~choice])

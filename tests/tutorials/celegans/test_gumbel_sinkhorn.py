"""The guide's fit: exchanges against brute force, determinism, and that it identifies an easy network."""

import dataclasses
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from padded import show_less
from pyro.infer import MCMC

import pyro_gs as pgs
from tutorials.celegans import gumbel_sinkhorn
from tutorials.celegans.connectome import load_connectome
from tutorials.celegans.evidence import CollapsedEvidence, Statistics
from tutorials.celegans.exchange import ExchangeSearch
from tutorials.celegans.identification import random_allowed
from tutorials.celegans.model import collapsed_model
from tutorials.celegans.svi import Ascent
from tutorials.celegans.worms import accuracy, simulate

pytestmark = pytest.mark.usefixtures("float64_only")


def make(n, worms, steps=200, *, sizes=None, **options):
    torch.set_default_dtype(torch.float64)
    whole = load_connectome()
    degree = whole.adjacency.sum(0) + whole.adjacency.sum(1)
    connectome = whole.subset(sorted(degree.argsort(descending=True)[:n].tolist()))  # well connected: all can be told
    data = simulate(connectome, worms=worms, steps=steps, seed=1, **options)
    if sizes is not None:
        data = show_less(data, sizes)
    evidence = CollapsedEvidence(connectome.adjacency, Statistics.from_worms(data), data.sigma, data.weight_scale)
    return connectome, data, evidence


def exchanged(index, pair, worms):
    a, b = pair
    out = index.clone()
    part = out[worms]
    out[worms] = torch.where(part == a, b, torch.where(part == b, a, part))
    return out


def log_joint(data, evidence, index):
    P = pgs.to_matrix(index)
    return float(evidence(P) + (P * data.logits).sum())


@pytest.mark.parametrize("sizes", [None, [14, 11, 12, 14, 13, 14]], ids=["all shown", "some show less"])
@pytest.mark.parametrize("count", [3, 6])
def test_gains_of_exchanges_are_differences_of_the_log_joint(count, sizes):
    _, data, evidence = make(14, count, known=0.1, eta=0.5, sizes=sizes and sizes[:count])
    search = ExchangeSearch(evidence, data.allowed, data.logits)
    index = random_allowed(data.allowed, torch.Generator().manual_seed(0))
    gains, swaps, chosen = search.gains(index)
    before = log_joint(data, evidence, index)
    for move in range(0, len(gains), max(1, len(gains) // 60)):
        worms = torch.from_numpy(search.sets[chosen[move]])
        after = exchanged(index, swaps[move].tolist(), worms)
        assert bool(data.allowed.gather(2, after[..., None]).all())
        assert float(gains[move]) == pytest.approx(log_joint(data, evidence, after) - before, abs=1e-6)


def test_hook_of_the_swap_kernels_scores_worms_that_show_less():
    _, data, evidence = make(8, 2, known=0.1, eta=0.5, sizes=[8, 6])
    search = ExchangeSearch(evidence, data.allowed, data.logits)
    kernel = pgs.SwapMetropolis(collapsed_model, swap_delta=search.swap_delta)  # which checks the hook against the model
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=5, disable_progbar=True)
    mcmc.run(evidence, data.allowed, data.logits)
    assert bool((mcmc.get_samples()["P"].bool() <= data.allowed).all())


def test_every_allowed_exchange_is_scored():
    _, data, evidence = make(10, 2, known=0.2, eta=0.5)
    index = data.truth
    _, swaps, chosen = ExchangeSearch(evidence, data.allowed).gains(index)
    found = set(zip(map(tuple, swaps.tolist()), chosen.tolist(), strict=True))
    count = 0
    for pair in itertools.combinations(range(10), 2):
        for worms in ([0], [1], [0, 1]):
            after = exchanged(index, pair, torch.tensor(worms))
            count += bool(data.allowed.gather(2, after[..., None]).all())
    assert len(found) == len(swaps) == count


@pytest.mark.parametrize("sizes", [None, [14, 11, 12, 14, 13, 14]], ids=["all shown", "some show less"])
@pytest.mark.parametrize("count", [3, 6])
def test_improving_ends_where_no_exchange_helps(count, sizes):
    _, data, evidence = make(14, count, known=0.1, eta=0.5, sizes=sizes and sizes[:count])
    search = ExchangeSearch(evidence, data.allowed, data.logits)
    index = random_allowed(data.allowed, torch.Generator().manual_seed(2))
    better, gained = search.improve(index)
    want = log_joint(data, evidence, better) - log_joint(data, evidence, index)
    assert gained == pytest.approx(want, rel=1e-9)
    assert gained > 0
    assert search.gains(better)[0].max() <= 1e-6
    assert bool(data.allowed.gather(2, better[..., None]).all())
    same, nothing = search.improve(index, seconds=0.0)
    assert torch.equal(same, index)
    assert nothing == 0.0


def test_identifies_a_well_recorded_network():
    # Long recordings: the ceiling is one, and so is the answer.
    connectome, data, _ = make(20, 3, steps=2000, known=0.2, eta=0.3)
    result = gumbel_sinkhorn.fit(data, connectome, steps=300, seed=0)
    assert accuracy(result.index, data.truth) == 1.0
    assert torch.allclose(result.marginals.sum(-1), torch.ones(3, 20))
    assert (result.marginals[~data.allowed] == 0).all()
    assert bool(data.allowed.gather(2, result.index[..., None]).all())
    assert len(result.history) > 10


def test_identifies_worms_that_show_less():
    connectome, data, _ = make(20, 3, steps=2000, known=0.2, eta=0.3, sizes=[17, 20, 18])
    data = dataclasses.replace(data, logits=torch.zeros(3, 20, 20))
    result = gumbel_sinkhorn.fit(data, connectome, steps=300, seed=0)
    assert accuracy(result.index, data.truth, data.observed) > 0.95
    assert (result.marginals[~data.allowed] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exchange": False},
        {"restarts": False},
        {"exchange": False, "restarts": False},
        {"objective": "density"},
        {"objective": "tightened_kl"},
    ],
)
def test_same_seed_same_answer(options):
    connectome, data, _ = make(14, 2, known=0.2, eta=0.4)
    runs = [gumbel_sinkhorn.fit(data, connectome, steps=12, seed=3, **options) for _ in range(2)]
    assert torch.equal(runs[0].marginals, runs[1].marginals)


def test_the_answer_is_the_best_that_was_seen(monkeypatch):
    connectome, data, evidence = make(16, 2, known=0.25, eta=0.5)
    best = []

    class Watched(pgs.PartialRestarts):
        def finish(self, logit=None, loss=None):
            super().finish(logit, loss)
            assert self.guide.logits("P").max().item() in gumbel_sinkhorn.LAST_LOGITS
            best.append(self.best_score)

    monkeypatch.setattr(pgs, "PartialRestarts", Watched)
    monkeypatch.setattr(gumbel_sinkhorn, "LAST_SIZES", (30.0, 30.0))  # throws the guide far off
    found = gumbel_sinkhorn.fit(data, connectome, steps=60)
    assert log_joint(data, evidence, found.index) >= best[0] - 1e-6
    confidence = found.marginals.gather(2, found.index[..., None])
    assert confidence.min() < 0.5  # the guide's own mode is another


def test_a_short_run_answers_with_no_less_than_places_alone():
    connectome, data, evidence = make(14, 2, known=0.1, eta=1.0)
    spread = torch.randn(data.allowed.shape, generator=torch.Generator().manual_seed(0))
    places = dataclasses.replace(data, logits=20 * pgs.to_matrix(data.truth) + spread)
    result = gumbel_sinkhorn.fit(places, connectome, steps=4, exchange=False)
    assert log_joint(places, evidence, result.index) >= log_joint(places, evidence, data.truth)


def test_the_last_stretch_starts_from_the_highest_elbo(monkeypatch):
    connectome, data, _ = make(16, 2, known=0.25, eta=0.5)
    elbos = iter((-5.0, -3.0, -1.0, -2.0, -4.0))
    chosen = []

    class Watched(pgs.PartialRestarts):
        def finish(self, logit=None, loss=None):
            super().finish(logit, loss)
            chosen.append(self.guide.logits("P").max().item())

    monkeypatch.setattr(pgs, "PartialRestarts", Watched)
    monkeypatch.setattr(gumbel_sinkhorn.Ascent, "evaluate", lambda *_: next(elbos))
    gumbel_sinkhorn.fit(data, connectome, steps=10)
    assert chosen == [gumbel_sinkhorn.LAST_LOGITS[2]]


def test_an_elbo_is_estimated_in_place():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(2.0)), 1.0))

    ascent = Ascent(model, guide, seed=0)
    assert ascent.evaluate(4000) == pytest.approx(-2.0, abs=0.15)  # -KL = -2^2 / 2; the estimate's own error is 0.03
    assert pyro.param("m").item() == 2.0


def test_where_none_is_known_one_worm_is_fitted_alone_first(monkeypatch):
    connectome, data, _ = make(14, 3, known=0.0, eta=0.5, sizes=[11, 14, 12])
    calls = []
    real = gumbel_sinkhorn.fit

    def spy(worms, connectome, **options):
        result = real(worms, connectome, **options)
        calls.append((worms, options["steps"], result))
        return result

    monkeypatch.setattr(gumbel_sinkhorn, "fit", spy)
    found = real(data, connectome, steps=20)
    assert len(calls) == 1
    alone, steps, _ = calls[0]
    assert steps == 6
    assert found.extra["steps"] == 20  # with those of the one alone
    most = int((data.lengths * data.observed.sum(-1)).argmax())
    assert torch.equal(alone.allowed[0], data.allowed[most])
    # after a step or two of the others the guide is where that worm's answer has put it
    start = real(data, connectome, steps=7, exchange=False)
    assert torch.equal(start.index[most], calls[1][2].index[0])
    calls.clear()
    real(data, connectome, steps=1)  # too few to share
    real(data, connectome, steps=20, restarts=False, exchange=False)
    real(data.take([1]), connectome, steps=20)
    _, some_known, _ = make(14, 3, known=0.2, eta=0.5)
    real(some_known, connectome, steps=20)
    assert not calls


def test_starts_where_it_is_told():
    connectome, data, _ = make(14, 2, known=0.2, eta=0.4)
    result = gumbel_sinkhorn.fit(data, connectome, steps=1, seed=0, initial=data.truth, exchange=False)
    assert accuracy(result.index, data.truth) == 1.0


def test_bad_input():
    connectome, data, _ = make(14, 2, known=0.2, eta=0.4)
    with pytest.raises(ValueError, match="budget=None and steps=None"):
        gumbel_sinkhorn.fit(data, connectome)
    with pytest.raises(ValueError, match="objective must be one of"):
        gumbel_sinkhorn.fit(data, connectome, steps=1, objective="elbo")
    with pytest.raises(ValueError, match="temperature must be positive"):
        gumbel_sinkhorn.fit(data, connectome, steps=1, temperature=0.0)

"""Partial restarts: what they set, what they keep, and that they leave optima which plain SVI ends in."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_gs as pgs


def problem(n: int = 8, allowed=None, start=None):
    """A quadratic matching of points with themselves turned by a noise."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(x, x)

    def model():
        P = pyro.sample("P", pgs.UniformPermutation(n, allowed=allowed))
        pyro.factor("fit", -3 * (P @ distance @ P.mT - distance).square().sum((-2, -1)))

    def score(values):
        P = values["P"]
        return float(-3 * (P @ distance @ P.mT - distance).square().sum())

    init_logits = None if start is None else pgs.init_to_matching({"P": start})
    guide = pgs.AutoGumbelSinkhorn(model, init_scale=0.0, init_logits=init_logits)
    guide()
    return model, guide, score


def test_a_restart_keeps_the_best_softly_and_frees_the_share():
    _, guide, score = problem()
    restarts = pgs.PartialRestarts(guide, score, share=0.25, logit=2.0, generator=torch.Generator().manual_seed(1))
    best = restarts.best["P"]
    freed = []
    for _ in range(6):
        restarts.begin()
        logits = guide.logits("P")
        free = (logits == 0).all(0)
        assert int(free.sum()) == 2
        assert torch.equal(logits, 2.0 * best * ~free)
        freed.append(tuple(free.tolist()))
    assert len(set(freed)) > 1
    restarts.finish()
    assert torch.equal(guide.logits("P"), 2.0 * best)
    restarts.finish(7.5)
    assert torch.equal(guide.logits("P"), 7.5 * best)
    restarts.begin()
    assert set(guide.logits("P").unique().tolist()) == {0.0, 2.0}  # what finish was given is not for restarts


def test_forbidden_pairs_stay_forbidden():
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed[0, 3:] = False
    _, guide, score = problem(6, allowed)
    restarts = pgs.PartialRestarts(guide, score)
    for set_logits in (restarts.begin, restarts.finish):
        set_logits()
        assert torch.equal(guide.logits("P") == -math.inf, ~allowed)


def test_only_what_scores_higher_is_kept():
    _, guide, score = problem(start=torch.eye(8).flip(0))
    restarts = pgs.PartialRestarts(guide, score)
    first = restarts.best_score
    assert first == score(guide.median()) < 0
    truth = {"P": torch.eye(8)}
    worse = {"P": torch.eye(8)[torch.randperm(8, generator=torch.Generator().manual_seed(3))]}
    assert restarts.end(truth)
    assert (restarts.best_score, restarts.count, restarts.accepted) == (0.0, 1, 1)
    assert not restarts.end(worse)
    assert not restarts.end(truth)  # an equal score is no gain
    assert torch.equal(restarts.best["P"], truth["P"])
    assert (restarts.count, restarts.accepted) == (3, 1)


def test_restarts_leave_an_optimum_that_plain_svi_ends_in():
    n, sigma = 30, 0.1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=generator)
    y = x + sigma * torch.randn(n, 2, generator=generator)

    def model():
        P = pyro.sample("P", pgs.UniformPermutation(n))
        pyro.sample("y", dist.Normal(P @ x, sigma).to_event(2), obs=y)

    def score(values):
        return float(dist.Normal(values["P"] @ x, sigma).log_prob(y).sum())

    exact = score({"P": pgs.matching(y @ x.mT)})  # the matching of least squares
    pyro.set_rng_seed(0)
    guide = pgs.AutoGumbelSinkhorn(model, init_scale=0.0)
    svi = SVI(pgs.relax(model), guide, Adam({"lr": 0.1}), Trace_ELBO())

    def steps(count):
        svi.optim.optim_objs.clear()
        for _ in range(count):
            svi.step()

    steps(300)
    restarts = pgs.PartialRestarts(guide, score, logit=6.0, generator=torch.Generator().manual_seed(0))
    plain = restarts.best_score
    assert plain < exact - 10
    for _ in range(5):
        restarts.begin()
        steps(150)
        restarts.end()
    assert restarts.best_score > plain + 3
    assert restarts.best_score == score(restarts.best)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "share must be in"),
        ({"share": 1.5}, "share must be in"),
        ({"logit": -1.0}, "logit must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    _, guide, score = problem()
    with pytest.raises(ValueError, match=message):
        pgs.PartialRestarts(guide, score, **options)


def test_finishing_takes_the_logit_of_the_lowest_loss():
    model, guide, score = problem()
    restarts = pgs.PartialRestarts(guide, score)
    asked = []

    def loss():
        asked.append(guide.logits("P").max().item())
        return (asked[-1] - 4.6) ** 2

    restarts.finish((3.0, 4.5, 6.0), loss)
    assert asked == [3.0, 4.5, 6.0]
    assert torch.equal(guide.logits("P"), 4.5 * restarts.best["P"])
    svi = SVI(pgs.relax(model), guide, Adam({"lr": 0.1}), Trace_ELBO())
    restarts.end({"P": torch.eye(8)})  # the truth: fits without error, so that it pays to be sure of it
    restarts.finish((0.1, 6.0), svi.evaluate_loss)
    assert guide.logits("P").max().item() == 6.0


@pytest.mark.parametrize(
    ("logit", "loss", "message"),
    [
        (0.0, None, "logit must be positive and finite, but is 0.0"),
        (-1.0, None, "logit must be positive and finite, but is -1.0"),
        (math.inf, None, "logit must be positive and finite, but is inf"),
        (math.nan, None, "logit must be positive and finite, but is nan"),
        ((3.0, -1.0), lambda: 0.0, "logit must be positive and finite, but is -1.0"),
        ((), lambda: 0.0, "empty sequence"),
        ((3.0, 4.0), None, "loss chooses among several logits, but there are 2 without it"),
        (3.0, lambda: 0.0, "loss chooses among several logits, but there is one"),
    ],
)
def test_finishing_refuses_before_it_sets_anything(logit, loss, message):
    _, guide, score = problem()
    restarts = pgs.PartialRestarts(guide, score)
    before = guide.logits("P").clone()
    with pytest.raises(ValueError, match=message):
        restarts.finish(logit, loss)
    assert torch.equal(guide.logits("P"), before)


def test_a_loss_that_is_nan_chooses_nothing():
    _, guide, score = problem()
    with pytest.raises(ValueError, match="loss at logit 3.0 is nan"):
        pgs.PartialRestarts(guide, score).finish((3.0, 4.0), lambda: math.nan)


def test_a_candidate_of_another_kind_is_refused():
    restarts = pgs.PartialRestarts(problem()[1], lambda values: 0.0)
    for candidate in ({"Q": torch.eye(3)}, {"P": torch.eye(5)}, {}):
        with pytest.raises(ValueError, match="candidate must have the sites and shapes"):
            restarts.end(candidate)


def test_a_score_that_is_no_number_is_refused():
    _, guide, _ = problem()
    with pytest.raises(ValueError, match="score of the guide's mode is nan"):
        pgs.PartialRestarts(guide, lambda values: math.nan)

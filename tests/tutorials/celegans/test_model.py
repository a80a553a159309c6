"""The Pyro programs: what they score, that both agree where they must, and that they run under SVI."""

import dataclasses
import math

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam

import pyro_gs as pgs
from tutorials.celegans.connectome import load_connectome
from tutorials.celegans.evidence import CollapsedEvidence, Statistics
from tutorials.celegans.model import collapsed_model, full_model
from tutorials.celegans.worms import simulate

pytestmark = pytest.mark.usefixtures("float64_only")


@pytest.fixture(scope="module")
def connectome():
    torch.set_default_dtype(torch.float64)
    return load_connectome().thin(12, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def worms(connectome):
    torch.set_default_dtype(torch.float64)
    return simulate(connectome, worms=2, steps=20, known=0.2, eta=0.4, seed=0)


@pytest.fixture
def evidence(connectome, worms):
    return CollapsedEvidence(connectome.adjacency, Statistics.from_traces(worms.traces), worms.sigma, worms.weight_scale)


def score(model, args, data):
    trace = poutine.trace(poutine.condition(model, data)).get_trace(*args)
    trace.compute_log_prob()
    return trace


def test_full_model_scores_the_recordings_as_written(connectome, worms):
    index = worms.truth
    edges = connectome.adjacency.nonzero(as_tuple=True)
    weights = 0.1 * torch.randn(len(edges[0]))
    W = torch.zeros(12, 12)
    W[edges] = weights
    trace = score(full_model, (worms, connectome), {"W": weights, "P": pgs.to_matrix(index)})
    for j in range(2):
        # one worm and one time step after the other, in the worm's own order
        order = index[j]
        own = W[order][:, order]
        residual = worms.traces[j, 1:] - worms.traces[j, :-1] @ own.T
        want = -0.5 * (residual / worms.sigma).square().sum() - residual.numel() * math.log(
            worms.sigma * (2 * math.pi) ** 0.5
        )
        assert float(trace.nodes["Y"]["log_prob"][j]) == pytest.approx(float(want), rel=1e-10)


def test_both_models_agree_at_hard_permutations(connectome, worms, evidence):
    # p(Y | P) = p(Y | W, P) p(W) / p(W | Y, P) for any W
    edges = connectome.adjacency.nonzero(as_tuple=True)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(worms.allowed.shape, generator=generator)
        P = pgs.matching(scores.masked_fill(~worms.allowed, -torch.inf))
        W = 0.1 * torch.randn(12, 12, generator=generator) * connectome.adjacency
        full = score(full_model, (worms, connectome), {"W": W[edges], "P": P})
        collapsed = score(collapsed_model, (evidence, worms.allowed), {"P": P})
        joint = full.nodes["Y"]["log_prob"].sum() + full.nodes["W"]["log_prob"]
        want = joint - evidence.log_posterior_weights(P, W)
        assert float(collapsed.nodes["Y"]["log_prob"].sum()) == pytest.approx(float(want), rel=1e-10)
        assert torch.equal(full.nodes["P"]["log_prob"], collapsed.nodes["P"]["log_prob"])


def test_both_models_agree_for_worms_that_show_less(connectome, worms):
    observed = torch.arange(12) < torch.tensor([9, 12])[:, None]
    lengths = torch.tensor([20, 15])
    traces = worms.traces * observed[:, None] * (torch.arange(21) <= lengths[:, None])[..., None]
    known = worms.known & observed
    taken = (worms.allowed & known[..., None]).any(1, keepdim=True)
    allowed = worms.allowed | (~observed[..., None] & ~taken)
    logits = torch.randn(2, 12, 12) * observed[..., None]
    fields = {"traces": traces, "allowed": allowed, "known": known, "truth": None}
    partial = dataclasses.replace(
        worms, **fields, observed=observed, lengths=lengths, logits=logits, persistence=torch.rand(2, 12)
    )
    evidence = CollapsedEvidence(connectome.adjacency, Statistics.from_worms(partial), partial.sigma, partial.weight_scale)
    P = pgs.matching(torch.rand(2, 12, 12).masked_fill(~allowed, -torch.inf))
    W = 0.1 * torch.randn(12, 12) * connectome.adjacency
    full = score(full_model, (partial, connectome), {"W": W[connectome.adjacency.nonzero(as_tuple=True)], "P": P})
    collapsed = score(collapsed_model, (evidence, allowed, logits), {"P": P})
    want = full.nodes["Y"]["log_prob"].sum() + full.nodes["W"]["log_prob"] - evidence.log_posterior_weights(P, W)
    assert float(collapsed.nodes["Y"]["log_prob"].sum()) == pytest.approx(float(want), rel=1e-10)
    for trace in (full, collapsed):
        torch.testing.assert_close(trace.nodes["place"]["log_prob"], (P * logits).sum((-2, -1)))


def test_cost_of_the_collapsed_model_does_not_depend_on_the_recording(connectome):
    shapes = []
    for steps in (10, 500):
        worms = simulate(connectome, worms=2, steps=steps, known=0.2, eta=0.4, seed=0)
        statistics = Statistics.from_traces(worms.traces)
        shapes.append([tuple(part.shape) for part in (statistics.gram, statistics.cross, statistics.energy)])
    assert shapes[0] == shapes[1]


def test_full_model_under_svi_with_two_guides(connectome, worms):
    guide = AutoGuideList(full_model)
    guide.append(pgs.AutoGumbelSinkhorn(poutine.block(full_model, expose=["P"])))
    guide.append(AutoNormal(poutine.block(full_model, hide=["P"])))
    svi = SVI(pgs.relax(full_model), guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(worms, connectome) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_collapsed_model_in_a_plate_of_particles(worms, evidence):
    guide = pgs.AutoGumbelSinkhorn(collapsed_model)
    relaxed = pgs.relax(collapsed_model)
    losses = {}
    for vectorized in (True, False):
        pyro.set_rng_seed(0)
        elbo = Trace_ELBO(num_particles=40, vectorize_particles=vectorized, max_plate_nesting=1)
        losses[vectorized] = elbo.loss(relaxed, guide, evidence, worms.allowed)
    assert losses[True] == pytest.approx(losses[False], rel=0.02)  # forty samples each, of a loss with an sd below 1 %

"""Pyro's handlers and inference on models with a permutation site; each test names its sibling among Pyro's tests."""

import importlib.util
import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    config_enumerate,
    infer_discrete,
)
from pyro.infer.inspect import generate_graph_specification, get_model_relations
from pyro.infer.mcmc.util import initialize_model
from pyro.optim import Adam

import pyro_gs as pgs
from pyro_gs.distributions.relaxed import plain

N = 3
FULL = torch.ones(N, N).bool()
ALLOWED = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
SWAP = torch.eye(N)[[1, 0, 2]]


def x():
    return torch.tensor([0.0, 1.0, 3.0])


def y():
    return torch.tensor([1.0, 0.2, 2.0])


def logits(z=1.0):
    return z * torch.tensor([[1.0, 0.0, -1.0], [0.3, 0.5, 0.0], [0.0, 2.0, 0.0]])


HARD = {
    "uniform": lambda z: pgs.UniformPermutation(N),
    "uniform masked": lambda z: pgs.UniformPermutation(N, ALLOWED),
    "Gibbs": lambda z: pgs.GibbsPermutation(logits(z)),
    "Gibbs masked": lambda z: pgs.GibbsPermutation(torch.where(ALLOWED, logits(z), -torch.inf)),
    "Gumbel matching": lambda z: pgs.GumbelMatching(logits(z)),
    "Plackett-Luce": lambda z: pgs.PlackettLuce(z * x()),
    "Mallows": lambda z: pgs.Mallows(torch.eye(N), abs(z)),
}
SOFT = {
    "Gumbel-Sinkhorn": lambda z: pgs.GumbelSinkhorn(0.5, logits(z)),
    "Gumbel-Sinkhorn masked": lambda z: pgs.GumbelSinkhorn(0.5, torch.where(ALLOWED, logits(z), -torch.inf)),
    "straight-through": lambda z: pgs.GumbelSinkhornStraightThrough(0.5, logits(z)),
    "relaxed Plackett-Luce": lambda z: pgs.RelaxedPlackettLuce(0.5, z * x()),
    "stick-breaking": lambda z: pgs.StickBreakingPermutation(1.0, logits(z)[:2, :2]),
    "rounding": lambda z: pgs.RoundingPermutation(0.5, logits(z)),
}
LAWS = HARD | SOFT
RELAXABLE = [name for name in HARD if name != "Mallows"]


def make_model(law):
    """Points ``x``, permuted by a draw of a law, and their noisy observations ``y``."""

    def model():
        P = pyro.sample("P", law)
        pyro.sample("y", dist.Normal(P.to(x()) @ x(), 0.5).to_event(1), obs=y())
        return P

    return model


def log_likelihood(P):
    return dist.Normal(plain(P).to(x()) @ x(), 0.5).log_prob(y()).sum(-1)


def permutations():
    return pgs.to_matrix(torch.tensor(list(itertools.permutations(range(N)))))


def joint(law):
    """Log-probability of every permutation and the observations."""
    return law.log_prob(permutations()) + log_likelihood(permutations())


def empty_guide():
    pass


def trace_of(model):
    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    return trace


# --- render_model, Predictive


@pytest.mark.parametrize(("name", "relaxed"), [(name, False) for name in LAWS] + [(name, True) for name in RELAXABLE])
def test_render_model(name, relaxed):
    # tests/infer/test_inspect.py: test_get_model_relations, test_render_model
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        theta = pyro.param("theta", torch.tensor(1.0))
        with pyro.plate("items", 2):
            P = pyro.sample("P", LAWS[name](z * theta))
            pyro.sample("y", dist.Normal(P.to(x()) @ x(), 0.5).to_event(1), obs=y().expand(2, N))

    model = pgs.relax(model, temperature=0.01) if relaxed else model
    found = get_model_relations(model)
    depends = ["z"] if not name.startswith("uniform") else []
    assert found["sample_sample"] == {"z": [], "P": depends, "y": ["P"]}
    assert found["sample_param"]["P"] == ["theta"] * bool(depends)
    assert found["plate_sample"] == {"items": ["P", "y"]}
    kind = type(trace_of(model).nodes["P"]["fn"]).__name__
    assert found["sample_dist"]["P"] == kind
    if relaxed:
        assert kind == ("RelaxedPlackettLuce" if name == "Plackett-Luce" else "GumbelSinkhorn")
    if importlib.util.find_spec("graphviz") is None:  # the picture needs it, what is in the picture does not
        graph = generate_graph_specification(found)
        assert ("P", "y") in graph["edge_list"]
        assert graph["node_data"]["P"]["distribution"] == kind
    else:
        assert "P -> y" in pyro.render_model(model, render_distributions=True).source


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", LAWS)
def test_predictive_from_the_prior(name, parallel):
    # tests/infer/test_predictive.py: test_posterior_predictive_svi_manual_guide and its neighbours
    law = LAWS[name](1.0)
    draws = Predictive(make_model(law), num_samples=50, parallel=parallel, return_sites=["P", "y"])()
    assert draws["P"].shape == (50, N, N)
    assert draws["y"].shape == (50, N)
    assert law.support.check(plain(draws["P"])).all()
    assert len(torch.unique(draws["P"].flatten(1), dim=0)) > 1
    assert not draws["P"].requires_grad


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_from_a_fitted_guide(parallel):
    # tests/infer/test_predictive.py: test_posterior_predictive_svi_auto_diag_normal_guide
    model = make_model(pgs.UniformPermutation(N, ALLOWED))
    guide = pgs.AutoGumbelSinkhorn(model)
    svi = SVI(pgs.relax(model), guide, Adam({"lr": 0.1}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    for _ in range(60):
        svi.step()
    soft = Predictive(pgs.relax(model), guide=guide, num_samples=200, parallel=parallel, return_sites=["P", "y"])()
    assert pgs.constraints.DoublyStochastic(ALLOWED).check(plain(soft["P"])).all()
    assert soft["y"].shape == (200, N)
    want = joint(pgs.UniformPermutation(N, ALLOWED)).argmax()
    assert torch.equal(pgs.matching(plain(soft["P"]).mean(0)), permutations()[want])
    hard = Predictive(model, guide.hard_sample((7,)), parallel=parallel, return_sites=["P", "y"])()
    assert pgs.constraints.Permutation(ALLOWED).check(hard["P"]).all()
    assert hard["y"].shape == (7, N)


# --- poutine


@pytest.mark.parametrize("name", LAWS)
def test_condition(name):
    # tests/poutine/test_poutines.py: ConditionHandlerTests
    law = LAWS[name](1.0)
    value = law.sample()
    trace = trace_of(poutine.condition(make_model(law), {"P": value}))
    assert trace.nodes["P"]["is_observed"]
    assert float(trace.log_prob_sum()) == pytest.approx(float(law.log_prob(value) + log_likelihood(value)))


@pytest.mark.parametrize("name", RELAXABLE)
@pytest.mark.parametrize("inside", [False, True])
def test_condition_on_a_relaxed_model(name, inside):
    # a hard value keeps the hard law, a relaxed one the relaxed law, on whichever side of ``relax`` it is given
    model = make_model(HARD[name](1.0))

    def conditioned(value):
        if inside:
            return trace_of(pgs.relax(poutine.condition(model, {"P": value}), 0.3))
        return trace_of(poutine.condition(pgs.relax(model, 0.3), {"P": value}))

    site = conditioned(torch.eye(N)).nodes["P"]
    assert type(site["fn"]) is type(HARD[name](1.0))
    relaxed = trace_of(pgs.relax(model, 0.05)).nodes["P"]  # entries that a score from the entries alone would lose
    site = conditioned(relaxed["value"]).nodes["P"]
    assert type(site["fn"]) is type(relaxed["fn"])
    assert float(site["fn"].temperature) == pytest.approx(0.3)
    assert site["log_prob"].isfinite()


@pytest.mark.parametrize("arrange", [lambda m: m, pgs.relax], ids=["hard", "relaxed"])
def test_do(arrange):
    # tests/poutine/test_counterfactual.py
    model = make_model(pgs.GibbsPermutation(logits()))
    for intervened in (poutine.do(arrange(model), {"P": SWAP}), arrange(poutine.do(model, {"P": SWAP}))):
        trace = trace_of(intervened)
        assert torch.equal(trace.nodes["_RETURN"]["value"], SWAP)
        assert float(trace.nodes["y"]["log_prob_sum"]) == pytest.approx(float(log_likelihood(SWAP)))
        site = trace.nodes["P"]  # the law of P stays, its draw has no effect
        assert float(site["log_prob"]) == pytest.approx(float(site["fn"].log_prob(site["value"])))
        assert not site["is_observed"]


@pytest.mark.parametrize("name", LAWS)
def test_replay(name):
    # tests/poutine/test_poutines.py: ReplayHandlerTests
    first = trace_of(make_model(LAWS[name](1.0)))
    again = trace_of(poutine.replay(make_model(LAWS[name](0.5)), trace=first))
    assert again.nodes["P"]["value"] is first.nodes["P"]["value"]
    want = LAWS[name](0.5).log_prob(first.nodes["P"]["value"])
    assert float(again.nodes["P"]["log_prob"]) == pytest.approx(float(want))


def test_replay_keeps_what_underflowed():
    # log P travels with the value, so a cold sample has a density under every other law
    first = trace_of(pgs.relax(make_model(pgs.UniformPermutation(N)), 0.002))
    assert (plain(first.nodes["P"]["value"]) == 0).any()
    again = trace_of(poutine.replay(pgs.relax(make_model(pgs.GibbsPermutation(logits())), 0.5), trace=first))
    assert again.nodes["P"]["log_prob"].isfinite()


@pytest.mark.parametrize("name", LAWS)
def test_block(name):
    # tests/poutine/test_poutines.py: BlockHandlerTests
    model = make_model(LAWS[name](1.0))
    hidden = trace_of(poutine.block(model, hide=["P"]))
    assert "P" not in hidden
    assert torch.isclose(hidden.log_prob_sum(), log_likelihood(hidden.nodes["_RETURN"]["value"]))
    shown = trace_of(poutine.block(model, expose=["P"]))
    assert "P" in shown
    assert "y" not in shown


def test_block_and_relax():
    # a handler sees what blocks inside of it let through: ``relax`` belongs next to the model
    model = make_model(pgs.UniformPermutation(N))
    relaxed = trace_of(poutine.block(pgs.relax(model), hide=["P"])).nodes["_RETURN"]["value"]
    assert ((plain(relaxed) > 0) & (plain(relaxed) < 1)).any()
    hard = trace_of(pgs.relax(poutine.block(model, hide=["P"]))).nodes["_RETURN"]["value"]
    assert pgs.constraints.permutation.check(hard)


@pytest.mark.parametrize("name", LAWS)
def test_mask_and_scale(name):
    # tests/poutine/test_poutines.py: TestScale; tests/distributions/test_mask.py: test_mask
    def model():
        with pyro.plate("items", 4):
            return pyro.sample("P", LAWS[name](1.0))

    plainly = trace_of(model)
    value = plainly.nodes["P"]["value"]
    want = plainly.nodes["P"]["log_prob"]
    given = poutine.replay(model, trace=plainly)
    assert torch.allclose(trace_of(poutine.scale(given, scale=0.3)).nodes["P"]["log_prob"], 0.3 * want)
    mask = torch.tensor([True, False, True, False])
    masked = trace_of(poutine.mask(given, mask=mask)).nodes["P"]
    assert torch.equal(masked["value"], value)
    assert torch.allclose(masked["log_prob"], torch.where(mask, want, 0.0))
    both = trace_of(poutine.scale(poutine.mask(given, mask=mask), scale=2.0)).nodes["P"]
    assert torch.allclose(both["log_prob"], 2 * torch.where(mask, want, 0.0))
    if name in RELAXABLE:
        soft = trace_of(pgs.relax(poutine.scale(poutine.mask(model, mask=mask), scale=2.0))).nodes["P"]
        assert torch.allclose(soft["log_prob"], 2 * torch.where(mask, soft["fn"].log_prob(soft["value"]), 0.0))


def test_a_masked_item_may_hold_a_forbidden_permutation():
    # -inf times zero is no NaN
    def model():
        with pyro.plate("items", 2), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("P", pgs.UniformPermutation(N, ALLOWED), obs=torch.stack([torch.eye(N), torch.eye(N).flip(0)]))

    assert trace_of(model).nodes["P"]["log_prob"].tolist() == pytest.approx([-math.log(3), 0.0])


# --- plates with subsampling


def plate_logits():
    return torch.randn(5, N, N, generator=torch.Generator().manual_seed(0)).to(torch.get_default_dtype())


@pytest.mark.parametrize(
    "make",
    [
        lambda i: pgs.GibbsPermutation(plate_logits()[i]),
        lambda i: pgs.UniformPermutation(N, torch.stack([ALLOWED, FULL, ALLOWED, FULL, FULL])[i]),
        lambda i: pgs.GumbelMatching(plate_logits()[i]),
        lambda i: pgs.PlackettLuce(plate_logits()[i, 0]),
        lambda i: pgs.Mallows(torch.eye(N), plate_logits()[i, 0, 0].abs()),
        lambda i: pgs.GumbelSinkhorn(0.5, plate_logits()[i]),
        lambda i: pgs.RelaxedPlackettLuce(0.5, plate_logits()[i, 0]),
        lambda i: pgs.StickBreakingPermutation(1.0, plate_logits()[i, :2, :2]),
        lambda i: pgs.RoundingPermutation(0.5, plate_logits()[i]),
    ],
)
def test_plate_with_subsampling(make):
    # tests/infer/test_valid_models.py: test_plate_subsample_*; tests/infer/test_gradient.py: test_subsample_gradient
    values = make(torch.arange(5)).sample()

    def model(subsample):
        with pyro.plate("items", 5, subsample=subsample) as index:
            pyro.sample("P", make(index), obs=values[index])

    everything = make(torch.arange(5)).log_prob(values).sum()
    parts = []
    for chosen in itertools.combinations(range(5), 2):
        trace = poutine.trace(model).get_trace(torch.tensor(chosen))
        assert type(trace.nodes["P"]["fn"]) is type(make(torch.arange(2)))
        parts.append(trace.log_prob_sum())
    assert torch.isclose(torch.stack(parts).mean(), everything)  # scaled by 5 / 2, unbiased


# --- enumeration


@pytest.mark.parametrize("name", HARD)
def test_enumerated_evidence(name):
    # tests/infer/test_enum.py: test_elbo_enumerate_1 and its neighbours
    law = HARD[name](1.0)
    model = config_enumerate(make_model(law))
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, empty_guide)
    assert loss == pytest.approx(-float(joint(law).logsumexp(0)), rel=1e-5)


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("name", ["uniform", "Gibbs", "Gumbel matching"])
def test_enumerated_evidence_in_a_plate_of_own_supports(name, expand):
    # tests/infer/test_enum.py: test_elbo_enumerate_plate_1 and its neighbours
    masks = torch.stack([ALLOWED, FULL])
    data = torch.stack([y(), y().flip(0)])
    scores = torch.where(masks, logits(), -torch.inf)
    law = {
        "uniform": pgs.UniformPermutation(N, masks),
        "Gibbs": pgs.GibbsPermutation(scores),
        "Gumbel matching": pgs.GumbelMatching(scores),
    }[name]

    @config_enumerate(expand=expand)
    def model():
        with pyro.plate("items", 2):
            P = pyro.sample("P", law)
            pyro.sample("y", dist.Normal(P @ x(), 0.5).to_event(1), obs=data)

    P = permutations()[:, None]
    want = law.log_prob(P) + dist.Normal(P @ x(), 0.5).log_prob(data).sum(-1)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, empty_guide)
    assert loss == pytest.approx(-float(want.logsumexp(0).sum()), rel=1e-5)
    # ... and with every item of its own mask and scale
    hidden = poutine.scale(poutine.mask(model, mask=torch.tensor([True, False])), scale=3.0)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(hidden, empty_guide)
    assert loss == pytest.approx(-3 * float(want[:, 0].logsumexp(0)), rel=1e-5)


def test_enumerated_evidence_of_a_subsampled_plate():
    # tests/infer/test_enum.py: test_elbo_enumerate_plates_*
    data = torch.stack([y(), y().flip(0), y() + 1.0])

    @config_enumerate
    def model(subsample):
        with pyro.plate("items", 3, subsample=subsample) as index:
            P = pyro.sample("P", pgs.UniformPermutation(N))
            pyro.sample("y", dist.Normal(P @ x(), 0.5).to_event(1), obs=data[index])

    P = permutations()[:, None]
    want = (dist.Normal(P @ x(), 0.5).log_prob(data).sum(-1) - math.log(6)).logsumexp(0)
    for chosen in ([0, 1], [0, 2], [1, 2]):
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda s: None, torch.tensor(chosen))
        assert loss == pytest.approx(-1.5 * float(want[chosen].sum()), rel=1e-5)


def test_two_enumerated_sites_of_which_one_is_the_parameter_of_the_other():
    # tests/infer/test_enum.py: test_elbo_enumerate_2
    @config_enumerate
    def model():
        center = pyro.sample("center", pgs.GibbsPermutation(logits()))
        P = pyro.sample("P", pgs.Mallows(center, 0.7))
        pyro.sample("y", dist.Normal(P @ x(), 0.5).to_event(1), obs=y())

    prior = pgs.GibbsPermutation(logits()).log_prob(permutations())
    inner = pgs.Mallows(permutations(), 0.7).log_prob(permutations()[:, None])
    want = (prior + inner + log_likelihood(permutations())[:, None]).flatten().logsumexp(0)
    assert TraceEnum_ELBO(max_plate_nesting=0).loss(model, empty_guide) == pytest.approx(-float(want), rel=1e-5)


@pytest.mark.parametrize("how", ["sequential", "parallel"])
def test_enumerated_guide(how):
    # tests/infer/test_gradient.py: test_enum; tests/infer/test_enum.py: test_elbo_berns
    q = logits(0.5).requires_grad_()

    def guide():
        pyro.sample("P", pgs.GibbsPermutation(q), infer={"enumerate": how})

    model = make_model(pgs.UniformPermutation(N))
    law = pgs.GibbsPermutation(q)
    log_q = law.log_prob(permutations())
    want = (log_q.exp() * (log_q - joint(pgs.UniformPermutation(N)))).sum()
    loss = TraceEnum_ELBO(max_plate_nesting=0).differentiable_loss(model, guide)
    assert torch.isclose(loss, want)
    (grad,), (grad_want,) = torch.autograd.grad(loss, q), torch.autograd.grad(want, q)
    assert torch.allclose(grad, grad_want, atol=1e-5)


@pytest.mark.usefixtures("float64_only")
def test_hmc_sums_a_permutation_out():
    # tests/infer/mcmc/test_nuts.py: test_bernoulli_latent_model and the like; the potential is what NUTS needs
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        P = pyro.sample("P", pgs.GibbsPermutation(logits()))
        pyro.sample("y", dist.Normal(P @ x(), scale).to_event(1), obs=y())

    potential = initialize_model(model, max_plate_nesting=0)[1]
    for value in (-1.0, 0.4):
        scale = torch.tensor(value).exp()
        terms = pgs.GibbsPermutation(logits()).log_prob(permutations())
        terms = terms + dist.Normal(permutations() @ x(), scale).log_prob(y()).sum(-1)
        want = -terms.logsumexp(0) - dist.Normal(0.0, 1.0).log_prob(torch.tensor(value))
        assert float(potential({"scale": torch.tensor(value)})) == pytest.approx(float(want))


def test_too_many_to_enumerate():
    def model():
        pyro.sample("P", pgs.UniformPermutation(9))

    with pytest.raises(ValueError, match="UniformPermutation with n=9 has about 362880 permutations, more than the 40320"):
        TraceEnum_ELBO(max_plate_nesting=0).loss(config_enumerate(model), empty_guide)


@pytest.mark.parametrize(
    "arrange",
    [lambda m: config_enumerate(pgs.relax(m)), lambda m: pgs.relax(config_enumerate(m))],
    ids=["outside", "inside"],
)
def test_relaxed_sites_beside_enumerated_ones(arrange):
    # config_enumerate marks what can be enumerated, which a relaxed site cannot, in whatever order
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(N))
        k = pyro.sample("k", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(P.to(x()) @ x() + k.to(x())[..., None], 0.5).to_event(1), obs=y())

    guide = pgs.AutoGumbelSinkhorn(poutine.block(model, expose=["P"]))
    relaxed = arrange(model)
    guide()
    torch.manual_seed(1)
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(relaxed, guide)
    torch.manual_seed(1)
    q = poutine.trace(guide).get_trace().nodes["P"]
    P = plain(q["value"])
    terms = torch.stack([dist.Normal(P @ x() + k, 0.5).log_prob(y()).sum() for k in (0.0, 1.0)])
    prior = pgs.GumbelSinkhorn(1.0, torch.zeros(N, N)).log_prob(q["value"])
    want = terms.logsumexp(0) - math.log(2) + prior - q["fn"].log_prob(q["value"])
    assert loss == pytest.approx(-float(want.detach()), rel=1e-4)
    assert "enumerate" not in poutine.trace(relaxed).get_trace().nodes["P"]["infer"]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("temperature", [0, 1])
def test_infer_discrete_refuses_a_matrix(name, temperature):
    # tests/infer/test_discrete.py: Pyro gathers along the dimensions of an event, of which it expects none
    with pytest.raises(ValueError, match="Invalid tensor shape"):
        infer_discrete(config_enumerate(make_model(HARD[name](1.0))), first_available_dim=-1, temperature=temperature)()


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("method", ["compute_marginals", "sample_posterior"])
def test_marginals_by_enumeration_are_refused(name, method):
    # tests/infer/test_enum.py: test_compute_marginals_single; Pyro makes the marginal by type(law)(logits=...) from the K
    # log-probabilities of the K permutations, which no law of matrices takes
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    with pytest.raises((TypeError, ValueError), match="unexpected keyword argument 'logits'|logits must be square"):
        getattr(elbo, method)(config_enumerate(make_model(HARD[name](1.0))), empty_guide)


@pytest.mark.parametrize("law", [pgs.GibbsPermutation, pgs.GumbelMatching])
@pytest.mark.xfail(strict=True, raises=pytest.fail.Exception, reason="type(law)(logits=...) of Pyro, see above")
def test_marginals_by_enumeration_where_the_logits_happen_to_be_square(law):
    # A plate of as many items as there are permutations: the (2, 2) log-probabilities pass for the logits of one law.
    @config_enumerate
    def model():
        with pyro.plate("items", 2):
            pyro.sample("P", law(torch.zeros(2, 2, 2)))

    with pytest.raises((TypeError, ValueError)):
        TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(model, empty_guide)


# --- vectorized particles


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceGraph_ELBO])
def test_vectorized_particles(name, elbo_class):
    # tests/infer/test_gradient.py: test_particle_gradient. Where the guide is the prior the ELBO is the expected likelihood.
    law, count = LAWS[name](1.0), 200 if name == "Gumbel matching" else 1000

    def guide():
        pyro.sample("P", law)

    loss = elbo_class(num_particles=count, vectorize_particles=True, max_plate_nesting=0).loss(make_model(law), guide)
    if name in HARD:
        weight, score = law.log_prob(permutations()).exp(), log_likelihood(permutations())
        want = (weight * score).sum()
        error = (weight * (score - want) ** 2).sum().sqrt() / count**0.5
    else:
        score = log_likelihood(law.sample((count,)))
        want, error = score.mean(), score.std() * (2 / count) ** 0.5
    assert abs(-loss - float(want)) < 4.3 * float(error)  # 1.7e-5


@pytest.mark.usefixtures("float64_only")
def test_vectorized_particles_of_the_automatic_guide_in_a_plate():
    # tests/infer/test_valid_models.py: test_vectorized_num_particles
    def model():
        with pyro.plate("items", 2):
            P = pyro.sample("P", pgs.UniformPermutation(N, torch.stack([ALLOWED, FULL])))
            pyro.sample("y", dist.Normal(P.to(x()) @ x(), 0.5).to_event(1), obs=torch.stack([y(), y()]))

    guide = pgs.AutoGumbelSinkhorn(model, init_scale=0.5)
    relaxed = pgs.relax(model)
    guide()
    losses, grads = [], []
    for count in (1000, *[1] * 60):
        elbo = Trace_ELBO(num_particles=count, vectorize_particles=count > 1, max_plate_nesting=1)
        guide.zero_grad()
        losses.append(elbo.loss_and_grads(relaxed, guide))
        grads.append(next(guide.parameters()).grad.clone())
    single = torch.tensor(losses[1:])
    assert abs(losses[0] - float(single.mean())) < 4.5 * float(single.std()) / 60**0.5
    assert grads[0].shape == (2, N, N)
    assert all((grad[0][~ALLOWED] == 0).all() for grad in grads)
    single = torch.stack(grads[1:])
    error = single.std(0) / 60**0.5
    assert ((grads[0] - single.mean(0)).abs() <= 5 * error + 1e-9).all()


# --- JitTrace_ELBO


REFUSAL = "torch.jit.trace cannot record .* which looks at values; take Trace_ELBO in place of JitTrace_ELBO"
JIT = [JitTrace_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO]


@pytest.fixture
def _tracing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


@pytest.mark.usefixtures("_tracing")
@pytest.mark.parametrize("elbo_class", JIT)
@pytest.mark.parametrize("objective", ["density", "tightened_kl", "noise_kl"])
def test_jit_refuses_the_sinkhorn_operator(elbo_class, objective):
    # tests/infer/test_jit.py: test_svi
    model = make_model(pgs.UniformPermutation(N))
    guide = pgs.AutoGumbelSinkhorn(model, objective=objective)
    svi = SVI(pgs.relax(model), guide, Adam({"lr": 0.1}), elbo_class(ignore_jit_warnings=True))
    with pytest.raises(NotImplementedError, match=REFUSAL):
        svi.step()


@pytest.mark.usefixtures("_tracing")
@pytest.mark.parametrize("law", [pgs.GibbsPermutation, pgs.GumbelMatching])
def test_jit_refuses_guides_whose_draws_would_be_constants(law):
    # tests/infer/test_jit.py: test_svi_enum
    def guide():
        pyro.sample("P", law(pyro.param("q", torch.zeros(N, N))))

    svi = SVI(make_model(pgs.UniformPermutation(N)), guide, Adam({"lr": 0.1}), JitTrace_ELBO(ignore_jit_warnings=True))
    with pytest.raises(NotImplementedError, match=REFUSAL):
        svi.step()


@pytest.mark.usefixtures("_tracing")
@pytest.mark.parametrize("prior", ["uniform", "Plackett-Luce", "Mallows", "relaxed Plackett-Luce"])
def test_jit_of_what_has_no_solver(prior):
    # tests/infer/test_jit.py: test_svi
    kind = (lambda q: pgs.RelaxedPlackettLuce(1.0, q)) if "relaxed" in prior else pgs.PlackettLuce

    def guide():
        pyro.sample("P", kind(pyro.param("q", torch.zeros(N))))

    model = make_model(LAWS[prior](1.0))
    found = []
    for elbo in (Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)):
        pyro.clear_param_store()
        elbo.loss_and_grads(model, guide)  # which traces, at other parameters than those below
        q = pyro.param("q").unconstrained()
        with torch.no_grad():
            q.copy_(torch.tensor([0.3, -0.2, 0.1]))
        for seed in range(5):
            torch.manual_seed(seed)
            q.grad = None
            found.append((elbo.loss_and_grads(model, guide), *q.grad.tolist()))
    for eager, traced in zip(found[:5], found[5:], strict=True):
        assert eager == pytest.approx(traced, rel=1e-4, abs=1e-5)


@pytest.mark.usefixtures("_tracing")
def test_hmc_refuses_jit_compile():
    # tests/infer/mcmc/test_hmc.py: jit=True of its tests
    relaxed = pgs.relax(make_model(pgs.UniformPermutation(N)))
    start, potential, _, _ = initialize_model(relaxed, jit_compile=True, skip_jit_warnings=True)
    with pytest.raises(NotImplementedError, match=f"{REFUSAL}.*jit_compile=False in HMC and NUTS"):
        potential(start)


# --- dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["Gibbs", "Gumbel matching"])
def test_dtype_of_the_prior_reaches_guide_and_values(name, dtype):
    # tests/distributions/test_tensor_type.py, of a whole inference
    law = {"Gibbs": pgs.GibbsPermutation, "Gumbel matching": pgs.GumbelMatching}[name](logits().to(dtype))
    model = make_model(law)
    guide = pgs.AutoGumbelSinkhorn(model)
    svi = SVI(pgs.relax(model), guide, Adam({"lr": 0.1}), Trace_ELBO())
    assert math.isfinite(svi.step())
    assert guide.logits("P").dtype == dtype
    assert guide()["P"].dtype == guide.median()["P"].dtype == guide.hard_sample()["P"].dtype == dtype
    assert trace_of(pgs.relax(model)).nodes["P"]["log_prob"].dtype == dtype

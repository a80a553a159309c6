"""The index handler: plates, chains, gradients and what other handlers do around it, against sums written out."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from matching_model import all_matrices, brute_force, no_guide
from pyro import poutine
from pyro.infer import MCMC, NUTS, Trace_ELBO, TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.infer.mcmc.util import initialize_model

import pyro_gs as pgs

pytestmark = pytest.mark.usefixtures("float64_only")

X = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ALLOWED = torch.ones(4, 3, 3) == 1
ALLOWED[1, 0, 1:] = False
ALLOWED[2, 2, 0] = False


def likelihood(matrices, y, shift=0.0):
    """Of observations y (3, 2) for every matrix (..., 3, 3)."""
    return dist.Normal(matrices @ X + shift, 0.7).log_prob(y).sum((-2, -1))


@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("law", [pgs.GibbsPermutation, pgs.GumbelMatching])
def test_marginals_in_plates_whose_size_is_the_number_of_permutations(law, size):
    """Where enumeration of the matrix site itself is silently wrong."""
    logits = torch.randn(size, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def model():
        with pyro.plate("items", size):
            P = pyro.sample("P", law(logits))
            pyro.factor("f", P[..., 0, 0])

    probs = TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(pgs.indexed(model), no_guide)["P_index"].probs
    support = law(logits[0]).enumerate_support()
    for k in range(size):
        log_p = law(logits[k]).log_prob(support) + support[:, 0, 0]
        assert torch.allclose(probs[k], log_p.softmax(0))


def chain(y):
    """A hidden Markov chain of permutations."""
    P = None
    for k in pyro.markov(range(len(y))):
        P = pyro.sample(f"P{k}", pgs.GibbsPermutation(torch.zeros(3, 3) if P is None else 1.3 * P))
        pyro.sample(f"y{k}", dist.Normal(P @ X, 0.7).to_event(2), obs=y[k])


def test_chains_of_permutations():
    y, support = Y[:3], all_matrices(3)
    sites = [f"P{k}" for k in range(3)]
    evidence, weights = brute_force(chain, (y,), dict.fromkeys(sites, support))
    weights = weights.reshape(6, 6, 6)
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    assert elbo.loss(pgs.indexed(chain), no_guide, y) == pytest.approx(-float(evidence))
    marginals = elbo.compute_marginals(pgs.indexed(chain), no_guide, y)
    for k, site in enumerate(sites):
        others = [dim for dim in range(3) if dim != k]
        assert torch.allclose(marginals[f"{site}_index"].probs, weights.sum(others))
    best = poutine.trace(infer_discrete(pgs.indexed(chain), first_available_dim=-1, temperature=0)).get_trace(y)
    state = torch.unravel_index(weights.argmax(), weights.shape)
    for k, site in enumerate(sites):
        assert torch.equal(best.nodes[site]["value"], support[state[k]])


def chain_in_plate(y):
    P = None
    with pyro.plate("items", y.shape[1]):
        for k in pyro.markov(range(len(y))):
            P = pyro.sample(f"P{k}", pgs.GibbsPermutation(torch.zeros(3, 3) if P is None else 1.3 * P))
            pyro.sample(f"y{k}", dist.Normal(P @ X, 0.7).to_event(2), obs=y[k])


def test_long_chains_in_plates():
    """Against the forward recursion; without dimensions used again and again 40 steps would not fit a tensor."""
    y, support = torch.stack([Y, Y.flip(0)], 1).repeat(10, 1, 1, 1), all_matrices(3)
    move = torch.stack([pgs.GibbsPermutation(1.3 * P).log_prob(support) for P in support])
    want = 0.0
    for item in range(2):
        forward = likelihood(support, y[0, item]) - math.log(6)
        for k in range(1, 40):
            forward = torch.logsumexp(forward[:, None] + move, 0) + likelihood(support, y[k, item])
        want += float(forward.logsumexp(0))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(pgs.indexed(chain_in_plate), no_guide, y)
    assert loss == pytest.approx(-want)


def nested():
    with pyro.plate("groups", 2, dim=-2):
        P = pyro.sample("P", pgs.UniformPermutation(3))
        with pyro.plate("items", 4, dim=-1):
            Q = pyro.sample("Q", pgs.GibbsPermutation(P))
            pyro.sample("y", dist.Normal(P @ Q @ X, 0.7).to_event(2), obs=Y.expand(2, 4, 3, 2))


def nested_evidence():
    support = all_matrices(3)
    prior = torch.stack([pgs.GibbsPermutation(P).log_prob(support) for P in support])
    terms = [likelihood(support[:, None] @ support, y) + prior for y in Y]
    return 2 * float((torch.stack(terms).logsumexp(-1).sum(0) - math.log(6)).logsumexp(0))


@pytest.mark.parametrize(
    "arrange",
    [
        pgs.indexed,
        lambda model: config_enumerate(pgs.indexed(model)),
        lambda model: pgs.indexed(config_enumerate(model)),
        lambda model: pgs.indexed(pgs.indexed(model)),
    ],
    ids=["plain", "marked outside", "marked inside", "twice"],
)
def test_nested_plates(arrange):
    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    assert elbo.loss(arrange(nested), no_guide) == pytest.approx(-nested_evidence())


def test_vectorized_particles_and_sequential_enumeration():
    elbo = TraceEnum_ELBO(max_plate_nesting=2, num_particles=3, vectorize_particles=True)
    assert elbo.loss(pgs.indexed(nested), no_guide) == pytest.approx(-nested_evidence())

    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3), infer={"enumerate": "sequential"})
        pyro.sample("y", dist.Normal(P @ X, 0.7).to_event(2), obs=Y[0])

    def guide():
        pyro.sample("P_index", dist.Categorical(logits=torch.arange(6.0)), infer={"enumerate": "sequential"})

    q = torch.arange(6.0).softmax(0)
    bound = (q * (likelihood(all_matrices(3), Y[0]) - math.log(6) - q.log())).sum()
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(pgs.indexed(model), guide)
    assert loss == pytest.approx(-float(bound))


def with_others():
    """A prior with a latent scale and masks, and a latent site that depends on the permutation."""
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("items", 4):
        logits = torch.where(ALLOWED, s[..., None, None, None] * torch.eye(3), -torch.inf)
        P = pyro.sample("P", pgs.GibbsPermutation(logits))
        w = pyro.sample("w", dist.Normal(P[..., 0, 0], 1.0))
        pyro.sample("y", dist.Normal(P @ X + w[..., None, None], 0.7).to_event(2), obs=Y)


def summed_out(s, w):
    """Log joint density of the other latent sites."""
    support = all_matrices(3)
    total = dist.LogNormal(0.0, 0.5).log_prob(s)
    for allowed, y, shift in zip(ALLOWED, Y, w, strict=True):
        perms = support[(support <= allowed).all(-1).all(-1)]
        prior = (perms * s * torch.eye(3)).sum((-2, -1))
        terms = prior.log_softmax(0) + dist.Normal(perms[:, 0, 0], 1.0).log_prob(shift) + likelihood(perms, y, shift)
        total = total + terms.logsumexp(0)
    return total


def test_the_potential_of_hmc_and_its_gradient():
    start = {"s": torch.tensor(1.3), "w": torch.tensor([0.1, -0.4, 0.8, 0.0])}
    _, potential, _, _ = initialize_model(pgs.indexed(with_others), init_strategy=init_to_value(values=start))
    point = {"s": torch.tensor(0.2, requires_grad=True), "w": torch.tensor([0.3, -1.0, 0.5, 2.0], requires_grad=True)}
    want = -summed_out(point["s"].exp(), point["w"]) - point["s"]
    found = potential(point)
    assert float(found.detach()) == pytest.approx(float(want.detach()))
    for a, b in zip(*(torch.autograd.grad(u, list(point.values())) for u in (found, want)), strict=True):
        assert torch.allclose(a, b)


def test_sites_that_depend_on_a_permutation_need_a_start():
    # Pyro draws them once for each enumerated state, and HMC would then move all of these: a wrong posterior.
    message = r"site 'w' depends on 'P' .* shape \(6, 4\) in place of \(4,\).*init_to_value\(values=\{'w': value\}\)"
    with pytest.raises(ValueError, match=message):
        initialize_model(pgs.indexed(with_others))
    kernel = NUTS(pgs.indexed(with_others), init_strategy=init_to_value(values={"w": torch.zeros(4)}))
    mcmc = MCMC(kernel, 2, 2, disable_progbar=True)
    mcmc.run()
    assert {name: value.shape for name, value in mcmc.get_samples().items()} == {"s": (2,), "w": (2, 4)}
    guide = AutoNormal(poutine.block(with_others, hide=["P"]))
    assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(pgs.indexed(with_others), guide))


def matching():
    P = pyro.sample("P", pgs.UniformPermutation(3))
    return pyro.sample("y", dist.Normal(P @ X, 0.7).to_event(2), obs=Y[0])


@pytest.mark.parametrize("data", [{"P": torch.eye(3, dtype=torch.float64)}, "trace"])
def test_conditioned_on(data):
    if data == "trace":
        data = poutine.trace(poutine.condition(matching, {"P": torch.eye(3)})).get_trace()
    for model in (pgs.indexed(poutine.condition(matching, data)), poutine.condition(pgs.indexed(matching), data)):
        trace = poutine.trace(model).get_trace()
        assert "P_index" not in trace.nodes
        assert trace.nodes["P"]["is_observed"]
        want = float(likelihood(torch.eye(3), Y[0])) - math.log(6)
        assert float(trace.log_prob_sum()) == pytest.approx(want)


def test_interventions_and_a_given_index():
    trace = poutine.trace(poutine.do(pgs.indexed(matching), {"P": torch.eye(3)})).get_trace()
    assert torch.equal(trace.nodes["y"]["fn"].base_dist.loc, X)
    trace = poutine.trace(poutine.condition(pgs.indexed(matching), {"P_index": torch.tensor(3)})).get_trace()
    assert torch.equal(trace.nodes["P"]["value"], all_matrices(3)[3])


def test_a_draw_is_a_permutation_that_is_allowed():
    with pgs.indexed():
        trace = poutine.trace(with_others).get_trace()
    P = trace.nodes["P"]["value"]
    assert trace.nodes["P_index"]["value"].shape == (4,)
    assert pgs.constraints.permutation.check(P).all()
    assert ALLOWED[P == 1].all()
    assert torch.allclose(trace.nodes["P_index"]["fn"].probs.sum(-1), torch.ones(4))


def test_without_enumeration_the_density_is_that_of_the_plain_model():
    trace = poutine.trace(pgs.indexed(nested)).get_trace()
    plain = poutine.trace(poutine.condition(nested, {name: trace.nodes[name]["value"] for name in "PQ"})).get_trace()
    assert float(trace.log_prob_sum()) == pytest.approx(float(plain.log_prob_sum()))
    with pytest.warns(UserWarning, match="model but not guide: {'P_index'}"):
        Trace_ELBO().loss(pgs.indexed(matching), no_guide)


def test_relaxed_sites_stay_as_they_are():
    for arranged in (pgs.indexed(pgs.relax(matching)), pgs.indexed(poutine.trace(pgs.relax(matching)))):
        assert "P_index" not in poutine.trace(arranged).get_trace().nodes


class Unlisted(dist.Delta):
    """A law of permutations that is none of this library's."""

    support = pgs.constraints.permutation


def test_what_is_refused():
    with pytest.raises(NotImplementedError, match="cannot list the permutations of Unlisted at site 'P'"):
        pgs.indexed(lambda: pyro.sample("P", Unlisted(torch.eye(3), event_dim=2)))()
    with pytest.raises(ValueError, match="n=9 has about 362880 permutations, more than the 40320"):
        pgs.indexed(lambda: pyro.sample("P", pgs.UniformPermutation(9)))()
    with pytest.raises(TypeError, match="model must be callable, but is int"):
        pgs.indexed(3)


def test_pickle():
    again = pickle.loads(pickle.dumps(pgs.indexed(matching)))
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(again, no_guide)
    assert loss == pytest.approx(math.log(6) - float(likelihood(all_matrices(3), Y[0]).logsumexp(0)))


WEIGHTS = torch.arange(16.0).reshape(4, 4).sin()


def summed():
    P = pyro.sample("P", pgs.UniformPermutation(4))
    pyro.factor("f", (P * WEIGHTS).sum())


def branching():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    P = pyro.sample("P", pgs.UniformPermutation(4))
    pyro.factor("f", 6 + z if (P == torch.eye(4)).all() else 0 * z)


@pytest.mark.parametrize(("model", "reason"), [(summed, "Metropolis$"), (branching, r"Metropolis \(test_index_handler")])
def test_a_model_that_does_not_broadcast_is_announced_once(model, reason):
    wrapped = pickle.loads(pickle.dumps(pgs.indexed(model)))  # as for several chains
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    guide = pyro.poutine.block(model, expose=["z"])
    with pytest.warns(pgs.VectorizationWarning, match=f"what is summed over their indices is wrong.*{reason}") as caught:
        elbo.loss(wrapped, guide)
    assert [warning.filename for warning in caught] == [__file__]
    elbo.loss(wrapped, guide)  # an error if it warned again


def test_trying_a_model_out_leaves_random_numbers_as_they_are():
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", x * P[..., 0, 0])

    draws = []
    for wrapped in (pgs.indexed(model), pgs.indexed()(model)):
        pyro.set_rng_seed(4)
        trace = pyro.poutine.trace(wrapped).get_trace()
        draws.append((trace.nodes["P_index"]["value"], trace.nodes["x"]["value"], torch.rand(2)))
    assert all(torch.equal(one, other) for one, other in zip(*draws, strict=True))

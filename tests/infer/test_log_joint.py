"""The log joint density over candidates: agreement with Pyro's traces, plates, and what is refused."""

import math

import matching_model
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import MCMC

import pyro_gs as pgs
from pyro_gs.infer.log_joint import LogJoint, PotentialJoint, VectorizationWarning


def in_plate(x, y, scale):
    with pyro.plate("data", len(x), dim=-2):
        P = pyro.sample("P", pgs.UniformPermutation(x.shape[-2]))
        with pyro.plate("views", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(P.to(x) @ x[:, None], scale).to_event(2), obs=y)


def shared(x, y, scale):
    """Items that depend on each other through a term outside of their plate."""
    with pyro.plate("data", len(x), dim=-1):
        P = pyro.sample("P", pgs.UniformPermutation(x.shape[-2]))
    mean = (P.to(x) @ x).mean(-3)
    pyro.factor("y", dist.Normal(mean, scale).log_prob(y).sum((-2, -1))[..., None])


def several(x, y, scale):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    P = pyro.sample("P", pgs.GibbsPermutation(torch.eye(4)))
    Q = pyro.sample("Q", pgs.UniformPermutation(3).expand([2]).to_event(1))
    shift = Q[..., 0, 0].sum(-1)
    pyro.sample("y", dist.Normal(P.to(x) @ x + (mu + shift)[..., None, None], scale).to_event(2), obs=y)


def by_trace(model, data, *args):
    trace = poutine.trace(poutine.condition(model, data)).get_trace(*args)
    return float(trace.log_prob_sum())


def data(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


CASES = {
    "plain": (matching_model.model, (data(4, 2), data(4, 2), 0.5), {}),
    "plates": (in_plate, (data(3, 4, 2), data(3, 2, 4, 2), 0.5), {}),
    "shared": (shared, (data(3, 4, 2), data(4, 2), 0.5), {}),
    "several": (several, (data(4, 2), data(4, 2), 0.5), {"mu": torch.tensor(0.3, dtype=torch.float64)}),
}


@pytest.mark.parametrize("vectorize", [None, False])
@pytest.mark.parametrize("case", CASES)
def test_candidates_score_as_their_traces(case, vectorize):
    model, args, others = CASES[case]
    pyro.set_rng_seed(0)
    joint = LogJoint(model, args, vectorize=vectorize)
    assert joint.vectorize == (vectorize is None)
    draws = [joint.draw() for _ in range(5)]
    expected = torch.tensor([by_trace(model, {**draw, **others}, *args) for draw in draws])
    values = {name: torch.stack([draw[name] for draw in draws]) for name in joint.sites}
    for name in (None, *joint.sites):
        terms = joint.evaluate(values, others, 5, name)
        assert torch.allclose(terms.total.sum(0), expected, rtol=1e-12)


def test_prior_and_likelihood_are_apart():
    model, args, _ = CASES["plain"]
    joint = LogJoint(model, args)
    P = joint.draw()
    prior, likelihood = joint.evaluate(P, {}, None).total[:, 0]
    assert float(prior) == pytest.approx(-torch.tensor(24.0).log().item())
    assert float(likelihood) == pytest.approx(float(matching_model.log_likelihood(P["P"], *args)))
    bare = LogJoint(model, args, normalized=False).evaluate(P, {}, None).total[:, 0]
    assert bare.tolist() == [0.0, float(likelihood)]


def test_items_of_a_plate_have_their_own_terms():
    model, args, _ = CASES["plates"]
    joint = LogJoint(model, args)
    draws = [joint.draw()["P"] for _ in range(2)]
    mixed = torch.cat([draws[0][:1], draws[1][1:]])
    terms = joint.evaluate({"P": torch.stack([*draws, mixed])}, {}, 3, "P")
    assert terms.inside.shape == (2, 3, 3)
    assert torch.equal(terms.inside[:, 2, 0], terms.inside[:, 0, 0])
    assert torch.equal(terms.inside[:, 2, 1:], terms.inside[:, 1, 1:])
    assert torch.equal(terms.outside, torch.zeros(2, 3))


def test_a_site_that_stays_needs_no_candidates():
    model, args, others = CASES["several"]
    joint = LogJoint(model, args)
    start, other = joint.draw(), joint.draw()
    P = torch.stack([start["P"], other["P"]])
    terms = joint.evaluate({"P": P, "Q": start["Q"]}, others, 2, "P")
    expected = [by_trace(model, {"P": p, "Q": start["Q"], **others}, *args) for p in P]
    assert torch.allclose(terms.total.sum(0), torch.tensor(expected), rtol=1e-12)


def test_a_model_that_does_not_broadcast_is_run_for_each():
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("f", torch.tensor(float(pgs.to_index(P.reshape(-1, 3, 3)[0])[0])))

    with pytest.warns(VectorizationWarning, match="vectorize=False"):
        joint = LogJoint(model)
    assert not joint.vectorize
    values = torch.stack([joint.draw()["P"] for _ in range(4)])
    assert joint.evaluate({"P": values}, {}, 4).total[1].tolist() == [float(pgs.to_index(P)[0]) for P in values]


def relaxed():
    pyro.sample("P", pgs.GumbelSinkhorn(1.0, torch.zeros(3, 3)))


def partial():
    pyro.sample("P", pgs.GibbsMatching(torch.zeros(2, 3), unmatched=0.0))


def index_vectors():
    pyro.sample("P", dist.OneOneMatching(torch.zeros(3, 3)))


def observed():
    pyro.sample("P", pgs.UniformPermutation(3), obs=torch.eye(3))


def nothing():
    pyro.sample("x", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nothing, r"no latent permutation site among its latent sites 'x'; sample one.*UniformPermutation\(n\)"),
        (relaxed, "'P' is relaxed.*the plain model in place of pyro_gs.relax.*NUTS"),
        (partial, r"'P' is a partial matching of shape \(2, 3\).*pad_logits.*lgamma"),
        (observed, "no latent permutation site; .* 'P' are observed: drop obs=, or the condition, to infer them"),
        (index_vectors, r"'P' holds index vectors: write pyro.sample\('P', pyro_gs.GibbsPermutation"),
    ],
)
def test_models_without_a_permutation_are_told_what_to_write(model, message):
    with pytest.raises(ValueError, match=message):
        LogJoint(model)


def test_subsampled_plates_are_refused():
    def model():
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("P", pgs.UniformPermutation(3))

    with pytest.raises(ValueError, match=r"'data' is subsampled \(2 of 4\)"):
        LogJoint(model)


def test_a_density_that_is_no_number_names_its_site():
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("likelihood", torch.where(P[..., 0, 0] == 1, torch.nan, 0.0))

    with pyro.validation_enabled(False), pytest.raises(ValueError, match=r"'likelihood' is NaN.*write torch.where\(P > 0"):
        LogJoint(model).evaluate({"P": torch.eye(3)}, {}, None)


def test_values_are_checked():
    site = LogJoint(lambda: pyro.sample("P", pgs.UniformPermutation(2, torch.eye(2) == 1))).sites["P"]
    with pytest.raises(ValueError, match="site 'P': P is not a permutation matrix"):
        site.to_items(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"site 'P' must have shape \(..., 2, 2\), but has \(3, 3\)"):
        site.to_items(torch.eye(3))
    with pytest.raises(ValueError, match="site 'P' matches row 0 of item 0 to a column that its prior forbids"):
        site.to_items(torch.eye(2).flip(0))


@pytest.mark.parametrize("batched", [True, False])
def test_potential_functions(batched):
    X = data(4, 4)

    def potential(params):
        P = params["P"]
        return -(P * X).sum((-2, -1)) if batched else -sum(X[i, j] for i, j in enumerate(pgs.to_index(P).tolist()))

    joint = PotentialJoint(potential, {"P": torch.eye(4)})
    assert joint.vectorize == batched
    values = torch.stack([joint.draw()["P"] for _ in range(3)])
    assert torch.allclose(joint.evaluate({"P": values}, {}, 3).total.sum(0), (values * X).sum((-2, -1)))


def test_potential_functions_are_checked():
    def potential(params):
        return torch.tensor(torch.nan)

    with pytest.raises(ValueError, match="potential_fn returned nan; it must return minus the log density"):
        PotentialJoint(potential, {"P": torch.eye(3)})
    with pytest.raises(TypeError, match="potential_fn must return a tensor, .* but returned NoneType; does it end with ret"):
        PotentialJoint(lambda params: None, {"P": torch.eye(3)})
    with pytest.raises(ValueError, match=r"initial_params\['P'\] must be permutation matrices"):
        PotentialJoint(potential, {"P": torch.arange(3)})
    with pytest.raises(TypeError, match="allowed must be a boolean tensor for site 'P', but is torch.float64"):
        PotentialJoint(potential, {"P": torch.eye(3)}, torch.ones(3, 3))
    with pytest.raises(ValueError, match="to a column that its prior forbids"):
        PotentialJoint(potential, {"P": torch.eye(3).flip(0)}, torch.eye(3) == 1)
    with pytest.raises(ValueError, match="allowed"):
        PotentialJoint(potential, {"P": torch.eye(3)}, torch.tensor([[True, False, False]] * 3))


def test_candidates_in_the_dimension_of_a_plate_are_noticed():
    """All values are -inf at the permutations that are tried, so that only the shape tells."""

    def model():
        with pyro.plate("items", 2):
            P = pyro.sample("P", pgs.UniformPermutation(3))
        same = (P[..., 0, :, :] * P[..., 1, :, :]).sum((-1, -2)) > 0.5
        pyro.factor("f", torch.where(same, -torch.inf, 0.0))

    with pyro.validation_enabled(False), pytest.warns(VectorizationWarning):
        posterior = pgs.enumerate_posterior(model)
    assert int((posterior.log_probs > -torch.inf).sum()) == 12  # pairs without a common entry


def rare(n):
    """A model that looks at its permutation, with one value at nearly all of them."""
    P = pyro.sample("P", pgs.UniformPermutation(n))
    pyro.factor("f", torch.tensor(6.0) if (P == torch.eye(n)).all() else torch.tensor(0.0))


@pytest.mark.parametrize("seed", range(5))
def test_a_branch_on_a_permutation_is_seen_where_all_candidates_tried_score_alike(seed):
    pyro.set_rng_seed(seed)
    with pytest.warns(VectorizationWarning, match=r"test_log_joint.py, line \d+, makes a Python value") as caught:
        exact = pgs.enumerate_posterior(rare, 5)
    assert caught[0].filename == __file__
    assert float(exact.log_evidence) == pytest.approx(math.log((119 + math.exp(6)) / 120))
    assert float(exact.log_probs.exp().max()) == pytest.approx(math.exp(6) / (119 + math.exp(6)))


@pytest.mark.parametrize("kernel", [pgs.SwapMetropolis, pgs.LocallyBalanced, pgs.BlockGibbs])
def test_a_kernel_sees_it_too(kernel):
    pyro.set_rng_seed(3)
    mcmc = MCMC(kernel(rare), 500, 100, disable_progbar=True)
    with pytest.warns(VectorizationWarning, match="makes a Python value") as caught:
        mcmc.run(4)
    assert caught[0].filename == __file__
    share = float((mcmc.get_samples()["P"] == torch.eye(4)).flatten(1).all(-1).double().mean())
    assert 0.7 < share  # .946 in the posterior, 1 in 24 of uniform draws


@pytest.mark.parametrize("kernel", [pgs.SwapMetropolis, pgs.BlockGibbs])
def test_a_branch_in_a_potential_function_is_seen(kernel):
    def potential(values):
        return torch.tensor(-6.0) if (values["P"] == torch.eye(4)).all() else torch.tensor(0.0)

    pyro.set_rng_seed(3)
    start = {"P": torch.eye(4)[[1, 0, 3, 2]]}
    mcmc = MCMC(kernel(potential_fn=potential), 500, 100, initial_params=start, disable_progbar=True)
    mcmc.run()
    assert float((mcmc.get_samples()["P"] == torch.eye(4)).flatten(1).all(-1).double().mean()) > 0.7

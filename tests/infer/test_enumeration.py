"""Exact posteriors against brute force and TraceEnum_ELBO, and the permutations drawn through an index."""

import functools
import itertools
import math

import matching_model
import pyro
import pyro.distributions as dist
import pytest
import torch
from matching_model import all_matrices, brute_force, no_guide
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, TraceEnum_ELBO, infer_discrete
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

import pyro_gs as pgs

pytestmark = pytest.mark.usefixtures("float64_only")

POINTS = tuple(value.double() for value in matching_model.noisy_points(4, 0.7, 0))


def test_one_site():
    args = (*POINTS, 0.7)
    posterior = pgs.enumerate_posterior(matching_model.model, *args)
    evidence, marginals, perms, weights = matching_model.exact(*args)
    assert float(posterior.log_evidence) == pytest.approx(evidence)
    assert torch.equal(posterior.permutations["P"], perms)
    assert torch.allclose(posterior.log_probs.exp(), weights)
    assert torch.allclose(posterior.marginals["P"], marginals)
    assert torch.equal(posterior.map["P"], perms[weights.argmax()])
    assert float(posterior.entropy) == pytest.approx(float(-(weights * weights.log()).sum()))
    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    assert elbo.loss(pgs.indexed(matching_model.model), no_guide, *args) == pytest.approx(-evidence)
    listed = elbo.compute_marginals(pgs.indexed(matching_model.model), no_guide, *args)["P_index"].probs
    assert torch.allclose(listed, weights)


def test_a_padded_partial_matching_that_counts_once_has_the_gibbs_law():
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.tensor([0.3, -0.4, 0.8])

    def model():
        P = pyro.sample("P", pgs.GibbsPermutation(pgs.pad_logits(logits, unmatched=scores)))
        pyro.factor("once", (pgs.unpad(P, (3, 2)).sum((-2, -1)) + 1).lgamma())

    found = pgs.unpad(pgs.enumerate_posterior(model).marginals["P"], (3, 2))
    want = pgs.GibbsMatching(logits, unmatched=scores).marginals()
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)  # rounding of sums of 120 terms


def test_draws():
    pyro.set_rng_seed(0)
    posterior = pgs.enumerate_posterior(matching_model.model, *POINTS, 0.7)
    draws = posterior.sample((100, 200))["P"]
    assert draws.shape == (100, 200, 4, 4)
    # 20,000 draws: five standard errors of a share
    assert (draws.mean((0, 1)) - posterior.marginals["P"]).abs().max() < 5 * 0.5 / math.sqrt(20_000)
    assert posterior.sample()["P"].shape == (4, 4)
    assert posterior.sample((0,))["P"].shape == (0, 4, 4)


def two_sites(x, y):
    P = pyro.sample("P", pgs.UniformPermutation(3, torch.ones(3, 3).tril(1) == 1))
    Q = pyro.sample("Q", pgs.GibbsPermutation(torch.arange(9.0).reshape(3, 3).sin()))
    pyro.sample("y", dist.Normal(P @ Q @ x, 0.8).to_event(2), obs=y)


def test_several_sites_and_masks():
    args = tuple(value[:3] for value in POINTS)
    lists = {"P": [P for P in all_matrices(3) if P[0, 2] == 0], "Q": all_matrices(3)}
    evidence, weights = brute_force(two_sites, args, lists)
    posterior = pgs.enumerate_posterior(two_sites, *args)
    assert float(posterior.log_evidence) == pytest.approx(float(evidence))
    assert torch.allclose(posterior.log_probs.exp(), weights)
    joint = torch.stack([P for P in lists["P"] for _ in lists["Q"]])
    assert torch.equal(posterior.permutations["P"], joint)
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(pgs.indexed(two_sites), no_guide, *args)
    assert loss == pytest.approx(-float(evidence))


def in_plate(x, y, allowed):
    with pyro.plate("items", len(x)):
        P = pyro.sample("P", pgs.UniformPermutation(3, allowed))
        pyro.sample("y", dist.Normal(P @ x, 0.8).to_event(2), obs=y)


ALLOWED = torch.tensor([[[1, 1, 1], [1, 1, 1], [1, 1, 1]], [[1, 0, 0], [0, 1, 1], [0, 1, 1]]]) == 1
PLATE = (torch.stack([POINTS[0][:3], POINTS[0][1:]]), torch.stack([POINTS[1][:3], POINTS[1][1:]]), ALLOWED)


def test_plates_with_masks_of_their_own():
    posterior = pgs.enumerate_posterior(in_plate, *PLATE)
    assert posterior.permutations["P"].shape == (12, 2, 3, 3)
    each = [pgs.enumerate_posterior(in_plate, *(value[k : k + 1] for value in PLATE)) for k in range(2)]
    assert float(posterior.log_evidence) == pytest.approx(sum(float(p.log_evidence) for p in each))
    for k, alone in enumerate(each):
        assert torch.allclose(posterior.marginals["P"][k], alone.marginals["P"][0])
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    loss = elbo.loss(pgs.indexed(in_plate), no_guide, *PLATE)
    assert loss == pytest.approx(-float(posterior.log_evidence))
    probs = elbo.compute_marginals(pgs.indexed(in_plate), no_guide, *PLATE)["P_index"].probs
    support = all_matrices(3)
    assert torch.allclose(torch.einsum("kp,pij->kij", probs, support), posterior.marginals["P"])


def sequential(x, y):
    for k in pyro.plate("items", len(x)):
        P = pyro.sample(f"P{k}", pgs.UniformPermutation(3))
        pyro.sample(f"y{k}", dist.Normal(P @ x[k], 0.8).to_event(2), obs=y[k])


def as_event(x, y):
    P = pyro.sample("P", pgs.UniformPermutation(3).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(P @ x, 0.8).to_event(3), obs=y)


def test_sequential_plates_and_events():
    x, y = PLATE[:2]
    plate = pgs.enumerate_posterior(in_plate, x, y, torch.ones(2, 3, 3) == 1)
    for other in (sequential, as_event):
        found = pgs.enumerate_posterior(other, x, y)
        assert torch.allclose(found.log_probs, plate.log_probs)
        assert float(found.log_evidence) == pytest.approx(float(plate.log_evidence))
    with pytest.raises(NotImplementedError, match=r"site 'P' holds several permutations as one event.*pyro.plate"):
        pgs.indexed(as_event)(x, y)


@pytest.mark.parametrize(
    "law",
    [
        lambda: pgs.GibbsPermutation(torch.arange(9.0).reshape(3, 3).cos()),
        lambda: pgs.GumbelMatching(torch.arange(9.0).reshape(3, 3).cos()),
        lambda: pgs.PlackettLuce(torch.arange(3.0)),
        lambda: pgs.Mallows(torch.eye(3), torch.tensor(0.7)),
        lambda: pgs.UniformPermutation(3).mask(True),
    ],
)
def test_priors(law):
    def model():
        P = pyro.sample("P", law())
        pyro.factor("f", P[..., 0, 1])

    support = all_matrices(3)
    log_p = law().log_prob(support) + support[:, 0, 1]
    posterior = pgs.enumerate_posterior(model)
    assert torch.allclose(posterior.log_probs.exp(), log_p.softmax(0))
    assert float(posterior.log_evidence) == pytest.approx(float(log_p.logsumexp(0)))


def test_conditioned_and_observed_permutations():
    args = tuple(value[:3] for value in POINTS)
    eye = torch.eye(3)
    conditioned = poutine.condition(two_sites, {"P": eye})
    posterior = pgs.enumerate_posterior(conditioned, *args)
    assert list(posterior.permutations) == ["Q"]
    evidence, weights = brute_force(two_sites, args, {"P": [eye], "Q": all_matrices(3)})
    assert float(posterior.log_evidence) == pytest.approx(float(evidence))
    assert torch.allclose(posterior.log_probs.exp(), weights)
    for model in (pgs.indexed(conditioned), poutine.condition(pgs.indexed(two_sites), {"P": eye})):
        loss = TraceEnum_ELBO(max_plate_nesting=0).loss(model, no_guide, *args)
        assert loss == pytest.approx(-float(evidence))
    with pytest.raises(ValueError, match="no latent permutation site"):
        pgs.enumerate_posterior(poutine.condition(two_sites, {"P": eye, "Q": eye}), *args)


def semi_supervised(x, y, mask):
    with pyro.plate("items", len(x)):
        P = pyro.sample("P", pgs.GibbsPermutation(torch.eye(3)), obs=torch.eye(3).expand(len(x), 3, 3), obs_mask=mask)
        pyro.sample("y", dist.Normal(P @ x, 0.8).to_event(2), obs=y)


def test_partly_observed_permutations():
    x, y = PLATE[:2]
    posterior = pgs.enumerate_posterior(semi_supervised, x, y, torch.tensor([True, False]))
    support, law = all_matrices(3), pgs.GibbsPermutation(torch.eye(3))
    log_p = law.log_prob(support) + dist.Normal(support @ x[1], 0.8).log_prob(y[1]).sum((-2, -1))
    known = law.log_prob(torch.eye(3)) + dist.Normal(x[0], 0.8).log_prob(y[0]).sum()
    assert float(posterior.log_evidence) == pytest.approx(float(known + log_p.logsumexp(0)))
    marginals = torch.einsum("k,kij->ij", log_p.softmax(0), support)
    assert torch.allclose(posterior.marginals["P_unobserved"][1], marginals)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(
        pgs.indexed(semi_supervised), no_guide, x, y, torch.tensor([True, False])
    )
    assert loss == pytest.approx(-float(posterior.log_evidence))


@pytest.mark.parametrize("mask", [False, torch.tensor([False, True])])
def test_priors_under_a_mask_are_those_of_pyro(mask):
    def model(x, y):
        with pyro.plate("items", 2):
            with poutine.mask(mask=mask):
                P = pyro.sample("P", pgs.GibbsPermutation(torch.eye(3)))
            pyro.sample("y", dist.Normal(P @ x, 0.8).to_event(2), obs=y)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(pgs.indexed(model), no_guide, *PLATE[:2])
    assert float(pgs.enumerate_posterior(model, *PLATE[:2]).log_evidence) == pytest.approx(-loss)


def coupled(x, y, keepdim=True):
    with pyro.plate("items", len(x)):
        P = pyro.sample("P", pgs.UniformPermutation(3))
    mean = (P @ x).sum(-3, keepdim=keepdim)
    pyro.sample("y", dist.Normal(mean, 0.8).to_event(2), obs=y)


def test_items_that_depend_on_each_other():
    x, y = PLATE[0], PLATE[1][0]
    pairs = [torch.stack(pair) for pair in itertools.product(all_matrices(3), repeat=2)]
    evidence, weights = brute_force(coupled, (x, y), {"P": pairs})
    with pytest.warns(pgs.VectorizationWarning):  # candidates lie to the left of the plate's dimension, which must stay
        alone = pgs.enumerate_posterior(functools.partial(coupled, keepdim=False), x, y)
    for found in (alone, pgs.enumerate_posterior(coupled, x, y)):
        assert float(found.log_evidence) == pytest.approx(float(evidence))
        assert torch.allclose(found.log_probs.exp(), weights)
        assert torch.allclose(found.marginals["P"], torch.einsum("k,kbij->bij", weights, torch.stack(pairs)))


BLOCKS = torch.block_diag(torch.ones(1, 1), torch.ones(2, 2)) == 1


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "prior",
    [
        lambda: pgs.UniformPermutation(3),
        lambda: pgs.UniformPermutation(3, BLOCKS),
        lambda: pgs.GibbsPermutation(20 * torch.eye(3)),
    ],
)
def test_models_that_do_not_broadcast_are_found_out_whatever_the_seed(prior, seed):
    # A prior that nearly always draws the same permutation hides it from a trial on draws of the prior.
    law = prior()

    def model():
        P = pyro.sample("P", law)
        pyro.factor("f", P.reshape(-1, 3, 3)[0, 1, 2])

    pyro.set_rng_seed(seed)
    with pytest.warns(pgs.VectorizationWarning):
        posterior = pgs.enumerate_posterior(model)
    P = posterior.permutations["P"]
    assert torch.allclose(posterior.log_probs, (law.log_prob(P) + P[:, 1, 2]).log_softmax(0))


def dependent_masks():
    P = pyro.sample("P", pgs.UniformPermutation(3))
    Q = pyro.sample("Q", pgs.UniformPermutation(3, P + torch.eye(3) > 0))
    pyro.factor("f", P[..., 0, 0] * Q[..., 0, 1] + Q[..., 1, 1])


def test_forbidden_pairs_that_depend_on_another_permutation():
    with pytest.raises(ValueError, match=r"which pairs site 'Q' allows depends on other latent sites.*pyro_gs.indexed"):
        pgs.enumerate_posterior(dependent_masks)
    with pytest.raises(ValueError, match="which pairs site 'Q' allows depends"):
        MCMC(pgs.SwapMetropolis(dependent_masks), 1, 1, disable_progbar=True).run()
    support = all_matrices(3)
    evidence, _ = brute_force(dependent_masks, (), {"P": support, "Q": support})
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(pgs.indexed(dependent_masks), no_guide)
    assert loss == pytest.approx(-float(evidence))


def test_a_summary_takes_the_posterior():
    posterior = pgs.enumerate_posterior(matching_model.model, *POINTS, 0.7)
    site = pgs.summary(posterior)["P"]
    assert torch.allclose(site.marginals, posterior.marginals["P"])
    assert torch.equal(site.map, posterior.map["P"])


def with_scale(x, y):
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P @ x, scale[..., None, None]).to_event(2), obs=y)


def by_quadrature(x, y):
    """Mean and standard deviation of the log-scale, and marginals of P, on a fine grid."""
    grid = torch.linspace(-3.0, 2.0, 2001)
    perms = all_matrices(len(x))
    likelihood = dist.Normal(perms @ x, grid.exp()[:, None, None, None]).log_prob(y).sum((-2, -1))
    log_p = likelihood + dist.Normal(-0.5, 0.5).log_prob(grid)[:, None]
    p = log_p.flatten().softmax(0).reshape(log_p.shape)
    mean = (p.sum(1) * grid).sum()
    sd = ((p.sum(1) * grid.square()).sum() - mean.square()).sqrt()
    return float(mean), float(sd), torch.einsum("k,kij->ij", p.sum(0), perms)


def test_nuts_with_the_permutations_summed_out():
    pyro.set_rng_seed(1)
    mcmc = MCMC(NUTS(pgs.indexed(with_scale)), 300, 100, disable_progbar=True)
    mcmc.run(*POINTS)
    assert list(mcmc.get_samples()) == ["scale"]
    log_scale = mcmc.get_samples()["scale"].log()
    mean, sd, marginals = by_quadrature(*POINTS)
    # at least 100 effective draws of the 300: four standard errors
    assert abs(float(log_scale.mean()) - mean) < 4 * sd / 10
    assert float(log_scale.std()) == pytest.approx(sd, rel=0.3)
    posterior = pgs.permutation_posterior(with_scale, mcmc.get_samples(), *POINTS)
    assert posterior.log_evidence is None
    assert torch.allclose(posterior.marginals["P"], marginals, atol=0.03)
    assert float(posterior.log_probs.exp().sum()) == pytest.approx(1.0)


def test_svi_with_the_permutations_summed_out():
    pyro.set_rng_seed(2)
    model = pgs.indexed(with_scale)
    guide = AutoNormal(poutine.block(model, expose=["scale"]))
    svi = SVI(model, guide, Adam({"lr": 0.05}), TraceEnum_ELBO(max_plate_nesting=0))
    for _ in range(300):
        svi.step(*POINTS)
    mean, sd, _ = by_quadrature(*POINTS)
    assert float(guide.median()["scale"].log()) == pytest.approx(mean, abs=sd / 2)


def test_infer_discrete_and_predictive():
    pyro.set_rng_seed(3)
    posterior = pgs.enumerate_posterior(matching_model.model, *POINTS, 0.3)
    model = pgs.indexed(matching_model.model)
    best = infer_discrete(model, temperature=0, first_available_dim=-1)
    P = poutine.trace(best).get_trace(*POINTS, 0.3).nodes["P"]["value"]
    assert torch.equal(P, posterior.map["P"])
    drawn = infer_discrete(model, temperature=1, first_available_dim=-1)
    draws = torch.stack([poutine.trace(drawn).get_trace(*POINTS, 0.3).nodes["P"]["value"] for _ in range(300)])
    # five standard errors of a share of 300
    assert (draws.mean(0) - posterior.marginals["P"]).abs().max() < 5 * 0.5 / math.sqrt(300)
    samples = Predictive(pgs.indexed(matching_model.model), num_samples=5, return_sites=["P"])(*POINTS, 0.3)
    assert samples["P"].shape == (5, 4, 4)


def hopeless():
    P = pyro.sample("P", pgs.UniformPermutation(3))
    pyro.factor("f", torch.full(P.shape[:-2], -torch.inf))


def nan():
    P = pyro.sample("P", pgs.UniformPermutation(3))
    pyro.factor("f", torch.full(P.shape[:-2], torch.nan))


def large(n, items=1):
    with pyro.plate("items", items):
        pyro.sample("P", pgs.UniformPermutation(n))


def masked():
    """Too many states of items with masks of their own, whose permutations would take seconds to list."""
    allowed = torch.ones(40, 8, 8) == 1
    allowed[:, 0, 1] = False
    with pyro.plate("items", 40):
        pyro.sample("P", pgs.UniformPermutation(8, allowed))


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (hopeless, (), "none of the 6 permutations of 'P' has positive density"),
        (nan, (), "'f' is NaN"),
        (large, (9,), "'P' with n=9 has about 362880 permutations, more than the 40320"),
        (large, (30,), r"'P' with n=30 has about 2.65253e\+32 permutations"),
        (large, (5, 4), "'P' have 207,360,000 states together, more than the 362,880"),
        (large, (5, 3000), "'P' have about 1e6238 states together"),
        (masked, (), "'P' have about 1e182 states together"),
        (pgs.indexed(large), (3,), r"'P_index' is the index of one: give the plain model in place of pyro_gs.indexed"),
        (with_scale, POINTS, r"'scale' too; sum the permutations out.*MCMC\(NUTS\(pyro_gs.indexed\(model\)\)"),
        (no_guide, (), "no latent permutation site"),
    ],
)
def test_what_cannot_be_enumerated(model, args, message):
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        pgs.enumerate_posterior(model, *args)


def test_the_posterior_of_draws_is_the_mean_of_exact_conditionals():
    scales = torch.tensor([0.4, 0.9, 2.0])
    found = pgs.permutation_posterior(with_scale, {"scale": scales, "other": torch.zeros(2)}, *POINTS)
    each = [pgs.enumerate_posterior(poutine.condition(with_scale, {"scale": s}), *POINTS) for s in scales]
    assert torch.allclose(found.log_probs.exp(), torch.stack([p.log_probs.exp() for p in each]).mean(0))
    assert torch.allclose(found.marginals["P"], torch.stack([p.marginals["P"] for p in each]).mean(0))


def only_small(x, y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    P = pyro.sample("P", pgs.UniformPermutation(3))
    pyro.factor("f", torch.where(scale < 1, 0.0, -torch.inf) + P[..., 0, 0])


@pytest.mark.parametrize(
    ("model", "samples", "message"),
    [
        (with_scale, {}, "samples must have draws of the latent sites 'scale'"),
        (with_scale, {"scale": torch.tensor(1.0)}, r"samples\['scale'\] must have shape \('draws',\) with .* but has \(\)"),
        (with_scale, {"scale": torch.ones(0)}, r"with at least one draw, but has \(0,\)"),
        (with_scale, {"scale": torch.ones(2, 5)}, r"must have shape \('draws',\) with .* but has \(2, 5\)"),
        (only_small, {"scale": torch.tensor([0.5, 2.0])}, "none of the 6 permutations has positive density at draw 1"),
        (with_scale, {"scale": torch.tensor([0.5, torch.nan])}, "'scale' is NaN"),
    ],
)
def test_bad_samples(model, samples, message):
    with pytest.raises(ValueError, match=message):
        pgs.permutation_posterior(model, samples, *POINTS)


def test_samples_of_a_model_without_other_sites():
    with pytest.raises(ValueError, match="no latent sites beside its permutations; use enumerate_posterior"):
        pgs.permutation_posterior(matching_model.model, {}, *POINTS, 0.5)


def test_samples_that_differ_in_number():
    def model():
        a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.factor("f", (a + b) * pyro.sample("P", pgs.UniformPermutation(3))[..., 0, 0])

    with pytest.raises(ValueError, match=r"same number of draws of every site, but has \[2, 3\]"):
        pgs.permutation_posterior(model, {"a": torch.zeros(2), "b": torch.zeros(3)})


def test_draws_predict_through_the_plain_model():
    x, y = (value[:3] for value in POINTS)

    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        return pyro.sample("y", dist.Normal(P @ x, 0.8).to_event(2))

    draws = pgs.enumerate_posterior(poutine.condition(model, {"y": y})).sample((7,))
    assert Predictive(model, draws)()["y"].shape == (7, 3, 2)

"""Where a guide's logits come from, temperatures by site, and the company of other guides."""

import pickle

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from matching_model import exact, model, noisy_points
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam

import pyro_gs as pgs
from pyro_gs.infer.initialization import init_to_matching

ALLOWED = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()
SWAPPED = torch.eye(4)[[1, 0, 2, 3]]


def fit(relaxed, guide, steps, *args, lr=0.05, particles=4, nesting=0):
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=nesting)
    svi = SVI(relaxed, guide, Adam({"lr": lr}), elbo)
    return [svi.step(*args) for _ in range(steps)]


def two_sites(allowed=None):
    pyro.sample("P", pgs.UniformPermutation(4, allowed))
    pyro.sample("Q", pgs.UniformPermutation(3))


# --- initial logits


def test_initial_logits_by_site_and_noise_for_the_rest():
    start = torch.where(ALLOWED, torch.randn(4, 4), -torch.inf)
    for init in ({"P": start}, lambda name, allowed: start if name == "P" else None):
        guide = pgs.AutoGumbelSinkhorn(two_sites, init_logits=init)
        guide(ALLOWED)
        assert torch.equal(guide.logits("P"), start)
        assert 0 < guide.logits("Q").abs().max() < 0.1


def test_initial_logits_from_a_matching():
    guide = pgs.AutoGumbelSinkhorn(two_sites, init_logits=init_to_matching({"P": SWAPPED}, strength=6.0))
    guide(ALLOWED)
    assert torch.equal(guide.logits("P"), torch.where(ALLOWED, 6 * SWAPPED, -torch.inf))
    assert torch.equal(guide.median()["P"], SWAPPED)
    assert guide.logits("Q").abs().max() < 0.1


def test_initial_logits_at_the_full_size_of_a_subsampled_plate():
    def worms():
        with pyro.plate("worms", 5, subsample_size=2):
            pyro.sample("P", pgs.UniformPermutation(4))

    start = torch.randn(5, 4, 4)
    guide = pgs.AutoGumbelSinkhorn(worms, init_logits={"P": start})
    guide()
    assert torch.equal(guide.logits("P"), start)


@pytest.mark.parametrize(
    ("init", "text"),
    [
        ({"R": torch.zeros(4, 4)}, "init_logits names 'R', no site; the permutation sites are 'P', 'Q'"),
        ({"P": torch.zeros(3, 3)}, r"logits must have shape \(4, 4\) for site 'P', but has \(3, 3\)"),
        ({"P": torch.zeros(4, 4)}, "logits must be -inf exactly at the pairs that the prior of site 'P' forbids"),
        ({"P": torch.full((4, 4), torch.nan)}, "logits has the entry nan"),
        (init_to_matching({"P": torch.eye(4).flip(0)}), "matches a pair that the prior of site 'P' forbids"),
        (init_to_matching({"P": torch.eye(3)}), r"matrices\['P'\] must have shape \(4, 4\), but has \(3, 3\)"),
    ],
)
def test_initial_logits_that_do_not_fit(init, text):
    guide = pgs.AutoGumbelSinkhorn(two_sites, init_logits=init)
    for _ in range(2):  # a failed first call leaves the guide as it was
        with pytest.raises(ValueError, match=text):
            guide(ALLOWED)


def test_a_matching_is_checked_where_it_is_given():
    with pytest.raises(ValueError, match="matrices must be permutation matrices, but those of 'P' are not"):
        init_to_matching({"P": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"strength must be positive and finite, but is -1"):
        init_to_matching({"P": torch.eye(2)}, strength=-1.0)


# --- temperatures by site


def test_temperatures_by_site():
    guide = pgs.AutoGumbelSinkhorn(two_sites, temperature={"P": lambda: 0.3, "Q": torch.tensor(0.8)})
    nodes = poutine.trace(guide).get_trace().nodes
    assert float(nodes["P"]["fn"].temperature) == pytest.approx(0.3)
    assert float(nodes["Q"]["fn"].temperature) == pytest.approx(0.8)
    guide.temperature = {"P": 0.5, "Q": 0.6}
    assert float(poutine.trace(guide).get_trace().nodes["Q"]["fn"].temperature) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="temperature names 'R', no site; the permutation sites are 'P', 'Q'"):
        guide.temperature = {"P": 0.5, "Q": 0.5, "R": 0.5}
    with pytest.raises(ValueError, match="temperature must be positive and finite, but is 0"):
        guide.temperature = {"P": 0.5, "Q": 0.0}
    with pytest.raises(ValueError, match="temperature says nothing of 'Q'"):
        pgs.AutoGumbelSinkhorn(two_sites, temperature={"P": 0.5})()


def test_annealing_by_site():
    guide = pgs.AutoGumbelSinkhorn(two_sites, temperature={"P": 1.0, "Q": 1.0})
    falling = pgs.ExponentialSchedule(1.0, 0.25, 2)
    svi = pgs.AnnealedSVI(
        pgs.relax(two_sites), guide, Adam({"lr": 0.1}), Trace_ELBO(), schedule=lambda step: {"P": falling(step), "Q": 0.7}
    )
    for _ in range(3):
        svi.step()
    assert guide.temperature == pytest.approx({"P": 0.25, "Q": 0.7})


# --- low rank


def test_low_rank_logits():
    guide = pgs.AutoGumbelSinkhorn(two_sites, rank=2, init_scale=0.5)
    guide(ALLOWED)
    assert {tuple(p.shape) for p in guide.parameters()} == {(4, 2), (3, 2)}
    assert torch.equal(guide.logits("P") == -torch.inf, ~ALLOWED)
    assert torch.linalg.matrix_rank(guide.logits("Q").detach()) == 2
    with pytest.raises(NotImplementedError, match="the logits of site 'Q' are low rank, U V\\^T of rank 2"):
        guide.set_logits("Q", torch.zeros(3, 3))


def test_low_rank_initial_scale():
    def large():
        pyro.sample("P", pgs.UniformPermutation(100))

    guide = pgs.AutoGumbelSinkhorn(large, rank=50, init_scale=0.2)
    guide._setup_prototype()
    # sd .2; its standard error from 10,000 entries that share 10,000 factors is about .003
    assert float(guide.logits("P").detach().std()) == pytest.approx(0.2, abs=0.02)


def test_low_rank_learns_an_easy_matching():
    x, y = noisy_points(8, 0.05, 0)
    guide = pgs.AutoGumbelSinkhorn(model, temperature=0.5, rank=3, init_scale=0.1)
    fit(pgs.relax(model, temperature=0.5), guide, 80, x, y, 0.1, lr=0.2)
    assert torch.equal(guide.median()["P"], pgs.matching(-torch.cdist(y, x)))


def test_low_rank_in_a_subsampled_plate():
    def worms():
        with pyro.plate("worms", 5, subsample_size=2):
            pyro.sample("P", pgs.UniformPermutation(4))

    guide = pgs.AutoGumbelSinkhorn(worms, rank=1)
    assert guide()["P"].shape == (2, 4, 4)
    assert guide.logits("P").shape == (5, 4, 4)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"rank": 0}, ValueError, "rank must be an integer of at least 1, but is 0"),
        ({"rank": 2, "init_scale": 0.0}, ValueError, "init_scale must be positive with rank"),
        ({"rank": 2, "init_logits": {}}, ValueError, "init_logits cannot be given with rank"),
        ({"logits": torch.zeros(4, 4)}, TypeError, "logits must be a function of the model's arguments, but is Tensor"),
        ({"temperature": {"P": -1.0}}, ValueError, "temperature must be positive and finite, but is -1"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        pgs.AutoGumbelSinkhorn(model, **options)


# --- amortization


class Net(torch.nn.Module):
    """Logits that favour near points, with a strength and a width to learn; none at first."""

    def __init__(self):
        super().__init__()
        self.strength = torch.nn.Parameter(torch.tensor(0.01))
        self.log_width = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, x, y, scale, allowed=None):
        return self.strength * torch.exp(-(torch.cdist(y, x) ** 2) / self.log_width.exp())


def test_amortized_guide_learns_to_match_new_data():
    net = Net()
    guide = pgs.AutoGumbelSinkhorn(model, temperature=0.3, logits=net)
    relaxed = pgs.relax(model, temperature=0.3)
    svi = SVI(relaxed, guide, Adam({"lr": 0.2}), Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0))
    for step in range(80):
        svi.step(*noisy_points(4, 0.3, step), 0.3)
    assert net.strength > 2.0  # the parameters of the module itself have trained
    errors, flat = [], []
    for seed in range(1000, 1020):  # data sets never seen, also of another size
        x, y = noisy_points(3 if seed % 2 else 4, 0.3, seed)
        marginals = exact(x, y, 0.3)[1]
        errors.append(float((guide.marginals(500, x, y, 0.3)["P"][0] - marginals).abs().mean()))
        flat.append(float((1 / len(x) - marginals).abs().mean()))
    assert sum(errors) < 0.25 * sum(flat)


def test_amortized_masks_follow_the_arguments():
    x, y = noisy_points(4, 0.3, 0)
    guide = pgs.AutoGumbelSinkhorn(model, logits={"P": Net()})
    other = ALLOWED.flip(0)
    for allowed in (None, ALLOWED, other):
        mask = torch.ones(4, 4).bool() if allowed is None else allowed
        Trace_ELBO().loss(pgs.relax(model), guide, x, y, 0.3, allowed)  # the density is of the same face
        assert torch.equal(guide.logits("P", x, y, 0.3, allowed) > -torch.inf, mask)
        assert pgs.constraints.Permutation(mask).check(guide.hard_sample((5,), x, y, 0.3, allowed)["P"]).all()
        assert torch.equal(guide.median(x, y, 0.3, allowed)["P"], pgs.matching(guide.logits("P", x, y, 0.3, allowed)))
        relaxed = torch.as_tensor(guide.relaxed_sample((5,), x, y, 0.3, allowed)["P"])
        assert pgs.constraints.DoublyStochastic(mask).check(relaxed).all()


@pytest.mark.parametrize("full", [True, False])
def test_amortized_in_a_subsampled_plate(full):
    allowed = torch.stack([ALLOWED, torch.ones(4, 4).bool(), ALLOWED.flip(0), torch.ones(4, 4).bool(), ALLOWED])
    data = torch.arange(5.0)

    def worms(data, index=None):
        with pyro.plate("worms", 5, subsample_size=2, subsample=index) as index:
            pyro.sample("P", pgs.UniformPermutation(4, allowed[index]))

    weight = torch.nn.Parameter(torch.randn(4, 4))

    def net(data, index=None):
        return (data if full else data[index])[:, None, None] * weight

    index = torch.tensor([3, 0])
    guide = pgs.AutoGumbelSinkhorn(
        worms, logits=net, create_plates=lambda data, index=None: pyro.plate("worms", 5, subsample_size=2, subsample=index)
    )
    law = poutine.trace(guide).get_trace(data, index).nodes["P"]["fn"]
    want = torch.where(allowed[index], data[index][:, None, None] * weight, -torch.inf)
    assert torch.equal(law.logits, want)
    assert Trace_ELBO().loss(pgs.relax(worms), guide, data, index) < 1e9
    if full:
        want = torch.where(allowed, data[:, None, None] * weight, -torch.inf)
        assert torch.equal(guide.logits("P", data), want)


@pytest.mark.parametrize(
    ("net", "error", "text"),
    [
        (lambda *a: torch.zeros(3, 3), ValueError, r"logits of site 'P' must return shape \(4, 4\), but return \(3, 3\)"),
        (lambda *a: None, TypeError, r"logits of site 'P' must return a tensor \(..., n, n\), but returns NoneType"),
        (lambda *a: torch.full((4, 4), torch.nan), ValueError, "logits has the entry nan"),
        ({"Q": Net()}, ValueError, "logits names 'Q', no site; the permutation sites are 'P'"),
    ],
)
def test_networks_that_do_not_fit(net, error, text):
    with pytest.raises(error, match=text):
        pgs.AutoGumbelSinkhorn(model, logits=net)(*noisy_points(4, 0.3, 0), 0.3)


def test_networks_of_several_sites_are_named():
    with pytest.raises(ValueError, match=r"logits must be a dict by site, as the model has several: \{'P': ..., 'Q': ...\}"):
        pgs.AutoGumbelSinkhorn(two_sites, logits=lambda: torch.zeros(4, 4))()
    guide = pgs.AutoGumbelSinkhorn(two_sites, logits={"Q": lambda: torch.eye(3)})
    guide()
    assert torch.equal(guide.logits("Q"), torch.eye(3))
    assert {name for name, _ in guide.named_parameters()} == {"free_logits.P_unconstrained"}
    with pytest.raises(NotImplementedError, match="the logits of site 'Q' are a function of the model's arguments"):
        guide.set_logits("Q", torch.zeros(3, 3))
    with pytest.raises(ValueError, match="init_logits cannot start site 'Q'"):
        pgs.AutoGumbelSinkhorn(two_sites, logits={"Q": lambda: torch.eye(3)}, init_logits={"Q": torch.eye(3)})()


def test_pickle_keeps_network_and_logits():
    x, y = noisy_points(4, 0.3, 0)
    guide = pgs.AutoGumbelSinkhorn(model, logits=Net())
    guide(x, y, 0.3)
    again = pickle.loads(pickle.dumps(guide))  # Pyro does not pickle the model
    assert torch.equal(again.networks.net_0(x, y, 0.3), guide.networks.net_0(x, y, 0.3))


# --- draws


def test_marginals_are_means_of_hard_draws():
    guide = pgs.AutoGumbelSinkhorn(two_sites, init_scale=1.0)
    with pytest.raises(RuntimeError, match="has not seen the model's arguments"):
        guide.marginals()
    guide()
    mean, error = guide.marginals(20_000)["P"]
    other = guide.hard_sample((20_000,))["P"].mean(0)
    assert ((mean - other).abs() <= 5 * 2**0.5 * error).all()  # 16 entries; 16 * 6e-7


def test_relaxed_draws_whatever_the_objective():
    for objective, hard in (("density", True), ("noise_kl", False)):
        guide = pgs.AutoGumbelSinkhorn(two_sites, objective=objective, hard=hard)
        guide()
        draws = torch.as_tensor(guide.relaxed_sample((6, 2))["Q"])
        assert draws.shape == (6, 2, 3, 3)
        assert ((draws > 0) & (draws < 1)).all()
        assert not draws.requires_grad


# --- with AutoNormal, and particles


def joint(x, y):
    P = pyro.sample("P", pgs.UniformPermutation(4))
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
    pyro.sample("y", dist.Normal(P.to(x) @ x, scale[..., None, None]).to_event(2), obs=y)


@pytest.mark.parametrize("prototype", ["plain", "relaxed"])
@pytest.mark.parametrize("elbo_class", [Trace_ELBO, TraceMeanField_ELBO])
def test_joint_guide(prototype, elbo_class):
    x, y = noisy_points(4, 0.2, 1)
    relaxed = pgs.relax(joint)
    base = joint if prototype == "plain" else relaxed
    guide = AutoGuideList(base)
    guide.append(pgs.AutoGumbelSinkhorn(poutine.block(base, expose=["P"]), objective="tightened_kl"))
    guide.append(AutoNormal(poutine.block(base, hide=["P"])))
    elbo = elbo_class(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(relaxed, guide, Adam({"lr": 0.1}), elbo)
    losses = [svi.step(x, y) for _ in range(80)]
    assert sum(losses[-10:]) < sum(losses[:10])
    median = guide.median(x, y)
    assert set(median) == {"P", "scale"}
    assert torch.equal(median["P"], pgs.matching(exact(x, y, 0.2)[1]))
    quantiles = guide.quantiles([0.1, 0.9], x, y)
    assert set(quantiles) == {"scale"}  # permutations have no order
    assert quantiles["scale"][0] < median["scale"] < quantiles["scale"][1]


def test_quantiles_of_permutations_alone_are_refused():
    guide = pgs.AutoGumbelSinkhorn(two_sites)
    guide()
    with pytest.raises(NotImplementedError, match="AutoGumbelSinkhorn has no quantiles, as permutations have no order"):
        guide.quantiles([0.5])


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("options", [{"rank": 2, "init_scale": 0.5}, {"logits": Net()}])
def test_vectorized_particles_are_the_mean_of_single_ones(options, hard):
    x, y = noisy_points(4, 0.5, 0)
    guide = pgs.AutoGumbelSinkhorn(model, hard=hard, **options)
    relaxed = pgs.relax(model)
    vectorized = Trace_ELBO(num_particles=600, vectorize_particles=True, max_plate_nesting=0).loss(relaxed, guide, x, y, 0.5)
    single = torch.tensor([Trace_ELBO().loss(relaxed, guide, x, y, 0.5) for _ in range(60)])
    error = float(single.std()) * (1 / 60 + 1 / 600) ** 0.5
    assert abs(vectorized - float(single.mean())) < 4.5 * error


@pytest.mark.parametrize("objective", ["density", "tightened_kl", "noise_kl"])
def test_hard_draws_on_the_plain_model_are_refused(objective):
    def model():
        pyro.sample("P", pgs.UniformPermutation(3))

    guide = pgs.AutoGumbelSinkhorn(model, objective=objective, hard=True)
    with pytest.raises(ValueError, match=r"UniformPermutation in the model, which is not relaxed; write SVI\(pyro_gs.relax"):
        Trace_ELBO().loss(model, guide)
    assert Trace_ELBO().loss(pgs.relax(model), guide) < 1e6


def test_allowed_pairs_must_be_booleans():
    with pytest.raises(TypeError, match=r"allowed must have dtype bool, but has torch\.float64"):
        init_to_matching({"P": torch.eye(2)})("P", torch.ones(2, 2))


def test_what_is_no_model_mapping_or_law_is_refused():
    with pytest.raises(TypeError, match="model must be a function, but is int"):
        pgs.AutoGumbelSinkhorn(3)
    with pytest.raises(TypeError, match="matrices must be a mapping of sites to matrices, but is int"):
        init_to_matching(5)
    with pytest.raises(TypeError, match="law must be a class of distributions, but is 3"):
        pgs.register_relaxation(3)
    with pytest.raises(TypeError, match="must be a function of a law and a temperature, but is None"):
        pgs.register_relaxation(pgs.UniformPermutation)(None)


def test_stick_breaking_of_a_single_row_is_refused():
    guide = pgs.AutoStickBreaking(lambda: pyro.sample("P", pgs.UniformPermutation(1)))
    with pytest.raises(ValueError, match="has nothing to learn of site 'P', whose matrices have a single row"):
        guide()

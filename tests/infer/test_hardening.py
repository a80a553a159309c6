"""Hard permutations from a fitted guide, and permutations that are observed, conditioned on or a relaxed prior."""

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from matching_model import exact, model, noisy_points
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam
from scipy.stats import chi2

import pyro_gs as pgs
from pyro_gs.infer.hardening import hard_law, harden, register_hard_law

ALLOWED = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()


def joint(x, y):
    P = pyro.sample("P", pgs.UniformPermutation(4))
    scale = pyro.sample("scale", dist.LogNormal(-1.0, 0.5))
    pyro.sample("y", dist.Normal(P.to(x) @ x, scale).to_event(2), obs=y)


# --- harden


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_of_a_hardened_guide_have_the_law_of_the_matching(parallel):
    start = torch.where(ALLOWED, torch.randn(3, 3), -torch.inf)

    def plain():
        P = pyro.sample("P", pgs.UniformPermutation(3, ALLOWED))
        pyro.sample("y", dist.Normal(P @ torch.arange(3.0), 0.1).to_event(1))

    guide = pgs.AutoGumbelSinkhorn(poutine.block(plain, expose=["P"]), init_logits={"P": start})
    guide()
    count = 4000 if parallel else 300
    draws = Predictive(plain, guide=harden(guide), num_samples=count, parallel=parallel)()
    assert pgs.constraints.Permutation(ALLOWED).check(draws["P"]).all()
    assert ((draws["y"] - draws["P"] @ torch.arange(3.0)).abs() < 0.7).all()  # the model saw the hard permutation
    law = pgs.GumbelMatching(start)
    perms = law.enumerate_support()
    expected = count * law.log_prob(perms).exp()
    found = (draws["P"][:, None] == perms).all(-1).all(-1).sum(0)
    kept = expected > 0
    assert int(found.sum()) == count
    statistic = float(((found - expected) ** 2 / expected)[kept].sum())
    assert statistic < chi2.ppf(1 - 2e-5, int(kept.sum()) - 1)


def test_hardened_list_of_guides_gives_the_plain_model_all_its_sites():
    x, y = noisy_points(4, 0.2, 1)
    guide = AutoGuideList(joint)
    guide.append(pgs.AutoGumbelSinkhorn(poutine.block(joint, expose=["P"]), temperature=0.3))
    guide.append(AutoNormal(poutine.block(joint, hide=["P"])))
    svi = SVI(pgs.relax(joint, temperature=0.3), guide, Adam({"lr": 0.1}), Trace_ELBO(num_particles=2))
    for _ in range(50):
        svi.step(x, y)
    draws = Predictive(joint, guide=harden(guide), num_samples=50)(x, y)
    assert pgs.constraints.permutation.check(draws["P"]).all()
    assert torch.equal(pgs.matching(draws["P"].mean(0)), pgs.matching(exact(x, y, 0.2)[1]))
    assert (draws["scale"] > 0).all()
    assert draws["scale"].unique().numel() == 50


def test_hardening_keeps_plates_and_wrappers():
    def worms():
        with pyro.plate("worms", 3, subsample_size=2):
            pyro.sample("P", pgs.UniformPermutation(3, ALLOWED).expand([5]).to_event(1))

    guide = pgs.AutoGumbelSinkhorn(worms)
    guide()
    assert guide.logits("P").shape == (3, 5, 3, 3)
    node = poutine.trace(harden(guide)).get_trace().nodes["P"]
    assert node["value"].shape == (2, 5, 3, 3)
    assert node["fn"].event_dim == 3
    assert pgs.constraints.Permutation(ALLOWED).check(node["value"]).all()
    with harden():
        assert pgs.constraints.permutation.check(guide()["P"]).all()
    assert not pgs.constraints.permutation.check(torch.as_tensor(guide()["P"])).any()


def test_other_laws():
    scores = torch.randn(3)
    assert isinstance(hard_law(pgs.RelaxedPlackettLuce(0.5, scores)), pgs.PlackettLuce)
    uniform = pgs.UniformPermutation(3)
    assert hard_law(uniform) is uniform

    class Own(dist.TorchDistribution):
        support = pgs.constraints.doubly_stochastic
        arg_constraints = {}  # noqa: RUF012

    law = Own((), (3, 3))
    guide = harden(lambda: pyro.sample("P", law))
    with pytest.raises(
        NotImplementedError, match=r"harden knows no hard law of Own, only of .*GumbelSinkhorn.*register_hard"
    ):
        guide()
    register_hard_law(Own)(lambda law: uniform)
    assert pgs.constraints.permutation.check(guide()).all()
    with pytest.raises(TypeError, match="guide must be callable, but is float"):
        harden(0.5)


# --- permutations that are not latent, or have a relaxed prior


def two(x, y, P=None):
    P = pyro.sample("P", pgs.UniformPermutation(len(x)), obs=P)
    Q = pyro.sample("Q", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(Q.to(x) @ P.to(x) @ x, 0.5).to_event(2), obs=y)


@pytest.mark.parametrize("how", ["observed", "conditioned", "conditioned after relaxing"])
@pytest.mark.parametrize("hard", [False, True])
def test_svi_on_a_permutation_that_is_given(how, hard):
    # given P, the other site has the posterior of the matching of P x
    x, y = noisy_points(4, 0.5, 1)
    given = torch.eye(4)[[2, 0, 3, 1]]
    args = (x, y)
    if how == "observed":
        plain, relaxed, args = two, pgs.relax(two), (x, y, given)
    elif how == "conditioned":
        plain = poutine.condition(two, {"P": given})
        relaxed = pgs.relax(plain)
    else:
        plain = poutine.condition(two, {"P": given})
        relaxed = poutine.condition(pgs.relax(two), {"P": given})
    guide = pgs.AutoGumbelSinkhorn(plain, hard=hard)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(relaxed, guide, Adam({"lr": 0.1}), elbo)
    losses = [svi.step(*args) for _ in range(50)]
    assert all(math.isfinite(loss) for loss in losses)
    assert list(guide.median(*args)) == ["Q"]
    assert torch.equal(guide.median()["Q"], exact(given @ x, y, 0.5)[2][exact(given @ x, y, 0.5)[3].argmax()])
    draws = Predictive(plain, guide=harden(guide), num_samples=3)(*args)
    assert torch.equal(draws["P"].reshape(-1, 4, 4).unique(dim=0)[0].to(given), given)


def test_conditioning_the_plain_model_scores_the_prior_once():
    # the loss with P given exceeds that of the model without it by -log prior(P) = log n!
    x, y = noisy_points(4, 0.5, 1)
    given = torch.eye(4)

    def one(x, y):
        Q = pyro.sample("Q", pgs.UniformPermutation(len(x)))
        pyro.sample("y", dist.Normal(Q.to(x) @ x, 0.5).to_event(2), obs=y)

    losses = []
    for plain in (poutine.condition(two, {"P": given}), one):
        torch.manual_seed(0)
        pyro.clear_param_store()
        guide = pgs.AutoGumbelSinkhorn(plain, init_logits={"Q": torch.randn(4, 4)})
        guide(x, y)
        torch.manual_seed(1)
        losses.append(Trace_ELBO().loss(pgs.relax(plain), guide, x, y))
    assert losses[0] - losses[1] == pytest.approx(math.lgamma(5), rel=1e-4)


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_sinkhorn_written_as_a_prior(hard):
    x, y = noisy_points(4, 0.3, 1)

    def own(x, y):
        P = pyro.sample("P", pgs.GumbelSinkhorn(0.5, torch.zeros(4, 4)))
        pyro.sample("y", dist.Normal(P.to(x) @ x, 0.3).to_event(2), obs=y)

    guide = pgs.AutoGumbelSinkhorn(own, temperature=0.5, hard=hard)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(own, guide, Adam({"lr": 0.1}), elbo)  # no relax
    for _ in range(50):
        svi.step(x, y)
    assert torch.equal(guide.median()["P"], pgs.matching(exact(x, y, 0.3)[1]))
    # and it is what relax makes of the uniform law, so that the losses agree at the same draws
    losses = []
    for relaxed, args in ((own, (x, y)), (pgs.relax(model, temperature=0.5), (x, y, 0.3))):
        torch.manual_seed(0)
        losses.append(Trace_ELBO().loss(relaxed, guide, *args) if relaxed is own else Trace_ELBO().loss(
            relaxed, lambda *a: guide(x, y), *args
        ))  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    draws = Predictive(own, guide=harden(guide), num_samples=4)(x, y)
    assert pgs.constraints.permutation.check(draws["P"]).all()

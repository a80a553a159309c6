"""GuideProposal: every law leaves posteriors invariant, whatever the guide; the laws' own probabilities; what is refused."""

import itertools
import pickle

import invariance
import pyro
import pytest
import torch
from enumeration import goodness_of_fit
from invariance import FAILURE_RATE, TARGETS, check_converges, check_invariant
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.optim import Adam

import pyro_gs as pgs
from pyro_gs.infer.mcmc.guide_laws import GibbsLaw, MatchingLaw, RelaxedLaw, SequentialLaw, centred
from pyro_gs.infer.mcmc.guide_proposal import GuideProposal


class FixedGuide:
    """Has given logits; remembers the arguments that it was asked with."""

    def __init__(self, logits):
        self.by_site = logits
        self.asked = []

    def logits(self, name, *args, **kwargs):
        self.asked.append((name, args, kwargs))
        return self.by_site[name]


def bad_guide(target, scale=0.7):
    """Random logits, which know nothing of the posterior."""
    logits = {}
    for name, site in target.joint.sites.items():
        x = scale * torch.randn(site.num_items, site.n, site.n)
        if site.allowed is not None:
            x = x.masked_fill(~site.allowed, -torch.inf)
        logits[name] = x.reshape(*site.item_shape, site.n, site.n)
    return FixedGuide(logits)


def fitted_guide(target, steps=100):
    guide = pgs.AutoGumbelSinkhorn(target.model)
    svi = SVI(pgs.relax(target.model), guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(steps):
        svi.step(*target.args)
    return guide


SMALL = ("plate", "dependent", "event", "two sites")  # of three rows
CASES = [
    *[("gibbs", name) for name in TARGETS],
    *[("sequential", name) for name in TARGETS],
    *[("hard", name) for name in SMALL],
    ("relaxed", "points"),
    ("relaxed", "quadratic"),
    ("auto", "plate"),
]


@pytest.mark.parametrize(("law", "name"), CASES)
def test_a_bad_guide_leaves_posteriors_invariant(law, name):
    target = TARGETS[name]()
    replicas = 500 if law == "hard" else 2000  # its probabilities take a quadrature
    check_invariant(GuideProposal(guide=bad_guide(target), law=law, num_steps=3), target, replicas=replicas)


@pytest.mark.parametrize("law", ["gibbs", "sequential", "relaxed"])
def test_a_fitted_guide(law):
    target = invariance.points()
    guide = fitted_guide(target)
    check_invariant(GuideProposal(guide=guide, law=law, num_steps=2), target)
    if law != "relaxed":  # its relaxed points are far from flat, so that few of them are accepted
        check_converges(GuideProposal(guide=guide, law=law), target, steps=20)


@pytest.mark.parametrize(
    ("law", "name"), [("gibbs", "masked"), ("sequential", "masked"), ("hard", "plate"), ("relaxed", "quadratic")]
)
def test_found_from_a_wrong_start(law, name):
    target = TARGETS[name]()
    kernel = GuideProposal(guide=bad_guide(target, 0.3), law=law, num_steps=4)
    check_converges(kernel, target, replicas=500, steps=20)


def test_relaxed_points_of_several_items():
    """Four rows, as the density of three rows takes a quadrature."""
    target = invariance.event(n=4)
    check_invariant(GuideProposal(guide=bad_guide(target), law="relaxed", num_steps=2), target, replicas=1000)


def test_proposals_without_their_probabilities_are_found_out():
    class Wrong(GuideProposal):
        def _accept(self, focus, law, candidates, weight, part):
            law.weigh = lambda index: torch.zeros(index.shape[:-1], dtype=torch.float64)
            return super()._accept(focus, law, candidates, 0 * weight, part)

    target = invariance.points()
    with pytest.raises(AssertionError, match="differ from the posterior"):
        check_invariant(Wrong(guide=bad_guide(target), law="gibbs"), target)


def test_mcmc():
    target = invariance.points()
    invariance.check_mcmc(GuideProposal(target.model, guide=fitted_guide(target)), target, thin=2)


def test_the_guide_is_asked_with_the_arguments_of_the_model():
    target = invariance.points()
    guide = bad_guide(target)
    MCMC(GuideProposal(target.model, guide=guide), num_samples=2, warmup_steps=0, disable_progbar=True).run(*target.args)
    name, args, kwargs = guide.asked[0]
    assert (name, kwargs) == ("P", {})
    assert all(torch.equal(a, b) for a, b in zip(args, target.args, strict=True))


# The laws


def all_permutations(n):
    return torch.tensor(list(itertools.permutations(range(n))))


def masked_logits(n=4):
    x = torch.randn(1, n, n)
    return x.masked_fill(torch.ones(n, n).triu(2).bool() | torch.ones(n, n).tril(-3).bool(), -torch.inf)


@pytest.mark.parametrize("kind", [GibbsLaw, SequentialLaw, MatchingLaw])
@pytest.mark.parametrize("forbidden", [False, True])
def test_draws_have_the_stated_probabilities(kind, forbidden):
    n = 3 if kind is MatchingLaw else 4
    x = masked_logits(n) if forbidden else torch.randn(1, n, n)
    law = kind(x)
    index, weight = law.draw(20000)
    cells = all_permutations(n)
    allowed = x[0][torch.arange(n), cells].sum(-1) > -torch.inf
    cells = cells[allowed]
    log_p = law.weigh(cells[:, None])[:, 0]
    alive = weight[:, 0] < torch.inf
    torch.testing.assert_close(weight[alive], law.weigh(index)[alive])
    probability = log_p.exp()
    if kind is GibbsLaw:
        probability = probability / probability.sum()
    dead = 1 - float(probability.sum())
    assert dead > 0.01 if kind is SequentialLaw and forbidden else abs(dead) < 1e-9
    found = (index[alive] == cells).all(-1)
    assert bool((found.sum(1) == 1).all())
    counts = torch.cat([found.sum(0), (~alive).sum()[None]])
    law_of_counts = torch.cat([probability, torch.tensor([max(dead, 0.0)], dtype=torch.float64)])
    assert goodness_of_fit(counts, law_of_counts) > FAILURE_RATE
    if float(dead) > 0.01:
        assert float(probability.min()) > 0


@pytest.mark.parametrize(("n", "draws"), [(2, 5000), (3, 250)])
def test_the_relaxed_point_has_the_given_permutation_and_its_weight_the_guides_probability(n, draws):
    r"""``E[q / p_0 | M(R) = P]`` under p_0 is ``n! q(M(R) = P)``, here to be had in closed form."""
    x = 0.5 * torch.randn(1, n, n)
    law = RelaxedLaw(x)
    seen = []
    log_ratio = law._log_ratio
    law._log_ratio = lambda noise: seen.append(noise) or log_ratio(noise)
    cells = all_permutations(n)
    index = cells[:, None, None].expand(-1, draws, 1, n)
    weight = law.weigh(index).exp()[..., 0]
    torch.testing.assert_close(pgs.matching(seen[0]).argmax(-1), index)
    exact = len(cells) * pgs.GumbelMatching(x[0]).log_prob(pgs.to_matrix(cells)).exp()
    z = (weight.mean(1) - exact) / (weight.std(1) / draws**0.5)
    assert float(z.abs().max()) < 4.7  # at most six comparisons, 1.6e-5 together


def test_the_relaxed_ratio_does_not_depend_on_the_temperature():
    x = torch.randn(5, 5)
    guide, flat = (pgs.GumbelSinkhorn(1.0, logits) for logits in (x, torch.zeros(5, 5)))
    noise = -torch.rand(20, 5, 5).log().neg().log()
    ratio = RelaxedLaw(x[None])._log_ratio(noise[:, None])[:, 0]
    torch.manual_seed(0)
    for tau in (0.5, 2.0):
        guide, flat = (pgs.GumbelSinkhorn(tau, logits) for logits in (x, torch.zeros(5, 5)))
        point = pgs.sinkhorn(noise, temperature=tau)
        torch.testing.assert_close(guide.log_prob(point) - flat.log_prob(point), ratio, atol=1e-5, rtol=1e-5)


def test_the_sequential_law_does_not_depend_on_what_is_added_to_columns():
    x = masked_logits()
    index, _ = SequentialLaw(centred(x)).draw(20)
    moved = SequentialLaw(centred(x + torch.randn(4)))
    torch.testing.assert_close(moved.weigh(index), SequentialLaw(centred(x)).weigh(index))


@pytest.mark.parametrize(("n", "law"), [(3, "MatchingLaw"), (4, "GibbsLaw"), (21, "SequentialLaw")])
def test_auto(n, law):
    def model():
        pyro.sample("P", pgs.UniformPermutation(n))

    kernel = GuideProposal(model, guide=FixedGuide({"P": torch.zeros(n, n)}))
    kernel.setup(0)
    assert type(kernel._pools["P"].law).__name__ == law


def test_pickled_before_set_up():
    target = invariance.points()
    kernel = pickle.loads(pickle.dumps(GuideProposal(guide=bad_guide(target))))
    check_invariant(kernel, target, replicas=500)


@pytest.mark.parametrize(
    ("n", "law", "message"),
    [
        (4, "hard", r"law='hard' needs .* site 'P' has one of 4; write law='auto', 'gibbs', 'sequential' or 'relaxed'"),
        (21, "gibbs", r"law='gibbs' is drawn exactly up to 20 rows .* 'P' has one of 21; write law='sequential'"),
    ],
)
def test_laws_refuse_large_components(n, law, message):
    def model():
        pyro.sample("P", pgs.UniformPermutation(n))

    kernel = GuideProposal(model, guide=FixedGuide({"P": torch.zeros(n, n)}), law=law)
    with pytest.raises(ValueError, match=message):
        kernel.setup(0)


def test_the_relaxed_law_refuses_forbidden_pairs():
    target = invariance.masked()
    kernel = GuideProposal(target.model, guide=bad_guide(target), law="relaxed")
    with pytest.raises(ValueError, match=r"law='relaxed' .* 'P' has forbidden pairs; write law='gibbs'"):
        kernel.setup(0, *target.args)


def test_bad_input():
    guide = FixedGuide({"P": torch.zeros(4, 4)})
    target = invariance.points()
    with pytest.raises(TypeError, match="guide must have a method logits, as AutoGumbelSinkhorn has, but is int"):
        GuideProposal(guide=3)
    with pytest.raises(ValueError, match="law must be one of auto, hard, gibbs, sequential, relaxed, but is 'exact'"):
        GuideProposal(guide=guide, law="exact")
    with pytest.raises(ValueError, match="num_steps"):
        GuideProposal(guide=guide, num_steps=0)
    with pytest.raises(ValueError, match=r"guide.logits\('P'\) must have shape \(4, 4\), but has \(3, 3\)"):
        GuideProposal(target.model, guide=FixedGuide({"P": torch.zeros(3, 3)})).setup(0, *target.args)
    narrow = torch.zeros(4, 4)
    narrow[1, 2] = -torch.inf
    with pytest.raises(ValueError, match="guide forbids row 1, column 2 of item 0 of site 'P', which the model allows"):
        GuideProposal(target.model, guide=FixedGuide({"P": narrow})).setup(0, *target.args)
    with pytest.raises(RuntimeError, match="has not seen the model's arguments"):
        GuideProposal(lambda: pyro.sample("P", pgs.UniformPermutation(3)), guide=_Unfitted()).setup(0)


class _Unfitted(FixedGuide):
    def __init__(self):
        super().__init__({})

    def logits(self, name, *args, **kwargs):
        raise RuntimeError("AutoGumbelSinkhorn has not seen the model's arguments yet")

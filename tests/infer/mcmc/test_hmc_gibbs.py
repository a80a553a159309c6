"""HMCGibbs: joint posteriors of permutations and continuous sites against enumeration and quadrature, and what is refused.

The model is repeated in a plate of replicas with the same data. A draw from the joint posterior of all replicas is still one
after some steps, so the replicas' states are independent then, and a chi-square test is exact whatever the autocorrelation.
"""

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from enumeration import goodness_of_fit
from matching_model import noisy_points
from pyro.infer import HMC, MCMC, NUTS
from pyro.infer.mcmc import StreamingMCMC
from pyro.ops.stats import effective_sample_size

import pyro_gs as pgs

FAILURE_RATE = 2e-5
GRID = torch.linspace(-5, 5, 1001, dtype=torch.float64)
X, Y = (value.double() for value in noisy_points(4, 0.7, 0))
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1]], dtype=torch.bool)
LOGITS = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3).roll(1, 0)


def replicated(replicas):
    return pyro.plate("replicas", replicas, dim=-2) if replicas else pyro.plate_stack("none", ())


def perms(n):
    return pgs.to_matrix(torch.tensor(list(itertools.permutations(range(n))))).double()


class Scale:
    """Noise of unknown scale: the better the permutation, the smaller it is."""

    latent = "scale"

    def __init__(self):
        self.states = {"P": perms(4)}
        log_scale = GRID[:, None, None]
        like = dist.Normal((self.states["P"] @ X)[:, None], log_scale.exp()).log_prob(Y).sum((-2, -1))
        self.log_p = like + dist.Normal(0.0, 0.5).log_prob(GRID)

    def model(self, replicas=None):
        with replicated(replicas):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5).expand([1] if replicas else []))
            P = pyro.sample("P", pgs.UniformPermutation(4).expand([1] if replicas else []))
            pyro.sample("y", dist.Normal(P @ X, scale[..., None, None]).to_event(2), obs=Y)


class Prior:
    """Two sites; the prior of one, with its permanent, depends on the continuous site, the other has forbidden pairs."""

    latent = "theta"

    def __init__(self):
        allowed = perms(3)[(perms(3) * ~MASK).sum((-2, -1)) == 0]
        q = perms(3)
        i, j = torch.cartesian_prod(torch.arange(len(allowed)), torch.arange(len(q))).T
        self.states = {"P": allowed[i], "Q": q[j]}
        fits = torch.einsum("g,ij,kij->kg", GRID, LOGITS, q)
        prior = fits - torch.logsumexp(fits, 0)
        like = dist.Normal(self.states["P"] @ self.states["Q"] @ X[:3], 3.0).log_prob(Y[:3]).sum((-2, -1))
        self.log_p = like[:, None] + prior[j] + dist.Normal(1.0, 1.0).log_prob(GRID)

    def model(self, replicas=None):
        with replicated(replicas):
            theta = pyro.sample("theta", dist.Normal(1.0, 1.0).expand([1] if replicas else []))
            P = pyro.sample("P", pgs.UniformPermutation(3, MASK).expand([1] if replicas else []))
            Q = pyro.sample("Q", pgs.GibbsPermutation(theta[..., None, None] * LOGITS))
            pyro.sample("y", dist.Normal(P @ Q @ X[:3], 3.0).to_event(2), obs=Y[:3])


class Shift:
    """A plate of two permutations that share a shift, through which they depend on each other."""

    latent = "mu"

    def __init__(self):
        p = perms(3)
        i, j = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
        self.states = {"P": torch.stack([p[i], p[j]], 1)}
        self.data = torch.stack([Y[:3], Y[1:] - 0.5])
        means = (self.states["P"] @ X[:3])[:, None] + GRID[:, None, None, None]
        self.log_p = dist.Normal(means, 2.0).log_prob(self.data).sum((-3, -2, -1)) + dist.Normal(0.0, 1.0).log_prob(GRID)

    def model(self, replicas=None):
        with replicated(replicas):
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0).expand([1] if replicas else []))
            with pyro.plate("items", 2, dim=-1):
                P = pyro.sample("P", pgs.UniformPermutation(3))
                pyro.sample("y", dist.Normal(P @ X[:3] + mu[..., None, None], 2.0).to_event(2), obs=self.data)


TARGETS = {"scale": Scale, "prior": Prior, "shift": Shift}
KERNELS = {
    "HMC": lambda model: pgs.HMCGibbs(HMC(model, step_size=0.06, num_steps=5, adapt_step_size=False)),
    "NUTS": lambda model: pgs.HMCGibbs(NUTS(model, step_size=0.06, adapt_step_size=False, max_tree_depth=4)),
    "sequence": lambda model: pgs.HMCGibbs(
        HMC(model, step_size=0.06, num_steps=5, adapt_step_size=False),
        [pgs.LocallyBalanced(), pgs.SwapMetropolis(num_cycles=1)],
        num_moves=2,
    ),
}


def start(target, state, z):
    """Initial params of all replicas: their states by number and the unconstrained values (R,) of the continuous site."""
    out = {name: rows[state] for name, rows in target.states.items()}
    if target.latent != "mu":
        out = {name: rows[:, None] for name, rows in out.items()}
    return {**out, target.latent: z[:, None]}


def run(kernel, params, steps):
    kernel.initial_params = params
    kernel.setup(0, len(next(iter(params.values()))))
    params = kernel.initial_params
    for _ in range(steps):
        params = kernel.sample(params)
    return params


def agree(target, params):
    """Chi-square of the states, each split at the quartiles of the continuous site."""
    p = target.log_p.flatten().softmax(0).reshape(target.log_p.shape)
    share = p.sum(0).cumsum(0)
    edges = torch.searchsorted(share, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    bins = torch.bucketize(torch.arange(len(GRID)), edges, right=True)
    probability = torch.zeros(len(p), 4, dtype=torch.float64).index_add_(1, bins, p)
    step = GRID[1] - GRID[0]
    found = torch.bucketize(params[target.latent].flatten(), GRID[edges] - step / 2)
    flat = torch.cat([rows.argmax(-1).flatten(1) for rows in target.states.values()], 1)
    cells = {tuple(row): k for k, row in enumerate(flat.tolist())}
    values = torch.cat([params[name].argmax(-1).flatten(1) for name in target.states], 1)
    state = torch.tensor([cells[tuple(row)] for row in values.tolist()])
    counts = torch.bincount(4 * state + found, minlength=4 * len(p))
    p_value = goodness_of_fit(counts, probability.flatten())
    assert p_value > FAILURE_RATE, f"p = {p_value:.2g}"


def draw(target, replicas):
    p = target.log_p.flatten().softmax(0)
    chosen = torch.multinomial(p, replicas, replacement=True)
    z = GRID[chosen % len(GRID)] + (torch.rand(replicas, dtype=torch.float64) - 0.5) * (GRID[1] - GRID[0])
    return chosen // len(GRID), z


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_leaves_joint_posteriors_invariant(kernel, name):
    pyro.set_rng_seed(0)
    target = TARGETS[name]()
    before = start(target, *draw(target, 1500))
    after = run(KERNELS[kernel](target.model), before, steps=4)
    assert (after[target.latent] != before[target.latent]).double().mean() > 0.9
    assert ((after["P"] != before["P"]).flatten(1).any(1)).double().mean() > 0.3
    agree(target, after)


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("name", TARGETS)
def test_converges_from_a_wrong_start(name):
    pyro.set_rng_seed(1)
    target = TARGETS[name]()
    worst = int(target.log_p.logsumexp(1).argmin())
    params = start(target, torch.full((500,), worst), torch.full((500,), 1.5, dtype=torch.float64))
    kernel = pgs.HMCGibbs(HMC(target.model, step_size=0.1, num_steps=8, adapt_step_size=False))
    agree(target, run(kernel, params, steps=60))


@pytest.mark.usefixtures("float64_only")
def test_the_checks_can_fail():
    pyro.set_rng_seed(0)
    target = Scale()
    # moves whose likelihood has the power 0.7
    kernel = KERNELS["HMC"](target.model)
    params = start(target, *draw(target, 1500))
    kernel.initial_params = params
    kernel.setup(0, 1500)
    kernel._chain.power = 0.7 * kernel._chain.power
    for _ in range(10):
        params = kernel.sample(params)
    with pytest.raises(AssertionError, match="p = "):
        agree(target, params)
    # an inner kernel that does not hear of the moves
    worst = int(target.log_p.logsumexp(1).argmin())
    kernel = pgs.HMCGibbs(HMC(target.model, step_size=0.1, num_steps=8, adapt_step_size=False))
    kernel.initial_params = start(target, torch.full((500,), worst), torch.full((500,), 1.5, dtype=torch.float64))
    kernel.setup(0, 500)
    params = kernel.initial_params
    kernel._conditioned = copy.copy(kernel._conditioned)
    for _ in range(60):
        params = kernel.sample(params)
    with pytest.raises(AssertionError, match="p = "):
        agree(target, params)


def test_the_inner_kernel_scores_its_state_anew(monkeypatch):
    """Its energy is that of the permutations after the move, not of those before."""
    pyro.set_rng_seed(0)
    kernel = pgs.HMCGibbs(HMC(tiny, step_size=0.1, num_steps=2, adapt_step_size=False))
    kernel.setup(0, DATA)
    seen = []
    plain = kernel.inner_kernel.sample

    def sample(params):
        found = plain(params)
        z, energy, _ = kernel.inner_kernel._fetch_from_cache()
        fresh = kernel.inner_kernel.potential_fn(z)
        seen.append(float((energy - fresh).abs()))
        return found

    monkeypatch.setattr(kernel.inner_kernel, "sample", sample)
    params, states = kernel.initial_params, set()
    for _ in range(30):
        params = kernel.sample(params)
        states.add(tuple(params["P"].argmax(-1).tolist()))
    assert len(states) > 2
    assert max(seen) < 1e-4


def test_under_mcmc(capsys):
    pyro.set_rng_seed(2)
    target = Scale()
    kernel = pgs.HMCGibbs(NUTS(target.model))
    mcmc = MCMC(kernel, num_samples=600, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples()
    assert samples["P"].shape == (600, 4, 4)
    assert bool((samples["P"].sum(-1) == 1).all())
    p = target.log_p.flatten().softmax(0).reshape(target.log_p.shape)
    log_scale = samples["scale"].double().log()
    mean = float((p.sum(0) * GRID).sum())
    variance = float((p.sum(0) * (GRID - mean).square()).sum())
    # five Monte Carlo standard errors, by the effective sample size
    worth = float(effective_sample_size(log_scale[None], chain_dim=0, sample_dim=1))
    assert worth > 60
    assert float(log_scale.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / worth))
    assert float(log_scale.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / worth))
    marginals = torch.einsum("s,sij->ij", p.sum(1), target.states["P"])
    assert (samples["P"].double().mean(0) - marginals).abs().max() < 5 * 0.5 / math.sqrt(60)
    diagnostics = mcmc.diagnostics()
    assert diagnostics["divergences"] == {"chain 0": []}
    assert 0.5 < diagnostics["acceptance rate"]["chain 0"] <= 1
    assert 0 < diagnostics["moves: acceptance rate"]["chain 0"] < 1
    mcmc.summary()
    printed = capsys.readouterr().out
    assert "P[3,3]" in printed
    assert "scale" in printed
    assert "Number of divergences: 0" in printed


def tiny(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    P = pyro.sample("P", pgs.UniformPermutation(3))
    pyro.sample("y", dist.Normal(P @ torch.arange(3.0) + mu[..., None], scale[..., None]).to_event(1), obs=y)


DATA = torch.tensor([2.0, 0.3, 1.1])


def test_starts_where_told():
    start = {"P": torch.eye(3).flip(0), "mu": torch.tensor(0.5), "scale": torch.tensor(-1.0)}
    seen = []

    def hook(kernel, params, stage, i):
        seen.append(params)

    kernel = pgs.HMCGibbs(HMC(tiny, step_size=1e-6, num_steps=1, adapt_step_size=False), num_moves=1)
    mcmc = MCMC(kernel, 1, 0, initial_params=start, hook_fn=hook, disable_progbar=True)
    mcmc.run(DATA)
    assert float(seen[0]["mu"]) == pytest.approx(0.5, abs=1e-3)
    # unconstrained inside, constrained outside
    assert float(seen[0]["scale"]) == pytest.approx(-1.0, abs=1e-3)
    assert float(mcmc.get_samples()["scale"]) == pytest.approx(math.exp(-1.0), abs=1e-3)
    kernel.initial_params = start
    kernel.setup(0, DATA)
    assert torch.equal(kernel.initial_params["P"], start["P"])
    kernel.initial_params = {"P": start["P"]}
    kernel.setup(0, DATA)
    assert torch.equal(kernel.initial_params["P"], start["P"])
    assert set(kernel.initial_params) == {"P", "mu", "scale"}


def test_save_params_and_streaming():
    mcmc = MCMC(pgs.HMCGibbs(NUTS(tiny)), 10, 10, save_params=["scale"], disable_progbar=True)
    mcmc.run(DATA)
    assert set(mcmc.get_samples()) == {"scale"}
    assert bool((mcmc.get_samples()["scale"] > 0).all())
    streaming = StreamingMCMC(pgs.HMCGibbs(NUTS(tiny)), 20, 10, disable_progbar=True)
    streaming.run(DATA)
    statistics = streaming.get_statistics()
    assert statistics[0, "P"]["mean"].sum(-1).tolist() == pytest.approx([1, 1, 1])
    assert float(statistics[0, "scale"]["mean"]) > 0


def test_the_progress_bar_shows_both_acceptances():
    kernel = pgs.HMCGibbs(NUTS(tiny), [pgs.SwapMetropolis(), pgs.BlockGibbs(block_size=2)])
    kernel.setup(0, DATA)
    kernel.sample(kernel.initial_params)
    shown = kernel.logging()
    assert list(shown) == ["step size", "acc. prob", "moves acc. SwapMetropolis", "moves acc. BlockGibbs"]
    assert all(isinstance(value, str) for value in shown.values())


def test_the_warm_up_of_the_moves_lasts_as_long_as_that_of_the_inner_kernel():
    moves = pgs.SwapMetropolis(adapt=True)
    kernel = pgs.HMCGibbs(HMC(tiny, step_size=0.1, num_steps=2), moves, num_moves=3)
    kernel.setup(4, DATA)
    params = kernel.initial_params
    for step in range(6):
        assert moves.warming_up == (step < 4)
        params = kernel.sample(params)
    # of the samples: moves a step, steps, proposals, or one more each
    assert 3 * 2 * 3 <= moves.num_proposed <= 3 * 2 * 4


def test_uniform_priors_cost_nothing(monkeypatch):
    def refuse(self, value):
        raise AssertionError("the log-permanent of a uniform prior is not needed")

    monkeypatch.setattr(pgs.UniformPermutation, "_log_prob", refuse)

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        P = pyro.sample("P", pgs.UniformPermutation(3, MASK))
        pyro.sample("y", dist.Normal(P @ torch.arange(3.0) + mu[..., None], 1.0).to_event(1), obs=DATA)

    mcmc = MCMC(pgs.HMCGibbs(NUTS(model)), 5, 5, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["P"].shape == (5, 3, 3)


def test_the_inner_kernel_is_left_as_it_was():
    inner = NUTS(tiny)
    for _ in range(2):
        mcmc = MCMC(pgs.HMCGibbs(inner), 5, 5, disable_progbar=True)
        mcmc.run(DATA)
        assert inner.model is tiny
        mcmc.run(DATA)


def test_conditioned_and_observed_permutations_stay():
    def model(q):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        P = pyro.sample("P", pgs.UniformPermutation(3))
        Q = pyro.sample("Q", pgs.UniformPermutation(3), obs=q)
        pyro.sample("y", dist.Normal(P @ Q @ torch.arange(3.0) + mu[..., None], 1.0).to_event(1), obs=DATA)

    mcmc = MCMC(pgs.HMCGibbs(NUTS(model)), 5, 5, disable_progbar=True)
    mcmc.run(torch.eye(3))
    assert set(mcmc.get_samples()) == {"P", "mu"}
    given = pyro.poutine.condition(model, {"P": torch.eye(3)})
    mcmc = MCMC(pgs.HMCGibbs(NUTS(given)), 5, 5, disable_progbar=True)
    mcmc.run(None)
    assert set(mcmc.get_samples()) == {"Q", "mu"}


def permutations_only():
    pyro.sample("P", pgs.UniformPermutation(3))


def continuous_only():
    pyro.sample("mu", dist.Normal(0.0, 1.0))


def mixture():
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Categorical(torch.ones(2)))
    pyro.sample("P", pgs.UniformPermutation(3))


def two_sites():
    pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("P", pgs.UniformPermutation(3))
    pyro.sample("Q", pgs.UniformPermutation(3))


def impossible(sign=1.0):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    P = pyro.sample("P", pgs.UniformPermutation(3))
    pyro.factor("f", torch.where(P[..., 0, 0] == sign, -torch.inf, mu))


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: pgs.HMCGibbs(NUTS), TypeError, r"inner_kernel must be HMC\(model\) or NUTS\(model\), but is NUTS"),
        (lambda: pgs.HMCGibbs(tiny), TypeError, "inner_kernel must be .* but is function"),
        (lambda: pgs.HMCGibbs(pgs.SwapMetropolis()), TypeError, "inner_kernel must be .* but is SwapMetropolis"),
        (
            lambda: pgs.HMCGibbs(HMC(potential_fn=lambda z: z["x"])),
            ValueError,
            r"inner_kernel must have a model, not a potential_fn; write HMCGibbs\(HMC\(model\)\)",
        ),
        (
            lambda: pgs.HMCGibbs(NUTS(tiny, jit_compile=True)),
            NotImplementedError,
            r"would freeze the permutations .* write HMCGibbs\(NUTS\(model\)\)",
        ),
        (
            lambda: pgs.HMCGibbs(NUTS(tiny), pgs.SwapMetropolis),
            TypeError,
            r"moves must be kernels over permutations, such as SwapMetropolis\(\), but one is SwapMetropolis",
        ),
        (lambda: pgs.HMCGibbs(NUTS(tiny), NUTS(tiny)), TypeError, "moves must be .* but one is NUTS"),
        (lambda: pgs.HMCGibbs(NUTS(tiny), []), ValueError, "kernels must hold at least one kernel"),
        (
            lambda: pgs.HMCGibbs(NUTS(tiny), pgs.SwapMetropolis(tiny)),
            ValueError,
            r"SwapMetropolis has a model of its own here; write SwapMetropolis\(\)",
        ),
        (lambda: pgs.HMCGibbs(NUTS(tiny), num_moves=0), ValueError, "num_moves must be an integer of at least 1, but is 0"),
    ],
)
def test_bad_construction(build, error, match):
    with pytest.raises(error, match=match):
        build()


@pytest.mark.parametrize(
    ("model", "moves", "start", "match"),
    [
        (
            permutations_only,
            None,
            None,
            r"permutations only, .* nothing for NUTS to do; write MCMC\(SwapMetropolis\(model\)",
        ),
        (continuous_only, None, None, "no latent permutation site among its latent sites 'mu'"),
        (pgs.relax(two_sites), None, None, r"Site 'P' is relaxed .*NUTS\(model\)"),
        (mixture, None, None, "but 'z' are discrete; sum them out"),
        (
            two_sites,
            pgs.SwapMetropolis(sites=["P"]),
            None,
            r"no kernel moves 'Q', .* leave out sites=, .*pyro.poutine.condition\(model, \{'Q': ...\}\)",
        ),
        (two_sites, pgs.SwapMetropolis(sites=["R"]), None, "sites has 'R', but the latent permutation sites are 'P', 'Q'"),
        (two_sites, None, {"R": torch.eye(3)}, "initial_params must be of the latent sites 'P', 'Q', 'mu', .* but has 'R'"),
        (two_sites, None, {"P": torch.ones(3, 3)}, "site 'P': "),
        (two_sites, None, {"P": torch.eye(4)}, "the value of site 'P' must have shape .* but has"),
        (
            impossible,
            None,
            {"P": torch.eye(3), "mu": torch.tensor(0.0)},
            "found no start of positive density at the permutations of initial_params; give one by MCMC.* matrices for 'P' "
            "and unconstrained values for 'mu'",
        ),
        (impossible, None, {"P": torch.eye(3)}, "found no start of positive density at the permutations"),
    ],
)
def test_bad_model_or_start(model, moves, start, match):
    mcmc = MCMC(pgs.HMCGibbs(NUTS(model), moves), 5, 5, initial_params=start, disable_progbar=True)
    with pytest.raises(ValueError, match=match):
        mcmc.run()


def test_finds_permutations_of_positive_density():
    """Whatever is drawn first: one permutation in three is ruled out."""
    for seed in range(5):
        pyro.set_rng_seed(seed)
        kernel = pgs.HMCGibbs(NUTS(impossible))
        kernel.initial_params = {"mu": torch.tensor(0.0)}
        kernel.setup(0)
        assert float(kernel.initial_params["P"][0, 0]) == 0


def test_a_masked_prior_is_refused():
    def model():
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.poutine.mask(mask=False):
            pyro.sample("P", pgs.UniformPermutation(3))

    with pytest.raises(ValueError, match="the priors of 'P' stand under poutine.mask"):
        MCMC(pgs.HMCGibbs(NUTS(model)), 5, 5, disable_progbar=True).run()

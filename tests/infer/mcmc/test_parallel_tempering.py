"""ParallelTempering: all replicas keep their laws, crossing between modes, log evidence, the ladder, and what is refused."""

import math
import pickle

import invariance
import pyro
import pytest
import torch
from enumeration import goodness_of_fit
from invariance import FAILURE_RATE, TARGETS, Target
from pyro import poutine
from pyro.infer import MCMC

import pyro_gs as pgs
from pyro_gs.infer.mcmc.chain import Chain
from pyro_gs.infer.mcmc.parallel_tempering import ParallelTempering
from pyro_gs.infer.mcmc.tempered_evidence import estimate_log_evidence

POWERS = (0.0, 0.2, 1.0)


def log_terms(target):
    """Log prior and log likelihood of every state (S,), by Pyro's own trace."""
    prior, likelihood = [], []
    for k in range(len(target.probability)):
        data = {name: site.to_value(target.states[name][k]) for name, site in target.joint.sites.items()}
        trace = poutine.trace(poutine.condition(target.model, data)).get_trace(*target.args)
        everything = trace.log_prob_sum()
        prior.append(sum(trace.nodes[name]["log_prob_sum"] for name in data))
        likelihood.append(everything - prior[-1])
    return torch.stack(prior), torch.stack(likelihood)


def start(kernel, target, chains, powers=POWERS):
    """Bind the kernel with every replica drawn from its own law; returns these laws, highest power first."""
    prior, likelihood = log_terms(target)
    laws = [torch.softmax(prior + (power * likelihood if power else 0.0), 0) for power in powers[::-1]]
    kernel.bind(Chain(target.joint, target.draw(chains)), 0)
    chosen = torch.cat([torch.multinomial(law, chains, replacement=True) for law in laws])
    index = {name: rows[chosen] for name, rows in target.states.items()}
    kernel.ladder.set(index, {})
    kernel._chain.set({name: rows[:chains] for name, rows in index.items()}, {})
    return laws


def states_of(target, index):
    cells = {tuple(row): k for k, row in enumerate(invariance._flat(target.states).tolist())}
    return torch.tensor([cells[tuple(row)] for row in invariance._flat(index).tolist()])


@pytest.mark.parametrize("name", TARGETS)
def test_every_replica_keeps_its_law(name):
    target = TARGETS[name]()
    kernel, chains = ParallelTempering(powers=POWERS), 1000
    laws = start(kernel, target, chains)
    for _ in range(2):
        kernel.step()
    found = states_of(target, kernel.ladder.index).reshape(len(POWERS), chains)
    assert torch.equal(found[0], states_of(target, kernel._chain.index))
    for law, state in zip(laws, found, strict=True):
        assert goodness_of_fit(torch.bincount(state, minlength=len(law)), law) > FAILURE_RATE
    assert bool((kernel.swap_rates > 0.01).all())


def test_found_from_a_wrong_start():
    invariance.check_converges(ParallelTempering(num_temperatures=3), invariance.points(), replicas=1000, steps=15)


def test_a_trade_of_the_wrong_ratio_is_found_out():
    class Wrong(ParallelTempering):
        def _trade(self):
            right, self.powers = self.powers, 0.3 * self.powers
            super()._trade()
            self.powers = right

    target = invariance.points()
    kernel = Wrong(powers=POWERS)
    start(kernel, target, 2000)
    for _ in range(3):  # the last lets the first pair trade
        kernel.step()
    assert target.p_value(kernel._chain.index) < FAILURE_RATE


def test_where_the_likelihood_is_zero():
    """The replica at power zero visits those permutations too; stepping stone counts them."""

    def model():
        P = pyro.sample("P", pgs.UniformPermutation(4))
        fixed = P.diagonal(dim1=-2, dim2=-1).sum(-1)
        pyro.factor("likelihood", torch.where(fixed > 0, 1.5 * fixed, -torch.inf))

    target = Target(model)  # its states are those of positive density, 15 of 24
    torch.manual_seed(1)
    kernel = ParallelTempering(powers=POWERS)
    kernel.bind(Chain(target.joint, target.draw(1000)), 0)
    for _ in range(20):
        kernel.step()
    assert target.p_value(kernel._chain.index) > FAILURE_RATE
    hot = kernel.ladder.index["P"][-1000:]
    code = (hot[:, 0] * 4 ** torch.arange(4)).sum(-1)
    counts = code.unique(return_counts=True)[1]
    assert goodness_of_fit(counts, torch.full((24,), 1 / 24)) > FAILURE_RATE
    kernel._history = kernel._history[4:]
    found = kernel.log_evidence
    exact = math.log(sum(w * math.exp(1.5 * k) for k, w in ((1, 8), (2, 6), (4, 1))) / 24)
    assert abs(found.stepping_stone - exact) < 6 * found.stepping_stone_error < 0.2
    assert found.thermodynamic == -math.inf


def two_modes(n=6, depth=5.0):
    """Two permutations that differ by a cycle of all rows, with the weights 1 and 2, and a barrier between them."""
    calls = []
    eye = torch.eye(n)

    def model():
        calls.append(1)
        P = pyro.sample("P", pgs.UniformPermutation(n))
        far = torch.stack([n - (P * centre).sum((-2, -1)) for centre in (eye, eye.roll(1, 1))])
        weight = torch.tensor([1.0, 2.0]).log()
        pyro.factor("likelihood", torch.logsumexp(weight.reshape(2, *[1] * (far.dim() - 1)) - depth * far, 0))

    return model, calls


@pytest.mark.parametrize("tempered", [True, False])
def test_two_modes(tempered):
    model, calls = two_modes()
    kernel = ParallelTempering(model, num_temperatures=6) if tempered else pgs.SwapMetropolis(model, num_steps=36)
    mcmc = MCMC(kernel, num_samples=400, warmup_steps=100, initial_params={"P": torch.eye(6)}, disable_progbar=True)
    mcmc.run()  # both make 36 proposals a step
    second = (mcmc.get_samples()["P"] * torch.eye(6).roll(1, 1)).sum((-2, -1)) >= 4
    share = float(second.double().mean())
    if tempered:
        assert abs(share - 2 / 3) < 0.2  # 0.07 is a standard error at an autocorrelation time of 10 steps
    else:
        assert share == 0
    assert len(calls) < 5000


@pytest.mark.parametrize("name", ["points", "masked", "plate", "two sites"])
def test_log_evidence(name):
    target = TARGETS[name]()
    prior, likelihood = log_terms(target)
    exact = float(torch.logsumexp(prior + likelihood, 0))
    kernel = ParallelTempering(num_temperatures=8)
    kernel.bind(Chain(target.joint, target.draw(60)), 12)
    for _ in range(12 + 64):
        kernel.step()
    found = kernel.log_evidence
    limit = 10.3  # eight batches: |t| of 7 degrees of freedom is above it in 2e-5 of the cases
    assert abs(found.stepping_stone - exact) < limit * found.stepping_stone_error < 0.4
    # what the corrected trapezoid rule gives with exact means and variances
    powers = kernel.powers.flip(0)
    weights = torch.softmax(prior + powers[:, None] * likelihood, 1)
    mean = (weights * likelihood).sum(1)
    variance = (weights * (likelihood - mean[:, None]) ** 2).sum(1)
    gap = powers.diff()
    integral = float((gap * (mean[1:] + mean[:-1]) / 2 - gap**2 / 12 * variance.diff()).sum())
    assert abs(found.thermodynamic - integral) < limit * found.thermodynamic_error < 0.4
    assert abs(integral - exact) < 0.03


def test_log_evidence_of_independent_draws():
    """Normal log likelihoods, whose mean is linear in the power: both estimates in closed form."""
    powers = torch.linspace(0, 1, 6, dtype=torch.float64)
    draws = -3 + 2 * powers[:, None] + math.sqrt(2) * torch.randn(40000, 6, 1, dtype=torch.float64)
    found = estimate_log_evidence(powers, draws)
    assert abs(found.thermodynamic + 2) < 4.3 * found.thermodynamic_error < 0.03
    assert abs(found.stepping_stone + 2) < 4.3 * found.stepping_stone_error < 0.03


def test_standard_errors_are_the_scatter_of_runs():
    powers = torch.linspace(0, 1, 4, dtype=torch.float64)
    runs = []
    for _ in range(200):
        noise = torch.randn(1024, 4, 1, dtype=torch.float64)
        noise[1:] = (noise[1:] + noise[:-1]) / math.sqrt(2)
        runs.append(estimate_log_evidence(powers, -1 + 0.5 * noise))
    values = torch.tensor(runs)
    for place in (0, 2):
        ratio = float(values[:, place].std() / values[:, place + 1].mean())
        assert 0.75 < ratio < 1.3  # five standard errors of a standard deviation from 200 runs


def hooked(prior):
    x = torch.linspace(-1, 1, 16).reshape(4, 4).sin() * 2
    asked = []

    def model():
        P = pyro.sample("P", prior)
        pyro.factor("likelihood", (P * x).sum((-2, -1)))

    def swap_delta(swaps):
        asked.append(len(swaps.items))
        a, b = swaps.rows.unbind(-1)
        index = swaps.index[swaps.items]
        i, j = index.gather(-1, swaps.rows).unbind(-1)
        if isinstance(prior, pgs.GibbsPermutation):
            weights = x + prior.logits
            return weights[a, j] + weights[b, i] - weights[a, i] - weights[b, j]
        return x[a, j] + x[b, i] - x[a, i] - x[b, j]

    model.swap_delta = swap_delta
    return Target(model), asked


@pytest.mark.parametrize("uniform", [True, False])
def test_a_hook_is_used_only_where_the_prior_is_uniform(uniform):
    prior = pgs.UniformPermutation(4) if uniform else pgs.GibbsPermutation(torch.linspace(0, 3, 16).reshape(4, 4).cos())
    target, asked = hooked(prior)
    kernel = ParallelTempering(powers=POWERS, kernel=pgs.SwapMetropolis(num_steps=2))
    laws = start(kernel, target, 10)
    assert len(asked) == 1  # compared with the model
    found = []
    for _ in range(300):
        kernel.step()
        found.append(states_of(target, kernel.ladder.index).reshape(3, 10))
    assert (len(asked) > 1) == uniform
    last = torch.cat(found[5::6], 1)  # ten chains, thinned by six steps
    for law, state in zip(laws, last, strict=True):
        assert goodness_of_fit(torch.bincount(state, minlength=24), law) > FAILURE_RATE
    # what the hook has added up is the likelihood of the states
    before = kernel.ladder.total()
    kernel.ladder.set(kernel.ladder.index, {})
    torch.testing.assert_close(before, kernel.ladder.total())


def test_a_hook_gives_way_where_the_likelihood_is_zero():
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("likelihood", torch.where(P[..., 0, 0] == 1, -torch.inf, P[..., 1, 1]))

    def swap_delta(swaps):
        index = swaps.index[swaps.items]
        new = index.scatter(-1, swaps.rows, index.gather(-1, swaps.rows.flip(-1)))

        def score(p):
            return torch.where(p[:, 0] == 0, -torch.inf, (p[:, 1] == 1).double())

        return score(new) - score(index)

    model.swap_delta = swap_delta
    target = Target(model)
    kernel = ParallelTempering(powers=POWERS)
    kernel.bind(Chain(target.joint, target.draw(10)), 0)
    states = []
    for _ in range(240):
        kernel.step()
        states.append(kernel._chain.index["P"])
    assert target.p_value({"P": torch.cat(states[5::6])}) > FAILURE_RATE


def test_the_ladder_is_adapted_in_the_warm_up_only():
    target = invariance.points(scale=0.3)
    kernel = ParallelTempering(num_temperatures=5)
    kernel.bind(Chain(target.joint, target.draw(50)), 100)
    first = kernel.powers.clone()
    for _ in range(100):
        kernel.step()
    fixed = kernel.powers.clone()
    assert fixed[0] == 1
    assert fixed[-1] == 0
    assert bool((fixed.diff() < 0).all())
    assert not torch.equal(first, fixed)
    for _ in range(60):
        kernel.step()
    assert torch.equal(kernel.powers, fixed)
    torch.testing.assert_close(kernel.ladder.power, fixed.repeat_interleave(50))
    rates = kernel.swap_rates
    assert float(rates.max() - rates.min()) < 0.15


def test_adapt_false_keeps_the_powers():
    target = invariance.points()
    kernel = ParallelTempering(target.model, powers=[0, 0.3, 1], adapt=False)
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=80, disable_progbar=True)
    mcmc.run(*target.args)
    found = mcmc.diagnostics()
    assert found["powers"]["chain 0"] == [1, 0.3, 0]
    assert len(found["swap rates"]["chain 0"]) == 2
    assert found["log evidence"]["chain 0"] == kernel.log_evidence._asdict()


def test_a_state_moved_by_another_kernel_is_taken_over():
    target = invariance.points()
    kernel = ParallelTempering(powers=POWERS)
    kernel.bind(Chain(target.joint, target.draw(1)), 0)
    kernel.step()
    moved = {"P": torch.tensor([[[3, 2, 1, 0]]])}
    kernel._chain.set(moved, {})
    seen = []
    kernel._kernel.step = lambda: seen.append(kernel.ladder.index["P"][0].clone())
    kernel.step()
    assert torch.equal(seen[0], moved["P"][0])


def test_in_processes(monkeypatch):
    """Pickled before set-up; the log evidence comes back as a diagnostic."""
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 3)
    target = invariance.points()
    kernel = pickle.loads(pickle.dumps(ParallelTempering(num_temperatures=3)))
    kernel.model = target.model
    mcmc = MCMC(kernel, num_samples=30, warmup_steps=20, num_chains=2, mp_context="fork", disable_progbar=True)
    mcmc.run(*target.args)
    found = mcmc.diagnostics()["log evidence"]
    assert set(found) == {"chain 0", "chain 1"}
    assert all(math.isfinite(v) for one in found.values() for v in one.values())


def test_progress_bar():
    target = invariance.points()
    kernel = ParallelTempering(powers=POWERS)
    kernel.bind(Chain(target.joint, target.draw(1)), 0)
    kernel.step()
    assert list(kernel.logging()) == ["acc. prob", "swap rate"]


def test_bad_input():
    with pytest.raises(ValueError, match=r"powers must ascend from 0 or more to 1, .*\[0.0, 0.5\]"):
        ParallelTempering(powers=[0, 0.5])
    with pytest.raises(ValueError, match=r"powers must ascend .*\[0.5, 0.2, 1.0\]"):
        ParallelTempering(powers=[0.5, 0.2, 1])
    with pytest.raises(ValueError, match="num_temperatures"):
        ParallelTempering(num_temperatures=1)
    with pytest.raises(TypeError, match="kernel over permutations, but is str"):
        ParallelTempering(kernel="swaps")
    with pytest.raises(ValueError, match=r"write ParallelTempering\(model, kernel=SwapMetropolis\(\)\)"):
        ParallelTempering(kernel=pgs.SwapMetropolis(lambda: None))
    with pytest.raises(ValueError, match="log_evidence needs at least 16 samples after the warm-up, but has 0"):
        ParallelTempering().log_evidence  # noqa: B018


def test_without_power_zero_there_is_no_log_evidence():
    target = invariance.points()
    kernel = ParallelTempering(powers=[0.2, 1])
    kernel.bind(Chain(target.joint, target.draw(5)), 0)
    for _ in range(16):
        kernel.step()
    with pytest.raises(ValueError, match=r"needs the power 0, but powers begin at 0.2"):
        kernel.log_evidence  # noqa: B018
    assert "log evidence" not in kernel.diagnostics()


def test_other_latent_sites_are_refused():
    def model():
        scale = pyro.sample("scale", pyro.distributions.LogNormal(0.0, 1.0))
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("likelihood", scale * P[..., 0, 0])

    with pytest.raises(ValueError, match=r"'scale' too; they would need replicas of their own. Write HMCGibbs"):
        MCMC(ParallelTempering(model), num_samples=2, warmup_steps=0, disable_progbar=True).run()

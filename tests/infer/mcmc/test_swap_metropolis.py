"""SwapMetropolis: invariance, convergence, the hook, adaptation, and what is refused."""

import itertools
import math

import invariance
import matching_model
import pyro
import pyro.distributions as dist
import pytest
import torch
from invariance import TARGETS
from pyro.infer import MCMC

import pyro_gs as pgs
from pyro_gs.infer.mcmc import swap_metropolis
from pyro_gs.infer.mcmc.chain import Chain
from pyro_gs.infer.mcmc.cycles import propose_cycles
from pyro_gs.infer.mcmc.swaps import possible_pairs

WAYS = {
    "table": {},
    "drawn": {},
    "adapted, table": {"adapt": True, "num_cycles": 0},
    "adapted, drawn": {"adapt": True, "num_cycles": 0},
    "cycles": {"num_cycles": 2, "num_steps": 1},
}


@pytest.fixture
def way(request, monkeypatch):
    """Options of the kernel; small targets are scored by tables unless told otherwise."""
    if "drawn" in request.param:
        monkeypatch.setattr(swap_metropolis, "_TABLE", 0)
        monkeypatch.setattr(swap_metropolis.UniformSwaps, "longest", lambda self, independent: 10**9)
    return WAYS[request.param]


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("target", TARGETS)
def test_leaves_posteriors_invariant(target, way):
    pyro.set_rng_seed(0)
    kernel = pgs.SwapMetropolis(**way)
    warmup = 70 if way.get("adapt") else 0
    invariance.check_invariant(kernel, TARGETS[target](), replicas=2000, warmup=warmup)


@pytest.mark.parametrize("target", TARGETS)
def test_converges_from_the_worst_state(target):
    pyro.set_rng_seed(1)
    invariance.check_converges(pgs.SwapMetropolis(), TARGETS[target](), replicas=1000, steps=25)


def test_a_flat_target_has_no_period():
    """Every exchange is accepted and changes the parity of the permutation."""
    pyro.set_rng_seed(9)
    for name in ("points", "plate"):
        invariance.check_converges(pgs.SwapMetropolis(), TARGETS[name](scale=1e6), replicas=1000, steps=20)


def test_under_mcmc():
    pyro.set_rng_seed(2)
    target = TARGETS["plate"]()
    invariance.check_mcmc(pgs.SwapMetropolis(target.model, adapt=True), target)


def hooked_points(n=4, scale=1.0):
    """Points with the hook as an attribute of the model."""
    target = TARGETS["points"](n, scale)

    def swap_delta(swaps, x, y):
        calls.append(len(swaps.rows))
        columns = swaps.index[swaps.items[:, None], swaps.rows]
        score = -torch.cdist(y, x).square() / (2 * scale**2)
        return (score[swaps.rows, columns.flip(-1)] - score[swaps.rows, columns]).sum(-1)

    calls = []
    target.model.swap_delta = swap_delta
    return target, calls


@pytest.mark.parametrize("way", ["table", "drawn", "adapted, table"], indirect=True)
def test_the_hook_scores_exchanges(way):
    pyro.set_rng_seed(3)
    target, calls = hooked_points()
    kernel = pgs.SwapMetropolis(target.model, **way)
    invariance.check_mcmc(kernel, target, num_samples=1000, thin=4)
    assert len(calls) > 100


def test_with_the_hook_the_model_is_not_run_for_exchanges():
    target, _ = hooked_points()
    runs = []

    def model(*args):
        runs.append(1)
        target.model(*args)

    kernel = pgs.SwapMetropolis(model, swap_delta=lambda swaps: target.model.swap_delta(swaps, *target.args))
    kernel.setup(0, *target.args)
    before = len(runs)
    params = kernel.initial_params
    for _ in range(20):
        params = kernel.sample(params)
    assert len(runs) == before
    assert kernel.acceptance_rate > 0
    # what the hook has added up is the score of the state
    expected = target.joint.evaluate(params, {}, None).total.sum()
    prior = math.lgamma(5)
    assert float(kernel._chain.total().sum()) == pytest.approx(float(expected) + prior)


def test_a_hook_with_independent_items():
    pyro.set_rng_seed(4)
    target = TARGETS["plate"]()
    x, y = target.args

    def hook(swaps):
        columns = swaps.index[swaps.items[:, None], swaps.rows]
        score = -torch.cdist(y, x).square() / (2 * 1.2**2)
        items = swaps.items[:, None]
        return (score[items, swaps.rows, columns.flip(-1)] - score[items, swaps.rows, columns]).sum(-1)

    invariance.check_mcmc(pgs.SwapMetropolis(target.model, swap_delta=hook), target, num_samples=800, thin=4)


def test_a_wrong_hook_is_found_out():
    target, _ = hooked_points()
    kernel = pgs.SwapMetropolis(target.model, swap_delta=lambda swaps: torch.ones(len(swaps.rows)))
    with pytest.raises(ValueError, match=r"swap_delta gives 1 for the exchange of rows \[0, 1\] in item 0 of site 'P', but"):
        kernel.setup(0, *target.args)
    kernel = pgs.SwapMetropolis(target.model, swap_delta=lambda swaps: torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"swap_delta must return a tensor of shape \(6,\), but returned \(2, 2\)"):
        kernel.setup(0, *target.args)
    kernel = pgs.SwapMetropolis(target.model, swap_delta=lambda swaps: torch.full((len(swaps.rows),), torch.nan))
    with pytest.raises(ValueError, match="swap_delta returned NaN"):
        kernel.setup(0, *target.args)


def test_adaptation_stops_with_the_warm_up():
    pyro.set_rng_seed(5)
    target = TARGETS["points"](5, 0.5)
    kernel = pgs.SwapMetropolis(target.model, adapt=True)
    kernel.setup(100, *target.args)
    params = kernel.initial_params
    for _ in range(100):
        params = kernel.sample(params)
    proposal = kernel._proposals["P"]
    rows, columns = proposal._rows.clone(), proposal._columns.clone()
    assert (columns[0].argmax(-1) == target.marginals()["P"].argmax(-1)).double().mean() > 0.5
    for _ in range(100):
        params = kernel.sample(params)
    assert torch.equal(proposal._rows, rows)
    assert torch.equal(proposal._columns, columns)


def test_adapted_proposals_accept_more_often():
    pyro.set_rng_seed(6)
    target = TARGETS["points"](6, 0.4)
    rates = []
    for adapt in (False, True):
        mcmc = MCMC(pgs.SwapMetropolis(target.model, adapt=adapt), 300, 200, disable_progbar=True)
        mcmc.run(*target.args)
        rates.append(mcmc.diagnostics()["acceptance rate"]["chain 0"])
    assert rates[1] > 1.5 * rates[0]


# A mask of two permutations, the identity and the cycle of all rows: no exchange is ever allowed.
def ring(n=5):
    def model():
        eye = torch.eye(n, dtype=torch.bool)
        P = pyro.sample("P", pgs.UniformPermutation(n, eye | eye.roll(1, 1)))
        pyro.factor("f", P[..., 0, 0])

    return model


def test_cycles_connect_what_exchanges_cannot():
    pyro.set_rng_seed(7)
    target = invariance.Target(ring())
    invariance.check_converges(pgs.SwapMetropolis(), target, replicas=1000, steps=10)
    chain = Chain(target.joint, target.worst(100))
    kernel = pgs.SwapMetropolis(num_cycles=0)
    kernel.bind(chain, 0)
    for _ in range(20):
        kernel.step()
    assert torch.equal(chain.index["P"], target.worst(100)["P"])


def masks():
    generator = torch.Generator().manual_seed(0)
    yield torch.ones(4, 4, dtype=torch.bool)
    for _ in range(6):
        yield torch.rand(5, 5, generator=generator).lt(0.5) | torch.eye(5, dtype=torch.bool)


def test_cycles_reach_every_permutation_and_know_their_probability():
    """Over draws, P(move) x ratio is the probability of the way back; every pair that differs by one cycle is reached."""
    for mask in masks():
        n = len(mask)
        states = [p for p in itertools.permutations(range(n)) if all(mask[i, j] for i, j in enumerate(p))]
        draws = 3000
        counts, ratios = {}, {}
        for state in states[:4]:
            torch.manual_seed(0)
            now = torch.tensor(state).expand(draws, n)
            new, ratio = propose_cycles(now, mask[None], torch.zeros(draws, dtype=torch.long))
            for moved, value in zip(new.tolist(), ratio.tolist(), strict=True):
                if value == -math.inf:
                    continue
                assert all(mask[i, j] for i, j in enumerate(moved))
                counts[state, tuple(moved)] = counts.get((state, tuple(moved)), 0) + 1
                ratios[state, tuple(moved)] = value
        for (a, b), count in counts.items():
            if (b, a) not in counts:
                continue
            # both ways are binomial: five standard errors of the log ratio
            error = math.sqrt(1 / count + 1 / counts[b, a])
            assert math.log(counts[b, a] / count) == pytest.approx(ratios[a, b], abs=5 * error)
        first = torch.tensor(states[0])
        for other in states:
            moved = (first != torch.tensor(other)).nonzero()[:, 0].tolist()
            at = {j: i for i, j in enumerate(states[0])}
            if moved and _is_one_cycle(moved, {i: at[other[i]] for i in moved}):
                assert (states[0], other) in counts


def _is_one_cycle(rows, following):
    seen, row = set(), rows[0]
    while row not in seen:
        seen.add(row)
        row = following[row]
    return len(seen) == len(rows)


def test_possible_pairs():
    allowed = torch.tensor([[[1, 1, 0], [1, 1, 0], [0, 0, 1]], [[1, 1, 1], [1, 1, 1], [1, 1, 1]]]) == 1
    pairs, counts = possible_pairs(allowed, 2, 3, allowed.device)
    assert counts.tolist() == [1, 3]
    assert pairs[0, 0].tolist() == [0, 1]
    assert pairs[1].tolist() == [[0, 1], [0, 2], [1, 2]]


def test_a_support_of_one_permutation_stays():
    def model():
        pyro.sample("P", pgs.UniformPermutation(3, torch.eye(3) == 1))

    mcmc = MCMC(pgs.SwapMetropolis(model), 10, 0, disable_progbar=True)
    mcmc.run()
    assert torch.equal(mcmc.get_samples()["P"], torch.eye(3).expand(10, 3, 3))
    assert mcmc.diagnostics()["constant entries"]["chain 0"] == {"P": 9}
    with pytest.raises(RuntimeError, match=r"SwapMetropolis has no chain: after MCMC.run .* mcmc.diagnostics\(\)"):
        mcmc.kernel.diagnostics()


def test_potential_functions():
    pyro.set_rng_seed(8)
    target = TARGETS["masked"]()
    allowed = target.joint.sites["P"].allowed[0]

    def potential(params):
        return -target.joint.evaluate(params, {}, len(params["P"]) if params["P"].dim() > 2 else None).total.sum(0)

    kernel = pgs.SwapMetropolis(potential_fn=potential, allowed=allowed)
    mcmc = MCMC(kernel, 1500, 50, initial_params={"P": torch.eye(5)}, disable_progbar=True)
    mcmc.run()
    index = {"P": target.joint.sites["P"].to_items(mcmc.get_samples()["P"])[::5]}
    assert target.p_value(index) > invariance.FAILURE_RATE


def test_other_starts_and_states_from_outside():
    target = TARGETS["points"]()
    kernel = pgs.SwapMetropolis(target.model)
    kernel.initial_params = {"P": torch.eye(4).flip(0)}
    kernel.setup(0, *target.args)
    assert torch.equal(kernel.initial_params["P"], torch.eye(4).flip(0))
    params = kernel.sample({"P": torch.eye(4)})  # not what it returned
    assert params["P"].sum() == 4
    with pytest.raises(ValueError, match="site 'P': P is not a permutation matrix"):
        kernel.sample({"P": torch.ones(4, 4) / 4})


def with_scale(x, y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P.to(x) @ x, scale[..., None, None]).to_event(2), obs=y)


def nan_potential(params):
    return torch.tensor(torch.nan)


DATA = (torch.zeros(4, 2), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("kernel", "args", "error", "message"),
    [
        (lambda: pgs.SwapMetropolis(with_scale), DATA, ValueError, r"'scale' too; write HMCGibbs\(NUTS\(model\), moves="),
        (lambda: pgs.SwapMetropolis(), (), ValueError, r"has no model; write MCMC\(SwapMetropolis\(model\)"),
        (lambda: pgs.SwapMetropolis(matching_model.model, nan_potential), (), ValueError, "one of model and potential_fn"),
        (lambda: pgs.SwapMetropolis(3), (), TypeError, "model must be callable, but is int"),
        (lambda: pgs.SwapMetropolis(jit_compile=True), (), NotImplementedError, r"write SwapMetropolis\(model\)"),
        (lambda: pgs.SwapMetropolis(num_steps=0), (), ValueError, "num_steps"),
        (lambda: pgs.SwapMetropolis(num_cycles=-1), (), ValueError, "num_cycles"),
        (lambda: pgs.SwapMetropolis(sites="P"), (), TypeError, "sites must be a list of site names, but is 'P'"),
        (lambda: pgs.SwapMetropolis(swap_delta=1), (), TypeError, "swap_delta must be callable, but is int"),
        (
            lambda: pgs.SwapMetropolis(with_scale, allowed=torch.eye(3) == 1),
            (),
            ValueError,
            "allowed goes with potential_fn",
        ),
        (
            lambda: pgs.SwapMetropolis(matching_model.model, sites=["Q"]),
            (*DATA, 0.5),
            ValueError,
            r"sites has 'Q', but the latent permutation sites are 'P'; write SwapMetropolis\(model, sites=\['P'\]\)",
        ),
        (lambda: pgs.SwapMetropolis(potential_fn=nan_potential), (), ValueError, r"initial_params=\{'P': torch.eye\(n\)\}"),
    ],
)
def test_bad_input(kernel, args, error, message):
    with pytest.raises(error, match=message):
        MCMC(kernel(), 5, 0, disable_progbar=True).run(*args)


def test_a_potential_that_is_nan():
    kernel = pgs.SwapMetropolis(potential_fn=nan_potential)
    with pytest.raises(ValueError, match="potential_fn returned nan; it must return minus the log density"):
        MCMC(kernel, 5, 0, initial_params={"P": torch.eye(3)}, disable_progbar=True).run()


def test_starts_without_density():
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("f", torch.where(P[..., 0, 0] == 1, 0.0, -torch.inf))

    with pyro.validation_enabled(False):
        kernel = pgs.SwapMetropolis(model)
        kernel.initial_params = {"P": torch.eye(3).flip(0)}
        with pytest.raises(ValueError, match="initial_params has density zero"):
            kernel.setup(0)
        kernel.initial_params = {"Q": torch.eye(3)}
        with pytest.raises(ValueError, match="initial_params has 'Q', but the permutation sites are 'P'"):
            kernel.setup(0)
        kernel.initial_params = None
        kernel.setup(0)
        assert kernel.initial_params["P"][0, 0] == 1
        params = kernel.initial_params
        for _ in range(20):
            params = kernel.sample(params)
            assert params["P"][0, 0] == 1


def test_a_hook_may_say_that_an_exchange_has_no_density():
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("f", torch.where(P[..., 0, 0] == 1, 0.0, -torch.inf))

    def hook(swaps):
        return torch.where((swaps.rows == 0).any(-1), -torch.inf, 0.0)

    with pyro.validation_enabled(False):
        mcmc = MCMC(pgs.SwapMetropolis(model, swap_delta=hook), 20, 5, disable_progbar=True)
        mcmc.run()
    assert (mcmc.get_samples()["P"][:, 0, 0] == 1).all()

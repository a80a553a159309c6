"""What kernels find out about models: items that depend inside their plate, and scores that depend on other candidates."""

import invariance
import matching_model
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC

import pyro_gs as pgs
from pyro_gs.infer.log_joint import LogJoint
from pyro_gs.infer.mcmc.chain import Chain
from pyro_gs.infer.mcmc.verification import items_coupled


def ring(items=3, n=3, scale=1.0, seed=0):
    """A plate in which the likelihood of an item is of its own permutation and the next one's."""
    x, y = zip(*(matching_model.noisy_points(n, 0.5, seed + k) for k in range(items)), strict=True)

    def model(x, y):
        with pyro.plate("items", items):
            P = pyro.sample("P", pgs.UniformPermutation(n))
            pyro.sample("y", dist.Normal(P @ x + P.roll(-1, -3) @ x, scale).to_event(2), obs=y)

    return invariance.Target(model, torch.stack(x), torch.stack(y))


KERNELS = {
    "swaps": pgs.SwapMetropolis,
    "locally balanced": pgs.LocallyBalanced,
    "block gibbs": lambda: pgs.BlockGibbs(block_size=3),
    "tempering": lambda: pgs.ParallelTempering(num_temperatures=3),
}


@pytest.mark.parametrize("name", KERNELS)
def test_items_that_depend_inside_their_plate_are_scored_jointly(name):
    pyro.set_rng_seed(0)
    kernel = KERNELS[name]()
    target = ring()
    chain = Chain(target.joint, target.worst(400))
    kernel.bind(chain, 0)
    assert not chain.focus("P").independent
    steps(kernel, 25)
    assert target.p_value(chain.index) > invariance.FAILURE_RATE


def test_a_hook_for_items_that_depend_inside_their_plate():
    pyro.set_rng_seed(1)
    target = ring()
    kernel = pgs.SwapMetropolis(target.model, swap_delta=invariance.swap_hook(target))
    kernel.setup(0, *target.args)
    assert not kernel._chain.focus("P").independent
    kernel.cleanup()
    invariance.check_mcmc(kernel, target, num_samples=200, thin=6)


def coupled(model, index, *args):
    return items_coupled(Chain(LogJoint(model, args), {"P": index[None]}), "P")


@pytest.mark.parametrize("source", range(5))
@pytest.mark.parametrize("masked", [False, True])
def test_every_item_that_others_depend_on_is_found(source, masked):
    allowed = torch.ones(4, 4).tril(1).bool() if masked else None

    def model(sink):
        with pyro.plate("items", 5):
            P = pyro.sample("P", pgs.UniformPermutation(4, allowed))
            own = P[..., 0, 0]
            reads = torch.arange(5) == sink
            pyro.factor("f", torch.where(reads, P[..., source, 1, :].argmax(-1)[..., None] + own, own))

    index = torch.arange(4).expand(5, 4)
    for sink in range(5):
        assert coupled(model, index, sink) == (sink != source)


def test_independent_items_stay_independent():
    for name in ("plate", "dependent"):
        target = invariance.TARGETS[name]()
        assert items_coupled(Chain(target.joint, target.draw(3)), "P") == (name == "dependent")


def test_a_term_that_shows_where_two_items_change_at_once():
    """No exchange of one item at the start changes it, so a hook that is right for all of them would move items apart."""

    def model():
        with pyro.plate("items", 2):
            P = pyro.sample("P", pgs.UniformPermutation(2))
        pyro.factor("f", 3.0 * (P[..., 0, 0, 1] * P[..., 1, 0, 1])[..., None])

    target = invariance.Target(model)
    kernel = pgs.SwapMetropolis(swap_delta=invariance.swap_hook(target))
    chain = Chain(target.joint, {"P": torch.arange(2).expand(20, 2, 2)})
    kernel.bind(chain, 0)
    assert not chain.focus("P").independent


def steps(kernel, count):
    for _ in range(count):
        kernel.step()


def by_company(strength):
    """A term of a state in company, which no candidate of the trial sees: it is of all candidates together."""

    def model():
        P = pyro.sample("P", pgs.UniformPermutation(9))
        pyro.factor("own", P.diagonal(dim1=-2, dim2=-1).sum(-1))
        needle = (P[..., 0, 3] * P[..., 1, 7] * P[..., 2, 5]).amax()
        pyro.factor("company", strength * needle)

    return model


def test_scores_that_depend_on_other_candidates_are_found_out():
    pyro.set_rng_seed(3)
    kernel = pgs.SwapMetropolis(by_company(2.0))
    kernel.initial_params = {"P": torch.eye(9)[[3, 7, 2, 0, 4, 5, 6, 1, 8]]}
    kernel.setup(0)
    with pytest.raises(ValueError, match="in a run of the model on them alone, but .* by the scores that led there. Either"):
        steps(kernel, 2000)


def test_a_state_that_lost_its_density_is_an_error():
    bad = []

    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        Q = pyro.sample("Q", pgs.UniformPermutation(3))
        pyro.factor("f", P[..., 0, 0] + Q[..., 0, 0] + (-torch.inf if bad else 0.0))

    kernel = pgs.SwapMetropolis(model)
    with pyro.validation_enabled(False):
        kernel.setup(0)
        kernel.step()
        bad.append(True)
        with pytest.raises(
            ValueError, match="site 'P' has been moved to have density zero. Either the model does not broad"
        ):
            kernel.step()


def test_a_hook_that_is_wrong_where_the_set_up_did_not_look():
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(9))
        pyro.factor("f", P.diagonal(dim1=-2, dim2=-1).sum(-1))

    def wrong(swaps):
        columns = swaps.index[swaps.items[:, None], swaps.rows]
        here, there = (columns == swaps.rows).sum(-1), (columns.flip(-1) == swaps.rows).sum(-1)
        return there - here + 0.5 * (swaps.rows == torch.tensor([0, 2])).all(-1)

    pyro.set_rng_seed(4)
    kernel = pgs.SwapMetropolis(model, swap_delta=wrong)
    kernel.setup(0)
    with pytest.raises(ValueError, match="or swap_delta is wrong for some exchange"):
        steps(kernel, 3000)


def test_verification_costs_less_than_one_percent():
    runs = []

    def model():
        P = pyro.sample("P", pgs.UniformPermutation(12))
        runs.append(P.dim() > 2)
        pyro.factor("f", P.diagonal(dim1=-2, dim2=-1).sum(-1))

    pyro.set_rng_seed(5)
    kernel = pgs.SwapMetropolis(model)
    kernel.setup(0)
    runs.clear()
    steps(kernel, 200)
    assert 0 < runs.count(False) < 0.01 * len(runs)


@pytest.mark.parametrize("kernel", [pgs.SwapMetropolis, pgs.LocallyBalanced, lambda: pgs.BlockGibbs(block_size=3)])
def test_items_get_as_many_proposals_whether_they_depend_or_not(kernel):
    def model(strength):
        with pyro.plate("items", 8):
            P = pyro.sample("P", pgs.UniformPermutation(3, torch.ones(3, 3).tril(1).bool()))
        pyro.factor("f", strength * P[..., 0, 0].sum(-1, keepdim=True).square())

    made = []
    for strength in (0.0, 0.1):
        pyro.set_rng_seed(6)
        moves = kernel()
        moves.bind(Chain(LogJoint(model, (strength,)), {"P": torch.arange(3).expand(1, 8, 3)}), 0)
        steps(moves, 20)
        made.append(moves.num_proposed)
    # swaps and balanced ones add or leave out some at random: five standard deviations
    assert made[1] == pytest.approx(made[0], rel=0.2)


def test_diagnostics_say_where_constant_entries_are_left_out():
    pyro.set_rng_seed(7)
    target = invariance.TARGETS["masked"]()
    mcmc = MCMC(pgs.SwapMetropolis(target.model), 10, 0, disable_progbar=True)
    mcmc.run(*target.args)
    found = mcmc.diagnostics()
    assert found["P"]["r_hat"].isnan().any()
    assert "pyro_gs.convergence(mcmc)" in found["NaN"]["chain 0"]

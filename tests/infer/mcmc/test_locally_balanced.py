"""LocallyBalanced: invariance of enumerated posteriors for all balances and scores, tables, bad input."""

import pickle

import pyro
import pytest
import torch
from invariance import (
    TARGETS,
    check_converges,
    check_invariant,
    check_mcmc,
    dependent,
    event,
    points,
    quadratic,
    swap_hook,
)

import pyro_gs as pgs
from pyro_gs.infer.log_joint import LogJoint
from pyro_gs.infer.mcmc.chain import Chain
from pyro_gs.infer.mcmc.locally_balanced import LocallyBalanced

VARIANTS = [("sqrt", "exact"), ("barker", "exact"), ("sqrt", "gradient")]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("balance", "score"), VARIANTS)
def test_leaves_the_posterior_invariant(name, balance, score):
    check_invariant(LocallyBalanced(balance=balance, score=score, num_steps=2), TARGETS[name]())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("balance", "score"), VARIANTS)
def test_converges_from_a_wrong_start(name, balance, score):
    # Scored by gradients, a quadratic likelihood keeps replicas at the worst state for more than 100 steps.
    steps = 400 if (name, score) == ("quadratic", "gradient") else 30
    check_converges(LocallyBalanced(balance=balance, score=score), TARGETS[name](), steps=steps)


@pytest.mark.parametrize(("target", "score"), [(points, "auto"), (points, "gradient"), (dependent, "auto"), (event, "auto")])
def test_hook(target, score):
    target = target()
    check_mcmc(LocallyBalanced(target.model, score=score, swap_delta=swap_hook(target)), target, num_samples=100, thin=8)


def test_mcmc():
    target = points()
    check_mcmc(LocallyBalanced(target.model), target, num_samples=200, thin=8)


def test_potential_fn():
    target = points()
    x, y = target.args

    def potential(values):
        return 0.5 * (values["P"] @ x - y).square().sum((-1, -2))

    kernel = LocallyBalanced(potential_fn=potential, score="gradient")
    mcmc = pyro.infer.MCMC(
        kernel, num_samples=2000, warmup_steps=20, initial_params={"P": torch.eye(4)}, disable_progbar=True
    )
    mcmc.run()
    found = mcmc.get_samples()["P"].mean(0)
    assert torch.allclose(found, target.marginals()["P"], atol=0.08)  # about 4 standard errors at 300 effective draws


def test_gradient_of_a_prior():
    logits = torch.randn(5, 5)

    def model():
        pyro.sample("P", pgs.GibbsPermutation(logits))

    joint = LogJoint(model)
    chain = Chain(joint, {"P": torch.stack([torch.randperm(5) for _ in range(3)])[:, None]})
    assert torch.allclose(chain.gradient("P", chain.index["P"])[:, 0], logits.expand(3, 5, 5))


def test_gradient_against_finite_differences_and_power():
    target = quadratic()
    power = torch.tensor([1.0, 0.25])
    index = target.draw(2)
    chain = Chain(target.joint, index, power=power)
    x, y = target.args
    found = chain.gradient("P", index["P"])
    for replica in range(2):
        P = target.joint.sites["P"].to_value(index["P"][replica])
        for i, j in [(0, 1), (2, 3), (3, 3)]:
            step = torch.zeros_like(P)
            step[i, j] = 1e-5
            up, down = (torch.distributions.Normal(Q @ x @ Q.mT, 1.5).log_prob(y).sum() for Q in (P + step, P - step))
            assert float(found[replica, 0, i, j]) == pytest.approx(float(power[replica] * (up - down) / 2e-5), rel=1e-6)


def test_keeps_the_table_of_the_state_reached():
    target = points()
    chain = Chain(target.joint, target.draw(50))
    kernel = LocallyBalanced()
    kernel.bind(chain, 0)
    for _ in range(5):
        kernel.step()
    focus = chain.focus("P")
    kept = kernel._tables["P"]
    assert kept.is_of(focus)
    anew = kernel._tabulate(focus, None)
    assert torch.allclose(kept.log_weights, anew.log_weights)
    assert torch.allclose(focus.score, chain.score("P", chain.index["P"][None]).total.sum(0)[0][:, None])
    chain.set(target.draw(50), {})
    assert not kept.is_of(chain.focus("P"))
    chain.power = 0.5 * chain.power
    assert not kernel._tabulate(chain.focus("P"), None).is_of(focus)


def test_a_state_without_exchanges_stays():
    allowed = torch.eye(4, dtype=torch.bool)
    allowed |= allowed.roll(1, 1)

    def model():
        pyro.sample("P", pgs.UniformPermutation(4, allowed))

    chain = Chain(LogJoint(model), {"P": torch.arange(4).expand(10, 1, 4)})
    kernel = LocallyBalanced(num_cycles=0)
    kernel.bind(chain, 0)
    kernel.step()
    assert kernel.acceptance_rate == 0
    assert bool((chain.index["P"] == torch.arange(4)).all())


def test_exchanges_of_density_zero_are_not_taken():
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("fixed", torch.where(P[..., 0, 0] == 1, 0.0, -torch.inf) + 0 * P.sum((-1, -2)))

    for score in ("exact", "gradient"):
        chain = Chain(LogJoint(model), {"P": torch.arange(3).expand(200, 1, 3)})
        kernel = LocallyBalanced(score=score)
        kernel.bind(chain, 0)
        for _ in range(10):
            kernel.step()
        assert bool((chain.index["P"][..., 0] == 0).all())
        assert 0.3 < float((chain.index["P"][..., 1] == 1).double().mean()) < 0.7


def test_a_flat_target_has_no_period():
    target = points(scale=1e6)
    check_converges(LocallyBalanced(), target, steps=60)


def test_pickles():
    assert isinstance(pickle.loads(pickle.dumps(LocallyBalanced(balance="barker"))), LocallyBalanced)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"balance": "min"}, ValueError, "balance must be one of 'sqrt', 'barker', but is 'min'"),
        ({"score": "hook"}, ValueError, "score must be one of 'auto', 'exact', 'gradient', but is 'hook'"),
        ({"num_steps": 0}, ValueError, "num_steps"),
        ({"num_cycles": -1}, ValueError, "num_cycles"),
        ({"swap_delta": 1}, TypeError, "swap_delta must be callable, but is int"),
        ({"swap_delta": len, "score": "exact"}, ValueError, "score='exact' runs the model"),
        ({"jit_compile": True}, NotImplementedError, "jit_compile"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        LocallyBalanced(**kwargs)


def test_a_wrong_hook_is_found_out():
    target = points()
    with pytest.raises(ValueError, match="swap_delta gives 0 for the exchange"):
        LocallyBalanced(swap_delta=lambda swaps: torch.zeros(len(swaps.items))).bind(Chain(target.joint, target.draw(1)), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda P: P.argmax(-1).to(P).sum(-1), "no gradient in the matrices of site 'P'"),
        (
            lambda P: P.diagonal(dim1=-2, dim2=-1).sum(-1).sub(3).abs().sqrt() + P.square().sum(-1).sub(1).sqrt().sum(-1),
            "NaN or inf",
        ),
    ],
)
def test_models_without_a_gradient(change, message):
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(3))
        pyro.factor("likelihood", change(P))

    kernel = LocallyBalanced(score="gradient")
    kernel.bind(Chain(LogJoint(model), {"P": torch.arange(3)[None, None]}), 0)
    with pytest.raises(ValueError, match=message + ".*score='exact'"):
        kernel.step()

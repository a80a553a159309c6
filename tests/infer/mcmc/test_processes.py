"""Kernels in processes of their own: pickling, two chains by fork and by spawn, seeds, starts."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS

import pyro_gs as pgs

DATA = torch.tensor([2.0, 0.3, 1.1, 2.2])


def permutations_only(y):
    P = pyro.sample("P", pgs.UniformPermutation(4))
    pyro.sample("y", dist.Normal(P @ torch.arange(4.0), 1.0).to_event(1), obs=y)


def with_scale(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    P = pyro.sample("P", pgs.UniformPermutation(4))
    pyro.sample("y", dist.Normal(P @ torch.arange(4.0), scale[..., None]).to_event(1), obs=y)


def potential(z):
    return -z["P"].diagonal(dim1=-2, dim2=-1).sum(-1)


KERNELS = {
    "SwapMetropolis": lambda: pgs.SwapMetropolis(permutations_only, adapt=True),
    "LocallyBalanced": lambda: pgs.LocallyBalanced(permutations_only),
    "BlockGibbs": lambda: pgs.BlockGibbs(permutations_only, block_size=3),
    "MoveSequence": lambda: pgs.MoveSequence([pgs.SwapMetropolis(), pgs.BlockGibbs(block_size=2)], permutations_only),
    "HMCGibbs": lambda: pgs.HMCGibbs(HMC(with_scale, step_size=0.1, num_steps=3)),
    "HMCGibbs, NUTS": lambda: pgs.HMCGibbs(NUTS(with_scale), [pgs.LocallyBalanced()]),
}
"""By name, functions that make a kernel."""

RELAXED = {"NUTS, relaxed": lambda: NUTS(pgs.relax(with_scale), max_tree_depth=3)}


@pytest.fixture
def _two_processes(monkeypatch):
    """Pyro draws chains one after the other where it counts fewer cores than chains, one being for itself."""
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 8)


def run(name, *, num_chains=1, seed=0, num_samples=20, initial_params=None, mp_context="fork"):
    pyro.set_rng_seed(seed)
    mcmc = MCMC(
        {**KERNELS, **RELAXED}[name](),
        num_samples,
        10,
        initial_params=initial_params,
        num_chains=num_chains,
        mp_context=mp_context if num_chains > 1 else None,
        disable_progbar=True,
    )
    mcmc.run(DATA)
    return mcmc


def check_two_chains(name, mcmc, num_samples=20):
    samples = mcmc.get_samples(group_by_chain=True)
    expected = {"P", "scale"} if "HMC" in name or "NUTS" in name else {"P"}
    assert set(samples) == expected
    assert samples["P"].shape == (2, num_samples, 4, 4)
    assert torch.allclose(samples["P"].sum(-1), torch.ones(()), atol=1e-4)
    assert not torch.equal(samples["P"][0], samples["P"][1])
    if "scale" in samples:
        assert bool((samples["scale"] > 0).all())
    assert set(mcmc.diagnostics()["acceptance rate"]) == {"chain 0", "chain 1"}


@pytest.mark.parametrize("name", KERNELS)
def test_pickles_before_set_up_and_after_a_run(name):
    kernel = KERNELS[name]()
    copies = [pickle.loads(pickle.dumps(kernel))]
    mcmc = MCMC(kernel, 3, 3, disable_progbar=True)
    mcmc.run(DATA)
    copies.append(pickle.loads(pickle.dumps(kernel)))
    for again in copies:
        mcmc = MCMC(again, 3, 3, disable_progbar=True)
        mcmc.run(DATA)
        assert mcmc.get_samples()["P"].shape == (3, 4, 4)


@pytest.mark.parametrize("name", KERNELS)
def test_same_seed_same_chain(name):
    first, second, other = (run(name, seed=seed).get_samples() for seed in (1, 1, 2))
    for site in first:
        assert torch.equal(first[site], second[site])
    assert any(not torch.equal(first[site], other[site]) for site in first)


@pytest.mark.usefixtures("_two_processes")
@pytest.mark.parametrize("name", ["SwapMetropolis", "HMCGibbs"])
def test_two_chains_by_fork(name):
    first = run(name, num_chains=2)
    check_two_chains(name, first)
    second = run(name, num_chains=2)
    for site, value in first.get_samples(group_by_chain=True).items():
        assert torch.equal(value, second.get_samples(group_by_chain=True)[site])


@pytest.mark.slow
@pytest.mark.usefixtures("_two_processes")
@pytest.mark.parametrize(
    ("name", "mp_context"),
    [
        ("HMCGibbs, NUTS", "fork"),
        ("NUTS, relaxed", "fork"),
        ("SwapMetropolis", "spawn"),
        ("HMCGibbs", "spawn"),
    ],
)
def test_two_chains_in_processes(name, mp_context):
    mcmc = run(name, num_chains=2, mp_context=mp_context)
    check_two_chains(name, mcmc)
    mcmc.run(DATA)  # a kernel that has been set up in this process
    check_two_chains(name, mcmc)


@pytest.mark.parametrize("name", ["SwapMetropolis", "HMCGibbs"])
def test_two_chains_one_after_the_other(name, monkeypatch):
    """Each from a start of its own, which Pyro hands over with a leading dimension for the chains."""
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 1)
    starts = torch.stack([torch.eye(4), torch.eye(4).flip(0)])
    seen = []

    def hook(kernel, params, stage, i):
        if i == 0:
            seen.append((stage, kernel))

    bound = []
    kernel = KERNELS[name]()
    plain = type(kernel).setup

    def setup(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        bound.append(self.initial_params["P"])

    monkeypatch.setattr(type(kernel), "setup", setup)
    with pytest.warns(UserWarning, match="Chains will be drawn sequentially"):
        mcmc = MCMC(kernel, 5, 5, initial_params={"P": starts}, num_chains=2, hook_fn=hook, disable_progbar=True)
    mcmc.run(DATA)
    assert torch.equal(torch.stack(bound), starts)
    assert [stage for stage, _ in seen] == ["Warmup [0]", "Sample [0]", "Warmup [1]", "Sample [1]"]
    assert mcmc.get_samples(group_by_chain=True)["P"].shape == (2, 5, 4, 4)


def test_a_potential_function_in_a_process(monkeypatch):
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 8)
    start = {"P": torch.eye(3).expand(2, 3, 3).clone()}
    kernel = pgs.SwapMetropolis(potential_fn=potential)
    mcmc = MCMC(kernel, 10, 5, initial_params=start, num_chains=2, mp_context="fork", disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples(group_by_chain=True)["P"].shape == (2, 10, 3, 3)


@pytest.mark.parametrize(
    ("name", "texts"), [("SwapMetropolis", ["acc. prob"]), ("HMCGibbs", ["step size", "moves acc. prob"])]
)
def test_the_progress_bar(name, texts, capsys, monkeypatch):
    for name_of in ("CI", "PYTEST_XDIST_WORKER"):  # in which Pyro draws none
        monkeypatch.delenv(name_of, raising=False)
    mcmc = MCMC(KERNELS[name](), 20, 10)
    mcmc.run(DATA)
    shown = capsys.readouterr().err
    assert "Sample" in shown
    for text in texts:
        assert text in shown


@pytest.mark.parametrize("name", KERNELS)
def test_summary_and_diagnostics(name, capsys):
    mcmc = run(name, num_samples=60)
    mcmc.summary()
    printed = capsys.readouterr().out
    assert "P[0,0]" in printed
    diagnostics = mcmc.diagnostics()
    assert 0 < diagnostics["acceptance rate"]["chain 0"] <= 1
    assert diagnostics["P"]["n_eff"].shape == (4, 4)
    if "HMCGibbs" in name:
        assert "Number of divergences: 0" in printed
        assert 0 < diagnostics["moves: acceptance rate"]["chain 0"] <= 1

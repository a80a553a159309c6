"""compare: several inferences side by side, distances between their posteriors, and what it refuses."""

import math
import random
import warnings

import matching_model
import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_gs as pgs
from pyro_gs.infer.compare import bhattacharyya, total_variation
from pyro_gs.infer.log_joint import VectorizationWarning
from pyro_gs.infer.runners import RUNNERS, MethodResult, Task

mpl.use("Agg")
POINTS = tuple(value.double() for value in matching_model.noisy_points(4, 0.6, 0))
ARGS = (*POINTS, 0.6)


@pytest.fixture(scope="module")
def comparison():
    torch.set_default_dtype(torch.float64)
    return pgs.compare(matching_model.model, ARGS, budget=2.0, snapshots=4, progress=False)


def test_chains_arrive_at_the_exact_posterior(comparison):
    assert comparison.reference == "exact"
    evidence, marginals, _, _ = matching_model.exact(*ARGS)
    exact = comparison["exact"]
    assert exact.log_evidence == pytest.approx(evidence)
    assert torch.allclose(exact.marginals["P"], marginals)
    for name in ("swaps", "vi + mcmc"):
        # within two seconds at least 100 effective draws: five standard errors of a share
        assert (comparison[name].marginals["P"] - marginals).abs().max() < 5 * 0.5 / 10
        assert total_variation(exact.marginals, comparison[name].marginals) < 0.1
        assert bhattacharyya(exact, comparison[name]) < 0.1
        assert comparison[name].ess_per_second > 0


def test_the_same_time_for_all(comparison):
    for name in ("gumbel-sinkhorn", "swaps", "vi + mcmc"):
        assert comparison[name].history
        times = [seconds for seconds, _ in comparison[name].history]
        assert times == sorted(times)
        assert comparison[name].seconds >= 1.5


def test_a_guide_has_a_bound(comparison):
    found = comparison["gumbel-sinkhorn"]
    assert found.evidence_is == "lower bound for the relaxed model"
    assert math.isfinite(found.log_evidence)
    assert found.draws["P"].shape == (10_000, 4, 4)


def test_table_and_picture(comparison):
    text = str(comparison)
    for word in ("exact", "swaps", "log evidence", "TV", "Bhattacharyya", "ESS/s"):
        assert word in text
    figure = comparison.plot()
    panels = figure.axes
    assert [ax.get_title() for ax in panels[:-1]] == list(comparison.results)
    assert panels[-1].get_ylabel() == "total variation\nto exact"
    assert [line.get_label() for line in panels[-1].lines] == ["gumbel-sinkhorn", "swaps", "vi + mcmc"]
    mpl.pyplot.close(figure)
    assert torch.equal(comparison.map("exact")["P"], pgs.matching(comparison["exact"].marginals["P"].log()))
    assert len(comparison.distances()) == 6


@pytest.mark.parametrize(
    "name", [name for name in RUNNERS if name not in ("exact", "gumbel-sinkhorn", "swaps", "vi + mcmc")]
)
def test_every_method_runs(name):
    found = pgs.compare(matching_model.model, ARGS, methods=[name], budget=0.6, snapshots=2, progress=False)[name]
    assert found.draws["P"].shape[1:] == (4, 4)
    assert pgs.constraints.permutation.check(found.draws["P"]).all()
    if name == "tempering":
        evidence = matching_model.exact(*ARGS)[0]
        assert found.log_evidence == pytest.approx(evidence, abs=1.0)


def with_scale(x, y):
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    pyro.sample("y", dist.Normal(P @ x, scale[..., None, None]).to_event(2), obs=y)


def test_other_latent_sites_come_along():
    found = pgs.compare(
        with_scale, POINTS, methods=["exact", "gumbel-sinkhorn", "swaps"], budget=8.0, snapshots=2, progress=False
    )
    assert list(found.results) == ["exact", "gumbel-sinkhorn", "swaps"]
    assert found["exact"].log_evidence is None
    # NUTS for the scale leaves some 50 effective draws in the time
    assert total_variation(found["exact"].marginals, found["swaps"].marginals) < 0.25


def test_kernels_and_functions_of_ones_own():
    def mine(name, task):
        assert isinstance(task, Task)
        P = torch.eye(4).expand(3, 4, 4)
        return MethodResult(name, "mcmc", 0.1, {"P": P}, None, {"P": P.mean(0)}, None, "", None, [])

    methods = [pgs.BlockGibbs(block_size=2), ("pairs", pgs.BlockGibbs(block_size=3)), ("mine", mine)]
    found = pgs.compare(matching_model.model, ARGS, methods=methods, budget=0.3, progress=False)
    assert list(found.results) == ["BlockGibbs", "pairs", "mine"]
    assert found.reference is None


def test_what_cannot_run_is_left_out_with_the_reason():
    x, y = torch.randn(9, 2), torch.randn(9, 2)
    found = pgs.compare(matching_model.model, (x, y, 1.0), methods=["exact", "swaps"], budget=0.3, progress=False)
    assert list(found.results) == ["swaps"]
    assert "362880 permutations" in found.left_out["exact"]
    assert "not run: exact" in str(found)
    with pytest.raises(KeyError, match="'exact' did not run: .*362880"):
        found["exact"]


def result(P):
    return MethodResult("", "mcmc", 0.0, {"P": P}, None, {"P": P.mean(0)}, None, "", None, [])


def test_distances():
    eye, flip = torch.eye(3), torch.eye(3).flip(0)
    half = result(torch.stack([eye, flip]))
    assert bhattacharyya(half, half) == pytest.approx(0.0)
    assert math.copysign(1, bhattacharyya(result(eye[None]), result(eye[None]))) == 1  # no "-0.000" in the table
    assert bhattacharyya(half, result(eye[None])) == pytest.approx(-math.log(math.sqrt(0.5)))
    assert bhattacharyya(result(flip[None]), result(eye[None])) == math.inf
    # two of the three rows differ wholly
    assert total_variation({"P": eye}, {"P": flip}) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="the same sites and shapes"):
        total_variation({"P": eye}, {"Q": eye})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be a positive and finite number of seconds, but is 0"),
        ({"methods": ["swap"]}, ValueError, "methods has 'swap', but the names are 'exact', 'gumbel-sinkhorn'"),
        ({"methods": ["swaps", "swaps"]}, ValueError, "methods has 'swaps' twice"),
        ({"methods": [pgs.SwapMetropolis]}, TypeError, "methods must hold names, kernels without a model"),
        ({"methods": "swaps"}, TypeError, r"methods must be a list, but is 'swaps'; write methods=\['swaps'\]"),
        ({"methods": pgs.SwapMetropolis()}, TypeError, "methods must be a list, but is <"),
        ({"methods": []}, ValueError, "methods must hold at least one method, but is empty; the names are 'exact'"),
        (
            {"methods": [pgs.SwapMetropolis(matching_model.model)]},
            ValueError,
            r"methods has SwapMetropolis with a model of its own; write SwapMetropolis\(\)",
        ),
        ({"methods": [3]}, TypeError, "methods must hold names, kernels without a model.*but has 3"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"snapshots": 0}, ValueError, "snapshots"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        pgs.compare(matching_model.model, ARGS, progress=False, **options)


def test_a_model_without_permutations():
    with pytest.raises(ValueError, match="no latent permutation site"):
        pgs.compare(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), progress=False)


def by_argmax(x, y):
    P = pyro.sample("P", pgs.UniformPermutation(len(x)))
    place = P.argmax(-1)
    pyro.sample("y", dist.Normal(x[place], 0.6).to_event(2), obs=y)


def test_a_likelihood_without_a_gradient_is_no_fit():
    methods = ["gumbel-sinkhorn", "gumbel-matching", "gumbel-matching, score", "swaps"]
    found = pgs.compare(by_argmax, POINTS, methods=methods, budget=0.4, snapshots=2, progress=False)
    assert list(found.results) == ["gumbel-matching, score", "swaps"]
    for name in methods[:2]:
        assert (
            "no gradient in the matrices of the permutations, as where the model takes their argmax" in found.left_out[name]
        )


def test_a_flat_likelihood_needs_no_gradient():
    def model():
        pyro.sample("P", pgs.UniformPermutation(3))

    found = pgs.compare(model, methods=["gumbel-sinkhorn"], budget=0.3, snapshots=2, progress=False)
    assert list(found.results) == ["gumbel-sinkhorn"]


@pytest.mark.filterwarnings("ignore:Encountered")
def test_a_fit_without_a_bound_is_no_fit():
    def model():
        P = pyro.sample("P", pgs.UniformPermutation(4))
        trace = P.diagonal(dim1=-2, dim2=-1).sum(-1)
        pyro.factor("f", torch.where(trace > 3.9, trace, -torch.inf))

    with pyro.validation_enabled(False):
        found = pgs.compare(model, methods=["exact", "gumbel-sinkhorn"], budget=0.4, snapshots=2, progress=False)
    assert torch.equal(found["exact"].marginals["P"], torch.eye(4))
    assert "its bound is -inf, as where the guide draws permutations of likelihood zero" in found.left_out["gumbel-sinkhorn"]


def test_any_exception_of_a_method_is_its_own():
    def broken(name, task):
        raise RuntimeError("out of order")

    def stopped(name, task):
        raise KeyboardInterrupt

    found = pgs.compare(matching_model.model, ARGS, methods=["exact", ("mine", broken)], progress=False)
    assert found.left_out["mine"] == "RuntimeError: out of order"
    with pytest.raises(KeyboardInterrupt):
        pgs.compare(matching_model.model, ARGS, methods=[("mine", stopped)], progress=False)
    with pytest.raises(ValueError, match="none of the methods could run: mine: RuntimeError: out of order") as info:
        pgs.compare(matching_model.model, ARGS, methods=[("mine", broken)], progress=False)
    assert isinstance(info.value.__cause__, RuntimeError)


@pytest.mark.parametrize("name", ["swaps", "tempering"])
def test_a_tiny_budget_says_what_is_missing(name):
    with pytest.raises(
        ValueError, match=f"budget must leave '{name}' time for a warm-up and 8 samples, but in 1e-05 s it"
    ) as i:
        pgs.compare(matching_model.model, ARGS, methods=[name], budget=1e-5, progress=False)
    assert "9223372036854775807" not in str(i.value)


def test_a_kernel_serves_twice_and_the_random_state_stays():
    kernel = pgs.SwapMetropolis()
    pyro.set_rng_seed(5)
    expected = (torch.rand(1), random.random(), np.random.rand())  # noqa: NPY002
    pyro.set_rng_seed(5)
    for _ in range(2):
        pgs.compare(matching_model.model, ARGS, methods=[kernel], budget=0.2, progress=False)
        assert kernel.model is None
    assert (torch.rand(1), random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_a_model_that_does_not_broadcast_is_told_once():
    def model(x, y, scale):
        P = pyro.sample("P", pgs.UniformPermutation(len(x)))
        pyro.factor("f", -(P.reshape(4, 4) @ x - y).square().sum() / scale)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pgs.compare(model, ARGS, methods=["exact", "swaps", "block gibbs"], budget=0.3, progress=False)
    assert sum(issubclass(one.category, VectorizationWarning) for one in caught) == 1

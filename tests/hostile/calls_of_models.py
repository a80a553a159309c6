"""What is called with hostile models: handlers, guides, exact posteriors, kernels, diagnostics."""

import dataclasses
from collections.abc import Callable

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO

import pyro_gs as pgs
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel


@dataclasses.dataclass(frozen=True)
class ModelCall:
    """As ``calls.Call``, of the pieces of a model.

    ``learns``: by SVI, which leaves parameters in Pyro's store. ``scale``: it is for models with another latent site.
    """

    name: str
    function: Callable
    raises: tuple
    draws: bool = True
    learns: bool = False
    scale: bool = False

    def __str__(self):
        return self.name


def check_hard(pieces, values):
    """Permutation matrices at every site, which keep to the allowed pairs where the law has them."""
    for name in pieces.sites:
        P = values[name]
        if not P.numel():
            continue
        index = pgs.to_index(P)  # raises where it is none
        if pieces.law in ("uniform", "gibbs", "gumbel"):
            assert bool(pieces.allowed[torch.arange(pieces.n), index].all())
    return values


def values_of(pieces, model):
    trace = poutine.trace(model).get_trace(*pieces.args)
    return {name: node["value"] for name, node in trace.nodes.items() if node["type"] == "sample"}


def relaxed(pieces):
    values = values_of(pieces, pgs.relax(pieces.model, temperature=0.5))
    for name in pieces.sites:
        if pieces.law not in ("mallows", "ranking"):  # no relaxation, and one whose rows alone sum to one
            P = values[name]
            assert torch.allclose(P.sum(-1), torch.ones((), dtype=P.dtype), atol=1e-3)
            assert torch.allclose(P.sum(-2), torch.ones((), dtype=P.dtype), atol=1e-3)
    return {name: values[name] for name in pieces.sites}


def indexed(pieces):
    values = values_of(pieces, pgs.indexed(pieces.model))
    return {name: value for name, value in values.items() if name.split("_")[0] in pieces.sites}


def enumerated(pieces):
    posterior = pgs.enumerate_posterior(pieces.model, *pieces.args)
    assert torch.allclose(posterior.log_probs.exp().sum(), torch.ones((), dtype=torch.float64))
    if pieces.layout == "alone" and len(pieces.names) == 1 and pieces.masked is None:
        with torch.no_grad():
            alone = [
                poutine.trace(poutine.condition(pieces.model, {pieces.names[0]: P})).get_trace(*pieces.args).log_prob_sum()
                for P in posterior.permutations[pieces.names[0]]
            ]
        expected = torch.stack(alone).double()
        tolerance = 1e-4 * max(1.0, float(expected[expected.isfinite()].abs().max()))  # of float32
        assert torch.allclose(torch.logsumexp(expected, 0), posterior.log_evidence, rtol=1e-4, atol=tolerance)
    return [posterior, check_hard(pieces, posterior.map), posterior.entropy]


def averaged(pieces):
    return pgs.permutation_posterior(pieces.model, {"scale": torch.tensor([0.5, 1.0])}, *pieces.args)


def rounded(pieces):
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(5, pieces.n, pieces.n, generator=generator) for name in pieces.sites}
    draws = {name: pgs.sinkhorn(logits) for name, logits in noise.items()}
    return pgs.round_samples(pieces.model, draws, *pieces.args)


def fitted(make, *, plain=False):
    """Two steps of SVI, then what the guide says; the loss of a model that has NaN is Pyro's to warn of."""

    def fit(pieces):
        guide = make(pieces.model)
        model = pieces.model if plain else pgs.relax(pieces.model)
        optimizer = pyro.optim.Adam({"lr": 0.01})
        if hasattr(guide, "temperature") and isinstance(guide, pgs.AutoGumbelSinkhorn) and not plain:
            schedule = pgs.ExponentialSchedule(1.0, 0.5, 2)
            svi = pgs.AnnealedSVI(model, guide, optimizer, Trace_ELBO(), schedule=schedule)
        else:
            svi = SVI(model, guide, optimizer, Trace_ELBO())
        for _ in range(2):
            svi.step(*pieces.args)
        found = [guide.median(*pieces.args), guide.hard_sample((2,), *pieces.args), pgs.harden(guide)(*pieces.args)]
        return [check_hard(pieces, values) for values in found]

    return fit


def restarted(pieces):
    guide = pgs.AutoGumbelSinkhorn(pieces.model)
    svi = SVI(pgs.relax(pieces.model), guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*pieces.args)

    def score(values):
        conditioned = poutine.condition(pieces.model, values)
        return float(poutine.trace(conditioned).get_trace(*pieces.args).log_prob_sum())

    restarts = pgs.PartialRestarts(guide, score)
    restarts.begin()
    svi.step(*pieces.args)
    restarts.end()
    restarts.finish()
    return [check_hard(pieces, restarts.best), guide.logits(pieces.sites[0], *pieces.args).exp()]


def diagnosed(function, **options):
    def diagnose(pieces):
        guide = pgs.AutoGumbelSinkhorn(pieces.model)
        return function(pgs.relax(pieces.model), guide, *pieces.args, **options)

    return diagnose


def saturated(pieces):
    return pgs.saturation(pgs.AutoGumbelSinkhorn(pieces.model), *pieces.args, num_draws=2)


def gradients(pieces):
    guide = pgs.AutoGumbelSinkhorn(pieces.model)
    return pgs.gradient_variance(Trace_ELBO(), pgs.relax(pieces.model), guide, *pieces.args, num_draws=2)


def started(pieces):
    start = {name: torch.eye(pieces.n) for name in pieces.sites}
    guide = pgs.AutoGumbelSinkhorn(pieces.model, init_logits=pgs.init_to_matching(start), create_plates=None)
    guide(*pieces.args)
    found = guide.median(*pieces.args)
    for P in found.values():
        if bool(pieces.allowed.diagonal().all()):
            assert torch.equal(P, torch.eye(pieces.n, dtype=P.dtype).expand(P.shape))
    return found


def sampled(make):
    """A short chain, and what is made of its draws."""

    def run(pieces):
        mcmc = MCMC(make(pieces), num_samples=4, warmup_steps=2, disable_progbar=True)
        mcmc.run(*pieces.args)
        samples = mcmc.get_samples()
        summary, found = pgs.summary(mcmc), pgs.convergence(mcmc)
        str(summary), str(found), pgs.posterior_dict(mcmc)
        return [check_hard(pieces, samples), {name: site.marginals for name, site in summary.items()}]

    return run


def proposed(pieces):
    guide = pgs.AutoGumbelSinkhorn(pieces.model)
    guide(*pieces.args)
    return pgs.GuideProposal(pieces.model, guide=guide)


def predicted(pieces):
    guide = pgs.AutoGumbelSinkhorn(pieces.model)
    guide(*pieces.args)
    return check_hard(pieces, Predictive(pieces.model, guide=pgs.harden(guide), num_samples=2)(*pieces.args))


def compared(pieces):
    names = ["exact", "swaps", "gumbel-sinkhorn"]
    found = pgs.compare(pieces.model, pieces.args, methods=names, budget=0.03, snapshots=2, progress=False)
    str(found), found.distances()
    assert not pyro.get_param_store()
    return [result.marginals for result in found.results.values()]


_FITS = {
    "AutoGumbelSinkhorn": fitted(pgs.AutoGumbelSinkhorn),
    "AutoGumbelSinkhorn tightened": fitted(lambda model: pgs.AutoGumbelSinkhorn(model, objective="tightened_kl", rank=1)),
    "AutoGumbelSinkhorn hard": fitted(lambda model: pgs.AutoGumbelSinkhorn(model, hard=True)),
    "AutoGumbelMatching": fitted(pgs.AutoGumbelMatching, plain=True),
    "AutoGumbelMatching perturbed": fitted(
        lambda model: pgs.AutoGumbelMatching(model, gradient="perturb_and_map"), plain=True
    ),
    "AutoRounding": fitted(pgs.AutoRounding),
    "AutoStickBreaking": fitted(pgs.AutoStickBreaking),
}
_KERNELS = {
    "SwapMetropolis": lambda pieces: pgs.SwapMetropolis(pieces.model, adapt=True),
    "LocallyBalanced": lambda pieces: pgs.LocallyBalanced(pieces.model),
    "BlockGibbs": lambda pieces: pgs.BlockGibbs(pieces.model, block_size=3),
    "MoveSequence": lambda pieces: pgs.MoveSequence([pgs.SwapMetropolis(), pgs.BlockGibbs()], pieces.model),
    "ParallelTempering": lambda pieces: pgs.ParallelTempering(pieces.model, num_temperatures=3),
    "GuideProposal": proposed,
    "HMCGibbs": lambda pieces: pgs.HMCGibbs(NUTS(pieces.model, max_tree_depth=2)),
}
_GUIDE = pgs.AutoGumbelSinkhorn

CALLS = [
    ModelCall("relax", relaxed, (pgs.relax,)),
    ModelCall("indexed", indexed, (pgs.indexed,)),
    ModelCall("enumerate_posterior", enumerated, (pgs.enumerate_posterior,), draws=False),
    ModelCall("permutation_posterior", averaged, (pgs.permutation_posterior,), draws=False, scale=True),
    ModelCall("round_samples", rounded, (pgs.round_samples,), draws=False),
    *(
        ModelCall(
            name,
            fit,
            (getattr(pgs, name.split()[0]), _GUIDE.hard_sample, pgs.relax, pgs.harden, pgs.AnnealedSVI),
            learns=True,
        )
        for name, fit in _FITS.items()
    ),
    ModelCall("PartialRestarts", restarted, (pgs.PartialRestarts, _GUIDE, pgs.relax), learns=True),
    ModelCall(
        "check_temperature_effect",
        diagnosed(pgs.check_temperature_effect, num_draws=4),
        (pgs.check_temperature_effect, _GUIDE, pgs.relax),
        learns=True,
    ),
    ModelCall(
        "relaxation_gap", diagnosed(pgs.relaxation_gap, num_draws=4), (pgs.relaxation_gap, _GUIDE, pgs.relax), learns=True
    ),
    ModelCall("saturation", saturated, (pgs.saturation, _GUIDE), learns=True),
    ModelCall("gradient_variance", gradients, (pgs.gradient_variance, _GUIDE, pgs.relax), learns=True),
    ModelCall("init_to_matching", started, (pgs.init_to_matching, _GUIDE), learns=True),
    *(
        ModelCall(
            name,
            sampled(make),
            (getattr(pgs, name), PermutationKernel, pgs.summary, pgs.convergence, _GUIDE),
            learns=name == "GuideProposal",
            scale=name == "HMCGibbs",
        )
        for name, make in _KERNELS.items()
    ),
    ModelCall("harden", predicted, (pgs.harden, _GUIDE), learns=True),
    ModelCall("compare", compared, (pgs.compare,), draws=False, learns=True),
]

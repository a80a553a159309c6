# %% tags=["remove-cell"]
"""Your first latent permutation: exact, MCMC and variational inference of one model, side by side."""

# %% [markdown]
# # Your first latent permutation: exact, MCMC and variational, side by side
#
# You photograph six beads on a table, someone jogs the table, and you photograph them again. Which bead is which? The
# answer is a permutation, and what you want is not only the best one but how sure to be of it. This tutorial writes
# that as a Pyro model, computes its posterior in three ways (exactly, by MCMC, by variational inference), lays the
# answers side by side, and ends with what to use when.
#
# It runs top to bottom in about two minutes on one core; `python -m tutorials.first_permutation --full` gives every
# method the time of a real analysis. Run so, its pictures go to `results/first_permutation`.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor

import pyro_gs as pgs
from pyro_gs import plotting
from tutorials.page import Page

page = Page("first_permutation", "exact, MCMC and variational inference of one permutation")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
pyro.set_rng_seed(0)

STEPS = {"quick": 20, "default": 600, "full": 3000}[page.size]
SAMPLES = {"quick": 20, "default": 1000, "full": 5000}[page.size]
WARMUP = {"quick": 20, "default": 200, "full": 200}[page.size]
BUDGET = {"quick": 0.5, "default": 4.0, "full": 20.0}[page.size]  # seconds

# %% [markdown]
# ## The data
#
# `before` holds the positions of six beads, `after` those of the second photograph, in an order of their own and moved
# by noise of standard deviation .5. Two pairs of beads lie close together, so the data cannot settle everything.

# %% mystnb={"image": {"alt": "positions of the six beads in both photographs"}}
n, noise = 6, 0.5
before = torch.tensor([[0.0, 0.0], [0.4, 0.1], [2.0, 0.0], [0.0, 2.0], [0.3, 2.3], [2.0, 2.0]])
truth = torch.tensor([3, 0, 5, 4, 1, 2])  # row i of `after` is bead truth[i]
after = before[truth] + noise * torch.randn(n, 2)

figure, ax = plt.subplots(figsize=(4.6, 4), layout="constrained")
ax.scatter(before[:, 0], before[:, 1], s=90, facecolors="none", edgecolors="tab:blue", label="before")
ax.scatter(after[:, 0], after[:, 1], s=40, color="tab:orange", label="after")
for i, j in enumerate(truth.tolist()):
    ax.plot(*torch.stack([after[i], before[j]]).T, color="0.7", linewidth=1, zorder=0)
    ax.annotate(
        str(i), (float(after[i, 0]), float(after[i, 1])), xytext=(4, 4), textcoords="offset points", color="tab:orange"
    )
    ax.annotate(
        str(j), (float(before[j, 0]), float(before[j, 1])), xytext=(-12, -10), textcoords="offset points", color="tab:blue"
    )
ax.set_title("six beads; grey: the truth")
ax.legend()
page.show("1_data", figure)

# %% [markdown]
# ## The model
#
# A permutation is a matrix: `P[i, j] = 1` says that row `i` of the second photograph is bead `j` of the first, so `P @
# before` is the first photograph in the order of the second. The prior is uniform. That is all.


# %%
def model(before: Tensor, after: Tensor) -> None:
    """Beads in another order, with noise."""
    P = pyro.sample("P", pgs.UniformPermutation(len(before)))
    pyro.sample("after", dist.Normal(P @ before, noise).to_event(2), obs=after)


# %% [markdown]
# ## Exact
#
# Six beads have 720 orders: we can try them all. `enumerate_posterior` runs the model on batches of them and returns
# the log evidence, the probability of every permutation, and the marginals: how probable it is that row `i` is bead
# `j`.

# %%
exact = pgs.enumerate_posterior(model, before, after)
print(f"log evidence {exact.log_evidence:.3f}")
print(pgs.summary(exact, truth=pgs.to_matrix(truth)))

# %% [markdown]
# The columns to look at are `p(map)`, the probability of the best permutation as a whole, and `least`, the largest
# marginal of the least sure row. The best permutation has little more than half of the mass: reporting it alone would hide
# much of what is known.
#
# ## MCMC
#
# `SwapMetropolis` proposes that two rows exchange their beads, and accepts or refuses. It is an ordinary Pyro kernel:
# `MCMC` takes it, several chains, a progress bar and `initial_params` as ever. It needs no gradient and works for any
# `n`.

# %%
mcmc = MCMC(pgs.SwapMetropolis(model), num_samples=SAMPLES, warmup_steps=100, disable_progbar=True)
mcmc.run(before, after)
samples = mcmc.get_samples(group_by_chain=True)
print(pgs.summary(mcmc, truth=pgs.to_matrix(truth)))
print(pgs.convergence(mcmc))

# %% [markdown]
# `convergence` gives R-hat and effective sample sizes of what means something for a permutation: the entries that vary,
# and the distance to the most frequent permutation. (Pyro's `mcmc.summary()` works too, but entries that never change
# have no R-hat, and it prints `nan` for them.) A trace shows whether the chain moves between the alternatives or sits
# in one.

# %% mystnb={"image": {"alt": "columns of each row along the chain, and distance to the most frequent permutation"}}
axes = plotting.plot_trace(samples, group_by_chain=True)
page.show("2_trace", axes[0].figure)

# %% [markdown]
# ## Variational
#
# `relax` turns the permutation into a matrix inside the polytope of doubly stochastic matrices, at a temperature, so
# that gradients exist; `AutoGumbelSinkhorn` is the guide that goes with it. The rest is Pyro's `SVI`. `hard_sample`
# draws permutations from the fitted guide.

# %% mystnb={"image": {"alt": "minus the ELBO by step"}}
pyro.clear_param_store()
temperature = 0.25
guide = pgs.AutoGumbelSinkhorn(model, temperature=temperature)
optimizer = ClippedAdam({"lr": 0.3, "lrd": 0.02 ** (1 / STEPS)})
elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
svi = SVI(pgs.relax(model, temperature=temperature), guide, optimizer, elbo)
losses = [svi.step(before, after) for _ in range(STEPS)]
draws = guide.hard_sample((5000,))
print(pgs.summary(draws, truth=pgs.to_matrix(truth)))

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.plot(losses, linewidth=0.5)
ax.set_ylim(top=float(torch.tensor(losses).quantile(0.99)))
ax.set_xlabel("step")
ax.set_ylabel("minus the ELBO, nats")
page.show("3_loss", figure)

# %% [markdown]
# ## Side by side
#
# One call runs several methods on the same model for the same time. The heat maps are the marginals, with the best
# matching marked; below is how far each is from the exact ones as time goes by. `TV` in the table is the total
# variation distance of the rows' marginals from the exact ones, `Bhattacharyya` that of the whole posteriors.

# %% mystnb={"image": {"alt": "marginals by method, and their error as time goes by"}}
comparison = pgs.compare(
    model,
    (before, after),
    methods=["exact", "gumbel-sinkhorn", "gumbel-matching", "swaps", "vi + mcmc"],
    budget=BUDGET,
    temperature=temperature,
    progress=False,
)
print(comparison)
page.show("4_comparison", comparison.plot())

# %% [markdown]
# MCMC arrives at the truth and stays there: its error falls with the root of the time. The guides settle beside it. That
# gap is the family's and the bound's rather than the optimizer's: a Gumbel-Sinkhorn law has one logit a pair and cannot take
# every shape, and a relaxed likelihood is not the plain one ([objectives](../docs/objectives.md),
# [temperature](../docs/temperature.md)). "gumbel-matching" draws hard permutations and needs no temperature. "vi + mcmc"
# proposes from the fitted guide and corrects by Metropolis-Hastings, so that it has the guide's reach and the chain's
# exactness.
#
# ## Beside a continuous unknown
#
# Usually the noise is not known either. Give it a prior, and nothing else changes: `HMCGibbs` moves the permutation by
# swaps and the rest by NUTS. The exact answer still exists: `indexed` sums the permutation out, and NUTS sees a model
# of the noise alone.


# %% mystnb={"image": {"alt": "posterior of the noise by HMCGibbs and by NUTS with the permutation summed out"}}
def model_with_noise(before: Tensor, after: Tensor) -> None:
    """The same with unknown noise."""
    scale = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    P = pyro.sample("P", pgs.UniformPermutation(len(before)))
    pyro.sample("after", dist.Normal(P @ before, scale[..., None, None]).to_event(2), obs=after)


gibbs = MCMC(pgs.HMCGibbs(NUTS(model_with_noise)), num_samples=SAMPLES, warmup_steps=WARMUP, disable_progbar=True)
gibbs.run(before, after)
summed = MCMC(NUTS(pgs.indexed(model_with_noise)), num_samples=SAMPLES, warmup_steps=WARMUP, disable_progbar=True)
summed.run(before, after)

figure, ax = plt.subplots(figsize=(5, 3), layout="constrained")
for name, run in (("HMCGibbs", gibbs), ("NUTS, P summed out", summed)):
    values = run.get_samples()["noise"]
    print(f"noise by {name}: {float(values.mean()):.3f} +- {float(values.std()):.3f}")
    ax.hist(values, bins=40, density=True, histtype="step", label=name)
ax.axvline(noise, color="0.5", linestyle=":", label="truth")
ax.set_xlabel("noise")
ax.set_ylabel("posterior density")
ax.legend()
page.show("5_noise", figure)

# %% [markdown]
# ## Thirty beads
#
# Thirty beads have 2.7e32 orders. `enumerate_posterior` refuses and says why; the other two do not care. Here nothing
# tells us the exact answer, but we simulated the data, so we can ask whether the methods know how sure to be: of the
# rows that get probability .8, are eight in ten right? The reliability curve shows it over ten data sets.

# %% mystnb={"image": {"alt": "reliability curves of the chain and of the guide"}}
n = 30
try:
    pgs.enumerate_posterior(model, torch.randn(n, 2), torch.randn(n, 2))
except ValueError as error:
    print(error)

sets = 10
before = torch.randn(sets, n, 2) * 2
truths = torch.stack([torch.randperm(n) for _ in range(sets)])
after = before.gather(1, truths[..., None].expand_as(before)) + noise * torch.randn(sets, n, 2)


def many(before: Tensor, after: Tensor) -> None:
    """Independent data sets in a plate."""
    with pyro.plate("sets", len(before)):
        P = pyro.sample("P", pgs.UniformPermutation(n))
        pyro.sample("after", dist.Normal(P @ before, noise).to_event(2), obs=after)


chain = MCMC(pgs.SwapMetropolis(many, adapt=True), num_samples=SAMPLES // 2, warmup_steps=WARMUP, disable_progbar=True)
chain.run(before, after)
pyro.clear_param_store()
guide = pgs.AutoGumbelSinkhorn(many, temperature=1.0)
svi = SVI(pgs.relax(many, temperature=1.0), guide, ClippedAdam({"lr": 0.3, "lrd": 0.02 ** (1 / STEPS)}), Trace_ELBO())
for _ in range(STEPS):
    svi.step(before, after)

right = pgs.to_matrix(truths)
summaries = {
    "SwapMetropolis": pgs.summary(chain, truth=right),
    "AutoGumbelSinkhorn": pgs.summary(guide.hard_sample((500,)), truth=right),
}
figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for ax, (name, found) in zip(panels, summaries.items(), strict=True):
    accuracy, off = found["P"].matching_accuracy, found["P"].calibration_error
    assert accuracy is not None
    print(f"{name}: {accuracy.mean():.3f} of the rows right, expected calibration error {off:.3f}")
    plotting.plot_reliability(found, ax=ax)
    ax.set_title(name)
page.show("6_reliability", figure)

# %% [markdown]
# The chain knows how sure to be. The guide has fewer rows right and is too sure of them: at thirty rows one run of SVI ends
# in one of many local optima, and its spread is that of the optimum it is in. That is the reason to compare.
#
# ## Exact, MCMC or variational?
#
# - **Exact**, whenever you can: up to about eight rows, or more where most pairs are forbidden (it is the number of
#   allowed permutations that counts). With continuous unknowns, `NUTS(pgs.indexed(model))`.
# - **MCMC**, whenever you can wait: `SwapMetropolis`, `LocallyBalanced` where likelihoods are sharp,
#   `ParallelTempering` where modes lie far apart. Look at `convergence` and at several chains from different starts
#   before you believe it.
# - **Variational**, when there is too much for a chain: many data sets, hundreds of rows, a network that maps data to
#   logits. Check its temperature, and check it against MCMC on a small case, as above.
# - **Both**: fit a guide, then `GuideProposal` moves beside local ones.
#
# [Choosing](../docs/choosing.md) is the longer answer, with figures; [laws](../docs/laws.md) has the priors that may stand
# in place of the uniform one.

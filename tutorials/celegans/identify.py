# %% tags=["remove-cell"]
"""Identify the neurons of C. elegans, as a Pyro tutorial: model, prior check, SVI, MCMC on the same model, calibration."""

# %% [markdown]
# # Which neuron is which?
#
# A worm's nervous system is known connection by connection: 279 somatic neurons, every one with a name. A recording of a
# living worm shows the activity of its neurons, but not their names. This tutorial finds the names from the activity: a
# permutation for each worm, given the connectome and rough positions along the body.
#
# It follows the experiment of *Learning Latent Permutations with Gumbel-Sinkhorn Networks* (Mena et al. 2018, Section 5.3)
# on simulated worms, so that the answers can be checked. It runs in a few minutes on one core; `python -m
# tutorials.celegans.identify --full` takes the size of the main job. Run so, its pictures go to `results/identify`.

# %%
import matplotlib.pyplot as plt
import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import MCMC, SVI, Predictive, Trace_ELBO
from pyro.optim import ClippedAdam

import pyro_gs as pgs
from pyro_gs import plotting
from tutorials.celegans.connectome import load_connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.exchange import ExchangeSearch
from tutorials.celegans.model import collapsed_model, full_model
from tutorials.celegans.twins import with_exchanges
from tutorials.celegans.worms import accuracy, chance_accuracy, simulate
from tutorials.page import Page

page = Page("identify", "neuron identification, step by step")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
pyro.set_rng_seed(0)

NEURONS, WORMS = {"quick": (20, 2), "default": (100, 2), "full": (139, 4)}[page.size]
STEPS = {"quick": 10, "default": 500, "full": 1000}[page.size]
RESTARTS = {"quick": 1, "default": 15, "full": 15}[page.size]
SAMPLES = {"quick": 10, "default": 300, "full": 1000}[page.size]

# %% [markdown]
# ## The data
#
# `simulate` draws one set of connection weights, lets every worm's network run with noise of its own, and puts the neurons
# of each worm into a random order. `worms.allowed` says which identities each observed neuron may have: those nearer than a
# seventh of the body, and for one neuron in ten only the truth.

# %% mystnb={"image": {"alt": "activity of worm 1 over time, and which identities its neurons may have"}}
connectome = load_connectome().thin(NEURONS, torch.Generator().manual_seed(0))
worms = simulate(connectome, worms=WORMS, steps=1000, known=0.1, eta=0.15, seed=0)
assert worms.truth is not None  # simulated worms have one
index = worms.truth
truth = pgs.to_matrix(index)
print(f"{WORMS} worms, {NEURONS} neurons, {int(connectome.adjacency.sum())} connections")
print(f"{float(worms.allowed.sum(-1).double().mean()):.1f} candidates a neuron; guessing gives {chance_accuracy(worms):.2f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].imshow(worms.traces[0, :150].T, aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3)
axes[0].set(xlabel="time step", ylabel="observed neuron", title="what worm 1 shows")
order = connectome.body.argsort()
axes[1].imshow(worms.allowed[0][index[0].argsort()[order]][:, order], cmap="Greys", interpolation="nearest")
axes[1].set(xlabel="identity, head to tail", ylabel="neuron, in the true order", title="its candidates")
page.show("1_data", figure)

# %% [markdown]
# ## The model
#
# Activity at one moment is what the network makes of the moment before, plus noise:
#
#     Y_t = P W P' Y_{t-1} + noise
#     W   Gaussian on the connections, shared by all worms
#     P   uniform on the candidates
#
# `model.py` has it as a Pyro program of a dozen lines, `full_model`. Given the permutations `W` is Gaussian, so it can be
# integrated out exactly; `collapsed_model` is the same model without it, and all that follows uses it. The recordings enter
# through sums over time, so a step costs the same for any length.
#
# ## Does the prior know such worms?
#
# Before fitting, draw from the prior: weights and permutations, and from them the activity that they predict one step ahead.
# If the recorded activity lay far outside, no posterior would be worth looking at.

# %% mystnb={"image": {"alt": "standard deviation of each neuron's activity, drawn from the prior and recorded"}}
prior = Predictive(poutine.uncondition(full_model), num_samples=20)(worms, connectome)["Y"]
figure, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
for draw in prior:
    ax.plot(draw[0].std(0).sort().values, color="0.7", linewidth=1)
ax.plot([], [], color="0.7", label="20 draws of the prior")
ax.plot(worms.traces[0, 1:].std(0).sort().values, color="tab:red", label="recorded")
ax.set(xlabel="neurons of worm 1, sorted", ylabel="standard deviation of the activity", title="prior predictive check")
ax.legend()
page.show("2_prior", figure)
spread = [float(part.std()) for part in (worms.traces[0, 1:], prior[:, 0])]
print(f"standard deviation of all activity: {spread[0]:.2f} recorded, {spread[1]:.2f} by the prior")


# %% [markdown]
# ## SVI with a Gumbel-Sinkhorn guide
#
# Two lines make it variational: `pgs.relax` runs the same model with doubly stochastic matrices in place of permutations,
# and `AutoGumbelSinkhorn` is the guide. `guide.median()` is the best matching of its logits.

# %%
evidence = CollapsedEvidence.of_worms(worms, connectome)
data = (evidence, worms.allowed)
guide = pgs.AutoGumbelSinkhorn(collapsed_model, temperature=1.0, init_scale=0.0, objective="noise_kl")
optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.1 ** (1 / STEPS)})
elbo = Trace_ELBO(num_particles=1, vectorize_particles=True, max_plate_nesting=1)
svi = SVI(pgs.relax(collapsed_model, temperature=1.0), guide, optimizer, elbo)
losses = [svi.step(*data) for _ in range(STEPS)]
plain = pgs.to_index(guide.median()["P"])
print(f"plain SVI: {accuracy(plain, index):.3f} of the neurons right")

# %% [markdown]
# Plain SVI ends in a local optimum: some labels are confused in all worms at once, and the weights have learned the
# confusion. Two things help, and both look at hard permutations. `ExchangeSearch` scores the exchange of any two labels in
# any set of worms exactly and takes those that raise the log joint. `pgs.PartialRestarts` frees a random part of the labels,
# lets SVI place them anew around the rest, and keeps the result if it scores higher. Neither looks at the truth.

# %% mystnb={"image": {"alt": "the loss by step, and the log evidence of the best matching by restart"}}
search = ExchangeSearch(evidence, worms.allowed)


def log_joint(values: dict[str, torch.Tensor]) -> float:
    """Of permutations by site, up to a constant: the prior is uniform."""
    return float(evidence(values["P"]))


def improved() -> dict[str, torch.Tensor]:
    """The guide's mode after exchanges."""
    found, _ = search.improve(pgs.to_index(guide.median()["P"]), seconds=30.0)
    return {"P": pgs.to_matrix(found)}


restarts = pgs.PartialRestarts(guide, log_joint)
restarts.end(improved())
scores = [restarts.best_score]
for _ in range(RESTARTS):
    restarts.begin()
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.1 ** (1 / 80)})
    svi = SVI(pgs.relax(collapsed_model, temperature=1.0), guide, optimizer, elbo)
    for _ in range(min(80, STEPS)):
        svi.step(*data)
    restarts.end(improved())
    scores.append(restarts.best_score)
svi = SVI(pgs.relax(collapsed_model, temperature=1.0), guide, ClippedAdam({"lr": 0.1, "lrd": 0.1 ** (1 / STEPS)}), elbo)

# The guide starts as close around the best as has the lowest loss.
restarts.finish((3.0, 4.5, 6.0, 8.0, 11.0), lambda: sum(float(svi.evaluate_loss(*data)) for _ in range(4)))
losses += [svi.step(*data) for _ in range(STEPS)]
restarts.end()  # keeps the best matching where the last steps left it for a lower one
answer = restarts.best["P"]
print(f"with exchanges and restarts: {accuracy(pgs.to_index(answer), index):.3f}")
print(f"log evidence of the answer less that of the truth: {log_joint({'P': answer}) - float(evidence(truth)):.1f} nats")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
axes[0].plot(losses, linewidth=0.7)
axes[0].set(xlabel="step", ylabel="-ELBO (nats)", title="SVI: first stretch, and around the best matching")
axes[1].step(range(len(scores)), scores, where="post")
axes[1].axhline(float(evidence(truth)), color="black", linestyle=":", label="the truth's")
axes[1].set(xlabel="restart", ylabel="log evidence (nats)", title="best matching so far")
axes[1].legend()
page.show("3_svi", figure)

# %% [markdown]
# ## MCMC on the same model
#
# The guide's marginals are those of an approximation. `SwapMetropolis` samples the posterior itself: it proposes that two
# neurons of a worm exchange their names. It needs nothing but the model; handing it `swap_delta`, the exact change that
# `ExchangeSearch` knows, spares it running the model at every proposal. Started from the guide's mode it need not find its
# way there.

# %% mystnb={"image": {"alt": "marginals of worm 1 by the guide and by the chain"}}
kernel = pgs.SwapMetropolis(collapsed_model, swap_delta=search.swap_delta)
mcmc = MCMC(kernel, num_samples=SAMPLES, warmup_steps=SAMPLES // 5, initial_params={"P": answer}, disable_progbar=True)
mcmc.run(*data)
hard = guide.hard_sample((SAMPLES,))["P"]
by_svi, by_mcmc = hard.mean(0), mcmc.get_samples()["P"].double().mean(0)
difference = 0.5 * (by_svi - by_mcmc).abs().sum(-1)
print("total variation between the marginals of guide and chain:")
print(f"median {float(difference.median()):.3f}, largest {float(difference.max()):.3f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
for ax, (title, marginals) in zip(axes, {"guide": by_svi, "chain": by_mcmc}.items(), strict=True):
    rows = index[0].argsort()[order]
    ax.imshow(marginals[0][rows][:, order].sqrt(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    right = accuracy(pgs.to_index(pgs.matching(marginals)), index)
    ax.set(title=f"{title}: {right:.3f} right", xlabel="identity, head to tail", ylabel="neuron, in the true order")
figure.suptitle("marginals of worm 1 (square root, so that small ones show); right answers lie on the diagonal")
page.show("4_marginals", figure)

# %% [markdown]
# ## How far can an assignment be trusted?
#
# Is a neuron that the posterior gives .9 right nine times in ten? `pgs.reliability` counts, over the neurons whose identity
# was not given. A guide can be too sure in the wrong optimum and not sure enough in the right one, so look at this before
# you trust names, on simulated worms like yours.
#
# Here the answer has the truth's log evidence and still a wrong pair: two neurons with the same partners, whose names can be
# exchanged in both worms at once without any change. Nothing in the data tells them apart, so each name deserves one half.
# Neither the guide, which sits around one of the two, nor swaps within a single worm, which would have to pass through
# states where the worms disagree, say so. `search.gains(index)` lists such exchanges, those of gain zero; `with_exchanges`
# multiplies the marginals by the probabilities that they imply.

# %% mystnb={"image": {"alt": "reliability curves of the guide, of the chain, and of the guide with exchanges put in"}}
mixed = with_exchanges(by_svi, pgs.to_index(answer), search, worms)
figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
for ax, (title, marginals) in zip(axes, {"guide": by_svi, "chain": by_mcmc, "guide, exchanges": mixed}.items(), strict=True):
    curve = pgs.reliability(marginals, truth, rows=~worms.known)
    plotting.plot_reliability(curve, ax=ax)
    ax.set_title(f"{title}\ncalibration error {curve.calibration_error:.3f}")
page.show("5_reliability", figure)
correct = (by_svi.argmax(-1) == index)[~worms.known]
for title, marginals in {"guide": by_svi, "guide, exchanges put in": mixed}.items():
    sure = marginals.amax(-1)[~worms.known] > 0.9
    share = float(correct[sure].double().mean())
    print(f"{title}: {int(sure.sum())} of {len(sure)} unknown neurons get more than .9; {share:.3f} of these are right")

# %% [markdown]
# Where the search has not found the optimum, exchanges do not tell of all the doubt that is due. Then simulate worms like
# yours with the answer as their truth, fit them in the same way, and correct by what you see: `pgs.recalibrate`, or
# `--simulations` of the command below.

# %% [markdown]
# ## Your own worms
#
# `python -m tutorials.celegans.own worm1.csv worm2.nwb` does all this for recordings in CSV, npz or NWB files: worms that
# show a part of the neurons, known names where you have them, positions laid onto an atlas, and a report that opens in a
# browser. Ten lines of Python that do the same are in [the package's README](README.md). `python -m tutorials.celegans`
# compares this guide with other methods, and `python -m tutorials.celegans.sweep` runs whole tables of them.

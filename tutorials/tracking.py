# %% tags=["remove-cell"]
"""Data association of moving targets with missed and false detections: frame by frame, exact, MCMC and variational."""

# %% [markdown]
# # Which blip is which target?
#
# A radar sees eight targets cross a plane. In every frame some targets are missed, sometimes there is a blip where no
# target is, and no blip says whose it is. To follow the targets is to match the detections of every frame to targets:
# a partial matching a frame. The usual tracker decides frame after frame and never looks back. Here the matchings of
# all frames are latent variables of one Pyro model, so that a later frame can settle an earlier one, and so that the
# answer comes with a probability: where two tracks cross, the truth is that nobody knows, and a tracker should say
# so.
#
# It runs top to bottom in a few minutes on one core; `python -m tutorials.tracking --full` takes more scenes and
# longer chains. Run so, its pictures go to `results/tracking`.

# %%
import math

import matplotlib.pyplot as plt
import pyro
import torch
from pyro.infer import MCMC, SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor

import pyro_gs as pgs
from pyro_gs import plotting
from tutorials.page import Page

page = Page("tracking", "data association of moving targets with missed and false detections")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
pyro.set_rng_seed(1)

SCENES = {"quick": 1, "default": 4, "full": 20}[page.size]
STEPS = {"quick": 5, "default": 300, "full": 2000}[page.size]
SAMPLES = {"quick": 16, "default": 300, "full": 3000}[page.size]

# %% [markdown]
# ## The data
#
# Each coordinate of a target is Gaussian: a known start and velocity, up to small errors, and a velocity that wobbles
# (an integrated Wiener process, the usual "nearly constant velocity"). All positions of a track are then one Gaussian
# vector, whose covariance over the twelve frames is `half @ half.mT`. The targets come in pairs whose paths are
# expected to cross.
#
# A target is detected with probability .85, with noise of .2. False detections have a source of their own, which
# emits with probability .4, anywhere. `detections` has a row for every source, the empty ones last; `seen` says which
# rows are detections, and their order means nothing. Column `n - 1` of `truth` is the source of false ones.

# %% mystnb={"image": {"alt": "tracks of eight targets in pairs that cross, with their detections and false ones"}}
frames, targets, side = 12, 8, 10.0
noise, wobble, detected, false = 0.2, 0.04, 0.85, 0.4

time = torch.arange(float(frames))
early, late = torch.minimum(time[:, None], time), torch.maximum(time[:, None], time)
covariance = 0.1**2 + 0.02**2 * early * late + wobble**2 * early**2 * (3 * late - early) / 6
half = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(frames))


def expected(count: int) -> Tensor:
    """Expected positions (frames, count, 2) of targets in pairs that cross."""
    pair, upper = torch.arange(count) // 2, torch.arange(count) % 2
    start = torch.stack([0.4 * pair, 1.4 + 2.4 * pair + 1.1 * (upper - 0.5)], -1)
    return start + time[:, None, None] * torch.stack([torch.full((count,), 0.8), -1.1 / 11 * (2.0 * upper - 1)], -1)


def simulate(scenes: int, mean: Tensor, false: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions (scenes, frames, targets, 2), detections (scenes, frames, n, 2), which rows are, and true matchings."""
    count = mean.shape[-2]
    positions = mean + torch.einsum("ts,nskc->ntkc", half, torch.randn(scenes, frames, count, 2))
    blips = positions + noise * torch.randn_like(positions)
    rates = torch.full((count,), detected)
    if false is not None:
        blips = torch.cat([blips, side * torch.rand(scenes, frames, 1, 2)], -2)
        rates = torch.cat([rates, torch.tensor([false])])
    emits = torch.rand(blips.shape[:-1]) < rates
    order = (torch.rand(emits.shape) + ~emits).argsort(-1)  # at random, the empty rows last
    return positions, blips.gather(-2, order[..., None].expand_as(blips)), emits.gather(-1, order), pgs.to_matrix(order)


mean = expected(targets)
positions, detections, seen, truth = simulate(SCENES, mean, false)
print(f"{int(seen.sum())} detections, {int(truth[..., -1][seen].sum())} of them false")

figure, ax = plt.subplots(figsize=(7.5, 5.5), layout="constrained")
for k in range(targets):
    ax.plot(*positions[0, :, k].T, color=f"C{k}", linewidth=1)
    ax.annotate(str(k), tuple(positions[0, 0, k].tolist()), xytext=(-12, -3), textcoords="offset points", color=f"C{k}")
ax.scatter(detections[0][seen[0]][:, 0], detections[0][seen[0]][:, 1], s=14, color="0.3", zorder=3, label="detections")
wrong = detections[0][seen[0] & (truth[0, ..., -1] > 0)]
ax.scatter(wrong[:, 0], wrong[:, 1], s=90, facecolors="none", edgecolors="tab:red", label="false")
ax.set_title("one scene: true tracks, and what is seen")
ax.legend(loc="upper left", fontsize="small")
page.show("1_data", figure)

# %% [markdown]
# ## The model
#
# Every frame is a permutation of rows and sources: `P[t, i, j] = 1` says that row i of frame t is of source j. A row
# without a detection that is matched to a target says that the target was missed. So partial matchings are
# permutations, and nothing counts twice: the empty rows of a frame can be exchanged in the same number of ways
# whatever the matching. (More than one false detection a frame would take more columns like the last, and where their
# number has no bound [pad_logits](../docs/how_to/partial_matching.md).)
#
# The positions are Gaussian given the matchings, so they are integrated out in closed form: what remains is a model
# of permutations alone. With `w` the weight of a detection in a track, the integrand is the exponential of a
# quadratic in the positions, also where `w` lies between zero and one, so the relaxed model needs nothing new.


# %%
def pool(P: Tensor, detections: Tensor, seen: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each track, the weight of its detections a frame, their information, their squares, and the Cholesky factor."""
    w = torch.where(seen[..., None], P, 0.0)[..., : mean.shape[-2]]
    off = detections[..., :, None, :] - mean[..., None, :, :]
    weight = w.sum(-2).mT
    information = (w[..., None] * off).sum(-3).movedim(-2, -3) / noise**2
    squares = (w * off.square().sum(-1)).sum((-3, -2, -1)) / noise**2
    factor = torch.linalg.cholesky(torch.eye(frames) + half.mT @ (weight[..., None] / noise**2 * half))
    return weight, information, squares, factor


def log_density(P: Tensor, detections: Tensor, seen: Tensor, mean: Tensor) -> Tensor:
    """Log density of all detections of a scene given the matchings (..., frames, n, n), positions integrated out."""
    weight, information, squares, factor = pool(P, detections, seen, mean)
    whitened = torch.linalg.solve_triangular(factor, half.mT @ information, upper=False)
    volume = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))  # two coordinates
    fit = 0.5 * whitened.square().sum((-3, -2, -1)) - volume - 0.5 * squares
    hit = math.log(detected / (1 - detected)) - math.log(2 * math.pi * noise**2)
    stray = math.log(false / (1 - false)) - math.log(side**2)
    strays = torch.where(seen, P[..., mean.shape[-2] :].sum(-1), 0.0).sum((-2, -1))
    total: Tensor = fit + hit * weight.sum((-2, -1)) + stray * strays
    return total


def model(detections: Tensor, seen: Tensor, mean: Tensor) -> None:
    """Scenes of frames; what is the same for all matchings is left out."""
    n = seen.shape[-1]
    with pyro.plate("scenes", len(seen)):
        P = pyro.sample("P", pgs.UniformPermutation(n).expand([frames]).to_event(1))
        pyro.factor("detections", log_density(P, detections, seen, mean))


# %% [markdown]
# Two lines say what a frame is: `expand([frames]).to_event(1)` makes the permutations of a scene one site, since they
# depend on each other through the tracks; scenes are independent, in a plate.
#
# ## Two that cross, exactly
#
# First only two targets, without false detections. Each frame then has two matchings, the scene 4,096, and
# `enumerate_posterior` goes through them. A detection is coloured by the probability that it is of target 0.

# %% mystnb={"image": {"alt": "two tracks that cross, detections coloured by the probability that they are of the first"}}
pyro.set_rng_seed(11)
pair = expected(2)
pair_positions, pair_detections, pair_seen, pair_truth = simulate(1, pair, None)
data = (pair_detections, pair_seen, pair)
exact = pgs.enumerate_posterior(model, *data)
probability = exact.marginals["P"][0, ..., 0]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for k in range(2):
    left.plot(*pair_positions[0, :, k].T, color="0.6", linestyle="-:"[k], label=f"target {k}, true")
dots = left.scatter(
    *pair_detections[pair_seen].T,
    c=probability[pair_seen[0]],
    cmap="coolwarm",
    vmin=0,
    vmax=1,
    edgecolors="k",
    linewidths=0.5,
)
figure.colorbar(dots, ax=left, label="probability of target 0")
left.set(title="detections", xlabel="x", ylabel="y, stretched")
left.legend(fontsize="small")
best = exact.log_probs.argsort(descending=True)[:8]
right.bar(range(8), exact.log_probs[best].exp(), color="tab:blue")
right.set_xlabel("the eight most probable scenes")
right.set_ylabel("posterior probability")
page.show("2_crossing", figure)

alone = pgs.summary(exact).sites["P"].entropy[0, :, 0].sum()
print(f"entropy of the frames together {exact.entropy:.2f} nats, sum of each alone {alone:.2f}")

# %% [markdown]
# Frames agree with each other: if the tracks changed sides, then from there on in every frame. The entropy of all
# frames together is therefore much smaller than the sum of what each has alone. A guide with independent frames
# cannot say that. And a chain that exchanges in one frame at a time has to go from one story to the other through
# scenes that fit neither: `ParallelTempering` has warmer replicas that do not mind. Below is the probability that
# each gives to the true matching of a frame.


# %% mystnb={"image": {"alt": "probability of the true matching by frame: exact, swaps, tempering and SVI"}}
def chain(kernel: pgs.SwapMetropolis | pgs.ParallelTempering, *data: Tensor, start: Tensor | None = None) -> Tensor:
    """Draws of the matchings (draws, scenes, frames, n, n)."""
    initial = None if start is None else {"P": start}
    mcmc = MCMC(kernel, SAMPLES, warmup_steps=SAMPLES // 2, initial_params=initial, disable_progbar=True)
    mcmc.run(*data)
    draws: Tensor = mcmc.get_samples()["P"]
    return draws


def fit(*data: Tensor, start: Tensor, temperature: float = 0.5) -> Tensor:
    """Draws of the matchings (draws, scenes, frames, n, n) from a guide."""
    pyro.clear_param_store()
    init = pgs.init_to_matching({"P": start}, strength=3.0)
    guide = pgs.AutoGumbelSinkhorn(model, temperature=temperature, init_logits=init)
    relaxed = pgs.relax(model, temperature=temperature)
    svi = SVI(relaxed, guide, ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / STEPS)}), Trace_ELBO())
    for _ in range(STEPS):
        svi.step(*data)
    draws: Tensor = guide.hard_sample((500,))["P"]
    return draws


found = {
    "exact": exact.marginals["P"],
    "tempering": chain(pgs.ParallelTempering(model), *data).mean(0),
    "swaps": chain(pgs.SwapMetropolis(model), *data).mean(0),
    "SVI": fit(*data, start=exact.map["P"]).mean(0),
}
figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, P in found.items():
    distance = 0.5 * (P - exact.marginals["P"]).abs().sum(-1).mean()
    print(f"{name}: {distance:.3f} from the exact marginals in total variation")
    ax.plot((P * pair_truth)[0].sum((-2, -1)) / 2, marker=".", label=name)
ax.set(xlabel="frame", ylabel="probability of the truth", ylim=(-0.03, 1.03))
ax.legend(fontsize="small")
page.show("3_story", figure)

# %% [markdown]
# Tempering is nearest to the exact answer. Swaps alone stay in the story that they fell into at the start, and the
# guide in the one it was given: its frames are independent, and such a law can fit one story only.
#
# ## Eight targets, frame by frame
#
# Eight targets and a source of false detections have 9! matchings a frame. The usual tracker predicts every target
# from the past, scores all pairs and takes the best assignment (Hungarian, here `pgs.matching`), then goes to the
# next frame. A simpler one gives each detection to its best source, whoever else has it: nearest neighbour.


# %%
def tracks(P: Tensor, detections: Tensor, seen: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Positions given the matchings: means (..., frames, targets, 2) and variances (..., frames, targets)."""
    _, information, _, factor = pool(P, detections, seen, mean)
    centre = half @ torch.cholesky_solve(half.mT @ information, factor)
    spread = torch.linalg.solve_triangular(factor, half.mT.expand_as(factor), upper=False).square().sum(-2)
    return mean + centre.movedim(-3, -2), spread.mT


def frame_by_frame(nearest: bool) -> Tensor:
    """Matrices (scenes, frames, n, n), each given those of the frames before it."""
    P = torch.zeros_like(truth)
    for t in range(frames):
        centre, spread = (part[:, t, None] for part in tracks(P, detections, seen, mean))
        variance = spread + noise**2
        squares = (detections[:, t, :, None] - centre).square().sum(-1)
        hit = math.log(detected / (1 - detected)) - (2 * math.pi * variance).log() - 0.5 * squares / variance
        stray = torch.full_like(hit[..., :1], math.log(false / (1 - false)) - math.log(side**2))
        scores = torch.where(seen[:, t, :, None], torch.cat([hit, stray], -1), 0.0)
        P[:, t] = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]) if nearest else pgs.matching(scores)
    return P


hungarian = frame_by_frame(nearest=False)
answers = {"nearest neighbour": frame_by_frame(nearest=True), "frame by frame": hungarian}

# %% [markdown]
# ## Eight targets, all frames at once
#
# For eight targets we start the chain and the guide at the tracker's answer: a draw from the prior is a hopeless
# start. Scenes are run one by one, the guide takes them all at once.

# %%
parts = [(detections[s : s + 1], seen[s : s + 1], mean) for s in range(SCENES)]
starts = hungarian.split(1)
powers = [0.15, 0.3, 0.55, 1.0]  # of the likelihood; the prior alone would help no one
chains = [
    chain(pgs.ParallelTempering(model, powers=powers), *part, start=start) for part, start in zip(parts, starts, strict=True)
]
draws = torch.cat(chains, 1)
posteriors = {
    "SVI": fit(detections, seen, mean, start=hungarian).mean(0),
    "MCMC": draws.mean(0),
}

# %% [markdown]
# The rows that count are the detections (`seen`), not the empty ones, which stand for each other. A posterior's
# answer is the likeliest source of each; the reliability curve asks whether answers with probability .8 are right
# eight times in ten. The last lines say whether the chains have come to where the truth lies: their draws should not
# have a lower log density than it has.

# %% mystnb={"image": {"alt": "reliability curves of the guide and of the chains"}}
for name, P in (answers | posteriors).items():
    curve = pgs.reliability(P, truth, rows=seen)
    right = float((curve.count * curve.accuracy).sum() / curve.count.sum())
    print(f"{name}: {right:.3f} of the detections right", end="")
    print(f", says {float((curve.count * curve.confidence).sum() / curve.count.sum()):.3f}")
for name, P in {"truth": truth, "frame by frame": hungarian, "MCMC, mean of draws": draws}.items():
    density = log_density(P, detections, seen, mean).reshape(-1, SCENES).mean(0)
    print(f"log density by scene, {name}: {density.round(decimals=1).tolist()}")

figure, panels = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
for ax, (name, P) in zip(panels, posteriors.items(), strict=True):
    plotting.plot_reliability(pgs.reliability(P, truth, rows=seen), ax=ax)
    ax.set_title(f"{name}: {ax.get_title()}", fontsize="medium")
page.show("4_reliability", figure)

# %% [markdown]
# A tracker that decides has no probability but one, and the lines above say how often it is right. The chains say how
# sure they are, frame by frame, and are much nearer to being right about it than the guide, if still too sure of what
# they never left. That is the picture to look at. Left are the tracks of forty draws, each target
# in its colour, with the detections: where lines of two colours lie on each other, the draws disagree on who is who.
# Right is the posterior over the matchings of the frame with most doubt, the truth as crosses; rows below the last
# detection are empty ones.

# %% mystnb={"image": {"alt": "tracks of draws from the posterior, and marginals of the most doubtful frame"}}
doubt = torch.where(seen, pgs.summary({"P": draws})["P"].entropy, 0.0).sum(-1)
scene, frame = divmod(int(doubt.argmax()), frames)
lines, _ = tracks(draws[:: max(1, SAMPLES // 40), scene], detections[scene], seen[scene], mean)
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", width_ratios=[1.5, 1])
for k in range(targets):
    left.plot(*lines[..., k, :].permute(2, 1, 0), color=f"C{k}", linewidth=0.6, alpha=0.25)
left.scatter(*detections[scene][seen[scene]].T, s=14, color="0.3", zorder=3)
left.scatter(*detections[scene, frame][seen[scene, frame]].T, s=60, facecolors="none", edgecolors="k", zorder=3)
left.set_title(f"scene {scene}: tracks of the chain's draws; circles: frame {frame}")
plotting.plot_marginals(posteriors["MCMC"][scene, frame], truth=truth[scene, frame], ax=right)
right.set(xlabel=f"source ({targets}: false)", ylabel=f"row ({int(seen[scene, frame].sum())} detections)")
page.show("5_tracks", figure)

# %% [markdown]
# ## What to use
#
# - **Frame by frame** where targets stay apart: it is right there, and fast.
# - **Exact** on small knots: take the two or three targets that come near each other and the detections around them,
#   and enumerate.
# - **MCMC** on all: start it at the tracker's answer. Where stories are far apart, `ParallelTempering`; its price is
#   a chain a temperature.
# - **SVI** for many scenes at once, or to learn noise and rates with a network; its frames are independent, so
#   believe its marginals less than a chain's.
#
# The next steps are unknown rates and noise: give them priors, and `HMCGibbs` moves them beside the matchings
# ([record linkage](linkage.py) does it). [Choosing](../docs/choosing.md) is the longer answer on methods.

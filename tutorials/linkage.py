# %% tags=["remove-cell"]
"""Record linkage: which row of one table is which of another, with the noise of the columns learnt along."""

# %% [markdown]
# # Which record is which?
#
# Two registers hold many of the same people, without a common number. Names have typos, years are mistaken, heights
# were taken with two different rulers. Which rows are the same person? The answer is a partial matching: each row has
# one partner in the other table or none. The textbook scores every pair, column by column, and takes what scores
# best. But a score says how much a disagreement weighs, and that depends on how often typos and mistakes happen,
# which nobody has told us. Here the matching and the noise of the columns are latent variables of one Pyro model, and
# every link comes with a probability.
#
# It runs top to bottom in a few minutes on one core; `python -m tutorials.linkage --full` takes larger tables and
# longer chains. Run so, its pictures go to `results/linkage`.

# %%
import random
import string

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib.patches import Rectangle
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import ClippedAdam
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from torch import Tensor

import pyro_gs as pgs
from pyro_gs import plotting
from tutorials.page import Page

page = Page("linkage", "links between two tables, with the noise of their columns learnt along")
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
pyro.set_rng_seed(0)  # of Python's random too

PEOPLE = {"quick": 30, "default": 100, "full": 150}[page.size]
STEPS = {"quick": 5, "default": 300, "full": 2000}[page.size]
SAMPLES = {"quick": 10, "default": 500, "full": 2000}[page.size]

# %% [markdown]
# ## The data
#
# People live in towns, in families that share a surname, and stand in each table with probability .75. The second
# table has their names with typos (one more with probability .35, and so on), a wrong year with probability .15, and
# heights that are off by several centimetres. Both tables are in an order of their own; here they are sorted by town,
# which is always right.

# %%
FIRST = (
    "Anna Anne Hanna Hannah Johanna Jana Jan Jann Maria Marie Mario Marion Lena Lene Lea Leah Stefan Stephan Steffen Sofia "
    "Sophie Lukas Luca Markus Marc Marco Martin Martina Julia Julian Juliane Nina Nino Christian Christina Kristina"
).split()
LAST = (
    "Meier Meyer Maier Mayer Schmidt Schmitt Schmied Becker Bäcker Fischer Fisher Weber Wagner Wegner Hofmann Hoffmann Koch "
    "Kock Richter Ritter Klein Kleine Wolf Wolff Schroeder Schröter Neumann Naumann Schwarz Schwartz"
).split()
TOWNS = "Aldorf Brunn Cella Dahlen Eschau Furth Gera Hagen Ilmenau Jever Kassel Lahr".split()
height_error, year_error, typo = 3.5, 0.15, 0.35


def garble(name: str) -> str:
    """A name with typos."""
    while random.random() < typo:
        k, letter = random.randrange(1, len(name)), random.choice(string.ascii_lowercase)
        name = random.choice([name[:k] + name[k + 1 :], name[:k] + letter + name[k:], name[:k] + letter + name[k + 1 :]])
    return name


def register(people: pd.DataFrame) -> pd.DataFrame:
    """Some of the people, sorted by town only."""
    shuffled = people.sample(frac=1, random_state=random.randrange(2**31))
    return shuffled[[random.random() < 0.75 for _ in range(len(people))]].sort_values("town", kind="stable")


towns = [random.choice(TOWNS) for _ in range(PEOPLE)]
families = {town: random.sample(LAST, 4) for town in TOWNS}
people = pd.DataFrame(
    {
        "name": [f"{random.choice(FIRST)} {random.choice(families[town])}" for town in towns],
        "year": [random.randrange(1985, 2000) for _ in towns],
        "height": [round(random.gauss(174, 9)) for _ in towns],
        "town": towns,
    }
)
first, second = register(people), register(people)
second["name"] = second["name"].map(garble)
second["year"] = [random.randrange(1985, 2000) if random.random() < year_error else year for year in second["year"]]
second["height"] = [round(random.gauss(height, height_error)) for height in second["height"]]
m, n = len(first), len(second)
truth = torch.tensor(first.index.to_numpy()[:, None] == second.index.to_numpy()).double()
first, second = first.reset_index(drop=True), second.reset_index(drop=True)
print(f"{m} and {n} records, {int(truth.sum())} people in both")
print(first.head(4).to_string(), second.head(4).to_string(), sep="\n\n")

# %% [markdown]
# ## Pairs
#
# Only people of one town are compared: the block. For every pair we need how well the columns agree: the edit
# distance of the names, whether the years agree, the difference of the heights. What chance does is seen in the pairs
# of different towns, which are nobody's links: `chance` is the log probability of a comparison there.

# %%
distance = torch.tensor(cdist(first["name"].tolist(), second["name"].tolist(), scorer=Levenshtein.distance)).long()
agree = torch.tensor(first["year"].to_numpy()[:, None] == second["year"].to_numpy())
gap = torch.tensor(first["height"].to_numpy()[:, None] - second["height"].to_numpy()).double()
block = torch.tensor(first["town"].to_numpy()[:, None] == second["town"].to_numpy())
print(f"{int(block.sum())} of {m * n} pairs are in one town")

counts = torch.bincount(distance[~block], minlength=int(distance.max()) + 1) + 0.5
same = agree[~block].double().mean()
chance = (counts / counts.sum()).log()[distance] + torch.where(agree, same, 1 - same).log()
chance = chance + dist.Normal(0.0, gap[~block].square().mean().sqrt()).log_prob(gap)


def weights(typo: Tensor, year: Tensor, height: Tensor) -> Tensor:
    """How much more probable the comparisons of a pair are if it is a link, log, (..., m, n)."""
    typo, year, height = (value[..., None, None] for value in (typo, year, height))
    names = distance * typo.log() + (1 - typo).log()
    years = torch.where(agree, (1 - year).log(), year.log())
    total: Tensor = names + years + dist.Normal(0.0, height).log_prob(gap) - chance
    return total


# %% [markdown]
# ## With fixed weights
#
# Guess the noise: one name in ten has a typo, one year in fifty is wrong, heights agree to a centimetre. Greedy takes
# the best pair while its weight is positive; the Hungarian method, `pgs.matching` with `unmatched`, takes the best
# sum.

# %%
guess = {"typo": torch.tensor(0.1), "year": torch.tensor(0.02), "height": torch.tensor(1.0)}
fixed = weights(**guess).masked_fill(~block, -torch.inf)


def greedy(scores: Tensor) -> Tensor:
    """The best pair, then the best of the rest, while they are positive."""
    links, rest = torch.zeros_like(scores), scores.clone()
    while rest.max() > 0:
        i, j = divmod(int(rest.argmax()), n)
        links[i, j], rest[i], rest[:, j] = 1.0, -torch.inf, -torch.inf
    return links


def score(name: str, links: Tensor) -> None:
    """Print the precision and the recall of links, bool (m, n)."""
    right = float((links * truth).sum())
    print(f"{name:26} {int(links.sum()):4} links, precision {right / float(links.sum()):.3f}", end="")
    print(f", recall {right / float(truth.sum()):.3f}")


hungarian = pgs.matching(fixed, unmatched=0.0)
score("greedy, fixed", greedy(fixed))
score("Hungarian, fixed", hungarian)

# %% [markdown]
# Precise, but many links are missing: with heights that agree to a centimetre by decree, a link that differs by seven
# is no link.
#
# ## The model
#
# A partial matching becomes a permutation with stand-ins: below the m rows of the first table, one row for each
# record of the second, beside the n columns of the second, one column for each record of the first. A record without
# a partner takes a stand-in. All that is of different towns is forbidden, so the matrix falls apart into towns, and
# the library sees that.
#
# A partial matching with r links in a town of m and n records stands for `m! n! / r!` permutations, and the prior has
# to make up for it. With the prior of Sadinle (2017), every number of links equally probable and, given it, every
# matching, what remains is one over `C(m, r) C(n, r)`. The noise of each column has a vague prior. That is the whole
# difference from fixed weights.

# %%
codes = pd.factorize(pd.concat([first["town"], second["town"]]))[0]
member = torch.nn.functional.one_hot(torch.tensor(codes)).double()  # (m + n, towns)
sizes = torch.stack([member[:m].sum(0), member[m:].sum(0)])
prior = pgs.UniformPermutation(m + n, allowed=(member @ member.roll(-m, 0).T) > 0)


def log_ways(r: Tensor) -> Tensor:
    """Log of the product over towns of C(m, r) C(n, r), for numbers of links (..., towns)."""
    choose = (sizes + 1).lgamma() - (r[..., None, :] + 1).lgamma() - (sizes - r[..., None, :] + 1).lgamma()
    return choose.sum((-2, -1))


def model() -> None:
    """Links, and the noise of the columns."""
    typo = pyro.sample("typo", dist.Beta(1.0, 4.0))
    year = pyro.sample("year", dist.Beta(1.0, 4.0))
    height = pyro.sample("height", dist.LogNormal(0.0, 1.0))
    P = pyro.sample("P", prior)
    links = pgs.unpad(P, (m, n))
    pyro.factor("number", -log_ways(links.sum(-1) @ member[:m]))
    pyro.factor("comparisons", (links * weights(typo, year, height)).sum((-2, -1)))


# %% [markdown]
# ## MCMC
#
# `HMCGibbs` moves the permutation by exchanges of two rows and the noise by NUTS. An exchange changes four entries,
# which a model may say with an attribute `swap_delta`; then hundreds of exchanges cost one small sum. The library
# compares it with the model before it believes it.


# %%
def swap_delta(swaps: pgs.Swaps) -> Tensor:
    """Change of the log density by exchanges of two rows' columns."""
    noise = {name: swaps.others.get(name, guess[name]) for name in guess}
    table = torch.nn.functional.pad(weights(**noise), (0, m, 0, n))
    index = swaps.index[0]
    (a, b), (of_a, of_b) = swaps.rows.T, index[swaps.rows].T
    change = table[a, of_b] + table[b, of_a] - table[a, of_a] - table[b, of_b]
    linked = (index[:m] < n).double() @ member[:m]
    more = [((row < m) & (column < n)).double() for row, column in ((a, of_b), (b, of_a), (a, of_a), (b, of_b))]
    then = linked + (more[0] + more[1] - more[2] - more[3])[:, None] * member[a]
    return change + log_ways(linked) - log_ways(then)


def square(links: Tensor) -> Tensor:
    """Matchings (..., m, n), or their marginals, as doubly stochastic (..., m + n, m + n): stand-ins have one owner each."""
    alone = [torch.diag_embed(1 - links.sum(dim)) for dim in (-1, -2)]
    return torch.cat([torch.cat([links, alone[0]], -1), torch.cat([alone[1], links.mT], -1)], -2)


model.swap_delta = swap_delta  # type: ignore[attr-defined]
kernel = pgs.HMCGibbs(NUTS(model), moves=pgs.SwapMetropolis())
start = {"P": square(hungarian)}
mcmc = MCMC(kernel, num_samples=SAMPLES, warmup_steps=SAMPLES // 4, initial_params=start, disable_progbar=True)
mcmc.run()
draws = mcmc.get_samples()
links = pgs.unpad(draws["P"], (m, n))
print(pgs.convergence({"P": square(links)}))

# %% [markdown]
# A draw has its stand-ins in any order. `square` gives them an owner each, so that a matching is one permutation
# again, and `convergence`, `summary`, `reliability` and the pictures speak of people.
#
# For comparison the same chain with the noise fixed at the guess:

# %%
certain = poutine.condition(model, data=guess)
certain.swap_delta = swap_delta  # type: ignore[attr-defined]
believed = MCMC(
    pgs.SwapMetropolis(certain),
    num_samples=SAMPLES,
    warmup_steps=SAMPLES // 4,
    initial_params=start,
    disable_progbar=True,
)
believed.run()

# %% [markdown]
# ## SVI
#
# The guide is a Gumbel-Sinkhorn law for the permutation and a normal one for the noise. It starts at the Hungarian
# links.

# %%
pyro.clear_param_store()
temperature = 0.5
guide = AutoGuideList(model)
init = pgs.init_to_matching(start)
guide.append(pgs.AutoGumbelSinkhorn(poutine.block(model, expose=["P"]), temperature=temperature, init_logits=init))
guide.append(AutoNormal(poutine.block(model, hide=["P"]), init_scale=0.1))
svi = SVI(
    pgs.relax(model, temperature=temperature), guide, ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / STEPS)}), Trace_ELBO()
)
for _ in range(STEPS):
    svi.step()
fitted = Predictive(model, guide=pgs.harden(guide), num_samples=300)()

# %% [markdown]
# ## What the noise is
#
# The links teach the noise and the noise the links. The dashed line is what the fixed weights took for granted. The
# noise by SVI lies above that of the chain: a relaxed matrix spreads over wrong pairs, and takes their disagreement
# for noise.

# %% mystnb={"image": {"alt": "posteriors of the noise of the three columns, with the truth and the guess"}}
figure, panels = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for ax, (name, value) in zip(panels, {"typo": typo, "year": year_error, "height": height_error}.items(), strict=True):
    print(
        f"{name}: {float(draws[name].mean()):.3f} +- {float(draws[name].std()):.3f}, truth {value}, guess {guess[name]:.2f}"
    )
    for label, found in (("MCMC", draws), ("SVI", fitted)):
        ax.hist(found[name].flatten(), bins=25, density=True, histtype="step", label=label)
    ax.axvline(value, color="k", linestyle=":", label="truth")
    ax.axvline(float(guess[name]), color="tab:red", linestyle="--", label="guess")
    ax.set_xlabel(name)
panels[0].set_ylabel("posterior density")
panels[0].legend(fontsize="small")
page.show("1_noise", figure)

# %% [markdown]
# ## The links
#
# A posterior gives every pair a probability. Accept those above one half, and compare. The last column says whether
# the probabilities can be trusted: of the answers given to the records of the first table (a partner, or none), the
# gap between their probability and the share that is right.

# %%
posteriors = {
    "MCMC, fixed noise": pgs.unpad(believed.get_samples()["P"], (m, n)).mean(0),
    "SVI": pgs.unpad(fitted["P"], (m, n)).mean(0).reshape(m, n),
    "MCMC": links.mean(0),
}
mine = torch.arange(m + n) < m
for name, p in posteriors.items():
    score(name, p > 0.5)
    print(f"{'':26} calibration error {pgs.reliability(square(p), square(truth), rows=mine).calibration_error:.3f}")

# %% [markdown]
# Compare the recall with noise fixed and with noise learnt. What probabilities are for is the choice of a threshold:
# above a high one what remains goes through unseen, and what lies between goes to a clerk.

# %% mystnb={"image": {"alt": "precision and recall by threshold, and reliability of the chain"}}
for threshold in (0.1, 0.5, 0.9, 0.99):
    score(f"MCMC, above {threshold}", posteriors["MCMC"] > threshold)

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.4), layout="constrained")
for name, p in posteriors.items():
    points = []
    for threshold in torch.linspace(0.02, 0.98, 49):
        chosen = p > threshold
        if chosen.any():
            hits = float(truth[chosen].sum())
            points.append((hits / float(truth.sum()), hits / float(chosen.sum())))
    left.plot(*zip(*points, strict=True), marker=".", markersize=3, linewidth=1, label=name)
for label, found, marker in (("greedy, fixed", greedy(fixed), "s"), ("Hungarian, fixed", hungarian, "^")):
    hits = float((found * truth).sum())
    left.plot(hits / float(truth.sum()), hits / float(found.sum()), marker, label=label)
left.set(xlabel="recall", ylabel="precision", title="thresholds from .02 to .98")
left.set_ylim(top=1.01)
left.legend(fontsize="small", loc="lower left")
plotting.plot_reliability(pgs.reliability(square(posteriors["MCMC"]), square(truth), rows=mine), ax=right)
right.set_title(f"MCMC: {right.get_title()}", fontsize="medium")
page.show("2_thresholds", figure)

# %% [markdown]
# ## The posterior over matchings
#
# Left all of it, as `square` makes it: the blocks of the towns, then the stand-ins. Right the town with most doubt,
# the truth in boxes, with the records that the doubt is about.

# %% mystnb={"image": {"alt": "marginals of all records, and the links of the town with most doubt by name"}}
found = pgs.summary({"P": square(links)}, truth=square(truth))
print(found)
doubt = pd.Series(found["P"].entropy[:m].numpy()).groupby(first["town"]).sum()
town = str(doubt.idxmax())
rows, columns = (torch.tensor((table["town"] == town).to_numpy()).nonzero()[:, 0] for table in (first, second))
part, right_links = (x[rows][:, columns] for x in (posteriors["MCMC"], truth))

figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.2), layout="constrained")
plotting.plot_marginals(found, allowed=square(block.double()) != 0, ax=left)
image = right.imshow(part, vmin=0, vmax=1, cmap="Blues")
for i, j in torch.cartesian_prod(torch.arange(len(rows)), torch.arange(len(columns))).tolist():
    if part[i, j] > 0.01:
        right.text(j, i, f"{part[i, j]:.2f}", ha="center", va="center", color="w" if part[i, j] > 0.5 else "k")
    if right_links[i, j]:
        right.add_patch(Rectangle((j - 0.47, i - 0.47), 0.94, 0.94, fill=False, edgecolor="tab:orange", linewidth=2))
labels = [
    [f"{row['name']}, {row['year']}, {row['height']}" for _, row in table.iloc[chosen.numpy()].iterrows()]
    for table, chosen in ((first, rows), (second, columns))
]
right.set_yticks(range(len(rows)), labels[0])
right.set_xticks(range(len(columns)), labels[1], rotation=40, ha="right")
right.set_title(f"links in {town}")
page.show("3_posterior", figure)

# %% [markdown]
# ## What to use
#
# - **Fixed weights** where you know the noise. Then `pgs.matching` is the best single answer, and a chain with
#   `poutine.condition` still gives probabilities.
# - **MCMC** with the noise latent, whenever you can wait: its probabilities include what is not known of the noise.
#   Look at `convergence` before you believe it.
# - **SVI** for large tables: its cost is one Sinkhorn a step; compare it with a chain on a few blocks.
# - **Exact**: blocks of up to about seven records with fixed noise, by `GibbsMatching`, whose marginals are exact.
#
# Blocks that can be wrong are a column like the others: allow the pairs and give a disagreement its weight. Missing
# values are a weight of zero. [Partial matchings](../docs/how_to/partial_matching.md), [forbidden
# pairs](../docs/how_to/forbid_pairs.md) and [choosing](../docs/choosing.md) have more.

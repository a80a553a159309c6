"""Whether a kernel leaves enumerated posteriors invariant, and finds them from a wrong start: exact for every replica.

Replicas of a chain are independent, so the counts of their states after some steps are multinomial, and a chi-square test
against the enumerated posterior fails by chance at the stated rate, whatever the autocorrelation of the kernel.
"""

import itertools

import pyro
import pyro.distributions as dist
import torch
from enumeration import goodness_of_fit
from matching_model import noisy_points
from pyro import poutine
from pyro.infer import MCMC

import pyro_gs as pgs
from pyro_gs.infer.log_joint import LogJoint
from pyro_gs.infer.mcmc.chain import Chain

FAILURE_RATE = 2e-5


class Target:
    """A model whose latent sites are all permutations, with its posterior by going through all of its states.

    Attributes:
        joint: the log joint density, as the kernels use it.
        states: all states of positive density by site, long (S, items, n).
        probability: of the states, (S,).
    """

    def __init__(self, model, *args):
        self.model, self.args = model, args
        self.joint = LogJoint(model, args)
        sites = self.joint.sites
        parts = [(name, item) for name, site in sites.items() for item in range(site.num_items)]
        lists = []
        for name, item in parts:
            allowed = sites[name].allowed
            rows = itertools.permutations(range(sites[name].n))
            lists.append([p for p in rows if allowed is None or all(allowed[item, i, j] for i, j in enumerate(p))])
        drawn = {name: [] for name in sites}
        for state in itertools.product(*lists):
            for name in sites:
                drawn[name].append([p for (key, _), p in zip(parts, state, strict=True) if key == name])
        states = {name: torch.tensor(rows) for name, rows in drawn.items()}
        # by Pyro's own trace, one state after the other: what the kernels use is not trusted here
        log_p = torch.stack(
            [
                poutine.trace(poutine.condition(model, {n: s.to_value(states[n][k]) for n, s in sites.items()}))
                .get_trace(*args)
                .log_prob_sum()
                for k in range(len(next(iter(states.values()))))
            ]
        )
        positive = log_p > -torch.inf
        self.states = {name: rows[positive] for name, rows in states.items()}
        self.probability = torch.softmax(log_p[positive].double(), 0)

    def draw(self, replicas):
        """Independent draws from the posterior, dict of long (replicas, items, n)."""
        chosen = torch.multinomial(self.probability, replicas, replacement=True)
        return {name: rows[chosen] for name, rows in self.states.items()}

    def worst(self, replicas):
        """All replicas at the least probable state."""
        k = int(self.probability.argmin())
        return {name: rows[k].expand(replicas, *rows[k].shape).clone() for name, rows in self.states.items()}

    def marginals(self):
        """Posterior means of the matrices by site, (*item_shape, n, n)."""
        sites = self.joint.sites
        return {
            name: torch.einsum("s,s...->...", self.probability.to(site.dtype), site.to_value(self.states[name]))
            for name, site in sites.items()
        }

    def p_value(self, index):
        """p-value of independent states, dict of long (replicas, items, n), against the posterior."""
        cells = {tuple(row): k for k, row in enumerate(_flat(self.states).tolist())}
        found = torch.tensor([cells[tuple(row)] for row in _flat(index).tolist()])
        return goodness_of_fit(torch.bincount(found, minlength=len(cells)), self.probability)


def _flat(index):
    return torch.cat([rows.flatten(1) for rows in index.values()], 1)


def check_invariant(kernel, target, *, replicas=2000, steps=2, warmup=0):
    """Draws from the posterior are draws from it after some steps, made after a warm-up where the kernel adapts."""
    chain = Chain(target.joint, target.draw(replicas))
    kernel.bind(chain, warmup)
    for _ in range(warmup):
        kernel.step()
    start = target.draw(replicas)
    chain.set(start, {})
    for _ in range(steps):
        kernel.step()
    moved = (_flat(chain.index) != _flat(start)).any(1).double().mean()
    assert moved > 0.05, f"only {float(moved):.3f} of the replicas have moved, which shows little"
    _agree(target, chain.index)


def check_converges(kernel, target, *, replicas=2000, steps=30):
    """Started at the least probable state, replicas are draws from the posterior in the end."""
    chain = Chain(target.joint, target.worst(replicas))
    kernel.bind(chain, 0)
    for _ in range(steps):
        kernel.step()
    _agree(target, chain.index)


def check_mcmc(kernel, target, *, num_samples=400, warmup_steps=50, thin=5):
    """Under ``MCMC``: the sites in the samples, diagnostics, and a thinned chain that looks drawn from the posterior.

    Thinned states are taken as independent; ``thin`` must be several autocorrelation times.
    """
    mcmc = MCMC(kernel, num_samples=num_samples * thin, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run(*target.args)
    samples = mcmc.get_samples()
    assert set(samples) == set(target.joint.sites)
    assert 0 < mcmc.diagnostics()["acceptance rate"]["chain 0"] <= 1
    index = {name: site.to_items(samples[name])[::thin] for name, site in target.joint.sites.items()}
    _agree(target, index)


def _agree(target, index):
    p_value = target.p_value(index)
    assert p_value > FAILURE_RATE, f"the states differ from the posterior, p = {p_value:.2g}"


def swap_hook(target):
    """A ``swap_delta`` hook for any target, by its log joint density."""
    sites = target.joint.sites

    def hook(swaps):
        count, each = len(swaps.items), torch.arange(len(swaps.items))[:, None]
        index = swaps.index.repeat(count, 1, 1)
        index[each, swaps.items[:, None], swaps.rows] = swaps.index[swaps.items[:, None], swaps.rows.flip(-1)]
        now = {**swaps.others, swaps.site: sites[swaps.site].to_value(swaps.index)}
        new = {**swaps.others, swaps.site: sites[swaps.site].to_value(index)}
        return target.joint.evaluate(new, {}, count).total.sum(0) - target.joint.evaluate(now, {}, None).total.sum(0)

    return hook


# Targets


def points(n=4, scale=1.0, seed=0):
    """One permutation, all allowed."""

    def model(x, y):
        P = pyro.sample("P", pgs.UniformPermutation(n))
        pyro.sample("y", dist.Normal(P @ x, scale).to_event(2), obs=y)

    return Target(model, *noisy_points(n, scale, seed))


def masked(n=5, scale=1.5, seed=1):
    """A mask of 13 permutations (n = 5) in which exchanges lead from the identity nowhere."""
    eye = torch.eye(n, dtype=torch.bool)
    allowed = eye | eye.roll(1, 1) | eye.roll(2, 1)

    def model(x, y):
        P = pyro.sample("P", pgs.UniformPermutation(n, allowed))
        pyro.sample("y", dist.Normal(P @ x, scale).to_event(2), obs=y)

    return Target(model, *noisy_points(n, scale, seed))


def quadratic(n=4, scale=1.5, seed=2):
    """A likelihood that is quadratic in the matrix: an observed matrix in another order, both in its rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n, generator=generator)
    y = x + scale * torch.randn(n, n, generator=generator)

    def model(x, y):
        P = pyro.sample("P", pgs.UniformPermutation(n))
        pyro.sample("y", dist.Normal(P @ x @ P.mT, scale).to_event(2), obs=y)

    return Target(model, x, y)


def plate(n=3, items=2, scale=1.2, seed=3):
    """A plate of permutations that are independent given the rest; the items have masks of their own."""
    allowed = torch.ones(items, n, n, dtype=torch.bool)
    allowed[-1, 0, 1] = False
    x, y = zip(*(noisy_points(n, scale, seed + k) for k in range(items)), strict=True)

    def model(x, y):
        with pyro.plate("items", items):
            P = pyro.sample("P", pgs.UniformPermutation(n, allowed))
            pyro.sample("y", dist.Normal(P @ x, scale).to_event(2), obs=y)

    return Target(model, torch.stack(x), torch.stack(y))


def dependent(n=3, items=2, scale=1.5, seed=4):
    """A plate of permutations whose sum is observed, so that they depend on each other."""
    x, y = noisy_points(n, scale, seed)

    def model(x, y):
        with pyro.plate("items", items):
            P = pyro.sample("P", pgs.UniformPermutation(n))
        pyro.sample("y", dist.Normal((P @ x).sum(-3, keepdim=True), scale).to_event(2), obs=y)

    return Target(model, x, y)


def event(n=3, items=2, scale=1.5, seed=5):
    """Permutations that are items of one event."""
    x, y = noisy_points(n, scale, seed)

    def model(x, y):
        P = pyro.sample("P", pgs.UniformPermutation(n).expand([items]).to_event(1))
        pyro.sample("y", dist.Normal(P @ x, scale).to_event(3), obs=torch.stack([y, y + 1]))

    return Target(model, x, y)


def two_sites(n=3, scale=1.5, seed=6):
    """Two sites, the second with a prior of its own and forbidden pairs."""
    x, y = noisy_points(n, scale, seed)
    logits = torch.linspace(-1, 1, n * n).reshape(n, n)
    logits[0, n - 1] = -torch.inf

    def model(x, y):
        P = pyro.sample("P", pgs.UniformPermutation(n))
        Q = pyro.sample("Q", pgs.GibbsPermutation(logits))
        pyro.sample("y", dist.Normal(P @ Q @ x, scale).to_event(2), obs=y)

    return Target(model, x, y)


TARGETS = {
    "points": points,
    "masked": masked,
    "quadratic": quadratic,
    "plate": plate,
    "dependent": dependent,
    "event": event,
    "two sites": two_sites,
}
"""By name, functions that return a target."""

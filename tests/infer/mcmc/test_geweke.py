"""'Getting it right' (Geweke 2004): data given parameters and parameters given data, in turn, leave the joint law alone.

Replicas of a chain, each with data of its own, start at independent draws of parameters and data from the model. A round
draws the data anew given the parameters and lets the kernel move the parameters given the data. After any number of rounds
the replicas are still independent draws from the model, if the kernel and the density that it uses are right. So the means
over them of any function of parameters and data, and those over fresh draws from the model (the marginal-conditional
simulator), differ by noise only: z-scores of independent replicas rather than of batch means. A round ends with the kernel,
as a kernel that is wrong about the likelihood shows in how parameters fit the data that they were moved with.
"""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from matching_model import noisy_points
from pyro import poutine
from pyro.infer import HMC, NUTS
from scipy import stats

import pyro_gs as pgs
from pyro_gs.infer.log_joint import LogJoint
from pyro_gs.infer.mcmc.chain import Chain
from pyro_gs.infer.mcmc.proposals import AdaptedSwaps

FAILURE_RATE = 2e-5
X = noisy_points(4, 1.0, 0)[0].double()
MASK = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 1]], dtype=torch.bool)
LOGITS = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3).roll(1, 0)


def points(data):
    P = pyro.sample("P", pgs.UniformPermutation(4))
    pyro.sample("y", dist.Normal(P @ X, 1.0).to_event(2), obs=data(P))


def masked(data):
    P = pyro.sample("P", pgs.UniformPermutation(4, MASK))
    pyro.sample("y", dist.Normal(P @ X, 1.0).to_event(2), obs=data(P))


def quadratic(data):
    P = pyro.sample("P", pgs.UniformPermutation(4))
    pyro.sample("y", dist.Normal(P @ (X @ X.T) @ P.mT, 2.0).to_event(2), obs=data(P))


def plate(data):
    with pyro.plate("items", 2):
        P = pyro.sample("P", pgs.UniformPermutation(4, torch.stack([MASK, MASK.mT])))
        pyro.sample("y", dist.Normal(P @ X, 1.0).to_event(2), obs=data(P))


def dependent(data):
    with pyro.plate("items", 2):
        P = pyro.sample("P", pgs.UniformPermutation(3))
    # (..., 1, 3, 2) beside the plate, so that candidates stay where they are
    pyro.sample("y", dist.Normal((P @ X[:3]).cumsum(-3)[..., 1:, :, :], 1.0).to_event(2), obs=data(P))


def two_sites(data):
    P = pyro.sample("P", pgs.UniformPermutation(3))
    Q = pyro.sample("Q", pgs.GibbsPermutation(LOGITS))
    pyro.sample("y", dist.Normal(P @ X[:3] - Q @ X[1:], 1.0).to_event(2), obs=data(P + 0 * Q))


MODELS = {
    "points": points,
    "masked": masked,
    "quadratic": quadratic,
    "plate": plate,
    "dependent": dependent,
    "two sites": two_sites,
}


KERNELS = {
    "SwapMetropolis": lambda: pgs.SwapMetropolis(),
    "SwapMetropolis, adapted": lambda: pgs.SwapMetropolis(adapt=True),
    "SwapMetropolis, cycles": lambda: pgs.SwapMetropolis(num_steps=1, num_cycles=2),
    "LocallyBalanced": lambda: pgs.LocallyBalanced(num_steps=2),
    "LocallyBalanced, gradient": lambda: pgs.LocallyBalanced(score="gradient", balance="barker", num_steps=2),
    "BlockGibbs": lambda: pgs.BlockGibbs(block_size=2),
    "MoveSequence": lambda: pgs.MoveSequence([pgs.LocallyBalanced(), pgs.SwapMetropolis(num_steps=1)]),
    "GuideProposal": lambda: pgs.GuideProposal(guide=Guide(), num_steps=2),
    "GuideProposal, sequential": lambda: pgs.GuideProposal(guide=Guide(), law="sequential", num_steps=2),
}
"""By name, functions that make a kernel without a model; a new kernel is added here."""

ONLY = {"SwapMetropolis, adapted": ("masked", "plate")}
"""Models for kernels that are not run on all."""


class Guide:
    """Logits that know nothing of the data."""

    def logits(self, name, per_candidate):
        site = per_candidate.__self__.joint.sites[name]
        logits = torch.linspace(-1, 1, site.n**2).reshape(site.n, site.n).roll(1, 0).expand(site.num_items, -1, -1)
        if site.allowed is not None:
            logits = logits.masked_fill(~site.allowed, -torch.inf)
        return logits.reshape(*site.item_shape, site.n, site.n)


class Joint:
    """A model with data of their own for every replica.

    The kernels' candidates come as (K * replicas, ...), replicas running fastest, so the data are repeated K times.
    """

    def __init__(self, model, replicas):
        self.model, self.replicas = model, replicas
        self.data = None
        self.data = poutine.trace(model).get_trace(self.per_candidate).nodes["y"]["value"][None]
        self.joint = LogJoint(model, (self.per_candidate,), vectorize=True)

    def per_candidate(self, P):
        """Data for a value of the permutations, or None to draw them."""
        if self.data is None:
            return None
        if P.dim() < self.data.dim():  # one value without replicas: at set-up
            return self.data[0]
        if len(P) < self.replicas:  # candidates for one replica: when the kernel looks whether items are coupled
            return self.data[:1].expand(len(P), *self.data.shape[1:])
        return self.data.repeat(len(P) // self.replicas, *(1,) * (self.data.dim() - 1))

    def simulate(self, values=None):
        """Values of permutations and data, drawn together or, given the permutations, the data alone."""
        self.data = None
        model = self.model if values is None else poutine.condition(self.model, values)
        depth = self.joint.nesting
        with pyro.plate("replicas", self.replicas, dim=-1 - depth):
            if values is not None:
                model = poutine.condition(self.model, {k: v.reshape(self._shape(k, v)) for k, v in values.items()})
            trace = poutine.trace(model).get_trace(self.per_candidate)
        found = {name: trace.nodes[name]["value"] for name in self.joint.sites}
        self.data = trace.nodes["y"]["value"]
        return {
            name: v.reshape(self.replicas, *self.joint.sites[name].item_shape, *v.shape[-2:]) for name, v in found.items()
        }

    def _shape(self, name, value):
        fill = self.joint.nesting - len(self.joint.sites[name].item_shape)
        return (self.replicas, *(1,) * fill, *value.shape[1:])


def statistics(values, data, log_p):
    """Functions of parameters and data, (replicas, count), among them log densities (replicas, ...)."""
    flat = torch.cat([value.double().flatten(1) for value in values.values()], 1)
    seen = data.double().flatten(1)
    both = (flat[:, :, None] * seen[:, None, :]).flatten(1)
    return torch.cat([flat, seen, seen.square(), both, log_p], 1)


def agree(found, expected):
    """z-scores of the differences of means of independent rows."""
    spread = (found.var(0) / len(found) + expected.var(0) / len(expected)).sqrt()
    constant = spread < 1e-12
    assert torch.allclose(found.mean(0)[constant], expected.mean(0)[constant])
    z = ((found.mean(0) - expected.mean(0)) / spread)[~constant].abs().max()
    limit = stats.norm.isf(FAILURE_RATE / 2 / int((~constant).sum()))
    assert z < limit, f"a mean is off by {float(z):.1f} standard errors"


def check(kernel, model, *, replicas=1000, rounds=6, refresh=None):
    pyro.set_rng_seed(0)
    simulator = Joint(model, replicas)
    sites = simulator.joint.sites

    def to_values(index):
        return {name: sites[name].to_value(rows) for name, rows in index.items()}

    def to_index(values):
        return {name: sites[name].to_items(value) for name, value in values.items()}

    chain = Chain(simulator.joint, to_index(simulator.simulate()))
    warmup = 15 if getattr(kernel, "_adapt", False) else 0
    kernel.bind(chain, warmup)
    for _ in range(warmup):
        kernel.step()
    start = to_index(simulator.simulate())  # what was learned belongs to other data
    chain.set(start, {})
    for _ in range(rounds):
        simulator.simulate(to_values(chain.index))
        chain.set(chain.index, {})
        if refresh is not None:
            refresh(kernel)
        kernel.step()
    moved = torch.stack([(chain.index[name] != start[name]).flatten(1).any(1) for name in start]).any(0)
    assert moved.double().mean() > 0.1
    chain.set(chain.index, {})
    found = statistics(to_values(chain.index), simulator.data, chain.total().T)
    values = simulator.simulate()
    chain.set(to_index(values), {})
    agree(found, statistics(values, simulator.data, chain.total().T))


CASES = [(name, kernel) for kernel in KERNELS for name in ONLY.get(kernel, MODELS)]


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_getting_it_right(name, kernel):
    check(KERNELS[kernel](), MODELS[name])


def draw_tempered(kernel):
    """Draw the tempered replicas from their posteriors given the new data; the one at power 1 is drawn from it already."""
    chain, ladder = kernel._chain, kernel.ladder
    states = torch.tensor(list(itertools.permutations(range(4))))
    candidates = states[:, None, None].expand(-1, chain.replicas, 1, -1)
    likelihood = chain.score("P", candidates).total[1]
    rows = [
        states[torch.distributions.Categorical(logits=(power * likelihood).T).sample()][:, None]
        for power in kernel.powers[1:]
    ]
    ladder.set({"P": torch.cat([chain.index["P"], *rows])}, {})
    kernel._known = dict(chain.index)


@pytest.mark.usefixtures("float64_only")
def test_getting_it_right_with_tempering():
    kernel = pgs.ParallelTempering(kernel=pgs.SwapMetropolis(num_steps=1), powers=[0.0, 0.3, 1.0])
    check(kernel, points, replicas=1000, refresh=draw_tempered)


class Greedy(pgs.SwapMetropolis):
    """As if the likelihood had the power 0.5."""

    def bind(self, chain, warmup_steps):
        chain.power = 0.5 * chain.power
        super().bind(chain, warmup_steps)


@pytest.mark.usefixtures("float64_only")
def test_a_wrong_likelihood_is_found_out():
    with pytest.raises(AssertionError, match="a mean is off by"):
        check(Greedy(), points)


@pytest.mark.usefixtures("float64_only")
def test_a_missing_reverse_probability_is_found_out(monkeypatch):
    """Of an adapted proposal, which is not symmetric."""
    kernel = pgs.SwapMetropolis(adapt=True)
    plain = AdaptedSwaps.table

    def table(self, *args):
        items, rows, forward, _ = plain(self, *args)
        return items, rows, forward, forward

    monkeypatch.setattr(AdaptedSwaps, "table", table)
    with pytest.raises(AssertionError, match="a mean is off by"):
        check(kernel, masked)


# Beside continuous latents: all replicas in a plate, moved by one kernel. Their joint law is a product, so replicas stay
# independent, although HMC accepts or refuses them together.


class Plate:
    """Points, shifted, with noise of unknown scale, in a plate of replicas with data of their own."""

    def __init__(self, replicas):
        self.replicas, self.data = replicas, None

    def __call__(self):
        with pyro.plate("replicas", self.replicas):
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
            P = pyro.sample("P", pgs.UniformPermutation(4, MASK))
            mean = P @ X + shift[..., None, None]
            pyro.sample("y", dist.Normal(mean, scale[..., None, None]).to_event(2), obs=self.data)

    def simulate(self, values=None):
        self.data = None
        trace = poutine.trace(self if values is None else poutine.condition(self, values)).get_trace()
        self.data = trace.nodes["y"]["value"]
        return {name: trace.nodes[name]["value"] for name in ("P", "shift", "scale")}


def constrained(params):
    return {"P": params["P"], "shift": params["shift"], "scale": params["scale"].exp()}


def log_statistics(values, data):
    """As :func:`statistics`, of what has light tails: the logarithm of the scale and standardized data and residuals."""
    scale, shift = values["scale"], values["shift"]
    parts = {
        "P": values["P"],
        "shift": shift[:, None],
        "scale": scale.log()[:, None],
        "square": scale.log().square()[:, None],
    }
    residuals = (data - values["P"] @ X - shift[:, None, None]) / scale[:, None, None]
    return statistics(parts, data / scale[:, None, None], residuals.square().sum((-2, -1))[:, None])


INNER = {
    "HMC": lambda model: pgs.HMCGibbs(HMC(model, step_size=0.06, num_steps=6, adapt_step_size=False)),
    "NUTS": lambda model: pgs.HMCGibbs(
        NUTS(model, step_size=0.06, adapt_step_size=False, max_tree_depth=4),
        [pgs.LocallyBalanced(), pgs.SwapMetropolis(num_steps=1)],
    ),
}


def check_gibbs(make, *, replicas=1500, rounds=12, spoil=None):
    pyro.set_rng_seed(0)
    model = Plate(replicas)
    kernel = make(model)
    values = model.simulate()
    start = {"P": values["P"], "shift": values["shift"], "scale": values["scale"].log()}
    kernel.initial_params = start
    kernel.setup(0)
    if spoil is not None:
        spoil(kernel)
    params = kernel.initial_params
    for _ in range(rounds):
        model.simulate(constrained(params))
        params = kernel.sample(params)
    for name in start:
        assert (params[name] != start[name]).reshape(replicas, -1).any(1).double().mean() > 0.3
    found = log_statistics(constrained(params), model.data)
    agree(found, log_statistics(model.simulate(), model.data))


@pytest.mark.usefixtures("float64_only")
@pytest.mark.parametrize("inner", INNER)
def test_getting_it_right_beside_continuous_latents(inner):
    check_gibbs(INNER[inner])


@pytest.mark.usefixtures("float64_only")
def test_moves_that_do_not_hear_of_the_rest_are_found_out():
    def spoil(kernel):
        plain = kernel._constrained
        kernel._constrained = lambda params: {**plain(params), "scale": torch.full((1500,), 3.0)}

    with pytest.raises(AssertionError, match="a mean is off by"):
        check_gibbs(INNER["HMC"], spoil=spoil)


@pytest.mark.usefixtures("float64_only")
def test_tempering_gets_it_right():
    """Its replicas are its own, so here the independent data sets are the items of a plate, which it moves one by one."""
    pyro.set_rng_seed(1)
    items, rounds = 400, 6

    def many(y=None):
        with pyro.plate("items", items):
            P = pyro.sample("P", pgs.UniformPermutation(4, MASK))
            return P, pyro.sample("y", dist.Normal(P @ X, 1.0).to_event(2), obs=y)

    P, y = many()
    for _ in range(rounds):
        y = dist.Normal(P @ X, 1.0).sample()
        kernel = pgs.ParallelTempering(many, num_temperatures=3, adapt=False)
        kernel.initial_params = {"P": P}
        kernel.setup(0, y)
        for _ in range(3):
            P = kernel.sample(kernel.initial_params)["P"]
    fresh, data = (torch.cat(part) for part in zip(*(many() for _ in range(5)), strict=True))
    none = torch.zeros(items, 0)
    agree(statistics({"P": P}, y, none), statistics({"P": fresh}, data, torch.zeros(len(data), 0)))

"""Networks trained on tiny tasks, in guides too, on other devices; gradients and errors of the modules."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from sets import FEATURES, MASK, N, networks
from torch import nn

import pyro_gs as pgs
from pyro_gs.nn import (
    DeepSets,
    EachItem,
    EquivariantLinear,
    PositionScores,
    RankScores,
    RowScores,
    ScoreNetwork,
    SetAttention,
    SinkhornLayer,
    SinkhornNetwork,
    cross_entropy,
    gumbel_matching_nll,
    reconstruction_loss,
)

NETWORKS = networks()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(name, masked, float64_only):
    """Of inputs and of parameters, against finite differences along a random direction."""
    network = SinkhornNetwork(NETWORKS[name](), SinkhornLayer(0.7))
    x, mask = torch.randn(3, N, FEATURES), MASK if masked else None
    x = x.unflatten(-1, (1, 2, 3)) if name == "images" else x
    weight = torch.randn(3, N, N)
    leaves = {"x": x, **{key: p.detach() for key, p in network.named_parameters()}}
    direction = {key: torch.randn_like(value) for key, value in leaves.items()}

    def along(t):
        moved = {key: value + t * direction[key] for key, value in leaves.items()}
        x = moved.pop("x")
        return (weight * torch.func.functional_call(network, moved, (x, mask))).sum()

    t = torch.zeros((), requires_grad=True)
    (slope,) = torch.autograd.grad(along(t), t)
    step = 1e-5
    with torch.no_grad():
        want = (along(step) - along(-step)) / (2 * step)
    assert torch.allclose(slope, want, rtol=1e-5, atol=1e-7)  # step^2 and rounding / step
    assert slope != 0


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("batch", [(), (0,), (2, 1)])
def test_batches(name, batch, tol):
    network = SinkhornNetwork(NETWORKS[name](), SinkhornLayer(0.7)).eval()
    x = torch.randn(*batch, N, FEATURES)
    x = x.unflatten(-1, (1, 2, 3)) if name == "images" else x
    for mask in (None, MASK[0]):
        P = network(x, mask)
        assert P.shape == (*batch, N, N)
        for index in itertools.product(*map(range, batch)):
            assert torch.allclose(P[index], network(x[index], mask), atol=10 * tol)


# --- training


class Dense(nn.Module):
    """A network of the whole list, which is not equivariant."""

    def __init__(self, width=64):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(N, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, N * N))

    def forward(self, x, mask=None):
        return self.net(x[..., 0]).unflatten(-1, (N, N))


def numbers(batch, n=N, low=0.0, high=1.0):
    """Lists of numbers (batch, n, 1), the same in order, and the permutations that say where each belongs."""
    x = low + (high - low) * torch.rand(batch, n, 1)
    order = x[..., 0].argsort(-1)
    return x, x.sort(-2).values, pgs.to_matrix(order.argsort(-1))


def mlp(width=32):
    return EachItem(nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()))


def train(scores, loss, layer, steps=120, lr=0.02):
    network = SinkhornNetwork(scores, layer)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network, *numbers(64)).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def wrong(network, batch=200, **options):
    """Share of numbers at a wrong position, and of lists with one."""
    x, _, order = numbers(batch, **options)
    good = (pgs.matching(network.scores(x)) * order).sum(-1)
    return 1 - float(good.mean()), 1 - float(good.prod(-1).mean())


def likelihood(network, x, ordered, order):
    return cross_entropy(network.log_p(x), order).mean()


def squares(network, x, ordered, order):
    return reconstruction_loss(network(x), x, ordered).mean()


# name: scores, loss, options of the layer
TASKS = {
    "rows, cross entropy": (lambda: ScoreNetwork(mlp(), RowScores(32, N)), likelihood, {}),
    "rows, squares with noise": (lambda: ScoreNetwork(mlp(), RowScores(32, N)), squares, {"noise": 1.0}),
    "ranks, straight-through": (lambda: ScoreNetwork(mlp(), RankScores(32)), squares, {"noise": 0.3, "hard": True}),
    "positions, deep sets": (lambda: ScoreNetwork(mlp(), PositionScores(32), DeepSets(32, 32)), likelihood, {}),
    "positions, attention": (lambda: ScoreNetwork(mlp(), PositionScores(32), SetAttention(32, 32, 32)), likelihood, {}),
}


@pytest.mark.parametrize("name", TASKS)
def test_learns_to_sort(name):
    """From a start with most numbers wrong; the dense network below leaves a tenth of the lists wrong or more."""
    make, loss, options = TASKS[name]
    start = next(scores for scores in iter(make, None) if wrong(SinkhornNetwork(scores))[0] > 0.4)  # ranks may be lucky
    trained = train(start, loss, SinkhornLayer(0.5, **options))
    assert wrong(trained)[1] < 0.02


@pytest.mark.parametrize("loss", [likelihood, squares])
def test_a_network_that_is_not_equivariant_does_not(loss):
    """The same budget and more parameters."""
    trained = train(Dense(), loss, SinkhornLayer(0.5))
    assert 0.1 < wrong(trained)[1] < 0.9  # it does learn


def test_ranks_hold_for_other_sizes_and_intervals():
    """Trained on five numbers in [0, 1]: the linear score is all that is learned, and the matching does the rest."""
    trained = train(ScoreNetwork(EachItem(nn.Linear(1, 4)), RankScores(4)), likelihood, SinkhornLayer(0.5), steps=40)
    for n, low, high in ((5, 1000.0, 1001.0), (60, 0.0, 1.0), (60, 100.0, 101.0), (60, 0.0, 1000.0)):
        assert wrong(trained, batch=20, n=n, low=low, high=high)[1] == 0


def test_a_shift_of_ranks_costs_no_digits():
    """Numbers of which float32 holds every digit; their products with positions would not fit."""
    scores = RankScores(1).float()
    with torch.no_grad():
        scores.linear.weight.fill_(1.0)
        scores.linear.bias.zero_()
    order = torch.randperm(100)
    x = (2.0**20 + order / 8)[:, None].float()
    assert torch.equal(pgs.to_index(pgs.matching(scores(x))), order)


def test_learns_from_sets_of_different_sizes():
    """Lists of 2 to 5 numbers, padded; a threshold as above."""
    scores = ScoreNetwork(mlp(), PositionScores(32), DeepSets(32, 32))

    def masks(batch):
        return torch.arange(N) < torch.randint(2, N + 1, (batch, 1))

    def padded(batch):
        x, mask = torch.rand(batch, N, 1), masks(batch)
        rank = torch.where(mask, x[..., 0], 2.0).argsort(-1).argsort(-1)
        return x.masked_fill(~mask[..., None], torch.nan), pgs.to_matrix(rank), mask

    network = SinkhornNetwork(scores, SinkhornLayer(0.5))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(150):
        optimizer.zero_grad()
        x, order, mask = padded(64)
        cross_entropy(network.log_p(x, mask), order, mask).mean().backward()
        optimizer.step()
    with torch.no_grad():
        x, order, mask = padded(200)
        P = pgs.matching(network.scores(x, mask))
    assert float((P == order).all(-1).all(-1).double().mean()) > 0.95


# --- guides


LEVELS = torch.tensor([-1.5, -0.5, 0.5, 1.5])
NOISE = 0.3


def model(readings, levels):
    with pyro.plate("batch", len(readings), device=str(readings.device)):
        P = pyro.sample("P", pgs.UniformPermutation(4, torch.ones(4, 4, dtype=torch.bool, device=readings.device)))
        pyro.sample("readings", dist.Normal(P @ levels[:, None], NOISE).to_event(2), obs=readings)


class OfReadings(nn.Module):
    """A function of the model's arguments."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, readings, levels):
        return self.scores(readings)


def readings(batch):
    levels = LEVELS.to(torch.get_default_dtype())
    return levels[torch.rand(batch, 4).argsort(-1)][..., None] + NOISE * torch.randn(batch, 4, 1), levels


def test_an_amortized_guide_learns():
    """On readings never seen: marginals near the exact ones, of which a guide that has not learned knows nothing."""
    net = OfReadings(ScoreNetwork(mlp(), RowScores(32, 4)))
    guide = pgs.AutoGumbelSinkhorn(model, temperature=0.5, logits=net)
    svi = SVI(pgs.relax(model, temperature=0.5), guide, Adam({"lr": 0.05}), Trace_ELBO())
    y, levels = readings(16)
    log_p = -((y[:, :, 0, None] - levels) ** 2) / (2 * NOISE**2)
    truth = pgs.GibbsPermutation(log_p).marginals()  # exact for n = 4

    def error():
        return float((guide.marginals(500, y, levels)["P"][0] - truth).abs().mean())

    before = error()
    for _ in range(60):
        svi.step(*readings(16))
    assert error() < 0.5 * before
    assert (guide.median(y, levels)["P"] == pgs.matching(log_p)).all(-1).all(-1).double().mean() > 0.7  # by chance 1/24


# --- devices


@pytest.mark.parametrize(
    "placement", ["meta/cpu", *(pytest.param(x, marks=pytest.mark.cuda) for x in ("cpu/cuda", "cuda/cuda"))]
)
def test_devices(placement):
    """Everything is put where the data are: on a default device without memory all else would fail."""
    default, device = placement.split("/")
    with torch.device(device):
        made = [(make(), "images" in name) for name, make in NETWORKS.items()]
        x, mask = torch.randn(3, N, FEATURES), MASK.to(device)
        order = pgs.to_matrix((~mask).long().sort(dim=-1, stable=True).indices.argsort(-1))
        y, levels = (value.to(device) for value in readings(8))
        net = OfReadings(ScoreNetwork(mlp(), PositionScores(32)))
    with torch.device(default):
        for network, images in made:
            items = x.unflatten(-1, (1, 2, 3)) if images else x
            both = SinkhornNetwork(network, SinkhornLayer(0.7, noise=1.0, num_samples=2, hard=True))
            P, log_p = both(items, mask), both.log_p(items, mask)
            loss = reconstruction_loss(P, items, items, mask, item_dim=items.dim() - 2)
            loss = loss.mean() + cross_entropy(log_p, order, mask).mean()
            loss.backward()
            assert P.device.type == log_p.device.type == loss.device.type == device
            assert both.eval()(items).device.type == device
        three = torch.eye(3, device=device)
        for of_pieces in (None, three[0] + three[1] > 0):
            assert gumbel_matching_nll(x[..., :3, :3], three, of_pieces).device.type == device
        guide = pgs.AutoGumbelSinkhorn(
            model, logits=net, create_plates=lambda y, levels: pyro.plate("batch", len(y), device=str(y.device))
        )
        SVI(pgs.relax(model), guide, Adam({"lr": 0.02}), Trace_ELBO()).step(y, levels)
        assert guide.median(y, levels)["P"].device.type == device


# --- errors


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: EachItem(len), TypeError, "module must be a torch.nn.Module of single pieces, but is builtin"),
        (lambda: EachItem(nn.ReLU(), -1), ValueError, "item_dim must be an integer of at least 0, but is -1"),
        (lambda: EquivariantLinear(0, 2), ValueError, "in_features must be an integer of at least 1, but is 0"),
        (lambda: EquivariantLinear(2, 2, "sum"), ValueError, r"pool must be one of \('mean', 'max'\), but is 'sum'"),
        (lambda: DeepSets(2, 2, depth=0), ValueError, "depth must be an integer of at least 1, but is 0"),
        (lambda: SetAttention(2, 2, width=9, heads=2), ValueError, "width must be a multiple of heads=2, but is 9"),
        (lambda: RowScores(2, 0), ValueError, "n must be an integer of at least 1, but is 0"),
        (lambda: RankScores(True), ValueError, "in_features must be an integer of at least 1, but is True"),
        (lambda: PositionScores(2, 0), ValueError, "width must be an integer of at least 1, but is 0"),
        (lambda: ScoreNetwork(None, nn.ReLU()), TypeError, "items must be a torch.nn.Module, but is NoneType"),
        (lambda: SinkhornNetwork(RankScores), TypeError, "scores must be a torch.nn.Module, but is type"),
        (lambda: SinkhornNetwork(RankScores(2), nn.ReLU()), TypeError, "layer must be a SinkhornLayer, but is ReLU"),
    ],
)
def test_bad_modules(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x: EachItem(nn.ReLU())([1.0]),
            TypeError,
            r"items must be a torch.Tensor of shape \(..., n, \*item\)",
        ),
        (lambda x: EachItem(nn.ReLU())(x.long()), TypeError, "items must have a floating dtype"),
        (
            lambda x: EachItem(nn.ReLU(), 3)(x),
            ValueError,
            r"items must have shape .* 3 dimensions of an item",
        ),
        (lambda x: EachItem(nn.ReLU())(x / 0), ValueError, "items of batch item 0 must be finite, but row 0 holds nan"),
        (lambda x: EachItem(nn.Flatten(0))(x), ValueError, r"module must return shape \(6, features\) for 6 pieces, but"),
        (lambda x: EachItem(nn.ReLU())(x, x[..., 0] == 1), ValueError, "mask of batch item 0 is False throughout"),
        (lambda x: DeepSets(3, 2)(x), ValueError, r"x must have shape \(..., n, 3\) with n >= 1, but has shape \(2, 3, 2\)"),
        (lambda x: SetAttention(2, 2)(x, x[..., 0]), TypeError, "mask must be a bool tensor"),
        (lambda x: RowScores(2, 4)(x), ValueError, "x must have 4 pieces, as many as RowScores has positions, but has"),
        (lambda x: RankScores(2)(x[:, :0]), ValueError, r"x must have shape \(..., n, 2\)"),
        (lambda x: PositionScores(2)(x, torch.ones(2).bool()), ValueError, r"mask must broadcast to \(2, 3\)"),
    ],
)
def test_bad_calls(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.zeros(2, 3, 2))

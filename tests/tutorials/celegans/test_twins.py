"""Marginals after exchanges: against enumerated posteriors, twins, worms that show less."""

import dataclasses
import itertools

import pytest
import torch
from padded import show_less

from tutorials.celegans.connectome import Connectome, load_connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.exchange import ExchangeSearch
from tutorials.celegans.identification import onehot, random_allowed
from tutorials.celegans.twins import exchange_probabilities, with_exchanges
from tutorials.celegans.worms import Worms, simulate

pytestmark = pytest.mark.usefixtures("float64_only")


def network(edges: list[tuple[int, int]], n: int) -> Connectome:
    """The first neurons of the real one, with connections of our own."""
    adjacency = torch.zeros(n, n, dtype=torch.bool)
    for sender, receiver in edges:
        adjacency[receiver, sender] = True
    return dataclasses.replace(load_connectome().subset(list(range(n))), adjacency=adjacency)


def make(connectome: Connectome, count: int, steps: int = 60, **options) -> tuple[Worms, CollapsedEvidence, ExchangeSearch]:
    torch.set_default_dtype(torch.float64)
    worms = simulate(connectome, worms=count, steps=steps, seed=3, **options)
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    return worms, evidence, ExchangeSearch(evidence, worms.allowed, worms.logits)


def posterior(worms: Worms, evidence: CollapsedEvidence, members: list[torch.Tensor]) -> torch.Tensor:
    """Marginals over a list of permutations of all worms."""
    P = onehot(torch.stack(members))
    log_joint = torch.stack([evidence(p) + (p * worms.logits).sum() for p in P])
    return torch.einsum("k,kjab->jab", log_joint.softmax(0), P)


def swapped(index: torch.Tensor, a: int, b: int, sets: tuple[int, ...]) -> torch.Tensor:
    out = index.clone()
    for j in sets:
        out[j] = torch.where(index[j] == a, b, torch.where(index[j] == b, a, index[j]))
    return out


EDGES = [(0, 1), (1, 2), (2, 0), (0, 3), (4, 2), (4, 0)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_of_two_free_labels_the_posterior_is_exact(count):
    worms, evidence, search = make(network(EDGES, 5), count, steps=4, known=0.0, eta=1.0)
    free = torch.eye(5, dtype=torch.bool).expand(count, 5, 5).clone()
    index = torch.arange(5).expand(count, 5).clone()
    free[:, 1, 3] = free[:, 3, 1] = True
    worms = dataclasses.replace(worms, allowed=free, known=free.sum(-1) == 1, truth=index)
    search = ExchangeSearch(evidence, free, worms.logits)
    sets = [s for k in range(count + 1) for s in itertools.combinations(range(count), k)]
    exact = posterior(worms, evidence, [swapped(index, 1, 3, s) for s in sets])
    mixed = with_exchanges(onehot(index), index, search, worms)
    assert 0.01 < float(exact[0, 1, 3]) < 0.99  # no answer that is right by being sure
    torch.testing.assert_close(mixed, exact, atol=1e-8, rtol=0)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_labels_without_connections_are_all_alike(count):
    worms, _, search = make(network([(0, 1), (1, 0), (1, 2)], 7), count, known=0.0, eta=1.0, steps=300)
    exchange = exchange_probabilities(search, worms.truth, worms.observed)
    torch.testing.assert_close(exchange[:, 3:, 3:], torch.full((count, 4, 4), 0.25), atol=1e-6, rtol=0)
    # the others are known by their connections
    assert float(exchange.diagonal(dim1=1, dim2=2)[:, :3].min()) > 0.99


@pytest.mark.parametrize("steps", [8, 25])
def test_against_the_enumerated_posterior(steps):
    """One worm of five, where the mode holds most of the mass: much nearer to the posterior than the mode alone."""
    worms, evidence, search = make(network(EDGES, 5), 1, steps=steps, known=0.0, eta=1.0)
    members = [torch.tensor(p)[None] for p in itertools.permutations(range(5))]
    exact = posterior(worms, evidence, members)
    mode = max(members, key=lambda p: float(evidence(onehot(p))))
    mixed = with_exchanges(onehot(mode), mode, search, worms)

    def distance(p: torch.Tensor) -> float:
        return float((p - exact).abs().sum(-1).mean()) / 2  # total variation of a row

    alone = distance(onehot(mode))
    assert alone > 0.08
    assert distance(mixed) < 0.3 * alone


def test_nothing_goes_where_it_may_not():
    worms, _, search = make(load_connectome().thin(12, torch.Generator().manual_seed(0)), 2, known=0.2, eta=0.2, steps=5)
    index = random_allowed(worms.allowed, torch.Generator().manual_seed(1))
    start = onehot(index)
    mixed = with_exchanges(start, index, search, worms)
    assert float(mixed[~worms.allowed].abs().max()) == 0.0
    torch.testing.assert_close(mixed.sum(-1), torch.ones(2, 12))
    assert float((mixed - start).abs().max()) > 0.01


@pytest.mark.parametrize("count", [3, 6])
def test_worms_that_do_not_show_twins_do_not_count(count):
    """Twins are even in the worms that show one of them, however many others come along in the exchange."""
    torch.set_default_dtype(torch.float64)
    connectome = network([(0, 1), (1, 0), (1, 2)], 6)
    sizes = [6, 4, 3, 5, 3, 2][:count]
    worms = show_less(simulate(connectome, worms=count, steps=300, seed=3, known=0.0, eta=1.0), sizes)
    own = onehot(worms.truth) > 0
    twins = (worms.truth == 4) | (worms.truth == 5)
    allowed = own | (twins[..., None] & ((torch.arange(6) == 4) | (torch.arange(6) == 5)))
    worms = dataclasses.replace(
        worms, allowed=allowed, known=torch.zeros_like(worms.known), logits=torch.zeros_like(worms.logits)
    )
    search = ExchangeSearch(CollapsedEvidence.of_worms(worms, connectome), worms.allowed, worms.logits)
    exchange = exchange_probabilities(search, worms.truth, worms.observed)
    shows = (worms.observed & twins).any(-1)
    assert bool(shows.any())
    assert not bool(shows.all())
    torch.testing.assert_close(exchange[shows, 4, 5], torch.full((int(shows.sum()),), 0.5), atol=1e-8, rtol=0)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_of_an_answer_that_is_no_optimum_the_better_one_is_found(count):
    """A hundred nats away all sets that undo a part are better than the answer: the best of them counts."""
    connectome = network(EDGES, 5)
    worms, _, _ = make(connectome, count, steps=300, known=0.0, eta=1.0)
    truth = torch.arange(5).expand(count, 5).clone()
    free = torch.eye(5, dtype=torch.bool).expand(count, 5, 5).clone()
    free[:, 1, 3] = free[:, 3, 1] = True
    traces = worms.traces.gather(2, worms.truth.argsort(1).unsqueeze(1).expand_as(worms.traces))
    worms = dataclasses.replace(worms, traces=traces, allowed=free, known=free.sum(-1) == 1, truth=truth)
    search = ExchangeSearch(CollapsedEvidence.of_worms(worms, connectome), free, worms.logits)
    for wrong in ((0,), tuple(range(count))):
        answer = swapped(truth, 1, 3, wrong)
        assert float(search.gains(answer)[0].max()) > 100
        # the bound on the odds leaves e^-30
        torch.testing.assert_close(with_exchanges(onehot(answer), answer, search, worms), onehot(truth), atol=1e-10, rtol=0)

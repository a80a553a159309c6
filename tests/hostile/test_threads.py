"""Two threads at once get what one gets, bit for bit: tensors in, tensors out, with what is kept between calls."""

import threading

import pytest
import torch

import pyro_gs as pgs

SECONDS = 120  # of the clock, for what takes two or three; a thread that waits for ever is found out
ROUNDS = 2


def logits(n, batch=(), seed=0):
    return torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(n + seed))


def with_gradient(function, x):
    x = x.clone().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value.clamp(min=-50).sum(), x)
    return value.detach(), gradient


def masked(n):
    """Some pairs forbidden, another mask for each n: what is known of masks is kept between calls."""
    return logits(n, (3,)).masked_fill((logits(n, seed=50) > 1) & ~torch.eye(n, dtype=torch.bool), -torch.inf)


def posterior_of(n):
    law = pgs.GibbsPermutation(masked(n)[0])
    return law.enumerate_support(), law.marginals()


def log_probs(n):
    P, R = pgs.matching(logits(n)), pgs.sinkhorn(logits(n))
    laws = [pgs.UniformPermutation(n), pgs.GibbsPermutation(logits(n)), pgs.Mallows(P, 1.0), pgs.PlackettLuce(logits(n)[0])]
    relaxed = [pgs.GumbelSinkhorn(0.5, logits(n)), pgs.RelaxedPlackettLuce(0.5, logits(n)[0])]
    return tuple(law.log_prob(P) for law in laws), relaxed[0].log_prob(R)


WORK = {
    "sinkhorn": lambda n: with_gradient(lambda x: pgs.log_sinkhorn(x, temperature=0.3), logits(n, (4,))),
    "sinkhorn, masked": lambda n: with_gradient(lambda x: pgs.log_sinkhorn(x, temperature=0.5), masked(n)),
    "matching": lambda n: pgs.matching(logits(n, (16,))),
    "log_permanent": lambda n: with_gradient(pgs.log_permanent, masked(n)),
    "bounds": lambda n: pgs.log_permanent_bounds(logits(n, (3,))),
    "laplacian": lambda n: with_gradient(lambda x: pgs.laplacian_logdet(pgs.log_sinkhorn(x)), logits(n)),
    "log_prob": log_probs,
    "support": posterior_of,
    "summary": lambda n: pgs.summary({"P": pgs.matching(logits(n, (20,)))})["P"].marginals,
}


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [x for part in result for x in flat(part)]


@pytest.mark.parametrize("name", WORK)
def test_two_threads_give_the_results_of_one(name):
    """In another order in each thread, with nothing kept from earlier calls where ``masked`` is what comes first."""
    sizes = [3, 4, 5, 6] * ROUNDS
    start, results, errors = threading.Barrier(2), {}, []

    def run(which, order):
        try:
            start.wait(SECONDS)
            results[which] = [flat(WORK[name](n)) for n in order]
        except BaseException as error:
            errors.append(error)

    orders = [sizes, sizes[::-1]]
    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(orders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "the threads wait for each other"
    assert not errors, errors
    alone = {n: flat(WORK[name](n)) for n in set(sizes)}
    for which, order in enumerate(orders):
        for n, found in zip(order, results[which], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, alone[n], strict=True)), n


def test_draws_of_threads_are_permutations():
    """They share torch's generator, so which one a thread gets depends on the other."""
    drawn = []

    def draw():
        drawn.append([law.sample((50,)) for law in (pgs.GibbsPermutation(logits(5)), pgs.Mallows(torch.eye(4), 1.0))])

    threads = [threading.Thread(target=draw, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(drawn) == 2
    for P in flat(drawn):
        pgs.to_index(P)  # raises where it is none

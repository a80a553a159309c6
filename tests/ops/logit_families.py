"""Logits of all the kinds that people meet, for tests that hold on every one of them."""

import math

import torch

BIG = 1e4


def _normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gumbel(*shape, generator):
    u = torch.rand(*shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
    return -torch.log((-torch.log(u)).clamp(min=1e-16))


def noisy(n, g):
    return _normal(n, n, generator=g) + gumbel(n, n, generator=g)


def big(n, g):
    return BIG * (2 * torch.rand(n, n, generator=g, dtype=torch.float64) - 1)


def shifted(n, g):
    return noisy(n, g) + 1e6 * _normal(n, 1, generator=g).sign()


def equal(n, g):
    return torch.zeros(n, n, dtype=torch.float64)


def integer(n, g):
    return torch.randint(0, 5, (n, n), generator=g).double()


def big_integer(n, g):
    return torch.randint(-int(BIG), int(BIG), (n, n), generator=g).double()


def heavy_tailed(n, g):
    return torch.tan(math.pi * (torch.rand(n, n, generator=g, dtype=torch.float64) - 0.5)).clamp(-BIG, BIG)


def points_on_a_line(n, g):
    return -5 * (_normal(n, 1, generator=g) - _normal(1, n, generator=g)) ** 2


def _shuffled(x, g):
    n = len(x)
    return x[torch.randperm(n, generator=g)][:, torch.randperm(n, generator=g)]


def _blocks(n):
    label = torch.arange(n) // max(1, n // 4)
    return label[:, None] == label[None, :]


def nearly_blocks(n, g):
    return _shuffled(torch.where(_blocks(n), noisy(n, g), noisy(n, g) - 30), g)


def components(n, g):
    return _shuffled(torch.where(_blocks(n), noisy(n, g), -math.inf), g)


def sparse(n, g):
    """Two random permutations and a third of the other pairs are allowed."""
    x = noisy(n, g)
    allowed = torch.rand(n, n, generator=g) < 1 / 3
    for _ in range(2):
        allowed[torch.arange(n), torch.randperm(n, generator=g)] = True
    return torch.where(allowed, x, -math.inf)


def noisy_integer(n, g):
    return integer(n, g) + gumbel(n, n, generator=g)


def noisy_components(n, g):
    return components(n, g) + gumbel(n, n, generator=g)


FAMILIES = {
    f.__name__: f
    for f in (
        noisy,
        big,
        shifted,
        equal,
        integer,
        big_integer,
        heavy_tailed,
        points_on_a_line,
        nearly_blocks,
        components,
        sparse,
        noisy_integer,
        noisy_components,
    )
}


def make(family, n, seed):
    """Logits (n, n), float64, of a family and a seed."""
    return FAMILIES[family](n, torch.Generator().manual_seed(seed))

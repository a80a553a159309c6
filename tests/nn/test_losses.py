"""Losses against what they are by definition, applying a matrix, masks and errors."""

import itertools
import math

import pytest
import torch
from sets import MASK, N

import pyro_gs as pgs
from pyro_gs.nn import (
    SinkhornLayer,
    assemble,
    cross_entropy,
    gumbel_matching_nll,
    mask_logits,
    reconstruction_loss,
    scramble,
)


def right_order(mask):
    """Permutation matrices of the pieces to as many first positions, and something else where a set is padded."""
    target = torch.zeros(*mask.shape, N)
    for matrix, of_set in zip(target, mask, strict=True):
        rows = of_set.nonzero()[:, 0]
        matrix[rows, torch.randperm(len(rows))] = 1.0
    return target


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 3)])
def test_assemble_and_scramble(shape):
    index = torch.tensor([[1, 2, 0, 4, 3], [4, 3, 2, 1, 0], [0, 2, 4, 1, 3]])
    P, ordered = pgs.to_matrix(index), torch.randn(3, N, *shape)
    pieces = scramble(P, ordered, item_dim=len(shape))
    for b, i in itertools.product(range(3), range(N)):
        assert torch.equal(pieces[b, i], ordered[b, index[b, i]])
    assert torch.equal(assemble(P, pieces, item_dim=len(shape)), ordered)
    assert not torch.equal(scramble(P, pieces, item_dim=len(shape)), ordered)  # the wrong way round
    draws = torch.stack([P, P.mT])
    assert torch.equal(assemble(draws, pieces, item_dim=len(shape))[0], ordered)
    assert torch.equal(assemble(P[0], pieces[0], item_dim=len(shape)), ordered[0])
    soft = P.mean(0)
    want = torch.einsum("ij,i...->j...", soft, pieces[0])
    assert torch.allclose(assemble(soft, pieces[0], item_dim=len(shape)), want)


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 3)])
def test_reconstruction(shape, tol):
    P = pgs.sinkhorn(torch.randn(4, 3, N, N))
    ordered, order = torch.randn(3, N, *shape), right_order(torch.ones(3, N).bool())
    pieces = scramble(order, ordered, item_dim=len(shape))
    loss = reconstruction_loss(P, pieces, ordered, item_dim=len(shape))
    assert loss.shape == (4, 3)
    error = torch.einsum("sbij,bi...->sbj...", P, pieces) - ordered
    assert torch.allclose(loss, error.square().reshape(4, 3, -1).mean(-1), atol=tol)
    assert reconstruction_loss(order, pieces, ordered, item_dim=len(shape)).abs().max() == 0


def test_reconstruction_of_padded_sets(tol):
    order, ordered = right_order(MASK), torch.randn(3, N, 2)
    P = SinkhornLayer(0.5)(torch.randn(3, N, N), MASK)
    pieces = (order @ ordered).masked_fill(~MASK[..., None], torch.nan)
    target = ordered.clone()
    target[0, 3:] = torch.nan
    loss = reconstruction_loss(P, pieces, target, MASK)
    for b, mask in enumerate(MASK):
        k = int(mask.sum())
        alone = reconstruction_loss(P[b][mask][:, :k], pieces[b][mask], ordered[b, :k])
        assert torch.allclose(loss[b], alone, atol=tol)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy(masked, tol):
    mask = MASK if masked else torch.ones_like(MASK)
    target = right_order(mask)
    log_p = SinkhornLayer(1.0, noise=1.0, num_samples=4).log_p(torch.randn(3, N, N), mask)
    loss = cross_entropy(log_p, target, mask if masked else None)
    assert loss.shape == (4, 3)
    for b in range(3):
        rows = mask[b].nonzero()[:, 0]
        picked = torch.stack([log_p[:, b, i, target[b, i].argmax()] for i in rows], -1)
        assert torch.allclose(loss[:, b], -picked.mean(-1), atol=tol)


@pytest.mark.parametrize("masked", [False, True])
def test_gumbel_matching_likelihood(masked, tol):
    """Frequencies of M(X + eps), and the bound that the cross entropy is."""
    mask = torch.tensor([[True, True, False], [True, True, True]]) if masked else torch.ones(2, 3).bool()
    logits = torch.randn(2, 3, 3)
    target = torch.zeros(2, 3, 3)
    target[0, [0, 1], [1, 0]] = target[1, [0, 1, 2], [1, 2, 0]] = 1.0
    if not masked:
        target[0, 2, 2] = 1.0
    given = mask if masked else None
    loss = gumbel_matching_nll(logits, target, given)
    count = 20_000
    hard = SinkhornLayer(noise=1.0, num_samples=count, hard=True)(logits, given)
    hit = ((hard.round() == target) | ~mask[..., None]).all(-1).all(-1).double().mean(0).to(loss.dtype)
    p = (-loss).exp()
    assert ((hit - p).abs() < 5 * (p * (1 - p) / count).sqrt()).all()
    bound = cross_entropy(SinkhornLayer(1.0).log_p(logits, given), target, given) * mask.sum(-1)
    assert (bound >= loss).all()
    law = pgs.GumbelMatching(logits if given is None else mask_logits(logits, given))
    full = target.clone()
    full[0, 2, 2] = 1.0
    assert torch.allclose(bound, -law.log_prob_bounds(full)[0], atol=10 * tol)


def test_marginal_likelihood_of_draws():
    """The estimate that the docstring of cross_entropy names is that of the mean matrix."""
    log_p = SinkhornLayer(0.5, noise=1.0, num_samples=6).log_p(torch.randn(2, N, N))
    target = right_order(torch.ones(2, N).bool())
    mean = log_p.exp().mean(0)
    loss = cross_entropy(log_p.logsumexp(0) - math.log(6), target)
    assert torch.allclose(loss, -(target * mean.log()).sum((-2, -1)) / N)
    assert (loss <= cross_entropy(log_p, target).mean(0)).all()  # Jensen


def test_gradients(float64_only):
    mask = torch.tensor([[True, False, True], [True, True, True]])
    target = torch.zeros(2, 3, 3)
    target[0, [0, 2], [1, 0]] = target[1, [0, 1, 2], [1, 2, 0]] = 1.0
    pieces, ordered = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    layer = SinkhornLayer(0.7)
    losses = [
        lambda x: reconstruction_loss(layer(x, mask), pieces, ordered, mask),
        lambda x: cross_entropy(layer.log_p(x, mask), target, mask),
        lambda x: gumbel_matching_nll(x, target, mask),
    ]
    x = torch.randn(2, 3, 3, requires_grad=True)
    for loss in losses:
        assert torch.autograd.gradcheck(loss, x)


EYE, ITEMS = torch.eye(3), torch.ones(3, 2)
FOUR, FIVE = torch.ones(4, 2), torch.ones(5, 3, 2)
ONE = torch.tensor([True, False, False])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: assemble(torch.zeros(2, 3), ITEMS), ValueError, "P must be square"),
        (lambda: assemble(EYE.double(), ITEMS.float()), TypeError, "items must have the dtype of P, torch.float64, but has"),
        (
            lambda: assemble(EYE, FOUR),
            ValueError,
            r"items must have shape \(..., 3, \*item\) with 1 dimensions",
        ),
        (
            lambda: assemble(EYE.expand(2, 3, 3), FIVE),
            ValueError,
            r"broadcasts with that of P, \(2,\), but",
        ),
        (lambda: assemble(EYE, ITEMS.log() / 0), ValueError, "items must be finite, but row 0 holds nan"),
        (lambda: assemble(EYE / 0, ITEMS), ValueError, "P must be finite, but row 0 holds"),
        (lambda: scramble(EYE, ITEMS, item_dim=-1), ValueError, "item_dim must be an integer of at least 0, but is -1"),
        (
            lambda: scramble(EYE, ITEMS, item_dim=2),
            ValueError,
            "ordered must have shape .* 2 dimensions of an item",
        ),
        (
            lambda: reconstruction_loss(EYE, ITEMS[:, :0], ITEMS[:, :0]),
            ValueError,
            r"items must have entries to compare, but a piece has shape \(0,\)",
        ),
        (lambda: reconstruction_loss(EYE, ITEMS, ITEMS[:2]), ValueError, r"target must have the shape and dtype of items"),
        (lambda: reconstruction_loss(EYE, ITEMS, ITEMS, torch.ones(4).bool()), ValueError, r"mask must broadcast to \(3,\)"),
        (lambda: cross_entropy(EYE, torch.ones(3, 3)), ValueError, "target is not a permutation matrix"),
        (
            lambda: cross_entropy(EYE.expand(2, 3, 3), torch.stack([EYE, EYE / 2])),
            ValueError,
            "target of batch item 1",
        ),
        (
            lambda: cross_entropy(EYE, torch.eye(4)),
            ValueError,
            r"target must broadcast to the shape of log_p, \(3, 3\)",
        ),
        (
            lambda: cross_entropy(EYE, EYE.flip(0), ONE),
            ValueError,
            "matrix, of the pieces of mask to as many",
        ),
        (
            lambda: cross_entropy(EYE, EYE),
            ValueError,
            "log_p must hold logarithms .*, but is 1 at row 0, column 0",
        ),
        (lambda: cross_entropy(EYE / 0, EYE), ValueError, "log_p is inf at row 0, column 0"),
        (lambda: cross_entropy(EYE.log(), EYE.flip(0)), ValueError, "log_p is -inf at row 0, column 2, where target"),
        (lambda: gumbel_matching_nll(EYE.log(), EYE.flip(0)), ValueError, "logits forbid target"),
        (lambda: gumbel_matching_nll(EYE * torch.nan, EYE), ValueError, "logits is nan at row 0, column 0"),
        (lambda: gumbel_matching_nll(EYE, EYE, ONE.float()), TypeError, "mask must be a bool tensor"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()

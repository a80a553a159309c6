"""Permuting the pieces permutes the output, and what pads plays no part, for every module in both modes."""

import pytest
import torch
from sets import ENCODERS, FEATURES, MASK, ORDER, SCORES, N, networks

from pyro_gs.nn import EachItem, SinkhornLayer, SinkhornNetwork
from pyro_gs.nn import layer as layer_module
from pyro_gs.ops.gumbel import gumbel_noise

MODULES = ENCODERS | SCORES
NETWORKS = networks()


@pytest.fixture(params=["train", "eval"])
def training(request):
    return request.param == "train"


def pieces(name):
    x = torch.randn(3, N, FEATURES)
    return x.unflatten(-1, (1, 2, 3)) if name == "images" else x


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("masked", [False, True])
def test_modules(name, masked, training, tol):
    module = MODULES[name]().train(training)
    x, mask = torch.randn(3, N, FEATURES), MASK if masked else None
    out = module(x, mask)
    other = module(x[:, ORDER], None if mask is None else mask[:, ORDER])
    pieces = MASK if masked else torch.ones_like(MASK)
    # scores are of the pieces at their positions, the others are not meant
    seen = pieces[..., None].expand_as(out)
    if name in SCORES:
        seen = seen & (torch.arange(N) < pieces.sum(-1, keepdim=True))[:, None]
    assert torch.allclose(out[:, ORDER][seen[:, ORDER]], other[seen[:, ORDER]], atol=tol)
    assert not torch.allclose(out[1], out[1, ORDER], atol=0.01)  # an output alike for all pieces would be equivariant too


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("masked", [False, True])
def test_networks(name, masked, training, tol, monkeypatch):
    """With noise that is permuted along; what pads goes in the same turn before and after."""
    network = SinkhornNetwork(NETWORKS[name](), SinkhornLayer(0.7, noise=1.0, num_samples=2)).train(training)
    x, mask = pieces(name), MASK if masked else None
    torch.manual_seed(3)
    P = network(x, mask)
    order = ORDER.expand(3, N)
    if masked:  # pieces in another order, what pads last and in its own
        order = torch.stack([torch.cat([ORDER[m[ORDER]], torch.arange(N)[~m]]) for m in MASK])
    set_of = torch.arange(3)[:, None]

    def permuted(shape, like):
        return gumbel_noise(shape, like)[:, set_of, order]

    monkeypatch.setattr(layer_module, "gumbel_noise", permuted)
    torch.manual_seed(3)
    other = network(x[set_of, order], None if mask is None else mask[set_of, order])
    assert torch.allclose(P[:, set_of, order], other, atol=10 * tol)  # of the Sinkhorn tolerance 1e-10 or 2e-6
    assert torch.allclose(P.sum(-1), torch.ones(()), atol=10 * tol)
    assert torch.allclose(P.sum(-2), torch.ones(()), atol=10 * tol)
    assert torch.equal(P[0], P[1]) == (not training)  # draws of the noise


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "batch norm"])
def test_features_of_padded_sets(name, training, tol):
    """Of negative numbers, which are below what pads."""
    module = ENCODERS[name]().train(training)
    x = -1 - torch.rand(3, N, FEATURES)
    out = module(x.masked_fill(~MASK[..., None], torch.nan), MASK)
    for one, mask, features in zip(x, MASK, out, strict=True):
        assert torch.allclose(features[mask], module(one[mask]), atol=tol)


def test_batch_norm_sees_pieces_only(tol):
    x, norm = torch.randn(3, N, FEATURES), torch.nn.BatchNorm1d(FEATURES)
    out = EachItem(norm)(x, MASK)
    assert torch.allclose(out[MASK], torch.nn.functional.batch_norm(x[MASK], None, None, training=True), atol=tol)


@pytest.mark.parametrize("name", NETWORKS)
def test_padded_sets_equal_unpadded_ones(name, training, tol):
    if "batch norm" in name and training:
        pytest.skip("its statistics are of all pieces in the batch")
    network = NETWORKS[name]().train(training)
    layer = SinkhornLayer(0.7)
    x = pieces(name)
    hidden = ~MASK.reshape(3, N, *[1] * (x.dim() - 2))
    logits = network(x.masked_fill(hidden, torch.nan), MASK)  # whatever pads
    P = layer(logits, MASK)
    for one, mask, raw, matrix in zip(x, MASK, logits, P, strict=True):
        k = int(mask.sum())
        if "rows" in name or name == "images":  # of N positions, so only the first k are compared
            features = network.items(one[mask])
            features = features if network.sets is None else network.sets(features)
            alone = network.scores.linear(features)[:, :k]
        else:
            alone = network(one[mask])
        assert torch.allclose(layer(alone), layer(raw[mask][:, :k]), atol=10 * tol)
        assert torch.allclose(layer(alone), matrix[mask][:, :k], atol=10 * tol)
        assert torch.equal(matrix[~mask], torch.eye(N)[k:])


def test_what_pads_gets_no_gradient():
    for make in NETWORKS.values():
        network = make()
        x = torch.randn(3, N, FEATURES)
        x = (x.unflatten(-1, (1, 2, 3)) if make is NETWORKS["images"] else x).requires_grad_()
        P = SinkhornLayer(0.7)(network(x, MASK), MASK)
        (P * torch.randn_like(P)).sum().backward()
        assert x.grad.isfinite().all()
        assert (x.grad[~MASK] == 0).all()
        assert (x.grad[1] != 0).any()

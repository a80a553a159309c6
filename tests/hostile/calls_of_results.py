"""What is called with hostile draws, marginals and features: summaries, pictures, calibration, modules of networks."""

import dataclasses

import torch
from calls import Call
from hostile_tensors import masks, permutations, plans, rectangles, squares, temperatures, vectors
from hypothesis import strategies as st
from matplotlib import pyplot as plt

import pyro_gs as pgs
from pyro_gs import nn, plotting

_SIZES = st.sampled_from([None] * 8 + [3, 1, 0, 2.0])
_POOLS = st.sampled_from(["mean", "max", "mean", "max", "median"])
_BY_CHAIN = st.booleans()


def _samples(function):
    def of_samples(P, other, **options):
        found = function({"P": P, "x": other} if other is not None else {"P": P}, **options)
        str(found)
        if isinstance(found, dict):
            return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
        return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}

    arguments = {"P": permutations(), "other": st.none() | vectors(), "group_by_chain": _BY_CHAIN}
    # effective sizes of few draws, and of draws that never change, are NaN by what they say of themselves
    return Call(function.__name__, of_samples, arguments, (function,), looks=False)


def _picture(function, **arguments):
    def draw(**given):
        figure, ax = plt.subplots()
        try:
            function(**given, ax=ax)
            figure.canvas.draw()
        finally:
            plt.close(figure)

    return Call(function.__name__, draw, arguments, (function,))


def _recalibrated(marginals, answer, allowed):
    curve = pgs.reliability(torch.eye(3)[None] * 0.7 + 0.1, torch.eye(3)[None])
    return pgs.recalibrate(marginals, curve, answer=answer, allowed=allowed)


def _started(P, strength, allowed):
    return pgs.init_to_matching({"P": P}, strength)("P", allowed)


def _divergence(q, p, temperature, num_samples):
    return pgs.monte_carlo_kl(pgs.GumbelSinkhorn(temperature, q), pgs.GumbelSinkhorn(1.0, p), num_samples)


def _module(family, *, sizes=1, **options):
    """A module for features of the size that comes, or of another, of their dtype."""

    def forward(x, mask, size, **given):
        features = x.shape[-1] if size is None and x.dim() else size
        module = family(features, *[4] * (sizes - 1), **given)
        return (module.to(x.dtype) if x.is_floating_point() else module)(x, mask)

    arguments = {"x": rectangles(), "mask": st.none() | st.none() | masks(square=False), "size": _SIZES, **options}
    return Call(family.__name__, forward, arguments, (family,), draws=True, looks=False)


def _each_item(items, item_dim):
    return nn.EachItem(torch.nn.Identity(), item_dim)(items)


def _network(items, hidden, noise):
    features = items.shape[-1] if items.dim() else 1
    each = nn.EachItem(torch.nn.Linear(features, hidden))
    network = nn.SinkhornNetwork(nn.ScoreNetwork(each, nn.PositionScores(hidden)), nn.SinkhornLayer(noise=noise))
    return (network.to(items.dtype) if items.is_floating_point() else network)(items)


_NETWORK = {"items": rectangles(), "hidden": st.sampled_from([4, 1]), "noise": st.sampled_from([0.0, 1.0])}
_DISTRIBUTIONS = {
    "q": squares(),
    "p": squares(),
    "temperature": temperatures(),
    "num_samples": st.sampled_from([5, 2, 1, 0]),
}

CALLS = [
    _samples(pgs.convergence),
    _samples(pgs.posterior_dict),
    Call(
        "recalibrate",
        _recalibrated,
        {"marginals": plans(), "answer": st.none() | permutations(), "allowed": st.none() | masks()},
        (pgs.recalibrate,),
    ),
    Call(
        "init_to_matching",
        _started,
        {"P": permutations(), "strength": st.sampled_from([5.0, 1.0, 0.0, -1.0, float("nan")]), "allowed": masks()},
        (pgs.init_to_matching,),
    ),
    Call("monte_carlo_kl", _divergence, _DISTRIBUTIONS, (pgs.monte_carlo_kl, pgs.GumbelSinkhorn), draws=True),
    _picture(plotting.plot_marginals, marginals=plans(), map=st.none() | permutations(), allowed=st.none() | masks()),
    _picture(plotting.plot_confidence, marginals=plans(), truth=st.none() | permutations()),
    _picture(plotting.plot_entropy, marginals=plans(), allowed=st.none() | masks()),
    _module(nn.EquivariantLinear, sizes=2, pool=_POOLS),
    _module(nn.DeepSets, sizes=2, pool=_POOLS),
    _module(nn.SetAttention, sizes=2, width=st.just(8), heads=st.sampled_from([2, 4, 3])),
    _module(nn.RowScores, sizes=2),
    _module(nn.PositionScores),
    _module(nn.RankScores),
    Call("EachItem", _each_item, {"items": rectangles(), "item_dim": st.sampled_from([1, 1, 0, -1])}, (nn.EachItem,)),
    Call("SinkhornNetwork", _network, _NETWORK, (nn.SinkhornNetwork, nn.SinkhornLayer, nn.EachItem), draws=True),
]

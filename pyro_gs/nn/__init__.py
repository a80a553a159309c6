"""Sinkhorn networks: equivariant modules from a set of pieces to doubly stochastic matrices, and their losses.

    from pyro_gs import nn as gsnn

    scores = gsnn.ScoreNetwork(gsnn.EachItem(cnn, item_dim=3), gsnn.RowScores(64, 9), sets=gsnn.SetAttention(64, 64))
    network = gsnn.SinkhornNetwork(scores, gsnn.SinkhornLayer(temperature=0.5, noise=1.0))
    P = network(pieces)
    loss = gsnn.reconstruction_loss(P, pieces, picture, item_dim=3).mean()

Rows of a matrix are pieces as they come, columns the positions where they belong: pieces are ``P @ ordered``, and
:func:`assemble` is ``P.mT @ pieces``. Sets of different sizes are padded to one n and come with a mask, bool (..., n), True
at a piece; k pieces take the first k positions, and what pads takes the others in turn (:func:`mask_logits`), so that
matrices stay doubly stochastic.
"""

from pyro_gs.nn.assembly import assemble, scramble
from pyro_gs.nn.attention import SetAttention
from pyro_gs.nn.deep_sets import DeepSets, EquivariantLinear
from pyro_gs.nn.each_item import EachItem
from pyro_gs.nn.layer import SinkhornLayer
from pyro_gs.nn.losses import cross_entropy, gumbel_matching_nll, reconstruction_loss
from pyro_gs.nn.masks import mask_logits
from pyro_gs.nn.network import ScoreNetwork, SinkhornNetwork
from pyro_gs.nn.scores import PositionScores, RankScores, RowScores

__all__ = [
    "DeepSets",
    "EachItem",
    "EquivariantLinear",
    "PositionScores",
    "RankScores",
    "RowScores",
    "ScoreNetwork",
    "SetAttention",
    "SinkhornLayer",
    "SinkhornNetwork",
    "assemble",
    "cross_entropy",
    "gumbel_matching_nll",
    "mask_logits",
    "reconstruction_loss",
    "scramble",
]

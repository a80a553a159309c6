"""Doubts about a worm's places, labels and colours."""

import dataclasses
import re

import pytest
import torch
from placed import network, placed

from tutorials.celegans.atlas import Atlas
from tutorials.celegans.preparation import to_worms


def test_the_connectome_is_nearly_its_own_mirror_image() -> None:
    connectome = network(40)
    atlas = Atlas.from_connectome(connectome)
    with pytest.warns(UserWarning, match=r"recording 'worm' was laid onto the atlas .* left and right .*--mirrored"):
        to_worms([placed(connectome, list(range(35)), known=0)], connectome, atlas=atlas)
    to_worms([placed(connectome, list(range(35)), known=0)], connectome, atlas=atlas, mirrored=False)
    to_worms([placed(connectome, list(range(35)), known=35)], connectome, atlas=atlas)  # none left to exchange


def test_known_neurons_far_off_their_places() -> None:
    """Two names exchanged between head and tail."""
    connectome = network(40)
    worm = placed(connectome, list(range(35)), known=20)
    head, tail = connectome.body[:20].argmin(), connectome.body[:20].argmax()
    names = list(worm.identities)
    names[head], names[tail] = names[tail], names[head]
    wrong = dataclasses.replace(worm, identities=tuple(names))
    with pytest.warns(UserWarning, match="lie more than 6 standard deviations off") as caught:
        to_worms([wrong], connectome, atlas=Atlas.from_connectome(connectome), mirrored=False)
    named = set(re.findall(r"[A-Z0-9]+", str(caught[0].message)))
    assert {connectome.names[head], connectome.names[tail]} <= named


def test_units_and_colours_that_do_not_fit() -> None:
    connectome = network(40)
    atlas, worm = Atlas.from_connectome(connectome), placed(connectome, list(range(35)), known=0)
    assert worm.positions is not None
    small = dataclasses.replace(worm, positions=worm.positions / 1000)
    with pytest.warns(UserWarning, match=r"at 1\.12e\+03 times its size.*in micrometres\?"):
        to_worms([small], connectome, atlas=atlas, mirrored=False)
    colourful = dataclasses.replace(worm, colors=torch.ones(35, 1, dtype=torch.float64), channels=("red",))
    with pytest.warns(UserWarning, match="worm: red: not used, since the atlas has no colours"):
        to_worms([colourful], connectome, atlas=atlas, mirrored=False)

"""What may be wrong with a worm as it was laid onto the atlas, told as warnings."""

from __future__ import annotations

import warnings

import torch

from tutorials.celegans.atlas import Atlas
from tutorials.celegans.recordings import Recording
from tutorials.celegans.registration import Registration, anchors

__all__ = ["FAR", "SCALES", "UNSURE", "warn_of_doubts"]

UNSURE = 15.0
"""Nats: a smaller margin between a worm and its mirror image is warned of."""

FAR = 6.0
"""Standard deviations: a known neuron farther than this off its place in the atlas is warned of."""

SCALES = (0.4, 2.5)
"""A worm that fits the atlas at a scale outside of these was not given in micrometres."""


def warn_of_doubts(recording: Recording, atlas: Atlas, registration: Registration) -> None:
    """Warn of what may be wrong with a worm's places, labels or colours.

    Args:
        recording: With positions.
        atlas: That it was laid onto.
        registration: The result.

    Warns:
        UserWarning: If its mirror image fits the atlas nearly as well, known neurons lie far off their places, it fits only
            at a scale that tells of a unit other than micrometres, or its colours are not used because the atlas has none.
    """
    where = f"recording {recording.name!r}"
    if registration.margin < UNSURE and None in recording.identities:
        image = "mirrored" if registration.mirrored else "as it is"
        warnings.warn(
            f"{where} was laid onto the atlas {image}, but fits it nearly as well the other way (by "
            f"{registration.margin:.1f} nats less), so that left and right may be exchanged; name more neurons that lie on "
            "one side, or say whether its frame is mirrored (--mirrored, mirrored=...)",
            stacklevel=3,
        )
    rows, columns = anchors(recording, atlas)
    offset = (registration.positions[rows] - atlas.means[columns]).unsqueeze(-1)
    far = (offset.mT @ torch.linalg.solve(atlas.covariances[columns], offset)).flatten() > FAR**2
    if far.any():
        names = ", ".join(recording.labels[row] for row in rows[far].tolist())
        warnings.warn(
            f"{where}: the places of {names} lie more than {FAR:g} standard deviations off those of the atlas: are the "
            "labels right, and is the worm straight?",
            stacklevel=3,
        )
    if not SCALES[0] < registration.scale < SCALES[1]:
        warnings.warn(
            f"{where} fits the atlas at {registration.scale:.3g} times its size, expected about 1: are its positions in "
            "micrometres?",
            stacklevel=3,
        )
    if recording.colors is not None and atlas.color_means is None:
        channels = ", ".join(recording.channels or ()) or "colours"
        warnings.warn(f"{recording.name}: {channels}: not used, since the atlas has no colours", stacklevel=3)

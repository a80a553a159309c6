"""A picture of one worm with the names of its neurons, coloured by how sure they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tutorials.celegans.connectome import Connectome
from tutorials.celegans.identities import Identity
from tutorials.celegans.recordings import Recording

__all__ = ["CONFIDENCE", "confidence", "draw_worm"]

CONFIDENCE = (
    ("given", "#1a1a1a"),
    (".95 and more", "#00695c"),
    (".8 to .95", "#1565c0"),
    (".5 to .8", "#a3560b"),
    ("below .5", "#b71c1c"),
)
"""Classes of confidence and their colours, which are dark enough to read on white."""

PANEL = 44
"""Most neurons that one stretch of the body shows with names."""


def confidence(row: Identity) -> int:
    """The class of a neuron: its place in `CONFIDENCE`."""
    if row.known:
        return 0
    return 1 + sum(row.probability < bound for bound in (0.95, 0.8, 0.5))


def draw_worm(recording: Recording, rows: Sequence[Identity], connectome: Connectome) -> Figure:
    """Draw a worm: all of it, and below it one stretch of the body after the other, from head to tail, with names.

    Neurons lie at their positions, turned so that the body lies along the picture: its first principal axis, the head,
    by the identities, on the left; dorsal, by the identities, up. A recording without positions shows its neurons
    where the connectome has their identities.

    Args:
        recording: Of m neurons.
        rows: Their identities, in the order of the recording.
        connectome: Has the places of the identities.

    Returns:
        The figure, about 12 inches wide; names below .5 end with a question mark.

    Raises:
        ValueError: If the rows are not those of the recording.
    """
    if [row.label for row in rows] != list(recording.labels):
        raise ValueError(f"rows: {len(rows)}, not those of {recording.name!r}; expected one for each label, in order")
    places = _view(recording, rows, connectome)
    order = np.argsort(places[:, 0], kind="stable")
    stretches = [part for part in np.array_split(order, -(-len(order) // PANEL)) if len(part)]
    figure = Figure(figsize=(12, 1.7 + 2.5 * len(stretches)), layout="constrained")
    axes = figure.subplots(1 + len(stretches), 1, height_ratios=[1.1] + [2.5] * len(stretches), squeeze=False)[:, 0]
    classes = np.array([confidence(row) for row in rows])
    colors = np.array([color for _, color in CONFIDENCE])[classes]
    axes[0].scatter(places[:, 0], places[:, 1], s=14, c=colors, linewidths=0)
    axes[0].set(title=f"{recording.name}: {len(rows)} neurons, head on the left", yticks=[])
    unit = "place of the identity in the connectome" if recording.positions is None else "along the body"
    axes[0].set_xlabel(f"{unit} (µm)")
    for number, (ax, stretch) in enumerate(zip(axes[1:], stretches, strict=True), 1):
        ends = places[stretch[[0, -1]], 0]
        axes[0].plot(ends, [0, 0], color="#888888", lw=2, clip_on=False, transform=axes[0].get_xaxis_transform())
        axes[0].text(
            ends.mean(), 0.03, str(number), ha="center", va="bottom", fontsize=8, transform=axes[0].get_xaxis_transform()
        )
        _stretch(ax, places[stretch], [rows[i] for i in stretch], colors[stretch])
        ax.set_ylabel(f"{number}", rotation=0, labelpad=10, va="center")
    handles = [
        Line2D([], [], color=color, marker="o", ls="", label=f"{text}: {int((classes == place).sum())}")
        for place, (text, color) in enumerate(CONFIDENCE)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def _stretch(ax: Axes, places: np.ndarray, rows: Sequence[Identity], colors: np.ndarray) -> None:
    """Neurons of one stretch, names above for the upper half at each place and below for the lower, evenly spread."""
    x, y = places.T
    span, height = max(np.ptp(x), 1.0), max(np.ptp(y), 1.0)
    left, right, low, high = x.min() - 0.02 * span, x.max() + 0.02 * span, y.min() - 0.15 * height, y.max() + 0.15 * height
    ax.scatter(x, y, s=22, c=colors, linewidths=0, zorder=3)
    # Of each two neighbours along the body, the upper one is named above: both rows get as many names.
    above = np.zeros(len(x), dtype=bool)
    for i in range(0, len(x), 2):
        pair = np.arange(i, min(i + 2, len(x)))
        above[pair[np.argmax(y[pair])]] = True
    for side, base, anchor, direction in ((above, high, "bottom", 1.0), (~above, low, "top", -1.0)):
        members = np.flatnonzero(side)
        slots = _spread(x[members], left, right)
        for i, slot in zip(members.tolist(), slots, strict=True):
            row = rows[i]
            name = row.identity if row.known or row.probability >= 0.5 else f"{row.identity}?"
            ax.plot([x[i], slot], [y[i], base], color=colors[i], lw=0.5, alpha=0.5, zorder=1)
            ax.text(
                slot,
                base + 0.03 * direction * (high - low),
                name,
                rotation=90,
                ha="center",
                va=anchor,
                fontsize=8.5,
                color=colors[i],
                fontweight="bold" if row.known else "normal",
            )
    room = 0.75 * (high - low)
    ax.set(xlim=(left, right), ylim=(low - room, high + room), yticks=[])
    ax.tick_params(labelsize=7)


def _spread(wanted: np.ndarray, left: float, right: float) -> np.ndarray:
    """Sorted places near those wanted, no two nearer than a share of the width: least squares by pooling."""
    count = len(wanted)
    gap = min(0.03, 0.96 / max(count - 1, 1)) * (right - left)
    shift = gap * np.arange(count)
    blocks: list[tuple[float, int]] = []
    for target in np.clip(wanted, left + 0.01 * (right - left), right - 0.01 * (right - left)) - shift:
        blocks.append((float(target), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    pooled = np.concatenate([np.full(n, value) for value, n in blocks]) if blocks else np.zeros(0)
    low, high = left + 0.01 * (right - left), right - 0.01 * (right - left) - gap * max(count - 1, 0)
    return np.asarray(np.clip(pooled, low, max(low, high)) + shift)


def _view(recording: Recording, rows: Sequence[Identity], connectome: Connectome) -> np.ndarray:
    """Along the body and across it, in micrometres: (m, 2)."""
    atlas = connectome.position[[connectome.index(row.identity) for row in rows]].numpy()
    if recording.positions is None:
        return np.stack([atlas[:, 1], atlas[:, 2]], 1)
    points = recording.positions.numpy() - recording.positions.numpy().mean(0)
    own = np.linalg.svd(points)[2]
    along = points @ own[0]
    # Dorsal is where the identities' z rises, across the body.
    up = points - np.outer(along, own[0])
    slope = up.T @ (atlas[:, 2] - atlas[:, 2].mean())
    direction = slope / np.linalg.norm(slope) if np.linalg.norm(slope) > 0 else own[1]
    sign = np.sign((along * (atlas[:, 1] - atlas[:, 1].mean())).sum()) or 1.0
    along = sign * along
    return np.stack([along - along.min(), up @ direction], 1)

"""Pictures of puzzles and of what networks make of them."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from pyro_gs import nn as gsnn
from pyro_gs import to_matrix
from tutorials.jigsaw.puzzle import Puzzles, join

__all__ = ["Shown", "draw_solutions", "draw_temperatures", "show_matrix", "show_picture"]

TEMPERATURES = (10.0, 3.0, 1.0, 0.3, 0.1)
"""Of the figure about temperature, as factors of the one in training."""


@dataclass(frozen=True)
class Shown:
    """A method's answer to one puzzle.

    Attributes:
        title: Of the method.
        answer: The position of each piece, shape (1, n).
        network: None for a method without one.
    """

    title: str
    answer: Tensor
    network: gsnn.SinkhornNetwork | None


@torch.no_grad()
def draw_solutions(path: Path, puzzles: Puzzles, answers: Sequence[Shown]) -> Path:
    """Draw puzzle, soft assignment, what it mixes, the answer and the truth side by side, a row for each method.

    Args:
        path: Of the picture.
        puzzles: One puzzle.
        answers: Of the methods.

    Returns:
        The path.
    """
    figure, axes = plt.subplots(len(answers), 5, figsize=(8, 1.7 * len(answers)), squeeze=False)
    for row, shown in zip(axes, answers, strict=True):
        show_picture(row[0], join(puzzles.pieces[0]))
        row[0].set_ylabel(textwrap.fill(shown.title, 18), fontsize=7)
        if shown.network is None:
            for ax in row[1:3]:
                ax.axis("off")
                ax.set_box_aspect(1)  # as high as pictures, for the titles
        else:
            P = shown.network(puzzles.pieces)
            # rows by where they belong, so that what is right is on the diagonal
            show_matrix(row[1], P[0][puzzles.index[0].argsort()])
            show_picture(row[2], join(gsnn.assemble(P, puzzles.pieces, item_dim=3)[0]))
        hard = to_matrix(shown.answer, dtype=puzzles.pieces.dtype)
        show_picture(row[3], join(gsnn.assemble(hard, puzzles.pieces, item_dim=3)[0]))
        show_picture(row[4], join(puzzles.ordered[0]))
    for ax, title in zip(axes[0], ("puzzle", "soft assignment", "soft picture", "answer", "truth"), strict=True):
        ax.set_title(title, fontsize=8)
    return _saved(figure, path)


@torch.no_grad()
def draw_temperatures(path: Path, puzzles: Puzzles, network: gsnn.SinkhornNetwork, title: str) -> Path:
    """Draw the soft assignment and the picture it mixes at several temperatures, for the same logits.

    Args:
        path: Of the picture.
        puzzles: One puzzle.
        network: Of any method.
        title: Of the method.

    Returns:
        The path.
    """
    layer = copy.deepcopy(network.layer)
    logits = network.scores(puzzles.pieces)
    figure, axes = plt.subplots(2, len(TEMPERATURES), figsize=(8, 3.6))
    figure.suptitle(title, fontsize=9)
    for (above, below), factor in zip(axes.T, TEMPERATURES, strict=True):
        layer.temperature = factor * network.layer.temperature
        P = layer(logits)
        show_matrix(above, P[0][puzzles.index[0].argsort()])
        above.set_title(f"temperature {layer.temperature:g}", fontsize=8)
        show_picture(below, join(gsnn.assemble(P, puzzles.pieces, item_dim=3)[0]))
    return _saved(figure, path)


def show_picture(ax: Axes, picture: Tensor) -> None:
    """Show a picture, shape (1 or 3, height, width), 0 to 1; one channel as ink."""
    pixels = picture.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    ax.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray_r", vmin=0, vmax=1)
    _bare(ax)


def show_matrix(ax: Axes, matrix: Tensor, largest: float = 1.0) -> None:
    """Show a matrix of probabilities, in colours from 0 to ``largest``."""
    ax.imshow(matrix.detach().cpu().numpy(), cmap="viridis", vmin=0, vmax=largest)
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path

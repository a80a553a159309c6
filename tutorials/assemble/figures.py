"""Pictures of tasks and of what methods assemble."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from matplotlib import pyplot as plt
from torch import Tensor

from tutorials.assemble.tasks import Tasks
from tutorials.jigsaw.figures import show_matrix, show_picture
from tutorials.jigsaw.puzzle import join

__all__ = ["draw_tasks"]


def draw_tasks(path: Path, tasks: Tasks, columns: Mapping[str, Tensor]) -> Path:
    """Draw tasks, a row each: the pieces as they come, what methods make of them, and the target.

    Args:
        path: Of the picture.
        tasks: The tasks.
        columns: By title, pieces at their positions, hard or mixed, shape (batch, n, 1, height, width), or matrices of
            pieces and positions, shape (batch, n, n), in colours from 0 to the largest entry.

    Returns:
        The path.
    """
    drawn = {"pieces": tasks.pieces, **columns, "target, which networks do not see": tasks.targets}
    figure, axes = plt.subplots(
        len(tasks.labels), len(drawn), figsize=(1.15 * len(drawn), 1.15 * len(tasks.labels) + 0.5), squeeze=False
    )
    for column, (title, parts) in zip(axes.T, drawn.items(), strict=True):
        column[0].set_title(textwrap.fill(title, 16), fontsize=6)
        for ax, part in zip(column, parts, strict=True):
            if part.ndim == 2:
                show_matrix(ax, part, float(part.max()))  # soft ones would be dark
            else:
                show_picture(ax, join(part))
    for ax, label in zip(axes[:, 0], tasks.labels.tolist(), strict=True):
        ax.set_ylabel(f"to a {label}", fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path

"""Pictures of posteriors over permutations, on matplotlib axes.

A module of its own, which ``import pyro_gs`` leaves out since pyplot takes time to import::

    from pyro_gs import plotting
    plotting.plot_marginals(pyro_gs.summary(mcmc)["P"])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_gs.calibration import Reliability, check_marginals, check_permutation
from pyro_gs.samples import Samples, by_chain, check_log_density, columns, hamming, permutation_sites
from pyro_gs.summary import SiteSummary, Summary, summary

Posterior = Tensor | SiteSummary | Summary

_RIGHT, _WRONG, _PLAIN, _FORBIDDEN = "#00798c", "#d1495b", "#2e4057", "#9aa7b1"
_TRACED_ROWS = 8


def plot_marginals(
    marginals: Posterior,
    *,
    map: Tensor | None = None,
    truth: Tensor | None = None,
    allowed: Tensor | None = None,
    key: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Heat map of the marginals with the MAP as circles and the truth as crosses; colours follow the square root.

    Args:
        marginals: shape (n, n), rows that sum to one, or the summary of a site, which brings MAP and truth along.
        map: permutation matrix (n, n) to mark, in place of the summary's.
        truth: permutation matrix (n, n) to mark, in place of the summary's.
        allowed: bool, shape (n, n); pairs outside are drawn grey.
        key: whether to draw the colour bar and the legend; for one of several panels, leave them out.
        ax: axes to draw on, by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: ``marginals`` holds several sites or batch items, or a bad row; another argument does not fit.

    Example:
        >>> import matplotlib, torch
        >>> matplotlib.use("Agg")
        >>> ax = plot_marginals(torch.tensor([[0.8, 0.2], [0.2, 0.8]]), map=torch.eye(2))
        >>> ax.get_xlabel()
        'column'
    """
    p, site = _one_item(marginals)
    if site is not None:
        map, truth = site.map if map is None else map, site.truth if truth is None else truth
    marks = {
        name: check_permutation(value, name, p.shape).cpu().numpy()
        for name, value in {"map": map, "truth": truth}.items()
        if value is not None
    }
    shown = np.ma.masked_array(p.cpu().numpy())
    legend: list[Any] = []
    if allowed is not None:
        forbidden = ~_check_allowed(allowed, p.shape).cpu().numpy()
        shown = np.ma.masked_array(shown, forbidden)
        legend += [Patch(color=_FORBIDDEN, label="forbidden")] if forbidden.any() else []
    n = len(p)
    side = min(8.0, max(4.6, n / 35))
    ax = _axes(ax, (side + 0.8, side))
    ax.set_facecolor(_FORBIDDEN)
    image = ax.imshow(shown, cmap="magma", norm=PowerNorm(0.5, 0, 1), interpolation="nearest", aspect="equal")
    cell = _cell_points(ax, n)
    circle, cross = (max(least, min(share * cell, most)) ** 2 for least, share, most in ((2.5, 0.6, 16), (1.5, 0.35, 10)))
    style: dict[str, dict[str, Any]] = {
        "map": {"marker": "o", "s": circle, "facecolors": "none", "edgecolors": "#35d0ba", "label": "MAP"},
        "truth": {"marker": "x", "s": cross, "c": "#4f9dff", "label": "truth"},
    }
    for name, column in marks.items():
        width = min(1.5, max(0.4, cell / 8))
        legend.append(ax.scatter(column, np.arange(n), linewidths=width, **style[name]))
    ax.set(xlabel="column", ylabel="row")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    if not key:
        return ax
    ax.figure.colorbar(image, ax=ax, label="posterior probability", ticks=[0, 0.01, 0.1, 0.25, 0.5, 1])
    if legend:
        box = ax.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small")
        for handle in box.legend_handles:
            if handle is not None and hasattr(handle, "set_sizes"):
                handle.set_sizes([36])
    return ax


def plot_confidence(marginals: Posterior, *, truth: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """Bars of the largest marginal of each row; with a truth, those whose likeliest column is wrong in red.

    Args:
        marginals: shape (n, n), rows that sum to one, or the summary of a site, which brings its truth along.
        truth: permutation matrix (n, n).
        ax: axes to draw on, by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: as :func:`plot_marginals`.

    Example:
        >>> import matplotlib, torch
        >>> matplotlib.use("Agg")
        >>> ax = plot_confidence(torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
        >>> [float(bar.get_height()) for bar in ax.containers[0]]
        [0.75, 0.75]
    """
    p, site = _one_item(marginals)
    if truth is None and site is not None:
        truth = site.truth
    colors: str | list[str] = _PLAIN
    legend = []
    if truth is not None:
        right = (p.argmax(-1) == check_permutation(truth, "truth", p.shape)).tolist()
        colors = [_RIGHT if hit else _WRONG for hit in right]
        legend = [
            Patch(color=_RIGHT, label=f"right ({sum(right)})"),
            Patch(color=_WRONG, label=f"wrong ({len(p) - sum(right)})"),
        ]
    ax = _bars(p.amax(-1), colors, ax)
    ax.set(ylabel="largest marginal probability", ylim=(0, 1.02))
    if legend:
        ax.legend(handles=legend, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize="small")
    return ax


def plot_entropy(marginals: Posterior, *, allowed: Tensor | None = None, ax: Axes | None = None) -> Axes:
    """Bars of the entropy of each row's marginals, below a dashed line, that of a uniform choice.

    Args:
        marginals: shape (n, n), rows that sum to one, or the summary of a site.
        allowed: bool, shape (n, n); the uniform choice is among these.
        ax: axes to draw on, by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: as :func:`plot_marginals`.

    Example:
        >>> import matplotlib, torch
        >>> matplotlib.use("Agg")
        >>> ax = plot_entropy(torch.full((2, 2), 0.5))
        >>> [round(float(bar.get_height()), 4) for bar in ax.containers[0]]
        [0.6931, 0.6931]
    """
    p, _ = _one_item(marginals)
    n = len(p)
    if allowed is None:
        limit = np.full(n, math.log(n))
        label = f"uniform: log {n}"
    else:
        limit = np.log(_check_allowed(allowed, p.shape).sum(-1).cpu().numpy())
        label = "uniform over the allowed columns"
    ax = _bars(torch.special.entr(p).sum(-1), _PLAIN, ax)
    ax.stairs(limit, np.arange(n + 1) - 0.5, baseline=None, color="black", ls="--", lw=1, label=label)
    ax.set(ylabel="entropy (nats)", ylim=(0, 1.05 * max(float(limit.max()), 0.1)))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize="small")
    return ax


def plot_reliability(curve: Reliability | SiteSummary | Summary, *, ax: Axes | None = None) -> Axes:
    """Share of right answers against the probability given to them; on the diagonal a posterior is calibrated.

    Bars reach two standard errors of a share around the diagonal, that of so many independent answers; dots grow with the
    number of answers.

    Args:
        curve: of :func:`pyro_gs.reliability`, or the summary of a site that was given the truth.
        ax: axes to draw on, by default those of a new figure.

    Returns:
        The axes.

    Raises:
        TypeError: ``curve`` is neither.
        ValueError: the summary was not given a truth, or has several sites.

    Example:
        >>> import matplotlib, torch, pyro_gs as pgs
        >>> matplotlib.use("Agg")
        >>> ax = plot_reliability(pgs.reliability(torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.eye(2)))
        >>> ax.get_title()
        'calibration error 0.250, 2 answers'
    """
    if isinstance(curve, Summary):
        curve = _one_site(curve)
    if isinstance(curve, SiteSummary):
        if curve.reliability is None:
            raise ValueError("curve is a summary without the truth; give it one: summary(samples, truth={'P': ...})")
        curve = curve.reliability
    if not isinstance(curve, Reliability):
        raise TypeError(f"curve must be a Reliability or a summary with the truth, but is {type(curve).__name__}")
    count, sure, right = (x.cpu().numpy() for x in (curve.count, curve.confidence, curve.accuracy))
    ax = _axes(ax, (4.6, 4.6))
    ax.plot([0, 1], [0, 1], color="black", ls=":", lw=1, label="calibrated")
    spread = 2 * np.sqrt(sure * (1 - sure).clip(min=0) / count)
    low, high = (sure - spread).clip(min=0), (sure + spread).clip(max=1)
    ax.vlines(sure, low, high, color=_FORBIDDEN, lw=4, alpha=0.5, label="two standard errors")
    ax.plot(sure, right, color=_RIGHT, lw=1, zorder=2)
    ax.scatter(sure, right, s=12 + 120 * count / count.max(), color=_RIGHT, zorder=3, label="answers")
    for x, y, k in zip(sure, right, count, strict=True):
        below = y > 0.9
        ax.annotate(
            str(k),
            (x, y),
            (0, -9 if below else 9),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize="x-small",
        )
    ax.set(
        xlim=(-0.03, 1.03),
        ylim=(-0.03, 1.03),
        xlabel="probability given to the answer",
        ylabel="share that is right",
        aspect="equal",
        title=f"calibration error {curve.calibration_error:.3f}, {int(count.sum())} answers",
    )
    ax.legend(loc="upper left", frameon=False, fontsize="small", markerscale=0.5)
    return ax


def plot_trace(
    samples: AbstractMCMC | Samples,
    *,
    site: str | None = None,
    item: int | tuple[int, ...] = (),
    rows: Sequence[int] | None = None,
    log_density: Tensor | None = None,
    group_by_chain: bool = False,
    ax: Iterable[Axes] | None = None,
) -> NDArray[Any]:
    r"""Traces of chains over permutations: the column of each row, the distance to the MAP, the log density.

    The upper panel has a band for each row, from the smallest column that any draw matches it to (bottom) to the largest;
    the labels name both.

    Args:
        samples: a Pyro ``MCMC`` after ``run``, or a dict of draws by site, each of shape (draws, ..., n, n). Relaxed draws
            are shown by their matchings.
        site: name of the permutation site; not needed if there is one.
        item: which batch item, an index of the batch shape.
        rows: which rows to show, by default the eight of the largest entropy.
        log_density: log density of the draws, in nats, shape (chains, draws), or (draws,) without chains.
        group_by_chain: of a dict: draws have the shape (chains, draws, ..., n, n).
        ax: two axes, with ``log_density`` three; by default those of a new figure.

    Returns:
        The axes, a numpy array of two or three.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: no or several permutation sites and no ``site``; ``item`` or ``rows`` out of range; another number of
            axes; ``log_density`` of another shape.

    Example:
        >>> import matplotlib, torch, pyro_gs as pgs
        >>> matplotlib.use("Agg")
        >>> draws = pgs.to_matrix(torch.argsort(torch.rand(2, 50, 4), -1))
        >>> top, distance = plot_trace({"P": draws}, group_by_chain=True)
        >>> distance.get_ylabel()
        'distance to MAP\n(share of rows)'
    """
    values = by_chain(samples, group_by_chain=group_by_chain)
    names = permutation_sites(values, None if site is None else [site])
    if len(names) > 1:
        raise ValueError(f"samples has the permutation sites {names}; choose one: site={names[0]!r}")
    value = values[names[0]]
    batch = value.shape[2:-2]
    place = item if isinstance(item, tuple) else (item,)
    if len(place) != len(batch) or any(not -size <= k < size for k, size in zip(place, batch, strict=True)):
        raise ValueError(f"item must be an index of the batch shape {tuple(batch)} of site {names[0]!r}, but is {item!r}")
    chosen: tuple[Any, ...] = (slice(None), slice(None), *place)
    value = value[chosen]
    found = summary({names[0]: value}, group_by_chain=True, sites=names)[names[0]]
    index = columns(value)
    n = value.shape[-1]
    if rows is None:
        rows = sorted(found.entropy.argsort(descending=True, stable=True)[:_TRACED_ROWS].tolist())
    if not rows or any(isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < n for row in rows):
        raise ValueError(f"rows must be integers from 0 to {n - 1}, at least one, but is {rows!r}")
    panels = [("distance to MAP\n(share of rows)", hamming(value, found.map))]
    if log_density is not None:
        panels.append(("log density\n(nats)", check_log_density(log_density, value.shape[:2])))
    if ax is None:
        sizes = [max(2.0, 0.45 * len(rows)), *[1.4] * len(panels)]
        axes: NDArray[Any] = plt.subplots(
            len(sizes), 1, sharex=True, figsize=(8, sum(sizes) + 0.8), height_ratios=sizes, layout="constrained"
        )[1]
    else:
        axes = np.array(list(ax) if isinstance(ax, Iterable) else [ax])
        if len(axes) != 1 + len(panels):
            raise ValueError(f"ax must hold {1 + len(panels)} axes, but holds {len(axes)}")
    draws = np.arange(value.shape[1])
    top = axes[0]
    ticks = []
    for band, row in zip(range(len(rows) - 1, -1, -1), rows, strict=True):  # from top to bottom
        column = index[..., row].cpu().numpy()
        low, high = int(column.min()), int(column.max())
        ticks.append(f"row {row}: {low}" if low == high else f"row {row}: {low} to {high}")
        top.axhspan(band + 0.05, band + 0.95, color="#eef1f4", zorder=0)
        for chain, line in enumerate(column):
            height = band + 0.5 + 0.8 * ((line - low) / max(high - low, 1) - 0.5 * (high > low))
            label = f"chain {chain}" if band == 0 else None
            top.plot(draws, height, drawstyle="steps-mid", color=f"C{chain % 10}", lw=0.8, alpha=0.8, label=label)
    top.set(yticks=np.arange(len(rows))[::-1] + 0.5, yticklabels=ticks, ylim=(0, len(rows)), ylabel="column of each row")
    if len(index) > 1:
        top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(index), frameon=False, fontsize="small")
    for panel, (label, lines) in zip(axes[1:], panels, strict=True):
        for chain, line in enumerate(lines.cpu().numpy()):
            panel.plot(draws, line, color=f"C{chain % 10}", lw=0.8, alpha=0.8)
        panel.set_ylabel(label)
    axes[1].set_ylim(-0.03, 1.03)
    axes[-1].set_xlabel("draw")
    return axes


def _one_site(posterior: Summary) -> SiteSummary:
    """The only site of a summary."""
    if len(posterior) != 1:
        raise ValueError(f"the summary has the sites {list(posterior)}; choose one: summary[{next(iter(posterior))!r}]")
    return next(iter(posterior.values()))


def _one_item(posterior: Posterior) -> tuple[Tensor, SiteSummary | None]:
    """Marginals (n, n), with the summary that they are from."""
    posterior = _one_site(posterior) if isinstance(posterior, Summary) else posterior
    site = posterior if isinstance(posterior, SiteSummary) else None
    marginals = posterior.marginals if isinstance(posterior, SiteSummary) else posterior
    check_marginals(marginals)
    if marginals.dim() != 2:
        name = "marginals" if site is None else "summary"
        raise ValueError(
            f"marginals must be of one batch item, but has shape {tuple(marginals.shape)}; choose one: "
            f"{name}[{', '.join('0' * (marginals.dim() - 2))}]"
        )
    return marginals.detach(), site


def _check_allowed(allowed: Any, shape: torch.Size) -> Tensor:
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        kind = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
        raise TypeError(f"allowed must be a tensor of dtype torch.bool and shape {tuple(shape)}, but is {kind}")
    if allowed.shape != shape:
        raise ValueError(f"allowed must have shape {tuple(shape)}, but has shape {tuple(allowed.shape)}")
    empty = ~allowed.any(-1)
    if bool(empty.any()):
        raise ValueError(f"allowed must allow every row a column, but row {int(empty.nonzero()[0])} has none")
    return allowed


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes or those of a new figure, in inches."""
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _cell_points(ax: Axes, n: int) -> float:
    """Width of one of n cells of the axes, in points."""
    box = ax.get_window_extent()
    return float(min(box.width, box.height)) * 72 / ax.figure.dpi / n


def _bars(heights: Tensor, colors: str | list[str], ax: Axes | None) -> Axes:
    """A bar for each row."""
    n = len(heights)
    ax = _axes(ax, (min(12.0, max(4.0, 1.5 + 0.25 * n)), 3.0))
    ax.bar(np.arange(n), heights.cpu().numpy(), width=0.8 if n <= 60 else 1.0, color=colors)
    ax.set(xlabel="row", xlim=(-0.6, n - 0.4))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return ax

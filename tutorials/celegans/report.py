"""Tables and pictures of a comparison of methods."""

from __future__ import annotations

import csv
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from torch import Tensor

from pyro_gs.calibration import Reliability, reliability
from tutorials.celegans.cells import mean_candidates
from tutorials.celegans.connectome import Connectome
from tutorials.celegans.identification import Identification, onehot
from tutorials.celegans.worms import Worms, accuracy

__all__ = ["COLORS", "Score", "draw_figures", "markdown_table", "reliability_curve", "score", "write_results"]

COLORS = {
    "Gumbel-Sinkhorn VI": "#d1495b",
    "Gumbel-Sinkhorn VI, plain": "#e9a0a9",
    "naive VI": "#66a182",
    "MAP (FAQ)": "#edae49",
    "MCMC (paper)": "#2e4057",
    "collapsed MCMC": "#00798c",
    "VI with Gaussian W": "#7b4b94",
    "rounding VI": "#b5a27f",
    "stick-breaking VI": "#7f5539",
    "VI, then MCMC": "#8c1c13",
    "tempered MCMC": "#4fb3e8",
    "MAP with exchanges": "#b37a00",
    "ceiling": "#999999",
}


@dataclass(frozen=True)
class Score:
    """How well a method did.

    Attributes:
        method: its name.
        accuracy: share of observed neurons whose hard assignment is right, known ones counted in.
        accuracy_unknown: the same over the observed neurons that were not known.
        calibration_error: expected calibration error over the same neurons: the mean distance between
            the probability given to the answer and how often such answers are right, over ten bins.
        seconds: wall-clock time.
    """

    method: str
    accuracy: float
    accuracy_unknown: float
    calibration_error: float
    seconds: float


def reliability_curve(result: Identification, worms: Worms) -> Reliability | None:
    """Reliability of the answers about observed unknown neurons, in ten bins; None if all are known."""
    assert worms.truth is not None
    unknown = worms.observed & ~worms.known
    if not unknown.any():
        return None
    return reliability(result.marginals, onehot(worms.truth), answer=onehot(result.index), rows=unknown)


def score(result: Identification, worms: Worms) -> Score:
    """Compare a result with the truth, which the methods do not see."""
    assert worms.truth is not None
    curve = reliability_curve(result, worms)
    return Score(
        result.method,
        _accuracy(result.index, worms),
        1.0 if curve is None else accuracy(result.index, worms.truth, worms.observed & ~worms.known),
        0.0 if curve is None else curve.calibration_error,
        result.seconds,
    )


def _accuracy(index: Tensor, worms: Worms) -> float:
    """Share of observed neurons that are right."""
    assert worms.truth is not None
    return accuracy(index, worms.truth, worms.observed)


def _accuracy_of(worm: int, index: Tensor, worms: Worms) -> float:
    """The same in one worm."""
    assert worms.truth is not None
    return accuracy(index[worm], worms.truth[worm], worms.observed[worm])


def markdown_table(scores: list[Score], chance: float) -> str:
    """The comparison as a table, best first, chance last."""
    lines = ["| method | accuracy | of the unknown | calibration error | seconds |", "| --- | --- | --- | --- | --- |"]
    for s in sorted(scores, key=lambda s: -s.accuracy):
        lines.append(
            f"| {s.method} | {s.accuracy:.3f} | {s.accuracy_unknown:.3f} | {s.calibration_error:.3f} | {s.seconds:.0f} |"
        )
    lines.append(f"| chance | {chance:.3f} | | | |")
    return "\n".join(lines)


def write_results(
    out: Path, results: list[Identification], worms: Worms, connectome: Connectome, chance: float, settings: dict[str, Any]
) -> list[Score]:
    """Write ``results.csv``, ``history.csv``, ``identities.csv`` and ``results.json`` into a folder."""
    assert worms.truth is not None
    scores = [score(result, worms) for result in results]
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "accuracy", "accuracy_unknown", "calibration_error", "seconds"])
        for s in scores:
            row = (s.accuracy, s.accuracy_unknown, s.calibration_error, s.seconds)
            writer.writerow([s.method, *(f"{x:.6f}" for x in row)])
    with (out / "history.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seconds", "step", "objective", "accuracy"])
        for result in results:
            for look in result.history:
                right = _accuracy(look.index, worms)
                writer.writerow([result.method, f"{look.seconds:.3f}", look.step, f"{look.objective:.4f}", f"{right:.6f}"])
    with (out / "identities.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "worm", "observed", "identity", "probability", "truth", "known"])
        for result in results:
            sure = result.marginals.gather(2, result.index[..., None])[..., 0]
            for j, m in worms.observed.nonzero().tolist():
                names = [connectome.names[int(index[j, m])] for index in (result.index, worms.truth)]
                known = int(worms.known[j, m])
                writer.writerow([result.method, j, m, names[0], f"{float(sure[j, m]):.4f}", names[1], known])
    versions = {"python": platform.python_version(), "torch": torch.__version__, "matplotlib": matplotlib.__version__}
    content = {
        "settings": settings,
        "chance": chance,
        "mean candidates": mean_candidates(worms),
        "scores": [vars(s) for s in scores],
        "extra": {result.method: result.extra for result in results},
        "versions": versions,
    }
    (out / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    return scores


def draw_figures(
    out: Path, results: list[Identification], worms: Worms, connectome: Connectome, chance: float
) -> list[Path]:
    """Draw all pictures as PNG into a folder; their paths."""
    with plt.rc_context({"figure.dpi": 120, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        return [
            _draw_connectome(out / "connectome.png", connectome),
            _draw_activity(out / "activity.png", worms, connectome),
            _draw_marginals(out / "marginals.png", results, worms, connectome),
            _draw_accuracy(out / "accuracy.png", results, worms, chance),
            _draw_progress(out / "progress.png", results, worms, chance),
        ]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
    return path


def _draw_connectome(path: Path, connectome: Connectome) -> Path:
    along, up = connectome.position[:, 1].numpy(), connectome.position[:, 2].numpy()
    receivers, senders = connectome.adjacency.nonzero(as_tuple=True)
    degree = (connectome.adjacency.sum(0) + connectome.adjacency.sum(1)).numpy()
    figure, axes = plt.subplots(2, 1, figsize=(10, 5.4), layout="constrained")
    for ax in axes:
        for i, k in zip(receivers.tolist(), senders.tolist(), strict=True):
            ax.plot(along[[i, k]], up[[i, k]], color="#2e4057", lw=0.4, alpha=0.15, zorder=1)
        dots = ax.scatter(along, up, s=8 + 2 * degree, c=degree, cmap="plasma", zorder=2)
        ax.set_ylabel("dorsal-ventral (µm)")
    head = along.min() + 0.12 * (along.max() - along.min())  # half of the neurons lie here
    for ax, shown in ((axes[0], along > head), (axes[1], along <= head)):
        for i in np.argsort(-np.where(shown, degree, -1), kind="stable")[:10]:
            ax.annotate(connectome.names[i], (along[i], up[i]), xytext=(4, 3), textcoords="offset points", fontsize=7)
    count = f"{len(connectome)} neurons of C. elegans, {int(connectome.adjacency.sum())} {connectome.graph} connections"
    axes[0].set_title(count)
    shown = up[along <= head]
    axes[1].set(
        xlim=(along.min() - 3, head),
        ylim=(shown.min() - 4, shown.max() + 4),
        xlabel="position along the body, head to tail (µm); below: the head",
    )
    figure.colorbar(dots, ax=axes, label="connections of the neuron", pad=0.01)
    return _save(figure, path)


def _draw_activity(path: Path, worms: Worms, connectome: Connectome) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    moments = min(200, worms.traces.shape[1])
    shown = worms.traces[0, :moments]
    limit = float(shown.abs().quantile(0.99))
    assert worms.truth is not None
    body = connectome.body[worms.truth[0]]
    orders = {"as observed: an order of its own": torch.arange(worms.num_neurons), "sorted along the body": body.argsort()}
    for ax, (title, order) in zip(axes, orders.items(), strict=True):
        image = ax.imshow(
            shown[:, order].T.numpy(), aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none"
        )
        ax.set(xlabel="time step", title=f"worm 1, {title}")
    axes[0].set_ylabel("neuron")
    figure.colorbar(image, ax=axes, label="activity", pad=0.01)
    return _save(figure, path)


def _body_order(worms: Worms, connectome: Connectome) -> tuple[Tensor, Tensor]:
    """Rows of worm 1 and identities, both sorted along the body by the truth."""
    assert worms.truth is not None
    identities = connectome.body.argsort(stable=True)
    rows = worms.truth[0].argsort()[identities]
    return rows, identities


def _draw_marginals(path: Path, results: list[Identification], worms: Worms, connectome: Connectome) -> Path:
    assert worms.truth is not None
    rows, identities = _body_order(worms, connectome)
    panels: list[tuple[str, Tensor]] = [
        ("candidates", worms.allowed[0].double() / worms.allowed[0].sum(-1, keepdim=True)),
        *[(f"{r.method}: {_accuracy_of(0, r.index, worms):.2f}", r.marginals[0]) for r in results],
        ("truth", onehot(worms.truth[0])),
    ]
    columns = max(3, -(-len(panels) // 2))
    figure, axes = plt.subplots(
        -(-len(panels) // columns),
        columns,
        figsize=(2.5 * columns, 2.9 * -(-len(panels) // columns)),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.axis("off")
    for ax, (title, marginal) in zip(axes.flat, panels, strict=False):
        ax.axis("on")
        shown = marginal[rows][:, identities].clamp(min=0).sqrt()  # square root: small probabilities show
        image = ax.imshow(shown.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize=8)
        ax.set(xticks=[], yticks=[])
    for ax in axes[:, 0]:
        ax.set_ylabel("observed neuron")
    for ax in axes[-1]:
        ax.set_xlabel("identity")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, label="posterior probability")
    bar.set_ticks([0, 0.1**0.5, 0.5**0.5, 1], labels=["0", ".1", ".5", "1"])
    figure.suptitle("worm 1, rows and columns sorted along the body: right answers lie on the diagonal", fontsize=10)
    return _save(figure, path)


def _draw_accuracy(path: Path, results: list[Identification], worms: Worms, chance: float) -> Path:
    ordered = sorted(results, key=lambda r: _accuracy(r.index, worms))
    figure, ax = plt.subplots(figsize=(7, 0.45 * len(ordered) + 1.2))
    for place, result in enumerate(ordered):
        right = _accuracy(result.index, worms)
        ax.barh(place, right, color=COLORS.get(result.method, "#777777"))
        each = [_accuracy_of(j, result.index, worms) for j in range(worms.num_worms)]
        ax.scatter(each, [place] * len(each), s=10, color="black", zorder=3)
        ax.text(max(right, *each) + 0.02, place, f"{right:.3f}", va="center")
    ax.axvline(chance, color="black", ls=":", lw=1)
    ax.text(chance + 0.01, len(ordered) - 0.5, "chance", ha="left", va="bottom", fontsize=8)
    ax.set(
        yticks=range(len(ordered)),
        yticklabels=[r.method for r in ordered],
        xlim=(0, 1.1),
        xlabel="accuracy (dots: each worm)",
    )
    return _save(figure, path)


def _draw_progress(path: Path, results: list[Identification], worms: Worms, chance: float) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for result in results:
        if not result.history:
            continue
        seconds = [look.seconds for look in result.history]
        color = COLORS.get(result.method, "#777777")
        axes[0].plot(seconds, [_accuracy(look.index, worms) for look in result.history], color=color, label=result.method)
        axes[1].plot(seconds, [look.objective for look in result.history], color=color)
    axes[0].axhline(chance, color="black", ls=":", lw=1)
    axes[0].set(xlabel="seconds", ylabel="accuracy", ylim=(0, 1.02), title="accuracy over time (dotted: chance)")
    best = max((look.objective for r in results for look in r.history), default=0.0)
    low = _lowest_shown(axes[1], best)
    axes[1].set(
        xlabel="seconds",
        ylabel="nats",
        title="objective over time: ELBO, or log p(Y, P)",
        ylim=(low, best + 0.03 * (best - low)),
    )
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return _save(figure, path)


def _lowest_shown(ax: Axes, best: float) -> float:
    """Lower limit that leaves out each line's first steep part."""
    lows = [np.quantile(np.asarray(line.get_ydata(), dtype=float), 0.1) for line in ax.get_lines()]
    return float(min(lows, default=best - 1.0)) - 1.0

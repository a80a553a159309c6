"""The answer for recordings of your own: a table of identities with their probabilities."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from tutorials.celegans.connectome import Connectome
from tutorials.celegans.identification import Identification, match_allowed, onehot
from tutorials.celegans.recordings import Recording
from tutorials.celegans.worms import Worms

__all__ = ["Identity", "best_matching", "identity_table", "write_identities"]


@dataclass(frozen=True)
class Identity:
    """What is thought of one neuron of a recording.

    Attributes:
        worm: Name of the recording.
        label: Of the neuron, as in the file.
        identity: The answer, see `best_matching`.
        probability: Posterior probability of the answer.
        second: The most probable of the other names, empty if all have probability zero. More probable than the answer where
            that name is needed for another neuron.
        second_probability: Its probability.
        third: The next one, empty if there is none.
        third_probability: Its probability.
        known: Whether the identity was given.
    """

    worm: str
    label: str
    identity: str
    probability: float
    second: str
    second_probability: float
    third: str
    third_probability: float
    known: bool


def best_matching(result: Identification, worms: Worms) -> Tensor:
    """The matching with the largest expected number of right names: that of the marginals, not the posterior's mode.

    A guide or a chain that has not settled has a mode which its own marginals hold to be improbable in places.

    Args:
        result: What a method returned for the worms.
        worms: J of them; those rows of ``n`` that show no neuron do not count.

    Returns:
        Shape (J, n), long: allowed permutations. Ties go to the method's own answer.
    """
    scores = torch.where(worms.observed.unsqueeze(-1), result.marginals + 1e-9 * onehot(result.index), 0.0)
    return match_allowed(scores, worms.allowed)


def identity_table(
    result: Identification, worms: Worms, recordings: Sequence[Recording], connectome: Connectome
) -> list[Identity]:
    """List every neuron that was seen, in the order of the recordings and their labels.

    Args:
        result: What a method returned for the worms.
        worms: Made of the recordings by ``to_worms``.
        recordings: J of them.
        connectome: The network behind the worms, of n neurons.

    Returns:
        A row a neuron. The rows of neurons that a worm does not show are left out.

    Raises:
        ValueError: If these do not belong together.
    """
    sizes = [len(recording.labels) for recording in recordings]
    if worms.observed.sum(1).tolist() != sizes or len(connectome) != worms.num_neurons:
        raise ValueError(
            f"worms of {worms.observed.sum(1).tolist()} neurons of {worms.num_neurons}, recordings of {sizes} neurons and a "
            f"connectome of {len(connectome)}; expected the recordings and the connectome that the worms were made of"
        )
    if result.index.shape != worms.known.shape:
        raise ValueError(f"result of shape {tuple(result.index.shape)}, expected {tuple(worms.known.shape)}, as the worms")
    rows: list[Identity] = []
    answers = best_matching(result, worms)
    for j, recording in enumerate(recordings):
        for m, label in enumerate(recording.labels):
            marginal, answer = result.marginals[j, m].clone(), int(answers[j, m])
            probability = float(marginal[answer])
            marginal[answer] = -1.0
            values, places = marginal.topk(min(2, len(marginal)))
            others = [
                (connectome.names[place], value) if value > 0 else ("", 0.0)
                for value, place in zip(values.tolist(), places.tolist(), strict=True)
            ]
            others += [("", 0.0)] * (2 - len(others))
            (second, p2), (third, p3) = others
            name, known = connectome.names[answer], bool(worms.known[j, m])
            rows.append(Identity(recording.name, label, name, probability, second, p2, third, p3, known))
    return rows


def write_identities(path: str | Path, rows: Sequence[Identity]) -> None:
    """Write the table as a CSV with the fields of `Identity` as columns; probabilities have four digits, known is 0 or 1."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Identity)])
        for row in rows:
            cells = [f"{cell:.4f}" if isinstance(cell, float) else cell for cell in astuple(row)]
            writer.writerow([*cells[:-1], int(row.known)])

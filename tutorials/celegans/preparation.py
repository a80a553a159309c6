"""From recordings to `Worms`: traces on a common scale, candidates by place, and rows for the neurons that were not seen."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_gs.ops.support import find_support, hall_violator
from tutorials.celegans.atlas import Atlas
from tutorials.celegans.connectome import Connectome, normalize_name
from tutorials.celegans.doubts import warn_of_doubts
from tutorials.celegans.identification import match_allowed
from tutorials.celegans.recordings import Recording
from tutorials.celegans.registration import Registration, position_logits, register
from tutorials.celegans.worms import Worms, reveal

__all__ = ["standardize", "to_worms"]

MONOTONE = 10
"""Time steps from which a column that only rises is taken for one of times."""


def standardize(recording: Recording) -> tuple[Tensor, Tensor]:
    """Bring each trace to mean zero and to noise of standard deviation one.

    The model takes each trace to be what its senders did a time step before, plus noise of standard deviation
    ``sigma``, the same for all neurons. So a trace is divided by the scale of what its own past does not tell:
    the residual of a first-order autoregression, fitted by least squares. Its autocorrelation stays, and the
    autoregression's coefficient goes into the model beside it, as ``Worms.persistence``: calcium is slow.

    Args:
        recording: Of m neurons.

    Returns:
        The traces, shape (T + 1, m), and their persistence, shape (m,), both float64.

    Raises:
        ValueError: If a trace is constant, or a straight function of its own past, or only rises, as times do; the message
            names the neuron.
    """
    rising = (recording.traces.diff(dim=0) > 0).all(0)
    if rising.any() and len(recording.traces) >= MONOTONE:
        raise ValueError(
            f"recording {recording.name!r}: the column {_listed(_chosen(recording.labels, rising))} rises at every time "
            f"step, as times or an index do, expected traces of neurons; {_LEAVE_OUT}"
        )
    tiny = torch.finfo(torch.float64).tiny
    traces = recording.traces / recording.traces.abs().amax(0).clamp(min=tiny)  # squares of any unit then stay finite
    before, after = traces[:-1] - traces[:-1].mean(0), traces[1:] - traces[1:].mean(0)
    slope = (before * after).sum(0) / before.square().sum(0).clamp(min=tiny)
    scale = (after - slope * before).square().mean(0).sqrt()
    flat = ~(scale > 1e-9)
    if flat.any():
        raise ValueError(
            f"recording {recording.name!r}: the traces of {_listed(_chosen(recording.labels, flat))} have no noise "
            f"(constant, or {len(traces)} time steps are too few), expected some; {_LEAVE_OUT}"
        )
    return (traces - traces.mean(0)) / scale, slope


def to_worms(
    recordings: Sequence[Recording],
    connectome: Connectome,
    *,
    atlas: Atlas | None = None,
    eta: float | None = None,
    max_candidates: int | None = None,
    sigma: float = 1.0,
    weight_scale: float | None = None,
    mirrored: bool | None = None,
) -> Worms:
    """Make recordings of different sizes and lengths ready for inference.

    Traces are standardized (`standardize`). A neuron that is known has one candidate, in row and column; the others
    may be any identity left, within ``eta`` and ``max_candidates``. A worm that shows m < n neurons gets n - m
    rows more, which may take every identity that is not known to be seen. Candidates that lie on no permutation are
    left out. With an atlas, each worm is registered with it (`register`) and the log density of place and colour under
    each identity becomes the prior's ``logits``.

    Args:
        recordings: One or more.
        connectome: The n neurons; each recording shows as many or fewer.
        atlas: Of places, and colours if wanted; has to have all neurons of the connectome, and may have more. At least one
            recording then needs positions; nothing is known of the places in one that has none.
        eta: Only identities nearer than this along the body are candidates, as a share of the extent of the connectome's
            neurons in the atlas (in ``Atlas.from_connectome(connectome)`` if there is none). All recordings then need
            positions.
        max_candidates: Only so many, the densest by place and colour, are candidates of a neuron; beside them, its
            identity in the best matching of all. Needs an atlas.
        sigma: Standard deviation of the noise, in units of the standardized traces.
        weight_scale: Prior standard deviation of the weights, ``1 / (2 sqrt(mean in-degree))`` by default.
        mirrored: Whether the frame of the positions, of all recordings, is a mirror image of the atlas's; None where that is
            not known, and has to be found out from the places.

    Returns:
        The worms, in the order given, without truth.

    Warns:
        UserWarning: If the way a worm lies on the atlas is in doubt, see :func:`~tutorials.celegans.doubts.warn_of_doubts`.

    Raises:
        ValueError: If a label names no neuron of the connectome, a worm shows more neurons than there are, positions or
            atlas are missing where needed, a trace cannot be standardized, or the candidates leave no matching; the message
            names recording and neurons.
    """
    n = len(connectome)
    if not recordings:
        raise ValueError("recordings is empty, expected at least one")
    if isinstance(recordings, Recording):
        raise ValueError("recordings is a single one, expected a sequence: [recording]")
    if eta is not None and not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"eta={eta!r}: expected a positive finite share of the body")
    if max_candidates is not None and (isinstance(max_candidates, bool) or max_candidates < 1):
        raise ValueError(f"max_candidates={max_candidates!r}: expected an integer of at least 1")
    if max_candidates is not None and atlas is None:
        raise ValueError(f"max_candidates={max_candidates} needs an atlas, which tells the candidates to keep")
    identities = [_identities(recording, connectome) for recording in recordings]
    used = atlas
    if atlas is None and eta is not None:
        used = Atlas.from_connectome(connectome)
    columns = None if used is None else _columns(used, connectome)
    placeless = [recording.name for recording in recordings if recording.positions is None]
    if placeless and eta is not None:
        raise ValueError(
            f"recording {placeless[0]!r} has no positions, which eta={eta} needs; give --positions, positions=..."
        )
    if atlas is not None and len(placeless) == len(recordings):
        raise ValueError(
            f"recording {placeless[0]!r} has no positions, which an atlas needs; give --positions, positions=..."
        )
    if weight_scale is None:
        weight_scale = 0.5 / math.sqrt(max(float(connectome.adjacency.sum()) / n, 1.0))

    count, longest = len(recordings), max(len(recording.traces) for recording in recordings)
    traces = torch.zeros(count, longest, n, dtype=torch.float64)
    allowed = torch.ones(count, n, n, dtype=torch.bool)
    known = torch.zeros(count, n, dtype=torch.bool)
    identity = torch.zeros(count, n, dtype=torch.long)
    logits = torch.zeros(count, n, n, dtype=torch.float64)
    persistence = torch.zeros(count, n, dtype=torch.float64)
    for j, recording in enumerate(recordings):
        m = len(recording.labels)
        traces[j, : len(recording.traces), :m], persistence[j, :m] = standardize(recording)
        rows = torch.tensor([row for row, place in enumerate(identities[j]) if place is not None], dtype=torch.long)
        known[j, rows] = True
        identity[j, rows] = torch.tensor([place for place in identities[j] if place is not None], dtype=torch.long)
        if used is not None and columns is not None and recording.positions is not None:
            prior = _prior(recording, used, columns, eta, mirrored)
            allowed[j, :m] = prior.near
            if atlas is not None:
                logits[j, :m] = prior.logits
                warn_of_doubts(recording, atlas, prior.registration)
    allowed = reveal(allowed, known, identity)
    for j, recording in enumerate(recordings):
        _check_matching(allowed[j], recording, connectome)
        if max_candidates is not None:
            allowed[j] = _densest(logits[j], allowed[j], len(recording.labels), max_candidates)
    observed = torch.tensor([[row < len(recording.labels) for row in range(n)] for recording in recordings])
    lengths = torch.tensor([len(recording.traces) - 1 for recording in recordings])
    fields = {"observed": observed, "logits": logits, "lengths": lengths, "persistence": persistence}
    return Worms(traces, allowed, known, None, sigma, weight_scale, **fields)


_LEAVE_OUT = "to leave labels out: --drop, drop=... or without(labels)"


def _chosen(labels: Sequence[str], mask: Tensor) -> list[str]:
    return [label or "''" for label, chosen in zip(labels, mask.tolist(), strict=True) if chosen]


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _identities(recording: Recording, connectome: Connectome) -> list[int | None]:
    """The place of each known neuron in the connectome."""
    m, n = len(recording.labels), len(connectome)
    if m > n:
        raise ValueError(
            f"recording {recording.name!r} has {m} neurons, expected at most the {n} of the connectome; a row is a time "
            f"step, a column a neuron; {_LEAVE_OUT}"
        )
    places = {name: i for i, name in enumerate(connectome.names)}
    wrong = [
        label
        for label, name in zip(recording.labels, recording.identities, strict=True)
        if name is not None and name not in places
    ]
    if wrong:
        close = difflib.get_close_matches(normalize_name(wrong[0]), connectome.names, n=3, cutoff=0.5)
        raise ValueError(
            f"recording {recording.name!r}: {', '.join(map(repr, wrong))} ({len(wrong)} in all): no neuron of the "
            f"connectome, close to the first: {', '.join(close) or 'none'}; expected a name, or a label that starts with "
            f"'?' for an unknown neuron; {_LEAVE_OUT}"
        )
    return [None if name is None else places[name] for name in recording.identities]


def _columns(atlas: Atlas, connectome: Connectome) -> Tensor:
    """The place in the atlas of each neuron of the connectome: long (n,)."""
    places = {name: i for i, name in enumerate(atlas.names)}
    missing = [name for name in connectome.names if name not in places]
    if missing:
        raise ValueError(
            f"atlas: it lacks {len(missing)} of the {len(connectome)} neurons ({_listed(missing)}), expected all; "
            "keep those it has with connectome.subset([name for name in connectome.names if name in atlas.names])"
        )
    return torch.tensor([places[name] for name in connectome.names])


class _Prior(NamedTuple):
    """What a worm's places and colours say: both (m, n); and the map behind it."""

    logits: Tensor
    near: Tensor
    registration: Registration


def _prior(recording: Recording, atlas: Atlas, columns: Tensor, eta: float | None, mirrored: bool | None) -> _Prior:
    registration = register(recording, atlas, mirrored=mirrored)
    logits = position_logits(registration, atlas)[:, columns]
    if eta is None:
        return _Prior(logits, torch.ones_like(logits, dtype=torch.bool), registration)
    body = (atlas.means @ atlas.axis)[columns]
    distance = ((registration.positions @ atlas.axis).unsqueeze(1) - body).abs()
    return _Prior(logits, distance < eta * (body.max() - body.min()), registration)


def _densest(logits: Tensor, allowed: Tensor, m: int, most: int) -> Tensor:
    """Of the candidates of the first m rows, the densest, and those of the best matching."""
    score = torch.where(allowed[:m], logits[:m], -math.inf)
    keep = allowed.clone()
    if most < allowed.shape[1]:
        keep[:m] &= score >= score.topk(most, dim=1).values[:, -1:]
    best = match_allowed(logits, allowed)
    keep[torch.arange(len(best)), best] = True
    return keep


def _check_matching(allowed: Tensor, recording: Recording, connectome: Connectome) -> None:
    """Refuse candidates (n, n) that leave no matching, and name the neurons that have too few."""
    try:
        find_support(allowed, "allowed", warn=False)
    except ValueError:
        rows, columns = hall_violator(allowed)
        names = _listed([connectome.names[column] for column in columns]) or "none"
        labels = _listed([recording.labels[row] for row in rows])
        raise ValueError(
            f"recording {recording.name!r}: the neurons {labels} ({len(rows)} in all) have "
            f"only {len(columns)} candidates between them ({names}), so that no matching is left; raise eta, or "
            "look at the known identities nearby"
        ) from None

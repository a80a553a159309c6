"""Worms: recordings whose neurons have lost their names, simulated from a connectome or made of recordings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_gs.ops.support import find_support
from tutorials.celegans.connectome import Connectome

__all__ = ["BURN_IN", "Worms", "accuracy", "chance_accuracy", "reveal", "simulate", "swap_pairs"]

BURN_IN = 100
"""Time steps that `simulate` throws away."""


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}={value!r}: expected a positive finite number")


@dataclass(frozen=True, eq=False)
class Worms:
    """Recordings of J worms, each in its own unknown order of the same n neurons, or of some of them.

    Row ``m`` of a worm is the m-th neuron as observed, column ``i`` the i-th name (the identity) of the
    connectome. A worm that shows fewer neurons is filled up: its last rows are not observed, their traces are
    zero, and they take the identities that this worm does not show. So every ``P`` is square, and a partial
    matching is its first rows.

    Attributes:
        traces: Shape (J, T + 1, n), float64: activity by worm, time step and observed neuron. Zero after the end of a
            recording that is shorter than the others.
        allowed: Shape (J, n, n), bool: ``allowed[j, m, i]`` where observed neuron m may be identity i. Candidates that lie
            on no allowed permutation are taken out.
        known: Shape (J, n), bool: the observed neurons whose identity is given; they have one candidate.
        truth: Shape (J, n), long: the identity of each observed neuron, or None where nobody knows.
        sigma: Standard deviation of the noise, in the units of the traces.
        weight_scale: Standard deviation of the prior of each weight of the network.
        weights: Shape (n, n), float64: the weights behind a simulation, or None.
        observed: Shape (J, n), bool: which rows are neurons that were seen; all of them by default. In each worm they
            come first.
        logits: Shape (J, n, n), float64, finite: what speaks for each candidate beside the activity, such as its
            place and colour: the prior of ``P`` is proportional to ``exp <logits, P>`` on the allowed permutations.
            Zero by default, and at rows that are not observed.
        lengths: Shape (J,), long: number T of transitions in each recording; by default that of the traces.
        persistence: Shape (J, n), float64, finite: share of each neuron's activity that is left a time step later, as
            calcium indicators and leaky cells have it; added to what the network sends. Zero by default.
    """

    traces: Tensor
    allowed: Tensor
    known: Tensor
    truth: Tensor | None
    sigma: float
    weight_scale: float
    weights: Tensor | None = None
    observed: Tensor = None  # type: ignore[assignment]  # filled in below, as are the next three
    logits: Tensor = None  # type: ignore[assignment]
    lengths: Tensor = None  # type: ignore[assignment]
    persistence: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Fill in what was left out, and check that the fields are usable and fit one another."""
        if self.traces.dim() != 3 or self.traces.dtype != torch.float64 or self.traces.shape[1] < 2:
            raise ValueError(
                f"traces has shape {tuple(self.traces.shape)} and dtype {self.traces.dtype}, expected "
                "float64 of shape (worms, time steps, neurons) with at least 2 time steps"
            )
        worms, times, n = self.traces.shape
        for field, default in (
            ("observed", lambda: torch.ones(worms, n, dtype=torch.bool)),
            ("logits", lambda: torch.zeros(worms, n, n, dtype=torch.float64)),
            ("lengths", lambda: torch.full((worms,), times - 1)),
            ("persistence", lambda: torch.zeros(worms, n, dtype=torch.float64)),
        ):
            if getattr(self, field) is None:
                object.__setattr__(self, field, default().to(self.traces.device))
        fields = [
            ("allowed", self.allowed, (worms, n, n), torch.bool),
            ("known", self.known, (worms, n), torch.bool),
            ("observed", self.observed, (worms, n), torch.bool),
            ("logits", self.logits, (worms, n, n), torch.float64),
            ("lengths", self.lengths, (worms,), torch.long),
            ("persistence", self.persistence, (worms, n), torch.float64),
        ]
        if self.truth is not None:
            fields.append(("truth", self.truth, (worms, n), torch.long))
        if self.weights is not None:
            fields.append(("weights", self.weights, (n, n), torch.float64))
        for name, tensor, shape, dtype in fields:
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, "
                    f"expected {shape} and {dtype} for traces of shape {tuple(self.traces.shape)}"
                )
        for name in ("sigma", "weight_scale"):
            _check_positive(name, getattr(self, name))
        bad = (~self.traces.isfinite()).nonzero()
        if len(bad):
            worm, step, neuron = bad[0].tolist()
            raise ValueError(
                f"traces[{worm}, {step}, {neuron}] is {self.traces[worm, step, neuron].item()} (worm {worm}, "
                f"time step {step}, neuron {neuron}; {len(bad)} such values in all), expected finite numbers"
            )
        if not bool(self.logits.isfinite().all()):
            worm, neuron, identity = (~self.logits.isfinite()).nonzero()[0].tolist()
            value = self.logits[worm, neuron, identity].item()
            raise ValueError(f"logits[{worm}, {neuron}, {identity}] is {value}, expected finite numbers; allowed forbids")
        if not bool(self.persistence.isfinite().all()):
            worm, neuron = (~self.persistence.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"persistence[{worm}, {neuron}] is {self.persistence[worm, neuron].item()}, expected finite numbers"
            )
        self._check_padding(times - 1)
        self._check_candidates()
        pruned = find_support(self.allowed, "allowed", warn=False).allowed
        if pruned is not None:
            object.__setattr__(self, "allowed", pruned)

    def take(self, worms: Sequence[int]) -> Worms:
        """Some of the worms.

        Args:
            worms: Their numbers, at least one.

        Returns:
            Them alone, their traces cut to the longest of their recordings.
        """
        chosen = list(worms)
        lengths = self.lengths[chosen]
        return dataclasses.replace(
            self,
            traces=self.traces[chosen, : int(lengths.max()) + 1],
            allowed=self.allowed[chosen],
            known=self.known[chosen],
            truth=None if self.truth is None else self.truth[chosen],
            observed=self.observed[chosen],
            logits=self.logits[chosen],
            lengths=lengths,
            persistence=self.persistence[chosen],
        )

    def _check_padding(self, longest: int) -> None:
        wrong = (self.lengths < 1) | (self.lengths > longest)
        if wrong.any():
            worm = int(wrong.nonzero()[0])
            raise ValueError(f"lengths[{worm}] is {int(self.lengths[worm])}, expected 1 to {longest}")
        if bool((self.observed.int().diff(dim=1) > 0).any()) or not bool(self.observed.any(1).all()):
            raise ValueError("observed: expected at least one neuron in each worm, and those that were seen to come first")
        for worm, (seen, length) in enumerate(zip(self.observed, self.lengths.tolist(), strict=True)):
            if bool(self.traces[worm, :, ~seen].any()) or bool(self.traces[worm, length + 1 :].any()):
                raise ValueError(f"traces[{worm}] is not zero where observed and lengths say that nothing was recorded")
        if bool(self.logits[~self.observed].any()):
            raise ValueError("logits: expected zero at rows that are not observed")
        if bool((self.known & ~self.observed).any()):
            raise ValueError("known: expected False at rows that are not observed")

    def _check_candidates(self) -> None:
        candidates = self.allowed.sum(-1)
        for name, where, expected in (
            ("allowed", candidates == 0, "at least one"),
            ("known", self.known & (candidates != 1), "exactly one"),
        ):
            if where.any():
                worm, neuron = where.nonzero()[0].tolist()
                raise ValueError(
                    f"{name}: neuron {neuron} of worm {worm} has {int(candidates[worm, neuron])} candidates, "
                    f"expected {expected}"
                )
        if self.truth is None:
            return
        n = self.allowed.shape[-1]
        if not bool((self.truth.sort(-1).values == torch.arange(n, device=self.truth.device)).all()):
            raise ValueError(f"truth: expected each row to be a permutation of range({n})")
        forbidden = ~self.allowed.gather(-1, self.truth.unsqueeze(-1)).squeeze(-1)
        if forbidden.any():
            worm, neuron = forbidden.nonzero()[0].tolist()
            raise ValueError(
                f"truth[{worm}, {neuron}] is {int(self.truth[worm, neuron])}, expected an identity that allowed permits"
            )

    @property
    def num_worms(self) -> int:
        """Number of worms J."""
        return self.traces.shape[0]

    @property
    def num_neurons(self) -> int:
        """Number of neurons n in the connectome; a worm shows as many or fewer."""
        return self.traces.shape[2]


def simulate(
    connectome: Connectome,
    *,
    worms: int = 4,
    steps: int = 1000,
    known: float = 0.2,
    eta: float = 0.1,
    sigma: float = 1.0,
    spectral_factor: float = 2.0,
    measurement_noise: float = 0.0,
    unseen: float = 0.0,
    seed: int = 0,
) -> Worms:
    """Simulate worms that share one network and differ in the order of their neurons.

    Weights are Gaussian on the edges, divided by ``spectral_factor`` times their largest absolute eigenvalue.
    Each worm starts at zero and runs for `BURN_IN` steps that are thrown away, after which it is stationary
    to within ``spectral_factor ** -BURN_IN``; then its neurons are put into a random order. An observed
    neuron's candidates are the identities less than ``eta`` away along the body; for the known ones only the
    truth is left, in row and column. Rows that are not observed may be any identity that is not known.

    ``sigma`` alone changes nothing that could be identified: it scales all activity, and the evidence with it.

    Args:
        connectome: The n neurons, their connections and places.
        worms: How many worms, J.
        steps: How many transitions T are recorded; the traces have T + 1 time steps.
        known: Share of neurons whose identity is given, chosen at random in each worm; the count is rounded.
        eta: How far along the body a candidate may lie, in body lengths.
        sigma: Standard deviation of the noise that drives the activity.
        spectral_factor: The largest absolute eigenvalue of the weights is one over this.
        measurement_noise: Standard deviation of noise that is added to the traces, in their units, and that no method
            models.
        unseen: Share of neurons that a worm does not show, chosen at random in each among those that are not known;
            the count is rounded.
        seed: Of all random numbers.

    Returns:
        The worms, with truth and weights.

    Raises:
        ValueError: If an argument is out of its range, fewer neurons are unknown than should be unseen, all are
            unseen, or the connections have no cycle, so that no scale is defined.
    """
    for name, count, least in (("worms", worms, 1), ("steps", steps, 2)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name}={count!r}: expected an integer of at least {least}")
    for name, share in (("known", known), ("unseen", unseen)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share!r}: expected a share within [0, 1]")
    _check_positive("eta", eta)
    _check_positive("sigma", sigma)
    if not (math.isfinite(spectral_factor) and spectral_factor > 1):
        raise ValueError(f"spectral_factor={spectral_factor!r}: expected a finite number above 1, for a stable network")
    if not (math.isfinite(measurement_noise) and measurement_noise >= 0):
        raise ValueError(f"measurement_noise={measurement_noise!r}: expected a finite number of at least 0")

    n = len(connectome)
    hidden = round(unseen * n)
    most = min(n - round(known * n), n - 1)
    if hidden > most:
        raise ValueError(
            f"unseen={unseen!r}: {hidden} of {n} neurons, expected at most {most} with known={known!r}, "
            "for known ones are seen, and one at least is"
        )
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = normal(n, n) * connectome.adjacency
    radius = float(torch.linalg.eigvals(weights).abs().max())
    if radius < 1e-8:
        raise ValueError(f"connectome: the connections of {connectome!r} have no cycle, expected at least one")
    scale = 1 / (spectral_factor * radius)
    weights *= scale

    state = torch.zeros(worms, n, dtype=torch.float64)
    canonical = torch.empty(worms, steps + 1, n, dtype=torch.float64)
    for step in range(-BURN_IN, steps + 1):
        state = state @ weights.mT + sigma * normal(worms, n)
        if step >= 0:
            canonical[:, step] = state

    truth = torch.stack([torch.randperm(n, generator=generator) for _ in range(worms)])
    traces = canonical.gather(2, truth.unsqueeze(1).expand_as(canonical))
    body = connectome.body
    allowed = (body[truth].unsqueeze(-1) - body).abs() < eta
    is_known = torch.zeros(worms, n, dtype=torch.bool)
    observed = torch.ones(worms, n, dtype=torch.bool)
    for worm in range(worms):
        order = torch.randperm(n, generator=generator)
        is_known[worm, order[: round(known * n)]] = True
        observed[worm, order[n - hidden :]] = False
    if measurement_noise:
        traces = traces + measurement_noise * normal(*traces.shape)
    if hidden:
        order = (~observed).int().argsort(dim=1, stable=True)  # those that are not shown come last
        traces = traces.gather(2, order.unsqueeze(1).expand_as(traces))
        allowed = allowed.gather(1, order.unsqueeze(-1).expand_as(allowed))
        truth, is_known, observed = (x.gather(1, order) for x in (truth, is_known, observed))
        traces, allowed = traces * observed.unsqueeze(1), allowed | ~observed.unsqueeze(-1)
    allowed = reveal(allowed, is_known, truth)
    return Worms(traces, allowed, is_known, truth, sigma, scale, weights, observed=observed)


def reveal(allowed: Tensor, known: Tensor, identity: Tensor) -> Tensor:
    """Leave known neurons their identity alone, and take it from the others.

    Args:
        allowed: Shape (J, n, n), bool: candidates.
        known: Shape (J, n), bool: the neurons whose identity is given.
        identity: Shape (J, n), long: their identities; not looked at where not known.

    Returns:
        Shape (J, n, n), bool.
    """
    onehot = torch.nn.functional.one_hot(identity, allowed.shape[-1]).bool() & known.unsqueeze(-1)
    taken = onehot.any(1, keepdim=True)
    return torch.where(known.unsqueeze(-1), onehot, allowed & ~taken)


def accuracy(index: Tensor, truth: Tensor, observed: Tensor | None = None) -> float:
    """Share of observed neurons whose identity is right, known ones counted in.

    Args:
        index: Shape (..., n), long: the identities given.
        truth: The same shape: the right ones.
        observed: The same shape, bool: the rows that count; None for all.

    Raises:
        ValueError: If the shapes differ.
    """
    if index.shape != truth.shape:
        raise ValueError(f"index has shape {tuple(index.shape)}, expected that of truth, {tuple(truth.shape)}")
    right = index == truth
    return float((right if observed is None else right[observed]).double().mean())


def swap_pairs(allowed: Tensor, observed: Tensor | None = None) -> Tensor:
    """List the pairs of rows of one worm that can ever exchange identities.

    Two can only if they share two candidates, and at least one was observed. The list does not depend on the
    assignment, so drawing from it uniformly, and refusing what the assignment at hand forbids, is a symmetric
    proposal.

    Args:
        allowed: Shape (n, n), bool.
        observed: Shape (n,), bool: the rows that are neurons which were seen; None for all.

    Returns:
        Shape (K, 2), long, with the smaller place first.
    """
    possible = (allowed.double() @ allowed.double().mT > 1.5).triu(1)
    if observed is not None:
        possible &= observed.unsqueeze(-1) | observed
    return possible.nonzero()


def chance_accuracy(worms: Worms, *, chains: int = 32, sweeps: int = 60, seed: int = 0) -> float:
    """Estimate the expected accuracy of a uniformly random allowed permutation, known neurons counted in.

    Parallel chains of random swaps start at the truth; the second half of each is averaged. With 139 neurons
    and four worms, seeds differ by about .001. Swaps that keep to the mask need not reach all permutations of
    an arbitrary mask; they do where candidates are windows along the body.

    Args:
        worms: Worms with truth.
        chains: How many chains for each worm.
        sweeps: Length of the chains, in n proposals each.
        seed: Of all random numbers.

    Raises:
        ValueError: If the worms have no truth.
    """
    if worms.truth is None:
        raise ValueError("worms.truth is None, expected the identities: without them no accuracy is defined")
    rng = np.random.default_rng(seed)
    n = worms.num_neurons
    total = 0.0
    for truth, allowed, observed in zip(worms.truth.numpy(), worms.allowed, worms.observed, strict=True):
        pairs, mask, seen = swap_pairs(allowed, observed).numpy(), allowed.numpy(), observed.numpy()
        index, chain = np.tile(truth, (chains, 1)), np.arange(chains)
        if not len(pairs):
            total += 1.0
            continue
        hits = []
        for sweep in range(sweeps):
            for first, second in pairs[rng.integers(len(pairs), size=(n, chains))].transpose(0, 2, 1):
                a, b = index[chain, first], index[chain, second]
                valid = mask[first, b] & mask[second, a]
                index[chain, first], index[chain, second] = np.where(valid, b, a), np.where(valid, a, b)
            if sweep >= sweeps // 2:
                hits.append((index == truth)[:, seen].mean())
        total += float(np.mean(hits))
    return total / worms.num_worms

"""The paper's Monte Carlo: a Gibbs draw of the weights, then Metropolis swaps given the weights."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutorials.celegans.connectome import Connectome
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.identification import (
    Identification,
    Run,
    check_initial,
    match_allowed,
    onehot,
    random_allowed,
)
from tutorials.celegans.worms import Worms, swap_pairs

__all__ = ["GibbsSwapChain", "fit", "swap_changes"]

Floats: TypeAlias = NDArray[np.float64]
Places: TypeAlias = NDArray[np.int64]

SWEEPS = 10
"""Swap proposals for each worm and draw of W in `fit`, in multiples of n."""


def swap_changes(A: Floats, B: Floats, first: Places, second: Places) -> Floats:
    """Change of ``sum(A * B)`` when two rows, and the same two columns, of A change places.

    Args:
        A: Shape (..., n, n).
        B: The same shape. The leading dimensions are summed over.
        first: Shape (K,): places.
        second: Shape (K,): other places.

    Returns:
        Shape (K,), from O(n) work a pair.
    """
    A, B = A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:])
    n = A.shape[-1]
    A_lines = np.concatenate([A, A.transpose(0, 2, 1)]).transpose(1, 0, 2).reshape(n, -1)
    B_lines = np.concatenate([B, B.transpose(0, 2, 1)]).transpose(1, 0, 2).reshape(n, -1)
    return _changes(A, B, A_lines, B_lines, first, second)


def _changes(A: Floats, B: Floats, A_lines: Floats, B_lines: Floats, first: Places, second: Places) -> Floats:
    """As `swap_changes`; row m of the lines is row m and column m of each matrix, one after the other."""
    change: Floats = -np.einsum(
        "kl,kl->k", A_lines[second] - A_lines[first], B_lines[second] - B_lines[first], optimize=False
    )
    # The lines took the four entries at first and second for any others: take that back, add what is right.
    for a, b in zip(A, B, strict=True):
        app, apq, aqp, aqq = a[first, first], a[first, second], a[second, first], a[second, second]
        bpp, bpq, bqp, bqq = b[first, first], b[first, second], b[second, first], b[second, second]
        change += (aqq - app) * (bpp - bqq) + (aqp - apq) * (bpq - bqp)
        change -= (aqp - app) * (bpp - bqp) + (aqq - apq) * (bpq - bqq)
        change -= (apq - app) * (bpp - bpq) + (aqq - aqp) * (bqp - bqq)
    return change


class _Unseen:
    """What `_changes` counts too much where a worm does not show all neurons.

    ``<K, gram>`` sums a power ``w_i' gram w_i`` over all neurons i, with ``w_i`` what the worm's neurons send to i; those
    that the worm does not show must not count.

    Args:
        W: Weights, shape (n, n).
        index: Identities of the worm's rows, shape (n,).
        gram: As scaled in the chain, shape (n, n).
        observed: Rows that are neurons, bool, shape (n,).
    """

    def __init__(self, W: Floats, index: Places, gram: Floats, observed: NDArray[np.bool_]) -> None:
        self._index, self._gram, self._observed = index, gram, observed
        self._sent: Floats = W[:, index]
        self._received: Floats = self._sent @ gram
        self._power: Floats = (self._sent * self._received).sum(1)
        self._unseen = np.ones(len(index), dtype=bool)
        self._unseen[index[observed]] = False

    def changes(self, first: Places, second: Places) -> Floats:
        """What to add to `_changes` for pairs of rows, the second of each perhaps not observed: shape (K,)."""
        gram, received = self._gram, self._received
        step = self._sent[:, second] - self._sent[:, first]
        curvature = gram[first, first] + gram[second, second] - 2 * gram[first, second]
        powers = step * (2 * (received[:, first] - received[:, second]) + step * curvature)
        change: Floats = -(self._unseen @ powers)
        out = np.flatnonzero(~self._observed[second])  # here one neuron disappears and another appears
        leaves, comes = self._index[first[out]], self._index[second[out]]
        change[out] += powers[comes, out] + self._power[comes] - self._power[leaves] - powers[leaves, out]
        return change

    def exchange(self, first: int, second: int) -> None:
        """Follow an exchange that `index` has already seen."""
        step = self._sent[:, second] - self._sent[:, first]
        self._sent[:, first] += step
        self._sent[:, second] -= step
        self._received += np.outer(step, self._gram[first] - self._gram[second])
        self._power = (self._sent * self._received).sum(1)
        self._unseen[:] = True
        self._unseen[self._index[self._observed]] = False


class GibbsSwapChain:
    """A chain on ``(W, P)`` for ``p(W, P | Y)``: W given P by its Gaussian, then swaps of P given W.

    Given W, the log likelihood of a worm is ``<M, cross> / sigma^2 - <K, gram> / (2 sigma^2)``, with ``M = P
    W P'`` and ``K = P W'W P'`` in the worm's own order, so an exchange of two identities exchanges two rows
    and columns of M and K. A proposal picks a pair of observed neurons uniformly among those that can ever
    exchange identities, and is refused where the mask forbids. Proposals are drawn in sequence and scored in
    blocks up to the first that is accepted, which changes nothing but the speed.

    Args:
        evidence: Network, statistics and scales.
        allowed: Shape (J, n, n), bool.
        index: Shape (J, n), long: the start, allowed.
        seed: Of all random numbers.
        proposals: Swaps proposed in each worm for each draw of W.
        logits: Log-potentials of the prior, shape (J, n, n); None for the uniform law.
    """

    def __init__(
        self,
        evidence: CollapsedEvidence,
        allowed: Tensor,
        index: Tensor,
        seed: int,
        *,
        proposals: int,
        logits: Tensor | None = None,
    ) -> None:
        self.evidence = evidence
        self.index: Places = index.numpy().copy()
        self.proposals = proposals
        self._generator = torch.Generator().manual_seed(seed)
        self._rng = np.random.default_rng(seed)
        self._allowed = allowed.numpy()
        observed = evidence.statistics.observed
        self._observed = None if observed is None else observed.numpy()
        self._logits = None if logits is None else logits.numpy()
        seen = [None] * len(allowed) if observed is None else list(observed)
        self._pairs: list[Places] = [swap_pairs(mask, rows).numpy() for mask, rows in zip(allowed, seen, strict=True)]
        precision = 1 / evidence.sigma**2
        cross = evidence.statistics.cross.numpy() * precision
        gram = evidence.statistics.gram.numpy() * (-0.5 * precision)
        self._data: Floats = np.stack([cross, gram], 1)  # (J, 2, n, n), to meet M and K
        # M meets cross by row and column; K and gram are symmetric: rows alone will do if they count twice.
        self._data_lines: Floats = np.concatenate([cross, cross.transpose(0, 2, 1), 2 * gram], 2)
        self.proposed = self.valid = self.accepted = 0

    @property
    def P(self) -> Tensor:
        """Permutations, shape (J, n, n), float64."""
        return onehot(torch.from_numpy(self.index))

    def step(self) -> None:
        """Draw W given P, then propose swaps in each worm given W."""
        self.swap(self.evidence.sample_weights(self.P, self._generator))

    def swap(self, W: Tensor) -> None:
        """Propose swaps in each worm, given weights of shape (n, n)."""
        model = torch.stack([W, W.mT @ W]).numpy()
        for worm, pairs in enumerate(self._pairs):
            if len(pairs):
                first, second = pairs[self._rng.integers(len(pairs), size=self.proposals)].T
                self._scan(worm, model, first, second, np.log1p(-self._rng.random(self.proposals)))
                self.proposed += self.proposals

    def _scan(self, worm: int, model: Floats, first: Places, second: Places, log_uniform: Floats) -> None:
        index, mask = self.index[worm], self._allowed[worm]
        data, data_lines = self._data[worm], self._data_lines[worm]
        A = np.ascontiguousarray(model[:, index[:, None], index])
        lines = np.concatenate([A[0], A[0].T, A[1]], 1)
        n = len(index)
        unseen = None
        if self._observed is not None and not self._observed[worm].all():
            unseen = _Unseen(model[0], index, data[1], self._observed[worm])
        start, block = 0, 32
        while start < len(first):
            p, q = first[start : start + block], second[start : start + block]
            valid = np.flatnonzero(mask[p, index[q]] & mask[q, index[p]])
            p, q = p[valid], q[valid]
            changes = _changes(A, data, lines, data_lines, p, q)
            if unseen is not None:
                changes += unseen.changes(p, q)
            if self._logits is not None:
                logits, a, b = self._logits[worm], index[p], index[q]
                changes += logits[p, b] + logits[q, a] - logits[p, a] - logits[q, b]
            accepted = np.flatnonzero(log_uniform[start + valid] < changes)
            if not len(accepted):
                self.valid += len(valid)
                start += block
                block = min(2 * block, 256)
                continue
            k = int(accepted[0])
            pair, swapped = [p[k], q[k]], [q[k], p[k]]
            index[pair] = index[swapped]
            if unseen is not None:
                unseen.exchange(p[k], q[k])
            A[:, pair] = A[:, swapped]
            A[:, :, pair] = A[:, :, swapped]
            lines[pair] = lines[swapped]
            blocks = lines.reshape(n, 3, n)
            blocks[:, :, pair] = blocks[:, :, swapped]
            self.accepted += 1
            self.valid += k + 1
            start += int(valid[k]) + 1
            block = max(block // 2, 16)


def fit(
    worms: Worms,
    connectome: Connectome,
    *,
    seed: int = 0,
    budget: float | None = None,
    steps: int | None = None,
    progress: bool = False,
    initial: Tensor | None = None,
) -> Identification:
    """Alternate Gibbs draws of W with Metropolis swaps of P.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of draws of W, each with `SWEEPS` n proposals in each worm, or None. The run ends at
            whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation to start from; None draws one.

    Returns:
        Marginals are averaged over the second half of the run; the objective is the log joint of the permutations and Y,
        W integrated out.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("Gibbs MCMC", budget=budget, steps=steps, progress=progress)
    if initial is None:
        initial = random_allowed(worms.allowed, torch.Generator().manual_seed(seed))
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    chain = GibbsSwapChain(evidence, worms.allowed, initial, seed, proposals=SWEEPS * worms.num_neurons, logits=worms.logits)
    total = torch.zeros_like(worms.allowed, dtype=torch.float64)
    draws = 0
    for _ in run:
        chain.step()
        if run.fraction > 0.5:
            total += chain.P
            draws += 1
        if run.due:
            state = torch.from_numpy(chain.index)
            log_joint = float(evidence(chain.P) + (chain.P * worms.logits).sum())
            run.record(log_joint, state, acceptance=chain.accepted / max(chain.proposed, 1))
    marginals = total / draws if draws else chain.P
    extra = {
        "proposals": float(chain.proposed),
        "proposals per second": chain.proposed / run.seconds,
        "valid": chain.valid / max(chain.proposed, 1),
        "acceptance": chain.accepted / max(chain.proposed, 1),
    }
    return Identification("Gibbs MCMC", marginals, match_allowed(marginals, worms.allowed), run.history, run.seconds, extra)

"""Exchanges of two identities in several worms at once: the way out of optima that single moves cannot leave.

Worms share their weights. Once two identities are confused in every worm, the weights have learned the confusion, and no
worm alone gains from undoing it. Seen from the network the undoing is small: two labels change places, and only the rows
of the two and of their children change. So all pairs of labels, in all sets of worms that allow it, can be scored exactly.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_gs.infer.mcmc.swaps import Swaps
from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.identification import Run

__all__ = ["ExchangeSearch"]

Floats = NDArray[np.float64]
Places = NDArray[np.signedinteger[Any]]

_CHUNK = 2_000_000
"""Numbers in a batch of gathered matrices."""

_LEAST_GAIN = 1e-6
"""Nats below which an exchange is no improvement but rounding."""

_ALL_SUBSETS = 5
"""Up to so many worms every set of them is tried; beyond, all of them, each alone, and all but one."""


@dataclass(frozen=True)
class _Sums:
    """What rows are scored from. Sums over worms outside and inside of each set of worms in which labels change places.

    The last row and column of ``B``, and column of ``C``, are zeros that stand for padded parents.
    """

    sets: NDArray[np.bool_]  # (S, J)
    B_outside: Floats  # (S, n + 1, n + 1)
    B_inside: Floats
    C_outside: Floats  # (S, n, n + 1)
    C_inside: Floats
    gram: Floats | None  # (J, n + 1, n + 1), where not all worms show all neurons
    shown: NDArray[np.bool_] | None  # (J, n), the neurons that each worm shows


class ExchangeSearch:
    """Scores and makes exchanges of identities at hard permutations.

    Args:
        evidence: of the recordings.
        allowed: candidates, bool, shape (J, n, n).
        logits: log-potentials of the prior, float64, shape (J, n, n); None for the uniform law.
    """

    def __init__(self, evidence: CollapsedEvidence, allowed: Tensor, logits: Tensor | None = None) -> None:
        self._allowed = allowed.numpy()
        self._logits = torch.zeros(allowed.shape, dtype=torch.float64).numpy() if logits is None else logits.numpy()
        observed = evidence.statistics.observed
        self._observed: NDArray[np.bool_] | None = None if observed is None else observed.numpy()
        worms, n = self._allowed.shape[:2]
        adjacency = evidence.adjacency.numpy()
        precision = 1.0 / evidence.sigma**2
        self._gram = evidence.statistics.gram.numpy() * precision
        self._cross = evidence.statistics.cross.numpy() * precision
        self._bound = float(evidence.statistics.energy.sum()) * precision + 1.0  # above every b' L^-1 b
        self._prior = 1.0 / evidence.weight_scale**2
        self._parents = [np.flatnonzero(row) for row in adjacency]
        self._degrees = adjacency.sum(1)
        self._padded = np.full((n, max(1, int(self._degrees.max()))), n)
        for i, parents in enumerate(self._parents):
            self._padded[i, : len(parents)] = parents
        self._touched: NDArray[np.bool_] = adjacency.T | np.eye(n, dtype=bool)  # [a, i]: row i changes when a moves
        a, b = np.triu_indices(n, 1)
        self._pairs = np.stack([a, b], 1)
        if worms <= _ALL_SUBSETS:
            sets = [s for k in range(1, worms + 1) for s in itertools.combinations(range(worms), k)]
        else:
            everyone = tuple(range(worms))
            sets = [everyone, *((j,) for j in everyone), *(everyone[:j] + everyone[j + 1 :] for j in everyone)]
        self._sets = np.zeros((len(sets), worms), dtype=bool)
        for row, members in enumerate(sets):
            self._sets[row, list(members)] = True
        self._present: Tensor | None = None  # what swap_delta has computed the sums of

    def _canonical(self, index: Places) -> tuple[Floats, Floats]:
        """The statistics of every worm in the order of the network, (J, n, n) each."""
        place = index.argsort(1)
        worm = np.arange(len(index))[:, None, None]
        rows, columns = place[:, :, None], place[:, None, :]
        return self._gram[worm, rows, columns], self._cross[worm, rows, columns]

    def _sums(self, index: Places, sets: NDArray[np.bool_]) -> _Sums:
        """What rows are scored from, for sets of worms in which labels change places, bool (S, J)."""
        gram, cross = self._canonical(index)
        gram, cross = np.pad(gram, ((0, 0), (0, 1), (0, 1))), np.pad(cross, ((0, 0), (0, 0), (0, 1)))
        shown = None
        if self._observed is not None:
            shown = self._observed[np.arange(len(index))[:, None], index.argsort(1)]

        def split(part: Floats) -> tuple[Floats, Floats]:
            inside = np.einsum("sj,jab->sab", sets.astype(float), part)
            return part.sum(0) - inside, inside

        return _Sums(sets, *split(gram), *split(cross), None if shown is None else gram, shown)

    def _feasible(self, index: Places) -> tuple[NDArray[np.bool_], Floats]:
        """For every pair of labels and worm, whether they may change places, and by how much the prior's log changes."""
        place = index.argsort(1)
        worm = np.arange(len(index))[None, :]
        a, b = self._pairs[:, :1], self._pairs[:, 1:]
        at_a, at_b = place[worm, a], place[worm, b]
        allowed: NDArray[np.bool_] = self._allowed[worm, at_a, b] & self._allowed[worm, at_b, a]
        logits = self._logits
        return allowed, logits[worm, at_a, b] + logits[worm, at_b, a] - logits[worm, at_a, a] - logits[worm, at_b, b]

    def _row_scores(self, rows: Places, sums: _Sums, sets: Places, swaps: Places) -> Floats:
        """Evidence of rows after a swap of two labels in a set of worms; one entry of each argument a row."""
        out = np.empty(len(rows))
        degree = self._degrees[rows]
        order = np.argsort(degree, kind="stable")
        ordered = degree[order]
        start, n = 0, len(self._degrees)
        while start < len(order):
            smallest = int(ordered[start])
            stop = int(np.searchsorted(ordered, max(smallest + 2, int(1.25 * smallest)), side="right"))
            width = int(ordered[stop - 1])
            stop = min(stop, start + max(1, _CHUNK // (width + 1) ** 2))
            part = order[start:stop]
            start = stop
            row, s = rows[part], sets[part]
            exchange = np.tile(np.arange(n + 1), (len(part), 1))
            each = np.arange(len(part))
            exchange[each, swaps[part, 0]], exchange[each, swaps[part, 1]] = swaps[part, 1], swaps[part, 0]
            parents = self._padded[row, :width]
            to = exchange[each[:, None], parents]
            joint = np.empty((len(part), width + 1, width + 1))
            row_to = exchange[each, row]
            if sums.gram is None or sums.shown is None:
                np.add(
                    sums.B_outside[s[:, None, None], parents[:, :, None], parents[:, None, :]],
                    sums.B_inside[s[:, None, None], to[:, :, None], to[:, None, :]],
                    out=joint[:, :width, :width],
                )
            else:  # each row has a sum of its own, over the worms that show its neuron
                joint[:, :width, :width] = 0.0
                for j, (gram, shown) in enumerate(zip(sums.gram, sums.shown, strict=True)):
                    inside = sums.sets[s, j]
                    shows = np.flatnonzero(shown[np.where(inside, row_to, row)])
                    at = np.where(inside[:, None], to, parents)[shows]
                    joint[shows, :width, :width] += gram[at[:, :, None], at[:, None, :]]
            joint[:, width, :width] = sums.C_outside[s[:, None], row[:, None], parents]
            joint[:, width, :width] += sums.C_inside[s[:, None], row_to[:, None], to]
            joint[:, :width, width] = 0.0  # not read
            diagonal = np.einsum("rkk->rk", joint)
            diagonal[:, :width] += self._prior
            diagonal[:, width] = self._bound
            pivots = np.einsum("rkk->rk", np.linalg.cholesky(joint))
            logdet = np.log(pivots[:, :width]).sum(1) - 0.5 * width * math.log(self._prior)
            out[part] = 0.5 * (self._bound - pivots[:, width] ** 2) - logdet
        return out

    def gains(
        self, index: Tensor, labels: NDArray[np.bool_] | None = None, *, coarse: bool = False
    ) -> tuple[Floats, Places, Places]:
        """Change of the log joint, evidence and prior, by every allowed exchange.

        Args:
            index: present permutations, long, shape (J, n).
            labels: bool, shape (n,): only exchanges that touch one of these; None for all.
            coarse: of each pair of labels only the exchange in all worms that allow it, and those in single worms.

        Returns:
            Gains in nats, shape (moves,); the pair of labels of each move, shape (moves, 2); its worms as a number of a
            row of :attr:`sets`, shape (moves,).
        """
        hard = index.numpy()
        sums = self._sums(hard, self._sets)
        feasible, prior = self._feasible(hard)
        if labels is not None:
            feasible &= labels[self._pairs].any(1, keepdims=True)
        possible = (feasible[:, None, :] | ~self._sets[None]).all(-1)
        if sums.shown is not None:  # worms that show neither come along, but are no reason to move
            either = sums.shown[:, self._pairs].any(-1).T
            possible &= (either[:, None, :] & self._sets[None]).any(-1)
        if coarse:
            size = self._sets.sum(1)
            possible &= (size == 1) | (size == feasible.sum(1)[:, None])
        pair, chosen = np.nonzero(possible)
        swaps = self._pairs[pair]
        touched = self._touched[swaps[:, 0]] | self._touched[swaps[:, 1]]
        move, row = np.nonzero(touched)
        after = self._row_scores(row, sums, chosen[move], swaps[move])
        change = after - self._unmoved(sums)[row]
        total = np.bincount(move, change, minlength=len(swaps)) + (prior[pair] * self._sets[chosen]).sum(1)
        return total, swaps, chosen

    def _unmoved(self, sums: _Sums) -> Floats:
        """Evidence of every row as it is."""
        n = len(self._parents)
        return self._row_scores(np.arange(n), sums, np.zeros(n, dtype=np.int64), np.zeros((n, 2), dtype=np.int64))

    def swap_delta(self, swaps: Swaps) -> Tensor:
        """Change of the log joint by exchanges within single worms, the hook of the library's swap kernels.

        Args:
            swaps: exchanges of two observed neurons of a worm each.

        Returns:
            Changes in nats, float64 (K,).
        """
        if swaps.index is not self._present:
            index = swaps.index.numpy()
            self._alone = self._sums(index, np.eye(len(index), dtype=bool))
            self._before = self._unmoved(self._alone)
            self._present = swaps.index
        worms = swaps.items.numpy()
        labels = swaps.index[swaps.items[:, None], swaps.rows].numpy()
        move, row = np.nonzero(self._touched[labels[:, 0]] | self._touched[labels[:, 1]])
        after = self._row_scores(row, self._alone, worms[move], labels[move])
        change = np.bincount(move, after - self._before[row], minlength=len(worms))
        first, second = swaps.rows.numpy().T
        a, b = labels.T
        logits = self._logits
        change += logits[worms, first, b] + logits[worms, second, a] - logits[worms, first, a] - logits[worms, second, b]
        return torch.from_numpy(change)

    def improve(self, index: Tensor, *, seconds: float = math.inf) -> tuple[Tensor, float]:
        """Make exchanges that raise the evidence, the best first, until none does.

        Args:
            index: present permutations, long, shape (J, n).
            seconds: stop when the next round of scoring would end later than this.

        Returns:
            The new permutations, and the gain in nats.
        """
        start, longest = Run.clock(), 0.0
        now, gained = index.clone(), 0.0
        # Coarse rounds while they find something; then rounds over everything, first where exchanges reached.
        labels: NDArray[np.bool_] | None = None
        coarse = True
        while Run.clock() - start + longest < seconds:
            began = Run.clock()
            gains, swaps, chosen = self.gains(now, labels, coarse=coarse)
            longest = max(longest, Run.clock() - began)
            busy = np.zeros(len(self._parents), dtype=bool)
            for move in np.argsort(-gains):
                if gains[move] <= _LEAST_GAIN:
                    break
                a, b = swaps[move]
                reach = self._reach(a, b)
                if busy[reach].any():
                    continue  # an exchange made before it has changed its gain; the next round scores it anew
                busy |= reach
                worms = torch.from_numpy(self._sets[chosen[move]])
                part = now[worms]
                now[worms] = torch.where(part == a, b, torch.where(part == b, a, part))
                gained += float(gains[move])
            if busy.any():
                labels = busy
            elif labels is not None:
                labels = None
            elif coarse:
                coarse = False
            else:
                break
        return now, gained

    def _reach(self, a: int, b: int) -> NDArray[np.bool_]:
        """Labels whose exchanges an exchange of two labels can affect: theirs, their children's and their parents'."""
        rows = self._touched[a] | self._touched[b]
        reach: NDArray[np.bool_] = rows.copy()
        for i in np.flatnonzero(rows):
            reach[self._parents[i]] = True
        return reach

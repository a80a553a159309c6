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
from tutorials.celegans.collapsed_chain import ExchangeChain
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

    Attributes:
        sets: the sets of worms in which two labels may change places together, bool, shape (sets, J). Up to five worms
            these are all sets that are not empty; beyond, all worms, each alone, and all but one.
    """

    def __init__(self, evidence: CollapsedEvidence, allowed: Tensor, logits: Tensor | None = None) -> None:
        self._evidence = evidence
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
        self._adjacency: NDArray[np.bool_] = adjacency
        self._parents = [np.flatnonzero(row) for row in adjacency]
        self._degrees = adjacency.sum(1)
        self._padded = np.full((n, max(1, int(self._degrees.max()))), n)
        for i, parents in enumerate(self._parents):
            self._padded[i, : len(parents)] = parents
        self._touched: NDArray[np.bool_] = adjacency.T | np.eye(n, dtype=bool)  # [a, i]: row i changes when a moves
        a, b = np.triu_indices(n, 1)
        self._pairs = np.stack([a, b], 1)
        # rows of which both labels of a pair are parents, but which are neither
        common = adjacency.T[a] & adjacency.T[b]
        common[np.arange(len(a)), a] = common[np.arange(len(a)), b] = False
        self._common_count = common.sum(1)
        self._common_start = self._common_count.cumsum() - self._common_count
        self._common_row = np.nonzero(common)[1]
        if worms <= _ALL_SUBSETS:
            sets = [s for k in range(1, worms + 1) for s in itertools.combinations(range(worms), k)]
        else:
            everyone = tuple(range(worms))
            sets = [everyone, *((j,) for j in everyone), *(everyone[:j] + everyone[j + 1 :] for j in everyone)]
        self.sets = np.zeros((len(sets), worms), dtype=bool)
        for row, members in enumerate(sets):
            self.sets[row, list(members)] = True
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

    def gains(self, index: Tensor) -> tuple[Floats, Places, Places]:
        """Change of the log joint, evidence and prior, by every allowed exchange.

        Args:
            index: present permutations, long, shape (J, n).

        Returns:
            Gains in nats, shape (moves,); the pair of labels of each move, shape (moves, 2); its worms as a number of a
            row of :attr:`sets`, shape (moves,).
        """
        hard = index.numpy()
        sums = self._sums(hard, self.sets)
        feasible, prior = self._feasible(hard)
        possible = (feasible[:, None, :] | ~self.sets[None]).all(-1)
        if sums.shown is not None:  # worms that show neither come along, but are no reason to move
            either = sums.shown[:, self._pairs].any(-1).T
            possible &= (either[:, None, :] & self.sets[None]).any(-1)
        pair, chosen = np.nonzero(possible)
        swaps = self._pairs[pair]
        changes = self._changes(sums)
        a, b = swaps.T
        total = changes[chosen, a, b] + changes[chosen, b, a] + (prior[pair] * self.sets[chosen]).sum(1)
        move, row = self._left_over(sums, pair, chosen)
        after = self._row_scores(row, sums, chosen[move], swaps[move])
        total += np.bincount(move, after - self._unmoved(sums)[row], minlength=len(swaps))
        return total, swaps, chosen

    def _left_over(self, sums: _Sums, pair: Places, chosen: Places) -> tuple[Places, Places]:
        """Moves and rows of which `_changes` says nothing, for moves of pairs of labels in sets of worms."""
        start, count = self._common_start[pair], self._common_count[pair]
        move = np.repeat(np.arange(len(pair)), count)
        offset = np.arange(len(move)) - np.repeat(count.cumsum() - count, count)
        moves, rows = [move], [self._common_row[start[move] + offset]]
        a, b = self._pairs[pair].T
        for i, k in ((a, b), (b, a)):
            hard = self._adjacency[i, i] | self._adjacency[i, k]
            if sums.shown is not None:
                hard |= ((sums.shown[:, i] != sums.shown[:, k]).T & self.sets[chosen]).any(1)
            moves.append(np.flatnonzero(hard))
            rows.append(i[hard])
        return np.concatenate(moves), np.concatenate(rows)

    def _changes(self, sums: _Sums) -> Floats:
        """Changes of the evidence of rows that an exchange of labels a and b touches once, (S, a, b), for a's part.

        A row of which a alone is a parent, and not itself one of the two, changes in one row and column of its precision,
        and in one entry of its linear term, which is of rank two. The row of a itself changes its linear term alone, if
        neither is among its parents and the same worms show both. The sum of the two parts, [a, b] and [b, a], leaves out
        the rows of `_left_over`.
        """
        n, S = len(self._parents), len(sums.sets)
        out = np.zeros((S, n, n))
        for i, parents in enumerate(self._parents):
            d = len(parents)
            if not d:
                continue
            if sums.gram is None or sums.shown is None:
                T = sums.B_inside[:, parents, :n]
                ends = np.einsum("skk->sk", sums.B_inside)[:, :n]
                L = (sums.B_outside[:1] + sums.B_inside[:1])[0][np.ix_(parents, parents)]
            else:
                weights = (sums.sets & sums.shown[:, i]).astype(float)
                T = np.einsum("sj,jdk->sdk", weights, sums.gram[:, parents, :n])
                ends = weights @ np.einsum("jkk->jk", sums.gram)[:, :n]
                L = sums.gram[sums.shown[:, i]].sum(0)[np.ix_(parents, parents)]
            L = L + self._prior * np.eye(d)
            linear = sums.C_outside[0, i, parents] + sums.C_inside[0, i, parents]
            K = np.linalg.inv(L)
            mean = K @ linear

            # the row of i itself: its worms' activity is that of b
            moved = sums.C_outside[:, None, i, parents] + sums.C_inside[:, :n, parents]  # (S, b, d)
            change = 0.5 * (((moved @ K) * moved).sum(-1) - linear @ mean)
            change[:, parents] = 0.0
            if not self._adjacency[i, i]:
                if sums.shown is not None:
                    differ = ((sums.shown != sums.shown[:, i : i + 1]).T[None] & sums.sets[:, None]).any(-1)
                    change[differ] = 0.0
                change[:, i] = 0.0
                out[:, i] += change

            # the rows of children: a is the parent at place p
            place = np.arange(d)
            own = T[:, :, parents]  # (S, d, d)
            KT = K @ T  # (S, d, n)
            at = np.take_along_axis(KT, np.broadcast_to(parents[None, :, None], (S, d, 1)), 2)  # KT[p, a_p]
            R = own.transpose(0, 2, 1) @ KT  # t_a' K t_b
            Q = (T * KT).sum(1)  # t_b' K t_b
            alpha = K[place, place][None, :, None]
            corner = own[:, place, place][..., None]
            eta = 0.5 * (ends[:, None, :] - corner) - (T - corner)
            step = KT - at
            beta1 = 1.0 + step + eta * alpha
            gamma = Q[:, None, :] + Q[:, parents][..., None] - 2 * R + 2 * eta * step + eta**2 * alpha
            shift = sums.C_inside[:, i, :n][:, None, :] - sums.C_inside[:, i, parents][..., None]
            m = mean[None, :, None]
            along = np.einsum("d,sdk->sk", mean, T)
            s_u = (along[:, None, :] - along[:, parents][..., None]) + eta * m + shift * (beta1 - 1.0)
            s_e = m + shift * alpha
            determinant = beta1**2 - alpha * gamma
            quad = 2 * shift * m + shift**2 * alpha
            quad -= (2 * beta1 * s_e * s_u - gamma * s_e**2 - alpha * s_u**2) / determinant
            change = 0.5 * (quad - np.log(determinant))
            change[:, :, parents] = 0.0
            change[:, :, i] = 0.0
            if self._adjacency[i, i]:
                change[:, parents == i] = 0.0
            out[:, parents] += change
        return out

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
        """Make exchanges that raise the log joint until none does.

        All are scored at once, then those that help are tried from the best down, each scored anew at where the ones before
        it have led.

        Args:
            index: present permutations, long, shape (J, n).
            seconds: stop when these are over, or the next scoring of all would end later.

        Returns:
            The new permutations, and the gain in nats.
        """
        start, longest = Run.clock(), 0.0
        chain = ExchangeChain(self._evidence, torch.from_numpy(self._allowed), index, 0, torch.from_numpy(self._logits))
        before = chain.log_evidence
        while Run.clock() - start + longest < seconds:
            began = Run.clock()
            gains, swaps, chosen = self.gains(torch.from_numpy(chain.index))
            longest = max(longest, Run.clock() - began)
            best = np.argsort(-gains)[: int((gains > _LEAST_GAIN).sum())]
            made = 0
            for (a, b), worms in zip(swaps[best].tolist(), self.sets[chosen[best]], strict=True):
                possible = chain.exchangeable(a, b)
                made += chain.propose_exchange(possible[worms[possible]], a, b, _LEAST_GAIN)
                if Run.clock() - start >= seconds:
                    break
            if not made:
                break
        return torch.from_numpy(chain.index.copy()), chain.log_evidence - before

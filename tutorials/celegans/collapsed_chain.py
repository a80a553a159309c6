"""Chains on the permutations of all worms, with the weights integrated out: swaps in one worm, exchanges in several.

What a move changes is scored exactly and fast, so optimizers use them too.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutorials.celegans.evidence import CollapsedEvidence
from tutorials.celegans.worms import swap_pairs

__all__ = ["CollapsedSwapChain", "ExchangeChain"]


class CollapsedSwapChain:
    """A Metropolis chain on the permutations of all worms; its target is ``p(P | Y)``, W integrated out.

    Where a worm does not show all neurons, a proposal may also exchange an observed neuron's identity for one that the worm
    does not show.

    A proposal picks a pair of observed neurons of one worm uniformly among those that can ever exchange
    identities, and is refused where the mask forbids. Exchanging the identities a and b of a worm changes
    rows and columns a and b of B and C, hence the evidence of the rows a, b and of their children only. The
    evidence of a row is read off one Cholesky factor, that of ``[[L, b], [b', c]]``: its last pivot is ``c -
    b' L^-1 b``.

    Args:
        evidence: The target: network, statistics and scales.
        allowed: Shape (J, n, n), bool.
        index: Shape (J, n), long: the start, allowed.
        seed: Of all random numbers.
        logits: Log-potentials of the prior, shape (J, n, n); None for the uniform law.
    """

    def __init__(
        self, evidence: CollapsedEvidence, allowed: Tensor, index: Tensor, seed: int, logits: Tensor | None = None
    ) -> None:
        statistics, adjacency = evidence.statistics, evidence.adjacency.numpy()
        n = statistics.size
        precision = 1 / evidence.sigma**2
        self._rng = np.random.default_rng(seed)
        self._allowed = allowed.numpy()
        self._prior = 1 / evidence.weight_scale**2
        self._log_scale = math.log(evidence.weight_scale)
        self.index: NDArray[np.int64] = index.numpy().copy()
        self._candidates, self._seen = allowed, statistics.observed

        place = np.argsort(self.index, axis=1)  # of an identity, in the worm's own order
        worm = np.arange(len(place))[:, None, None]
        rows, columns = place[:, :, None], place[:, None, :]
        self._gram = statistics.gram.numpy()[worm, rows, columns] * precision  # canonical order from here on
        self._cross = statistics.cross.numpy()[worm, rows, columns] * precision
        self._B = np.zeros((n + 1, n + 1))  # the last row and column stand for parents that are padded
        self._C = np.zeros((n, n + 1))
        self._B[:n, :n], self._C[:, :n] = self._gram.sum(0), self._cross.sum(0)

        self._logits = None if logits is None else logits.numpy()
        self._shown = None if statistics.observed is None else statistics.observed.numpy()[worm[:, :, 0], place]
        self._log_prior = (
            0.0 if self._logits is None else float(np.take_along_axis(self._logits, index.numpy()[..., None], 2).sum())
        )

        self._degrees = adjacency.sum(1)
        self._parents = np.full((n, int(self._degrees.max())), n)
        for i in range(n):
            self._parents[i, : self._degrees[i]] = np.flatnonzero(adjacency[i])
        self._touched = adjacency.T | np.eye(n, dtype=bool)  # [a, i]: row i changes when a moves
        self._bound = float(statistics.energy.sum()) * precision + 1.0  # above every b' L^-1 b
        self._constant = float(
            -0.5 * statistics.count * math.log(2 * math.pi * evidence.sigma**2) - 0.5 * statistics.energy.sum() * precision
        )
        self._scores = self._score(np.arange(n))
        self.proposed = self.valid = self.accepted = 0

    @functools.cached_property
    def pairs(self) -> NDArray[np.int64]:
        """Pairs that `step` proposes, (K, 3): a worm and two of its rows."""
        seen = [None] * len(self._candidates) if self._seen is None else list(self._seen)
        listed = [swap_pairs(mask, observed) for mask, observed in zip(self._candidates, seen, strict=True)]
        pairs = [torch.nn.functional.pad(pair, (1, 0), value=j) for j, pair in enumerate(listed)]
        found: NDArray[np.int64] = torch.cat(pairs).numpy()
        return found

    @property
    def log_evidence(self) -> float:
        """``log p(Y | P)`` of the present permutations, all constants included, and their ``<logits, P>``."""
        return float(self._scores.sum()) + self._constant + self._log_prior

    def _score(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """``1/2 b' L^-1 b - 1/2 logdet(s^2 L)`` of rows."""
        width = int(self._degrees[rows].max())
        parents = self._parents[rows, :width]
        joint = np.empty((len(rows), width + 1, width + 1))
        joint[:, :width, :width] = self._B[parents[:, :, None], parents[:, None, :]]
        if self._shown is not None:  # B is summed over all worms: take away those that do not show the row's neuron
            for worm, row in zip(*np.nonzero(~self._shown[:, rows]), strict=True):
                real = parents[row, : self._degrees[rows[row]]]
                joint[row, : len(real), : len(real)] -= self._gram[worm][real[:, None], real]
        joint[:, width, :width] = self._C[rows[:, None], parents]  # the upper triangle is not read
        diagonal = np.einsum("rkk->rk", joint)
        diagonal[:, :width] += self._prior
        diagonal[:, width] = self._bound
        pivots = np.einsum("rkk->rk", np.linalg.cholesky(joint))
        logdet = np.log(pivots[:, :width]).sum(1) + width * self._log_scale
        scores: NDArray[np.float64] = 0.5 * (self._bound - pivots[:, width] ** 2) - logdet
        return scores

    def _exchange(self, worm: int, a: int, b: int) -> None:
        """Bring B and C to what they are once a and b have changed places in a worm."""
        G, X, B, C = self._gram[worm], self._cross[worm], self._B, self._C
        n = len(C)
        step = G[b] - G[a]
        step[a], step[b] = G[b, b] - G[a, a], 0.0
        B[a, :n] += step
        step[b], step[a] = -step[a], 0.0
        B[b, :n] -= step
        B[b, b] += 2 * step[b]
        B[:n, a], B[:n, b] = B[a, :n], B[b, :n]

        step = X[b] - X[a]
        corners = X[b, b] - X[a, a], X[b, a] - X[a, b]
        step[a], step[b] = 0.0, 0.0
        C[a, :n] += step
        C[b, :n] -= step
        step = X[:, b] - X[:, a]
        step[a], step[b] = 0.0, 0.0
        C[:, a] += step
        C[:, b] -= step
        C[a, a] += corners[0]
        C[b, b] -= corners[0]
        C[a, b] += corners[1]
        C[b, a] -= corners[1]

    def propose(self, worm: int, first: int, second: int, log_uniform: float) -> bool:
        """Exchange the identities of two rows of a worm with the Metropolis probability.

        Args:
            worm: Which worm.
            first: One observed neuron.
            second: Another.
            log_uniform: Accept where this is less than the change of the log joint, evidence and prior; the log of a
                uniform number.

        Returns:
            Whether they were exchanged.
        """
        index, mask = self.index[worm], self._allowed[worm]
        a, b = int(index[first]), int(index[second])
        self.proposed += 1
        if not (mask[first, b] and mask[second, a]):
            return False
        return self._move(np.array([worm]), np.array([first]), np.array([second]), a, b, log_uniform)

    def _move(
        self,
        worms: NDArray[np.integer[Any]],
        at_a: NDArray[np.integer[Any]],
        at_b: NDArray[np.integer[Any]],
        a: int,
        b: int,
        log_uniform: float,
    ) -> bool:
        """Exchange two identities, at a row each, in worms that allow it, with the Metropolis probability."""
        self.valid += 1
        rows = np.flatnonzero(self._touched[a] | self._touched[b])
        B, C = self._B, self._C
        saved = B[a].copy(), B[b].copy(), C[a].copy(), C[b].copy(), C[:, a].copy(), C[:, b].copy()
        for worm in worms:
            self._exchange(worm, a, b)
            if self._shown is not None:  # else scoring reads the sums alone
                self._relabel(worm, a, b)
        prior = 0.0
        if self._logits is not None:
            logits = self._logits
            gains = logits[worms, at_a, b] + logits[worms, at_b, a] - logits[worms, at_a, a] - logits[worms, at_b, b]
            prior = float(gains.sum())
        scores = self._score(rows)
        accepted = bool(log_uniform < scores.sum() - self._scores[rows].sum() + prior)
        if accepted == (self._shown is None):
            for worm in worms:
                self._relabel(worm, a, b)
        if accepted:
            self._scores[rows] = scores
            self._log_prior += prior
            self.index[worms, at_a], self.index[worms, at_b] = b, a
            self.accepted += 1
            return True
        B[a], B[b], C[a], C[b], C[:, a], C[:, b] = saved
        n = len(C)
        B[:n, a], B[:n, b] = saved[0][:n], saved[1][:n]
        return False

    def _relabel(self, worm: int, a: int, b: int) -> None:
        """Exchange two identities in what is held of one worm."""
        for matrix in (self._gram[worm], self._cross[worm]):
            matrix[[a, b]] = matrix[[b, a]]
            matrix[:, [a, b]] = matrix[:, [b, a]]
        if self._shown is not None:
            self._shown[worm, [a, b]] = self._shown[worm, [b, a]]

    def step(self, proposals: int = 1) -> int:
        """Make proposals; return how many were accepted."""
        if not len(self.pairs):
            return 0
        chosen = self.pairs[self._rng.integers(len(self.pairs), size=proposals)].tolist()
        log_uniforms = np.log1p(-self._rng.random(proposals)).tolist()
        return sum(self.propose(j, m, k, u) for (j, m, k), u in zip(chosen, log_uniforms, strict=True))


class ExchangeChain(CollapsedSwapChain):
    """The collapsed chain with exchanges of two identities in several worms at once.

    A proposal picks two identities, and of the worms where they may change places one, all, or each with probability 1/2.
    The exchange does not alter which worms these are, so the proposal is symmetric. Single worms alone cannot undo a
    confusion that all share, as the weights have learned it.

    Args:
        As of `CollapsedSwapChain`.
    """

    def __init__(
        self, evidence: CollapsedEvidence, allowed: Tensor, index: Tensor, seed: int, logits: Tensor | None = None
    ) -> None:
        super().__init__(evidence, allowed, index, seed, logits)
        observed = evidence.statistics.observed
        self._observed = np.ones(self.index.shape, dtype=bool) if observed is None else observed.numpy()
        share = np.einsum("jma,jmb->ab", self._allowed.astype(float), self._allowed.astype(float))
        self.labels = np.argwhere(np.triu(share > 1.5, 1))

    def exchange(self, proposals: int) -> int:
        """Make proposals; return how many were accepted."""
        if not len(self.labels):
            return 0
        labels = self.labels[self._rng.integers(len(self.labels), size=proposals)].tolist()
        kinds = self._rng.integers(3, size=proposals).tolist()
        uniforms = self._rng.random((proposals, len(self.index)))
        log_uniforms = np.log1p(-self._rng.random(proposals)).tolist()
        accepted = 0
        for (a, b), kind, uniform, log_uniform in zip(labels, kinds, uniforms, log_uniforms, strict=True):
            worms = self.exchangeable(a, b)
            if kind == 0:
                worms = worms[[int(uniform[0] * len(worms))]] if len(worms) else worms
            elif kind == 1:
                worms = worms[uniform[worms] < 0.5]
            self.proposed += 1
            if len(worms):
                accepted += self.propose_exchange(worms, a, b, log_uniform)
        return accepted

    def exchangeable(self, a: int, b: int) -> NDArray[np.intp]:
        """Worms that show one of two identities at least, and allow them to change places."""
        each, at_a, at_b = np.arange(len(self.index)), *self._places(a, b)
        allowed = self._allowed[each, at_a, b] & self._allowed[each, at_b, a]
        return np.flatnonzero(allowed & (self._observed[each, at_a] | self._observed[each, at_b]))

    def _places(self, a: int, b: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Rows of two identities in every worm."""
        return (self.index == a).argmax(1), (self.index == b).argmax(1)

    def propose_exchange(self, worms: NDArray[np.intp], a: int, b: int, log_uniform: float) -> bool:
        """Exchange two identities in worms that allow it with the Metropolis probability.

        Args:
            worms: Which worms.
            a: One identity.
            b: Another.
            log_uniform: Accept where this is less than the change of the log joint, evidence and prior; the log of a
                uniform number.

        Returns:
            Whether they were exchanged.
        """
        at_a, at_b = (place[worms] for place in self._places(a, b))
        return self._move(worms, at_a, at_b, a, b, log_uniform)

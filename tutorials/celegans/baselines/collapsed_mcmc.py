"""Metropolis swaps scored with the weights integrated out."""

from __future__ import annotations

import functools
import math
from typing import Any

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

__all__ = ["CollapsedSwapChain", "fit"]

PROPOSALS = 200
"""Proposals in a step of `fit`."""


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
    """Sample permutations by Metropolis swaps, with W integrated out.

    Args:
        worms: The recordings and candidates; their truth is not looked at.
        connectome: The network behind them.
        seed: Of all random numbers.
        budget: Seconds, or None.
        steps: Number of steps of `PROPOSALS` proposals, or None. The run ends at whichever limit comes first.
        progress: Whether to draw a progress bar.
        initial: Shape (J, n), long: an allowed permutation to start from; None draws one.

    Returns:
        Marginals are averaged over the second half of the run; the objective is the log evidence of the
        state.

    Raises:
        ValueError: If there is no limit, one is not positive, or ``initial`` is not allowed.
    """
    check_initial(initial, worms.allowed)
    run = Run("collapsed MCMC", budget=budget, steps=steps, progress=progress)
    if initial is None:
        initial = random_allowed(worms.allowed, torch.Generator().manual_seed(seed))
    evidence = CollapsedEvidence.of_worms(worms, connectome)
    chain = CollapsedSwapChain(evidence, worms.allowed, initial, seed, worms.logits)
    total = torch.zeros_like(worms.allowed, dtype=torch.float64)
    draws = 0
    for _ in run:
        chain.step(PROPOSALS)
        state = torch.from_numpy(chain.index)
        if run.fraction > 0.5:
            total += onehot(state)
            draws += 1
        if run.due:
            run.record(chain.log_evidence, state, acceptance=chain.accepted / max(chain.proposed, 1))
    marginals = total / draws if draws else onehot(torch.from_numpy(chain.index))
    extra = {
        "proposals": float(chain.proposed),
        "proposals per second": chain.proposed / run.seconds,
        "valid": chain.valid / max(chain.proposed, 1),
        "acceptance": chain.accepted / max(chain.proposed, 1),
    }
    return Identification(
        "collapsed MCMC", marginals, match_allowed(marginals, worms.allowed), run.history, run.seconds, extra
    )

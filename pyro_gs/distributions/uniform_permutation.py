"""The uniform law over the permutations that a mask allows."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.relaxed import RelaxedPermutation
from pyro_gs.ops.logits import describe, first_position
from pyro_gs.ops.matching import solve_assignment, to_matrix
from pyro_gs.ops.permanent import EXACT_LIMIT, count_permutations, log_subset_table
from pyro_gs.ops.support import Support, find_support

_ENUMERATION_LIMIT = math.factorial(8)


class UniformPermutation(TorchDistribution):
    """Uniform law over permutation matrices, all of them or those that ``allowed`` permits.

    Each component of the allowed entries is independent of the others, and treated alone:

    - **Sampling** is exact for components without a forbidden entry and for those of at most 20 rows (subset
      recursion). A larger one with forbidden entries is drawn by Markov chain Monte Carlo: the chain of Jerrum and
      Sinclair (1989), watched at the perfect matchings among its states, for ``10 n`` of those from the matching of
      random scores; its stationary law is uniform, a finite run is close to it.
    - **log_prob** is minus the log-permanent of the mask: exact in the same cases, else its Bethe approximation
      (Vontobel 2013), a lower bound of the permanent, so the log-probability is then too large by a constant that does
      not depend on the permutation. :attr:`is_exact` says which.

    The same law under ``pyro_gs.relax`` becomes ``GumbelSinkhorn(temperature, 0)`` with ``-inf`` where forbidden. At
    zero temperature that is ``M(eps)``, which is uniform only where nothing is forbidden.

    Args:
        n: number of rows.
        allowed: bool, shape (..., n, n), gives the batch shape; None allows all pairs.
        validate_args: validate values; by default Pyro's setting.

    Raises:
        TypeError: ``n`` is not an integer or ``allowed`` not boolean.
        ValueError: ``n`` < 1, ``allowed`` of another shape, or an item of it without a perfect matching (the message
            names the item and the rows of a Hall violator).

    Example:
        >>> import torch
        >>> d = UniformPermutation(3)
        >>> d.log_prob(torch.eye(3)).exp()
        tensor(0.1667)
        >>> d.enumerate_support().shape
        torch.Size([6, 3, 3])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_enumerate_support = True

    def __init__(self, n: int, allowed: Tensor | None = None, validate_args: bool | None = None) -> None:
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"n must be an integer, but is {n!r}")
        if n < 1:
            raise ValueError(f"n must be at least 1, but is {n}")
        if allowed is None:
            allowed = torch.ones(n, n, dtype=torch.bool)
        elif not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            kind = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
            raise TypeError(f"allowed must be a boolean tensor, but is {kind}")
        elif allowed.dim() < 2 or allowed.shape[-2:] != (n, n):
            raise ValueError(f"allowed must have shape (..., {n}, {n}) for n={n}, but has shape {tuple(allowed.shape)}")
        self._n = n
        self._set(find_support(allowed, "allowed"), allowed)
        super().__init__(allowed.shape[:-2], torch.Size((n, n)), validate_args=validate_args)

    def _set(self, support: Support, allowed: Tensor) -> None:
        self._support = support
        self.allowed = allowed if support.allowed is None else support.allowed

    @property
    def n(self) -> int:
        """Number of rows."""
        return self._n

    @torch_constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.Permutation:
        """Permutation matrices with all matches allowed."""
        return constraints.Permutation(self._support.allowed)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shape of ``allowed``, which must be given."""
        allowed = torch.Size(arg_shapes["allowed"])
        return allowed[:-2], allowed[-2:]

    def expand(self, batch_shape: Any, _instance: UniformPermutation | None = None) -> UniformPermutation:
        """The same law with a larger batch shape."""
        new: UniformPermutation = self._get_checked_instance(UniformPermutation, _instance)
        batch_shape = torch.Size(batch_shape)
        new._n = self._n
        new._set(self._support.expand(batch_shape), self.allowed.expand(batch_shape + self.event_shape))
        super(UniformPermutation, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def is_exact(self) -> Tensor:
        """Whether samples and log-probabilities are exact, bool of the batch shape."""
        return self._counts[1]

    @functools.cached_property
    def _counts(self) -> tuple[Tensor, Tensor]:
        """Log-number of allowed permutations and its exactness, of the batch shape."""
        return _log_counts(self._support, self.allowed)

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the log-number of allowed permutations; ``-inf`` for a permutation that is not allowed.

        Raises:
            ValueError: with validation, ``value`` is no permutation matrix.
        """
        if self._validate_args:
            self._check_value(value)
        log_count = self._counts[0].to(value.dtype if value.is_floating_point() else torch.get_default_dtype())
        inside = constraints.Permutation(self._support.allowed).check(value)
        return torch.where(inside, -log_count, -torch.inf)

    def _check_value(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-2:] != self.event_shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"value must have shape (..., {self._n}, {self._n}), but has {found}")
        good = constraints.permutation.check(value)
        if not bool(good.all()):
            item = first_position(~good) if good.dim() else ()
            text = f"value{describe(item)} is not a permutation matrix, which UniformPermutation expects"
            if isinstance(value, RelaxedPermutation):
                text += "; it is a relaxed value, so relax the model too: SVI(pyro_gs.relax(model), guide, ...)"
            raise ValueError(text)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of shape sample_shape + batch_shape + (n, n), in torch's default dtype."""
        shape = self._extended_shape(torch.Size(sample_shape))
        if self._support.allowed is None:
            scores = torch.rand(shape[:-1], device=self.allowed.device)
            return to_matrix(scores.argsort(-1))
        if shape.numel() == 0:
            return torch.zeros(shape, device=self.allowed.device)
        masks = self.allowed.expand(shape).reshape(-1, self._n, self._n)
        support = self._support.expand(shape[:-2]).reshape((-1, self._n, self._n))
        assert support.component is not None
        assert support.row_component is not None
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        parts = zip(masks.cpu().numpy(), support.row_component.cpu().numpy(), support.component.cpu().numpy(), strict=True)
        index = np.stack([_draw(mask, rows, columns, rng) for mask, rows, columns in parts])
        return to_matrix(torch.from_numpy(index).reshape(shape[:-1]).to(self.allowed.device))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All permutations that some batch item allows, shape (count,) + batch_shape + (n, n).

        With ``expand=False`` the batch dimensions have size one. An item's log-probability of a permutation that only
        another item allows is ``-inf``.

        Raises:
            ValueError: more than 8! = 40,320 of them; the message gives the number.
        """
        union = self.allowed.reshape(-1, self._n, self._n).any(0)
        count = float(_log_counts(find_support(union, "allowed"), union)[0].exp())
        if count > _ENUMERATION_LIMIT:
            raise ValueError(
                f"UniformPermutation(n={self._n}) has about {count:.6g} permutations, more than the {_ENUMERATION_LIMIT} "
                "that enumerate_support lists; use SVI with AutoGumbelSinkhorn or MCMC"
            )
        index = torch.tensor(_permutations(union.tolist()), device=self.allowed.device)
        values = to_matrix(index)
        values = values.reshape((-1,) + (1,) * len(self.batch_shape) + tuple(self.event_shape))
        return values.expand((-1, *self.batch_shape, *self.event_shape)) if expand else values

    @property
    def mean(self) -> Tensor:
        """Exact marginal probabilities where nothing is forbidden, 1 / n.

        Raises:
            NotImplementedError: with forbidden pairs.
        """
        if self._support.allowed is not None:
            raise NotImplementedError("marginals of UniformPermutation with forbidden pairs: average its samples")
        return torch.full(self.batch_shape + self.event_shape, 1.0 / self._n, device=self.allowed.device)


def _log_counts(support: Support, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Log-permanent of a batch of masks and whether it is exact, each of the batch shape, float64 and bool."""
    n, batch = support.shape[-1], support.shape[:-2]
    if support.allowed is None:
        value = torch.full(batch, math.lgamma(n + 1), dtype=torch.float64, device=allowed.device)
        return value, torch.ones(batch, dtype=torch.bool, device=allowed.device)
    assert support.row_component is not None
    assert support.component is not None
    masks = support.allowed.reshape(-1, n, n).cpu().numpy()
    rows = support.row_component.reshape(-1, n).cpu().numpy()
    columns = support.component.reshape(-1, n).cpu().numpy()
    values, exact = [], []
    for mask, row, column in zip(masks, rows, columns, strict=True):
        found = []
        for label in np.unique(row):
            block = mask[np.ix_(row == label, column == label)]
            found.append(count_permutations(np.packbits(block).tobytes(), len(block)))
        values.append(sum(value for value, _ in found))
        exact.append(all(good for _, good in found))
    device = allowed.device
    total = torch.tensor(values, dtype=torch.float64, device=device).reshape(batch)
    return total, torch.tensor(exact, device=device).reshape(batch)


def _permutations(mask: list[list[bool]]) -> list[list[int]]:
    """All index vectors that a mask allows, in lexicographic order."""
    n = len(mask)
    if all(all(row) for row in mask):
        return [list(p) for p in itertools.permutations(range(n))]
    out: list[list[int]] = []

    def extend(prefix: list[int], used: int) -> None:
        row = len(prefix)
        if row == n:
            out.append(prefix)
            return
        for j in range(n):
            if mask[row][j] and not used >> j & 1:
                extend([*prefix, j], used | 1 << j)

    extend([], 0)
    return out


def _draw(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index vector, component by component."""
    index = np.empty(len(mask), dtype=np.int64)
    for label in np.unique(rows):
        r, c = np.flatnonzero(rows == label), np.flatnonzero(columns == label)
        block = mask[np.ix_(r, c)]
        if block.all():
            chosen = rng.permutation(len(r))
        elif len(r) <= EXACT_LIMIT:
            chosen = _draw_exact(block, rng)
        else:
            chosen = _draw_chain(block, rng)
        index[r] = c[chosen]
    return index


def _draw_exact(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exact draw by walking back through the subset recursion, last row first."""
    n = len(mask)
    table = _count_table(np.packbits(mask).tobytes(), n)
    left, chosen = (1 << n) - 1, np.empty(n, dtype=np.int64)
    for row in range(n - 1, -1, -1):
        options = [j for j in range(n) if mask[row, j] and left >> j & 1]
        weights = np.array([table[left ^ (1 << j)] for j in options])
        weights = np.exp(weights - weights.max())
        chosen[row] = options[int(rng.choice(len(options), p=weights / weights.sum()))]
        left ^= 1 << int(chosen[row])
    return chosen


@functools.lru_cache(maxsize=16)
def _count_table(packed: bytes, n: int) -> np.ndarray:
    mask = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n * n).reshape(n, n)
    with np.errstate(divide="ignore"):
        return log_subset_table(np.log(mask.astype(np.float64)))


def _draw_chain(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Jerrum-Sinclair chain, watched only while its matching is perfect: ``10 n`` such moments from a random start.

    Over perfect and near-perfect matchings together the chain is uniform, and so is the watched chain over the perfect
    ones; stopping at the first perfect matching after a fixed time would not be.
    """
    n = len(mask)
    scores = torch.from_numpy(np.where(mask, rng.random(mask.shape), -np.inf))
    column_of = solve_assignment(scores).tolist()
    row_of = [0] * n
    for i, j in enumerate(column_of):
        row_of[j] = i
    free_row = free_column = -1
    edges = np.argwhere(mask).tolist()
    left = 10 * n
    while True:
        for pick in rng.integers(len(edges), size=4096).tolist():
            i, j = edges[pick]
            if free_row < 0:  # perfect: drop the pair if it is matched
                left -= 1
                if left == 0:
                    return np.array(column_of)
                if column_of[i] == j:
                    column_of[i], row_of[j], free_row, free_column = -1, -1, i, j
            elif i == free_row and j == free_column:
                column_of[i], row_of[j], free_row, free_column = j, i, -1, -1
            elif i == free_row:  # slide: j leaves its row
                k = row_of[j]
                column_of[i], row_of[j], column_of[k], free_row = j, i, -1, k
            elif j == free_column:
                k = column_of[i]
                column_of[i], row_of[j], row_of[k], free_column = j, i, -1, k

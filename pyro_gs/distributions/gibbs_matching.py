"""The Gibbs law over partial matchings and one-to-many assignments."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.matrix_law import MatrixLaw
from pyro_gs.distributions.permutation_law import ENUMERATION_LIMIT, check_value_shape
from pyro_gs.ops.assignment_sums import check_states, log_assignment_sum, sample_assignments
from pyro_gs.ops.batching import unexpanded
from pyro_gs.ops.implicit import check_resolved
from pyro_gs.ops.logits import describe, first_position
from pyro_gs.ops.matching import matching
from pyro_gs.ops.padding import Assignment, Capacities
from pyro_gs.ops.permanent import in_dtype


class GibbsMatching(MatrixLaw):
    r"""Random assignment with ``p(P)`` proportional to ``exp(<X, P> + sum of the scores of unmatched rows)``.

    Values are matrices of zeros and ones, shape (n, m): ``P[i, j] = 1`` says that row i takes column j. A row takes one
    column or, if ``unmatched`` gives it a score, none; a column takes at most as many rows as its capacity. With neither
    argument n rows are matched to m >= n columns; at n = m that is :class:`GibbsPermutation`.

    Everything is exact: :meth:`log_prob`, :meth:`sample`, :meth:`marginals`, :meth:`entropy`. The sums run over how often
    each column is taken, ``prod(capacities + 1)`` states, at most 2^20: twenty columns of capacity one.

    A relaxed law of the same assignments is ``GumbelSinkhorn(temperature, pad_logits(X, ...))`` on square matrices, of which
    :func:`pyro_gs.unpad` takes the assignment.

    Args:
        logits: ``X``, log-potentials, shape (..., n, m), float32 or float64; larger is better, ``-inf`` forbids.
        unmatched: score of a row that stays unmatched, a number or a tensor that broadcasts to (..., n); ``-inf``, or
            None for all, where a row must be matched.
        capacities: how many rows a column may take, an integer for all or one for each of the m columns; by default 1.
        validate_args: validate values; by default Pyro's setting.

    Raises:
        TypeError: ``logits`` or ``unmatched`` not floating, ``capacities`` no integers.
        ValueError: NaN or +inf, a wrong shape, a negative capacity, an item without an assignment, or more than 2^20 states.

    Example:
        >>> import torch
        >>> d = GibbsMatching(torch.zeros(2, 3), unmatched=0.0)
        >>> d.enumerate_support().shape  # 1 + 2 * 3 + 6
        torch.Size([13, 2, 3])
        >>> d.marginals()
        tensor([[0.2308, 0.2308, 0.2308],
                [0.2308, 0.2308, 0.2308]])
    """

    arg_constraints = {  # noqa: RUF012
        "logits": torch_constraints.independent(torch_constraints.real, 2),
        "unmatched": torch_constraints.independent(torch_constraints.real, 1),
    }
    has_enumerate_support = True

    logits: Tensor
    unmatched: Tensor | None

    def __init__(
        self,
        logits: Tensor,
        unmatched: float | Tensor | None = None,
        capacities: Capacities | None = None,
        validate_args: bool | None = None,
    ) -> None:
        problem = Assignment(logits, unmatched, capacities, half=False)
        check_states(problem)
        self.capacities = problem.capacities
        usable = problem.usable()
        self.logits = problem.logits if bool(usable.all()) else torch.where(usable, problem.logits, -torch.inf)
        self.unmatched = problem.unmatched
        super().__init__(self.logits.shape[:-2], self.logits.shape[-2:], validate_args)

    def __repr__(self) -> str:
        shape = f"batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)}"
        return f"{type(self).__name__}({shape}, capacities={self.capacities})"

    @torch_constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> constraints.PartialMatching:
        """Assignments, with forbidden pairs unmatched."""
        matched = None if self.unmatched is None else self.unmatched == -torch.inf
        allowed = self.logits.detach() > -torch.inf
        return constraints.PartialMatching(self.capacities, matched, None if bool(allowed.all()) else allowed)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shapes of ``logits`` and ``unmatched``."""
        logits, unmatched = torch.Size(arg_shapes["logits"]), torch.Size(arg_shapes.get("unmatched", ()))
        return torch.broadcast_shapes(logits[:-2], unmatched[:-1]), logits[-2:]

    def expand(self, batch_shape: Any, _instance: GibbsMatching | None = None) -> GibbsMatching:
        """The same law with a larger batch shape; class and parameters are kept."""
        new: GibbsMatching = self._get_checked_instance(GibbsMatching, _instance)
        batch_shape = torch.Size(batch_shape)
        new.capacities = self.capacities
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        new.unmatched = None if self.unmatched is None else self.unmatched.expand(batch_shape + self.event_shape[:1])
        super(GibbsMatching, new).__init__(batch_shape, self.event_shape, self._validate_args)
        return new

    def _distinct(self) -> tuple[Tensor, Tensor | None]:
        """Logits and scores of unmatched rows in float64 and of one batch shape, once for items that were expanded."""
        logits = unexpanded(self.logits, 2).double()
        if self.unmatched is None:
            return logits, None
        scores = unexpanded(self.unmatched, 1).double()
        batch = torch.broadcast_shapes(logits.shape[:-2], scores.shape[:-1])
        return logits.expand(batch + self.event_shape), scores.expand(batch + self.event_shape[:1])

    def _log_sum(self, logits: Tensor, unmatched: Tensor | None, *, certain: bool = True) -> Tensor:
        """Log-normalizer in float64, shape (...), of logits (..., n, m) and scores (..., n) with the law's capacities."""
        return log_assignment_sum(Assignment(logits, unmatched, self.capacities), certain=certain)

    def log_normalizer(self) -> Tensor:
        """Log-sum of the weights of all assignments, nats, of the batch shape; differentiable any number of times.

        Raises:
            OverflowError: it is too large for the dtype.
        """
        total = self._log_sum(*self._distinct()).expand(self.batch_shape)
        return in_dtype(total, self.logits.dtype, "the log-normalizer")

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of assignments, shape broadcast of their batch with the batch shape.

        Args:
            value: shape (..., n, m).

        Returns:
            ``-inf`` for what is no assignment within the law's support: a forbidden pair, a row that must be matched.

        Raises:
            TypeError: complex ``value``.
            ValueError: another event shape, or a batch that does not broadcast; with validation, entries that are not zeros
                and ones, rows with more than a one, or columns above their capacity; logits of which rounding leaves
                nothing.
        """
        check_value_shape(value, self.event_shape, self.batch_shape)
        if value.is_complex():
            raise TypeError(f"value must have a real dtype, but has {value.dtype}")
        if self._validate_args:
            anyone = torch.zeros(self.event_shape[0], dtype=torch.bool, device=value.device)
            good = constraints.PartialMatching(self.capacities, anyone).check(value)
            if not bool(good.all()):
                item = first_position(~good) if good.dim() else ()
                raise ValueError(
                    f"value{describe(item)} is no assignment of rows to columns of capacities {self.capacities}, which "
                    f"{type(self).__name__} expects"
                )
        inside = self.support.check(value)
        found = self._log_probability(value).expand(torch.broadcast_shapes(value.shape[:-2], self.batch_shape))
        return torch.where(inside, found, -torch.inf).to(self.logits.dtype)

    def _log_probability(self, value: Tensor) -> Tensor:
        """``<X, P> + sum of scores of unmatched rows - log-normalizer``, of marginals too; float64.

        Each row takes one of its entries or its score, so that what all of them have in common is left out.
        """
        logits, scores = self._distinct()
        common = logits.detach().amax(-1)
        common = common if scores is None else torch.maximum(common, scores.detach())
        logits = logits - common[..., None]
        total = (value.double() * torch.where(logits > -torch.inf, logits, 0.0)).sum((-2, -1))
        if scores is not None:
            scores = scores - common
            total = total + ((1 - value.double().sum(-1)) * torch.where(scores > -torch.inf, scores, 0.0)).sum(-1)
        return total - self._log_sum(logits, scores, certain=False)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Exact draws of shape sample_shape + batch_shape + (n, m)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        index = sample_assignments(
            Assignment(self.logits, self.unmatched, self.capacities), math.prod(sample_shape)
        ).reshape(shape[:-1])
        return torch.nn.functional.one_hot(index, shape[-1] + 1)[..., :-1].to(self.logits.dtype)

    def marginals(self) -> Tensor:
        """Exact probabilities that row i takes column j, shape batch_shape + (n, m); differentiable.

        The gradient of :meth:`log_normalizer` with the scores of unmatched rows held fixed.

        Raises:
            ValueError: logits so far apart that rounding is all that is left of what they differ by.
        """
        return self._marginals().to(self.logits.dtype)

    def _marginals(self) -> Tensor:
        """In float64."""
        logits, scores = self._distinct()
        parameters = [logits] if scores is None else [logits, scores]
        keep = torch.is_grad_enabled() and any(part.requires_grad for part in parameters)
        with torch.enable_grad():
            x = logits if keep and logits.requires_grad else logits.detach().requires_grad_()
            total = self._log_sum(x, scores if keep or scores is None else scores.detach()).sum()
            (mean,) = torch.autograd.grad(total, x, create_graph=keep)
        check_resolved(mean - 1.0)
        return mean.expand(self.batch_shape + self.event_shape)

    @property
    def mean(self) -> Tensor:
        """The :meth:`marginals`."""
        return self.marginals()

    @property
    def mode(self) -> Tensor:
        """A most probable assignment, of shape batch_shape + (n, m)."""
        return matching(self.logits, unmatched=self.unmatched, capacities=self.capacities)

    def entropy(self) -> Tensor:
        """Exact entropy in nats, of the batch shape; differentiable.

        Raises:
            ValueError: logits of which rounding leaves nothing.
        """
        return -self._log_probability(self._marginals()).expand(self.batch_shape).to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All assignments that some batch item allows, shape (count,) + batch_shape + (n, m).

        Raises:
            ValueError: more than 8! = 40,320 of them.
        """
        n, m = self.event_shape
        some = self.batch_shape.numel() > 0
        allowed = torch.ones(n, m, dtype=torch.bool, device=self.logits.device)
        if some:
            allowed = (self.logits.detach() > -torch.inf).reshape(-1, n, m).any(0)
        free = torch.full((n,), self.unmatched is not None, device=self.logits.device)
        if some and self.unmatched is not None:
            free = (self.unmatched.detach() > -torch.inf).reshape(-1, n).any(0)
        flat = torch.where(allowed, 0.0, -torch.inf).double()
        scores = torch.where(free.to(flat.device), 0.0, -torch.inf).double()
        count = float(log_assignment_sum(Assignment(flat, scores, self.capacities)).exp())
        if count > ENUMERATION_LIMIT * (1 + 1e-9):
            raise ValueError(
                f"{self} has about {count:.6g} assignments, more than the {ENUMERATION_LIMIT} that enumerate_support lists"
            )
        options = [row.nonzero()[:, 0].tolist() + [m] * bool(f) for row, f in zip(allowed.cpu(), free, strict=True)]
        partial: list[tuple[int, ...]] = [()]
        for columns in options:
            limits = (*self.capacities, n)
            partial = [(*p, j) for p, j in itertools.product(partial, columns) if p.count(j) < limits[j]]
        index = torch.tensor(partial, device=self.logits.device)
        values = torch.nn.functional.one_hot(index, m + 1)[..., :m].to(self.logits.dtype)
        values = values.reshape((-1,) + (1,) * len(self.batch_shape) + (n, m))
        return values.expand((-1, *self.batch_shape, n, m)) if expand else values

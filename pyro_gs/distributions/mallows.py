"""The Mallows law of rankings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions import constraints
from pyro_gs.distributions.permutation_law import PermutationLaw
from pyro_gs.ops import mallows as forms
from pyro_gs.ops.batching import unexpanded
from pyro_gs.ops.logits import cast_temperature, check_floating
from pyro_gs.ops.matching import to_matrix
from pyro_gs.ops.ranking import broadcast_parameter, inversions, permutation_index
from pyro_gs.ops.support import Support


class Mallows(PermutationLaw):
    r"""Rankings around a central one: ``p(P)`` proportional to ``exp(-theta d(P, center))``.

    ``d`` is Kendall's tau distance, :func:`pyro_gs.kendall_distance`: the number of pairs of items in another order
    (Mallows, 'Non-null ranking models', 1957). Values are matrices with ``P[i, j] = 1`` where position ``i`` of the ranking
    holds item ``j``. The normalizer is ``sum_{k=1..n} log((1 - e^(-k theta)) / (1 - e^(-theta)))``.

    Everything is exact for any n, and so are its gradients in ``theta``: :meth:`log_prob`; :meth:`sample`, by repeated
    insertion (Doignon, Pekec and Regenwetter, 'The repeated insertion model for rankings', 2004); :meth:`mean_distance`,
    :meth:`entropy`, :meth:`marginals`; and the registered KL divergences (``distributions/ranking_kl.py``).

    Args:
        center: permutation matrices, shape (..., n, n), float32 or float64; of an index vector,
            ``pyro_gs.to_matrix(index)``.
        theta: dispersion in nats a pair, >= 0 and finite, a number or a tensor that broadcasts with the batch shape. Zero is
            the uniform law.
        validate_args: validate values; by default Pyro's setting.

    Shapes:
        batch_shape ``broadcast(theta.shape, center.shape[:-2])``, event_shape (n, n). Samples have the dtype of ``center``.

    Raises:
        TypeError: ``center`` is not a float32 or float64 tensor, ``theta`` neither a number nor a floating tensor.
        ValueError: ``center`` is no permutation matrix, ``theta`` is negative or not finite, or shapes do not broadcast.
            Messages name the batch item.

    Example:
        >>> import torch
        >>> d = Mallows(torch.eye(3), 1.0)
        >>> d.log_prob(torch.eye(3)) - d.log_prob(torch.eye(3).flip(0))  # three pairs
        tensor(3.)
        >>> d.mean_distance()
        tensor(0.6937)
        >>> d.marginals()[0]  # of being first
        tensor([0.6652, 0.2447, 0.0900])
    """

    arg_constraints = {"center": constraints.permutation, "theta": torch_constraints.nonnegative}  # noqa: RUF012
    _expanded = {"center": 2, "theta": 0}  # noqa: RUF012

    center: Tensor
    theta: Tensor

    def __init__(self, center: Tensor, theta: float | Tensor, validate_args: bool | None = None) -> None:
        _check_center(center)
        theta = cast_temperature(theta, center, "theta", zero=True)
        batch_shape = broadcast_parameter(theta, "theta", center.shape[:-2], "center")
        self.center = center.expand(batch_shape + center.shape[-2:])
        self.theta = theta.expand(batch_shape)
        self._support = Support(self.center.shape)
        super().__init__(batch_shape, center.shape[-1], validate_args)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shapes of ``center`` and ``theta``."""
        center = torch.Size(arg_shapes["center"])
        return torch.broadcast_shapes(torch.Size(arg_shapes.get("theta", ())), center[:-2]), center[-2:]

    def _log_prob(self, value: Tensor) -> Tensor:
        rank, item = torch.broadcast_tensors(self.center.argmax(-2), value.to(torch.uint8).argmax(-1))
        distance = inversions(rank.gather(-1, item))
        return (-self.theta.double() * distance - forms.log_normalizer(self.theta, self.n)).to(self.center.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Exact draws, shape sample_shape + batch_shape + (n, n)."""
        shape = self._extended_shape(torch.Size(sample_shape))[:-1]
        sums = forms.powers(self.theta.detach(), self.n).cumsum(-1)
        u = torch.rand(shape, dtype=sums.dtype, device=sums.device) * sums
        passed = torch.searchsorted(sums.expand(shape).contiguous(), u)  # by item m: 0, ..., m earlier ones
        position = torch.zeros_like(passed)
        for m in range(1, self.n):
            place = m - passed[..., m : m + 1]
            position[..., :m] += position[..., :m] >= place
            position[..., m : m + 1] = place
        # The positions of the items and, inversely, the items by position are equally far from the center: either will do.
        items = self.center.argmax(-1).expand(shape).gather(-1, position)
        return to_matrix(items, dtype=self.center.dtype)

    @property
    def mode(self) -> Tensor:
        """The center, shape batch_shape + (n, n)."""
        return self.center

    def mean_distance(self) -> Tensor:
        """Exact expectation of the distance to the center, in pairs, of the batch shape.

        ``sum_{k=1..n} sum_{j<k} j e^(-j theta) / sum_{j<k} e^(-j theta)``, from n (n - 1) / 4 at ``theta = 0`` down to 0;
        differentiable.

        Example:
            >>> import torch
            >>> Mallows(torch.eye(5), torch.tensor([0.0, 1.0])).mean_distance()
            tensor([5.0000, 1.7491])
        """
        return forms.mean_distance(self.theta, self.n).to(self.center.dtype)

    def entropy(self) -> Tensor:
        """Exact entropy in nats, of the batch shape: the log-normalizer plus ``theta`` times :meth:`mean_distance`."""
        mean, log_z = forms.mean_distance(self.theta, self.n), forms.log_normalizer(self.theta, self.n)
        return (log_z + self.theta.double() * mean).to(self.center.dtype)

    def marginals(self) -> Tensor:
        """Exact probabilities that position i holds item j, shape batch_shape + (n, n), differentiable in ``theta``.

        By following every item through the insertions, n^3 operations.
        """
        at = forms.rank_probabilities(unexpanded(self.theta, 0), self.n)
        return (at @ self.center.double()).to(self.center.dtype)

    @property
    def mean(self) -> Tensor:
        """The :meth:`marginals`."""
        return self.marginals()


def _check_center(center: Tensor) -> None:
    hint = "; for an index vector pass pyro_gs.to_matrix(index)"
    if not isinstance(center, Tensor):
        raise TypeError(f"center must be a permutation matrix of shape (..., n, n), but is {type(center).__name__}{hint}")
    if center.dim() < 2 or center.shape[-1] != center.shape[-2] or center.shape[-1] == 0:
        raise ValueError(
            f"center must be a permutation matrix of shape (..., n, n), but has shape {tuple(center.shape)}{hint}"
        )
    try:
        permutation_index(center, "center")
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    check_floating(center, "center", half=False)

"""Normal matrices, pushed through a bijection: what the two laws of Linderman et al. (2018) have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.distributions import Transform
from torch.distributions import constraints as torch_constraints

from pyro_gs.distributions.matrix_law import MatrixLaw
from pyro_gs.distributions.permutation_law import check_value_shape
from pyro_gs.ops.logits import (
    broadcast_batch,
    cast_temperature,
    check_floating,
    check_magnitude,
    check_square,
    describe,
    first_position,
)


class PushedNormal(MatrixLaw):
    """Law of ``t(loc + scale * N(0, 1))`` for a transform ``t`` of square matrices with a temperature.

    Args:
        temperature: of the transform, positive; a number or a tensor that broadcasts with the batch shape.
        loc: mean of the normal matrix, shape (..., m, m), float32 or float64.
        scale: its standard deviation, positive; a number or a tensor that broadcasts with ``loc``.
        validate_args: validate values in :meth:`log_prob`; by default Pyro's setting.

    Raises:
        TypeError: integer or half precision ``loc``.
        ValueError: ``loc`` is not square or not finite, ``scale`` or ``temperature`` not positive and finite, or their
            shapes do not broadcast. Messages name the batch item.
    """

    arg_constraints = {  # noqa: RUF012
        "temperature": torch_constraints.positive,
        "loc": torch_constraints.independent(torch_constraints.real, 2),
        "scale": torch_constraints.independent(torch_constraints.positive, 2),
    }
    has_rsample = True
    _kind: ClassVar[Any]  # of transform
    _added: ClassVar[int] = 0  # rows that the transform adds

    temperature: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        temperature: float | Tensor,
        loc: Tensor,
        scale: float | Tensor = 1.0,
        validate_args: bool | None = None,
    ) -> None:
        check_square(loc, "loc")
        check_floating(loc, "loc", half=False)
        finite = loc.detach().isfinite()
        if not bool(finite.all()):
            *item, row, column = where = first_position(~finite)
            raise ValueError(
                f"loc{describe(tuple(item))} must be finite, but is {float(loc[where])} at row {row}, column {column}"
            )
        scale, tau = cast_temperature(scale, loc, "scale"), cast_temperature(temperature, loc)
        check_magnitude(loc, "loc")
        check_magnitude(scale, "scale")
        self._kind(tau)  # which may ask for more
        try:
            shape = torch.broadcast_shapes(loc.shape, scale.shape)
        except RuntimeError:
            shape = torch.Size()
        if shape[-2:] != loc.shape[-2:]:
            raise ValueError(f"scale of shape {tuple(scale.shape)} does not broadcast with loc of shape {tuple(loc.shape)}")
        self._set(broadcast_batch(tau, loc.expand(shape), "loc"), tau, loc, scale)
        super().__init__(self._batch_shape, self._event_shape, validate_args)

    def _set(self, batch_shape: torch.Size, temperature: Tensor, loc: Tensor, scale: Tensor) -> None:
        m = loc.shape[-1]
        self._batch_shape, self._event_shape = batch_shape, torch.Size((m + self._added, m + self._added))
        self.temperature = temperature.expand(batch_shape)
        self.loc, self.scale = (part.expand(*batch_shape, m, m) for part in (loc, scale))

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the shapes of ``temperature``, ``loc`` and ``scale``."""
        temperature, loc, scale = (torch.Size(arg_shapes.get(name, ())) for name in ("temperature", "loc", "scale"))
        batch = torch.broadcast_shapes(temperature, loc[:-2], scale[:-2])
        return batch, torch.Size(size + cls._added for size in loc[-2:])

    def expand(self, batch_shape: Any, _instance: PushedNormal | None = None) -> PushedNormal:
        """The same law with a larger batch shape; class and parameters are kept."""
        new: PushedNormal = self._get_checked_instance(type(self), _instance)
        new._set(torch.Size(batch_shape), self.temperature, self.loc, self.scale)
        super(PushedNormal, new).__init__(new._batch_shape, new._event_shape, self._validate_args)
        return new

    @property
    def transform(self) -> Transform:
        """The transform, from the matrices of ``loc`` to those of the law."""
        return self._kind(self.temperature)  # type: ignore[no-any-return]

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Reparametrized draws, shape sample_shape + batch_shape + event_shape."""
        noise = torch.randn(torch.Size(sample_shape) + self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.transform(self.loc + self.scale * noise)  # type: ignore[no-any-return]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, shape broadcast of the batch of ``value`` with the batch shape.

        Args:
            value: shape (..., n, n).

        Raises:
            TypeError: a value that is not of dtype float32 or float64.
            ValueError: another event shape, a batch that does not broadcast, or with validation a value that is not in the
                support.
        """
        check_value_shape(value, self.event_shape, self.batch_shape)
        check_floating(value, "value", half=False)
        if self._validate_args and value.numel():
            support: Any = self.support
            good = support.check(value.detach())
            if not bool(good.all()):
                item = first_position(~good) if good.dim() else ()
                raise ValueError(f"value{describe(item)} is not in the support of {self}, {support}")
        transform = self.transform
        normal = transform.inv(value)
        # in float64, since the square of a large value overflows float32, and its gradient is then NaN
        law = Normal(self.loc.double(), self.scale.double(), validate_args=False)
        density = law.log_prob(normal.double()).sum((-2, -1)).to(self.loc.dtype)
        return density - transform.log_abs_det_jacobian(normal, value)  # type: ignore[no-any-return]

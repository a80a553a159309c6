"""What all laws over matrices share."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution


class MatrixLaw(TorchDistribution):
    """Base of the laws over matrices, which check their arguments themselves, with better messages than torch's.

    Args:
        batch_shape: shape of a batch of laws.
        event_shape: of a value.
        validate_args: validate values; None for Pyro's setting.
    """

    def __init__(self, batch_shape: torch.Size, event_shape: torch.Size, validate_args: bool | None = None) -> None:
        super().__init__(batch_shape, event_shape, validate_args=False)
        if validate_args is None:
            validate_args = torch.distributions.Distribution._validate_args
        self._validate_args = validate_args

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, event_shape={tuple(self.event_shape)})"

"""Encoders, scores and the Sinkhorn layer, joined."""

from __future__ import annotations

from torch import Tensor, nn

from pyro_gs.nn.layer import SinkhornLayer
from pyro_gs.nn.masks import mask_logits


class ScoreNetwork(nn.Module):
    """From a set of pieces to logits, equivariant: permuting the pieces permutes the rows.

    A module of its own, as an amortized guide needs logits and does its own relaxing::

        AutoGumbelSinkhorn(model, logits=score_network)  # called with the arguments of the model

    Args:
        items: from pieces ``(..., n, *item)`` and a mask or None to features (..., n, d), as :class:`EachItem`.
        scores: from features and mask to logits, as :class:`RowScores`, :class:`RankScores`, :class:`PositionScores`.
        sets: from features to features, with the mask, as :class:`DeepSets` and :class:`SetAttention`; by default pieces do
            not see each other before the Sinkhorn layer, the paper's form.

    Shapes:
        items ``(..., n, *item)`` and mask (..., n) to logits (..., n, n); with a mask those of :func:`mask_logits`.

    Raises:
        TypeError: an argument is no module.

    Example:
        Which of four known ``levels`` is each reading of? The guide's logits are a function of the readings, which are new
        at every step.

        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro_gs import AutoGumbelSinkhorn, UniformPermutation, relax, to_index
        >>> from pyro_gs.nn import EachItem, RowScores
        >>> _ = pyro.set_rng_seed(0)
        >>> levels = torch.tensor([[-1.0], [0.0], [1.0], [2.0]])
        >>> def model(readings):  # (8, 4, 1)
        ...     with pyro.plate("batch", len(readings)):
        ...         P = pyro.sample("P", UniformPermutation(4))
        ...         pyro.sample("readings", dist.Normal(P @ levels, 0.3).to_event(2), obs=readings)
        >>> def draw():
        ...     return levels[torch.rand(8, 4).argsort(-1)] + 0.3 * torch.randn(8, 4, 1)
        >>> network = ScoreNetwork(EachItem(nn.Sequential(nn.Linear(1, 16), nn.ReLU())), RowScores(16, 4))
        >>> guide = AutoGumbelSinkhorn(model, temperature=0.5, logits=network)
        >>> svi = SVI(relax(model), guide, pyro.optim.Adam({"lr": 0.03}), Trace_ELBO())
        >>> losses = [svi.step(draw()) for _ in range(60)]
        >>> to_index(guide.median(torch.tensor([[1.9], [-0.8], [1.2], [0.1]]).expand(8, 4, 1))["P"])[0]
        tensor([3, 0, 2, 1])
    """

    def __init__(self, items: nn.Module, scores: nn.Module, sets: nn.Module | None = None) -> None:
        super().__init__()
        for name, module in (("items", items), ("scores", scores), ("sets", sets)):
            _check_module(module, name, optional=name == "sets")
        self.items = items
        self.sets = sets
        self.scores = scores

    def forward(self, items: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits."""
        features = self.items(items, mask)
        if self.sets is not None:
            features = self.sets(features, mask)
        logits: Tensor = self.scores(features, mask)
        return logits if mask is None else mask_logits(logits, mask)


class SinkhornNetwork(nn.Module):
    """From a set of pieces to doubly stochastic matrices: a :class:`ScoreNetwork` and a :class:`SinkhornLayer`.

    Args:
        scores: from pieces and a mask or None to logits.
        layer: by default ``SinkhornLayer()``.

    Shapes:
        items ``(..., n, *item)`` and mask (..., n) to (..., n, n), with a leading dimension if the layer has
        ``num_samples``.

    Raises:
        TypeError: an argument is no module, or ``layer`` no :class:`SinkhornLayer`.

    Example:
        The paper's form, for numbers to sort:

        >>> import torch
        >>> from pyro_gs.nn import EachItem, RowScores
        >>> items = EachItem(nn.Sequential(nn.Linear(1, 32), nn.ReLU()))
        >>> network = SinkhornNetwork(ScoreNetwork(items, RowScores(32, 5)), SinkhornLayer(temperature=0.5, noise=1.0))
        >>> network(torch.rand(8, 5, 1)).shape
        torch.Size([8, 5, 5])
    """

    def __init__(self, scores: nn.Module, layer: SinkhornLayer | None = None) -> None:
        super().__init__()
        _check_module(scores, "scores")
        if layer is not None and not isinstance(layer, SinkhornLayer):
            raise TypeError(f"layer must be a SinkhornLayer, but is {type(layer).__name__}")
        self.scores = scores
        self.layer = SinkhornLayer() if layer is None else layer

    def forward(self, items: Tensor, mask: Tensor | None = None) -> Tensor:
        """The matrices."""
        out: Tensor = self.layer(self.scores(items, mask), mask)
        return out

    def log_p(self, items: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logarithm of the relaxed matrices, see :meth:`SinkhornLayer.log_p`."""
        return self.layer.log_p(self.scores(items, mask), mask)


def _check_module(value: nn.Module | None, name: str, *, optional: bool = False) -> None:
    if not isinstance(value, nn.Module) and not (optional and value is None):
        raise TypeError(f"{name} must be a torch.nn.Module, but is {type(value).__name__}")

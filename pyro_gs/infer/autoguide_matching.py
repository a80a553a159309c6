"""The automatic guide over hard permutations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import pyro
import torch
from torch import Tensor

from pyro_gs.distributions.matching_integral import EXACT_ROWS
from pyro_gs.distributions.permutation_law import PermutationLaw
from pyro_gs.infer.autoguide import AutoGumbelSinkhorn, Network
from pyro_gs.infer.handlers import unwrap
from pyro_gs.infer.initialization import InitLogits
from pyro_gs.infer.matching_objective import (
    BOUNDS,
    GRADIENTS,
    Bound,
    DecayingAverage,
    Gradient,
    GuideGumbelMatching,
    has_gradient,
    is_noise_law,
    no_bound,
)
from pyro_gs.ops.support import component_sizes, find_support


class AutoGumbelMatching(AutoGumbelSinkhorn):
    r"""Guide whose permutation sites are independent laws ``M(X + eps)`` over hard permutations.

    The discrete alternative to :class:`AutoGumbelSinkhorn`, whose limit at temperature zero it is, without a temperature.
    Draws are permutation matrices, so ``SVI`` is given the plain model::

        guide = AutoGumbelMatching(model)
        svi = SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=8))

    **Bound.** The loss estimates ``-E_q[log p(data | P)]`` plus an upper bound of ``KL(q || p)``, so that minus the loss
    bounds the log evidence of the plain model from below, for every prior that is accepted (see
    ``infer/matching_objective.py``).
    A prior with forbidden pairs is accepted if it is a ``GumbelMatching``, or if no component of it has more than three
    rows. ``RenyiELBO`` bounds nothing here, as its particles share the KL.

    **Gradients.** ``"score"`` is unbiased, with a baseline that costs nothing, and noisy: its variance grows with the number
    of pairs. ``"perturb_and_map"`` takes one more matching and the gradient of the likelihood with respect to the matrix,
    which must exist, and is biased unless the log-likelihood is linear in the matrix.

    Args:
        model: a Pyro model.
        init_scale: as in :class:`AutoGumbelSinkhorn`.
        objective: ``"tightened_kl"`` or, never closer, ``"noise_kl"``.
        gradient: ``"score"`` or ``"perturb_and_map"``.
        strength: of the perturbation, positive, in units of the Gumbel noise; for ``"perturb_and_map"``.
        baseline_decay: of the average that the score function's multiplier is compared with, one for each item of a site's
            plates; at least 0 and below 1, None for no baseline.
        init_logits: as in :class:`AutoGumbelSinkhorn`.
        rank: as in :class:`AutoGumbelSinkhorn`.
        logits: as in :class:`AutoGumbelSinkhorn`.
        create_plates: as in Pyro's ``AutoGuide``.

    Raises:
        TypeError: as :class:`AutoGumbelSinkhorn`.
        ValueError: as :class:`AutoGumbelSinkhorn`; a bad ``gradient``, ``strength`` or ``baseline_decay``; at the first
            call, a relaxed site; under ``TraceMeanField_ELBO``, score-function gradients.
        NotImplementedError: as :class:`AutoGumbelSinkhorn`; at the first call, a prior for which there is no bound, or with
            ``"perturb_and_map"`` no gradient.

    Example:
        >>> import pyro, torch
        >>> from pyro_gs import UniformPermutation
        >>> def model():
        ...     return pyro.sample("P", UniformPermutation(3))
        >>> guide = AutoGumbelMatching(model, init_logits={"P": 30 * torch.eye(3)})
        >>> guide()["P"]
        RelaxedPermutation([[1., 0., 0.],
                            [0., 1., 0.],
                            [0., 0., 1.]])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        init_scale: float = 0.01,
        objective: Bound = "tightened_kl",
        gradient: Gradient = "score",
        *,
        strength: float = 0.25,
        baseline_decay: float | None = 0.9,
        init_logits: InitLogits | None = None,
        rank: int | None = None,
        logits: Network | Mapping[str, Network] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if objective not in BOUNDS:
            raise ValueError(f"objective must be one of {', '.join(BOUNDS)}, but is {objective!r}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, but is {gradient!r}")
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength < float("inf"):
            raise ValueError(f"strength must be a positive finite number, but is {strength!r}")
        if baseline_decay is not None and not 0 <= baseline_decay < 1:
            raise ValueError(f"baseline_decay must be None, or at least 0 and below 1, but is {baseline_decay!r}")
        super().__init__(
            model,
            init_scale=init_scale,
            objective=objective,
            init_logits=init_logits,
            rank=rank,
            logits=logits,
            create_plates=create_plates,
        )
        self.gradient: Gradient = gradient
        self.strength = float(strength)
        self.baseline_decay = baseline_decay
        self._baselines = torch.nn.ModuleList()  # not by name, which may have a dot
        self._baseline_at: dict[str, int] = {}
        self._items: dict[str, Tensor] = {}

    @property  # type: ignore[misc]
    def temperature(self) -> NoReturn:
        """There is none.

        Raises:
            AttributeError: always.
        """
        raise AttributeError("AutoGumbelMatching has no temperature")

    def _init_site(self, name: str, site: dict[str, Any], allowed: Tensor) -> None:
        prior = unwrap(site["fn"])
        if not isinstance(prior, PermutationLaw):
            raise ValueError(
                f"AutoGumbelMatching draws hard permutations, but the law of site '{name}' is {type(prior).__name__}; give "
                "it and SVI the plain model, without pyro_gs.relax, or use AutoGumbelSinkhorn"
            )
        if self.gradient == "perturb_and_map" and not has_gradient(prior):
            raise NotImplementedError(
                f"gradient='perturb_and_map' differentiates log p(P), but {type(prior).__name__} at site '{name}' has no "
                "gradient with respect to the matrix; use AutoGumbelMatching(model, gradient='score')"
            )
        sizes = component_sizes(find_support(allowed, warn=False))
        if not allowed.all() and not is_noise_law(prior) and int(sizes.max()) > EXACT_ROWS:
            raise NotImplementedError(no_bound(prior, name))
        super()._init_site(name, site, allowed)
        shape = allowed.shape[:-2]
        self._items[name] = torch.arange(shape.numel(), device=site["value"].device).reshape(shape)
        if self.baseline_decay is not None:
            self._baseline_at[name] = len(self._baselines)
            self._baselines.append(DecayingAverage(shape, self.baseline_decay))

    def _law(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GuideGumbelMatching:
        logits = self._logits(name, args, kwargs)
        item = pyro.subsample(self._items[name], event_dim=self._event_dim(name) - 2)
        bound: Bound = self.objective  # type: ignore[assignment]
        baseline: Any = self._baselines[self._baseline_at[name]] if name in self._baseline_at else None
        return GuideGumbelMatching(logits, bound, self.gradient, self.strength, baseline, item)

    def relaxed_sample(self, sample_shape: Any = (), *args: Any, **kwargs: Any) -> NoReturn:
        """There are none.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("AutoGumbelMatching has no relaxed draws; take guide.hard_sample(sample_shape)")

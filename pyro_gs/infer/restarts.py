"""Restarts of a part of the matching: the way out of optima that gradient steps cannot leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_gs.infer.autoguide import AutoGumbelSinkhorn

__all__ = ["PartialRestarts"]


class PartialRestarts:
    """Free a random part of the columns of the best matching so far, fit again, keep what scores higher.

    Gradient steps on a relaxed matching end in optima where groups of columns are confused along long cycles: no exchange of
    two improves them. Freeing many columns at once, with the others held softly, lets the steps reassign all of them
    together. In the terms of optimization this is an iterated local search, with SVI as its local search. Between
    :meth:`begin` and :meth:`end` the caller takes steps as ever::

        restarts = PartialRestarts(guide, log_joint)
        for _ in range(20):
            restarts.begin()
            optimizer.optim_objs.clear()        # Adam's moments belong to the old logits
            for _ in range(80):
                svi.step(*data)
            restarts.end()
        restarts.finish()
        ...                                     # and steps that fit the guide around the best

    The same columns are freed in all items of a batch: where items share unknowns, they are confused together.

    Args:
        guide: an ``AutoGumbelSinkhorn`` that was called once.
        score: the log joint, up to a constant, of a dict of permutation matrices by site.
        share: of the columns that a restart frees, in (0, 1].
        logit: by how much the kept columns' rows prefer them at the start, positive. Small: with 40 candidates a logit of 3
            is a probability of 1/3, so that what is kept can be corrected too.
        generator: where the random numbers come from; None for torch's own.

    Attributes:
        best: the best permutations so far, a dict by site, shape (..., n, n).
        best_score: their score.
        count: how often :meth:`end` was called.
        accepted: how often that scored higher than all before.

    Raises:
        ValueError: ``share`` or ``logit`` is out of range, or the score of the guide's mode is NaN or +inf.
        RuntimeError: the guide was not called yet.

    Example::

        >>> import pyro, pyro_gs as pgs
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> from pyro.optim import Adam
        >>> cost = torch.arange(16.0).reshape(4, 4).cos()
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(4))
        ...     pyro.factor("fit", 5 * (P * cost).sum((-2, -1)))
        >>> guide = pgs.AutoGumbelSinkhorn(model)
        >>> svi = SVI(pgs.relax(model), guide, Adam({"lr": 0.1}), Trace_ELBO())
        >>> loss = svi.step()
        >>> restarts = pgs.PartialRestarts(guide, lambda P: 5 * float((P["P"] * cost).sum()))
        >>> for _ in range(3):
        ...     restarts.begin()
        ...     losses = [svi.step() for _ in range(10)]
        ...     better = restarts.end()
        >>> restarts.best["P"].shape, restarts.count
        (torch.Size([4, 4]), 3)
    """

    def __init__(
        self,
        guide: AutoGumbelSinkhorn,
        score: Callable[[dict[str, Tensor]], float],
        *,
        share: float = 0.4,
        logit: float = 3.0,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_share(share)
        _check_logit(logit)
        self.guide, self.share, self.logit = guide, share, logit
        self._score, self._generator = score, generator
        self.count = self.accepted = 0
        self.best = {name: P.clone() for name, P in guide.median().items()}
        self.best_score = self._scored(self.best)

    def _scored(self, matrices: dict[str, Tensor]) -> float:
        value = float(self._score(matrices))
        if math.isnan(value) or value == math.inf:
            raise ValueError(f"score of the guide's mode is {value}, expected a finite number or -inf")
        return value

    @torch.no_grad()
    def begin(self, share: float | None = None) -> None:
        """Set the guide's logits: ``logit`` at the best matching's kept columns, zero elsewhere.

        Args:
            share: of the columns that are freed, in (0, 1], in place of that of all restarts. Large ones leave optima whose
                errors are spread far, small ones are undone more rarely: take turns where nothing is known of them.

        Raises:
            ValueError: ``share`` is out of range.
        """
        share = self.share if share is None else share
        _check_share(share)
        for name, P in self.best.items():
            n = P.shape[-1]
            free = torch.zeros(n, dtype=torch.bool, device="cpu")
            free[torch.rand(n, generator=self._generator, device="cpu").argsort()[: max(1, round(share * n))]] = True
            self._start(name, P * ~free.to(P.device), self.logit)

    def end(self, candidate: dict[str, Tensor] | None = None) -> bool:
        """Keep a matching if it scores higher than the best so far.

        Args:
            candidate: permutation matrices by site, such as the guide's mode after a local search of one's own; None for the
                guide's mode.

        Returns:
            Whether it scored higher.

        Raises:
            ValueError: ``candidate`` has other sites or shapes than the guide, or the score is NaN or +inf.
        """
        matrices = self.guide.median() if candidate is None else candidate
        shapes, expected = ({name: tuple(P.shape) for name, P in x.items()} for x in (matrices, self.best))
        if shapes != expected:
            raise ValueError(f"candidate must have the sites and shapes {expected}, but has {shapes}")
        score = self._scored(matrices)
        self.count += 1
        if score <= self.best_score:
            return False
        self.accepted += 1
        self.best = {name: P.clone() for name, P in matrices.items()}
        self.best_score = score
        return True

    @torch.no_grad()
    def finish(self, logit: float | Sequence[float] | None = None, loss: Callable[[], float] | None = None) -> None:
        """Set the guide's logits: ``logit`` at the best matching. Take more steps to fit the guide around it.

        How closely the guide should lie around the best depends on how much the data tell. Where there is time for few
        steps, or the way up leads past other matchings, let the loss choose::

            restarts.finish((3.0, 4.5, 6.0, 8.0, 11.0), lambda: svi.evaluate_loss(*data))

        Args:
            logit: positive, in place of that of the restarts; or several, of which the one with the lowest loss is taken.
            loss: of the guide as it is set, an estimate of the negative ELBO; asked once for each of several logits.

        Raises:
            ValueError: a logit is not positive and finite, there is none, several come without a loss or one with it, or
                the loss is NaN.
        """
        if logit is None:
            logit = self.logit
        logits = [logit] if isinstance(logit, int | float) else list(logit)
        for each in logits:
            _check_logit(each)
        if not logits:
            raise ValueError("logit must be a number or several, but is an empty sequence")
        if (len(logits) > 1) != (loss is not None):
            raise ValueError(
                f"loss chooses among several logits, but there {'is one' if loss else f'are {len(logits)} without it'}"
            )
        if loss is not None:
            losses = {}
            for each in logits:
                self._finish(each)
                losses[each] = float(loss())
                if math.isnan(losses[each]):
                    raise ValueError(f"loss at logit {each} is nan, expected a number")
            logits = [min(losses, key=losses.__getitem__)]
        self._finish(logits[0])

    def _finish(self, logit: float) -> None:
        for name, P in self.best.items():
            self._start(name, P, logit)

    def _start(self, name: str, kept: Tensor, logit: float) -> None:
        forbidden = self.guide.logits(name) == -torch.inf
        self.guide.set_logits(name, (logit * kept).masked_fill(forbidden, -torch.inf))


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], but is {share!r}")


def _check_logit(logit: float) -> None:
    if not (math.isfinite(logit) and logit > 0):
        raise ValueError(f"logit must be positive and finite, but is {logit!r}")

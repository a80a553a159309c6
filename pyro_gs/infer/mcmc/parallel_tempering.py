"""Parallel tempering over the power of the likelihood, with the log evidence as a by-product."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_gs.infer.log_joint import LogJoint, PotentialJoint
from pyro_gs.infer.mcmc.chain import Chain
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel
from pyro_gs.infer.mcmc.swap_metropolis import SwapMetropolis
from pyro_gs.infer.mcmc.tempered_evidence import MIN_SAMPLES, LogEvidence, estimate_log_evidence
from pyro_gs.ops.logits import check_count

_CROWDED = 5.0
"""Exponent of the first ladder, powers ``(k / (R - 1))^5``, as in Friel and Pettitt (2008)."""

_FIRST_ROUND = 16
"""Exchanges of every pair before the ladder is first adapted; every further round is twice as long."""


class ParallelTempering(PermutationKernel):
    r"""Replicas at powers ``0 = b_1 < ... < b_R = 1`` of the likelihood that trade states; the one at power 1 is sampled.

    Replica r has the target ``p(P) L(P)^b_r``. In a step all replicas are moved by ``kernel``, scored together in one run of
    the model, and then neighbours trade states with probability ``min(1, (L(P_r) / L(P_s))^(b_s - b_r))``, pairs that begin
    with an even and with an odd replica taking turns (Swendsen and Wang 1986; Geyer 1991; for the turns Syed et al. 2022).
    The replica at power 0 moves freely among the permutations of the prior, so that modes that no single move joins are met
    by others. Independent items of the only site trade places each on its own.

    With ``adapt`` the powers are set anew in the warm-up, after rounds of 16, 32, 64, ... exchanges and at its end, so that
    all neighbours trade equally often: equal steps of the cumulated rates of refusal (Syed et al. 2022, Section 5).

    **Log evidence.** ``d/db log Z(b)`` is the mean log likelihood at power b. :attr:`log_evidence` holds thermodynamic
    integration of it, the trapezoid rule corrected by the variances, which are its derivatives (Friel, Hurn and Wyse 2014),
    and the stepping-stone estimate (Xie et al. 2011), which has no error from the spacing of the powers. Both with standard
    errors by batch means, which do not count that spacing error: prefer stepping stone unless the ladder is fine.

    Diagnostics have ``swap rates`` (mean probabilities to trade, from power 1 down), ``powers`` and ``log evidence``.

    A ``swap_delta`` hook does not tell prior and likelihood apart, so it is used only where all priors are uniform; else
    the model is run.

    Args:
        model: as in :class:`PermutationKernel`.
        potential_fn: as in :class:`PermutationKernel`; all of it counts as likelihood, of which the prior is uniform.
        kernel: moves the replicas, a kernel without a model, by default ``SwapMetropolis()``; also says which sites.
        num_temperatures: number R of replicas, at least 2.
        powers: ascending from 0 or more to 1, in place of ``num_temperatures``; without 0 there is no log evidence.
        adapt: whether to set the powers anew in the warm-up; lowest and highest are kept.
        allowed: as in :class:`PermutationKernel`.
        vectorize: as in :class:`PermutationKernel`.
        jit_compile: not supported.

    Raises:
        TypeError: ``kernel`` is no :class:`PermutationKernel`.
        ValueError: as :class:`PermutationKernel`; ``kernel`` with a model of its own; ``powers`` that are not as above;
            latent sites other than permutations, as inside ``HMCGibbs``, which would need replicas of their own.

    Example:
        >>> import pyro, torch, pyro_gs as pgs
        >>> from pyro.infer import MCMC
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.factor("likelihood", 2 * P.diagonal(dim1=-2, dim2=-1).sum(-1))
        >>> kernel = ParallelTempering(model, num_temperatures=4)
        >>> mcmc = MCMC(kernel, num_samples=200, warmup_steps=100, disable_progbar=True)
        >>> mcmc.run()
        >>> exact = torch.tensor([6.0, 2.0, 2.0, 2.0, 0.0, 0.0]).exp().mean().log()
        >>> abs(kernel.log_evidence.stepping_stone - float(exact)) < 1
        True
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        kernel: PermutationKernel | None = None,
        num_temperatures: int = 8,
        powers: Sequence[float] | None = None,
        adapt: bool = True,
        allowed: Tensor | Mapping[str, Tensor] | None = None,
        vectorize: bool | None = None,
        jit_compile: bool = False,
    ) -> None:
        super().__init__(model, potential_fn, allowed=allowed, vectorize=vectorize, jit_compile=jit_compile)
        kernel = SwapMetropolis() if kernel is None else kernel
        if not isinstance(kernel, PermutationKernel):
            raise TypeError(f"kernel must be a kernel over permutations, but is {type(kernel).__name__}")
        if kernel.model is not None or kernel.potential_fn is not None:
            name = type(kernel).__name__
            raise ValueError(
                f"kernel must have no model of its own; write ParallelTempering(model, kernel={name}()) in place of "
                f"kernel={name}(model)"
            )
        check_count(num_temperatures, "num_temperatures", least=2)
        self._first_powers = _ladder(num_temperatures) if powers is None else _check_powers(powers)
        self._kernel = kernel
        self._adapt = adapt
        self._history: list[Tensor] = []

    def _refuse_others(self, joint: LogJoint | PotentialJoint) -> None:
        joint.refuse_others(
            "ParallelTempering",
            "they would need replicas of their own. Write HMCGibbs(NUTS(model), moves=SwapMetropolis()) without tempering, "
            "or fix them, ParallelTempering(poutine.condition(model, data={...}))",
        )

    def bind(self, chain: Chain, warmup_steps: int) -> None:
        """Work on a chain from now on; its replicas, if it has several, are sampled independently.

        Raises:
            ValueError: latent sites other than permutations.
        """
        self._refuse_others(chain.joint)
        super().bind(chain, warmup_steps)
        levels = len(self._first_powers)
        self.powers = torch.tensor(self._first_powers[::-1], dtype=torch.float64, device=chain.power.device)
        index = {name: rows.repeat(levels, 1, 1) for name, rows in chain.index.items()}
        self.ladder = Chain(chain.joint, index, None, self.powers.repeat_interleave(chain.replicas))
        """All replicas: that of power b, the highest first, and chain c at place ``b * chains + c``."""
        self._known = dict(chain.index)
        self._kernel.bind(self.ladder, warmup_steps)
        self._moved = self._kernel.moved_sites
        self._history = []
        self._round, self._left = _FIRST_ROUND, 2 * _FIRST_ROUND
        self._forget_swaps()

    def _forget_swaps(self) -> None:
        self._swaps = torch.zeros(2, len(self.powers) - 1, dtype=torch.float64, device=self.powers.device)

    def step(self) -> None:
        """Move all replicas, then let neighbours trade states."""
        if self._t == self._warmup_steps:
            self._forget_swaps()
        chains = self._chain.replicas
        if any(self._chain.index[name] is not rows for name, rows in self._known.items()):  # moved by another kernel
            self.ladder.set(
                {n: torch.cat([self._chain.index[n], rows[chains:]]) for n, rows in self.ladder.index.items()}, {}
            )
        self._kernel.step()
        self._trade()
        self._chain.set({name: rows[:chains] for name, rows in self.ladder.index.items()}, {})
        self._known = dict(self._chain.index)
        if self.warming_up:
            self._adapt_ladder()
        else:
            self._history.append(self.ladder.total()[1].reshape(len(self.powers), chains))
        self._t += 1

    def _trade(self) -> None:
        """Exchange the states of neighbours, pairs of one parity."""
        levels, chains = len(self.powers), self._chain.replicas
        focus = self.ladder.current()
        alone = focus.independent and len(self.ladder.index) == 1
        likelihood = (focus.likelihood if alone else self.ladder.total()[1, :, None]).reshape(levels, chains, -1)
        first = torch.arange(self._t % 2, levels - 1, 2, device=self.powers.device)
        if not len(first):
            return
        gap = (self.powers[first] - self.powers[first + 1])[:, None, None]
        ratio = (gap * (likelihood[first + 1] - likelihood[first])).clamp(max=0.0)
        self._swaps[0, first] += ratio.exp().mean((1, 2))
        self._swaps[1, first] += 1
        trades = torch.rand_like(ratio).log() < ratio
        if bool(trades.any()):
            source = torch.arange(levels, device=first.device)[:, None, None].repeat(1, chains, ratio.shape[2])
            source[first] += trades.long()
            source[first + 1] -= trades.long()
            source = source * chains + torch.arange(chains, device=first.device)[:, None]
            self.ladder.reorder(source.flatten(0, 1))

    def _adapt_ladder(self) -> None:
        """At the end of a round, place the powers at equal steps of the cumulated rates of refusal."""
        self._left -= 1
        last = self._t + 1 == self._warmup_steps
        if not self._adapt or (self._left and not last):
            return
        if bool((self._swaps[1] >= _FIRST_ROUND).all()):
            refused = (1 - self.swap_rates).clamp(min=1e-3)
            ends = torch.cat([refused.new_zeros(1), refused.cumsum(0)])
            even = torch.linspace(0, 1, len(ends), dtype=ends.dtype, device=ends.device) * ends[-1]
            self.powers = _interpolate(even, ends, self.powers ** (1 / _CROWDED)) ** _CROWDED
            self.ladder.power = self.powers.repeat_interleave(self._chain.replicas)
        self._forget_swaps()
        self._round *= 2
        self._left = 2 * self._round

    @property
    def swap_rates(self) -> Tensor:
        """Mean probability that neighbours trade states, from power 1 down, float64 (R - 1,); at first zero."""
        return self._swaps[0] / self._swaps[1].clamp(min=1)

    @property
    def log_evidence(self) -> LogEvidence:
        """Log evidence from the samples so far, also after the run; from other processes see :meth:`diagnostics`.

        Raises:
            ValueError: fewer than 16 samples, or a ladder that does not begin at power 0.
        """
        if len(self._history) < MIN_SAMPLES:
            raise ValueError(
                f"log_evidence needs at least {MIN_SAMPLES} samples after the warm-up, but has {len(self._history)}; run "
                "MCMC(kernel, num_samples=1000, warmup_steps=200) in this process, or with several chains read "
                "mcmc.diagnostics()['log evidence']"
            )
        if float(self.powers[-1]) != 0:
            raise ValueError(f"log_evidence needs the power 0, but powers begin at {float(self.powers[-1]):g}")
        return estimate_log_evidence(self.powers.flip(0), torch.stack(self._history).flip(1))

    @property
    def acceptance_rate(self) -> float:
        """Acceptance rate of the moves of all replicas."""
        return self._kernel.acceptance_rate

    @property
    def num_proposed(self) -> int:
        """Number of proposals of the moves of all replicas."""
        return self._kernel.num_proposed

    def end_warmup(self) -> None:
        """End the warm-up now."""
        super().end_warmup()
        self._kernel.end_warmup()

    def logging(self) -> collections.OrderedDict[str, str]:
        """What the progress bar shows: acceptance of the moves, mean and lowest rate of exchange."""
        out = super().logging()
        rates = self.swap_rates
        out["swap rate"] = f"{float(rates.mean()):.2f} (lowest {float(rates.min()):.2f})"
        return out

    def diagnostics(self) -> dict[str, Any]:
        """Those of every kernel; rates of exchange, powers and, from 16 samples with power 0, the log evidence."""
        out = super().diagnostics()
        out["swap rates"] = self.swap_rates.tolist()
        out["powers"] = self.powers.tolist()
        if len(self._history) >= MIN_SAMPLES and float(self.powers[-1]) == 0:
            out["log evidence"] = self.log_evidence._asdict()
        return out

    def cleanup(self) -> None:
        """Forget the chains; the log evidence stays."""
        super().cleanup()
        self.__dict__.pop("ladder", None)
        self._known = {}
        self._kernel.cleanup()


def _ladder(count: int) -> list[float]:
    return [(k / (count - 1)) ** _CROWDED for k in range(count)]


def _check_powers(powers: Sequence[float]) -> list[float]:
    values = [float(power) for power in powers]
    good = len(values) >= 2 and values[0] >= 0 and values[-1] == 1
    if not good or not all(a < b for a, b in itertools.pairwise(values)):
        raise ValueError(f"powers must ascend from 0 or more to 1, at least two of them, but are {values}")
    return values


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear through (x, y), x ascending, with the ends kept as they are."""
    place = (torch.searchsorted(x, at[1:-1]) - 1).clamp(0, len(x) - 2)
    share = (at[1:-1] - x[place]) / (x[place + 1] - x[place])
    return torch.cat([y[:1], y[place] + share * (y[place + 1] - y[place]), y[-1:]])

"""Permutations by moves of their own, everything else by HMC or NUTS."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer.mcmc import HMC
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.poutine.condition_messenger import ConditionMessenger
from torch import Tensor

from pyro_gs.distributions.uniform_permutation import UniformPermutation
from pyro_gs.infer.handlers import name_sites, unwrap
from pyro_gs.infer.log_joint import LogJoint
from pyro_gs.infer.mcmc.chain import Chain
from pyro_gs.infer.mcmc.move_sequence import MoveSequence, check_moves
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel
from pyro_gs.infer.mcmc.swap_metropolis import SwapMetropolis
from pyro_gs.ops.logits import check_count

_TRIES = 20


class HMCGibbs(MCMCKernel):
    """Gibbs sampling: permutations by moves given the rest, the rest by HMC or NUTS given the permutations.

    A step makes ``num_moves`` steps of the moves, then one of the inner kernel on the model conditioned on where they
    ended. The inner kernel adapts its step size and mass matrix during warm-up as it does alone::

        MCMC(HMCGibbs(NUTS(model)), num_samples=1000, warmup_steps=200).run(data)

    The name and the order of arguments are those of numpyro's ``HMCGibbs``.

    Args:
        inner_kernel: ``HMC(model)`` or ``NUTS(model)`` of the plain model, permutations included.
        moves: a kernel over permutations without a model, or several that take turns; by default ``SwapMetropolis()``.
        num_moves: steps of the moves in a step, at least 1.

    Raises:
        TypeError: ``inner_kernel`` is no HMC or NUTS, ``moves`` no kernels over permutations.
        ValueError: an inner kernel without a model, moves with one, or, at set-up, a model without a latent permutation,
            without another latent site, or with another discrete one; moves that leave a permutation out; no start of
            positive density.
        NotImplementedError: an inner kernel with ``jit_compile=True``, which would freeze the permutations.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_gs as pgs
        >>> from pyro.infer import MCMC, NUTS
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.sample("y", dist.Normal(P @ torch.arange(3.0) + mu[..., None], 0.5).to_event(1), obs=y)
        >>> mcmc = MCMC(pgs.HMCGibbs(NUTS(model)), num_samples=10, warmup_steps=10, disable_progbar=True)
        >>> mcmc.run(torch.tensor([2.0, 0.0, 1.0]))
        >>> {name: tuple(value.shape) for name, value in mcmc.get_samples().items()}
        {'P': (10, 3, 3), 'mu': (10,)}
    """

    def __init__(
        self,
        inner_kernel: HMC,
        moves: PermutationKernel | Sequence[PermutationKernel] | None = None,
        *,
        num_moves: int = 1,
    ) -> None:
        if not isinstance(inner_kernel, HMC):
            found = inner_kernel.__name__ if isinstance(inner_kernel, type) else type(inner_kernel).__name__
            raise TypeError(f"inner_kernel must be HMC(model) or NUTS(model), but is {found}")
        kind = type(inner_kernel).__name__
        if inner_kernel.model is None:
            raise ValueError(f"inner_kernel must have a model, not a potential_fn; write HMCGibbs({kind}(model))")
        if inner_kernel._jit_compile:
            raise NotImplementedError(
                "jit_compile=True would freeze the permutations that the model was traced with; write "
                f"HMCGibbs({kind}(model))"
            )
        check_count(num_moves, "num_moves", least=1)
        if moves is None:
            moves = SwapMetropolis()
        elif isinstance(moves, (list, tuple)):
            moves = MoveSequence(moves)
        check_moves(moves)
        self.inner_kernel = inner_kernel
        self.moves: PermutationKernel = moves  # type: ignore[assignment]
        self.num_moves = num_moves
        self.model: Callable[..., Any] = inner_kernel.model
        self._conditioned = _Conditioned(self.model)
        self._initial_params: dict[str, Tensor] | None = None
        super().__init__()

    @property
    def transforms(self) -> dict[str, Any] | None:
        """From the support of the other sites to unconstrained space; None before set-up."""
        return self.inner_kernel.transforms  # type: ignore[no-any-return]

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the model's sites, find a start and set up the inner kernel."""
        joint = LogJoint(self.model, args, kwargs, normalized=False)
        if not joint.others:
            kind = type(self.moves).__name__
            raise ValueError(
                f"the model has permutations only, so there is nothing for {type(self.inner_kernel).__name__} to do; write "
                f"MCMC({kind}(model), ...)"
            )
        if joint.masked:
            raise ValueError(
                f"the priors of {name_sites(joint.masked)} stand under poutine.mask, which HMC would leave out and "
                "the moves would not; take the mask away from them"
            )
        discrete = [name for name, node in joint.others.items() if unwrap(node["fn"]).support.is_discrete]
        if discrete:
            raise ValueError(
                f"HMCGibbs moves permutations and continuous sites, but {name_sites(discrete)} are discrete; sum them out "
                "in the model, for example by pyro.distributions.MixtureSameFamily or a pyro.factor"
            )
        given = self._initial_params or {}
        known = [*joint.sites, *joint.others]
        unknown = [name for name in given if name not in known]
        inner = {name: value for name, value in given.items() if name in joint.others}
        if unknown or (inner and len(inner) < len(joint.others)):
            raise ValueError(
                f"initial_params must be of the latent sites {name_sites(known)}, of the continuous ones all or none, but "
                f"has {name_sites(list(given))}"
            )
        fixed = {name: joint.sites[name].to_items(given[name]) for name in joint.sites if name in given}
        self._chain = self._start(joint, fixed, inner, warmup_steps, args, kwargs)
        self.moves.bind(self._chain, warmup_steps * self.num_moves)
        self.moves.refuse_unmoved(fixed)

    def _start(
        self,
        joint: LogJoint,
        fixed: dict[str, Tensor],
        inner: dict[str, Tensor],
        warmup_steps: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Chain:
        """Set up the inner kernel where the joint density is positive: at what was given, or at draws from the prior."""
        for attempt in range(_TRIES):
            draw = joint.start if attempt == 0 else joint.draw()
            index = {name: fixed.get(name, site.to_items(draw[name]))[None] for name, site in joint.sites.items()}
            self._conditioned.values = {name: site.to_value(index[name][0]) for name, site in joint.sites.items()}
            self.inner_kernel.initial_params = inner or None
            self.inner_kernel.model = self._conditioned
            try:
                self.inner_kernel.setup(warmup_steps, *args, **kwargs)
            except ValueError as error:
                if "valid initial params" not in str(error):
                    raise
            else:
                self._params: dict[str, Tensor] = dict(self.inner_kernel.initial_params)
                chain = Chain(joint, index, self._constrained(self._params))
                if bool((chain.total().sum(0) > -torch.inf).all()):
                    return chain
            finally:
                self.inner_kernel.model = self.model
            self.inner_kernel.cleanup()
            if len(fixed) == len(joint.sites):
                break
        where = " at the permutations of initial_params" if fixed else ""
        raise ValueError(
            f"found no start of positive density{where}; give one by MCMC(..., initial_params={{...}}), matrices for "
            f"{name_sites(list(joint.sites))} and unconstrained values for {name_sites(list(joint.others))}"
        )

    def _constrained(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        transforms = self.inner_kernel.transforms
        return {name: transforms[name].inv(value).detach() for name, value in params.items() if name in transforms}

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """The start of the chain, matrices of permutations and unconstrained values of the rest."""
        if hasattr(self, "_chain"):
            return {**self._params, **self._chain.values()}
        return self._initial_params or {}

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial_params = params

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next state: matrices of permutations, unconstrained values of the rest."""
        sites = self._chain.joint.sites
        index = {name: site.to_items(params[name])[None] for name, site in sites.items()}
        rest = {name: value for name, value in params.items() if name not in sites}
        self._chain.set(index, self._constrained(rest))
        for _ in range(self.num_moves):
            self.moves.step()
        values = self._chain.values()
        self._conditioned.values = values
        self.inner_kernel.clear_cache()  # the potential that it remembers is of other permutations
        return {**self.inner_kernel.sample(rest), **values}

    def logging(self) -> collections.OrderedDict[str, Any]:
        """What the progress bar shows: step size and acceptance of the inner kernel, acceptance of the moves."""
        inner = collections.OrderedDict(self.inner_kernel.logging())
        moves = self.moves.logging()
        return collections.OrderedDict([*inner.items(), *((f"moves {name}", value) for name, value in moves.items())])

    def diagnostics(self) -> dict[str, Any]:
        """Those of the inner kernel, and of the moves under ``"moves: ..."``."""
        moves = {f"moves: {name}": value for name, value in self.moves.diagnostics().items()}
        return {**self.inner_kernel.diagnostics(), **moves}

    def cleanup(self) -> None:
        """Forget the chain, so that the kernel can be set up anew."""
        self.inner_kernel.cleanup()
        self.moves.cleanup()
        self._conditioned.values = {}
        self._initial_params = None
        for name in ("_chain", "_params"):
            self.__dict__.pop(name, None)


class _Conditioned:
    """A model conditioned on the permutations at hand."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.values: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Given(self.values):
            return self.model(*args, **kwargs)


class _Given(ConditionMessenger):
    """Conditions on permutations, without the density of uniform priors: a constant, at the price of a permanent."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["name"] in self.data and isinstance(unwrap(msg["fn"]), UniformPermutation):
            msg["fn"] = msg["fn"].mask(False)

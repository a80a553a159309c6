"""What all Markov chain Monte Carlo kernels over permutations share."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_gs.infer.handlers import name_sites
from pyro_gs.infer.log_joint import LogJoint, PotentialJoint
from pyro_gs.infer.mcmc.chain import Chain, Focus, ItemsDepend

_TRIES = 100

_ON_NAN = "constant entries have no r_hat and leave their site no n_eff; see pyro_gs.convergence(mcmc)"


class PermutationKernel(MCMCKernel):
    """Base of the kernels that move permutations and nothing else.

    A subclass writes :meth:`move`, which moves one site of a :class:`Chain`, and, where it needs to, :meth:`prepare`.
    It runs alone under ``MCMC`` when it has a model whose latent sites are all permutations, or inside ``HMCGibbs`` and
    ``MoveSequence`` without one.

    Args:
        model: a Pyro model whose latent sites are permutations, plain rather than relaxed.
        potential_fn: in place of a model, minus the log density as a function of a dict of matrices by site; needs
            ``initial_params``.
        sites: names of the sites to move; by default all permutation sites.
        allowed: with ``potential_fn``, the pairs that are not forbidden, bool (..., n, n) or a dict by site.
        vectorize: whether the model broadcasts over candidates to the left of its plates; None tries it out.
        jit_compile: not supported.

    Raises:
        ValueError: both or neither of ``model`` and ``potential_fn`` in :meth:`setup`; a model without a permutation site or
            with other latent sites; ``sites`` that it does not have, or that leave one out which ``initial_params`` does not
            fix. In a run: a state of density zero at a positive power, or one whose log density is another in a run of the
            model on it alone, which is made once in 128 runs.
        NotImplementedError: ``jit_compile=True``.
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        sites: Sequence[str] | None = None,
        allowed: Tensor | Mapping[str, Tensor] | None = None,
        vectorize: bool | None = None,
        jit_compile: bool = False,
    ) -> None:
        kind = type(self).__name__
        if jit_compile:
            raise NotImplementedError(
                f"jit_compile=True would freeze the permutations that the model was traced with; write {kind}(model)"
            )
        if model is not None and potential_fn is not None:
            raise ValueError(f"{kind} takes one of model and potential_fn, not both")
        for name, value in (("model", model), ("potential_fn", potential_fn)):
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable, but is {type(value).__name__}")
        if isinstance(sites, str) or (sites is not None and not all(isinstance(site, str) for site in sites)):
            raise TypeError(f"sites must be a list of site names, but is {sites!r}")
        if allowed is not None and potential_fn is None:
            raise ValueError("allowed goes with potential_fn; a model says what is allowed by its prior")
        self.model = model
        self.potential_fn = potential_fn
        self.transforms: dict[str, Any] = {}
        self._names = None if sites is None else list(sites)
        self._allowed = allowed
        self._vectorize = vectorize
        self._initial_params: dict[str, Tensor] | None = None
        self._last: dict[str, Tensor] = {}
        self._warmup_steps = 0
        self._t = 0
        super().__init__()

    # What subclasses write

    def prepare(self, focus: Focus) -> None:
        """Set up for a site before the first step; called for every moved site."""

    def move(self, focus: Focus) -> tuple[int, int]:
        """Move one site.

        Returns:
            Numbers of proposals made and accepted.

        Raises:
            ItemsDepend: passed on from ``Focus.evaluate``; the move is then made anew.
        """
        raise NotImplementedError

    # MCMCKernel

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the model's sites and find a start.

        Raises:
            ValueError: see the class.
        """
        joint = self._joint(args, kwargs)
        self._refuse_others(joint)
        self.bind(self._start(joint), warmup_steps)
        self.refuse_unmoved(self._initial_params or {})

    def _refuse_others(self, joint: LogJoint | PotentialJoint) -> None:
        kind = type(self).__name__
        joint.refuse_others(kind, f"write HMCGibbs(NUTS(model), moves={kind}()) to move the others by NUTS")

    def _joint(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LogJoint | PotentialJoint:
        kind = type(self).__name__
        if self.model is not None:
            return LogJoint(self.model, args, kwargs, vectorize=self._vectorize, normalized=False)
        if self.potential_fn is None:
            raise ValueError(
                f"{kind} has no model; write MCMC({kind}(model), num_samples=1000, warmup_steps=200), or give it to "
                f"HMCGibbs(NUTS(model), moves={kind}())"
            )
        if not self._initial_params:
            raise ValueError(
                f"{kind}(potential_fn=...) needs a start: MCMC(kernel, ..., initial_params={{'P': torch.eye(n)}}), with a "
                "permutation matrix for every site"
            )
        return PotentialJoint(self.potential_fn, self._initial_params, self._allowed, vectorize=self._vectorize)

    def _start(self, joint: LogJoint | PotentialJoint) -> Chain:
        """A chain at ``initial_params`` or, for sites without any, at a draw from the prior of positive density."""
        given = self._initial_params or {}
        unknown = sorted(set(given) - set(joint.sites))
        if unknown:
            raise ValueError(
                f"initial_params has {name_sites(unknown)}, but the permutation sites are {name_sites(list(joint.sites))}"
            )
        fixed = {name: joint.sites[name].to_items(value) for name, value in given.items()}
        draw = joint.start
        for _ in range(_TRIES):
            index = {name: fixed.get(name, joint.sites[name].to_items(draw[name]))[None] for name in joint.sites}
            chain = Chain(joint, index)
            if bool((chain.total().sum(0) > -torch.inf).all()):
                return chain
            if len(fixed) == len(joint.sites):
                raise ValueError("initial_params has density zero; start at permutations of positive density")
            draw = joint.draw()
        raise ValueError(
            f"none of {_TRIES} draws from the prior has positive density; give a start by MCMC(..., initial_params={{...}})"
        )

    def bind(self, chain: Chain, warmup_steps: int) -> None:
        """Work on a chain from now on."""
        self._chain = chain
        self._warmup_steps = warmup_steps
        self._t = 0
        self._proposed = self._accepted = 0
        known = list(chain.joint.sites)
        self._moved = known if self._names is None else self._names
        missing = [name for name in self._moved if name not in known]
        if missing:
            raise ValueError(
                f"sites has {name_sites(missing)}, but the latent permutation sites are {name_sites(known)}; write "
                f"{type(self).__name__}(model, sites={known!r})"
            )
        self._visited = {
            name: torch.zeros(site.num_items, site.n, site.n, dtype=torch.bool, device=site.device)
            for name, site in chain.joint.sites.items()
        }
        chain.begin(self._moved)
        for name in self._moved:
            self._retry(self.prepare, name)

    @property
    def moved_sites(self) -> list[str]:
        """Names of the sites that are moved, once bound to a chain."""
        return self._moved

    def refuse_unmoved(self, given: Mapping[str, Any]) -> None:
        """Raise where a site would stay for ever at the draw from the prior that it starts from.

        Args:
            given: the sites with a start of the user's.

        Raises:
            ValueError: names them.
        """
        left = [name for name in self._chain.joint.sites if name not in self._moved and name not in given]
        if left:
            raise ValueError(
                f"no kernel moves {name_sites(left)}, which would stay at a draw from the prior; leave out sites=, which "
                f"moves all, or fix them by pyro.poutine.condition(model, {{'{left[0]}': ...}})"
            )

    def _retry(self, function: Callable[[Focus], Any], name: str) -> Any:
        try:
            return function(self._chain.focus(name))
        except ItemsDepend:  # now known to depend, so it cannot happen again
            return function(self._chain.focus(name))

    @property
    def warming_up(self) -> bool:
        """Whether the present step belongs to the warm-up, the only time at which a kernel may adapt."""
        return self._t < self._warmup_steps

    def step(self) -> None:
        """Move every site once."""
        if self.starts_samples:  # what is reported is of the samples
            self._proposed = self._accepted = 0
            for visited in self._visited.values():
                visited.zero_()
        proposed, accepted = self._move_all()
        self._chain.verify()
        self._proposed += proposed
        self._accepted += accepted
        self._t += 1
        for name, visited in self._visited.items():
            visited.scatter_(-1, self._chain.index[name][0, ..., None], True)

    def _move_all(self) -> tuple[int, int]:
        """Move every site once; numbers of proposals made and accepted."""
        counts = [self._retry(self.move, name) for name in self._moved]
        return sum(made for made, _ in counts), sum(accepted for _, accepted in counts)

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chain starts, a dict of matrices by site."""
        if hasattr(self, "_chain"):
            return self._values()
        return self._initial_params or {}

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._initial_params = params

    def _values(self) -> dict[str, Tensor]:
        self._last = self._chain.values()
        return self._last

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """The next state, a dict of matrices by site."""
        if any(params.get(name) is not value for name, value in self._last.items()):
            sites = self._chain.joint.sites
            self._chain.set({name: sites[name].to_items(params[name])[None] for name in sites}, self._chain.others)
        self.step()
        return self._values()

    @property
    def num_proposed(self) -> int:
        """Number of proposals in the warm-up or, after it, in the samples."""
        return self._proposed

    @property
    def num_accepted(self) -> int:
        """Number of them that were accepted."""
        return self._accepted

    @property
    def starts_samples(self) -> bool:
        """Whether the next step is the first after the warm-up, at which the counts begin anew."""
        return self._t == self._warmup_steps

    def end_warmup(self) -> None:
        """End the warm-up now, whatever number of steps it was set up with."""
        self._warmup_steps = self._t

    @property
    def acceptance_rate(self) -> float:
        """Share of proposals that were accepted, in the warm-up or, after it, in the samples."""
        return self._accepted / self._proposed if self._proposed else 0.0

    def logging(self) -> collections.OrderedDict[str, str]:
        """What the progress bar shows."""
        return collections.OrderedDict([("acc. prob", f"{self.acceptance_rate:.3f}")])

    def diagnostics(self) -> dict[str, Any]:
        """Acceptance rate of the samples and, by site, the number of entries of the matrices that were the same in all.

        Those entries, such as forbidden pairs, have no R-hat, and Pyro's ``mcmc.summary()`` and ``mcmc.diagnostics()`` have
        NaN for them and for all effective sample sizes of their site; ``"NaN"`` points to ``pyro_gs.convergence(mcmc)``,
        which leaves them out.

        Raises:
            RuntimeError: before a chain has run, and after ``MCMC.run``, which makes the kernel forget it.
        """
        if "_visited" not in self.__dict__:
            raise RuntimeError(
                f"{type(self).__name__} has no chain: after MCMC.run its diagnostics are in mcmc.diagnostics()"
            )
        constant = {name: int((~visited).sum() + (visited.sum(-1) == 1).sum()) for name, visited in self._visited.items()}
        return {"acceptance rate": self.acceptance_rate, "constant entries": constant, "NaN": _ON_NAN}

    def cleanup(self) -> None:
        """Forget the chain, so that the kernel can be pickled and set up anew."""
        for name in ("_chain", "_visited"):
            self.__dict__.pop(name, None)
        self._last = {}
        self._initial_params = None

"""Proposals from a fitted guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from pyro_gs.distributions.matching_integral import EXACT_ROWS
from pyro_gs.infer.log_joint import PermutationSite
from pyro_gs.infer.mcmc.chain import Focus
from pyro_gs.infer.mcmc.guide_laws import GibbsLaw, MatchingLaw, ProposalLaw, RelaxedLaw, SequentialLaw, centred
from pyro_gs.infer.mcmc.permutation_kernel import PermutationKernel
from pyro_gs.ops.logits import check_count, check_logits
from pyro_gs.ops.permanent import EXACT_LIMIT
from pyro_gs.ops.support import component_sizes, find_support

Law = Literal["auto", "hard", "gibbs", "sequential", "relaxed"]
LAWS: tuple[Law, ...] = get_args(Law)

_POOL = 256
"""Draws that are made at once, as they share most of their work."""


class GuideProposal(PermutationKernel):
    r"""Independence Metropolis-Hastings: whole permutations are proposed by a fitted guide, accepted by the model.

    A proposal P' is accepted with probability ``min(1, pi(P') q(P) / (pi(P) q(P')))``, so the chain has the posterior pi
    whatever the guide; what the guide decides is how many proposals are taken. Between modes that a guide covers it moves at
    once, where local moves cross a barrier. It stays long where the guide has too little mass: combine it with local moves,
    ``MoveSequence([GuideProposal(guide=guide), SwapMetropolis()])``.

    The guide's own hard law ``M(X + eps)`` has exact probabilities up to three rows only, so ``law`` says what q is:

    - ``"hard"``: that law; at most three rows, in a component of the mask as for the next.
    - ``"gibbs"``: ``q(P)`` proportional to ``exp <X, P>`` with the guide's logits X, drawn exactly; at most 20 rows.
    - ``"sequential"``: rows one after the other, the surest first, each among the columns left in proportion to ``exp X``,
      the columns of X centred; its probability is a product for any size. Where a mask leaves a row no column, the
      proposal counts as refused.
    - ``"relaxed"``: the guide's hard law again, with the chain's state extended by a relaxed point. The target is
      ``p_0(R) pi(M(R)) n!``, with ``p_0`` the law of ``S(eps)``, under which all permutations are equally probable; R is
      proposed from the law of ``S(X + eps)``, and drawn anew given P before every proposal. The ratio is of the densities
      of ``GumbelSinkhorn`` (any temperature: it cancels), exact up to three rows and as close as its docstring says above.
      Needs all pairs allowed.
    - ``"auto"``: hard up to three rows, gibbs up to 20, else sequential, by the figures below.

    **How many are accepted** (``python benchmarks/guide_proposal.py``: n noisy points, a guide after 300 steps, mean of
    three data sets; then the share that also moved the chain, the others being the present permutation):

    ====  =====  =============  =============  =============
    n     noise  gibbs          sequential     relaxed
    ====  =====  =============  =============  =============
    5     1      .306 / .273    .270 / .247    .193 / .173
    5     .5     .565 / .235    .420 / .203    .042 / .027
    10    1      .025 / .025    .017 / .017    .014 / .014
    10    .5     .214 / .134    .119 / .076    .000 / .000
    20    .25    .008 / .008    .003 / .003    .000 / .000
    20    .1     .275 / .003    .234 / .019    .000 / .000
    50    .05                   .226 / .001    .000 / .000
    ====  =====  =============  =============  =============

    From ten unsure rows up a proposal of the whole permutation is seldom taken, and relaxed points of a sharp guide have no
    overlap with flat ones.

    Independent items of a plate are accepted each on its own; items that depend on each other are proposed one by one. A
    step scores its ``num_steps`` proposals in one run of the model. A proposal that is the present permutation counts as
    accepted.

    Args:
        model: as in :class:`PermutationKernel`.
        potential_fn: as in :class:`PermutationKernel`.
        guide: a fitted ``AutoGumbelSinkhorn``, or what has its method ``logits(name, *args, **kwargs)``, which is called
            with the arguments of the model at set-up.
        law: see above.
        num_steps: proposals an item in a step.
        sites: as in :class:`PermutationKernel`.
        allowed: as in :class:`PermutationKernel`.
        vectorize: as in :class:`PermutationKernel`.
        jit_compile: not supported.

    Raises:
        TypeError: ``guide`` without that method.
        ValueError: as :class:`PermutationKernel`; an unknown ``law``; at set-up, logits of another shape than the site's, a
            guide that forbids what the model allows, or a site that ``law`` cannot take.

    Example:
        >>> import pyro, torch, pyro_gs as pgs
        >>> from pyro.infer import MCMC
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(4))
        ...     pyro.factor("likelihood", 2 * P.diagonal(dim1=-2, dim2=-1).sum(-1))
        >>> guide = pgs.AutoGumbelSinkhorn(model, init_logits={"P": 2 * torch.eye(4)})  # as if fitted
        >>> _ = guide()
        >>> mcmc = MCMC(GuideProposal(model, guide=guide), num_samples=50, warmup_steps=0, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.diagnostics()["acceptance rate"]["chain 0"] > 0.5
        True
    """

    def __init__(
        self,
        model: Callable[..., Any] | None = None,
        potential_fn: Callable[[dict[str, Tensor]], Tensor] | None = None,
        *,
        guide: Any,
        law: Law = "auto",
        num_steps: int = 8,
        sites: Sequence[str] | None = None,
        allowed: Tensor | Mapping[str, Tensor] | None = None,
        vectorize: bool | None = None,
        jit_compile: bool = False,
    ) -> None:
        super().__init__(model, potential_fn, sites=sites, allowed=allowed, vectorize=vectorize, jit_compile=jit_compile)
        if not callable(getattr(guide, "logits", None)):
            raise TypeError(f"guide must have a method logits, as AutoGumbelSinkhorn has, but is {type(guide).__name__}")
        if law not in LAWS:
            raise ValueError(f"law must be one of {', '.join(LAWS)}, but is {law!r}")
        check_count(num_steps, "num_steps", least=1)
        self.guide = guide
        self._law = law
        self._num_steps = num_steps
        self._pools: dict[str, _Pool] = {}

    @torch.no_grad()
    def prepare(self, focus: Focus) -> None:
        """Read the guide's law of the site."""
        site = focus.site
        args, kwargs = focus.chain.joint.arguments
        logits = _site_logits(self.guide.logits(site.name, *args, **kwargs), site)
        support = find_support(logits > -torch.inf, warn=False)
        size = int(component_sizes(support).max())
        law = _choose(self._law, size, bool((logits > -torch.inf).all()), site.name)
        made: ProposalLaw
        if law == "hard":
            made = MatchingLaw(logits)
        elif law == "relaxed":
            made = RelaxedLaw(logits)
        elif law == "gibbs":
            made = GibbsLaw(logits)
        else:
            made = SequentialLaw(centred(logits))
        self._pools[site.name] = _Pool(made)

    @torch.no_grad()
    def move(self, focus: Focus) -> tuple[int, int]:
        """Propose ``num_steps`` permutations for every item, all scored in one run of the model."""
        pool = self._pools[focus.site.name]
        replicas, items, n = focus.index.shape
        index, weight = pool.take(self._num_steps * replicas)
        index = index.reshape(self._num_steps, replicas, items, n)
        weight = weight.reshape(self._num_steps, replicas, items)
        if focus.independent or items == 1:
            return weight.numel(), self._accept(focus, pool.law, index, weight, slice(None))
        accepted = 0
        for item in range(items):  # of those that depend, all but one stay as they are
            candidates = focus.index.repeat(self._num_steps, 1, 1, 1)
            candidates[:, :, item] = index[:, :, item]
            accepted += self._accept(focus, pool.law, candidates, weight[..., item, None], slice(item, item + 1))
        return weight.numel(), accepted

    def _accept(self, focus: Focus, law: ProposalLaw, candidates: Tensor, weight: Tensor, part: slice) -> int:
        """Accept or refuse candidates one after the other; ``part`` are the items that change."""
        scores, terms = focus.evaluate(candidates)
        score, now = focus.score, focus.index
        present = law.weigh(now)[:, part]
        chosen = torch.zeros(score.shape, dtype=torch.long, device=score.device)
        moved = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
        accepted = 0
        for k in range(len(candidates)):
            if law.renews and k:
                present = law.weigh(now)[:, part]
            ratio = scores[k] - score + present - weight[k]
            taken = torch.rand_like(ratio).log() < ratio
            accepted += int(taken.sum())
            chosen[taken] = k
            moved |= taken
            score = torch.where(taken, scores[k], score)
            present = torch.where(taken, weight[k], present)
            now = torch.where(taken[..., None], candidates[k], now)
        focus.accept(chosen, candidates, terms, moved)
        return accepted


def _choose(law: Law, size: int, complete: bool, name: str) -> Law:
    """The law to use for components of ``size`` rows, where nothing is forbidden if ``complete``.

    Raises:
        ValueError: the law that was asked for cannot be had.
    """
    if law == "auto":
        return "hard" if size <= EXACT_ROWS else "gibbs" if size <= EXACT_LIMIT else "sequential"
    if law == "hard" and size > EXACT_ROWS:
        raise ValueError(
            f"law='hard' needs probabilities of M(X + eps), which are exact up to {EXACT_ROWS} rows in a component, but "
            f"site '{name}' has one of {size}; write law='auto', 'gibbs', 'sequential' or 'relaxed'"
        )
    if law == "gibbs" and size > EXACT_LIMIT:
        raise ValueError(
            f"law='gibbs' is drawn exactly up to {EXACT_LIMIT} rows in a component, but site '{name}' has one of {size}; "
            "write law='sequential'"
        )
    if law == "relaxed" and not complete:
        raise ValueError(
            f"law='relaxed' needs all permutations to be equally probable under M(eps), but site '{name}' has forbidden "
            "pairs; write law='gibbs' or law='sequential'"
        )
    return law


class _Pool:
    """Draws of a law in store."""

    def __init__(self, law: ProposalLaw) -> None:
        self.law = law
        self._next = 0
        self._index = self._weight = torch.empty(0)

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws that were not taken yet, (count, items, n), and their log-probabilities (count, items)."""
        if self._next + count > len(self._index):
            self._index, self._weight = self.law.draw(max(count, _POOL))
            self._next = 0
        part = slice(self._next, self._next + count)
        self._next += count
        return self._index[part], self._weight[part]


def _site_logits(logits: Any, site: PermutationSite) -> Tensor:
    """The guide's logits of a site, float64 (items, n, n), ``-inf`` where its prior forbids."""
    shape = (*site.item_shape, site.n, site.n)
    if not isinstance(logits, Tensor) or logits.shape != shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"guide.logits('{site.name}') must have shape {shape}, but has {found}")
    check_logits(logits, f"guide.logits('{site.name}')")
    flat = logits.detach().to(torch.float64).reshape(site.num_items, site.n, site.n)
    if site.allowed is not None:
        flat = flat.masked_fill(~site.allowed, -torch.inf)
    lost = flat == -torch.inf if site.allowed is None else (flat == -torch.inf) & site.allowed
    if bool(lost.any()):
        item, row, column = lost.nonzero()[0].tolist()
        raise ValueError(
            f"the guide forbids row {row}, column {column} of item {item} of site '{site.name}', which the model allows; "
            "fit it to the same model, AutoGumbelSinkhorn(model)"
        )
    return flat

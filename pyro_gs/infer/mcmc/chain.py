"""The state of one or several chains over permutations, with what scoring candidates has found so far.

A *unit* is what accepts or rejects a candidate on its own: every item of a site whose items are independent given the
rest, else the site as a whole. Several replicas, as in parallel tempering, are units of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from pyro_gs.infer.log_joint import LogJoint, PermutationSite, PotentialJoint, Terms
from pyro_gs.infer.mcmc.verification import Verification, items_coupled, near, refuse_zero

_CHUNK = 2**21
"""Numbers of the candidates' matrices that are scored in one run of the model, at most."""


class Chain:
    """Permutations of one or several replicas and the values of all other latent sites.

    Args:
        joint: the log joint density.
        index: permutations by site, long (replicas, items, n).
        others: values of the other latent sites in their constrained spaces, the same for all replicas.
        power: of the likelihood, float64 (replicas,), at least 0; by default one. At power 0 the target is the prior, also
            where the likelihood is zero.

    Attributes:
        tempered: whether a power is not one.
        positive: whether no change to a permutation of likelihood zero was seen by a hook while tempered.
    """

    def __init__(
        self,
        joint: LogJoint | PotentialJoint,
        index: dict[str, Tensor],
        others: Mapping[str, Tensor] | None = None,
        power: Tensor | None = None,
    ) -> None:
        self.joint = joint
        self.index = index
        self.others: Mapping[str, Tensor] = others or {}
        first = next(iter(index.values()))
        self.replicas = first.shape[0]
        self._focus: dict[str, Focus] = {}
        self._latest: str | None = None
        self.power = torch.ones(self.replicas, dtype=torch.float64, device=first.device) if power is None else power
        self._dependent: set[str] = set()
        self._begun: set[str] = set()
        self._verification = Verification()
        self.positive = True

    def values(self, replica: int = 0) -> dict[str, Tensor]:
        """Matrices of one replica by site."""
        return {name: site.to_value(self.index[name][replica]) for name, site in self.joint.sites.items()}

    def set(self, index: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        """Put other values in place; forgets all scores."""
        self.index = dict(index)
        self.others = others
        self._focus.clear()
        self._latest = None

    def focus(self, name: str) -> Focus:
        """The site ``name`` with the scores of its units at the present state."""
        if self._latest != name:
            self._focus = {name: Focus(self, self.joint.sites[name], name not in self._dependent)}
            self._latest = name
            if self._begun:
                refuse_zero(self._focus[name])
        return self._focus[name]

    def begin(self, names: Iterable[str]) -> None:
        """Get ready to move sites: find out where items depend on each other; density zero is an error from now on."""
        for name in names:
            if name not in self._begun and name not in self._dependent and items_coupled(self, name):
                self.depend(name)
            self._begun.add(name)

    def count_exchanges(self) -> None:
        """Take note that units took exchanges scored by a hook."""
        self._verification.exchanges += 1

    def verify(self) -> None:
        """Now and then, compare the scores of the present state with a run of the model on it alone.

        Raises:
            ValueError: they disagree.
        """
        if self._latest is not None and self._verification.due:
            self._verification.check(self._focus[self._latest])

    @property
    def power(self) -> Tensor:
        """Power of the likelihood, float64 (replicas,)."""
        return self._power

    @power.setter
    def power(self, power: Tensor) -> None:
        self._power = power
        self.tempered = bool((power != 1).any())
        self._focus.clear()
        self._latest = None

    def reorder(self, source: Tensor) -> None:
        """Let replicas trade states.

        Args:
            source: the replica whose state each takes, long (replicas, 1), a permutation; or (replicas, items), for every
                item on its own, where the only site has independent items.
        """
        for name, index in self.index.items():
            self.index[name] = index.gather(0, source[..., None].expand(index.shape))
        if self._latest is not None:
            self._focus[self._latest].reorder(source)

    def depend(self, name: str) -> None:
        """Take the items of a site as dependent from now on, because a term outside of their plates changed with them."""
        self._dependent.add(name)
        self._latest = None

    def total(self) -> Tensor:
        """Log prior and log likelihood of every replica, float64 (2, replicas)."""
        return self.current().terms.total

    def current(self) -> Focus:
        """The site that was moved last."""
        return self.focus(self._latest or next(iter(self.joint.sites)))

    def _batches(self, name: str, candidates: Tensor) -> Iterator[dict[str, Tensor]]:
        """Values to run the model with: candidates for a site (K, replicas, items, n), the other sites as they are."""
        k, replicas = candidates.shape[:2]
        flat = candidates.flatten(0, 1)
        fixed = {}
        for key in self.joint.sites:
            if key != name:
                now = self.index[key]
                fixed[key] = now[0] if replicas == 1 else now.repeat(k, 1, 1)
        width = sum(s.num_items * s.n**2 for s in self.joint.sites.values())
        step = max(1, _CHUNK // max(1, width))
        for start in range(0, len(flat), step):
            rows = slice(start, start + step)
            values = {key: self.joint.sites[key].to_value(v if replicas == 1 else v[rows]) for key, v in fixed.items()}
            values[name] = self.joint.sites[name].to_value(flat[rows])
            yield values

    def score(self, name: str, candidates: Tensor) -> Terms:
        """Terms of candidates for a site (K, replicas, items, n), the other sites as they are: leading (2, K, replicas)."""
        k, replicas = candidates.shape[:2]
        with torch.no_grad():
            parts = [
                self.joint.evaluate(values, self.others, len(values[name]), name)
                for values in self._batches(name, candidates)
            ]
        self._verification.runs += len(parts)
        terms = parts[0] if len(parts) == 1 else Terms.concatenate(parts)
        return Terms(terms.inside.reshape(2, k, replicas, -1), terms.outside.reshape(2, k, replicas))

    def gradient(self, name: str, index: Tensor) -> Tensor:
        """Gradient of the log density of every replica in the matrices of a site at (replicas, items, n).

        Returns:
            The gradient, float64 (replicas, items, n, n); its value for forbidden pairs means nothing.

        Raises:
            ValueError: no gradient, or one that is not finite; names the site.
        """
        site = self.joint.sites[name]
        parts = []
        done = 0
        for values in self._batches(name, index[None]):
            value = values[name].requires_grad_()
            power = self.power[done : done + len(value)]
            done += len(value)
            with torch.enable_grad():
                prior, likelihood = self.joint.evaluate(values, self.others, len(value), name).total
                log_p = (prior + power * likelihood).sum()
            found = torch.autograd.grad(log_p, value, allow_unused=True)[0] if log_p.requires_grad else None
            if found is None:
                raise ValueError(
                    f"the log joint density has no gradient in the matrices of site '{name}', as where the model "
                    "takes their argmax; write score='exact'"
                )
            parts.append(found)
        gradient = torch.cat(parts).reshape(*index.shape, site.n).to(torch.float64)
        known = gradient if site.allowed is None else gradient[site.allowed.expand_as(gradient)]
        if not bool(known.isfinite().all()):
            raise ValueError(
                f"the gradient of the log joint density in site '{name}' has NaN or infinite entries at a permutation; "
                "write score='exact'"
            )
        return gradient


class Focus:
    """One site of a chain and the scores of its units.

    Attributes:
        site: the site.
        independent: whether the items are units of their own.
        terms: of the present state: inside (2, replicas, items), outside (2, replicas).
    """

    def __init__(self, chain: Chain, site: PermutationSite, independent: bool) -> None:
        self.chain = chain
        self.site = site
        self.independent = independent and site.separable
        terms = chain.score(site.name, chain.index[site.name][None])
        self.terms = Terms(terms.inside[:, 0], terms.outside[:, 0])
        self._split = (self.index, self.index.unbind(0))

    @property
    def index(self) -> Tensor:
        """Permutations, long (replicas, items, n)."""
        return self.chain.index[self.site.name]

    def index_of(self, replica: int) -> Tensor:
        """Permutations of one replica, (items, n); the same tensor as long as they are the same."""
        if self._split[0] is not self.index:
            self._split = (self.index, self.index.unbind(0))
        return self._split[1][replica]

    @property
    def unit_shape(self) -> torch.Size:
        """(replicas, items) where the items are units of their own, else (replicas, 1)."""
        return torch.Size((self.chain.replicas, self.site.num_items if self.independent else 1))

    @property
    def items_per_unit(self) -> int:
        """Number of items that a unit moves in turn: one, or all of those that depend on each other."""
        return 1 if self.independent else self.site.num_items

    @property
    def default_cycles(self) -> int:
        """Proposals of cycles in a step unless told otherwise: one an item where pairs are forbidden."""
        return self.items_per_unit if self.site.allowed is not None else 0

    def draw_items(self) -> Tensor:
        """An item to move for every unit, long of ``unit_shape``: its own, or one of all, drawn uniformly."""
        if self.independent:
            return torch.arange(self.site.num_items, device=self.site.device).expand(self.unit_shape)
        return torch.randint(self.site.num_items, self.unit_shape, device=self.site.device)

    def _units(self, terms: Terms) -> Tensor:
        """Scores of the units, (..., *unit_shape)."""
        both = terms.inside if self.independent else terms.total[..., None]
        return both[0] + self.temper(both[1])

    def temper(self, likelihood: Tensor) -> Tensor:
        """Log likelihoods of units (..., *unit_shape) times the powers of their replicas; zero at power zero."""
        if not self.chain.tempered:
            return likelihood
        power = self.chain.power[:, None]
        return torch.where(power > 0, power * likelihood, 0.0)

    @property
    def likelihood(self) -> Tensor:
        """Log likelihood of every unit up to what does not change with it, float64 of ``unit_shape``."""
        return self.terms.inside[1] if self.independent else self.terms.total[1, :, None]

    def reorder(self, source: Tensor) -> None:
        """As :meth:`Chain.reorder`, for the scores."""
        inside = self.terms.inside.gather(1, source.expand(2, *self.terms.inside.shape[1:]))
        outside = self.terms.outside[:, source[:, 0]] if source.shape[1] == 1 else self.terms.outside
        self.terms = Terms(inside, outside)

    @property
    def score(self) -> Tensor:
        """Log density of every unit up to what does not change with it, float64 of ``unit_shape``."""
        return self._units(self.terms)

    def evaluate(self, candidates: Tensor) -> tuple[Tensor, Terms]:
        """Score candidates (K, replicas, items, n): scores (K, *unit_shape), and the terms to accept them with.

        Raises:
            ItemsDepend: the items were taken as independent and are not; the chain knows better from now on.
        """
        terms = self.chain.score(self.site.name, candidates)
        if self.independent:
            if not bool(near(terms.outside, self.terms.outside[:, None], 1e-9).all()):
                self.chain.depend(self.site.name)
                raise ItemsDepend
        return self._units(terms), terms

    def exchange(self, replicas: Tensor, items: Tensor, rows: Tensor, change: Tensor) -> None:
        """Let items exchange the columns of two rows.

        Args:
            replicas: long (K,).
            items: long (K,), each at most once in a replica.
            rows: long (K, 2).
            change: of the log joint density, float64 (K,); counts as likelihood.
        """
        new = self.index.clone()
        replica, item = replicas[:, None], items[:, None]
        new[replica, item, rows] = self.index[replica, item, rows.flip(-1)]
        self.chain.index[self.site.name] = new
        self.chain.count_exchanges()
        if self.independent:
            self.terms.inside[1, replicas, items] += change
        else:
            self.terms.outside[1, replicas] += change

    def accept(self, chosen: Tensor, candidates: Tensor, terms: Terms, units: Tensor) -> None:
        """Let units take a candidate each.

        Args:
            chosen: which of the K candidates, long of ``unit_shape``.
            candidates: (K, replicas, items, n).
            terms: of the candidates.
            units: which take it, bool of ``unit_shape``.
        """
        replicas, items, n = candidates.shape[1:]
        which = chosen.expand(replicas, items)
        take = units.expand(replicas, items)
        new = candidates.gather(0, which[None, ..., None].expand(1, replicas, items, n))[0]
        self.chain.index[self.site.name] = torch.where(take[..., None], new, self.index)
        inside, outside = self.terms.inside, self.terms.outside
        if self.independent:
            picked = terms.inside.gather(1, which[None, None].expand(2, 1, replicas, items))[:, 0]
            inside = torch.where(take, picked, inside)
        else:
            rows = chosen[:, 0]
            where = rows[None, None, :, None].expand(2, 1, replicas, terms.inside.shape[-1])
            inside = torch.where(units, terms.inside.gather(1, where)[:, 0], inside)
            outside = torch.where(
                units[:, 0], terms.outside.gather(1, rows[None, None].expand(2, 1, replicas))[:, 0], outside
            )
        self.terms = Terms(inside, outside)


class ItemsDepend(Exception):
    """Items of a site turned out to depend on each other given the rest."""

"""What kernels find out about a model that is not as they take it to be: coupled items, scores that depend on company."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_gs.infer.log_joint import PermutationSite
from pyro_gs.ops.matching import matching, to_index

if TYPE_CHECKING:
    from pyro_gs.infer.mcmc.chain import Chain, Focus

_RUNS = 128
"""Runs of the model between two in which the present state is scored alone: less than 1 % more of them."""

_EXCHANGES = 256
"""Exchanges scored by a hook before the first such run; then four times as many, and so on."""

_VALUES = 2
"""Values that an item takes when its influence on others is looked at."""

_CAUSES = (
    "Either the model does not broadcast over candidate permutations (write vectorize=False), or items of its plate depend "
    "on each other (sample them as one event, law.expand([items]).to_event(1), outside of the plate), or swap_delta is "
    "wrong for some exchange, or the density is random"
)


def near(a: Tensor, b: Tensor, relative: float, absolute: float | None = None) -> Tensor:
    """Where two tensors agree; ``-inf`` agrees with itself. ``absolute`` is ``relative`` by default."""
    return torch.isclose(a, b, rtol=relative, atol=relative if absolute is None else absolute) | (a == b)


def items_coupled(chain: Chain, name: str) -> bool:
    """Whether terms of items that stay, or terms outside of the plates, change where other items of a site do.

    Items change all at once and in groups, those with a one at some place of their binary number and those with a zero, so
    that every item changes once without every other: ``1 + 2 log2(items)`` candidates for each of :data:`_VALUES` values.
    """
    site = chain.joint.sites[name]
    if not site.separable or site.num_items < 2:
        return False
    now = chain.index[name][0]
    numbers = torch.arange(site.num_items, device=site.device)
    groups = [torch.ones_like(numbers, dtype=torch.bool)]
    groups += [(numbers >> bit) % 2 == one for bit in range((site.num_items - 1).bit_length()) for one in (0, 1)]
    pairs = [(change, torch.where(change[:, None], value, now)) for value in _others(site, now) for change in groups]
    if not pairs:
        return False
    terms = chain.score(name, torch.stack([now, *(candidate for _, candidate in pairs)])[:, None])
    changes = torch.stack([change for change, _ in pairs])
    slack = 1e-9 if site.dtype == torch.float64 else 1e-5  # rounding may depend on the number of candidates
    inside = changes | near(terms.inside[:, 1:, 0], terms.inside[:, :1, 0], slack)
    return not bool(inside.all() and near(terms.outside, terms.outside[:, :1], slack).all())


def _others(site: PermutationSite, now: Tensor) -> list[Tensor]:
    """Permutations (items, n) that share few pairs with those at hand and with each other."""
    if site.allowed is None:
        return [(now + shift) % site.n for shift in range(1, min(_VALUES + 1, site.n))]
    found = [now]
    for _ in range(_VALUES):
        seen = torch.zeros_like(site.allowed, dtype=torch.float64)
        for index in found:
            seen.scatter_add_(-1, index[..., None], torch.ones_like(seen[..., :1]))
        found.append(to_index(matching((-seen).masked_fill(~site.allowed, -torch.inf))))
    return found[1:]


def refuse_zero(focus: Focus) -> None:
    """Raise where the present state has density zero; at power zero its likelihood may be.

    Raises:
        ValueError: names the site.
    """
    prior, likelihood = focus.terms.total
    score = prior + torch.where(focus.chain.power > 0, likelihood, 0.0)
    if not bool((score > -torch.inf).all()):
        raise ValueError(f"the permutations that site '{focus.site.name}' has been moved to have density zero. {_CAUSES}")


class Verification:
    """When to score the present state alone, and what to make of it.

    Attributes:
        runs: runs of the model since the last time.
        exchanges: moves scored by a hook since the last time.
    """

    def __init__(self) -> None:
        self.runs = self.exchanges = 0
        self._exchanges_due = _EXCHANGES
        self._count = 0

    @property
    def due(self) -> bool:
        """Whether it is time."""
        return self.runs >= _RUNS or self.exchanges >= self._exchanges_due

    def check(self, focus: Focus) -> None:
        """Compare the scores of one replica, each in its turn, with those of a run of the model on it alone.

        What a hook has added up gives way to that run's scores, so that rounding errors do not.

        Raises:
            ValueError: they disagree.
        """
        chain = focus.chain
        replica = self._count % chain.replicas
        with torch.no_grad():
            alone = chain.joint.evaluate(chain.values(replica), chain.others, None, focus.site.name)
        found, known = alone.total[:, 0].sum(), focus.terms.total[:, replica].sum()
        size = sum(float(part[part.isfinite()].abs().sum()) for part in (alone.inside, alone.outside))
        slack = 1e-3 * math.sqrt(1 + self.exchanges) + 1e-5 * size
        good = bool(near(known, found, 0.0, slack))
        if focus.independent:
            units = focus.terms.inside[:, replica].sum(0)
            good = good and bool(near(units, alone.inside[:, 0].sum(0), 0.0, slack).all())
        if not good:
            raise ValueError(
                f"the log joint density at the permutations that site '{focus.site.name}' has been moved to is "
                f"{float(found):.6g} in a run of the model on them alone, but {float(known):.6g} by the scores that led "
                f"there. {_CAUSES}"
            )
        if self.exchanges:
            focus.terms.inside[:, replica] = alone.inside[:, 0]
            focus.terms.outside[:, replica] = alone.outside[:, 0]
            self._exchanges_due = 4 * self._exchanges_due
        self.runs = self.exchanges = 0
        self._count += 1

"""Exchanges of two rows' columns: which there are, and the hook by which a model scores them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pyro_gs.infer.mcmc.chain import Focus


@dataclasses.dataclass(frozen=True)
class Swaps:
    """Exchanges that a ``swap_delta`` hook is asked to score, each on its own from the same state.

    Attributes:
        site: name of the permutation site.
        index: its present permutations, long (items, n): row i of item k is matched to column ``index[k, i]``. The same
            tensor as long as the state is the same, so a hook may remember what it has computed for it.
        items: item of each exchange, long (K,).
        rows: the two rows that exchange their columns, long (K, 2).
        others: values of all other latent sites: matrices of permutations, constrained values of the rest.

    Example:
        >>> import pyro, pyro_gs as pgs, torch
        >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.factor("f", (logits * P).sum((-2, -1)))
        >>> def swap_delta(swaps):
        ...     a, b = swaps.rows.unbind(-1)
        ...     of_a, of_b = (swaps.index[swaps.items, rows] for rows in (a, b))
        ...     return logits[a, of_b] + logits[b, of_a] - logits[a, of_a] - logits[b, of_b]
        >>> model.swap_delta = swap_delta
        >>> from pyro.infer import MCMC
        >>> mcmc = MCMC(pgs.SwapMetropolis(model), num_samples=200, disable_progbar=True)
        >>> mcmc.run()
        >>> mcmc.get_samples()["P"].shape
        torch.Size([200, 3, 3])
    """

    site: str
    index: Tensor
    items: Tensor
    rows: Tensor
    others: Mapping[str, Tensor]


SwapDelta = Callable[[Swaps], Tensor]
"""Maps :class:`Swaps` to the change of the log joint density by each exchange, (K,)."""


def possible_pairs(allowed: Tensor | None, num_items: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of rows that can ever exchange their columns: those that share two allowed columns.

    The list does not depend on the permutation, so a uniform draw from it is a symmetric proposal.

    Returns:
        Pairs by item, long (items, longest, 2), padded by pairs of row 0 with itself; their number, long (items,).
    """
    if allowed is None:
        pairs = torch.triu_indices(n, n, 1, device=device).T.contiguous()
        return pairs.expand(num_items, *pairs.shape), torch.full((num_items,), len(pairs), device=device)
    weight = allowed.to(torch.float64)
    shared = (weight @ weight.mT > 1.5).triu(1)
    lists = [item.nonzero() for item in shared]
    longest = max(1, *(len(item) for item in lists))
    out = torch.zeros(num_items, longest, 2, dtype=torch.long, device=device)
    for k, item in enumerate(lists):
        out[k, : len(item)] = item
    return out, torch.tensor([len(item) for item in lists], device=device)


_CHECKED, _LISTED = 16, 200
"""Exchanges at which a hook is compared with the model, and how many of an item are looked at for them."""


def exchange(index: Tensor, rows: Tensor) -> Tensor:
    """Permutations (..., n) after the rows (..., 2) exchanged their columns."""
    return index.scatter(-1, rows, index.gather(-1, rows.flip(-1)))


def check_swap_delta(hook: SwapDelta, focus: Focus) -> None:
    """Compare a hook with the model at a few exchanges of the present state.

    Raises:
        ValueError: they disagree, or the hook returns another shape or NaN.
        ItemsDepend: passed on from ``Focus.evaluate``.
    """
    site = focus.site
    pairs, counts = possible_pairs(site.allowed, site.num_items, site.n, site.device)
    found = []
    share = max(1, _CHECKED // site.num_items)
    for item in range(min(site.num_items, _CHECKED)):
        now, listed = focus.index[0, item], pairs[item, : int(counts[item])]
        free = listed[:: max(1, len(listed) // _LISTED)]
        good = [rows for rows in free if site.allowed is None or bool(site.allowed[item][rows, now[rows.flip(-1)]].all())]
        found += [(item, rows) for rows in good[:: max(1, len(good) // share)][:share]]
    if not found:
        return
    items = torch.tensor([item for item, _ in found], device=site.device)
    rows = torch.stack([pair for _, pair in found])
    candidates = focus.index[:1].expand(len(found), 1, *focus.index.shape[1:]).clone()
    for k, (item, pair) in enumerate(found):
        candidates[k, 0, item] = exchange(candidates[k, 0, item], pair)
    _, terms = focus.evaluate(candidates)
    expected = terms.total.sum(0)[:, 0] - focus.terms.total.sum(0)[0]
    change = score_swaps(hook, focus, items, rows)
    # The model may compute in single precision; what a hook gets wrong is a term, not a rounding.
    slack = 1e-3 + 1e-4 * expected.abs() + 1e-6 * focus.terms.total.sum(0)[0].abs()
    bad = ~(((change - expected).abs() <= slack) | (change == expected))  # the latter where both are -inf
    if bool(bad.any()):
        k = int(bad.nonzero()[0])
        raise ValueError(
            f"swap_delta gives {float(change[k]):.6g} for the exchange of rows {rows[k].tolist()} in item {int(items[k])} "
            f"of site '{site.name}', but the log joint density of the model changes by {float(expected[k]):.6g}"
        )


def score_swaps(
    hook: SwapDelta, focus: Focus, items: Tensor, rows: Tensor, index: Tensor | None = None, replica: int = 0
) -> Tensor:
    """Changes of the log joint density by the hook, float64 (K,), from a replica's permutations or from ``index``.

    Raises:
        ValueError: another shape, or NaN or +inf.
    """
    others = dict(focus.chain.others)
    for name, site in focus.chain.joint.sites.items():
        if name != focus.site.name:
            others[name] = site.to_value(focus.chain.index[name][replica])
    change = hook(Swaps(focus.site.name, focus.index_of(replica) if index is None else index, items, rows, others))
    if not isinstance(change, Tensor) or change.shape != items.shape:
        found = tuple(change.shape) if isinstance(change, Tensor) else type(change).__name__
        raise ValueError(f"swap_delta must return a tensor of shape {tuple(items.shape)}, but returned {found}")
    total = float(change.sum())
    if math.isnan(total) or total == math.inf:
        raise ValueError(
            f"swap_delta returned NaN or +inf at site '{focus.site.name}'; it must return numbers or -inf; "
            "where densities may be zero write torch.where(new == -torch.inf, new, new - old)"
        )
    return change.to(torch.float64)

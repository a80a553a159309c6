"""What a posterior says about its permutations, the same for samples of any inference and for exact posteriors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_gs.calibration import Reliability, check_permutation, reliability
from pyro_gs.ops.matching import matching, to_index, to_matrix
from pyro_gs.samples import Samples, WeightedPermutations, by_chain, columns, is_hard, permutation_sites

_LISTED_ITEMS = 20
_LISTED_N = 12
_COLUMNS = ("", "n", "distinct", "p(map)", "confidence", "least", "entropy", "acc(map)", "acc(matching)", "map")


@dataclass(frozen=True, eq=False)
class SiteSummary:
    """What a posterior says about one permutation site of shape (..., n, n); ``site[j]`` is that of a batch item.

    Attributes:
        marginals: shape (..., n, n), probability that row i is matched to column j; of relaxed samples their mean.
        map: shape (..., n, n), the most probable permutation of each batch item: of samples the most frequent one, among
            equally frequent ones that of the largest product of marginals. Items are taken one by one, so the parts need
            not be the joint mode of several items or sites. With ``map_probability`` near one over the number of draws
            no permutation came often enough for a mode; then use ``matching``.
        map_probability: shape (...), its probability, of samples its frequency.
        matching: shape (..., n, n), permutation of the largest product of marginals.
        confidence: shape (..., n), largest marginal of a row; the table shows its mean and its least.
        entropy: shape (..., n), entropy of a row's marginals, in nats, 0 to log n.
        distinct: shape (...), long, number of distinct permutations with positive probability.
        relaxed: whether the samples were not permutations; then ``map`` and ``distinct`` speak of the matchings of the
            samples.
        truth: shape (..., n, n), if given.
        accuracy: shape (...), with a truth: share of rows that ``map`` has right.
        matching_accuracy: the same of ``matching``.
        reliability: with a truth: the curve of ``confidence`` over all rows and items.
    """

    marginals: Tensor
    map: Tensor
    map_probability: Tensor
    matching: Tensor
    confidence: Tensor
    entropy: Tensor
    distinct: Tensor
    relaxed: bool
    truth: Tensor | None = None
    accuracy: Tensor | None = None
    matching_accuracy: Tensor | None = None
    reliability: Reliability | None = None

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error of ``confidence``, with a truth."""
        return None if self.reliability is None else self.reliability.calibration_error

    def __getitem__(self, index: int | tuple[int, ...]) -> SiteSummary:
        """The summary of a batch item.

        Raises:
            IndexError: there is no such item.
        """
        batch = self.distinct.shape
        if len(index if isinstance(index, tuple) else (index,)) > len(batch):
            raise IndexError(f"index {index} has more dimensions than the batch shape {tuple(batch)}")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        items: dict[str, Any] = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        part = replace(self, **items)
        return part if part.truth is None else _judge(part, part.truth)

    def _lines(self, name: str) -> Iterator[dict[str, str]]:
        """Cells of the table by column, a line a batch item."""
        index = to_index(self.map)
        n = self.marginals.shape[-1]
        for item in itertools.islice(itertools.product(*map(range, self.distinct.shape)), _LISTED_ITEMS):
            cells = {
                "": name + (f"[{','.join(map(str, item))}]" if item else ""),
                "n": str(n),
                "distinct": str(int(self.distinct[item])),
                "p(map)": f"{float(self.map_probability[item]):.3f}",
                "confidence": f"{float(self.confidence[item].mean()):.3f}",
                "least": f"{float(self.confidence[item].min()):.3f}",
                "entropy": f"{float(self.entropy[item].mean()):.3f}",
            }
            if self.accuracy is not None and self.matching_accuracy is not None:
                cells["acc(map)"] = f"{float(self.accuracy[item]):.3f}"
                cells["acc(matching)"] = f"{float(self.matching_accuracy[item]):.3f}"
            if n <= _LISTED_N:
                cells["map"] = " ".join(map(str, index[item].tolist()))
            yield cells


@dataclass(frozen=True, eq=False)
class Summary(Mapping[str, SiteSummary]):
    """Summaries by permutation site; printing shows a table with a line a batch item.

    Attributes:
        sites: by name.
        others: names of the sites that hold no permutations and are left to ``mcmc.summary()``.
        source: what was summarized.
    """

    sites: Mapping[str, SiteSummary]
    others: tuple[str, ...]
    source: str

    def __getitem__(self, name: str) -> SiteSummary:
        return self.sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        rows = [line for name, site in self.sites.items() for line in site._lines(name)]
        head = [column for column in _COLUMNS if any(column in row for row in rows)]
        table = [head, *([row.get(column, "") for column in head] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        notes = [self.source]
        for name, site in self.sites.items():
            hidden = site.distinct.numel() - _LISTED_ITEMS
            notes += [f"{name}: {hidden} more batch items"] if hidden > 0 else []
            notes += [f"{name}: relaxed samples, each counted as its matching"] if site.relaxed else []
            error = site.calibration_error
            notes += [] if error is None else [f"{name}: expected calibration error {error:.3f}"]
        notes += [f"not permutations: {', '.join(self.others)}"] if self.others else []
        return "\n".join([*lines, *notes])


def summary(
    samples: AbstractMCMC | Samples | WeightedPermutations,
    *,
    group_by_chain: bool = False,
    sites: Iterable[str] | None = None,
    truth: Tensor | Mapping[str, Tensor] | None = None,
) -> Summary:
    """Marginals, MAP, confidence and entropies of latent permutations, for every inference alike.

    Sites are found by their values: permutation matrices, or doubly stochastic ones of a relaxed model. Of relaxed
    samples the marginals are the mean, which need not be near those of the hard posterior; take hard draws for that,
    ``guide.hard_sample((1000,))``. Other sites are listed by name only.

    Args:
        samples: a Pyro ``MCMC`` after ``run``; a dict of draws by site, each of shape (draws, ..., n, n); or an enumerated
            posterior, an object with ``permutations``, a dict of (K, ..., n, n), and ``log_probs`` (K,).
        group_by_chain: of a dict: draws have the shape (chains, draws, ..., n, n); chains are pooled.
        sites: names to take in place of a search.
        truth: true permutation matrices that broadcast to (..., n, n), by site, or a tensor if there is one site.

    Returns:
        A mapping from site to :class:`SiteSummary`; ``print`` shows it as a table.

    Raises:
        TypeError: ``samples`` is none of these, or a value no real tensor.
        ValueError: no permutation site; a draw that is no permutation among others that are; a NaN or infinity; draws of
            different number; ``log_probs`` that do not sum to one; a ``truth`` that is no permutation or fits no site.

    Example:
        >>> import torch
        >>> draws = to_matrix(torch.tensor([[0, 1, 2], [0, 2, 1], [0, 1, 2], [0, 1, 2]]))
        >>> print(summary({"P": draws}, truth=torch.eye(3)))
           n  distinct  p(map)  confidence  least  entropy  acc(map)  acc(matching)    map
        P  3         2   0.750       0.833  0.750    0.375     1.000          1.000  0 1 2
        4 draws
        P: expected calibration error 0.167
    """
    if isinstance(samples, WeightedPermutations):
        log_probs = _check_log_probs(samples.log_probs)
        values = by_chain({name: value for name, value in samples.permutations.items()})
        for name, value in values.items():
            if value.shape[1] != len(log_probs):
                raise ValueError(
                    f"permutations[{name!r}] has {value.shape[1]} values, but log_probs has shape {tuple(log_probs.shape)}"
                )
        weights: Tensor | None = log_probs.softmax(0)
        source = f"exact posterior over {len(log_probs)} values"
    else:
        values = by_chain(samples, group_by_chain=group_by_chain)
        chains, draws = next(iter(values.values())).shape[:2]
        weights, source = None, f"{chains} chains of {draws} draws" if chains > 1 else f"{draws} draws"
    names = permutation_sites(values, sites)
    truths = _truths(truth, {name: values[name].shape[2:] for name in names})
    out = {}
    for name in names:
        site = _summarize(values[name].flatten(0, 1), weights)
        out[name] = _judge(site, truths[name]) if name in truths else site
    return Summary(out, tuple(name for name in values if name not in out), source)


def _summarize(values: Tensor, weights: Tensor | None) -> SiteSummary:
    """Summary of values (K, ..., n, n) with weights (K,), None for equal ones."""
    if weights is None:
        marginals = values.mean(0)
        weights = values.new_full(values.shape[:1], 1 / len(values), dtype=torch.float64)
    else:
        marginals = torch.tensordot(weights.to(values), values, dims=1)
    index = columns(values)
    log_marginals = marginals.log()
    score = log_marginals.gather(-1, index.movedim(0, -1)).sum(-2)  # (..., K)
    batch = score.shape[:-1]
    items = index.reshape(len(index), -1, index.shape[-1]).movedim(1, 0)
    modes = [_mode(item, weights, own) for item, own in zip(items, score.reshape(-1, len(values)), strict=True)]
    best, probability, distinct = (torch.stack(part).reshape(batch + part[0].shape) for part in zip(*modes, strict=True))
    return SiteSummary(
        marginals=marginals,
        map=to_matrix(best, dtype=values.dtype),
        map_probability=probability.to(values.dtype),
        matching=matching(log_marginals),
        confidence=marginals.amax(-1),
        entropy=torch.special.entr(marginals).sum(-1),
        distinct=distinct,
        relaxed=not is_hard(values),
    )


def _mode(index: Tensor, weights: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of permutations (K, n) with weights and, against ties, scores (K,): the likeliest, its probability, their number."""
    unique, group = torch.unique(index, dim=0, return_inverse=True)
    mass = weights.new_zeros(len(unique)).index_add(0, group, weights)
    tied = mass >= mass.max() * (1 - 1e-6)
    scores = torch.full_like(mass, -torch.inf).index_copy(0, group, score.to(mass))
    best = torch.where(tied, scores, -torch.inf).argmax()
    return unique[best], mass[best], (mass > 0).sum()


def _judge(site: SiteSummary, truth: Tensor) -> SiteSummary:
    """The summary with what a comparison with the truth says."""
    right = to_index(truth)
    hits = [(to_index(answer) == right).to(site.marginals.dtype).mean(-1) for answer in (site.map, site.matching)]
    curve = reliability(site.marginals, truth)
    return replace(site, truth=truth, accuracy=hits[0], matching_accuracy=hits[1], reliability=curve)


def _truths(truth: Tensor | Mapping[str, Tensor] | None, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The truths by site, checked and broadcast."""
    if truth is None:
        return {}
    if not isinstance(truth, Mapping):
        if len(shapes) > 1:
            raise ValueError(
                f"truth must be a dict by site, one or more of {list(shapes)}: truth={{{next(iter(shapes))!r}: ...}}"
            )
        truth = dict.fromkeys(shapes, truth)
    strange = [name for name in truth if name not in shapes]
    if strange:
        raise ValueError(f"truth names the sites {strange}, but the permutation sites are {list(shapes)}")
    return {
        name: to_matrix(check_permutation(value, f"truth of site {name!r}", shapes[name])) for name, value in truth.items()
    }


def _check_log_probs(log_probs: Any) -> Tensor:
    if not isinstance(log_probs, Tensor) or log_probs.dim() != 1 or not log_probs.is_floating_point():
        kind = (
            f"{log_probs.dtype} of shape {tuple(log_probs.shape)}"
            if isinstance(log_probs, Tensor)
            else type(log_probs).__name__
        )
        raise TypeError(f"log_probs must be a floating tensor of shape (K,), but is {kind}")
    total = float(log_probs.detach().double().exp().sum())
    if not abs(total - 1) <= 1e-4:
        raise ValueError(f"log_probs must hold log-probabilities that sum to one, but they sum to {total}")
    return log_probs.detach().double()

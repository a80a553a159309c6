"""Whether chains over permutations converged: R-hat and effective sample sizes of what varies, and export to ArviZ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pyro.infer.mcmc.api import AbstractMCMC
from torch import Tensor

from pyro_gs.ops.logits import warn_user
from pyro_gs.samples import Samples, by_chain, check_log_density, hamming, permutation_sites
from pyro_gs.summary import summary

Array = NDArray[np.float64]

_LEAST_DRAWS = 8  # arviz_stats refuses fewer than four, and chains are split into halves
_TAIL = 0.05


class ConvergenceWarning(UserWarning):
    """R-hat and effective sample size are not defined for something that took a single value in all draws.

    Either the posterior is that sure, or the chains have not moved: chains from several starts tell.

    Example:
        >>> import warnings
        >>> import torch
        >>> import pyro_gs as pgs
        >>> draws = {"P": torch.eye(3).expand(2, 20, 3, 3)}
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", pgs.ConvergenceWarning)
        ...     pgs.convergence(draws, group_by_chain=True)
        Traceback (most recent call last):
            ...
        pyro_gs.infer.mcmc.convergence.ConvergenceWarning: nothing of 'P', 'P_hamming' varies in any draw (2 x 20)...
    """


@dataclass(frozen=True, eq=False)
class _Quantity:
    """Scalars of a site: all values (chains, draws, ...), and which differ in some draw."""

    name: str
    values: Tensor
    dim: str = ""

    @property
    def varies(self) -> Tensor:
        """Bool of the event shape."""
        return (self.values != self.values[:1, :1]).flatten(0, 1).any(0)

    def moving(self) -> tuple[Array, list[str]]:
        """What varies, (chains, draws, E), with labels such as ``'0,2'``."""
        varies = self.varies
        moving = self.values.flatten(2)[..., varies.reshape(-1)] if varies.dim() else self.values[..., None]
        labels = [",".join(map(str, place)) for place in varies.nonzero().tolist()] if varies.dim() else [""]
        if not varies.dim() and not bool(varies):
            moving, labels = moving[..., :0], []
        return moving.double().cpu().numpy(), labels


class PosteriorDict(dict[str, Array]):
    """A chain x draw dictionary of arrays, with what ArviZ needs to name their dimensions.

    Attributes:
        dims: names of the dimensions behind chain and draw, by variable.
        coords: labels of the entries along them.
        constant: by variable a bool array of the shape of a draw, True where all draws of all chains are equal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dims: dict[str, list[str]] = {}
        self.coords: dict[str, list[str]] = {}
        self.constant: dict[str, NDArray[np.bool_]] = {}


def posterior_dict(
    samples: AbstractMCMC | Samples,
    *,
    log_density: Tensor | None = None,
    group_by_chain: bool = False,
    sites: Iterable[str] | None = None,
) -> PosteriorDict:
    """Samples as the dictionary that ArviZ reads, permutations by the scalars of them that mean something.

    A permutation site ``P`` becomes ``P``, shape (chains, draws, E), the entries that vary, labelled ``'i,j'`` (behind the
    batch indices), and ``P_hamming``, the share of rows that differ from the MAP (``summary``), 0 to 1, shape
    (chains, draws) or (chains, draws, items that vary). Entries that never vary, forbidden pairs among them, are left out:
    R-hat would be NaN. Other sites stay as they are. For arviz-base and for arviz before 1.0::

        post = posterior_dict(mcmc)
        data = arviz_base.from_dict({"posterior": post}, dims=post.dims, coords=post.coords)
        data = arviz.from_dict(posterior=post, dims=post.dims, coords=post.coords)

    Args:
        samples: a Pyro ``MCMC`` after ``run``, or a dict of draws by site, each of shape (draws, ...).
        log_density: log density of the draws, in nats, shape (chains, draws), or (draws,) without chains.
        group_by_chain: of a dict: draws have the shape (chains, draws, ...).
        sites: names of the permutation sites, in place of a search by values.

    Returns:
        A dict of float64 arrays with the attributes ``dims``, ``coords`` and ``constant``.

    Raises:
        TypeError: ``samples`` or ``log_density`` is of another kind.
        ValueError: no permutation site, a bad draw, another shape of ``log_density``, a NaN or infinity, or a site that
            has the name of a variable made here.

    Warns:
        ConvergenceWarning: a permutation site or its distance to the MAP never varies, and is left out.

    Example:
        >>> import torch, pyro_gs as pgs
        >>> draws = pgs.to_matrix(torch.tensor([[0, 1, 2], [0, 2, 1], [0, 1, 2]]))
        >>> post = posterior_dict({"P": draws, "mu": torch.zeros(3)})
        >>> {name: x.shape for name, x in post.items()}, post.coords["P_entry"]
        ({'P': (1, 3, 4), 'P_hamming': (1, 3), 'mu': (1, 3)}, ['1,1', '1,2', '2,1', '2,2'])
    """
    out = PosteriorDict()
    for quantity in _quantities(samples, log_density, group_by_chain, sites):
        name, varies = quantity.name, quantity.varies
        out.constant[name] = ~varies.cpu().numpy()
        if not quantity.dim:
            out[name] = quantity.values.double().cpu().numpy()
        elif not varies.dim() and bool(varies):
            out[name] = quantity.moving()[0][..., 0]
        elif bool(varies.any()):
            out[name], out.coords[quantity.dim] = quantity.moving()
            out.dims[name] = [quantity.dim]
    _warn_constant([name for name in out.constant if name not in out], next(iter(out.values())).shape if out else None)
    return out


@dataclass(frozen=True, eq=False)
class Diagnostic:
    """Diagnostics of the scalars of one variable that vary.

    Attributes:
        labels: of the E scalars, ``'i,j'`` behind the batch indices, ``''`` for a variable that is a scalar.
        rhat: shape (E,): rank-normalized split R-hat, infinite where chains (or halves of them) stay at different values.
        ess_bulk: shape (E,): effective sample size of the bulk, in draws.
        ess_tail: shape (E,): the smaller one of the 5 and 95 % quantiles; of a 0/1 entry that of the bulk.
        constant: how many scalars were left out as they never vary.
    """

    labels: tuple[str, ...]
    rhat: Array
    ess_bulk: Array
    ess_tail: Array
    constant: int

    @property
    def defined(self) -> bool:
        """Whether anything varies; otherwise the worst and median values are None."""
        return bool(self.labels)

    @property
    def worst(self) -> str | None:
        """Label of the scalar of the largest R-hat."""
        return self.labels[int(self.rhat.argmax())] if self.defined else None

    @property
    def worst_rhat(self) -> float | None:
        """Largest R-hat."""
        return float(self.rhat.max()) if self.defined else None

    @property
    def median_rhat(self) -> float | None:
        """Median R-hat over scalars."""
        return float(np.median(self.rhat)) if self.defined else None

    @property
    def worst_ess_bulk(self) -> float | None:
        """Smallest effective sample size of the bulk."""
        return float(self.ess_bulk.min()) if self.defined else None

    @property
    def median_ess_bulk(self) -> float | None:
        """Median effective sample size of the bulk over scalars."""
        return float(np.median(self.ess_bulk)) if self.defined else None

    @property
    def worst_ess_tail(self) -> float | None:
        """Smallest effective sample size of the tails."""
        return float(self.ess_tail.min()) if self.defined else None

    @property
    def median_ess_tail(self) -> float | None:
        """Median effective sample size of the tails over scalars."""
        return float(np.median(self.ess_tail)) if self.defined else None


@dataclass(frozen=True, eq=False)
class Convergence(Mapping[str, Diagnostic]):
    """Diagnostics by variable; printing shows a table.

    Attributes:
        diagnostics: by the names that :func:`posterior_dict` gives.
        chains: number of chains.
        draws: of each.
    """

    diagnostics: Mapping[str, Diagnostic] = field(repr=False)
    chains: int
    draws: int

    def __getitem__(self, name: str) -> Diagnostic:
        return self.diagnostics[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.diagnostics)

    def __len__(self) -> int:
        return len(self.diagnostics)

    @property
    def undefined(self) -> tuple[str, ...]:
        """Variables of which nothing varies, so that R-hat is not defined."""
        return tuple(name for name, one in self.items() if not one.defined)

    @property
    def worst_rhat(self) -> float | None:
        """Largest R-hat of all variables; None if nothing varies at all."""
        return max((one.worst_rhat for one in self.values() if one.worst_rhat is not None), default=None)

    def __str__(self) -> str:
        head = ["", "varying", "constant", "r_hat", "median", "ess_bulk", "median", "ess_tail", "median", "worst"]
        rows = [head]
        for name, one in self.items():
            numbers = [f"{x:.3f}" for x in (one.worst_rhat, one.median_rhat) if x is not None]
            sizes = (one.worst_ess_bulk, one.median_ess_bulk, one.worst_ess_tail, one.median_ess_tail)
            numbers += [f"{x:.0f}" for x in sizes if x is not None]
            cells = [name, str(len(one.labels)), str(one.constant), *(numbers or ["-"] * 6)]
            rows.append([*cells, f"[{one.worst}]" if one.worst else ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        chains = "1 chain" if self.chains == 1 else f"{self.chains} chains"
        return "\n".join([*lines, f"{chains} of {self.draws} draws; r_hat and ess: the worst, then the median"])


def convergence(
    samples: AbstractMCMC | Samples,
    *,
    log_density: Tensor | None = None,
    group_by_chain: bool = False,
    sites: Iterable[str] | None = None,
) -> Convergence:
    """R-hat and effective sample sizes of permutations, of their distance to the MAP and of everything else sampled.

    Rank-normalized split R-hat, bulk and tail effective sample sizes (Vehtari, Gelman, Simpson, Carpenter and Buerkner
    2021), by arviz_stats. Values that never vary are left out and counted. An entry that is constant within each chain but
    differs between chains varies, and its R-hat is infinite. Of a single chain the two halves are compared.

    R-hat of entries alone is a weak test: of two chains in modes that share nothing, an entry of probability 1/k in one and
    0 in the other has R-hat near ``sqrt(1 + 2 / (3 (k - 1)))``, 1.15 at k = 3 and 1.04 at k = 10. The distance to the MAP
    and the log density see such modes; give the latter.

    Args:
        samples: a Pyro ``MCMC`` after ``run``, or a dict of draws by site, each of shape (draws, ...).
        log_density: log density of the draws, in nats, shape (chains, draws), or (draws,) without chains.
        group_by_chain: of a dict: draws have the shape (chains, draws, ...).
        sites: names of the permutation sites, in place of a search by values.

    Returns:
        A mapping from variable (as in :func:`posterior_dict`) to :class:`Diagnostic`.

    Raises:
        TypeError: ``samples`` or ``log_density`` is of another kind.
        ValueError: as :func:`posterior_dict`, or fewer than 8 draws a chain.

    Warns:
        ConvergenceWarning: of some variable nothing varies, so R-hat is not defined.

    Example:
        >>> import torch, pyro_gs as pgs
        >>> draws = pgs.to_matrix(torch.argsort(torch.rand(2, 100, 3), -1))
        >>> result = convergence({"P": draws}, group_by_chain=True)
        >>> len(result["P"].labels), result.worst_rhat < 1.2
        (9, True)
    """
    found: dict[str, Diagnostic] = {}
    quantities = _quantities(samples, log_density, group_by_chain, sites)
    chains, draws = quantities[0].values.shape[:2]
    if draws < _LEAST_DRAWS:
        raise ValueError(f"samples must have at least {_LEAST_DRAWS} draws a chain, but have {draws}")
    for quantity in quantities:
        values, labels = quantity.moving()
        hard = bool(((values == 0) | (values == 1)).all())
        bulk = _diagnose("ess", values, method="mean" if hard else "bulk")  # the same of a 0/1 entry
        tail = bulk if hard else _diagnose("ess", values, method="tail", prob=_TAIL)
        rhat = _rhat(_split(values), hard=hard)
        found[quantity.name] = Diagnostic(tuple(labels), rhat, bulk, tail, quantity.varies.numel() - len(labels))
    result = Convergence(found, chains, draws)
    _warn_constant(result.undefined, (chains, draws))
    return result


def _quantities(
    samples: AbstractMCMC | Samples, log_density: Tensor | None, group_by_chain: bool, sites: Iterable[str] | None
) -> list[_Quantity]:
    """Everything to look at: entries and distances of permutation sites, other sites, the log density."""
    values = by_chain(samples, group_by_chain=group_by_chain)
    names = permutation_sites(values, sites)
    lead = next(iter(values.values())).shape[:2]
    out = []
    modes = summary({name: values[name] for name in names}, group_by_chain=True, sites=names)
    for name, value in values.items():
        if name in modes:
            distance = hamming(value, modes[name].map)
            out += [_Quantity(name, value, f"{name}_entry"), _Quantity(f"{name}_hamming", distance, f"{name}_item")]
        else:
            out.append(_Quantity(name, value))
    if log_density is not None:
        out.append(_Quantity("log_density", check_log_density(log_density, lead)))
    made = [one.name for one in out]
    twice = [name for name in made if made.count(name) > 1]
    if twice:
        raise ValueError(f"samples has a site {twice[0]!r}, which is the name of a variable made here; rename the site")
    return out


def _warn_constant(names: Iterable[str], shape: tuple[int, ...] | None) -> None:
    listed = ", ".join(map(repr, names))
    if listed:
        count = f" ({shape[0]} x {shape[1]})" if shape else ""
        warn_user(
            f"nothing of {listed} varies in any draw{count}: R-hat and effective sample size are not defined; either the "
            "posterior is a single permutation or the chains do not move",
            ConvergenceWarning,
        )


def _split(values: Array) -> Array:
    """Halves of chains as chains: (chains, draws, E) to (2 chains, draws // 2, E); an odd draw in the middle is left out."""
    half = values.shape[1] // 2
    return np.concatenate([values[:, :half], values[:, -half:]])


def _normal_scores(values: Array) -> Array:
    """Normal quantiles of the ranks over all chains and draws of each scalar (Vehtari et al. 2021, equation 14)."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    flat = values.reshape(-1, values.shape[-1])
    scores: Array = ndtri((rankdata(flat, axis=0) - 3 / 8) / (len(flat) + 1 / 4))
    return scores.reshape(values.shape)


def _fold(values: Array) -> Array:
    """Distance to the median of each scalar."""
    return np.abs(values - np.median(values, axis=(0, 1)))


def _diagnose(statistic: Literal["rhat", "ess"], values: Array, **options: Any) -> Array:
    """A statistic of each scalar of (chains, draws, E) by arviz_stats, shape (E,).

    R-hat is infinite where each chain is constant, and NaN where all draws are equal.
    """
    if values.shape[-1] == 0:
        return np.empty(0)
    # here, since it takes half a second that `import pyro_gs` would pay
    from arviz_stats.base import array_stats  # type: ignore[attr-defined]

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(getattr(array_stats, statistic)(values, chain_axis=0, draw_axis=1, **options))


def _rhat(halves: Array, *, hard: bool) -> Array:
    """Rank-normalized split R-hat of halves of chains (Vehtari et al. 2021).

    Ranks of a 0/1 entry, and its distances to the median, are affine in it, and R-hat does not change under affine maps.
    """
    if hard:
        return _diagnose("rhat", halves, method="identity")
    scores = (_normal_scores(halves), _normal_scores(_fold(halves)))
    bulk, tail = (_diagnose("rhat", score, method="identity") for score in scores)
    return np.fmax(bulk, tail)  # the folded values may be constant

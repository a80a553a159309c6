"""The log joint density of a model as a function of its permutations, for many candidates in one run of the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_gs.distributions import constraints
from pyro_gs.distributions.uniform_permutation import UniformPermutation
from pyro_gs.infer.handlers import INDEX_OF, is_permutation_law, name_sites, unwrap
from pyro_gs.infer.python_values import PythonValues
from pyro_gs.ops.batching import unexpanded
from pyro_gs.ops.logits import warn_user
from pyro_gs.ops.matching import matching, to_index
from pyro_gs.ops.support import find_support

HOW_TO_BROADCAST = (
    "write it for P of shape (..., n, n) with any dimensions to the left, as for Trace_ELBO(vectorize_particles=True)"
)
"""What messages advise where a model does not."""

_CANDIDATES = "_pyro_gs_candidates"
_TRIALS = 8  # candidates on which broadcasting is tried out


class VectorizationWarning(UserWarning):
    """A model does not broadcast over candidate permutations, so they are scored one after the other.

    It gives other scores for many of them in one run than for each alone, or makes a Python value of what depends on them
    (``if``, ``float``, ``numpy``), which is one for all. The answer is the same, and slower. A kernel's ``vectorize=False``
    says that this is meant. Only :func:`indexed` cannot do without: its sums are wrong.

    Example:
        >>> import warnings
        >>> import pyro
        >>> import pyro_gs as pgs
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.factor("first", P[0, 0])  # of all candidates, P[..., 0, 0]
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", pgs.VectorizationWarning)
        ...     _ = pgs.enumerate_posterior(model)
        Traceback (most recent call last):
            ...
        pyro_gs.infer.log_joint.VectorizationWarning: the model does not broadcast over candidate permutations...
    """


@dataclasses.dataclass(frozen=True)
class PermutationSite:
    """A latent permutation.

    Attributes:
        name: of the site.
        n: number of rows.
        item_shape: shape of a value without its last two dimensions; its product is the number of items.
        event_items: how many dimensions of ``item_shape`` belong to the event, as after ``to_event``.
        allowed: pairs that are not forbidden, bool (items, n, n), or None where all are allowed.
        plates: names of the vectorized plates around the site.
        separable: whether every item lies in a plate of its own, so that items may be independent given the rest.
        dtype: of values.
        device: of values.
    """

    name: str
    n: int
    item_shape: torch.Size
    event_items: int
    allowed: Tensor | None
    plates: frozenset[str]
    separable: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def num_items(self) -> int:
        """Number of permutations that a value holds."""
        return math.prod(self.item_shape)

    def to_value(self, index: Tensor) -> Tensor:
        """Matrices (..., *item_shape, n, n) of index vectors (..., items, n)."""
        out = index.new_zeros((*index.shape, self.n), dtype=self.dtype).scatter_(-1, index[..., None], 1.0)
        return out.reshape(index.shape[:-2] + self.item_shape + (self.n, self.n))

    def to_items(self, value: Tensor) -> Tensor:
        """Index vectors (..., items, n) of matrices (..., *item_shape, n, n).

        Raises:
            ValueError: another shape, no permutation matrices, or a forbidden pair.
        """
        tail = (*self.item_shape, self.n, self.n)
        if not isinstance(value, Tensor) or value.shape[max(0, value.dim() - len(tail)) :] != tail:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the value of site '{self.name}' must have shape (..., {str(tail)[1:-1]}), but has {found}")
        try:
            index = to_index(value)
        except ValueError as error:
            raise ValueError(f"site '{self.name}': {error}") from None
        index = index.reshape(*value.shape[: value.dim() - len(tail)], self.num_items, self.n).to(self.device)
        if self.allowed is not None:
            hit = self.allowed.expand(*index.shape, self.n).gather(-1, index[..., None])[..., 0]
            if not bool(hit.all()):
                *_, item, row = (~hit).nonzero()[0].tolist()
                raise ValueError(
                    f"the value of site '{self.name}' matches row {row} of item {item} to a column that its prior forbids"
                )
        return index


@dataclasses.dataclass(frozen=True)
class Terms:
    """Log densities of K candidates, apart for the prior of the latent sites and the likelihood of the observed ones.

    Attributes:
        inside: terms that belong to one item each, float64 (2, K, items): prior, likelihood.
        outside: all others, float64 (2, K).
    """

    inside: Tensor
    outside: Tensor

    @property
    def total(self) -> Tensor:
        """Log prior and log likelihood, (2, K)."""
        return self.inside.sum(-1) + self.outside

    @staticmethod
    def concatenate(parts: list[Terms]) -> Terms:
        """Join along the candidates."""
        return Terms(torch.cat([part.inside for part in parts], 1), torch.cat([part.outside for part in parts], 1))


class LogJoint:
    """Log joint density of a model at given values of all its latent sites.

    Args:
        model: a Pyro model.
        args: its arguments.
        kwargs: its keyword arguments.
        vectorize: whether the model broadcasts over candidates in a dimension to the left of its plates, as for
            ``Trace_ELBO(vectorize_particles=True)``; None tries it out.
        normalized: whether uniform priors count; without, their log-probabilities, the same for all permutations of the
            support, are left out, which for large masks saves seconds at the start.

    Attributes:
        flat_prior: whether all latent sites are uniform permutations, so that only the likelihood changes with them.

    Raises:
        ValueError: no latent permutation site, a relaxed or indexed one, one of partial matchings, or a subsampled plate.

    Warns:
        VectorizationWarning: ``vectorize`` is None and the model does not broadcast.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        vectorize: bool | None = None,
        normalized: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, but is {type(model).__name__}")
        self._model, self._args, self._kwargs = model, args, dict(kwargs or {})
        self._normalized = normalized
        self._shapes: dict[str, torch.Size] = {}  # of every term of the latest run, candidates first
        self._prototype()
        reason = self.trouble() if vectorize is None else None
        if reason is not None:
            warn_user(
                "the model does not broadcast over candidate permutations, so they are scored one after the other, which is "
                f"slower; {HOW_TO_BROADCAST}, or tell a kernel that this is meant, vectorize=False{reason}",
                VectorizationWarning,
            )
        self.vectorize = reason is None if vectorize is None else vectorize

    def _prototype(self) -> None:
        """Run the model once and read off its sites."""
        with poutine.block(), torch.no_grad():
            trace: Any = poutine.trace(self._model).get_trace(*self._args, **self._kwargs)
        self.sites: dict[str, PermutationSite] = {}
        self.others: dict[str, Any] = {}
        self.start: dict[str, Tensor] = {}
        self.masked: list[str] = []  # permutation sites under poutine.mask
        observed: list[str] = []
        depth = 0
        for name, node in trace.nodes.items():
            if node["type"] != "sample":
                continue
            fn = node["fn"]
            if isinstance(fn, _Subsample):
                if fn.subsample_size is not None and fn.subsample_size < fn.size:
                    raise ValueError(
                        f"plate '{name}' is subsampled ({fn.subsample_size} of {fn.size}), which leaves MCMC and "
                        "enumeration without a posterior; drop subsample_size, or use SVI with AutoGumbelSinkhorn"
                    )
                continue
            frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
            depth = max([depth, len(fn.batch_shape), *(-frame.dim for frame in frames)])
            if node["is_observed"]:
                if isinstance(unwrap(fn).support, constraints.Permutation):
                    observed.append(name)
                continue
            value = node["value"]
            support = unwrap(fn).support
            if isinstance(support, constraints.Permutation):
                self.start[name] = value
                self.sites[name] = _read_site(name, fn, value, frames)
                if node["mask"] is not None:
                    self.masked.append(name)
            else:
                self.others[name] = node
        self.nesting = depth
        self.flat_prior = not self.others and all(
            isinstance(unwrap(trace.nodes[name]["fn"]), UniformPermutation) for name in self.sites
        )
        if not self.sites:
            raise ValueError(self._no_site(observed))

    def _no_site(self, observed: list[str]) -> str:
        found = f" among its latent sites {name_sites(list(self.others))}" if self.others else ""
        text = (
            f"the model has no latent permutation site{found}; sample one, for example "
            "P = pyro.sample('P', pyro_gs.UniformPermutation(n))"
        )
        if observed:
            text += f". The permutations {name_sites(observed)} are observed: drop obs=, or the condition, to infer them"
        for name, node in self.others.items():
            law = unwrap(node["fn"])
            if INDEX_OF in node["infer"]:
                text += f". Site '{name}' is the index of one: give the plain model in place of pyro_gs.indexed(model)"
            elif is_permutation_law(node["fn"]):
                text += (
                    f". Site '{name}' is relaxed ({type(law).__name__}): give the plain model in place of "
                    "pyro_gs.relax(model), or sample the relaxed one by NUTS(model)"
                )
            elif isinstance(law.support, constraints.PartialMatching):
                text += (
                    f". Site '{name}' is a partial matching of shape {tuple(law.event_shape)}: write it as a permutation "
                    f"of padded logits, pyro.sample('{name}', "
                    "pyro_gs.GibbsPermutation(pyro_gs.pad_logits(logits, unmatched=...))). There a matching of r rows "
                    "stands for n! m! / r! permutations; pyro.factor('once', (r + 1).lgamma()) makes it count once"
                )
            elif type(law).__name__ == "OneOneMatching":
                text += f". Site '{name}' holds index vectors: write pyro.sample('{name}', pyro_gs.GibbsPermutation(logits))"
        return text

    def trouble(self) -> str | None:
        """None where candidates in one run of the model score as each alone, else why not, or an empty string."""
        taken = {size for site in self.sites.values() for size in (*site.item_shape, site.n)}
        # As many as there are rows bring every pair in, where all are allowed: no entry is the same in all of them.
        least = min(max(site.n for site in self.sites.values()), _TRIALS)
        count = next(k for k in range(least, least + len(taken) + 1) if k > 1 and k not in taken)
        draws = distinct_candidates(self.sites, self.start, count)
        others = {name: node["value"] for name, node in self.others.items()}
        with PythonValues(value for draw in draws for value in draw.values()) as values:
            alone = torch.cat([self._run(draw, others, None, None).total for draw in draws], 1)
        shapes = {name: shape[1:] for name, shape in self._shapes.items()}
        if values.read_at is not None:
            # whatever it decides by is the same for all candidates of a run, even where these few score alike
            return f" ({values.read_at}, makes a Python value of tensors that depend on P)"
        try:
            joined = self._run(
                {name: torch.stack([draw[name] for draw in draws]) for name in self.sites}, others, None, count
            )
        except Exception as error:
            return f" ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        # Values may agree by chance, as where all are -inf; candidates in a plate's dimension show in the shapes.
        placed = {name: shape[1:] for name, shape in self._shapes.items()} == shapes
        good = placed and torch.allclose(joined.total, alone, rtol=1e-4, atol=1e-4, equal_nan=True)
        return None if good else ""

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the model."""
        return self._args, self._kwargs

    @property
    def swap_delta(self) -> Callable[[Any], Tensor] | None:
        """The model's attribute of this name with the model's arguments, if it has one."""
        hook = getattr(self._model, "swap_delta", None)
        return None if hook is None else lambda swaps: hook(swaps, *self._args, **self._kwargs)

    def draw(self) -> dict[str, Tensor]:
        """A draw of the permutations from the prior, dict of matrices."""
        with poutine.block(), torch.no_grad():
            trace: Any = poutine.trace(self._model).get_trace(*self._args, **self._kwargs)
        return {name: trace.nodes[name]["value"] for name in self.sites}

    def refuse_others(self, what: str, remedy: str) -> None:
        """Raise where the model has latent sites beside its permutations.

        Args:
            what: who cannot take them.
            remedy: what to write in its place.

        Raises:
            ValueError: names the sites.
        """
        if self.others:
            raise ValueError(
                f"{what} is for models whose latent sites are all permutations, but this one has "
                f"{name_sites(list(self.others))} too; {remedy}"
            )

    def evaluate(
        self,
        values: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        count: int | None,
        name: str | None = None,
    ) -> Terms:
        """Score candidates.

        Args:
            values: matrices of every permutation site: (count, *item_shape, n, n) for those that vary, (*item_shape, n, n)
                for those that do not.
            others: values of the other latent sites, in their constrained spaces.
            count: number K of candidates, None for a single one without their dimension.
            name: the site whose items are told apart in ``Terms.inside``; without it, or where its items do not have
                plates, everything is in ``Terms.outside``.

        Returns:
            Log densities.

        Raises:
            ValueError: a NaN or +inf, or forbidden pairs that depend on other latent sites; names the model's site.
        """
        if count is None or self.vectorize:
            return self._run(values, others, name, count)
        parts = []
        for k in range(count):
            one = {key: v[k] if v.dim() > len(self.sites[key].item_shape) + 2 else v for key, v in values.items()}
            parts.append(self._run(one, others, name, None))
        return Terms.concatenate(parts)

    def _counts(self, name: str, node: Any) -> bool:
        """Whether a site's log-probability is part of the sum."""
        return self._normalized or name not in self.sites or not isinstance(unwrap(node["fn"]), UniformPermutation)

    def _check_support(self, name: str, node: Any) -> None:
        """Raise where a site's law does not allow the pairs that it allowed in the first run."""
        site, allowed = self.sites[name], unwrap(node["fn"]).support.allowed
        if allowed is None and site.allowed is None:
            return
        found = torch.tensor(True, device=site.device) if allowed is None else unexpanded(allowed, 2)
        known = True if site.allowed is None else site.allowed.reshape(*site.item_shape, site.n, site.n)
        if bool((found != known).any()):
            raise ValueError(
                f"which pairs site '{name}' allows depends on other latent sites, or is random; allow all that are ever "
                f"possible and give the others density zero, pyro.factor('{name}_allowed', log_p) with log_p = -inf, or "
                "sum the permutations out by TraceEnum_ELBO on pyro_gs.indexed(model)"
            )

    def _run(self, values: Mapping[str, Tensor], others: Mapping[str, Tensor], name: str | None, count: int | None) -> Terms:
        data = dict(others)
        for key, value in values.items():
            site = self.sites[key]
            plain = len(site.item_shape) + 2
            if value.dim() > plain:
                fill = self.nesting - len(site.item_shape) + site.event_items
                value = value.reshape(value.shape[:1] + (1,) * fill + value.shape[1:])
            data[key] = value
        model = poutine.trace(poutine.condition(self._model, data))
        with poutine.block(), pyro.validation_enabled(False):
            if count is None:
                trace = model.get_trace(*self._args, **self._kwargs)
            else:
                with pyro.plate(_CANDIDATES, count, dim=-1 - self.nesting):
                    trace = model.get_trace(*self._args, **self._kwargs)
            trace.compute_log_prob(self._counts)
        focus = self.sites.get(name or "")
        if focus is not None and not focus.separable:
            focus = None
        items = focus.item_shape if focus else torch.Size()
        k = 1 if count is None else count
        like = next(iter(values.values()))
        inside = torch.zeros(2, k, *items, dtype=torch.float64, device=like.device)
        outside = torch.zeros(2, k, dtype=torch.float64, device=like.device)
        for key, node in trace.nodes.items():
            if key in self.sites:
                self._check_support(key, node)
            if node["type"] != "sample" or isinstance(node["fn"], _Subsample) or not self._counts(key, node):
                continue
            if key in self.sites:
                # As for TraceEnum_ELBO a mask around a latent permutation leaves its prior a law: with obs_mask the
                # imputed value of an observed item integrates to one.
                log_p = node["unscaled_log_prob"].to(like.device, torch.float64) * node["scale"]
            else:
                log_p = node["log_prob"].to(like.device, torch.float64)
            _check_finite(key, log_p)
            part = 0 if key in data else 1
            log_p = log_p.reshape((1,) * (self.nesting + 1 - log_p.dim()) + log_p.shape)
            self._shapes[key] = log_p.shape
            if focus is not None and focus.plates <= {frame.name for frame in node["cond_indep_stack"]}:
                first = log_p.dim() - len(items)
                inner = [dim for dim in range(1, log_p.dim()) if dim < first or items[dim - first] == 1]
                own = log_p.sum(inner, keepdim=True) if inner else log_p
                if own.shape[first:] == items:
                    inside[part] += own.reshape(-1, *items)
                    continue
            outside[part] += log_p.reshape(log_p.shape[0], -1).sum(1)
        return Terms(inside.reshape(2, k, -1), outside)


def distinct_candidates(
    sites: Mapping[str, PermutationSite], start: Mapping[str, Tensor], count: int
) -> list[dict[str, Tensor]]:
    """Values of all sites, each with as few pairs of those before it as their supports allow."""
    found = [dict(start)]
    for _ in range(1, count):
        value = {}
        for name, site in sites.items():
            scores = -torch.stack([candidate[name] for candidate in found]).sum(0)
            if site.allowed is not None:
                scores = scores.masked_fill(~site.allowed.reshape(scores.shape), -torch.inf)
            value[name] = matching(scores)
        found.append(value)
    return found


_REPAIR = (
    "Often it is 0 times -inf, as in (P * scores).sum((-2, -1)) of scores with -inf; write "
    "torch.where(P > 0, scores, 0.0).sum((-2, -1))"
)


def _check_finite(name: str, log_p: Tensor) -> None:
    if bool((log_p != log_p).any()) or bool((log_p == torch.inf).any()):
        raise ValueError(
            f"the log density of site '{name}' is NaN or +inf at a permutation of the support; it must be a number or "
            f"-inf. {_REPAIR}"
        )


def _read_site(name: str, fn: Any, value: Tensor, frames: list[Any]) -> PermutationSite:
    law = unwrap(fn)
    n = value.shape[-1]
    items = value.shape[:-2]
    allowed = law.support.allowed
    if allowed is not None:
        allowed = allowed.expand(value.shape).reshape(-1, n, n).contiguous()
    dims = {frame.dim for frame in frames}
    batch = fn.batch_shape
    covered = all(size == 1 or d - len(batch) in dims for d, size in enumerate(batch))
    return PermutationSite(
        name=name,
        n=n,
        item_shape=items,
        event_items=len(fn.event_shape) - 2,
        allowed=allowed,
        plates=frozenset(frame.name for frame in frames),
        separable=covered and len(fn.event_shape) == 2 and len(items) > 0,
        dtype=value.dtype if value.is_floating_point() else torch.get_default_dtype(),
        device=value.device,
    )


class PotentialJoint:
    """A potential function in the place of a model, with the methods of :class:`LogJoint` that the kernels use.

    Args:
        potential_fn: takes a dict of matrices (*item_shape, n, n) by site and returns minus the log density, up to a
            constant; ``inf`` where it is zero.
        start: a first value of every site.
        allowed: pairs that are not forbidden, bool and broadcasting with the values, for all sites or a dict by site.
        vectorize: whether it takes values (K, *item_shape, n, n) and returns (K,); None tries it out.

    Raises:
        TypeError: the function returns no number.
        ValueError: no site, values that are no permutation matrices or forbidden, or an ``allowed`` without a permutation.
    """

    def __init__(
        self,
        potential_fn: Callable[[dict[str, Tensor]], Tensor],
        start: Mapping[str, Tensor],
        allowed: Tensor | Mapping[str, Tensor] | None = None,
        *,
        vectorize: bool | None = None,
    ) -> None:
        self._potential_fn = potential_fn
        self.swap_delta = None
        self.flat_prior = True
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.sites = {name: _site_of_value(name, value, allowed) for name, value in start.items()}
        self.start = {name: self.sites[name].to_value(self.sites[name].to_items(value)) for name, value in start.items()}
        self.vectorize = self._broadcasts() if vectorize is None else vectorize

    def draw(self) -> dict[str, Tensor]:
        """A uniform draw of the permutations, dict of matrices."""
        out = {}
        for name, site in self.sites.items():
            law = UniformPermutation(site.n, site.allowed)
            shape = () if site.allowed is not None else (site.num_items,)
            out[name] = law.sample(shape).to(site.device, site.dtype).reshape(*site.item_shape, site.n, site.n)
        return out

    def _broadcasts(self) -> bool:
        draws = distinct_candidates(self.sites, self.start, 2)
        with PythonValues(value for draw in draws for value in draw.values()) as values:
            alone = torch.cat([self._call(draw) for draw in draws])
        if values.read_at is not None:  # see LogJoint
            return False
        try:
            joined = self._call({name: torch.stack([draw[name] for draw in draws]) for name in self.sites})
        except Exception:
            return False
        return joined.shape == alone.shape and torch.allclose(joined, alone, rtol=1e-4, atol=1e-4)

    def refuse_others(self, what: str, remedy: str) -> None:
        """Nothing to refuse: a potential function has permutations only."""

    def _call(self, values: Mapping[str, Tensor]) -> Tensor:
        returned = self._potential_fn(dict(values))
        if not isinstance(returned, (Tensor, int, float)):
            raise TypeError(
                f"potential_fn must return a tensor, minus the log density, but returned {type(returned).__name__}; does it "
                "end with return?"
            )
        potential = torch.as_tensor(returned, dtype=torch.float64).reshape(-1)
        if bool((potential != potential).any()) or bool((potential == -torch.inf).any()):
            bad = potential[(potential != potential) | (potential == -torch.inf)][0]
            raise ValueError(
                f"potential_fn returned {float(bad)}; it must return minus the log density, a number, or inf where the "
                f"density is zero. {_REPAIR}"
            )
        return -potential

    def evaluate(
        self, values: Mapping[str, Tensor], others: Mapping[str, Tensor], count: int | None, name: str | None = None
    ) -> Terms:
        """As :meth:`LogJoint.evaluate`; everything counts as likelihood."""
        k = 1 if count is None else count
        if count is None or self.vectorize:
            log_p = self._call(values)
        else:
            dims = {key: len(site.item_shape) + 2 for key, site in self.sites.items()}
            log_p = torch.cat(
                [self._call({key: v[i] if v.dim() > dims[key] else v for key, v in values.items()}) for i in range(k)]
            )
        if log_p.shape != (k,):
            raise ValueError(
                f"potential_fn must return a scalar for one set of values, but returned {log_p.numel()} numbers"
            )
        outside = torch.stack([torch.zeros_like(log_p), log_p])
        return Terms(torch.zeros_like(outside)[..., None], outside)


def _site_of_value(name: str, value: Tensor, allowed: Tensor | Mapping[str, Tensor] | None) -> PermutationSite:
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-1] != value.shape[-2]:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"initial_params['{name}'] must be permutation matrices (..., n, n), but has shape {found}")
    mask = allowed.get(name) if isinstance(allowed, Mapping) else allowed
    n, items = value.shape[-1], value.shape[:-2]
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"allowed must be a boolean tensor for site '{name}', but is {kind}")
        try:
            mask = mask.expand(value.shape).reshape(-1, n, n)
        except RuntimeError:
            raise ValueError(
                f"allowed must broadcast with site '{name}' of shape {tuple(value.shape)}, but has {tuple(mask.shape)}"
            ) from None
        mask = find_support(mask, "allowed").allowed
    return PermutationSite(
        name=name,
        n=n,
        item_shape=items,
        event_items=0,
        allowed=mask,
        plates=frozenset(),
        separable=False,
        dtype=value.dtype if value.is_floating_point() else torch.get_default_dtype(),
        device=value.device,
    )

"""``indexed``: the same model with its permutations drawn through an index, which Pyro can sum out."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch.distributions import Independent

from pyro_gs.distributions import constraints
from pyro_gs.distributions.permutation_law import PermutationLaw
from pyro_gs.infer.handlers import INDEX_OF, given_values, rewrap, unwrap
from pyro_gs.infer.log_joint import HOW_TO_BROADCAST, LogJoint, VectorizationWarning
from pyro_gs.infer.randomness import randomness_kept
from pyro_gs.ops.logits import warn_user


class IndexMessenger(Messenger):
    """Effect handler behind :func:`indexed`; also a context manager.

    Example:
        >>> import pyro, pyro_gs as pgs
        >>> with pyro.poutine.trace() as recorded, IndexMessenger():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        >>> sorted(name for name in recorded.trace.stochastic_nodes)
        ['P_index']
    """

    def __enter__(self) -> Any:
        self._enumerated: dict[int, str] = {}  # dimension -> site
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        law = unwrap(msg["fn"])
        if not isinstance(getattr(law, "support", None), constraints.Permutation) or given_values(msg):
            return
        name = msg["name"]
        if not isinstance(law, PermutationLaw):
            raise NotImplementedError(
                f"indexed cannot list the permutations of {type(law).__name__} at site '{name}', which is no PermutationLaw"
            )
        if _has_event_items(msg["fn"]):
            raise NotImplementedError(
                f"site '{name}' holds several permutations as one event (to_event), which have no single index; draw them "
                "in a plate, with pyro.plate('items', k): ..."
            )
        support = law.enumerate_support(expand=False)
        # An index for every item of the batch, also of a batch that is expanded.
        choice = rewrap(msg["fn"], lambda base: dist.Categorical(logits=_logits(base, support)))
        # What handlers have noted of the matrix they note of the index anew.
        given = {key: value for key, value in msg["infer"].items() if not key.startswith("_")}
        infer: Any = {"enumerate": "parallel", **given, INDEX_OF: name}
        _leave_markov(name)
        index = pyro.sample(f"{name}_index", choice, infer=infer)
        # While it is enumerated the index has size one in the plates; the matrix has their size, but not that of earlier
        # enumerated sites on which its law depends.
        plates = {-frame.dim: frame.size for frame in msg["cond_indep_stack"] if frame.vectorized}
        sizes = [plates.get(dim, 1) for dim in range(max(plates, default=0), 0, -1)]
        value = support.reshape(-1, *law.event_shape)[index].expand(
            *torch.broadcast_shapes(index.shape, sizes), *law.event_shape
        )
        msg["fn"] = dist.Delta(value, event_dim=2).mask(False)
        msg["value"] = value
        msg["is_observed"] = True
        msg["infer"] = {"_deterministic": True, **_markov_scope(msg["infer"], f"{name}_index")}

    def _pyro_post_sample(self, msg: Any) -> None:
        fn, value, infer = msg["fn"], msg["value"], msg["infer"]
        if "_enumerate_dim" in infer:
            if INDEX_OF in infer:
                self._enumerated[infer["_enumerate_dim"]] = infer[INDEX_OF]
            return
        if msg["is_observed"] or not isinstance(fn, TorchDistributionMixin):
            return
        batch = value.shape[: value.dim() - fn.event_dim]
        name = next((self._enumerated[d] for d in range(-len(batch), 0) if batch[d] > 1 and d in self._enumerated), None)
        if name is not None:
            plates = {frame.dim: frame.size for frame in msg["cond_indep_stack"] if frame.vectorized}
            shape = tuple(plates.get(dim, 1) for dim in range(min(plates, default=0), 0)) + tuple(fn.event_shape)
            site = msg["name"]
            raise ValueError(
                f"site '{site}' depends on '{name}' and was drawn for each of its permutations, with shape "
                f"{tuple(value.shape)} in place of {shape}; start HMC and NUTS at one value for all, init_strategy="
                f"init_to_value(values={{'{site}': value}}) with a value of shape {shape} (pyro.infer.autoguide)"
            )


def _leave_markov(name: str) -> None:
    """Take a site out of the scope of the ``pyro.markov`` contexts that have seen it, in which its index stands for it."""
    for frame in _PYRO_STACK:
        if isinstance(frame, MarkovMessenger):
            frame._stack[frame._pos].discard(name)


def _markov_scope(infer: Any, index: str) -> dict[str, Any]:
    """The scope that ``pyro.markov`` gave a site, with its index: what tells Pyro the dimensions of the matrix."""
    if "_markov_scope" not in infer:
        return {}
    depth = infer["_markov_depth"]
    return {"_markov_scope": infer["_markov_scope"] + Counter({index: depth}), "_markov_depth": depth}


def _has_event_items(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims > 0:
            return True
        fn = fn.base_dist
    return False


def _logits(law: PermutationLaw, support: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the listed permutations (K, ..., n, n), batch_shape + (K,)."""
    log_p = law.log_prob(support)
    return log_p.expand(log_p.shape[:1] + law.batch_shape).movedim(0, -1)


class _Checked:
    """A model that at its first call is tried out on a few permutations, alone and together."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self._tried = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A plate of many particles would be in the candidates' way.
        inside = any(isinstance(frame, IndepMessenger) for frame in _PYRO_STACK)
        if not self._tried and not inside and torch._C._get_tracing_state() is None:
            self._tried = True
            reason = self._trouble(args, kwargs)
            if reason is not None:
                warn_user(
                    "the model does not broadcast over its permutations, so what is summed over their indices is wrong; "
                    f"{HOW_TO_BROADCAST}, or take MCMC with pyro_gs.SwapMetropolis{reason}",
                    VectorizationWarning,
                )
        return self._model(*args, **kwargs)

    def _trouble(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        try:
            with randomness_kept(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return LogJoint(self._model, args, kwargs, vectorize=False).trouble()
        except Exception:  # what a run of the model tells itself, or no case of LogJoint: plates that are subsampled
            return None


def indexed(model: Callable[..., Any] | None = None) -> Any:
    """The model with its latent permutations drawn through an index over their support.

    Every latent permutation site ``P`` becomes a ``Categorical`` site ``P_index``, marked for parallel enumeration, and
    ``P`` itself the permutation of that index, recorded as by ``pyro.deterministic``. So Pyro's exact machinery is right
    for it: ``TraceEnum_ELBO`` with its ``compute_marginals``, ``infer_discrete``, plates, ``pyro.markov``, and HMC,
    NUTS and autoguides for the other latent sites, with the permutations summed out::

        MCMC(NUTS(pyro_gs.indexed(model)), num_samples=1000, warmup_steps=200)

    ``Predictive`` with draws of the permutations takes the plain model.

    The log-probabilities of the support are the prior's. Enumerating the matrix site itself, ``infer={"enumerate":
    "parallel"}`` without this handler, gives the evidence but not marginals, MAP and ``infer_discrete``.

    Args:
        model: a Pyro model that broadcasts over its permutations, which is tried out at its first call; without it a
            context manager is returned, where it is not.

    Returns:
        A callable with the model's signature.

    Raises:
        TypeError: ``model`` is not callable.
        ValueError: at a call, a site with more than 8! = 40,320 permutations (the message has their number).
            Under HMC and NUTS, a latent site that depends on a permutation and has no initial value.
        NotImplementedError: at a call, several permutations in one event.

    Warns:
        VectorizationWarning: at the first call, the model does not broadcast, and sums are wrong.

    Example:
        >>> import torch, pyro_gs as pgs
        >>> from pyro.infer import TraceEnum_ELBO
        >>> def model():
        ...     P = pyro.sample("P", pgs.UniformPermutation(3))
        ...     pyro.factor("f", P.diagonal(dim1=-2, dim2=-1).sum(-1))
        >>> elbo = TraceEnum_ELBO(max_plate_nesting=0)
        >>> marginal = elbo.compute_marginals(pgs.indexed(model), lambda: None)["P_index"]
        >>> marginal.probs[0]  # of the identity
        tensor(0.6642)
    """
    if model is not None and not callable(model):
        raise TypeError(f"model must be callable, but is {type(model).__name__}; for a context use indexed()")
    messenger = IndexMessenger()
    return messenger if model is None else messenger(_Checked(model))

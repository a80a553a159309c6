"""Hard permutations with the gradient of the relaxed ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.distributions.relaxed import RelaxedPermutation, plain
from pyro_gs.ops.matching import matching


class GumbelSinkhornStraightThrough(GumbelSinkhorn):
    r"""Gumbel-Sinkhorn law whose samples are permutation matrices, with the relaxed sample's gradient.

    A sample is ``M(X + eps)`` in the forward pass, a draw of :class:`GumbelMatching`; its gradient is that of
    ``S((X + eps) / tau)`` with the same noise (Bengio, Leonard and Courville 2013 for the estimator, which is biased).
    :meth:`log_prob` of such a sample is the relaxed law's density at the relaxed point, whose logarithm the sample
    carries: through ``clone``, ``expand``, replay into a model's ``GumbelSinkhorn`` prior, and the other operations that
    :class:`GumbelSinkhorn` names. A permutation matrix without that logarithm has no density and raises.

    Args:
        temperature: as in :class:`GumbelSinkhorn`.
        logits: as in :class:`GumbelSinkhorn`.
        num_particles: as in :class:`GumbelSinkhorn`.
        validate_args: as in :class:`GumbelSinkhorn`.

    Raises:
        TypeError: as :class:`GumbelSinkhorn`.
        ValueError: as :class:`GumbelSinkhorn`.
        RuntimeError: as :class:`GumbelSinkhorn`.

    Example:
        >>> import torch
        >>> X = torch.zeros(3, 3, requires_grad=True)
        >>> d = GumbelSinkhornStraightThrough(0.5, X)
        >>> P = d.rsample()
        >>> P.sum(-1), ((P == 0) | (P == 1)).all()
        (tensor([1., 1., 1.], grad_fn=...), tensor(True))
        >>> d.log_prob(P.clone()).isfinite()
        tensor(True)
    """

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Permutation matrices of shape sample_shape + batch_shape + (n, n), with the relaxed gradient.

        Warns:
            SinkhornWarning: the solver missed its tolerance (see :func:`pyro_gs.sinkhorn`).
        """
        return straight_through(self, sample_shape)


def straight_through(law: GumbelSinkhorn, sample_shape: Any = ()) -> RelaxedPermutation:
    """Draws ``M(X + eps)`` of a Gumbel-Sinkhorn law with the relaxed sample's gradient and logarithm."""
    z = law._perturbed(sample_shape)
    relaxed = law._relaxed(z)
    soft = plain(relaxed)
    hard = matching(z.detach()).to(soft.dtype)
    return RelaxedPermutation.wrap(hard + (soft - soft.detach()), relaxed.log_source)

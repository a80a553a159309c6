"""Laws over permutations with known probabilities, made from the logits of a guide: what :class:`GuideProposal` draws from.

The hard law of a guide, ``M(X + eps)``, has no probabilities in closed form above three rows. So either another law stands
in for it, or the state of the chain is extended by a relaxed point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gs.distributions.gibbs_permutation import GibbsPermutation
from pyro_gs.distributions.gumbel_matching import GumbelMatching
from pyro_gs.distributions.gumbel_sinkhorn import GumbelSinkhorn
from pyro_gs.distributions.relaxed import RelaxedPermutation
from pyro_gs.ops.gumbel import gumbel_noise
from pyro_gs.ops.matching import solve_assignment, to_matrix
from pyro_gs.ops.sinkhorn import log_sinkhorn


class ProposalLaw:
    """Independent laws of the items of a site.

    Attributes:
        renews: whether :meth:`weigh` draws an auxiliary point anew, so that it must be called before every proposal.
    """

    renews = False

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws, long (count, items, n), and what :meth:`weigh` would say of them, ``inf`` for a draw to be rejected."""
        raise NotImplementedError

    def weigh(self, index: Tensor) -> Tensor:
        """Log-probabilities, up to a constant, of permutations (..., items, n), float64 (..., items)."""
        raise NotImplementedError


class GibbsLaw(ProposalLaw):
    """``exp <X, P>``, drawn exactly in components of at most 20 rows; in others by a chain.

    Args:
        logits: shape (items, n, n).
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.double()
        self._law = GibbsPermutation(self._logits)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`ProposalLaw.draw`."""
        index = self._law.sample(torch.Size((count,))).argmax(-1)
        return index, self.weigh(index)

    def weigh(self, index: Tensor) -> Tensor:
        """As :meth:`ProposalLaw.weigh`."""
        return _gather(self._logits, index).sum(-1)


class MatchingLaw(ProposalLaw):
    """The guide's own hard law ``M(X + eps)``, whose probabilities are exact in components of at most three rows.

    Args:
        logits: shape (items, n, n).
    """

    def __init__(self, logits: Tensor) -> None:
        self._law = GumbelMatching(logits.double())

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`ProposalLaw.draw`."""
        index = self._law.sample(torch.Size((count,))).argmax(-1)
        return index, self.weigh(index)

    def weigh(self, index: Tensor) -> Tensor:
        """As :meth:`ProposalLaw.weigh`."""
        return self._law.log_prob(to_matrix(index, dtype=torch.float64))


class SequentialLaw(ProposalLaw):
    """Rows one after the other, each among the columns that are left, with probabilities in proportion to its weights.

    The surest rows come first. A row that finds no allowed column left ends the draw, which is then to be rejected: the
    probabilities of the permutations sum to less than one, each of them being positive.

    Args:
        log_weights: shape (items, n, n), finite or ``-inf`` where forbidden.
    """

    def __init__(self, log_weights: Tensor) -> None:
        log_weights = log_weights.double()
        best = log_weights.softmax(-1).amax(-1)
        self._order = best.argsort(-1, descending=True)
        sorted_rows = log_weights.gather(1, self._order[..., None].expand(log_weights.shape))
        self._weights = (sorted_rows - sorted_rows.amax(-1, keepdim=True)).exp()
        self._spare = solve_assignment(log_weights)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`ProposalLaw.draw`."""
        items, n, _ = self._weights.shape
        left = self._weights.new_ones(count, items, n)
        dead = torch.zeros(count, items, dtype=torch.bool, device=left.device)
        taken = torch.zeros(count, items, n, dtype=torch.long, device=left.device)
        for k in range(n):
            ends = (self._weights[:, k] * left).cumsum(-1)
            dead |= ends[..., -1] <= 0
            uniform = torch.rand(count, items, 1, dtype=ends.dtype, device=ends.device) * ends[..., -1:]
            column = (ends <= uniform).sum(-1, keepdim=True).clamp(max=n - 1)
            taken[..., k] = column[..., 0]
            left.scatter_(-1, column, 0.0)
        index = torch.empty_like(taken).scatter_(-1, self._order.expand(taken.shape), taken)
        index = torch.where(dead[..., None], self._spare, index)
        return index, self.weigh(index).masked_fill(dead, torch.inf)

    def weigh(self, index: Tensor) -> Tensor:
        """As :meth:`ProposalLaw.weigh`."""
        taken = index.gather(-1, self._order.expand(index.shape))
        weights = self._weights.expand(*index.shape[:-1], *self._weights.shape[-2:])
        chosen = weights.gather(-1, taken[..., None, :].expand(weights.shape))  # [k, l]: weight in row k of l's column
        return (chosen.diagonal(dim1=-2, dim2=-1).log() - chosen.triu().sum(-1).log()).sum(-1)


class RelaxedLaw(ProposalLaw):
    r"""The guide's hard law, with a relaxed point R beside the permutation, ``P = M(R)``.

    The target is extended to ``p_0(R) pi(M(R)) n!``, with ``p_0`` the law of ``S(eps)``: it makes all permutations equally
    probable, so that M(R) has the law pi. R is proposed from the guide's q, the law of ``S(X + eps)``, so the ratio has
    ``q(R) / p_0(R)`` in place of a probability of P. Before every proposal the present R is drawn anew from ``p_0`` given
    ``M(R) = P``: flat noise with its columns relabelled so that its matching is P, since ``p_0`` does not change with the
    order of the columns. Neither does q / p_0 depend on the temperature, as the Jacobians cancel; it is taken at 1.

    Args:
        logits: shape (items, n, n), all finite.
    """

    renews = True

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.double()
        self._guide = GumbelSinkhorn(1.0, self._logits, validate_args=False)
        self._flat = GumbelSinkhorn(1.0, torch.zeros_like(self._logits), validate_args=False)

    def _log_ratio(self, noise: Tensor) -> Tensor:
        log_p = log_sinkhorn(noise)
        point = RelaxedPermutation.wrap(log_p.exp(), log_p)
        return self._guide.log_prob(point) - self._flat.log_prob(point)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """As :meth:`ProposalLaw.draw`."""
        noise = self._logits + gumbel_noise(torch.Size((count, *self._logits.shape)), self._logits)
        return solve_assignment(noise), self._log_ratio(noise)

    def weigh(self, index: Tensor) -> Tensor:
        """As :meth:`ProposalLaw.weigh`, at a new relaxed point."""
        noise = gumbel_noise(torch.Size((*index.shape, index.shape[-1])), self._logits)
        columns = solve_assignment(noise)[..., None, :].expand(noise.shape)
        relabelled = torch.empty_like(noise).scatter_(-1, index[..., None, :].expand(noise.shape), noise.gather(-1, columns))
        return self._log_ratio(relabelled)


def centred(logits: Tensor) -> Tensor:
    """Logits with the mean of the allowed entries of every column taken off.

    The guide's law does not change with a number added to a column, as a :class:`SequentialLaw` does.
    """
    allowed = logits > -torch.inf
    total = torch.where(allowed, logits, 0.0).sum(-2, keepdim=True)
    return logits - total / allowed.sum(-2, keepdim=True)


def _gather(logits: Tensor, index: Tensor) -> Tensor:
    return logits.expand(*index.shape, index.shape[-1]).gather(-1, index[..., None])[..., 0]

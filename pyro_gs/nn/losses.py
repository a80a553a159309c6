"""Losses of matrices against the right order; each returns a value for every set, whose mean is the usual loss."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_gs.distributions.gumbel_matching import GumbelMatching
from pyro_gs.nn.assembly import assemble
from pyro_gs.nn.each_item import check_items
from pyro_gs.nn.masks import check_mask, mask_logits, padding_block, piece_block, positions, zero_padded
from pyro_gs.ops.logits import check_count, check_floating, check_square, describe, first_position


def reconstruction_loss(
    P: Tensor, items: Tensor, target: Tensor, mask: Tensor | None = None, *, item_dim: int = 1
) -> Tensor:
    """Mean squared error of the assembled set, ``(assemble(P, items) - target)^2`` (Mena et al. 2018, Section 4).

    Asks for no permutation, only for what is in order. Straight-through: give it the matrices of a layer with ``hard``.

    Args:
        P: shape (..., n, n), rows pieces, columns positions; draws lead.
        items: pieces, shape ``(..., n, *item)``.
        target: what is in order, of the shape of ``items``.
        mask: bool, broadcasts to the pieces (..., n); k pieces are compared at the first k positions.
        item_dim: number of dimensions of a piece.

    Returns:
        Tensor of the broadcast batch shape: means over positions and the entries of a piece.

    Raises:
        TypeError: not floating, different dtypes, a mask not bool.
        ValueError: shapes that do not fit, pieces without entries, a NaN or infinity, not where the mask has no piece.

    Example:
        >>> import torch
        >>> items = torch.tensor([20.0, 10.0])
        >>> reconstruction_loss(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), items, torch.tensor([10.0, 20.0]), item_dim=0)
        tensor(0.)
    """
    check_count(item_dim, "item_dim", least=0)
    check_items(items, item_dim, mask=mask)
    lead, item = items.shape[: items.dim() - item_dim], items.shape[items.dim() - item_dim :]
    if 0 in item:
        raise ValueError(f"items must have entries to compare, but a piece has shape {tuple(item)}")
    mask = None if mask is None else check_mask(mask, lead)
    seen = None if mask is None else positions(mask)
    check_items(target, item_dim, "target", mask=seen)
    if target.shape != items.shape or target.dtype != items.dtype:
        raise ValueError(
            f"target must have the shape and dtype of items, {tuple(items.shape)} and {items.dtype}, but has "
            f"{tuple(target.shape)} and {target.dtype}"
        )
    if mask is None or seen is None:
        return _per_position(assemble(P, items, item_dim=item_dim) - target, item_dim).mean(-1)
    error = assemble(P, zero_padded(items, mask, item_dim), item_dim=item_dim) - zero_padded(target, seen, item_dim)
    return torch.where(seen, _per_position(error, item_dim), 0.0).sum(-1) / mask.sum(-1)


def _per_position(error: Tensor, item_dim: int) -> Tensor:
    return error.square().flatten(-item_dim).mean(-1) if item_dim else error.square()


def cross_entropy(log_p: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean over the pieces of ``-log P[i, right position of i]``.

    With ``log_p`` of a layer without noise at temperature 1 this is a bound of the Gumbel-matching law's: k times it is at
    least ``-log p(target)`` of :func:`gumbel_matching_nll` (``GumbelMatching.log_prob_bounds``), at no cost of an integral.
    With draws of noise, ``log_p`` of shape (num_samples, ..., n, n), the mean of the result is the mean loss; for that of
    the estimated marginals give ``log_p.logsumexp(0) - math.log(num_samples)``.

    Args:
        log_p: logarithms, shape (..., n, n), as of ``SinkhornNetwork.log_p``; draws lead.
        target: permutation matrices, shape (..., n, n), 1 where the piece of the row belongs at the position of the column.
        mask: bool, broadcasts to (..., n); rows of ``target`` without a piece are not looked at.

    Returns:
        Tensor of the batch shape of ``log_p``.

    Raises:
        TypeError: not floating, or a mask not bool.
        ValueError: shapes that do not fit, NaN or +inf, logarithms above zero (a tenth is let pass as rounding), ``target``
            no permutation of the pieces, or a right position that ``log_p`` forbids; the message names it.

    Example:
        >>> import torch
        >>> from pyro_gs import log_sinkhorn
        >>> cross_entropy(log_sinkhorn(torch.zeros(3, 3)), torch.eye(3))  # log 3
        tensor(1.0986)
    """
    chosen, mask = _checked(log_p, "log_p", target, mask)
    high = chosen & (log_p.detach() > 0.1)
    if bool(high.any()):
        *item, row, column = at = first_position(high)
        raise ValueError(
            f"log_p{describe(tuple(item))} must hold logarithms of probabilities, but is {float(log_p[at]):g} at row {row}, "
            f"column {column}; of logits take pyro_gs.log_sinkhorn first"
        )
    impossible = chosen & (log_p.detach() == -torch.inf)
    if bool(impossible.any()):
        *item, row, column = first_position(impossible)
        raise ValueError(
            f"log_p{describe(tuple(item))} is -inf at row {row}, column {column}, where target has the "
            "right position; allow the pair"
        )
    count = log_p.shape[-1] if mask is None else mask.sum(-1)
    return -torch.where(chosen, log_p, 0.0).sum((-2, -1)) / count


def gumbel_matching_nll(logits: Tensor, target: Tensor, mask: Tensor | None = None, *, num_particles: int = 1000) -> Tensor:
    """``-log p(target)`` under the law of the matching ``M(X + eps)``, the zero-temperature limit of Gumbel-Sinkhorn.

    The likelihood of whole permutations, in nats. Exact for sets of up to three pieces, above an estimate that varies from
    call to call, for at most 32 pieces (:class:`pyro_gs.GumbelMatching`); for more take :func:`cross_entropy`. Training
    stops with an error where scores grow so far apart that ``S(logits)`` has entries below e^-90: bound them, as by
    ``15 * torch.tanh(logits / 15)``, which keeps entries above e^-60 / n, or take :func:`cross_entropy`.

    Args:
        logits: shape (..., n, n), float32 or float64, as of ``ScoreNetwork``.
        target: permutation matrices, as in :func:`cross_entropy`.
        mask: bool, broadcasts to (..., n).
        num_particles: size of the importance sample.

    Returns:
        Tensor of the batch shape of ``logits``.

    Raises:
        TypeError: another dtype, or a mask not bool.
        ValueError: as :func:`cross_entropy`.
        NotImplementedError: as ``GumbelMatching.log_prob``.

    Warns:
        EstimateWarning: as ``GumbelMatching.log_prob``.

    Example:
        >>> import torch
        >>> gumbel_matching_nll(torch.zeros(3, 3), torch.eye(3))  # log 3!
        tensor(1.7918)
    """
    if mask is not None:
        logits = mask_logits(logits, mask)
    chosen, mask = _checked(logits, "logits", target, mask)
    value = chosen if mask is None else chosen | padding_block(mask)
    loss: Tensor = -GumbelMatching(logits, num_particles).log_prob(value.to(logits.dtype))
    if not bool((loss.detach() < torch.inf).all()):
        item = first_position(~(loss.detach() < torch.inf)) if loss.dim() else ()
        raise ValueError(f"logits{describe(item)} forbid target: its probability is zero; allow its pairs")
    return loss


def _checked(values: Tensor, name: str, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The right pairs of the pieces, bool of the shape of ``values``, and the mask, expanded."""
    check_square(values, name)
    check_floating(values, name)
    detached = values.detach()
    bad = detached.isnan() | (detached == torch.inf)
    check_square(target, "target")
    try:
        if target.shape[-1] != values.shape[-1]:
            raise RuntimeError
        chosen = target.expand(values.shape) == 1
    except RuntimeError:
        raise ValueError(
            f"target must broadcast to the shape of {name}, {tuple(values.shape)}, but has shape {tuple(target.shape)}"
        ) from None
    good = chosen | (target == 0)
    if mask is None:
        pieces = places = torch.ones(values.shape[:-1], dtype=torch.bool, device=values.device)
    else:
        mask = check_mask(mask, values.shape[:-1])
        pieces, places = mask, positions(mask)
        chosen = chosen & piece_block(mask)
        bad = bad & piece_block(mask)
    if bool(bad.any()):
        *item, row, column = at = first_position(bad)
        raise ValueError(f"{name}{describe(tuple(item))} is {float(detached[at])} at row {row}, column {column}")
    right = (good.all(-1) & (chosen.sum(-1) == 1)) | ~pieces
    right = right.all(-1) & ((chosen.sum(-2) == 1) | ~places).all(-1)
    if not bool(right.all()):
        where = first_position(~right) if right.dim() else ()
        of_pieces = "" if mask is None else ", of the pieces of mask to as many first columns"
        raise ValueError(f"target{describe(where)} is not a permutation matrix{of_pieces}")
    return chosen, mask

"""From features of pieces to logits: scores of every piece at every position."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_gs.nn.deep_sets import check_features
from pyro_gs.nn.masks import check_mask
from pyro_gs.ops.logits import check_count

_WAVES = 16  # cosines that a position is given by


class RowScores(nn.Module):
    """A row of n scores of every piece, a linear map of its features (Mena et al. 2018, Section 4).

    Positions have nothing in common, so it holds for one n; smaller sets are padded and take the first positions.

    Args:
        in_features: size of a piece's features.
        n: number of positions.

    Shapes:
        x (..., n, in_features) to (..., n, n); the mask plays no part.

    Raises:
        TypeError: at a call, features that are not floating.
        ValueError: a size below 1; at a call, another shape.

    Example:
        >>> import torch
        >>> RowScores(8, 5)(torch.zeros(4, 5, 8)).shape
        torch.Size([4, 5, 5])
    """

    def __init__(self, in_features: int, n: int) -> None:
        super().__init__()
        check_count(in_features, "in_features", least=1)
        check_count(n, "n", least=1)
        self.linear = nn.Linear(in_features, n)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits."""
        check_features(x, self.linear.in_features)
        if x.shape[-2] != self.linear.out_features:
            raise ValueError(
                f"x must have {self.linear.out_features} pieces, as many as RowScores has positions, but has shape "
                f"{tuple(x.shape)}; pad and mask smaller sets, or take PositionScores or RankScores"
            )
        out: Tensor = self.linear(x)
        return out


class RankScores(nn.Module):
    r"""One number ``s_i`` of every piece, and ``X_ij = s_i j``: pieces are put in the order of their numbers.

    By the rearrangement inequality the matching of such logits sorts ``s`` in ascending order, whatever n is; the relaxed
    matrix is that of optimal transport between ``s`` and 1, ..., n with squared distances (Cuturi, Teboul and Vert 2019,
    'Differentiable ranking and sorting using optimal transport'). A common shift of ``s`` adds to columns and changes
    nothing; it is taken off before the product, so that it costs no digits.

    Args:
        in_features: size of a piece's features, mapped linearly to ``s``.

    Shapes:
        x (..., n, in_features) and mask (..., n) to (..., n, n), for any n.

    Raises:
        TypeError: at a call, features that are not floating, a mask not bool.
        ValueError: a size below 1; at a call, another shape.

    Example:
        >>> import torch
        >>> from pyro_gs import matching, to_index
        >>> scores = RankScores(1)
        >>> _ = scores.linear.weight.data.fill_(1.0)
        >>> to_index(matching(scores(torch.tensor([[0.3], [0.1], [0.9]]))))  # the ranks, counted from 0
        tensor([1, 0, 2])
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        check_count(in_features, "in_features", least=1)
        self.linear = nn.Linear(in_features, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits."""
        check_features(x, self.linear.in_features)
        s = self.linear(x)
        seen = s.detach() if mask is None else torch.where(check_mask(mask, x.shape[:-1])[..., None], s.detach(), -torch.inf)
        n = x.shape[-2]
        places = torch.arange(n, dtype=s.dtype, device=s.device) - (n - 1) / 2
        out: Tensor = (s - seen.amax(-2, keepdim=True)) * places
        return out


class PositionScores(nn.Module):
    """Products of features of the pieces and of the positions, ``X_ij = <q(x_i), e(t_j)>``, for sets of any size.

    ``t_j = (j + 1/2) / k``, counted from 0, is the position relative to the number k of pieces; ``e`` is a network of
    ``cos(pi m t)`` for m = 1 to 16.

    Args:
        in_features: size of a piece's features.
        width: size of what is multiplied.

    Shapes:
        x (..., n, in_features) and mask (..., n) to (..., n, n), for any n.

    Raises:
        TypeError: at a call, features that are not floating, a mask not bool.
        ValueError: a size below 1; at a call, another shape.

    Example:
        >>> import torch
        >>> scores = PositionScores(8)
        >>> [scores(torch.zeros(4, n, 8)).shape[-1] for n in (5, 7)]
        [5, 7]
    """

    def __init__(self, in_features: int, width: int = 64) -> None:
        super().__init__()
        check_count(in_features, "in_features", least=1)
        check_count(width, "width", least=1)
        self.query = nn.Linear(in_features, width)
        self.place = nn.Sequential(nn.Linear(_WAVES, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits."""
        check_features(x, self.query.in_features)
        n = x.shape[-2]
        count = n if mask is None else check_mask(mask, x.shape[:-1]).sum(-1)[..., None, None]
        t = (torch.arange(n, dtype=x.dtype, device=x.device)[:, None] + 0.5) / count
        waves = torch.arange(1, _WAVES + 1, dtype=x.dtype, device=x.device)
        places = self.place(torch.cos(math.pi * waves * t))
        out: Tensor = self.query(x) @ places.mT / math.sqrt(self.query.out_features)
        return out

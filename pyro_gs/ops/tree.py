r"""Laplacians whose weights span hundreds of orders of magnitude, in the cut basis of a maximum spanning tree.

Near a permutation the ties ``W = P^T P`` between columns are strong inside clusters and vanishing between them, and a
factorization of the Laplacian ``L`` in the basis of nodes subtracts nearly equal numbers until nothing is left of the
weak ties. In the basis of *cuts* it does not. Root a maximum spanning forest of the ties at the grounded nodes; let
``S_e`` be the nodes below the tree edge ``e`` and ``1_S`` their indicators, so that ``x = sum_e y_e 1_{S_e}`` has
``y_e`` as the drop across ``e``. Then

    K_ef = 1_{S_e}^T L 1_{S_f} = + W(S_e, complement of S_f)  if S_e lies inside S_f
                                 - W(S_e, S_f)                if the two are disjoint

is a sum of ties of one sign: nothing is subtracted. ``K_ee`` is the weight of the cut, no tie across the cut is
stronger than its tree edge, and so ``|K_ef| <= min(K_ee, K_ff)`` and ``diag(K) / n^2 <= K <= n diag(K)``: scaled by its
diagonal ``K`` is as well conditioned as a polynomial in ``n`` allows, whatever the range of the weights, and every
product ``K_em K_mf / K_mm`` that elimination subtracts from ``K_ef`` is at most ``min(K_ee, K_ff)``. The determinant is
that of ``L`` without its grounded rows and columns, since the change of basis has determinant one.

Rows are computed at the scale of their own cut, so weights may have logarithms of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

Forest = tuple[Tensor, Tensor, Tensor]  # parent, order and below, as spanning_forest returns them

_WINDOW = 500.0  # nats of cut weights that one pass in ordinary numbers serves
_CAP = 50.0  # nats above a window beyond which a tie cannot cross its cuts
_NO_TIE = -1e300


def spanning_forest(log_w: Tensor, grounded: Tensor) -> Forest:
    """Maximum spanning forests by Prim's algorithm on the host, rooted at the grounded nodes.

    Args:
        log_w: symmetric logarithms of weights, (b, n, n); the diagonal is ignored.
        grounded: bool (b, n).

    Returns:
        parent: long (b, n), a grounded node is its own.
        order: long (b, n), nodes such that parents come before their children.
        below: float64 (b, n, n), 1 at ``[j, e]`` if node ``j`` lies below the edge from node ``e`` to its parent.
    """
    weight = log_w.detach().to("cpu", copy=True).numpy()
    root = grounded.to("cpu").numpy()
    size, n = root.shape
    item = np.arange(size)
    count = root.sum(-1)
    order = np.concatenate([np.argsort(~root, axis=-1, kind="stable"), np.zeros((size, 1), int)], axis=-1)
    masked = np.where(root[:, :, None], weight, -np.inf)
    parent = np.where(root, np.arange(n), masked.argmax(1))
    best = masked.max(1).clip(min=_NO_TIE)  # of the nodes that are not in the forest yet; of the others -inf
    best[root] = -np.inf
    weight[np.broadcast_to(root[:, None, :], weight.shape)] = -np.inf
    below = np.zeros((size, n, n), dtype=bool)
    for _ in range(n - int(count.min(initial=n))):
        node = best.argmax(-1)  # an item that is complete takes a root, which is undone below
        path = below[item, parent[item, node]]
        path[item, node] = True
        below[item, node] = path
        order[item, count] = node
        count = np.minimum(count + 1, n)
        best[item, node] = -np.inf
        weight[item, :, node] = -np.inf
        new = weight[item, node]
        np.copyto(parent, node[:, None], where=new > best)
        np.maximum(best, new, out=best)
    below[root] = False
    device = log_w.device
    return (
        torch.from_numpy(parent).to(device),
        torch.from_numpy(order[:, :n].copy()).to(device),
        torch.from_numpy(below).to(device, torch.float64),
    )


def _log_sums(log_f: Tensor, basis: CutBasis, items: Tensor) -> Tensor:
    """Logarithms of the flows out of every ``S_e`` by addition from the leaves up, where ordinary numbers underflow."""
    total = log_f.clone()
    parent, order, grounded = basis.parent[items], basis.order[items], basis.grounded[items]
    item = torch.arange(len(total), device=total.device)
    for place in range(total.shape[-1] - 1, 0, -1):
        node = order[:, place]
        up = parent[item, node]
        add = torch.where(grounded[item, node][:, None], -torch.inf, total[item, node])
        total[item, up] = torch.logaddexp(total[item, up], add)
    return torch.logsumexp(total.masked_fill(basis.below[items].mT > 0, -torch.inf), -1)


class CutBasis:
    """Laplacians of a flat batch in the basis of the cuts of their spanning forests.

    Args:
        log_w: logarithms of symmetric weights, (b, n, n); the diagonal is ignored, -inf is no tie.
        grounded: bool (b, n), the first node of every component.
        forest: of weights that are not far from these, from :func:`spanning_forest`.

    Attributes:
        forest: the spanning forest that the cuts are of.
        log_cut: logarithms of ``K_ee``, (b, n); edges are numbered by their lower node, zero at the grounded ones.
        below: (b, n, n), 1 at ``[j, e]`` if node ``j`` lies in ``S_e``.
        logdet: log-determinants of the grounded Laplacians, (b,).
    """

    def __init__(self, log_w: Tensor, grounded: Tensor, forest: Forest | None = None) -> None:
        self.grounded = grounded
        self.forest = spanning_forest(log_w, grounded) if forest is None else forest
        self.parent, self.order, self.below = self.forest
        self._outside = 1.0 - self.below
        tie = log_w.gather(-1, self.parent[..., None])[..., 0].masked_fill(grounded, -torch.inf)
        # The strongest tie across a cut is its tree edge; one pass in ordinary numbers serves the edges of a window.
        top = tie.amax(-1, keepdim=True).masked_fill(grounded.all(-1, keepdim=True), 0.0)
        tie = torch.where(grounded, top, tie)
        self._top, self._window = top, ((top - tie) / _WINDOW).floor()
        near = self._near(log_w)
        cut = (near * self._outside.mT).sum(-1).masked_fill(grounded, 1.0)
        self.log_cut = (cut.log() + top - self._window * _WINDOW).masked_fill(grounded, 0.0)
        near /= cut[..., None]
        # K with every row divided by its diagonal: [e, f] with f below e or disjoint, then with f above e.
        rows = near @ self.below
        rows = torch.where(self.below.mT > 0, rows, -rows)
        rows = torch.where(self.below > 0, near @ self._outside, rows)
        del near
        rows.diagonal(0, -2, -1).fill_(1.0)
        # Weakest cut first: exchanges of rows, which partial pivoting makes, must not put a weak cut above a strong one.
        self._rank = self.log_cut.masked_fill(grounded, -torch.inf).argsort(-1)
        self.factor, self.pivots = torch.linalg.lu_factor(self._ranked(self._ranked(rows).mT).mT)
        self.logdet = self.log_cut.sum(-1) + self.factor.diagonal(0, -2, -1).abs().log().sum(-1)

    def _ranked(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Rows of (b, n, k) in the order of the factorization, or back from it."""
        index = self._rank[..., None].expand_as(x)
        return torch.zeros_like(x).scatter(-2, index, x) if back else x.gather(-2, index)

    def _lu_solve(self, right: Tensor, *, adjoint: bool = False) -> Tensor:
        """Solutions (b, n, k) for ``K`` with its rows, or for ``adjoint`` its columns, divided by the diagonal."""
        x = torch.linalg.lu_solve(self.factor, self.pivots, self._ranked(right), adjoint=adjoint)
        return self._ranked(x, back=True)

    def _near(self, log_w: Tensor) -> Tensor:
        """Weights (b, n, n) from node ``k`` to the other side of the cut ``e``, at ``[e, k]``, at the scale of the cut."""
        near: Tensor | None = None
        for base, edges, here in self._windows():
            w = (log_w - base[..., None]).clamp_(max=_CAP).exp_()
            w.diagonal(0, -2, -1).zero_()
            inside = self.below.mT[:, edges]
            part = torch.where(inside > 0, self._outside.mT[:, edges] @ w, inside @ w)
            if isinstance(edges, slice):
                return part
            near = torch.zeros_like(self.below) if near is None else near
            near[:, edges] = torch.where(here[..., None], part, near[:, edges])
        assert near is not None
        return near

    def _windows(self) -> Iterator[tuple[Tensor, Tensor | slice, Tensor]]:
        """For every window its scale (b, 1), the edges that some item has there, and which of them each item has."""
        if not bool((self._window > 0).any()):
            yield self._top, slice(None), torch.ones_like(self.grounded)
            return
        for number in self._window.unique():
            here = self._window == number
            edges = here.any(0).nonzero()[:, 0]
            yield self._top - number * _WINDOW, edges, here[:, edges]

    def _across(self, flow: Tensor, edges: Tensor | slice = slice(None)) -> Tensor:
        """What flows (b, n, n) from node ``j`` to node ``k`` carry out of ``S_e``, for some edges (b, m)."""
        return ((flow @ self._outside[..., edges]) * self.below[..., edges]).sum(-2)

    def log_cut_sums(self, log_f: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms (b, n) of what flows carry out of and into every ``S_e``.

        Args:
            log_f: logarithms of flows from node ``j`` to node ``k``, (b, n, n); the diagonal does not matter.
        """
        out, into = (torch.full_like(self.log_cut, -torch.inf) for _ in range(2))
        for base, edges, here in self._windows():
            f = (log_f - base[..., None]).clamp(max=_CAP).exp()
            for total, flow in ((out, f), (into, f.mT)):
                part = self._across(flow, edges).log() + base
                total[:, edges] = torch.where(here, part, total[:, edges])
        lost = (~self.grounded & ((out == -torch.inf) | (into == -torch.inf))).any(-1)
        if bool(lost.any()):  # one direction is hundreds of nats below the other
            out[lost], into[lost] = (_log_sums(g, self, lost) for g in (log_f[lost], log_f[lost].mT))
        return out.masked_fill(self.grounded, 0.0), into.masked_fill(self.grounded, 0.0)

    def drops(self, share: Tensor) -> Tensor:
        """Drops ``y`` (b, n) across the edges from what every cut receives, as a share of its weight."""
        y = self._lu_solve(share.masked_fill(self.grounded, 0.0)[..., None])[..., 0]
        return y.masked_fill(self.grounded, 0.0)

    def received(self, flow: Tensor | None, right: Tensor | None) -> Tensor:
        """Share of every cut's weight that antisymmetric flows and sources (b, n) send into ``S_e``, (b, n)."""
        total = torch.zeros_like(self.log_cut)
        if flow is not None:
            total = total + self._across(flow)
        if right is not None:
            total = total + (right[:, None, :] @ self.below)[:, 0]
        return total * (-self.log_cut).exp().clamp(max=1e290)

    def received_scaled(self, log_f: Tensor, value: Tensor) -> Tensor:
        """As :meth:`received` for flows ``value * exp(log_f)`` from ``j`` to ``k``, (b, n, n) each, of any smallness."""
        share = torch.zeros_like(self.log_cut)
        for base, edges, here in self._windows():
            f = (log_f - base[..., None]).clamp(max=_CAP).exp() * value
            total = self._across(f - f.mT, edges) * (base - self.log_cut[:, edges]).clamp(max=_WINDOW).exp()
            share[:, edges] = torch.where(here, total, share[:, edges])
        return share

    def potentials(self, y: Tensor) -> Tensor:
        """Potentials (b, n) of drops, zero at the grounded nodes."""
        return (self.below @ y[..., None])[..., 0]

    def differences(self, y: Tensor) -> Tensor:
        """``x_k - x_j`` of the potentials, (b, n, n) at ``[k, j]``, without the drops that the two share."""
        half = (self.below * y[..., None, :]) @ self._outside.mT
        return half - half.mT

    def log_resistances(self) -> Tensor:
        """Logarithms of effective resistances (b, n, n), which are the gradient of the log-determinant in the ties.

        Grown node by node: with ``t_j - t_p`` the path from the parent ``p`` of ``k`` to ``j``, and ``e_k`` the edge
        from ``k`` to ``p``, ``R_jk = R_jp + G_kk - 2 (t_j - t_p)' G e_k`` for ``G`` the inverse of ``K``. Every number is
        kept in units of the weakest cut on its path. Minus infinity on the diagonal and beside grounded nodes' components.
        """
        n = self.grounded.shape[-1]
        eye = torch.eye(n, dtype=self.below.dtype, device=self.below.device).expand_as(self.below)
        share = self._lu_solve(eye)  # G with every column times its cut
        share = share.masked_fill(self.grounded[..., :, None] | self.grounded[..., None, :], 0.0)
        lift = self.below.gather(-2, self.parent[..., None].expand_as(self.below)).mT  # [e, k]: parent of k in S_e
        cross = self.below @ (share * (1.0 - lift)) - self._outside @ (share * lift)
        gain = share.diagonal(0, -2, -1)[..., None, :] - 2.0 * cross  # [j, k]
        value, unit = self._grow(lambda item, node: gain[item, :, node], sign=1.0)
        return torch.where(value > 0, value.log() - unit, -torch.inf)

    def scaled_differences(self, flow: Tensor) -> tuple[Tensor, Tensor]:
        """``x_k - x_j`` at ``[k, j]`` of what flows (b, n, n) raise, as a value and the logarithm of its unit.

        The unit is one over the weakest cut between the two, since potentials may be beyond floating point. What crosses
        an edge is found first, by ``K D^-1 z = h`` with ``D`` the diagonal of ``K``; it is of the order of the flows.
        """
        h = self._across(flow).masked_fill(self.grounded, 0.0)
        z = self._lu_solve(h[..., None], adjoint=True)[..., 0]
        value, unit = self._grow(lambda item, node: z[item, node][:, None], sign=-1.0)
        return value, -unit

    def _grow(self, gain: Callable[[Tensor, Tensor], Tensor], sign: float) -> tuple[Tensor, Tensor]:
        """Sums along the paths between nodes, node by node: of ``gain / cut``, in units of one over the weakest cut.

        ``[k, j]`` is ``[parent of k, j]`` plus ``gain(k)`` over the cut of ``k``, and ``[j, k]`` is ``sign`` times that.
        Returns the values and the logarithms of the weakest cuts, infinite where there is no path.
        """
        item = torch.arange(len(self.parent), device=self.parent.device)
        value = torch.zeros_like(self.below)
        unit = torch.full_like(self.below, torch.inf)
        done = torch.zeros_like(self.grounded)
        for place in range(self.below.shape[-1]):
            node = self.order[:, place]
            up, root = self.parent[item, node], self.grounded[item, node][:, None]
            own = self.log_cut[item, node][:, None]
            at = unit[item, up]
            low = torch.minimum(at, own)
            row = value[item, up] * (low - at).exp() + gain(item, node) * (low - own).exp()
            near = (at < torch.inf) | (torch.arange(len(row[0]), device=row.device) == up[:, None])
            known = done & ~root & near
            row, low = torch.where(known, row, 0.0), torch.where(known, low, torch.inf)
            value[item, node], unit[item, node] = row, low
            value[item, :, node], unit[item, :, node] = sign * row, low
            done[item, node] = True
        return value, unit

    def gaussian(self, noise: Tensor) -> Tensor:
        """Normal variates (k, b, n) with the Laplacian as their precision from standard ones, zero at grounded nodes."""
        scale = 0.5 * (self.log_cut[..., :, None] - self.log_cut[..., None, :])
        permutation, lower, upper = torch.lu_unpack(self.factor, self.pivots)
        rows = self._ranked(self._ranked(permutation @ lower @ upper, back=True).mT, back=True).mT
        even = rows * scale.exp()
        even = torch.where(scale <= 0, even, even.mT)  # the row of the weaker cut says more
        factor = torch.linalg.cholesky(even)
        y: Tensor = torch.linalg.solve_triangular(factor.mT, noise.permute(1, 2, 0), upper=True)
        y = y * (-0.5 * self.log_cut).exp()[..., None]
        return (self.below @ y.masked_fill(self.grounded[..., None], 0.0)).permute(2, 0, 1)

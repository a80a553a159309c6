"""Tensors that users pass by mistake, or rightly but seldom: every layout, dtype, size and value, for hypothesis to draw."""

import dataclasses
import math

import torch
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "offset", "reversed batch")
FLOATS = (torch.float64, torch.float32)
ODD = (torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64)
EXTREMES = (0.0, -0.0, 1e-300, 1e-45, 1e-12, 80.0, -80.0, 750.0, -750.0, 1e4, -1e4, 3e8, 1e30, -1e30, 3e38, 1e300, -1e300)
# hypothesis likes the ends of a range and the first of a list, where what is good stands here
rarely = st.sampled_from([1] * 10 + [0] + [1] * 10)
_BATCHES = st.sampled_from([()] * 6 + [(1,), (2,), (2, 1), (3,)] * 2 + [(0,)])
_SIZES = st.sampled_from([1, 2, 2, 3, 3, 4, 5] * 3 + [0])


@st.composite
def batches(draw):
    """A batch shape; one call's arguments mostly have the same, or none."""
    own = _BATCHES if draw(rarely) == 0 else st.just(())
    return draw(own if draw(st.booleans()) else st.shared(_BATCHES, key="batch"))


@st.composite
def sizes(draw):
    """A size n; one call's arguments mostly have the same."""
    return draw(_SIZES) if draw(rarely) == 0 else draw(st.shared(_SIZES, key="size"))


@dataclasses.dataclass
class Given:
    """A drawn argument, and what it was before the call."""

    value: torch.Tensor

    def __post_init__(self):
        self.before = self.value.detach().clone()
        self.version = self.value._version

    def unchanged(self):
        now = self.value.detach()
        same = torch.equal(now.isnan(), self.before.isnan()) if now.is_floating_point() else True
        values = torch.where(now.isnan(), 0, now), torch.where(self.before.isnan(), 0, self.before)
        return same and torch.equal(*values) and self.value._version == self.version and self.value.grad is None


def laid_out(values, layout):
    """The same values in another layout of memory."""
    if values.dim() == 0 or values.numel() == 0:
        return values
    if layout == "transposed" and values.dim() >= 2:
        return values.mT.contiguous().mT
    if layout == "strided":
        return values.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded" and values.dim() >= 3:
        return values[:1].expand(values.shape)
    if layout == "offset":
        return torch.cat([values.reshape(-1)[:1], values.reshape(-1)])[1:].view(values.shape)
    if layout == "reversed batch" and values.dim() >= 2:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    return values


def as_given(draw, values):
    """In a dtype, layout and with or without a gradient, as drawn."""
    dtype = draw(st.sampled_from(FLOATS if draw(rarely) else ODD))
    if not values.is_floating_point() and dtype in FLOATS:
        dtype = values.dtype
    values = laid_out(values.to(dtype), draw(st.sampled_from(LAYOUTS)))
    if values.is_floating_point() and draw(st.booleans()):
        values = values.requires_grad_()
    return values


def entries(draw, count):
    """So many numbers of one temper."""
    temper = draw(st.sampled_from(["plain", "plain", "ties", "wide", "extreme", "extreme", "constant"]))
    if temper == "constant":
        return [draw(st.sampled_from([*EXTREMES, 1.0, -1.0]))] * count
    one = {
        "plain": st.floats(-3, 3),
        "ties": st.integers(-1, 1).map(float),
        "wide": st.floats(-1e3, 1e3),
        "extreme": st.sampled_from(EXTREMES),
    }[temper]
    return draw(st.lists(one, min_size=count, max_size=count))


def filled(draw, shape, *, forbid=False):
    values = torch.tensor(entries(draw, math.prod(shape)), dtype=torch.float64).reshape(shape)
    if values.numel() and forbid and draw(st.booleans()):
        mask = torch.tensor(draw(st.lists(st.booleans(), min_size=values.numel(), max_size=values.numel()))).reshape(shape)
        if values.dim() >= 2 and shape[-1] == shape[-2] and draw(st.integers(0, 3)):
            mask = mask | torch.eye(shape[-1], dtype=torch.bool)  # some permutation is allowed
        values = values.masked_fill(~mask, -INF)
    if values.numel() and draw(rarely) == 0:
        place = draw(st.integers(0, values.numel() - 1))
        values.reshape(-1)[place] = draw(st.sampled_from([NAN, INF, -INF]))
    return values


@st.composite
def squares(draw, forbid=True):
    """(..., n, n), mostly; -inf forbids pairs."""
    n = draw(sizes())
    shape = (*draw(batches()), n, n)
    if draw(rarely) == 0:
        shape = draw(st.sampled_from([(*shape[:-1], n + 1), shape[-1:], ()]))
    return as_given(draw, filled(draw, shape, forbid=forbid))


@st.composite
def candidates(draw):
    """(..., n, n) of integers, mostly all columns in some order of every row, for logits that forbid some."""
    n = draw(sizes())
    shape = (*draw(batches()), n, n)
    if draw(rarely) == 0:
        shape = draw(st.sampled_from([(*shape[:-1], n + 1), shape[-1:], ()]))
    low, high = (-1, n) if draw(rarely) == 0 else (0, n - 1)
    if shape[-2:] != (n, n) or low < 0 or not n:
        count = math.prod(shape)
        numbers = draw(st.lists(st.integers(low, max(low, high)), min_size=count, max_size=count))
        return as_given(draw, torch.tensor(numbers, dtype=torch.int64).reshape(shape))
    rows = [draw(st.permutations(range(n))) for _ in range(math.prod(shape[:-1]))]
    return as_given(draw, torch.tensor(rows, dtype=torch.int64).reshape(shape))


@st.composite
def rectangles(draw):
    """(..., n, m)."""
    shape = (*draw(batches()), draw(sizes()), draw(st.one_of(sizes(), _SIZES)))
    return as_given(draw, filled(draw, shape, forbid=True))


@st.composite
def vectors(draw):
    """(..., n)."""
    return as_given(draw, filled(draw, (*draw(batches()), draw(sizes()))))


@st.composite
def temperatures(draw):
    """A number or a tensor, mostly positive."""
    number = draw(
        st.sampled_from(
            [1.0, 1.0, 0.5, 2.0, 0.1, 0.01, 1e-3, 10.0, 1e4, 1] if draw(rarely) else [0.0, -1.0, NAN, INF, 1e-40, 1e300]
        )
    )
    if draw(st.booleans()):
        return number
    return as_given(draw, torch.full(draw(batches()), float(number), dtype=torch.float64))


def _orders(draw):
    """Permutations (..., n) as integers."""
    shape, n = draw(batches()), draw(sizes())
    orders = [draw(st.permutations(range(n))) for _ in range(math.prod(shape))]
    return torch.tensor(orders, dtype=torch.int64).reshape(*shape, n)


@st.composite
def permutations(draw):
    """(..., n, n), permutation matrices, mostly."""
    index = _orders(draw)
    values = torch.eye(index.shape[-1], dtype=torch.float64)[index]
    if values.numel() and draw(rarely) == 0:
        values.view(-1)[draw(st.integers(0, values.numel() - 1))] = draw(
            st.sampled_from([0.0, 1.0, 0.5, 2.0, -1.0, NAN, INF])
        )
    return as_given(draw, values)


@st.composite
def index_vectors(draw):
    """(..., n) of integers, mostly permutations."""
    index = _orders(draw)
    if index.numel() and draw(rarely) == 0:
        index.view(-1)[0] = draw(st.sampled_from([-1, index.shape[-1], 2**40]))
    dtype = draw(st.sampled_from([torch.int64] * 6 + [torch.int32, torch.int8, torch.uint8, torch.float32, torch.bool]))
    return laid_out(index.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def plans(draw, log=False):
    """(..., n, n), doubly stochastic to rounding, mostly; or their logarithms."""
    values = filled(draw, (*draw(batches()), *[draw(sizes())] * 2)).nan_to_num(0.0, 0.0, 0.0).clamp(-30, 30)
    for _ in range(200):
        values = values.log_softmax(-1).log_softmax(-2)
    values = values if log else values.exp()
    if values.numel() and draw(rarely) == 0:
        values.reshape(-1)[0] = draw(st.sampled_from([NAN, INF, -INF, 0.3]))
    return as_given(draw, values)


@st.composite
def masks(draw, square=True):
    """(..., n, n) of booleans, mostly."""
    n = draw(sizes())
    shape = (*draw(batches()), n, n if square else draw(_SIZES))
    values = torch.tensor(
        draw(st.lists(st.booleans(), min_size=math.prod(shape), max_size=math.prod(shape))), dtype=torch.bool
    )
    values = values.reshape(shape)
    if square and draw(st.integers(0, 3)):
        values = values | torch.eye(n, dtype=torch.bool)
    kinds = [torch.bool] * 20 + [torch.int64, torch.float64]
    return laid_out(values.to(draw(st.sampled_from(kinds))), draw(st.sampled_from(LAYOUTS)))

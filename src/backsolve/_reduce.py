"""The smallest and the largest value of an expression over large tensors, without a large temporary."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FEW = 32
"""Elements: up to here Python is faster than kernels."""

_PIECE = 2**17  # elements: the temporaries of a piece stay in the cache and in the allocator's pool
_MANY = 2**15  # elements: from here on a cheaper pass pays for a dearer call
_GLANCE = 2**10  # elements: enough to see that a tensor has both signs, if it has them all over

Ends = tuple[float, float]

# Floating-point numbers of one sign are ordered as their bits are, NaN beyond infinity; integers have no NaN to heed,
# which more than halves the time. (64 bits have no such instruction.)
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def extremes(expression: Callable[..., Tensor], *tensors: Tensor) -> Ends:
    """Return the minimum and the maximum of `expression(*tensors)`; NaN twice if any element is NaN.

    Fresh memory costs more than arithmetic: for a million elements on a CPU a temporary is several times as dear as the
    operation that fills it. On other devices each piece would be a synchronisation, so there are none.

    Args:
        expression: elementwise, called with the tensors or with equal pieces of them.
        tensors: of one shape, not empty.
    """
    return _over_pieces(lambda *pieces: _ends_of(expression(*pieces)), tensors)


def magnitudes(expression: Callable[..., Tensor], *tensors: Tensor) -> Ends:
    """Return the smallest and the largest `|expression(*tensors)|`; as in `extremes`."""
    return _over_pieces(lambda *pieces: _ends_of_magnitude(expression(*pieces)), tensors)


def magnitudes_of_one_sign(t: Tensor) -> Ends | None:
    """The smallest and the largest |t| in one pass, without a temporary; None if t has both signs, zeros or NaN."""
    if t.is_complex():
        return None
    if t.numel() > _PIECE and t.is_contiguous() and not ends_of_one_sign(t.view(-1)[:_GLANCE]):
        return None
    ends = ends_of_one_sign(t)
    return ends and (min(map(abs, ends)), max(map(abs, ends)))


def ends_of_one_sign(t: Tensor) -> Ends | None:
    """The minimum and the maximum of real t; None if t has both signs, zeros or NaN."""
    bits = _BITS.get(t.dtype)
    if bits is None or t.numel() < _MANY:
        low, high = _ends(t)
        return (low, high) if low > 0 or high < 0 else None
    first, last = (end.view(t.dtype).item() for end in torch.aminmax(t.detach().resolve_neg().view(bits)))
    if 0 < first <= last:
        return first, last
    return (last, first) if last <= first < 0 else None


def least_magnitude(t: Tensor) -> float:
    """The smallest |t|, without a temporary if all elements have one sign; NaN if any element is."""
    if not t.is_complex():
        if (low := t.amin().item()) > 0:
            return low
        if (high := t.amax().item()) < 0:
            return -high
    return _over_pieces(lambda t: (t.abs().amin().item(),) * 2, (t,))[0]


def least_product(a: Tensor, b: Tensor) -> float:
    """The smallest |a b|; NaN if any is."""

    def ends(a: Tensor, b: Tensor) -> Ends:
        product = torch.mul(a, b)
        least = (product.abs() if product.is_complex() else product.abs_()).amin().item()
        return least, least

    return _over_pieces(ends, (a, b))[0]


def greatest_magnitude(t: Tensor) -> float:
    """The largest |t|; NaN if any element is."""
    if t.is_complex():
        return magnitudes(lambda t: t, t)[1]
    low, high = _ends(t)
    return max(-low, high)


def _over_pieces(ends: Callable[..., Ends], tensors: tuple[Tensor, ...]) -> Ends:
    first = tensors[0]
    if first.numel() <= _PIECE or first.device.type != "cpu" or not all(t.is_contiguous() for t in tensors):
        return ends(*tensors)
    smallest, largest = math.inf, -math.inf
    for pieces in zip(*(t.view(-1).split(_PIECE) for t in tensors), strict=True):
        low, high = ends(*pieces)
        if math.isnan(high):
            return math.nan, math.nan
        smallest, largest = min(smallest, low), max(largest, high)
    return smallest, largest


def _ends(t: Tensor) -> Ends:
    low, high = torch.aminmax(t)
    return low.item(), high.item()


def _ends_of(t: Tensor) -> Ends:
    return ends_of_one_sign(t) or _ends(t)


def _ends_of_magnitude(t: Tensor) -> Ends:
    return magnitudes_of_one_sign(t) or _ends(t.abs())

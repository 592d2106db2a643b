"""The smallest and the largest value of an expression over large tensors, without a large temporary."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PIECE = 2**17  # elements: the temporaries of a piece stay in the cache and in the allocator's pool


def magnitude(t: Tensor) -> Tensor:
    """|t|, in the place of a t that nobody else holds; complex numbers need another place."""
    return t.abs() if t.is_complex() else t.abs_()


def extremes(expression: Callable[..., Tensor], *tensors: Tensor) -> tuple[float, float]:
    """Return the minimum and the maximum of `expression(*tensors)`; NaN twice if any element is NaN.

    Fresh memory costs more than arithmetic: for a million elements on a CPU a temporary is several times as dear as the
    operation that fills it. On other devices each piece would be a synchronisation, so there are none.

    Args:
        expression: elementwise, called with the tensors or with equal pieces of them.
        tensors: of one shape, not empty.
    """
    first = tensors[0]
    if first.numel() <= _PIECE or first.device.type != "cpu" or not all(t.is_contiguous() for t in tensors):
        low, high = torch.aminmax(expression(*tensors))
        return low.item(), high.item()
    smallest, largest = math.inf, -math.inf
    for pieces in zip(*(t.view(-1).split(_PIECE) for t in tensors), strict=True):
        low, high = (t.item() for t in torch.aminmax(expression(*pieces)))
        if math.isnan(high):
            return math.nan, math.nan
        smallest, largest = min(smallest, low), max(largest, high)
    return smallest, largest


def least_magnitude(t: Tensor) -> float:
    """The smallest |t|, without a temporary if all elements have one sign; NaN if any element is."""
    if not t.is_complex():
        low, high = (v.item() for v in torch.aminmax(t))
        if low > 0 or high < 0:
            return min(abs(low), abs(high))
    return extremes(torch.abs, t)[0]


def greatest_magnitude(t: Tensor) -> float:
    """The largest |t|; NaN if any element is."""
    if t.is_complex():
        return extremes(torch.abs, t)[1]
    low, high = (v.item() for v in torch.aminmax(t))
    return max(-low, high)

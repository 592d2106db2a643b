"""The largest magnitude of an expression over large tensors, without a large temporary."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_PIECE = 2**17  # elements: the temporaries of a piece stay in the cache and in the allocator's pool


def largest_magnitude(expression: Callable[..., Tensor], *tensors: Tensor) -> float:
    """Return `max |expression(*tensors)|` of an elementwise expression; NaN if any element is.

    Fresh memory costs more than arithmetic: for a million elements on a CPU a temporary is several times as dear as the
    operation that fills it.

    Args:
        expression: elementwise, called with the tensors or with equal pieces of them.
        tensors: of one shape.
    """
    if not tensors[0].numel():
        return 0.0
    largest = 0.0
    for pieces in zip(*_split(tensors), strict=True):
        low, high = (t.item() for t in torch.aminmax(expression(*pieces)))
        if math.isnan(high):
            return math.nan
        largest = max(largest, -low, high)
    return largest


def _split(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    small = tensors[0].numel() <= _PIECE or tensors[0].device.type != "cpu"  # elsewhere each piece would be a sync
    if small or not all(t.is_contiguous() for t in tensors):
        return [(t,) for t in tensors]
    return [t.view(-1).split(_PIECE) for t in tensors]

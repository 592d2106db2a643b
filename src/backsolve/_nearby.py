"""Components that fail the residual test because of rounding, told by how f changes in their neighbourhood.

Where x is small beside the terms that f adds up, as in a few of the many components of a large event, the rounding
errors of f(y) are not small beside x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backsolve._random import gaussian_like
from backsolve._reduce import FEW

Function = Callable[[Tensor], Tensor]
Positions = Tensor | list[int]

_ROUNDINGS = 64  # of y, that may lie between f(y) and x
_TRIES = 3
_SOME = 1 / 16  # of the components


def solved_but_for_rounding(y: Tensor, x: Tensor, z: Tensor, rtol: float, event_dim: int, value: Function) -> bool:
    """Whether all but a few components pass the free test, and those by what rounding explains, in the fewest kernels.

    Args:
        y: the solution, shape `(*batch, *event)`.
        x: what f(y) should be.
        z: `f(y)`.
        rtol: the relative tolerance.
        event_dim: the number of event dimensions.
        value: evaluates f.
    """
    if y.is_complex():
        return False
    x, y = x.detach(), y.detach()
    off = (z / x).sub_(1).abs_()
    doubtful = (off <= rtol).logical_not_().flatten().nonzero()[:, 0]  # NaN compares false
    (doubtful,) = _chosen(_unequal(z.take(doubtful), x.take(doubtful)), doubtful)
    if len(doubtful) > _SOME * z.numel():
        return False
    return not len(doubtful) or not len(not_bracketed(y, x, z, doubtful, rtol, event_dim, value))


def not_bracketed(
    y: Tensor, x: Tensor | None, z: Tensor, doubtful: Tensor, rtol: float, event_dim: int, value: Function
) -> Tensor:
    """Of some components, by their numbers, those where f does not pass x between two places a few roundings of y away.

    f at `y (1 - width)` and `y (1 + width)` must lie on both sides of x, with f(y) well between them: at a pole or a
    jump it is not. Each component of an event has a random sign, so that little cancels; what does is tried again.
    """
    y, width = y.detach(), _width(y, rtol)
    middle, target = z.take(doubtful), z.new_zeros(len(doubtful)) if x is None else x.detach().take(doubtful)
    event = y.shape[y.dim() - event_dim :]
    signs = gaussian_like(y.new_empty(_TRIES, *event)).sign().unbind() if event else (y.new_ones(()),)
    for away in signs:
        try:
            one, other = (value(y * (side * away).add_(1)).take(doubtful) for side in (-width, width))
        except Exception:  # noqa: BLE001 (f may raise outside its domain, whatever it likes)
            break
        left, before = _not_between(one, middle, other, target), len(doubtful)
        doubtful, middle, target = _chosen(left, doubtful, middle, target)
        if len(doubtful) in (0, before):
            break
    return doubtful


def _not_between(one: Tensor, middle: Tensor, other: Tensor, target: Tensor) -> Positions:
    """Where the target is not between two ends, or the middle not well between them; NaN compares false."""
    if len(target) <= FEW:
        rows = zip(*(t.tolist() for t in (one, middle, other, target)), strict=True)
        return [k for k, row in enumerate(rows) if not _is_between(*row)]
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    amid = torch.minimum(middle - low, high - middle) > (high - low) / 16
    return (~(amid & (low <= target) & (target <= high))).nonzero()[:, 0]


def _is_between(one: float, middle: float, other: float, target: float) -> bool:
    low, high = min(one, other), max(one, other)
    return min(middle - low, high - middle) > (high - low) / 16 and low <= target <= high


def _unequal(a: Tensor, b: Tensor) -> Positions:
    """Where they differ: two infinities are equal, and so are two zeros."""
    if len(a) <= FEW:
        return [k for k, (one, other) in enumerate(zip(a.tolist(), b.tolist(), strict=True)) if one != other]
    return (a != b).nonzero()[:, 0]


def _chosen(positions: Positions, *tensors: Tensor) -> list[Tensor]:
    """These elements of some tensors of one length, mostly all or none."""
    if len(positions) in (0, len(tensors[0])):
        return [t[: len(positions)] for t in tensors]
    return [t[positions] for t in tensors]


def _width(y: Tensor, rtol: float) -> float:
    return min(_ROUNDINGS * torch.finfo(y.dtype).eps, rtol)

"""Components that fail the residual test because of rounding, told by how f changes in their neighbourhood.

Where x is small beside the terms that f adds up, as in a few of the many components of a large event, the rounding
errors of f(y) are not small beside x.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backsolve._random import gaussian_like

Function = Callable[[Tensor], Tensor]

_ROUNDINGS = 64  # of y, that may lie between f(y) and x
_TRIES = 3
_FEW = 1 / 16  # of the components


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
    off = (z / x).sub_(1).abs_().flatten()
    doubtful = (~(off <= rtol)).nonzero()[:, 0]  # NaN compares false
    doubtful = doubtful[z.take(doubtful) != x.take(doubtful)]  # two infinities are equal, and so are two zeros
    if len(doubtful) > _FEW * z.numel():
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
            one, other = (value(y * (1 + side * away)).take(doubtful) for side in (-width, width))
        except Exception:  # noqa: BLE001 (f may raise outside its domain, whatever it likes)
            break
        low, high = torch.minimum(one, other), torch.maximum(one, other)
        amid = torch.minimum(middle - low, high - middle) > (high - low) / 16  # NaN compares false
        left = ~(amid & (low <= target) & (target <= high))
        before = len(doubtful)
        doubtful, middle, target = doubtful[left], middle[left], target[left]
        if len(doubtful) in (0, before):
            break
    return doubtful


def _width(y: Tensor, rtol: float) -> float:
    return min(_ROUNDINGS * torch.finfo(y.dtype).eps, rtol)

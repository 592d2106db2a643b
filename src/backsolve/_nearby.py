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


def solved_but_for_rounding(
    y: Tensor, x: Tensor, z: Tensor, rtol: float, event_dim: int, value: Function, pull: Function | None
) -> bool:
    """Whether all but a few components pass the free test, and those by what rounding explains, in the fewest kernels.

    Args:
        y: the solution, shape `(*batch, *event)`.
        x: what f(y) should be.
        z: `f(y)`.
        rtol: the relative tolerance.
        event_dim: the number of event dimensions.
        value: evaluates f.
        pull: `J^T u` from u, if f has a graph.
    """
    if y.is_complex():
        return False
    n = y.shape[y.dim() - event_dim :].numel()
    x, y = x.detach(), y.detach()
    off = (z / x).sub_(1).abs_().reshape(-1, n)
    if n > 1 and pull is not None:
        events = (~(off.amax(-1) <= rtol)).nonzero()[:, 0]  # NaN compares false
        if not len(events):
            return True
        (_, second), columns = (t.unbind(-1) for t in off[events].topk(2))
        if all(s <= rtol for s in second.tolist()) and _is_rounding(y, x, z, n, rtol, events, columns[0], pull):
            return True
    doubtful = (~(off.flatten() <= rtol)).nonzero()[:, 0]
    doubtful = doubtful[z.take(doubtful) != x.take(doubtful)]  # two infinities are equal, and so are two zeros
    if len(doubtful) > _FEW * z.numel():
        return False
    return not len(doubtful) or not len(not_bracketed(y, x, z, doubtful, rtol, event_dim, value))


def _is_rounding(
    y: Tensor, x: Tensor, z: Tensor, n: int, rtol: float, events: Tensor, columns: Tensor, pull: Function
) -> bool:
    """Whether a few roundings of y explain `|f(y) - x|` in one component of each of some events of n.

    They explain `64 eps sum_j |J_ij y_j|`; one product with J gives these rows of all events. It says nothing of a pole
    or a jump, but there f(y) is off by as much as it is large elsewhere in the event.
    """
    numbers = events * n + columns
    chosen = torch.zeros_like(y, memory_format=torch.contiguous_format)
    chosen.view(-1).index_fill_(0, numbers, 1.0)
    try:
        rows = pull(chosen).reshape(-1, n)[events]
    except Exception:  # noqa: BLE001 (a backward of f may raise whatever it likes)
        return False
    differences = (z.take(numbers) - x.take(numbers)).tolist()
    reaches = (rows * y.reshape(-1, n)[events]).abs_().sum(-1).tolist()
    sizes = z.reshape(-1, n)[events].abs_().amax(-1).tolist()
    width = _width(y, rtol)
    return all(abs(d) <= min(width * r, rtol * s) for d, r, s in zip(differences, reaches, sizes, strict=True))


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

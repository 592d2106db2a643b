"""What solvers that move a whole event at once have in common: where they start, and when an event is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backsolve import errors
from backsolve._linearize import Forward
from backsolve._solution import event_norm, first_index
from backsolve.solvers.base import Found, prototype

Start = float | Tensor | Callable[..., Any] | None


def start_of(init: Start, forward: Forward, x: Tensor | None, solver: str) -> Tensor:
    """Where to start, of the shape of y: what the user says, called like a g if it is a function.

    Else at x or at 0, where f(y) is closer to x: an f that is about the identity is met by the first, one that grows
    fast may overflow there.
    """
    if init is None and x is None:
        expected = "where to start: y has no x to start from"
        raise errors.bad_setting(solver, "init", expected, None)
    like = prototype(forward, x)
    y: Any = x if init is None else init
    if callable(y):
        args, kwargs = forward.arguments.rebuild([t.detach() for t in forward.arguments.tensors])
        y = y(*args, **kwargs) if x is None else y(x, *args, **kwargs)
    y = torch.as_tensor(y, dtype=like.dtype, device=like.device).detach()
    y = y if x is None else y.expand(torch.broadcast_shapes(y.shape, x.shape))
    args, kwargs = forward.arguments.rebuild([t.detach() for t in forward.arguments.tensors])
    z = forward.model.f(y.clone(), *args, **kwargs)  # the params may broadcast it
    shape = torch.broadcast_shapes(y.shape, z.shape) if isinstance(z, Tensor) and z.numel() > y.numel() else y.shape
    y = y.expand(shape).clone()
    return y if init is not None or x is None else _better(y, torch.zeros_like(y), forward, x)


def _better(y: Tensor, other: Tensor, forward: Forward, x: Tensor) -> Tensor:
    """For each event that of two y which is closer to a solution; NaN is not."""
    k = forward.model.event_dim
    distance, of_other = (event_norm(forward.value(t) - x, k) for t in (y, other))
    worse = (of_other < distance) | (~distance.isfinite() & of_other.isfinite())
    return torch.where(worse.reshape(worse.shape + (1,) * k), other, y)


class Progress:
    """Which events are done, and after how many steps."""

    def __init__(self, y: Tensor, event_dim: int) -> None:
        self.event_dim = event_dim
        batch = y.shape[: y.dim() - event_dim]
        self.done = torch.zeros(batch, dtype=torch.bool, device=y.device)
        self.lost = self.done.clone()
        self.steps = torch.zeros(batch, dtype=torch.int32, device=y.device)

    def spread(self, per_event: Tensor) -> Tensor:
        """A value for each event, with the event's dimensions."""
        return per_event.reshape(per_event.shape + (1,) * self.event_dim)

    @property
    def active(self) -> Tensor:
        """The events that go on."""
        return ~(self.done | self.lost)

    def found(self, y: Tensor, error: Callable[[tuple[int, ...], str, int], errors.BacksolveError]) -> Found:
        """The result; events that are not done have failed. `error` gets the first, how many, and its steps."""
        failed = ~self.done
        if not failed.any():
            return Found(y, None, self.steps)
        first = first_index(failed)
        noun = "event" if self.event_dim else "element"
        many = f"{errors.count(int(failed.sum()), failed.numel(), noun)} failed, the first at index {first}"
        steps = int(self.steps[first])
        return Found(y, failed, self.steps, lambda: error(first, many, steps))


def relative_size(step: Tensor, y: Tensor, event_dim: int) -> Tensor:
    """The size of a step beside y, per event in the maximum norm; infinite if it is not finite."""
    tiny = torch.finfo(y.dtype).tiny
    size = event_norm(step, event_dim) / event_norm(y, event_dim).clamp(min=tiny)
    return size.nan_to_num(math.inf, math.inf)

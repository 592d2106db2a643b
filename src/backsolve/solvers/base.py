"""What a solver that is given f, and not g, takes part in a call with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsolve._linearize import Forward
from backsolve.errors import BacksolveError


@dataclass(slots=True)  # frozen, it would take longer to make
class Found:
    """What a solver found for each event.

    Attributes:
        y: the solution, shape `(*batch, *event)`; NaN where there is none to name.
        failed: the events without one, shape `(*batch,)`; None if there is no such event.
        iterations: how often f was evaluated for each event, shape `(*batch,)`; None if that is unknown.
        error: says which events failed, and why; called only if some did.
    """

    y: Tensor
    failed: Tensor | None = None
    iterations: Tensor | None = None
    error: Callable[[], BacksolveError] | None = None


class NumericalSolver(ABC):
    """Solves `f(y, *params) = x` where only f is known.

    It stands in the place of g in `inverse` and `implicit_function`. All tensors that it sees are plain and detached,
    and the batch may have any number of dimensions.
    """

    @abstractmethod
    def find(self, forward: Forward, x: Tensor | None) -> Found:
        """Solve for every event.

        Args:
            forward: f with the params of the call; `forward.value(y)` evaluates it without a graph.
            x: what f(y) should be, detached; None stands for 0.
        """

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        """Refuse to be called like a g: there is no f here."""
        raise TypeError(f"{type(self).__name__} needs f: pass it to inverse(f, solver) or implicit_function(c, solver)")


_LOOK = 4  # steps


def may_look(device: torch.device, step: int) -> bool:
    """Whether to look at values after this step: on a CPU always, elsewhere seldom: each look waits for a device."""
    return device.type == "cpu" or step % _LOOK == _LOOK - 1


def of_params(setting: Any, forward: Forward, like: Tensor) -> Tensor:
    """A setting of a solver as a tensor: a number, a tensor, or a function of the params."""
    if callable(setting):
        args, kwargs = forward.arguments.rebuild([t.detach() for t in forward.arguments.tensors])
        setting = setting(*args, **kwargs)
    return torch.as_tensor(setting, dtype=like.dtype, device=like.device).detach()


def prototype(forward: Forward, x: Tensor | None) -> Tensor:
    """A tensor whose dtype and device y has: x, or the first param of a floating-point type with dimensions."""
    if x is not None:
        return x
    floats = [t for t in forward.arguments.tensors if t.is_floating_point()]
    found = next((t for t in floats if t.dim()), floats[0] if floats else None)
    return torch.empty((), dtype=torch.get_default_dtype()) if found is None else found.detach()

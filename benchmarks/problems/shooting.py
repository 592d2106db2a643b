"""A solver that takes one sample at a time: how fast must a pendulum start to be at an angle after a while?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Problem

_STEPS, _TIME, _FASTEST = 200, 1.0, 4.0


def _angle(velocity: Any, sine: Callable[[Any], Any]) -> Any:
    """Where it is, by the classical method of Runge and Kutta."""
    h, angle = _TIME / _STEPS, 0.0 * velocity
    for _ in range(_STEPS):
        a1 = -sine(angle)
        a2 = -sine(angle + h / 2 * velocity)
        a3 = -sine(angle + h / 2 * velocity + h * h / 4 * a1)
        a4 = -sine(angle + h * velocity + h * h / 2 * a2)
        angle, velocity = (
            angle + h * velocity + h * h / 6 * (a1 + a2 + a3),
            velocity + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4),
        )
    return angle


def shoot(x: Any) -> float:
    """The velocity, in pure Python, which takes its time."""
    low, high = 0.0, _FASTEST
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _angle(middle, math.sin) < x else (low, middle)
    return (low + high) / 2


def _angles(y: Tensor) -> Tensor:
    return _angle(y, torch.sin)


def _velocities(x: Tensor) -> Tensor:
    """All at once."""
    low, high = torch.zeros_like(x), torch.full_like(x, _FASTEST)
    for _ in range(60):
        middle = (low + high) / 2
        below = _angles(middle) < x
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def _in_jax() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    raise ImportError("there is nothing to compare in JAX")


SHOOTING = Problem(
    name="shooting",
    f=_angles,
    g=_velocities,
    exact=_velocities,
    hand=torch.autograd.Function,
    inputs=lambda n: (0.1 + torch.rand(n, dtype=torch.float64),),
    in_jax=_in_jax,
    by_samples=shoot,
)

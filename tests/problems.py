"""One table of problems that drives the tests: f, a g that autograd cannot see into, and the exact answer.

Every g is NumPy code. `exact` is the same function in closed form, written in torch, so autograd gives its derivatives
of any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backsolve import Inverse, inverse
from backsolve.solvers import numpy_solver


@dataclass(frozen=True)
class Problem:
    name: str
    f: Callable[..., Tensor]
    g: Any
    exact: Callable[..., Tensor]
    sample: Callable[[], tuple[Tensor, ...]]  # x and the params, float64, without gradients
    event_dim: int = 0

    def inputs(self) -> tuple[Tensor, ...]:
        """x and the params as leaves that require a gradient."""
        torch.manual_seed(0)
        return tuple(t.double().requires_grad_() for t in self.sample())

    def explicit(self, **options: Any) -> Inverse:
        """The inverse that is given its params."""
        return inverse(self.f, self.g, event_dim=self.event_dim, **options)

    def closed_over(self, x: Tensor, *params: Tensor) -> Tensor:
        """The same function of x and params, but f and g close over the params."""
        constants = [p.detach() for p in params]
        solver = numpy_solver(lambda x: self.g(torch.from_numpy(x), *constants).numpy()) if params else self.g
        return inverse(lambda y: self.f(y, *params), solver, event_dim=self.event_dim)(x)

    def __str__(self) -> str:
        return self.name


def _cubic(x: Any, a: Any, b: Any, m: Any) -> Any:
    """The real root of a y + b y^3 = x for a, b > 0; m is numpy or torch."""
    return 2 * m.sqrt(a / (3 * b)) * m.sinh(m.arcsinh(1.5 * x / a * m.sqrt(3 * b / a)) / 3)


def _matvec(matrix: Any, vector: Any) -> Any:
    return (matrix @ vector[..., None])[..., 0]


def _mixed_sinh(y: Tensor, mix: Tensor, shift: Tensor) -> Tensor:
    return _matvec(mix, torch.sinh(y)) + shift


def _sandwich(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return left @ y @ right


def _well_conditioned(*shape: int) -> Tensor:
    """Matrices with a clearly non-symmetric part and a condition number of a few."""
    return 2 * torch.eye(shape[-1]) + 0.8 * torch.rand(*shape) - 0.4


PROBLEMS = [
    Problem("arcsin", torch.sin, np.arcsin, torch.asin, lambda: (1.8 * torch.rand(5) - 0.9,)),
    Problem(
        "log",
        lambda y, a: a * torch.exp(y),
        numpy_solver(lambda x, a: np.log(x / a)),
        lambda x, a: torch.log(x / a),
        lambda: (torch.rand(2, 3) + 0.5, torch.rand(3) + 0.5),
    ),
    Problem(
        "cubic, broadcast",
        lambda y, a, b: a * y + b * y**3,
        numpy_solver(lambda x, a, b: _cubic(x, a, b, np)),
        lambda x, a, b: _cubic(x, a, b, torch),
        lambda: (torch.randn(4, 1), torch.rand(3) + 0.5, torch.rand(()) + 0.5),
    ),
    Problem(
        "linear",
        lambda y, a: _matvec(a, y),
        numpy_solver(lambda x, a: np.linalg.solve(a, x[..., None])[..., 0]),
        lambda x, a: _matvec(torch.linalg.inv(a), x),
        lambda: (torch.randn(3, 4), _well_conditioned(3, 4, 4)),
        event_dim=1,
    ),
    Problem(
        "mixed sinh",
        _mixed_sinh,
        numpy_solver(lambda x, mix, shift: np.arcsinh(np.linalg.solve(mix, (x - shift)[..., None])[..., 0])),
        lambda x, mix, shift: torch.asinh(_matvec(torch.linalg.inv(mix), x - shift)),
        lambda: (torch.randn(2, 3), _well_conditioned(3, 3), torch.randn(3)),
        event_dim=1,
    ),
    Problem(
        "polar",
        lambda y: torch.stack([y[..., 0] * y[..., 1].cos(), y[..., 0] * y[..., 1].sin()], -1),
        numpy_solver(lambda x: np.stack([np.hypot(x[..., 0], x[..., 1]), np.arctan2(x[..., 1], x[..., 0])], -1)),
        lambda x: torch.stack([torch.hypot(x[..., 0], x[..., 1]), torch.atan2(x[..., 1], x[..., 0])], -1),
        lambda: (torch.rand(2, 2, 2) + 0.3,),
        event_dim=1,
    ),
    Problem(
        "sandwich",
        _sandwich,
        numpy_solver(lambda x, left, right: np.linalg.inv(left) @ x @ np.linalg.inv(right)),
        lambda x, left, right: torch.linalg.inv(left) @ x @ torch.linalg.inv(right),
        lambda: (torch.randn(2, 2, 2), _well_conditioned(2, 2), _well_conditioned(2, 2)),
        event_dim=2,
    ),
]

BY_NAME = {p.name: p for p in PROBLEMS}

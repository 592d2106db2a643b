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

from backsolve import Banded, Dense, Diagonal, Inverse, MatrixFree, Triangular, inverse
from backsolve.jacobians import Jacobian
from backsolve.solvers import numpy_solver


@dataclass(frozen=True)
class Problem:
    name: str
    f: Callable[..., Tensor]
    g: Any
    exact: Callable[..., Tensor]
    sample: Callable[[], tuple[Tensor, ...]]  # x and the params, float64, without gradients
    event_dim: int = 0
    structures: tuple[Jacobian, ...] = ()  # true claims about J, beside the default

    def inputs(self) -> tuple[Tensor, ...]:
        """x and the params as leaves that require a gradient."""
        torch.manual_seed(0)
        return tuple(t.double().requires_grad_() for t in self.sample())

    def explicit(self, **options: Any) -> Inverse:
        """The inverse that is given its params."""
        return inverse(self.f, self.g, event_dim=self.event_dim, **options)

    def closed_over(self, x: Tensor, *params: Tensor, **options: Any) -> Tensor:
        """The same function of x and params, but f and g close over the params."""
        constants = [p.detach() for p in params]
        solver = numpy_solver(lambda x: self.g(torch.from_numpy(x), *constants).numpy()) if params else self.g
        return inverse(lambda y: self.f(y, *params), solver, event_dim=self.event_dim, **options)(x)

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


def _bands(d: Any, l: Any, u: Any, m: Any) -> Any:  # noqa: E741
    """Tridiagonal matrices with the diagonals d, l, u; m is numpy or torch."""
    embed = torch.diag_embed if m is torch else lambda v, k: np.apply_along_axis(np.diag, -1, v, k)
    return embed(d, 0) + embed(l, -1) + embed(u, 1)


def _lower(a: Any) -> Any:
    """The lower triangle of a, with a diagonal that is far from zero."""
    return a.tril() if isinstance(a, Tensor) else np.tril(a)


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
        structures=(Banded(3, 3), MatrixFree(rtol=1e-15)),
    ),
    Problem(
        "elementwise vector",
        lambda y, a: a * torch.sinh(y),
        numpy_solver(lambda x, a: np.arcsinh(x / a)),
        lambda x, a: torch.asinh(x / a),
        lambda: (torch.randn(2, 4), torch.rand(4) + 0.5),
        event_dim=1,
        structures=(
            Diagonal(),
            Banded(0, 0),
            Banded(1, 2),
            Triangular(),
            Triangular(upper=True),
            Dense(symmetric=True),
            Dense(positive_definite=True),
            MatrixFree(rtol=1e-15),
            MatrixFree("bicgstab", rtol=1e-15),
        ),
    ),
    Problem(
        "tridiagonal",
        lambda y, d, lo, up: _matvec(_bands(d, lo, up, torch), torch.sinh(y)),
        numpy_solver(lambda x, d, lo, up: np.arcsinh(np.linalg.solve(_bands(d, lo, up, np), x[..., None])[..., 0])),
        lambda x, d, lo, up: torch.asinh(_matvec(torch.linalg.inv(_bands(d, lo, up, torch)), x)),
        lambda: (torch.randn(2, 5), 2 + torch.rand(5), torch.rand(4) - 0.5, torch.rand(4)),
        event_dim=1,
        structures=(Banded(1, 1), Banded(2, 1), MatrixFree(rtol=1e-15), MatrixFree("bicgstab", rtol=1e-15)),
    ),
    Problem(
        "triangular",
        lambda y, a: _matvec(_lower(a), torch.sinh(y)),
        numpy_solver(lambda x, a: np.arcsinh(np.linalg.solve(_lower(a), x[..., None])[..., 0])),
        lambda x, a: torch.asinh(_matvec(torch.linalg.inv(_lower(a)), x)),
        lambda: (torch.randn(2, 3), _well_conditioned(3, 3)),
        event_dim=1,
        structures=(Triangular(), Banded(2, 0), MatrixFree(rtol=1e-15)),
    ),
    Problem(
        "triangular from above",
        lambda y, a: _matvec(_lower(a).mT, torch.sinh(y)),
        numpy_solver(lambda x, a: np.arcsinh(np.linalg.solve(_lower(a).swapaxes(-1, -2), x[..., None])[..., 0])),
        lambda x, a: torch.asinh(_matvec(torch.linalg.inv(_lower(a).mT), x)),
        lambda: (torch.randn(2, 3), _well_conditioned(3, 3)),
        event_dim=1,
        structures=(Triangular(upper=True), Banded(0, 2)),
    ),
]

CLAIMS = [(p, s) for p in PROBLEMS for s in p.structures]
BY_NAME = {p.name: p for p in PROBLEMS}

"""One implicit step of reaction and diffusion on a line: f(y) = y + k (2 y_i - y_{i-1} - y_{i+1}) + y^3.

J is tridiagonal and symmetric. Gradients of x and of the diffusivity k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from backsolve import Banded
from benchmarks.case import Problem


def _laplacian(y: Tensor) -> Tensor:
    ghosts = pad(y, (1, 1))
    return 2 * y - ghosts[..., :-2] - ghosts[..., 2:]


def f(y: Tensor, k: Tensor) -> Tensor:
    return y + k * _laplacian(y) + y**3


def _by_lapack(below: Tensor, diagonal: Tensor, above: Tensor, b: Tensor) -> Tensor:
    from scipy.linalg import lapack

    u = lapack.dgtsv(*(t.contiguous().numpy() for t in (below, diagonal, above, b)))[3]
    return torch.from_numpy(u).reshape(b.shape)


def _solve(y: Tensor, k: Tensor, b: Tensor) -> Tensor:
    beside = (-k).expand(len(y) - 1)
    return _by_lapack(beside, 1 + 2 * k + 3 * y**2, beside, b)


@torch.no_grad()
def newton(x: Tensor, k: Tensor) -> Tensor:
    y = x / (1 + x.abs())
    for _ in range(100):
        step = _solve(y, k, f(y, k) - x)
        y = y - step
        if step.abs().max() <= 8 * torch.finfo(y.dtype).eps * y.abs().max():
            break
    return y


def _exact(x: Tensor, k: Tensor) -> Tensor:
    """A Newton step that autograd sees, with J at a y that it does not: right to first order."""
    y = newton(x.detach(), k.detach())
    return y - _Constant.apply(y, k.detach(), f(y, k) - x)


class _Constant(torch.autograd.Function):
    """`J^-1 b` for a constant J, by SciPy's solver of banded systems."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, k: Tensor, b: Tensor) -> Tensor:
        ctx.given = y, k
        return _banded(y, k, b)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, _banded(*ctx.given, v)


def _banded(y: Tensor, k: Tensor, b: Tensor) -> Tensor:
    from scipy.linalg import solve_banded

    bands = torch.stack([(-k).expand_as(y), 1 + 2 * k + 3 * y**2, (-k).expand_as(y)])
    return torch.from_numpy(solve_banded((1, 1), bands.numpy(), b.numpy()))


class _Hand(torch.autograd.Function):
    """The bands of J from the formula, and one call of LAPACK."""

    @staticmethod
    def forward(ctx: Any, g: Callable[..., Tensor], x: Tensor, k: Tensor) -> Tensor:
        y = g(x, k)
        ctx.save_for_backward(y, k)
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        y, k = ctx.saved_tensors
        w = _solve(y, k, v)
        return None, w, -(w * _laplacian(y)).sum()


class _ThreePasses(torch.autograd.Function):
    """The bands of J by three vector-Jacobian products, one for every third row, and one call of LAPACK."""

    @staticmethod
    def forward(ctx: Any, f: Callable[..., Tensor], g: Callable[..., Tensor], x: Tensor, k: Tensor) -> Tensor:
        y = g(x, k)
        ctx.f = f
        ctx.save_for_backward(y, k)
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        y, k = ctx.saved_tensors
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            x = ctx.f(y, k)
        n = len(y)
        below, diagonal, above = v.new_empty(n), v.new_empty(n), v.new_empty(n)
        rows = []
        for colour in range(3):
            u = v.new_zeros(n)
            u[colour::3] = 1
            rows.append(torch.autograd.grad(x, y, u, retain_graph=True)[0])
        for j in range(3):
            above[j::3] = rows[(j - 1) % 3][j::3]
            diagonal[j::3] = rows[j][j::3]
            below[j::3] = rows[(j + 1) % 3][j::3]
        w = _by_lapack(above[1:], diagonal, below[:-1], v)  # the transpose of J
        return None, None, w, *torch.autograd.grad(x, k, -w)


def _inputs(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)


REACTION_DIFFUSION = Problem(
    name="reaction-diffusion",
    f=f,
    g=newton,
    exact=_exact,
    hand=_Hand,
    inputs=_inputs,
    in_jax=lambda: (f, None),
    event_dim=1,
    floor=_ThreePasses,
    structures={"Banded": Banded(1, 1)},
)

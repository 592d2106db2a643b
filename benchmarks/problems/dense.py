"""Every element of an event depends on every other: f(y) = y + tanh(W y) / 2, with gradients of x and W."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backsolve import Dense, MatrixFree
from benchmarks.case import Problem


def mixed(m: Any) -> Callable[..., Any]:
    """f, for y of shape (*batch, n) and W of shape (n, n); m is torch or jax.numpy."""
    return lambda y, weight: y + 0.5 * m.tanh(y @ weight.T)


f = mixed(torch)


@torch.no_grad()
def fixed_point(x: Tensor, weight: Tensor) -> Tensor:
    """Iterate `y = x - tanh(W y) / 2`, a contraction where the spectral norm of W is below 2."""
    y = x
    for _ in range(1000):
        previous, y = y, x - 0.5 * torch.tanh(y @ weight.T)
        if (y - previous).abs().max() <= 4 * torch.finfo(y.dtype).eps * y.abs().max():
            break
    return y


def slope(y: Tensor, weight: Tensor) -> Tensor:
    """The derivative of `tanh(W y) / 2` with respect to `W y`."""
    return 0.5 * (1 - torch.tanh(y @ weight.T).square())


def jacobian(y: Tensor, weight: Tensor) -> Tensor:
    """`J = 1 + diag(slope) W`, of shape (*batch, n, n)."""
    return torch.eye(len(weight), dtype=y.dtype, device=y.device) + slope(y, weight)[..., None] * weight


def _exact(x: Tensor, weight: Tensor) -> Tensor:
    """Two Newton steps that autograd sees: the first makes y right to first order, the second to third order."""
    y = fixed_point(x, weight).detach()
    for _ in range(2):
        y = y - torch.linalg.solve(jacobian(y, weight), f(y, weight) - x)
    return y


class _Hand(torch.autograd.Function):
    """`w = J^-T v` by LU; the gradient of W is `-(slope w) y^T`, summed over the batch."""

    @staticmethod
    def forward(ctx: Any, g: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
        y = g(x, weight)
        ctx.save_for_backward(y, weight)
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        y, weight = ctx.saved_tensors
        s = slope(y, weight)
        j = torch.eye(len(weight), dtype=y.dtype, device=y.device) + s[..., None] * weight
        w = torch.linalg.solve(j.mT, v)
        return None, w, -(s * w).mT @ y


def _inputs(n: int, batch: int) -> tuple[Tensor, Tensor]:
    """W with a spectral norm of about 1.4."""
    return torch.randn(batch, n, dtype=torch.float64), 0.7 * n**-0.5 * torch.randn(n, n, dtype=torch.float64)


def _in_jax() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    import jax.numpy as jnp

    return mixed(jnp), None


DENSE = Problem(
    name="dense",
    f=f,
    g=fixed_point,
    exact=_exact,
    hand=_Hand,
    inputs=_inputs,
    in_jax=_in_jax,
    entries=jacobian,
    event_dim=1,
    structures={"Dense": Dense(), "GMRES": MatrixFree(), "BiCGSTAB": MatrixFree("bicgstab")},
    contracts=True,
)

"""Residual blocks, f(y) = y + s(y): a convolution of an image, and the dense one in float32.

Where s contracts, the adjoint by hand is a fixed-point iteration, `w = v - s'(y)^T w`, which forms no matrix. With a
stronger s it is GMRES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

from backsolve import MatrixFree
from benchmarks.case import Problem
from benchmarks.problems.dense import DENSE, slope


def _image(y: Tensor) -> Tensor:
    side = round(y.shape[-1] ** 0.5)
    return y.reshape(1, 1, side, side)


def f(y: Tensor, kernel: Tensor) -> Tensor:
    return y + 0.5 * torch.tanh(conv2d(_image(y), kernel, padding=1)).reshape(y.shape)


def _adjoint_by_iteration(v: Tensor, pull: Callable[[Tensor], Tensor], rtol: float) -> Tensor:
    """Solve `w + s'^T w = v`."""
    w = v
    for _ in range(500):
        previous, w = w, v - pull(w)
        if (w - previous).abs().max() <= rtol * w.abs().max():
            break
    return w


@torch.no_grad()
def fixed_point(x: Tensor, kernel: Tensor) -> Tensor:
    y = x
    for _ in range(1000):
        previous, y = y, x - (f(y, kernel) - y)
        if (y - previous).abs().max() <= 4 * torch.finfo(y.dtype).eps * y.abs().max():
            break
    return y


class _ConvolutionByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Callable[..., Tensor], x: Tensor, kernel: Tensor) -> Tensor:
        y = g(x, kernel)
        ctx.save_for_backward(y, kernel)
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        y, kernel = ctx.saved_tensors
        image = _image(y)
        slope = 0.5 * (1 - torch.tanh(conv2d(image, kernel, padding=1)).square())

        def pull(w: Tensor) -> Tensor:
            return conv_transpose2d(slope * _image(w), kernel, padding=1).reshape(w.shape)

        w = _adjoint_by_iteration(v, pull, 1e-10 if v.dtype == torch.float64 else 1e-6)
        patches = torch.nn.functional.unfold(image, 3, padding=1)[0]  # (9, n)
        return None, w, -(patches @ (slope.reshape(-1) * w)).reshape(kernel.shape)


class _DenseByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
        y = g(x, weight)
        ctx.save_for_backward(y, weight)
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        y, weight = ctx.saved_tensors
        s = slope(y, weight)
        w = _adjoint_by_iteration(v, lambda w: (s * w) @ weight, 1e-6)
        return None, w, -(s * w).mT @ y


def _exact(x: Tensor, kernel: Tensor) -> Tensor:
    """The fixed point and then steps that autograd sees: their derivatives are the iteration of the adjoint."""
    y = fixed_point(x.detach(), kernel.detach())
    for _ in range(60):
        y = x - (f(y, kernel) - y)
    return y


def _inputs(n: int) -> tuple[Tensor, Tensor]:
    """A kernel whose sum of magnitudes is 1.2: the convolution halves distances by 0.6."""
    kernel = torch.rand(1, 1, 3, 3, dtype=torch.float64) - 0.4
    return torch.randn(n, dtype=torch.float64), 1.2 * kernel / kernel.abs().sum()


CONVOLUTION = Problem(
    name="convolution",
    f=f,
    g=fixed_point,
    exact=_exact,
    hand=_ConvolutionByHand,
    inputs=_inputs,
    in_jax=lambda: (f, None),
    event_dim=1,
    structures={"GMRES": MatrixFree(), "BiCGSTAB": MatrixFree("bicgstab")},
)

DENSE_FLOAT32 = replace(
    DENSE,
    name="dense in float32",
    hand=_DenseByHand,
    dtype=torch.float32,
    structures={"GMRES": MatrixFree(), "BiCGSTAB": MatrixFree("bicgstab")},
)

"""Elementwise and cheap: f = sin, so whatever is not the mathematics shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Problem


class _Hand(torch.autograd.Function):
    """`dy = dx / cos y`."""

    @staticmethod
    def forward(ctx: Any, g: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = g(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        return None, v / y.cos()


class _Composable(torch.autograd.Function):
    """The same with everything that torch.func asks for."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.asin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] / ctx.saved_tensors[0].cos()

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return _Composable.apply(x), in_dims[0]


def _in_jax() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    import jax.numpy as jnp

    return jnp.sin, jnp.arcsin


ARCSIN = Problem(
    name="arcsin",
    f=torch.sin,
    g=torch.asin,
    exact=torch.asin,
    hand=_Hand,
    composable=_Composable,
    inputs=lambda n, *batch: (0.1 + 0.8 * torch.rand(*batch, n),),
    in_jax=_in_jax,
    closed_form=torch.asin,
    entries=torch.cos,
    dtype=torch.float32,
    remembered=False,
    contracts=True,
)

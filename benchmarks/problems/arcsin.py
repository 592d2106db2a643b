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


def _in_jax() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    import jax.numpy as jnp

    return jnp.sin, jnp.arcsin


ARCSIN = Problem(
    name="arcsin",
    f=torch.sin,
    g=torch.asin,
    exact=torch.asin,
    hand=_Hand,
    inputs=lambda n, *batch: (0.1 + 0.8 * torch.rand(*batch, n),),
    in_jax=_in_jax,
    closed_form=torch.asin,
    entries=torch.cos,
    dtype=torch.float32,
    remembered=False,
    contracts=True,
)

"""Only f is known, a distribution function: its quantiles are to be found between two bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Problem

_WEIGHTS, _MEANS, _SCALES = (0.3, 0.7), (-1.0, 2.0), (0.5, 1.0)


def _gamma_cdf(y: Tensor, shape: Tensor) -> Tensor:
    return torch.special.gammainc(shape, y)


def _gamma_quantile(x: Tensor, shape: Tensor) -> Tensor:
    from scipy.special import gammaincinv

    return torch.from_numpy(gammaincinv(shape.numpy(), x.numpy()))


def _mixture_cdf(y: Tensor) -> Tensor:
    parts = zip(_WEIGHTS, _MEANS, _SCALES, strict=True)
    first, second = (weight * torch.special.ndtr((y - mean) / scale) for weight, mean, scale in parts)
    return first + second


def _mixture_quantile(x: Tensor) -> Tensor:
    """Bisection to the last bit."""
    low, high = torch.full_like(x, -40.0), torch.full_like(x, 40.0)
    for _ in range(100):
        middle = (low + high) / 2
        below = _mixture_cdf(middle) < x
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def _in_jax() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    raise ImportError("there is nothing to compare in JAX")


GAMMA = Problem(
    name="gamma quantile",
    f=_gamma_cdf,
    g=_gamma_quantile,
    exact=_gamma_quantile,
    hand=torch.autograd.Function,
    inputs=lambda n: (torch.rand(n, dtype=torch.float64), 0.5 + 14.5 * torch.rand(n, dtype=torch.float64)),
    in_jax=_in_jax,
    bounds=(0.0, math.inf),
)

MIXTURE = Problem(
    name="quantile of a mixture",
    f=_mixture_cdf,
    g=_mixture_quantile,
    exact=_mixture_quantile,
    hand=torch.autograd.Function,
    inputs=lambda n: (torch.rand(n, dtype=torch.float64),),
    in_jax=_in_jax,
    bounds=(-math.inf, math.inf),
)

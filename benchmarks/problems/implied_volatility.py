"""Elementwise with params: the volatility that an option price implies, with all its greeks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Problem


def black(m: Any, erfc: Callable[..., Any]) -> Callable[..., Any]:
    """Black's price of a call as a function of volatility, forward, strike and expiry; m is torch or jax.numpy."""

    def price(volatility: Any, forward: Any, strike: Any, expiry: Any) -> Any:
        deviation = volatility * m.sqrt(expiry)
        d = m.log(forward / strike) / deviation + deviation / 2
        return (forward * erfc(-(0.5**0.5) * d) - strike * erfc(0.5**0.5 * (deviation - d))) / 2

    return price


black_price = black(torch, torch.erfc)


def greeks(y: Tensor, forward: Tensor, strike: Tensor, expiry: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivatives of Black's price with respect to volatility, forward, strike and expiry."""
    root = expiry.sqrt()
    deviation = y * root
    d = (forward / strike).log() / deviation + deviation / 2
    vega = forward * root * (-0.5 * d * d).exp() * (2 * torch.pi) ** -0.5
    delta, digital = torch.erfc(-(0.5**0.5) * d) / 2, torch.erfc(0.5**0.5 * (deviation - d)) / 2
    return vega, delta, -digital, vega * y / (2 * expiry)


def _vega(y: Tensor, forward: Tensor, strike: Tensor, expiry: Tensor) -> Tensor:
    root = expiry.sqrt()
    d = (forward / strike).log() / (y * root) + y * root / 2
    return forward * root * (-0.5 * d * d).exp() * (2 * torch.pi) ** -0.5


@torch.no_grad()
def newton(x: Tensor, forward: Tensor, strike: Tensor, expiry: Tensor) -> Tensor:
    """Newton's method from the point of inflection, whence it converges monotonically (Manaster and Koehler 1982)."""
    y = (2 * (forward / strike).log().abs() / expiry).sqrt().clamp(min=1e-3)
    for _ in range(50):
        step = (black_price(y, forward, strike, expiry) - x) / _vega(y, forward, strike, expiry)
        y = y - step
        if (step.abs() <= 1e-9 * y).all():  # it converges quadratically: the next step would be rounding
            break
    return y


def _exact(x: Tensor, *params: Tensor) -> Tensor:
    """Two Newton steps that autograd sees: the first makes y right to first order, the second to third order."""
    y = newton(x.detach(), *(p.detach() for p in params))
    for _ in range(2):
        y = y - (black_price(y, *params) - x) / _vega(y, *params)
    return y


class _Hand(torch.autograd.Function):
    """`dy = (dx - price_p dp) / vega`."""

    @staticmethod
    def forward(ctx: Any, g: Callable[..., Tensor], x: Tensor, *params: Tensor) -> Tensor:
        y = g(x, *params)
        ctx.save_for_backward(y, *params)
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        vega, delta, dual_delta, theta = greeks(*ctx.saved_tensors)
        w = v / vega
        return None, w, -w * delta, -w * dual_delta, -w * theta


def _quotes(n: int) -> tuple[Tensor, ...]:
    """Prices of calls between 20 % in and 20 % out of the money."""
    uniform = torch.rand(4, n, dtype=torch.float64)
    volatility, strike, expiry = 0.1 + 0.4 * uniform[0], 80 + 40 * uniform[1], 0.25 + 1.75 * uniform[2]
    forward = 95 + 10 * uniform[3]
    return black_price(volatility, forward, strike, expiry), forward, strike, expiry


def _in_jax() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    import jax
    import jax.numpy as jnp

    return black(jnp, jax.scipy.special.erfc), None


IMPLIED_VOLATILITY = Problem(
    name="implied volatility",
    f=black_price,
    g=newton,
    exact=_exact,
    hand=_Hand,
    inputs=_quotes,
    in_jax=_in_jax,
    entries=_vega,
)

"""The volatility that an option price implies: Black's formula, inverted by Jäckel's "Let's be rational"."""

from collections.abc import Callable

import numpy as np
import torch
from mpmath import mp
from py_lets_be_rational import implied_volatility_from_a_transformed_rational_guess
from torch import Tensor

from backsolve import inverse
from backsolve.solvers import numpy_solver
from tests.real_cases.case import Case
from tests.real_cases.ndtri import normal_cdf


def call_price(volatility: Tensor, forward: Tensor, strike: Tensor, expiry: Tensor) -> Tensor:
    """The undiscounted price of a call."""
    deviation = volatility * expiry.sqrt()
    d = (forward / strike).log() / deviation + deviation / 2
    return forward * normal_cdf(d) - strike * normal_cdf(d - deviation)


def put_price(volatility: Tensor, forward: Tensor, strike: Tensor, expiry: Tensor) -> Tensor:
    """The undiscounted price of a put, by symmetry: parity with the call would cancel digits."""
    return call_price(volatility, strike, forward, expiry)


def call_price_mp(volatility, forward, strike, expiry):
    deviation = volatility * mp.sqrt(expiry)
    d = mp.log(forward / strike) / deviation + deviation / 2
    return forward * mp.ncdf(d) - strike * mp.ncdf(d - deviation)


def put_price_mp(volatility, forward, strike, expiry):
    return call_price_mp(volatility, forward, strike, expiry) - (forward - strike)


def quotes(kind: str, q: int, price: Callable, price_mp: Callable, rows: list[list[float]]) -> Case:
    """Options with rows of price, forward, strike and years to expiry."""

    @np.vectorize
    def implied_volatility(*quote: float) -> float:
        return implied_volatility_from_a_transformed_rational_guess(*quote, q)

    inv = inverse(price, numpy_solver(implied_volatility))
    args = tuple(torch.tensor(rows, dtype=torch.float64).T)
    return Case(f"py_lets_be_rational, {kind}", inv, price_mp, args)


CALLS = [
    [7.97, 100.0, 100.0, 1.0],  # at the money
    [16.9, 100.0, 85.0, 2.0],  # in the money
    [1.25, 100.0, 140.0, 0.5],  # out of the money
    [0.25, 100.0, 150.0, 0.25],
    [0.31, 100.0, 110.0, 1 / 52],
    [24.0, 30.0, 90.0, 5.0],  # a volatility of 140 %
]
PUTS = [
    [7.97, 100.0, 100.0, 1.0],
    [41.5, 100.0, 140.0, 0.5],  # in the money
    [0.08, 100.0, 70.0, 0.5],  # out of the money
    [0.0021, 1.25, 1.2, 0.1],
]

CASES = [
    quotes("calls", +1, call_price, call_price_mp, CALLS),
    quotes("puts", -1, put_price, put_price_mp, PUTS),
]

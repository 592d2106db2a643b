"""Who inverts an f of which only bounds of y are known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from backsolve import inverse
from backsolve.solvers import Bracket
from benchmarks.case import Case, Run

_WIDEST = 100.0  # for those who need finite bounds


def evaluation(case: Case) -> Run | None:
    """f at the solution, once: the unit."""
    if case.problem.bounds is None:
        return None
    y, params = case.y, case.inputs[1:]
    return lambda: [case.problem.f(y, *params)]


def bracket(case: Case) -> Run | None:
    """Everything on."""
    if case.problem.bounds is None:
        return None
    return case.run(inverse(case.problem.f, Bracket(*case.problem.bounds)))


def bisection(case: Case) -> Run | None:
    """Fifty steps, as most write it."""
    if case.problem.bounds is None:
        return None
    f, (lower, upper) = case.problem.f, _finite(case)

    def bisect(x: Tensor, *params: Tensor) -> Tensor:
        low, high = torch.full_like(x, lower), torch.full_like(x, upper)
        for _ in range(50):
            middle = (low + high) / 2
            below = f(middle, *params) < x
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    return case.run(bisect)


def scipy(case: Case) -> Run | None:
    """`scipy.optimize.elementwise.find_root`: Chandrupatla's method, compacting, with our f."""
    if case.problem.bounds is None:
        return None
    from scipy.optimize import elementwise

    def difference(y: Any, x: Any, *params: Any) -> Any:
        return case.problem.f(torch.from_numpy(y), *map(torch.from_numpy, params)).numpy() - x

    def find_root(x: Tensor, *params: Tensor) -> Tensor:
        args = tuple(t.numpy() for t in (x, *params))
        return torch.from_numpy(elementwise.find_root(difference, _finite(case), args=args).x)

    return case.run(find_root)


def _finite(case: Case) -> tuple[float, float]:
    assert case.problem.bounds is not None
    lower, upper = case.problem.bounds
    return max(lower, -_WIDEST), _WIDEST if math.isinf(upper) else upper

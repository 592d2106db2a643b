"""Finite differences that know their own error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_RATIO = 4.0  # between one step and the next


@dataclass(frozen=True)
class Estimate:
    """A derivative by finite differences and a bound on its error, elementwise; inf where none is known."""

    value: Tensor
    error: Tensor


def derivative(phi: Callable[[float], Tensor], noise: Tensor, *, first: float = 0.05, levels: int = 7) -> Estimate:
    """The derivative of phi at 0, by central differences extrapolated to step 0.

    Args:
        phi: a function of a step; may raise or return NaN outside its domain.
        noise: how far the values of phi are uncertain by rounding, elementwise.
        first: the largest step.
        levels: how many steps, each a quarter of the one before.

    Reference:
        C. J. F. Ridders, Accurate computation of F'(x) and F'(x)F''(x), Advances in Engineering Software 4 (1982).
    """
    best = Estimate(torch.full_like(noise, torch.nan), torch.full_like(noise, torch.inf))
    row: list[Tensor] = []
    for level in range(levels):
        step = first / _RATIO**level
        above = row
        row = [_central(phi, step, noise)]
        for order, coarse in enumerate(above, 1):
            fine = row[-1]
            row.append(fine + (fine - coarse) / (_RATIO ** (2 * order) - 1))
            error = torch.maximum((row[-1] - fine).abs(), (row[-1] - coarse).abs()) + 2 * noise / step
            better = error < best.error  # NaN is never better
            best = Estimate(torch.where(better, row[-1], best.value), torch.where(better, error, best.error))
    return best


def _central(phi: Callable[[float], Tensor], step: float, like: Tensor) -> Tensor:
    try:
        return (phi(step) - phi(-step)) / (2 * step)
    except Exception:  # noqa: BLE001 (f and g may raise outside their domain, whatever they like)
        return torch.full_like(like, torch.nan)

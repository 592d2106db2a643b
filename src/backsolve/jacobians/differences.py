"""A witness that autograd's J is the derivative of the values of f.

A `.detach()` on y, a no_grad, a way through NumPy, a hook, a cache or a Function with a wrong backward make it another
one, and every gradient wrong without a word. Two evaluations of f settle the common case. Only if they disagree with J
are tables of ever smaller steps made, in some directions; a unit is convicted if in most of them no step agrees with J,
and three in a row agree with each other. Kinks, steps and oscillations agree with J once the step
is small; rounding noise agrees with nothing, nor with itself; at the end of its domain f raises or is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backsolve._random import gaussian_like
from backsolve.jacobians.base import Assembled, Linearized

_STEPS = 4.0 ** -torch.arange(6, dtype=torch.float64)  # relative to the first
_SAME = 0.05  # how much a difference may change from step to step, relative to itself
_NOISE = 30.0  # how far a difference must stand above the noise of the values
_DIRECTIONS, _ENOUGH = 5, 3  # a coupling may vanish along some of them


def find_false_derivative(
    at: Linearized, assembled: Assembled, unit_dims: int
) -> tuple[tuple[int, ...], float, float] | None:
    """Compare the slope of `u . f(y)` along a direction t, of its values, with `J^T u . t`.

    Differences below a quarter of the digits are not looked for.

    Args:
        at: f at y.
        assembled: J.
        unit_dims: the number of rightmost dimensions that form one unit; 0: each element.

    Returns:
        The index of the first unit where they differ, and both slopes there, by J and by values; None if there is none.
    """
    eps = torch.finfo(at.y.dtype).eps
    if not at.y.numel() or at.y.is_complex() or eps > 1e-4:  # 16 bits are too few for differences
        return None
    first = _Line(at, assembled, unit_dims, 0)
    try:
        step = eps ** (1 / 3)  # balances rounding and curvature
        slope = (first.value(step) - first.value(-step)) / (2 * step)
        if not ((slope - first.by_jacobian).abs() > first.noticed + first.noise / step).any():  # NaN compares false
            return None
        slope, false = first.convict()
        others = [_Line(at, assembled, unit_dims, number).convict()[1] for number in range(1, _DIRECTIONS)]
        false = torch.stack([false, *others]).sum(0) >= _ENOUGH
    except Exception:  # noqa: BLE001 (outside its domain f may raise whatever it likes)
        return None
    if not false.any():
        return None
    index = tuple(int(i) for i in false.nonzero()[0])
    return index, first.by_jacobian[index].item(), slope[index].item()


class _Line:
    """`u . f` along a line through y, for each unit."""

    def __init__(self, at: Linearized, assembled: Assembled, unit_dims: int, number: int) -> None:
        y = at.y.detach()
        eps = torch.finfo(y.dtype).eps
        gaussian = gaussian_like(y.expand(_DIRECTIONS + 1, *y.shape))
        self.at, self.unit_dims, self.y = at, unit_dims, y
        self.u, self.t = gaussian[-1], gaussian[number] * _size(y)
        terms = assembled.transposed_times(self.u) * self.t
        self.by_jacobian = self._per_unit(terms)
        self.noticed = eps**0.25 * self._per_unit(terms.abs())
        self.noise = eps * self._per_unit((self.u * at.value).abs())
        self.first = (0.02 if y.dtype is torch.float64 else 0.1) * (1 - 0.15 * number)

    def value(self, step: float) -> Tensor:
        return self._per_unit(self.u * self.at.moved(self.y + step * self.t).value)

    def convict(self) -> tuple[Tensor, Tensor]:
        """The slope of each unit, and where it is certain that it is another than that by J."""
        steps = self.first * _STEPS
        ahead, behind = (torch.stack([self.value(sign * step) for step in steps.tolist()]) for sign in (1, -1))
        here = self._per_unit(self.u * self.at.value)
        steps = steps.reshape(-1, *(1,) * here.dim()).to(here)
        slopes = (ahead - behind) / (2 * steps)
        off, second = (slopes - self.by_jacobian).abs(), (ahead + behind - 2 * here).abs()
        # Second differences of small steps are noise, or a kink: then slopes of larger steps mean little.
        noise = torch.maximum(self.noise, second[-2:].amax(0)) / steps
        clear = off > self.noticed + _NOISE * noise
        same = slopes.diff(dim=0).abs() <= _SAME * off[1:]
        lasting = (clear[:-2] & clear[1:-1] & clear[2:] & same[:-1] & same[1:]).any(0)
        # No step may agree with J, nor vanish in rounding; NaN compares false throughout.
        return slopes[3], lasting & ((off > self.noticed) & (ahead != behind)).all(0)

    def _per_unit(self, t: Tensor) -> Tensor:
        return t.flatten(-self.unit_dims).sum(-1) if self.unit_dims else t


def _size(y: Tensor) -> Tensor:
    """|y|, and where that is 0 the size of y elsewhere: small steps keep signs and domains."""
    size = y.abs().nan_to_num(0.0, 0.0)
    typical = size.sum() / (size > 0).sum().clamp(min=1)
    return torch.where(size > 0, size, torch.where(typical > 0, typical, 1.0))

"""A witness that autograd's J is the derivative of the values of f, and the derivative of J that of the values of J.

A `.detach()` on y, a no_grad, a way through NumPy, a hook, a cache or a Function with a wrong backward make it another
one, and every gradient wrong without a word. Two evaluations of f settle the common case. Only if they disagree with J
are tables of ever smaller steps made, in some directions; a unit is convicted if in most of them no step agrees with J,
and three in a row agree with each other, and smaller ones with them, up to noise. Kinks, steps and oscillations agree
with J once the step is small; rounding noise agrees with nothing, nor with itself; at the end of its domain f raises or
is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backsolve._random import gaussian_like
from backsolve.jacobians.base import Assembled, Linearized

_STEPS = 4.0 ** -torch.arange(6, dtype=torch.float64)  # relative to the first
_SAME = 0.05  # how much a difference may change from step to step, relative to itself
_NOISE = 30.0  # how far a difference must stand above the noise of the values
_DRIFT = 2.0  # how many times that noise a difference of smaller steps may be off
_DIRECTIONS, _ENOUGH = 5, 3  # a coupling may vanish along some of them

Contradiction = tuple[tuple[int, ...], float, float]
"""The index of the first unit where two slopes differ, the one that autograd gave, and that of the values."""


def find_false_derivative(at: Linearized, assembled: Assembled, unit_dims: int) -> Contradiction | None:
    """Compare the slope of `u . f(y)` along a direction t, of its values, with `J^T u . t`.

    Differences below a quarter of the digits are not looked for.

    Args:
        at: f at y.
        assembled: J.
        unit_dims: the number of rightmost dimensions that form one unit; 0: each element.
    """

    def line(number: int) -> _Line:
        u, _, t = _directions(at.y, number)
        return _Line(lambda y: u * at.moved(y).value, u * at.value, assembled.transposed_times(u), t, unit_dims, number)

    return _contradiction(at.y, line)


def find_false_curvature(at: Linearized, unit_dims: int) -> Contradiction | None:
    """The same for the gradients that f has, `J^T v` and `f_p^T v`: do they change with y as autograd says?

    A backward that is not differentiable loses a term of every second derivative: `torch.cond` has one, as has a
    Function that detaches what it saved.
    """

    def by_y(number: int) -> _Line:
        u, v, t = _directions(at.y, number)

        def products(at: Linearized) -> Tensor:
            return u * (at.pull(v) if at.known is None else _folded(at.known, u.dim()))

        return _Line(lambda y: products(at.moved(y)), *_differentiated(at, products), t, unit_dims, number)

    def by_inputs(number: int) -> _Line:
        _, v, t = _directions(at.y, number)

        def total(at: Linearized) -> Tensor:
            pulled = [p for p in at.pull_inputs(v, [True] * len(at.inputs)) if p is not None]
            return torch.stack([(gaussian_like(p) * p).sum() for p in pulled]).sum() if pulled else at.y.new_zeros(())

        return _Line(lambda y: total(at.moved(y)), *_differentiated(at, total), t, at.y.dim(), number)

    return _contradiction(at.y, by_y) or _contradiction(at.y, by_inputs)


def _differentiated(at: Linearized, function: Callable[[Linearized], Tensor]) -> tuple[Tensor, Tensor]:
    """A function of f at y, and the gradient by y of its sum."""
    with torch.enable_grad():
        value = function(at)
        slope = None
        if value.requires_grad:  # the graph of known entries is there once, for all directions
            (slope,) = torch.autograd.grad(value.sum(), at.y, retain_graph=True, allow_unused=True)
    return value.detach(), torch.zeros_like(at.y) if slope is None else slope


def _folded(entries: Tensor, dims: int) -> Tensor:
    """A weighted sum of the entries of J over the dimensions that they have more than y."""
    return (gaussian_like(entries) * entries).flatten(dims).sum(-1) if entries.dim() > dims else entries


def _contradiction(y: Tensor, line: Callable[[int], _Line]) -> Contradiction | None:
    eps = torch.finfo(y.dtype).eps
    if not y.numel() or y.is_complex() or eps > 1e-4:  # 16 bits are too few for differences
        return None
    try:
        first = line(0)
        step = eps ** (1 / 3)  # balances rounding and curvature
        slope = (first.value(y, step) - first.value(y, -step)) / (2 * step)
        if not ((slope - first.by_autograd).abs() > first.noticed + first.noise / step).any():  # NaN compares false
            return None
        slope, false = first.convict(y)
        others = [line(number).convict(y)[1] for number in range(1, _DIRECTIONS)]
        false = torch.stack([false, *others]).sum(0) >= _ENOUGH
    except Exception:  # noqa: BLE001 (outside its domain f may raise whatever it likes)
        return None
    if not false.any():
        return None
    index = tuple(int(i) for i in false.nonzero()[0])
    return index, first.by_autograd[index].item(), slope[index].item()


def _directions(y: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two Gaussian cotangents, and one of some directions in which to move y."""
    *directions, v, u = gaussian_like(y.detach().expand(_DIRECTIONS + 2, *y.shape))
    t = directions[number]
    return u, v, torch.copysign(t.abs().clamp(min=0.5), t) * _size(y.detach())  # no step drowns in rounding


class _Line:
    """A function of y along a line, summed over each unit.

    Args:
        function: what is watched, elementwise or as one number.
        here: its value at y.
        slope: the gradient of its sum by y.
        t: the direction of the line.
        unit_dims: the number of rightmost dimensions that form one unit.
        number: that of the line.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], here: Tensor, slope: Tensor, t: Tensor, unit_dims: int, number: int
    ) -> None:
        eps = torch.finfo(t.dtype).eps
        self.function, self.t, self.unit_dims = function, t, unit_dims
        self.here = self._per_unit(here)
        self.by_autograd = self._per_unit(slope * t)
        self.noticed = eps**0.25 * self._per_unit((slope * t).abs())
        self.noise = eps * self._per_unit(here.abs())
        self.first = (0.02 if t.dtype is torch.float64 else 0.1) * (1 - 0.15 * number)

    def value(self, y: Tensor, step: float) -> Tensor:
        return self._per_unit(self.function(y.detach() + step * self.t))

    def convict(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The slope of each unit, and where it is certain that it is another than that by autograd."""
        steps = self.first * _STEPS
        ahead, behind = (torch.stack([self.value(y, sign * step) for step in steps.tolist()]) for sign in (1, -1))
        steps = steps.reshape(-1, *(1,) * self.here.dim()).to(self.here)
        slopes = (ahead - behind) / (2 * steps)
        off, second = (slopes - self.by_autograd).abs(), (ahead + behind - 2 * self.here).abs()
        # Second differences of small steps are noise, or a kink: then slopes of larger steps mean little.
        noise = torch.maximum(self.noise, second[-2:].amax(0)) / steps
        clear = off > self.noticed + _NOISE * noise
        same = slopes.diff(dim=0).abs() <= _SAME * off[1:]
        agreed = clear[:-2] & clear[1:-1] & clear[2:] & same[:-1] & same[1:]
        # What large steps agree on must hold for the smaller ones, too: an oscillation has another slope at large.
        allowed = _SAME * off[2:, None] + _DRIFT * noise
        strays = (slopes - slopes[2:, None]).abs() > allowed  # (triple, step, *units)
        lasting = (agreed & ~torch.stack([s[k + 3 :].any(0) for k, s in enumerate(strays)])).any(0)
        # No step may agree with autograd, nor vanish in rounding; NaN compares false throughout.
        return slopes[3], lasting & ((off > self.noticed) & (ahead != behind)).all(0)

    def _per_unit(self, t: Tensor) -> Tensor:
        return t.flatten(-self.unit_dims).sum(-1) if self.unit_dims and t.dim() else t


def _size(y: Tensor) -> Tensor:
    """|y|, and where that is 0 the size of y elsewhere: small steps keep signs and domains."""
    size = y.abs().nan_to_num(0.0, 0.0)
    typical = size.sum() / (size > 0).sum().clamp(min=1)
    return torch.where(size > 0, size, torch.where(typical > 0, typical, 1.0))

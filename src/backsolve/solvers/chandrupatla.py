"""Bracketing in a batch, by interpolation where that is safe and by halving where it is not.

Each element has three points: `c`, the newest; `o`, on the other side of the root; `p`, the one before. Chandrupatla's
test tells whether a parabola through them, taken as the inverse function, can be trusted; else the straight line
through c and p is followed if it stays inside the bracket, else the bracket is halved. All this happens in coordinates
in which the usual f is nearly straight: those of `Domain` for y, and those of `Level` for f(y).

T. R. Chandrupatla, A new hybrid quadratic/bisection algorithm for finding the zero of a nonlinear function without
using derivatives, Advances in Engineering Software 28 (1997) 145-149.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from backsolve.solvers.domain import Domain, from_ordinal, ordinal

Evaluate = Callable[[Tensor, list[Tensor]], Tensor]  # f(y, params) for some of the elements

_PERIOD = 4  # after so many steps a bracket is halved, unless the search has become fast
_PATIENCE = 16  # after so many steps only a smaller bracket counts: at a multiple root |v| falls fast, y creeps
NEAR = range(5, 12)  # the steps that most searches end with: then the cheaper coordinates will do
_FARTHEST = 0.9  # coordinate of the farthest first step: to 19 times the distance from the end of a half-line


@dataclass
class Level:
    """How far f(y) is from x, in a coordinate in which the range of f is the whole line.

    With r = f(y) - x and f between `low` and `high`,

        v = logit((f - low) / (high - low)) - logit((x - low) / (high - low))
          = log1p(r (1 / (x - low) + 1 / (high - x)) (high - x) / (high - f)),

    so the tails of a distribution function become straight. An infinite bound drops out. An f without any has
    v = sign(r) log1p(|r| / max(|x|, 1)).
    """

    x: Tensor
    low: Tensor
    per_below: Tensor  # 1 / (x - low), 0 for an infinite low
    at_low: Tensor  # what then stands for (f - low) / (x - low): 1
    high: Tensor
    per_above: Tensor
    at_high: Tensor
    slope: Tensor  # dv / dr at x
    resolution: Tensor
    """The v of an r of four units in the last place of x."""
    bounded: bool

    @staticmethod
    def of(x: Tensor, low: Tensor, high: Tensor) -> Level:
        """Given the smallest and the largest value of f, which may be infinite."""
        largest, eps = torch.finfo(x.dtype).max, torch.finfo(x.dtype).eps
        has_low, has_high = low.isfinite(), high.isfinite()
        bounded = bool((has_low | has_high).any())
        size = x.abs().clamp_(min=1)
        below = torch.where(has_low, (1 / (x - low)).clamp_(0, largest), torch.where(has_high, 0.0, 1 / size))
        above = torch.where(has_high, (1 / (high - x)).clamp_(0, largest), torch.where(has_low, 0.0, 1 / size))
        at_low, at_high = (has_high & ~has_low).to(x.dtype), (has_low & ~has_high).to(x.dtype)
        low = low if bool(has_low.all()) else torch.where(has_low, low, x - size)
        high = high if bool(has_high.all()) else torch.where(has_high, high, x + size)
        slope = below + above if bounded else below
        resolution = (x.abs() * slope).mul_(4 * eps).log1p_()
        return Level(x, low, below, at_low, high, above, at_high, slope, resolution, bounded)

    def __call__(self, z: Tensor, near: bool) -> Tensor:
        """The v of f(y) = z: 0 exactly where z = x, and of the sign of z - x elsewhere.

        `near` saves the care for a z so close to `low` that v would be rounded to log(eps).
        """
        limits = torch.finfo(z.dtype)
        z = z.clamp(-limits.max, limits.max)  # inf * 0 is NaN, as is inf / inf
        r = z - self.x
        if not self.bounded:
            return (r.abs() * self.slope).log1p_().copysign_(r)
        above = torch.addcmul(self.at_high, self.high - z, self.per_above).clamp_(limits.tiny, limits.max)
        change = r.mul_(self.slope).div_(above)
        if near:
            return change.clamp_(min=-1).log1p_()
        far_below = torch.addcmul(self.at_low, z - self.low, self.per_below).clamp_(min=0).div_(above).log_()
        return torch.where(change < -0.5, far_below, change.log1p_())


@dataclass
class Brackets:
    """The state of some of the elements, each tensor of shape `(k,)`, or `()` if all elements share it."""

    index: Tensor
    c: Tensor
    v: Tensor
    """The level at c, as the next two are at the other points; 0 where c is the solution, NaN where f(c) is."""
    o: Tensor
    v_o: Tensor
    p: Tensor
    v_p: Tensor
    done: Tensor
    steps: Tensor
    width: Tensor
    """How many floating-point numbers lay in the bracket at the last look, and |v| then."""
    height: Tensor
    domain: Domain
    level: Level
    params: list[Tensor]

    def step(self, f: Evaluate, count: int) -> None:
        """Evaluate f once more, for every element."""
        near = count in NEAR
        if near:
            y = self._interpolated_nearby()
        else:
            y = self._interpolated(count) if count else self._guessed()
        period = _PERIOD if count < _PATIENCE else _PERIOD // 2
        if count % period == period - 1:
            y = self._halved_if_stalled(y, count)
        self._move(torch.where(self.done, self.c, y), f, near)

    def _guessed(self) -> Tensor:
        """The first step: most often `log |dv / du|` is about log 2, be f a distribution function or a power."""
        half = self.v.abs() / 2
        u = (half / (1 + half)).nan_to_num(_FARTHEST).clamp(max=_FARTHEST)
        (u_o,) = self.domain.coordinates(self.c, self.o)
        return self._inside(self.domain.step(self.c, torch.minimum(u, u_o.abs() / 2).copysign(u_o)))

    def _interpolated(self, count: int) -> Tensor:
        c, v, v_o, v_p, eps = self.c, self.v, self.v_o, self.v_p, torch.finfo(self.c.dtype).eps
        u_o, u_p = self.domain.coordinates(c, self.o, self.p)
        line = u_p * (v / (v - v_p))
        phi, xi = (v - v_o) / (v_p - v_o), u_o / (u_o - u_p)
        parabola = line * (v_o / (v_o - v_p)) + u_o * ((v / (v_o - v)) * (v_p / (v_o - v_p)))
        u = torch.where((phi * phi < xi) & ((1 - phi) ** 2 < 1 - xi), parabola, line)
        ahead = (u * u_o > 0) & ((u.abs() < u_o.abs()) | v_o.isinf())  # NaN compares false
        farthest = 1 - max((1 - _FARTHEST) ** 2 ** min(count - 1, 6), eps)  # 19, 199, 2e4, 2e8, ... times the distance
        size = torch.minimum(torch.where(ahead, u, u_o / 2).abs(), farthest * u_o.abs())
        return self._inside(self.domain.step(c, size.copysign(u_o)))

    def _interpolated_nearby(self) -> Tensor:
        """The same with `y - c` for the coordinate."""
        c, v, v_o, v_p, limits = self.c, self.v, self.v_o, self.v_p, torch.finfo(self.c.dtype)
        room, back = self.o - c, self.p - c
        rise_o, rise_p, v_op = v_o - v, v_p - v, v_o - v_p
        line = (v * back).div_(rise_p).neg_()
        xi = room / (room - back)
        trusted = ((rise_o / v_op).square_() < xi) & ((rise_p / v_op).square_() < 1 - xi)
        parabola = torch.addcmul(line * (v_o / v_op), v / rise_o, room * (v_p / v_op))
        step, direction = torch.where(trusted, parabola, line), room.sign()
        ahead = (step * direction > 0) & (step.abs() < room.abs())  # NaN compares false
        size = torch.where(ahead, step, room / 2).abs_()
        least = c.abs().clamp_(min=limits.tiny).mul_(2 * limits.eps)
        y = torch.addcmul(c, torch.maximum(size, least), direction)
        return torch.where((self.o - y) * direction > 0, y, c + room / 2)

    def _inside(self, step: Tensor) -> Tensor:
        """c and a step towards o: not all the way, yet large enough to cross a root that is a rounding error away."""
        limits = torch.finfo(self.c.dtype)
        room = self.o - self.c
        size = torch.maximum(step.abs(), (2 * limits.eps) * self.c.abs().clamp_(min=limits.tiny))
        y = self.c + torch.minimum(size, room.abs()).copysign(room)
        return torch.where(y == self.o, self.c + room / 2, y)

    def _halved_if_stalled(self, y: Tensor, count: int) -> Tensor:
        """Halve a bracket, by the count of its floating-point numbers, unless it or |v| has become much smaller."""
        rank_c, rank_o = ordinal(self.c), ordinal(self.o)
        width, height = (rank_c.to(y.dtype) - rank_o.to(y.dtype)).abs(), self.v.abs()
        stalled = ~((width < self.width / 4) | ((height < self.height / 1000) & (count < _PATIENCE)))
        self.width, self.height = width, height
        middle = (rank_c >> 1) + (rank_o >> 1) + (rank_c & rank_o & 1)
        return torch.where(stalled, from_ordinal(middle, y.dtype), y)

    def _move(self, y: Tensor, f: Evaluate, near: bool) -> None:
        v = self.level(f(y, self.params), near)
        ahead = (v < 0) == (self.v < 0)  # the root is still between y and o
        to_c = ahead | self.v_o.isinf()  # a line through a point at infinity says nothing
        self.p, self.v_p = torch.where(to_c, self.c, self.o), torch.where(to_c, self.v, self.v_o)
        self.o, self.v_o = torch.where(ahead, self.o, self.c), torch.where(ahead, self.v_o, self.v)
        self.c, self.v = y, v
        self.steps = self.steps + ~self.done
        self.done = self.done | self._solved()

    def _solved(self) -> Tensor:
        """Whether x is met to its last places, or the sign of f(y) - x changes within those of y, or all is lost.

        Four units in the last place of y are enough if f looks straight there: if by the slope of the line through c
        and p the root is at most two away. Beside a steep end of f, c and o must be neighbours.
        """
        limits = torch.finfo(self.c.dtype)
        height, room = self.v.abs(), (self.o - self.c).abs_()
        grain = limits.eps * self.c.abs().clamp_(min=limits.tiny)
        rise = (self.v_p - self.v).abs_()
        straight = height * (self.p - self.c).abs_() <= (2 * grain) * rise
        pinched = (room < grain) | ((room <= 4 * grain) & straight)
        return (height <= self.level.resolution) | pinched | self.v.isnan()

    def best(self) -> tuple[Tensor, Tensor]:
        """The better end of each bracket, and its level."""
        other = self.v_o.abs() < self.v.abs()
        return torch.where(other, self.o, self.c), torch.where(other, self.v_o, self.v)


def part(state: Any, chosen: Tensor | slice) -> Any:
    """The chosen elements of a tensor, or of all tensors in a list or dataclass; `()` stands for all elements."""
    if isinstance(state, Tensor):
        if not state.dim():
            return state
        return state[chosen] if isinstance(chosen, slice) else state.index_select(0, chosen)
    if isinstance(state, list):
        return [part(s, chosen) for s in state]
    if is_dataclass(state):
        return type(state)(*(part(getattr(state, f.name), chosen) for f in fields(state)))
    return state


def joined(states: Sequence[Any]) -> Any:
    """The inverse of `part`: several states as one."""
    first = states[0]
    if isinstance(first, Tensor):
        return torch.cat(list(states)) if first.dim() else first
    if isinstance(first, list):
        return [joined(s) for s in zip(*states, strict=True)]
    if is_dataclass(first):
        return type(first)(*(joined([getattr(s, f.name) for s in states]) for f in fields(first)))
    return first

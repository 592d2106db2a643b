"""Inverse interpolation in a batch, without brackets: for elements of which a close start is known.

The first step is Newton's, the second follows the line through two points, and each further one the parabola, taken as
the inverse function, through three. Nothing holds a step back, so most elements need few evaluations and little else,
and some run away. What is accepted is as good as what `Brackets` accept; the others are searched from the beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve.solvers.base import may_look
from backsolve.solvers.chandrupatla import Evaluate, part
from backsolve.solvers.domain import Domain

_CLEAR = 2**7  # how many rounding errors a difference must have for a slope to be believed
_CLOSE = 2**-13  # and how large it may be, beside y: far out in a tail of f a chord says nothing of the slope


@dataclass
class Secants:
    """The state of some of the elements, each tensor of shape `(k,)`, or `()` if all elements share it."""

    index: Tensor
    x: Tensor
    params: list[Tensor]
    domain: Domain
    y: Tensor
    r: Tensor
    """f(y) - x; the next is that of the point before."""
    r_before: Tensor
    chord: Tensor
    """The change of y by that of f(y) from the point before to this one; at first dy/dx."""
    bend: Tensor
    """What the parabola adds: the change of the chord with r."""
    slope: Tensor
    """The last chord between two points that were close, yet stood out from rounding errors; NaN before."""
    done: Tensor
    steps: Tensor

    @staticmethod
    def at(
        index: Tensor, x: Tensor, params: list[Tensor], domain: Domain, y: Tensor, z: Tensor, slope: Tensor
    ) -> Secants:
        """At a first y between the bounds, with z = f(y) and dy/dx there."""
        r, none, unknown = z - x, torch.zeros_like(x), torch.full_like(x, torch.nan)
        one = torch.ones_like(index, dtype=torch.int32)
        return Secants(index, x, params, domain, y, r, none, slope, none, unknown, _solved(r.abs(), x), one)

    def run(self, f: Evaluate, tries: int, note: Callable[[Tensor, Tensor, Tensor], None]) -> Tensor:
        """Take some steps, tell `note` the index, y and steps of what is done, and return the index of the others."""
        state = self
        for count in range(tries):
            if count and may_look(self.y.device, count):
                state = state._rest(note, 0.8)
            state._step(f, count)
        return state._rest(note, 1.0).index

    def _step(self, f: Evaluate, count: int) -> None:
        y, r, chord = self.y, self.r, self.chord
        move = chord * r if count < 2 else torch.addcmul(chord, self.r_before, self.bend, value=-1).mul_(r)
        self.y = self.domain.inside(y - move, y)
        self.r = f(self.y, self.params) - self.x
        run, rise = self.y - y, self.r - r
        self.chord = run / rise
        if count:
            self.bend = (self.chord - chord).div_(self.r - self.r_before)
        eps, size, before, far, distance = torch.finfo(y.dtype).eps, self.r.abs(), r.abs(), self.y.abs(), run.abs_()
        grain = _CLEAR * eps
        clear = (before > grain * self.x.abs()) & (distance > grain * far) & (distance < _CLOSE * far)
        self.slope = torch.where(clear & (8 * size < before), self.chord, self.slope)
        self.r_before = r
        self.steps = self.steps + ~self.done
        self.done = _solved(size, self.x) | ((size * self.slope).abs_() <= (2 * eps) * far)

    def _rest(self, note: Callable[[Tensor, Tensor, Tensor], None], most: float) -> Secants:
        """Note the solutions, and go on with the elements that have none; or with all if these are more than most."""
        left = (~self.done).nonzero()[:, 0]
        if len(left) > most * len(self.y):
            return self
        done = self.done.nonzero()[:, 0]
        note(*(t.index_select(0, done) for t in (self.index, self.y, self.steps)))
        return part(self, left)


def _solved(size: Tensor, x: Tensor) -> Tensor:
    """Whether |r| is within four units in the last place of x."""
    return size <= (4 * torch.finfo(x.dtype).eps) * x.abs()

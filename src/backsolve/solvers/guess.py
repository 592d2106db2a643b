"""Where y is, as far as a few elements that have been solved can tell about all others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_TERMS = 56  # at most: evaluating the polynomial is to cost less than one evaluation of a dear f
_DEGREES = range(3, 17)
_OUTLIERS = 0.005  # the share of the elements on either side that the polynomial need not describe
_RIDGE = 1e-13  # beside the squares of the features: params may depend on each other
_LOGARITHMIC = 10.0  # a positive param that varies by more than this factor is one of scale


@dataclass(frozen=True)
class Scale:
    """A coordinate that sends an interval to the whole line.

    It is `log((t - low) / (high - t))` with two finite ends, `log |t - end|` with one, and `asinh(t / unit)` with none:
    what distribution functions and powers make of each other is nearly straight in these. `middle` and `width` are such
    that most numbers of interest lie between -1 and 1.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    unit: float = 1.0
    middle: float = 0.0
    width: float = 1.0

    def fitted(self, ts: Tensor, outliers: float) -> Scale:
        """The same interval, for numbers like these, but for a share of outliers on either side."""
        unit = float(ts.abs().nanmedian()) or 1.0
        s = Scale(self.low, self.high, unit)(ts)
        ends = s.new_tensor([outliers, 1 - outliers])
        first, last = s[s.isfinite()].quantile(ends).tolist()
        return Scale(self.low, self.high, unit, (first + last) / 2, (last - first) / 2 or 1.0)

    def __call__(self, t: Tensor) -> Tensor:
        """The coordinate of t."""
        low, high = self.low, self.high
        if low is not None and high is not None:
            s = ((t - low) / (high - t)).log_()
        elif low is not None:
            s = (t - low).log_()
        elif high is not None:
            s = (high - t).log_().neg_()
        else:
            s = (t / self.unit).asinh_()
        return s.sub_(self.middle).mul_(1 / self.width)

    def slope(self, t: Tensor) -> Tensor:
        """The derivative of the coordinate at t."""
        low, high = self.low, self.high
        if low is not None and high is not None:
            rate = (high - low) / ((t - low) * (high - t))
        elif (end := low if high is None else high) is None:
            rate = t.square().add_(self.unit**2).rsqrt_()
        else:
            rate = (t - end).abs_().reciprocal_()
        return rate.mul_(1 / self.width)

    def inverse(self, s: Tensor) -> Tensor:
        """The number with this coordinate."""
        low, high, s = self.low, self.high, s * self.width + self.middle
        if low is not None and high is not None:
            return low + (high - low) * s.sigmoid_()
        if low is not None:
            return low + s.exp_()
        return s.sinh_() * self.unit if high is None else high - s.neg_().exp_()


class Guess(Protocol):
    """Something that has been learned of the inverse function."""

    def __call__(self, x: Tensor, params: Sequence[Tensor], domain: Scale) -> tuple[Tensor, Tensor | None]:
        """y and the derivative dy/dx, if that is known, too; both without any guarantee.

        Args:
            x: of some elements.
            params: theirs, as far as they have a value for each element.
            domain: where y lies.
        """
        ...


@dataclass(frozen=True)
class Table:
    """y of x, the same function for all elements, as a cubic between each two of equidistant points."""

    x: Scale
    cells: list[Tensor]
    """The four coefficients of each cubic, the leading one first."""

    @staticmethod
    def learned(y: Tensor, x: Scale) -> Table:
        """The cubic through the four next points, where y belongs to equidistant coordinates from -1 to 1."""
        p, q, r, s = y[:-3], y[1:-2], y[2:-1], y[3:]
        return Table(x, [(s - p) / 6 + (q - r) / 2, (p + r) / 2 - q, r - p / 3 - q / 2 - s / 6, q])

    def __call__(self, x: Tensor, params: Sequence[Tensor], domain: Scale) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """See `Guess`; outside of the table the last cubic goes on."""
        count = len(self.cells[0])
        per_unit = (count + 2) / 2
        place = self.x(x).add_(1).mul_(per_unit).sub_(1)
        cell = place.floor().clamp_(0, count - 1).nan_to_num_(0.0)
        t, index = place.sub_(cell), cell.int()
        value, slope = self.cells[0].index_select(0, index), torch.zeros_like(t)
        for c in self.cells[1:]:
            slope = slope.mul_(t).add_(value)
            value = value.mul_(t).add_(c.index_select(0, index))
        return value, slope.mul_(self.x.slope(x)).mul_(per_unit)


@dataclass(frozen=True)
class Surface:
    """y as a polynomial of x and of the params that belong to elements, each in a coordinate of its own."""

    x: Scale
    params: list[Scale]
    degree: int
    coefficients: list[float]

    @staticmethod
    def learned(y: Tensor, x: Tensor, params: Sequence[Tensor], domain: Scale, image: Scale) -> Surface | None:
        """The polynomial of the highest degree that pays, fitted to elements that have been solved.

        Args:
            y: the solutions, NaN where there is none.
            x: what they belong to.
            params: those that have a value for each element.
            domain: where y lies; it has the numbers of these elements.
            image: the interval between the extremes of f, if they are the same for all elements.
        """
        count = 1 + len(params)
        degrees = [d for d in _DEGREES if math.comb(d + count, count) <= _TERMS]
        values = domain(y)
        good = values.isfinite() & image(x).isfinite()
        if not degrees or int(good.sum()) < 4 * _TERMS:
            return None
        x, params, values = x[good], [p[good].to(x.dtype) for p in params], values[good]
        surface = Surface(image.fitted(x, _OUTLIERS), [_scale_of(p) for p in params], degrees[-1], [])
        x_s = surface.x(x)
        usual = x_s.abs() <= 1
        variables = [x_s[usual].double(), *(s(p[usual]).double() for s, p in zip(surface.params, params, strict=True))]
        features = torch.stack(list(_monomials(variables, surface.degree)), -1)
        square = features.mT @ features
        square.diagonal().mul_(1 + _RIDGE).add_(_RIDGE)
        found = torch.linalg.solve_ex(square, features.mT @ values[usual].double()).result
        surface.coefficients.extend(found.tolist())
        return surface

    def __call__(self, x: Tensor, params: Sequence[Tensor], domain: Scale) -> tuple[Tensor, None]:
        """See `Guess`."""
        scaled = [scale(p.to(x.dtype)) for scale, p in zip(self.params, params, strict=True)]
        return domain.inverse(_polynomial(iter(self.coefficients), [self.x(x), *scaled], self.degree)), None


def _scale_of(param: Tensor) -> Scale:
    least, most = (t.item() for t in param.aminmax())
    positive = 0 < _LOGARITHMIC * least < most
    return Scale(torch.zeros_like(param[0]) if positive else None).fitted(param, 0.0)


def _monomials(variables: Sequence[Tensor], degree: int) -> Iterator[Tensor]:
    """All products of powers up to a degree, in the order in which `_polynomial` wants their coefficients."""
    first, *rest = variables
    for d in range(degree + 1):
        power = first ** (degree - d)
        yield from (power * m for m in _monomials(rest, d)) if rest else [power]


def _polynomial(coefficients: Iterator[float], variables: Sequence[Tensor], degree: int) -> Tensor:
    """Horner's scheme in the first variable, whose coefficients are polynomials in the others."""
    first, *rest = variables
    value = torch.zeros_like(first)
    for d in range(degree + 1):
        value = value.mul_(first).add_(_polynomial(coefficients, rest, d) if rest else next(coefficients))
    return value

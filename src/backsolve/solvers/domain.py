"""The domain of y, and coordinates on it in which monotone functions are nearly straight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
_INTEGERS[torch.bfloat16] = torch.int16


@dataclass
class Domain:
    """The interval in which y lies, with a coordinate that sends its ends to -1 and 1 and the point at hand to 0.

    Near an end that is finite, f mostly behaves like a power of the distance w from it, and so as a straight line in
    log w; near an infinite one, in log |y|. From the point at hand, c, that is up to third order twice

        u = (w - w_c) / (w + w_c)             half-line
        u = (w - w_c) / (w + w_c - 2 w w_c)   interval of length 1: log(w / (1 - w))
        u = q / sqrt(1 + q^2),  2 max(1, |c|) q = y - c    line: asinh(y)

    None needs a logarithm, and none loses digits close to c.
    """

    lower: Tensor
    upper: Tensor
    end: Tensor
    """The end that w is measured from, if one is finite."""
    per_length: Tensor
    """1 / (upper - lower); 0 if that is infinite."""
    is_line: bool

    @staticmethod
    def between(lower: Tensor, upper: Tensor) -> Domain:
        """The domain with these ends, of shape `(n,)` or `()`."""
        below, above = (bool(end.isfinite().all()) for end in (lower, upper))
        per_length = 1 / (upper - lower) if below and above else torch.zeros_like(lower)
        return Domain(lower, upper, lower if below else upper, per_length, not (below or above))

    def start(self) -> Tensor:
        """A point well inside: the middle of an interval, 1 beyond the end of a half-line, 0 on the line."""
        lower, upper = self.lower, self.upper
        middle = lower / 2 + upper / 2
        below, above = lower.isfinite(), upper.isfinite()
        beyond = torch.where(below, lower + lower.abs().clamp(min=1), upper - upper.abs().clamp(min=1))
        return torch.where(below & above, middle, torch.where(below | above, beyond, 0.0))

    def inside(self, y: Tensor, otherwise: Tensor) -> Tensor:
        """y where it is strictly between the ends."""
        return torch.where((y > self.lower) & (y < self.upper), y, otherwise)  # NaN compares false

    def coordinates(self, c: Tensor, *ys: Tensor) -> list[Tensor]:
        """The coordinates of some points, as seen from c."""
        if self.is_line:
            big = torch.finfo(c.dtype).max ** 0.25
            scale = 0.5 / c.abs().clamp(min=1)
            qs = [((y - c) * scale).clamp(-big, big) for y in ys]
            return [q * (1 + q * q).rsqrt() for q in qs]
        w = c - self.end
        slope = 1 - 2 * (w * self.per_length)
        return [(y - c) / ((y - self.end) * slope + w) for y in ys]

    def step(self, c: Tensor, u: Tensor) -> Tensor:
        """How far from c the point with coordinate u is."""
        if self.is_line:
            return 2 * c.abs().clamp(min=1) * u * (1 - u * u).rsqrt()
        w = c - self.end
        share = w * self.per_length
        return 2 * w * u * (1 - share) / (1 - u + 2 * share * u)


def ordinal(y: Tensor) -> Tensor:
    """The rank of a number among all floating-point numbers: -1, 0, 1 for the smallest ones around 0."""
    bits = y.view(_INTEGERS[y.dtype]).to(torch.int64)
    lowest = -(2 ** (8 * y.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


def from_ordinal(rank: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of this rank."""
    lowest = -(2 ** (8 * dtype.itemsize - 1))
    return torch.where(rank < 0, lowest - rank, rank).to(_INTEGERS[dtype]).view(dtype)

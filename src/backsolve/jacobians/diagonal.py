"""Elementwise f: J is its diagonal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve._reduce import FEW, magnitudes, magnitudes_of_one_sign
from backsolve._solution import FLOATS
from backsolve._torch import stored
from backsolve.jacobians.base import Assembled, Entries, Jacobian, Linearized, evaluate_near

_MANY = 2**14  # elements: ones of no memory are worth a dearer call
_VERY_MANY = 2**16  # elements: three passes are worth less than temporaries
_EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}  # torch.finfo takes a quarter of a microsecond


@dataclass(frozen=True)
class Diagonal(Jacobian):
    """f acts on each element by itself: `J = diag(f'(y))`.

    One vector-Jacobian product with ones gives the whole diagonal, a division solves.

    Args:
        entries: the derivative f' if it is known, called as `entries(y, *params, **kwargs)`; it returns a tensor of
            the shape of y, and is itself differentiated for higher derivatives. Without it autograd differentiates f.
            If f and f' are functions of torch without params, and nobody tests the residual, f is then not evaluated.

    Example:
        >>> import torch
        >>> from backsolve import Diagonal, inverse
        >>> arcsin = inverse(torch.sin, torch.asin, jacobian=Diagonal(entries=torch.cos))
        >>> x = torch.tensor([0.6], dtype=torch.float64, requires_grad=True)
        >>> arcsin(x).backward()
        >>> x.grad
        tensor([1.2500], dtype=torch.float64)
    """

    entries: Entries | None = None
    unit_dims = 0

    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:  # noqa: ARG002
        """One derivative for each element."""
        return y

    def assemble(self, at: Linearized) -> Assembled:
        """One vector-Jacobian product, or none if the entries are known."""
        diagonal = self._diagonal(at)
        return _DiagonalAt(stored(diagonal) if at.transformed else diagonal, at, self._diagonal)

    @staticmethod
    def _diagonal(at: Linearized) -> Tensor:
        y = at.y
        if at.known is not None:
            return at.known
        if y.numel() < _MANY:
            return _conjugate(at.pull(torch.ones_like(y)))
        return _conjugate(at.pull(y.new_ones(()).expand(y.shape)))  # dearer to make, but no memory full of ones


class _DiagonalAt(Assembled):
    def __init__(self, diagonal: Tensor, at: Linearized, make: Callable[[Linearized], Tensor]) -> None:
        self.diagonal = diagonal
        self.at = at
        self.make = make

    def solve(self, b: Tensor) -> Tensor:
        return b / self.diagonal

    def solve_transposed(self, v: Tensor) -> Tensor:
        return v / _conjugate(self.diagonal)

    def log_abs_det(self) -> Tensor:
        log = self.diagonal.abs().log()
        return log.flatten(-self.at.event_dim).sum(-1) if self.at.event_dim else log

    def inverse(self) -> Tensor:
        k = self.at.event_dim
        if not k:
            return 1 / self.diagonal
        event = self.diagonal.shape[-k:]
        return torch.diag_embed((1 / self.diagonal).flatten(-k)).reshape(self.diagonal.shape + event)

    def singular(self) -> Tensor | None:
        """Where y carries no digit of f'(y): f' is 0 or not finite, or a small error of y changes it by half.

        That happens at a turning point of f, as for arcsin at 1. To find out takes f' at a second place, as far away as
        y is uncertain: by its own rounding, and by that of x divided by f'. Only suspects are looked at twice. Away
        from turning points relative changes of y and of x are of one size: `|f' y / x|` is neither as small as eps nor
        as large as 1 / eps. Most suspects are harmless, such as log at 1, where y is near 0. An implicit function has
        no x to compare with, so all of its elements are suspects.
        """
        if not (self.at.implicit or self._is_suspect()):
            return None
        d, y, z = self.diagonal.detach(), self.at.y.detach(), self.at.value
        eps = torch.finfo(y.dtype).eps
        suspects = self._suspects()
        hopeless = _is_no_divisor(d)
        away = torch.maximum(y.abs(), torch.where(hopeless, 0.0, z / d).abs())
        near = evaluate_near(self.make, self.at, y + torch.where(suspects, 4 * eps * away, 0.0))
        hopeless = hopeless | (suspects if near is None else suspects & ~((near - d).abs() < d.abs() / 2))
        return hopeless.flatten(-self.at.event_dim).any(-1) if self.at.event_dim else hopeless

    def suspicious(self) -> Tensor:
        return self._suspects().any()

    def _suspects(self) -> Tensor:
        d, y, z = self.diagonal.detach(), self.at.y.detach(), self.at.value
        eps = torch.finfo(y.dtype).eps
        ratio = (d * y / z).abs()
        suspects = ~((ratio > 4 * eps) & (ratio < 1 / eps)) | self.at.implicit
        return suspects | _is_no_divisor(d) if d.is_complex() else suspects

    def _is_suspect(self) -> bool:
        """Whether any element is, in the fewest kernels; NaN compares false."""
        d, y, z = self.diagonal, self.at.y, self.at.value
        eps = _EPS[y.dtype]
        if z.numel() <= FEW and not z.is_complex():  # Python's abs of a complex number may raise
            if z.numel() == 1:
                change, x = abs(d.item() * y.item()), abs(z.item())
                return not (change > 4 * eps * x and eps * change < x)
            rows = zip(*(t.flatten().tolist() for t in (d, y, z)), strict=True)
            return not all(4 * eps * abs(x) < (change := abs(d * y)) and eps * change < abs(x) for d, y, x in rows)
        if not z.numel():
            return False
        d, y = d.detach(), y.detach()
        if z.numel() >= _VERY_MANY and self._ranges_tell(d, y, z):
            return False
        low, high = magnitudes(lambda d, y, z: (d * y).div_(z), d, y, z)
        return not (low > 4 * eps and high < 1 / eps) or (d.is_complex() and bool(_is_no_divisor(d).any()))

    @staticmethod
    def _ranges_tell(d: Tensor, y: Tensor, z: Tensor) -> bool:
        """Whether the ranges of f', y and x alone tell that no element is suspect, which spares two thirds."""
        eps, ranges = _EPS[y.dtype], []
        for t in (y, d, z):
            if (found := magnitudes_of_one_sign(t)) is None:
                return False
            ranges.append(found)
        (least_y, most_y), (least_d, most_d), (least_z, most_z) = ranges
        return least_d * least_y > 4 * eps * most_z and eps * most_d * most_y < least_z

    def times(self, u: Tensor) -> Tensor:
        return self.diagonal.detach() * u

    def transposed_times(self, u: Tensor) -> Tensor:
        return self.diagonal.conj() * u

    def rounding(self, u: Tensor) -> Tensor:
        return 8 * torch.finfo(u.dtype).eps * (self.diagonal * u).abs()

    def numbers(self, index: tuple[int, ...]) -> str:
        y, d = self.at.y[index].flatten(), self.diagonal[index].flatten()
        worst = d.abs().argmin()
        return f"y = {y[worst].item():.9g}, f'(y) = {d[worst].item():.3g}"


def _is_no_divisor(d: Tensor) -> Tensor:
    """Where no quotient by d means anything. Of complex numbers torch adds both parts, which may overflow."""
    unusable = ~d.isfinite() | (d == 0)
    return unusable | ~(d.real.abs() + d.imag.abs()).isfinite() if d.is_complex() else unusable


def _conjugate(t: Tensor) -> Tensor:
    """`t.conj()`, which makes an alias of a real tensor, too."""
    return t.conj() if t.is_complex() else t

"""Elementwise f: J is its diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve._reduce import largest_magnitude
from backsolve.jacobians.base import Assembled, Entries, Jacobian, Linearized


@dataclass(frozen=True)
class Diagonal(Jacobian):
    """f acts on each element by itself: `J = diag(f'(y))`.

    One vector-Jacobian product with ones gives the whole diagonal, a division solves.

    Args:
        entries: the derivative f' if it is known, called as `entries(y, *params, **kwargs)`; it returns a tensor of
            the shape of y, and is itself differentiated for higher derivatives. Without it autograd differentiates f.

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

    def assemble(self, at: Linearized) -> Assembled:
        """One vector-Jacobian product, or none if the entries are known."""
        diagonal = at.pull(torch.ones_like(at.y)) if self.entries is None else at.entries(self.entries, at.y.shape)
        return _DiagonalAt(diagonal, at)


def _largest(z: Tensor, d: Tensor, y: Tensor) -> float:
    """`max |z / (d y)|` in the fewest kernels."""
    if z.numel() == 1:
        denominator = d.item() * y.item()
        return abs(z.item() / denominator) if denominator else math.nan
    return largest_magnitude(lambda z, d, y: (d * y).reciprocal_().mul_(z), z, d, y)


class _DiagonalAt(Assembled):
    def __init__(self, diagonal: Tensor, at: Linearized) -> None:
        self.diagonal = diagonal
        self.at = at

    def solve(self, b: Tensor) -> Tensor:
        return b / self.diagonal

    def solve_transposed(self, v: Tensor) -> Tensor:
        return v / self.diagonal

    def log_abs_det(self) -> Tensor:
        log = self.diagonal.abs().log()
        return log.flatten(-self.at.event_dim).sum(-1) if self.at.event_dim else log

    def inverse(self) -> Tensor:
        if not self.at.event_dim:
            return 1 / self.diagonal
        event = self.diagonal.shape[-self.at.event_dim :]
        return (
            torch.diag_embed((1 / self.diagonal).flatten(-self.at.event_dim)).unflatten(-1, event).unflatten(-2, event)
        )

    def singular(self) -> Tensor | None:
        """Where y carries no digit of f'(y): f' is 0 or not finite, or the rounding of y alone changes it by half.

        Only elements that a cheap test suspects are looked at twice: where `|f' y| <= 4 eps |f(y)|`, a relative
        change of y changes x by less than its rounding. That happens at a turning point of f (arcsin at 1), but also
        at a harmless y near 0 (log at 1), so f' is evaluated once more, 4 eps away.
        """
        d, y, z = self.diagonal.detach(), self.at.y.detach(), self.at.value
        eps = torch.finfo(y.dtype).eps
        if _largest(z, d, y) < 1 / (4 * eps):  # NaN compares false
            return None
        hopeless = ~d.isfinite() | (d == 0)
        suspect = ((d * y).abs() <= 4 * eps * z.abs()) & ~hopeless & (y != 0)
        if suspect.any():
            near = self.at.derivative_near(torch.where(suspect, y * (1 + 4 * eps), y), torch.ones_like(y))
            hopeless |= suspect & ~((near - d).abs() < d.abs() / 2)
        return hopeless.flatten(-self.at.event_dim).any(-1) if self.at.event_dim else hopeless

    def transposed_times(self, u: Tensor) -> Tensor:
        return self.diagonal * u

    def rounding(self, u: Tensor) -> Tensor:
        return 8 * torch.finfo(u.dtype).eps * (self.diagonal * u).abs()

    def numbers(self, index: tuple[int, ...]) -> str:
        y, d = self.at.y[index].flatten().tolist(), self.diagonal[index].flatten().tolist()
        worst = min(range(len(d)), key=lambda i: abs(d[i]))
        return f"y = {y[worst]:.9g}, f'(y) = {d[worst]:.3g}"

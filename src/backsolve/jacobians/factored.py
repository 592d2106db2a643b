"""J given by its entries and one factorisation of them: what every direct structure shares."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from backsolve import errors
from backsolve._reduce import FEW, greatest_magnitude, least_magnitude, least_product
from backsolve.jacobians.base import Assembled, Linearized, evaluate_near
from backsolve.linalg import Factored, Structure

_PRINTABLE = 512  # up to here singular values are worked out for a message
_LARGEST = 2**-8  # of the largest number: up to here an entry leaves room for the sums of an elimination
_AT_ONCE = 2**17  # elements of a stack of cotangents: what f's backward makes of it stays in the cache
_FEWEST = 1024  # events in it: a product with fewer rows costs more for each


class FactoredAt(Assembled):
    """J at one y.

    Args:
        structure: what the entries are entries of, and how they are factorised.
        at: f at y.
        make: works out the entries, of f at any y.
    """

    def __init__(self, structure: Structure, at: Linearized, make: Callable[[Linearized], Tensor]) -> None:
        self.structure = structure
        self.at = at
        self.make = make
        self.entries = _at_least_float32(make(at))
        self._a: Factored | None = None

    @property
    def a(self) -> Factored:
        """J, factorised when first needed."""
        if self._a is None:  # no cached_property: before Python 3.12 it has a lock, which torch.compile cannot trace
            self._a = Factored(self.structure, self.entries)
        return self._a

    def solve(self, b: Tensor) -> Tensor:
        return self.a.solve(self._column(b)).reshape(b.shape).to(b.dtype)

    def solve_transposed(self, v: Tensor) -> Tensor:
        return self.a.solve(self._column(v), adjoint=True).reshape(v.shape).to(v.dtype)

    def log_abs_det(self) -> Tensor:
        return self.a.log_abs_det().to(self.at.y.real.dtype)

    def inverse(self) -> Tensor:
        batch, event = split(self.at.y, self.at.event_dim)
        n = math.prod(event)
        identity = torch.eye(n, dtype=self.entries.dtype, device=self.entries.device).expand(*batch, n, n)
        return self.a.solve(identity).reshape(*batch, *event, *event).to(self.at.y.dtype)

    def singular(self) -> Tensor | None:
        """Where J is singular to working precision, or carries no digit because of the rounding of y.

        The second happens where some equation is at a turning point, or all are in one direction: a row or a column of
        `J y` is as small as the rounding of f. Then J is worked out once more at a y moved by its rounding, and must
        not change by half, relative to itself. (A y that misses the turning point by what the rounding of x allows
        cannot be told from one that is there by right: of the two, only the first has a wrong derivative.)
        """
        failed = self.a.singular()
        if self.entries.is_complex():
            failed = _either(failed, self._overflows())
        return _either(failed, self._lost()) if self._is_suspect() else failed

    def suspicious(self) -> Tensor:
        plain = (torch.stack(self._changes()) > 4 * self._eps).all()  # NaN compares false
        suspicious = ~plain | self.at.implicit | self.a.suspicious()
        return suspicious | self._overflows().any() if self.entries.is_complex() else suspicious

    def _overflows(self) -> Tensor:
        """Where a division by a pivot may overflow on its way: that of complex numbers adds their parts."""
        ones = self._column(torch.ones_like(self.at.y.detach()))
        rows = self.structure.times(self.entries.detach().abs(), ones.real, False)
        return ~(rows < _LARGEST * torch.finfo(rows.dtype).max).all(-1).all(-1)  # NaN compares false

    @property
    def _eps(self) -> float:
        return torch.finfo(self.at.y.dtype).eps

    def _is_suspect(self) -> bool:
        """Whether any event is; an implicit function has no x to compare with, so all of its events are."""
        if self.at.implicit or not self.entries.numel():
            return self.at.implicit
        y, z, diagonal = self.at.y.detach(), self.at.value, self.structure.diagonal(self.entries.detach())
        if y.numel() <= FEW and not y.is_complex():
            limit = 4 * self._eps * sum(map(abs, z.flatten().tolist()))
            pairs = zip(diagonal.flatten().tolist(), y.flatten().tolist(), strict=True)
            plain = all(abs(slope * value) > limit for slope, value in pairs)
        else:
            y = y.reshape(diagonal.shape).to(diagonal.dtype)
            plain = least_product(diagonal, y) > 4 * self._eps * greatest_magnitude(z)
        if plain:  # no row and no column is smaller; NaN compares false
            return False
        return not min(least_magnitude(change) for change in self._changes()) > 4 * self._eps

    def _changes(self) -> tuple[Tensor, Tensor]:
        """How much f changes with y, relative to itself: `|(J y)_i / f_i|`, and `sum_i |J_ij y_j / f_i|`."""
        y, z = self._column(self.at.y.detach()), self._column(self.at.value)
        weights = 1 / z.abs().clamp_min(torch.finfo(z.dtype).tiny)
        columns = self.structure.times(self.entries.detach().abs(), weights, True) * y.abs()
        return (self._times(self.at.y.detach()) / z).abs(), columns

    @torch.no_grad()
    def _lost(self) -> Tensor:
        """Where the rounding of y alone changes J by half: where the spectral radius of `J^-1 dJ` is not below it.

        Power iteration; as the radius does not depend on the units of y, its steps are averaged.
        """
        near = evaluate_near(self.make, self.at, self.at.y * (1 + 4 * torch.finfo(self.at.y.dtype).eps))
        batch = self._column(self.at.y).shape[:-2]
        if near is None or not near.numel():
            return torch.full(batch, near is None, device=self.entries.device)
        change = _at_least_float32(near) - self.entries
        n = math.prod(split(self.at.y, self.at.event_dim)[1])
        u = torch.arange(1.0, n + 1, device=change.device).cos().to(change.dtype).expand(*batch, n)[..., None]
        steps: list[Tensor] = []
        for _ in range(8):
            u = self.a.solve(self.structure.times(change, u, False))
            steps.append(u.abs().amax((-2, -1)))
            u = u / torch.where(steps[-1] > 0, steps[-1], 1.0)[..., None, None]
        radius = torch.stack(steps[4:]).log().mean(0).exp()
        return ~(radius < 0.5)  # NaN compares false

    def times(self, u: Tensor) -> Tensor:
        return self._times(u).reshape(u.shape).to(u.dtype)

    def transposed_times(self, u: Tensor) -> Tensor:
        return self.structure.times(self.entries, self._column(u), True).reshape(u.shape).to(u.dtype)

    def rounding(self, u: Tensor) -> Tensor:
        bound = self.structure.times(self.entries.abs(), self._column(u).abs(), True).reshape(u.shape)
        return 8 * self.entries.shape[-2] * torch.finfo(u.dtype).eps * bound.to(u.real.dtype)

    def numbers(self, index: tuple[int, ...]) -> str:
        if self.entries.shape[-1] > _PRINTABLE:
            size = self.entries[index].abs()
            return f"the largest entry of J is {size.max().item():.3g}; {self.entries.shape[-1]} unknowns"
        return errors.singular_values(self.structure.matrix(self.entries)[index])

    def _times(self, u: Tensor) -> Tensor:
        return self.structure.times(self.entries.detach(), self._column(u), False)

    def _column(self, b: Tensor) -> Tensor:
        if self.at.event_dim == 1:
            return b.unsqueeze(-1).to(self.entries.dtype)
        batch, event = split(b, self.at.event_dim)
        return b.reshape(*batch, math.prod(event), 1).to(self.entries.dtype)


def _either(some: Tensor | None, others: Tensor) -> Tensor:
    return others if some is None else some | others


def dense_matrix(at: Linearized) -> Tensor:
    """J as `(*batch, n, n)`, from its known entries or by n vector-Jacobian products."""
    batch, event = split(at.y, at.event_dim)
    n = math.prod(event)
    if at.known is not None:
        return at.known.reshape(*batch, n, n)
    cotangents = torch.eye(n, dtype=at.y.dtype, device=at.y.device).view(n, *(1,) * len(batch), *event)
    cotangents = cotangents.expand(n, *batch, *event)
    elements = at.y.numel()
    if elements * n <= _AT_ONCE or at.transformed or torch.is_grad_enabled() or at.y.device.type != "cpu":
        return _rows(at, cotangents, batch, n).contiguous()  # it is read often
    several = max(_AT_ONCE // elements, _FEWEST * n // elements)
    if several >= n:
        return _rows(at, cotangents, batch, n).contiguous()
    matrix = at.y.new_empty(*batch, n, n)
    for first in range(0, n, several):
        part = slice(first, first + several)
        matrix[..., part, :] = _rows(at, cotangents[part], batch, n)
    return matrix


def _rows(at: Linearized, cotangents: Tensor, batch: torch.Size, n: int) -> Tensor:
    """Rows of J, shape `(*batch, k, n)`, for k unit vectors: `J^H e_i` is the conjugate of row i."""
    rows = at.pull_many(cotangents)
    if at.event_dim != 1:
        rows = rows.reshape(len(rows), *batch, n)
    return rows.movedim(0, -2).conj()


def split(y: Tensor, event_dim: int) -> tuple[torch.Size, torch.Size]:
    """The batch and the event part of a shape."""
    return y.shape[: y.dim() - event_dim], y.shape[y.dim() - event_dim :]


def _at_least_float32(t: Tensor) -> Tensor:
    """No LU exists for less."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t

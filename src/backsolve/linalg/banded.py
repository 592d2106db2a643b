"""Matrices given by their bands: LU in O(n)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from backsolve._reduce import greatest_magnitude, least_magnitude
from backsolve._torch import active_transform
from backsolve.linalg.band_inverse import SMALLEST, band_of_inverse, holds, units
from backsolve.linalg.band_lu import Backend, backend
from backsolve.linalg.concrete import concretely
from backsolve.linalg.factored import Factored, Factors, Structure

_COLUMNS = 256


@dataclass(frozen=True)
class BandLU(Structure):
    """A square matrix with `lower` diagonals below the main one and `upper` above it.

    Entries: `(*batch, lower + upper + 1, n)` in LAPACK's (and SciPy's) layout, `entries[upper + i - j, j] = a[i, j]`;
    the corners that lie outside of the matrix are not read.
    """

    lower: int
    upper: int

    @property
    def bands(self) -> tuple[int, int]:
        """Of the entries."""
        return self.lower, self.upper

    def factor(self, entries: Tensor) -> Factors:
        """The factors, and which matrices have none: these are factorised as the identity.

        The events stand side by side in one large band matrix. It keeps them apart by zeros, and zero times NaN or
        infinity would spread from one event to the next.
        """
        kind = self._backend(entries, entries.shape[-1])
        factors = kind.factor(self._without_corners(entries))
        usable = self._regular(kind.pivots(factors))
        if not usable.all():  # whose fault is it?
            usable = self._without_corners(entries).isfinite().all(-2).all(-1)
            factors = kind.factor(self._or_identity(entries, usable))
            regular = self._regular(kind.pivots(factors))
            if not regular.all():
                usable &= regular
                factors = kind.factor(self._or_identity(entries, usable))
        return usable, *factors

    @staticmethod
    def _regular(pivots: Tensor) -> Tensor:
        if pivots.numel() and least_magnitude(pivots) > 0 and greatest_magnitude(pivots) < torch.inf:  # NaN is not
            return torch.ones(pivots.shape[:-1], dtype=torch.bool, device=pivots.device)
        return (pivots.isfinite() & (pivots != 0)).all(-1)

    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        usable, *rest = factors
        if not b.numel():
            return torch.zeros_like(b)
        u = self._backend(b, b.shape[-2]).solve(tuple(rest), b, adjoint)
        if usable.all() and (u.sum().isfinite() or u.isfinite().all()):  # a sum is cheap, and may overflow
            return u
        if usable.dim():  # NaN and overflow, too, spread between events that stand side by side
            events = zip(*(t.unbind() for t in (b, *factors)), strict=True)
            return torch.stack([self.solve(tuple(own), of_event, adjoint) for of_event, *own in events])
        return u if usable else torch.full_like(u, torch.nan)

    def solve_once(self, entries: Tensor, b: Tensor, adjoint: bool) -> Tensor | None:
        n = entries.shape[-1]
        if b.shape[-1] != 1 or not b.numel():
            return None
        solved = self._backend(entries, n).solve_once(entries, b, adjoint)
        if solved is None:
            return None
        u, pivots = solved
        return u if self._has_large_pivots(entries, pivots) else None

    def diagonal(self, entries: Tensor) -> Tensor:
        return entries[..., self.upper, :]

    def log_abs_det(self, factors: Factors) -> Tensor:
        return torch.where(factors[0], self._pivots(factors).abs().log().sum(-1), -torch.inf)

    def singular(self, entries: Tensor, factors: Factors) -> Tensor | None:
        """Tell which matrices are singular to working precision, by the criterion of `LU`.

        `rho(|A^-1| |A|)` takes an inverse. Here |A^-1| is estimated from below by random vectors, after the unknowns
        were given units in which the columns of A have equal size.
        """
        pivots, usable = self._pivots(factors), factors[0]
        if not pivots.numel() or (usable.all() and self._has_large_pivots(entries, pivots)):
            return None
        entries = self._without_corners(entries)
        size = entries.abs().sum(-2)
        suspects = ~(pivots.abs() > 1e-3 * size).all(-1) | ~usable  # NaN compares false
        if not suspects.any():
            return None
        a, size, *chosen = (t[suspects] for t in (entries, size, *factors))
        unit = torch.where(size > 0, 1 / size, 1.0)[..., None]
        signs = torch.randn(*unit.shape[:-1], 8, generator=torch.Generator(a.device).manual_seed(0), device=a.device)
        perturbation = self.times(a.abs(), unit, False) * signs.to(a.dtype)
        growth = (self.solve(tuple(chosen), perturbation, False).abs() / unit).amax((-2, -1))
        suspects[suspects.clone()] = ~(growth * torch.finfo(a.dtype).eps < 0.02)
        return suspects

    def _has_large_pivots(self, entries: Tensor, pivots: Tensor) -> bool:
        """Whether no pivot is small beside its column, at first sight; NaN compares false."""
        return least_magnitude(pivots) > 1e-3 * entries.shape[-2] * greatest_magnitude(entries)

    def times(self, entries: Tensor, u: Tensor, adjoint: bool) -> Tensor:
        """Entry [d, j] times u_j adds to row j - upper + d; in place where that is possible, as memory costs most."""
        n, plain = u.shape[-2], active_transform() is None
        diagonal = entries[..., self.upper, :, None]
        result = (diagonal.conj() if adjoint else diagonal) * u
        for d in range(self.lower + self.upper + 1):
            shift = d - self.upper
            if shift == 0 or abs(shift) >= n:
                continue
            column, row, size = max(0, -shift), max(0, shift), n - abs(shift)
            band = entries[..., d, :, None].narrow(-2, column, size)
            band, taken, given = (band.conj(), row, column) if adjoint else (band, column, row)
            if plain:
                result.narrow(-2, given, size).addcmul_(band, u.narrow(-2, taken, size))
            else:
                result = result + pad(band * u.narrow(-2, taken, size), (0, 0, given, taken))
        return result

    def outer(self, h: Tensor, u: Tensor) -> Tensor:
        return torch.stack([(shifted * u.conj()).sum(-1) for shifted in self._shifted(h)], -2)

    def log_det_gradient(self, a: Factored) -> Tensor:
        """In O(n log n); where blocks of A are close to singular, by solves for all columns of the identity."""
        if not self.lower or not self.upper:  # triangular
            diagonal = 1 / self.diagonal(a.entries).conj()
            return pad(diagonal[..., None, :], (0, 0, self.upper, self.lower))
        if a.entries.shape[-1] >= 4 * max(SMALLEST, self.lower + self.upper):
            gradient, good = band_of_inverse(self, a.entries, self.lower, self.upper), False

            def look(entries: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
                nonlocal good
                good = holds(self._without_corners(entries), gradient)
                return ()

            concretely(look, a.entries, gradient)
            if good:
                return gradient
        return self._log_det_gradient_by_columns(a)

    def _log_det_gradient_by_columns(self, a: Factored) -> Tensor:
        """Some columns of A^-H at a time."""
        n = a.entries.shape[-1]
        gradient = torch.zeros_like(a.entries)
        for first in range(0, n, _COLUMNS):
            number = min(_COLUMNS, n - first)
            columns = units(a.entries, n, first, number).expand(*a.batch, n, number)
            gradient = gradient + self.outer(a.solve(columns, adjoint=True), columns)
        return gradient

    def matrix(self, entries: Tensor) -> Tensor:
        m, n = entries.shape[-2:]
        index = torch.arange(n, device=entries.device)
        band = index[:, None] - index + self.upper
        inside = (band >= 0) & (band < m)
        return torch.where(inside, entries[..., band.clamp(0, m - 1), index.expand(n, n)], 0.0)

    def _backend(self, t: Tensor, n: int) -> Backend:
        return backend(t.device, self.lower, self.upper, n)

    def _pivots(self, factors: Factors) -> Tensor:
        n = factors[-1].shape[-1]  # every backend has its n pivot rows last
        return self._backend(factors[1], n).pivots(factors[1:])

    def _shifted(self, u: Tensor) -> list[Tensor]:
        """`u[j - upper + d]` for each band d, with zeros outside."""
        padded = pad(u, (0, 0, self.upper, self.lower))
        return [padded[..., d : d + u.shape[-2], :] for d in range(self.lower + self.upper + 1)]

    def _without_corners(self, entries: Tensor) -> Tensor:
        entries = entries.resolve_conj().clone(memory_format=torch.contiguous_format)
        for k in range(1, self.upper + 1):
            entries[..., self.upper - k, :k] = 0
        for k in range(1, self.lower + 1):
            entries[..., self.upper + k, max(0, entries.shape[-1] - k) :] = 0
        return entries

    def _or_identity(self, entries: Tensor, usable: Tensor) -> Tensor:
        entries = self._without_corners(entries)
        if usable.all():
            return entries
        identity = torch.zeros_like(entries)
        identity[..., self.upper, :] = 1
        return torch.where(usable[..., None, None], entries, identity)

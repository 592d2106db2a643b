"""Matrices given by their bands: LU in O(n)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from backsolve.linalg.band_lu import Backend, backend
from backsolve.linalg.factored import Factors, Structure


@dataclass(frozen=True)
class BandLU(Structure):
    """A square matrix with `lower` diagonals below the main one and `upper` above it.

    Entries: `(*batch, lower + upper + 1, n)` in LAPACK's (and SciPy's) layout, `entries[upper + i - j, j] = a[i, j]`;
    the corners that lie outside of the matrix are not read.
    """

    lower: int
    upper: int

    def factor(self, entries: Tensor) -> Factors:
        """The factors, and which matrices have none: these are factorised as the identity.

        The events stand side by side in one large band matrix. It keeps them apart by zeros, and zero times NaN or
        infinity would spread from one event to the next.
        """
        kind = self._backend(entries, entries.shape[-1])
        entries = self._without_corners(entries)
        factors = kind.factor(entries)
        usable = self._regular(kind.pivots(factors))
        if not usable.all():  # whose fault is it?
            usable = entries.isfinite().all(-2).all(-1)
            factors = kind.factor(self._or_identity(entries, usable))
            regular = self._regular(kind.pivots(factors))
            if not regular.all():
                usable &= regular
                factors = kind.factor(self._or_identity(entries, usable))
        return usable, *factors

    @staticmethod
    def _regular(pivots: Tensor) -> Tensor:
        return (pivots.isfinite() & (pivots != 0)).all(-1)

    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        usable, *rest = factors
        if not b.numel():
            return torch.zeros_like(b)
        u = self._backend(b, b.shape[-2]).solve(tuple(rest), b, adjoint)
        if usable.all() and u.isfinite().all():
            return u
        if usable.dim():  # NaN and overflow, too, spread between events that stand side by side
            events = zip(*(t.unbind() for t in (b, *factors)), strict=True)
            return torch.stack([self.solve(tuple(own), of_event, adjoint) for of_event, *own in events])
        return u if usable else torch.full_like(u, torch.nan)

    def log_abs_det(self, factors: Factors) -> Tensor:
        return torch.where(factors[0], self._pivots(factors).abs().log().sum(-1), -torch.inf)

    def singular(self, entries: Tensor, factors: Factors) -> Tensor | None:
        """Tell which matrices are singular to working precision, by the criterion of `LU`.

        `rho(|A^-1| |A|)` takes an inverse. Here |A^-1| is estimated from below by random vectors, after the unknowns
        were given units in which the columns of A have equal size.
        """
        size = entries.abs().sum(-2)
        suspects = ~(self._pivots(factors).abs() > 1e-3 * size).all(-1) | ~factors[0]  # NaN compares false
        if not suspects.any():
            return None
        a, size, *chosen = (t[suspects] for t in (entries, size, *factors))
        unit = torch.where(size > 0, 1 / size, 1.0)[..., None]
        signs = torch.randn(*unit.shape[:-1], 8, generator=torch.Generator(a.device).manual_seed(0), device=a.device)
        perturbation = self.times(a.abs(), unit, False) * signs.to(a.dtype)
        growth = (self.solve(tuple(chosen), perturbation, False).abs() / unit).amax((-2, -1))
        suspects[suspects.clone()] = ~(growth * torch.finfo(a.dtype).eps < 0.02)
        return suspects

    def times(self, entries: Tensor, u: Tensor, adjoint: bool) -> Tensor:
        bands = entries[..., None]  # (*batch, m, n, 1)
        if adjoint:  # (A^H u)_j = sum_d conj(ab[d, j]) u[j - upper + d]
            return _sum([bands[..., d, :, :].conj() * shifted for d, shifted in enumerate(self._shifted(u))])
        n = u.shape[-2]
        shifts = enumerate(range(-self.upper, self.lower + 1))  # column j adds to row j - upper + d
        inside = [(bands[..., d, :, :] * u, shift) for d, shift in shifts if abs(shift) < n]
        return _sum([pad(term, (0, 0, shift, -shift)) if shift else term for term, shift in inside])

    def outer(self, h: Tensor, u: Tensor) -> Tensor:
        return torch.stack([(shifted * u.conj()).sum(-1) for shifted in self._shifted(h)], -2)

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
        if usable.all():
            return entries
        identity = torch.zeros_like(entries)
        identity[..., self.upper, :] = 1
        return torch.where(usable[..., None, None], entries, identity)


def _sum(terms: list[Tensor]) -> Tensor:
    """Their sum, without a stack of them in memory."""
    return functools.reduce(torch.add, terms)

"""Matrices given by all of their entries: LU, Cholesky, substitution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve import errors
from backsolve._reduce import FEW
from backsolve._torch import solve_and_factor
from backsolve.linalg.factored import Factored, Factors, Structure

_SMALL = 16  # up to this size the views cost more than they save


@dataclass(frozen=True)
class LU(Structure):
    """A square matrix, by `P L U = A^H`. Entries: `(*batch, n, n)`, float32, float64 or complex.

    LAPACK wants columns one after the other: it takes `A^H` as it lies in memory, while A had to be transposed.
    """

    def factor(self, entries: Tensor) -> Factors:
        return tuple(torch.linalg.lu_factor_ex(entries.mH)[:2])

    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        lu, pivots = factors
        return torch.linalg.lu_solve(lu, pivots, b, adjoint=not adjoint)

    def factor_and_solve(self, entries: Tensor, b: Tensor, adjoint: bool) -> tuple[Factors, Tensor]:
        if not adjoint:
            return super().factor_and_solve(entries, b, adjoint)
        u, *factors = solve_and_factor(entries.mH, b)
        return tuple(factors), u

    def log_abs_det(self, factors: Factors) -> Tensor:
        return factors[0].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)

    def singular(self, entries: Tensor, factors: Factors) -> Tensor | None:
        """Tell which matrices are singular to working precision.

        With `M = |A^-1| |A|`, relative errors eps in the entries of A change the solution by up to about
        `eps rho(M)`, and the smallest such error that makes A singular is about `1 / rho(M)` (Demmel 1992, Rump
        1999). Where `eps rho(M) >= 0.1` no digit can be trusted. Scaling rows or columns does not change rho(M),
        unlike the usual condition number: diag(1, 1e-30) is perfectly invertible. M costs an inverse, so only
        matrices with a small pivot are looked at.
        """
        return _singular(self, entries, factors, factors[0])

    def times(self, entries: Tensor, u: Tensor, adjoint: bool) -> Tensor:
        return product(entries.mH if adjoint else entries, u)

    def outer(self, h: Tensor, u: Tensor) -> Tensor:
        return h @ u.mH

    def diagonal(self, entries: Tensor) -> Tensor:
        return entries.diagonal(dim1=-2, dim2=-1)

    def matrix(self, entries: Tensor) -> Tensor:
        return entries


@dataclass(frozen=True)
class Cholesky(Structure):
    """A Hermitian positive definite matrix, by `L L^H = A`: half the work of LU. The lower triangle is read.

    Gradients are those of all entries: that A stays Hermitian is for the caller to see to.
    """

    def factor(self, entries: Tensor) -> Factors:
        lower, info = torch.linalg.cholesky_ex(entries)
        if info.any():
            failed = info != 0
            self._refuse_indefinite(entries, failed)
            lower[failed] = torch.nan
        return (lower,)

    @staticmethod
    def _refuse_indefinite(entries: Tensor, failed: Tensor) -> None:
        """Tell an indefinite matrix, which is an error of the caller, from one that is singular or not finite."""
        finite = failed & entries.isfinite().all(-1).all(-1)
        values = torch.linalg.eigvalsh(torch.where(finite[..., None, None], entries, 0.0))
        lowest, highest = values.amin(-1), values.abs().amax(-1)
        indefinite = lowest < -entries.shape[-1] * torch.finfo(entries.dtype).eps * highest
        if indefinite.any():
            index = tuple(int(i) for i in indefinite.nonzero()[0])
            raise errors.indefinite(index, lowest[index].item(), highest[index].item())

    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        return torch.cholesky_solve(b, factors[0])

    def log_abs_det(self, factors: Factors) -> Tensor:
        return 2 * factors[0].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1).nan_to_num(nan=-torch.inf)

    def singular(self, entries: Tensor, factors: Factors) -> Tensor | None:
        return _singular(self, entries, factors, factors[0].mH)

    def times(self, entries: Tensor, u: Tensor, adjoint: bool) -> Tensor:
        return product(entries, u)

    def outer(self, h: Tensor, u: Tensor) -> Tensor:
        return h @ u.mH

    def diagonal(self, entries: Tensor) -> Tensor:
        return entries.diagonal(dim1=-2, dim2=-1)

    def matrix(self, entries: Tensor) -> Tensor:
        return entries


@dataclass(frozen=True)
class Substitution(Structure):
    """A triangular matrix, solved by substitution. Entries: `(*batch, n, n)`; the other triangle is not read."""

    upper: bool = False

    def factor(self, entries: Tensor) -> Factors:
        return (self._triangle(entries),)

    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        a = factors[0].mH if adjoint else factors[0]
        return torch.linalg.solve_triangular(a, b, upper=self.upper != adjoint)

    def log_abs_det(self, factors: Factors) -> Tensor:
        return factors[0].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)

    def singular(self, entries: Tensor, factors: Factors) -> Tensor | None:
        return _singular(self, factors[0], factors, factors[0].abs())

    def times(self, entries: Tensor, u: Tensor, adjoint: bool) -> Tensor:
        a = self._triangle(entries)
        return product(a.mH if adjoint else a, u)

    def outer(self, h: Tensor, u: Tensor) -> Tensor:
        return self._triangle(h @ u.mH)

    def diagonal(self, entries: Tensor) -> Tensor:
        return entries.diagonal(dim1=-2, dim2=-1)

    def matrix(self, entries: Tensor) -> Tensor:
        return self._triangle(entries)

    def log_det_gradient(self, a: Factored) -> Tensor:
        return torch.diag_embed(1 / a.entries.diagonal(dim1=-2, dim2=-1).conj())

    def _triangle(self, a: Tensor) -> Tensor:
        return a.triu() if self.upper else a.tril()


def product(a: Tensor, u: Tensor) -> Tensor:
    """`a @ u`; one column as a row, which torch 2.13 multiplies by a batch of matrices up to nine times faster."""
    if u.shape[-1] == 1 and u.dim() > 2 and a.shape[-1] > _SMALL:
        return (u.mT @ a.mT).mT
    return a @ u


def _singular(structure: Structure, entries: Tensor, factors: Factors, lu: Tensor) -> Tensor | None:
    """By the criterion of `LU.singular`; only matrices with a pivot that is small beside its column are looked at.

    Elimination perturbs the pivot `u_kk` by about `eps (|L||U|)_kk`, at most eps times the sum of the column, as
    `|l_kj| <= 1`. Pivots of rounded singular matrices were seen up to some thousand times that.
    """
    if not lu.numel():
        return None
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    if lu.numel() <= FEW and not lu.is_complex():
        plain = all(map(_has_large_pivots, lu.reshape(-1, *lu.shape[-2:]).tolist()))
    else:  # the sum is at most sqrt(n) times the Euclidean norm, which takes a third of the time, and no memory
        plain = _exceeds(diagonal, torch.linalg.vector_norm(lu.mT, dim=-1), 1e-3 * lu.shape[-1] ** 0.5)
    if plain:
        return None
    pivots = diagonal.abs() / lu.abs().sum(-2)
    if pivots.amin().item() > 1e-3:
        return None
    suspects = ~(pivots > 1e-3).all(-1)  # NaN compares false
    a, *chosen = (t[suspects] for t in (entries, *factors))
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    radius = spectral_radius(structure.solve(tuple(chosen), identity, False).abs() @ a.abs())
    suspects[suspects.clone()] = radius * torch.finfo(a.dtype).eps >= 0.1
    return suspects


def _has_large_pivots(lu: list[list[float]]) -> bool:
    return all(abs(column[k]) > 1e-3 * sum(map(abs, column)) for k, column in enumerate(zip(*lu, strict=True)))


def _exceeds(a: Tensor, b: Tensor, limit: float) -> bool:
    """Whether `|a| > limit b` in all elements; b is of the same shape, and not negative. NaN compares false."""
    if a.numel() > FEW or a.is_complex():  # Python's abs of a complex number may raise
        return (a.abs() / b).amin().item() > limit
    return all(abs(p) > limit * q for p, q in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))


def spectral_radius(matrix: Tensor) -> Tensor:
    """The spectral radius of matrices without negative entries, to a few percent; inf if that is not finite.

    Eight steps of power iteration: the maximum norm converges to it from above. It does not change when the unknowns
    are given other units.
    """
    x = torch.ones_like(matrix[..., :1])
    radius = x.sum((-2, -1))
    for _ in range(8):
        x = matrix @ x
        radius = x.amax((-2, -1))
        x = x / torch.where(radius > 0, radius, 1.0)[..., None, None]
    return torch.where(radius.isfinite(), radius, torch.inf)

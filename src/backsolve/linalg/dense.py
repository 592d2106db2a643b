"""Matrices given by all of their entries: LU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve.linalg.factored import Factors, Structure


@dataclass(frozen=True)
class LU(Structure):
    """A square matrix, by `P L U = A`. Entries: `(*batch, n, n)`, float32, float64 or complex."""

    def factor(self, entries: Tensor) -> Factors:
        return tuple(torch.linalg.lu_factor_ex(entries)[:2])

    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        lu, pivots = factors
        return torch.linalg.lu_solve(lu, pivots, b, adjoint=adjoint)

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
        suspects = _has_small_pivot(factors[0])
        if not suspects.any():
            return None
        a, *chosen = (t[suspects] for t in (entries, *factors))
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        radius = spectral_radius(self.solve(tuple(chosen), identity, False).abs() @ a.abs())
        suspects[suspects.clone()] = radius * torch.finfo(a.dtype).eps >= 0.1
        return suspects

    def times(self, entries: Tensor, u: Tensor, adjoint: bool) -> Tensor:
        return (entries.mH if adjoint else entries) @ u

    def outer(self, h: Tensor, u: Tensor) -> Tensor:
        return h @ u.mH

    def matrix(self, entries: Tensor) -> Tensor:
        return entries


def _has_small_pivot(lu: Tensor) -> Tensor:
    """Whether some pivot is small beside its column.

    Elimination perturbs the pivot `u_kk` by about `eps (|L||U|)_kk`, at most eps times the sum of the column, as
    `|l_kj| <= 1`. Pivots of rounded singular matrices were seen up to some thousand times that.
    """
    pivots = lu.diagonal(dim1=-2, dim2=-1).abs()
    columns = lu.abs().sum(-2)
    return ~(pivots > 1e-3 * columns).all(-1)  # NaN compares false: a suspect


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

"""One LU factorisation that serves A, its transpose and log|det A|, differentiable to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backsolve._torch import without_autocast


class LU:
    """The LU factorisation `P L U = A` of a batch of square matrices.

    Gradients flow to `matrix` and to the right-hand sides through `solve`, and to `matrix` through `log_abs_det`;
    every derivative reuses this one factorisation. `torch.linalg.solve` factorises anew in each backward pass.

    Args:
        matrix: A, shape `(*batch, n, n)`, float32 or float64.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.factors, self.pivots, self.info = torch.linalg.lu_factor_ex(matrix.detach())

    def solve(self, b: Tensor, *, transposed: bool = False) -> Tensor:
        """Solve `A u = b`, or `A^T u = b`; `b` has shape `(*batch, n, k)`."""
        if torch.is_grad_enabled() and (self.matrix.requires_grad or b.requires_grad):
            return _Solve.apply(self, transposed, self.matrix, b)
        return torch.linalg.lu_solve(self.factors, self.pivots, b, adjoint=transposed)

    def log_abs_det(self) -> Tensor:
        """Return `log|det A|`, shape `(*batch,)`; minus infinity where a pivot is zero."""
        return _LogAbsDet.apply(self, self.matrix)

    def singular(self) -> Tensor | None:
        """Tell which matrices are singular to working precision, shape `(*batch,)`; None if it is plain that none is.

        With `M = |A^-1| |A|`, relative errors eps in the entries of A change the solution by up to about
        `eps rho(M)`, and the smallest such error that makes A singular is about `1 / rho(M)` (Demmel 1992, Rump
        1999). Where `eps rho(M) >= 0.1` no digit can be trusted. Scaling rows or columns does not change rho(M),
        unlike the usual condition number: diag(1, 1e-30) is perfectly invertible. M costs an inverse, so only
        matrices with a small pivot are looked at.
        """
        suspects = self._has_small_pivot()
        if not suspects.any():
            return None
        suspects[suspects.clone()] = self._spectral_radius(suspects) * _eps(self.factors) >= 0.1
        return suspects

    def _has_small_pivot(self) -> Tensor:
        """Whether some pivot is small beside its column.

        Elimination perturbs the pivot `u_kk` by about `eps (|L||U|)_kk`, at most eps times the sum of the column, as
        `|l_kj| <= 1`. Pivots of rounded singular matrices were seen up to some thousand times that.
        """
        pivots = self.factors.diagonal(dim1=-2, dim2=-1).abs()
        columns = self.factors.abs().sum(-2)
        return ~(pivots > 1e-3 * columns).all(-1)  # NaN compares false: a suspect

    def _spectral_radius(self, which: Tensor) -> Tensor:
        matrix, factors, pivots = self.matrix.detach()[which], self.factors[which], self.pivots[which]
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        return spectral_radius(torch.linalg.lu_solve(factors, pivots, identity).abs() @ matrix.abs())


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


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps


class _Solve(torch.autograd.Function):
    """u = A^-1 b or A^-T b. With `h = A^-T du`: db = h and dA = -h u^T (its transpose when A is transposed)."""

    @staticmethod
    def forward(ctx: Any, lu: LU, transposed: bool, matrix: Tensor, b: Tensor) -> Tensor:
        u = torch.linalg.lu_solve(lu.factors, lu.pivots, b, adjoint=transposed)
        ctx.lu, ctx.transposed = lu, transposed
        ctx.save_for_backward(matrix, u)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        matrix, u = ctx.saved_tensors
        with without_autocast(u.device):
            h = _Solve.apply(ctx.lu, not ctx.transposed, matrix, grads[0])
            if not ctx.needs_input_grad[2]:
                return None, None, None, h
            return None, None, -(u @ h.mT if ctx.transposed else h @ u.mT), h


class _LogAbsDet(torch.autograd.Function):
    """log|det A| = sum log|u_kk|, with d log|det A| = tr(A^-1 dA)."""

    @staticmethod
    def forward(ctx: Any, lu: LU, matrix: Tensor) -> Tensor:
        ctx.lu = lu
        ctx.save_for_backward(matrix)
        return lu.factors.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (matrix,) = ctx.saved_tensors
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        inverse_transposed = _Solve.apply(ctx.lu, True, matrix, identity)
        return None, grads[0][..., None, None] * inverse_transposed

"""The calculus of `Factored` in a compiled graph.

Under torch.func it drops the gradients of custom Functions (pytorch #193279), and `torch.linalg.solve` and `slogdet`
are wrong under nested transforms: there an inverse of the matrix in full is traced. Where a backward pass is all that
can follow, bands stay bands: LAPACK's work is a custom operation, differentiated once.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from backsolve import errors
from backsolve._torch import active_transform, not_traced, without_autocast

_LARGEST = 4096  # elements of an event whose bands may become a matrix
_operations: Any = torch.ops.backsolve  # registered in operations.py


class Matrices(Protocol):
    """What is asked of a structure."""

    @property
    def bands(self) -> tuple[int, int] | None:
        """How many diagonals there are below and above the main one, if these are the entries."""
        ...

    def matrix(self, entries: Tensor) -> Tensor:
        """A in full."""
        ...

    def outer(self, h: Tensor, u: Tensor) -> Tensor:
        """Those entries of `h u^H` that A has."""
        ...


def solve(structure: Matrices, entries: Tensor, b: Tensor, adjoint: bool) -> Tensor:
    """`A^-1 b`, or `A^-H b`."""
    if structure.bands is None or active_transform() is not None:
        a = _matrix(structure, entries)
        return torch.linalg.inv_ex(a.mH if adjoint else a)[0] @ b
    return _BandSolve.apply(structure, structure.bands, adjoint, entries, b)


def log_abs_det(structure: Matrices, entries: Tensor) -> Tensor:
    """`log|det A|`."""
    if structure.bands is None or active_transform() is not None:
        lu = torch.linalg.lu_factor_ex(_matrix(structure, entries))[0]
        return lu.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    return _BandLogAbsDet.apply(structure.bands, entries)


def suspicious(structure: Matrices, entries: Tensor) -> Tensor:
    """Whether some matrix may be singular, as a 0-d tensor.

    The maximum norm of `|A^-1| |A|` is no smaller than its spectral radius.
    """
    if structure.bands is not None and active_transform() is None:
        return _operations.band_suspicious(entries, *structure.bands)
    a = _matrix(structure, entries)
    growth = torch.linalg.inv_ex(a)[0].abs() @ a.abs().sum(-1, keepdim=True)
    return ~(growth * torch.finfo(a.dtype).eps < 0.1).all()  # NaN compares false


def _matrix(structure: Matrices, entries: Tensor) -> Tensor:
    n = entries.shape[-1]
    if structure.bands is not None and n > _LARGEST:
        _refuse(n)
    return structure.matrix(entries)


@not_traced(errors.NEEDS_MATRIX)
def _refuse(n: int) -> None:
    remedy = "call the uncompiled Inverse, or compile it and call backward()"
    raise errors.needs_matrix("torch.func of a log-determinant, compiled,", n, _LARGEST, "Banded", remedy)


class _BandSolve(torch.autograd.Function):
    """`u = A^-1 b`, or `A^-H b`; see `factored` for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, structure: Matrices, bands: tuple[int, int], adjoint: bool, entries: Tensor, b: Tensor
    ) -> Tensor:
        u = _operations.band_solve(entries, b, *bands, adjoint)
        ctx.structure, ctx.bands, ctx.adjoint = structure, bands, adjoint
        ctx.save_for_backward(entries, u)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        entries, u = ctx.saved_tensors
        with without_autocast(u.device):
            h = _operations.band_solve(entries, grads[0], *ctx.bands, not ctx.adjoint)
            by_entries = -(ctx.structure.outer(u, h) if ctx.adjoint else ctx.structure.outer(h, u))
        return None, None, None, by_entries, h


class _BandLogAbsDet(torch.autograd.Function):
    """`log|det A|`, with a gradient in O(n log n)."""

    @staticmethod
    def forward(ctx: Any, bands: tuple[int, int], entries: Tensor) -> Tensor:
        ctx.bands = bands
        ctx.save_for_backward(entries)
        return _operations.band_log_abs_det(entries, *bands)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (entries,) = ctx.saved_tensors
        return None, grads[0][..., None, None] * _operations.band_log_det_gradient(entries, *ctx.bands)

"""Band matrices as custom operations: plain numbers when they run, so that they may branch and call LAPACK."""

from __future__ import annotations

import torch
from torch import Tensor

from backsolve._library import library, operation
from backsolve._torch import eagerly
from backsolve.linalg.banded import BandLU
from backsolve.linalg.factored import Factored


def _plain(t: Tensor) -> Tensor:
    return t.detach().resolve_conj().contiguous()


@operation("band_solve", "(Tensor entries, Tensor b, int lower, int upper, bool adjoint) -> Tensor")
def band_solve(entries: Tensor, b: Tensor, lower: int, upper: int, adjoint: bool) -> Tensor:
    """`A^-1 b`, or `A^-H b`."""
    with eagerly():
        return Factored(BandLU(lower, upper), _plain(entries)).solve(_plain(b), adjoint=adjoint).contiguous()


@operation("band_log_abs_det", "(Tensor entries, int lower, int upper) -> Tensor")
def band_log_abs_det(entries: Tensor, lower: int, upper: int) -> Tensor:
    """`log|det A|`."""
    with eagerly():
        return Factored(BandLU(lower, upper), _plain(entries)).log_abs_det().detach()


@operation("band_log_det_gradient", "(Tensor entries, int lower, int upper) -> Tensor")
def band_log_det_gradient(entries: Tensor, lower: int, upper: int) -> Tensor:
    """The bands of `A^-H`."""
    structure = BandLU(lower, upper)
    with eagerly():
        return structure.log_det_gradient(Factored(structure, _plain(entries))).contiguous()


@operation("band_suspicious", "(Tensor entries, int lower, int upper) -> Tensor")
def band_suspicious(entries: Tensor, lower: int, upper: int) -> Tensor:
    """Whether some A is singular to working precision."""
    with eagerly():
        failed = Factored(BandLU(lower, upper), _plain(entries)).singular()
    return torch.zeros((), dtype=torch.bool, device=entries.device) if failed is None else failed.any()


@library.register_fake("backsolve::band_solve")
def _(entries: Tensor, b: Tensor, lower: int, upper: int, adjoint: bool) -> Tensor:  # noqa: ARG001
    return b.new_empty(b.shape)


@library.register_fake("backsolve::band_log_abs_det")
def _(entries: Tensor, lower: int, upper: int) -> Tensor:  # noqa: ARG001
    return entries.new_empty(entries.shape[:-2], dtype=entries.real.dtype)


@library.register_fake("backsolve::band_log_det_gradient")
def _(entries: Tensor, lower: int, upper: int) -> Tensor:  # noqa: ARG001
    return entries.new_empty(entries.shape)


@library.register_fake("backsolve::band_suspicious")
def _(entries: Tensor, lower: int, upper: int) -> Tensor:  # noqa: ARG001
    return entries.new_empty((), dtype=torch.bool)

"""LU of band matrices with partial pivoting: LAPACK's through SciPy on a CPU, the same algorithm in torch elsewhere.

LAPACK knows no batch; it gets the events as the diagonal blocks of one long band matrix, which are far enough apart,
as the corners of the bands are zero.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Factors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Backend(ABC):
    """Factorises entries of shape `(*batch, lower + upper + 1, n)`, whose corners are zero."""

    lower: int
    upper: int

    @abstractmethod
    def factor(self, entries: Tensor) -> Factors:
        """The factors, each with the batch dimensions on its left; they may take the memory of the entries."""

    @abstractmethod
    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        """Solve for b of shape `(*batch, n, k)`."""

    def solve_once(self, entries: Tensor, b: Tensor, adjoint: bool) -> tuple[Tensor, Tensor] | None:
        """The solution for one right-hand side and some diagonal of U, if there is a faster way to these alone.

        The entries are kept, and their corners not read.
        """
        return None

    @abstractmethod
    def pivots(self, factors: Factors) -> Tensor:
        """The diagonal of U, shape `(*batch, n)`."""


def backend(device: torch.device, lower: int, upper: int, n: int) -> Backend:
    """The fastest one for n x n matrices on this device."""
    if device.type != "cpu" or _lapack() is None:
        return InTorch(lower, upper)
    return (Tridiagonal if lower == upper == 1 and n > 2 else General)(
        lower, upper
    )  # SciPy's wrapper of gttrf refuses n < 3


@functools.cache
def _lapack() -> Any:
    try:
        from scipy.linalg import lapack  # type: ignore[import-untyped]
    except ImportError:
        return None
    return lapack


def _routine(name: str, t: Tensor) -> Any:
    letter = {torch.float32: "s", torch.float64: "d", torch.complex64: "c", torch.complex128: "z"}[t.dtype]
    return getattr(_lapack(), letter + name)


def _transposition(t: Tensor, adjoint: bool) -> str | int:
    return ("C" if t.is_complex() else "T") if adjoint else "N"


class Tridiagonal(Backend):
    """LAPACK's `gttrf` and `gttrs`. Factors: the diagonals of L and U (`dl, d, du, du2`) and the pivots."""

    def factor(self, entries: Tensor) -> Factors:
        if not entries.numel():
            return (*entries.new_zeros(4, *entries.shape[:-2], entries.shape[-1]), entries[..., 0, :].to(torch.int32))
        shape = entries[..., 0, :].shape
        du, d, dl = (entries[..., k, :].reshape(-1) for k in range(3))
        arrays = (t.numpy() for t in (dl[:-1], d, du[1:]))
        *_, du2, pivots, _ = _routine("gttrf", entries)(*arrays, overwrite_dl=True, overwrite_d=True, overwrite_du=True)
        index = torch.from_numpy(pivots) - torch.arange(pivots.size, dtype=torch.int32)  # relative to the row
        return tuple(t.reshape(shape) for t in (dl, d, du, pad(torch.from_numpy(du2), (0, 2)), index))

    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        dl, d, du, du2, index = (t.reshape(-1) for t in factors)
        pivots = index + torch.arange(index.numel(), dtype=torch.int32)
        u, _ = _routine("gttrs", b)(
            *(t.numpy() for t in (dl[:-1], d, du[1:], du2[:-2], pivots)),
            _as_columns(b),
            trans=_transposition(b, adjoint),
        )
        return _from_columns(u, b)

    def solve_once(self, entries: Tensor, b: Tensor, adjoint: bool) -> tuple[Tensor, Tensor] | None:
        if entries[..., 0, 0].numel() > 1 or entries.is_complex():
            return None
        du, d, dl = (t.numpy() for t in entries.detach().reshape(3, -1))
        above, below = (dl[:-1], du[1:]) if adjoint else (du[1:], dl[:-1])
        _, d, _, u, failed = _routine("gtsv", entries)(below, d, above, b.reshape(-1).numpy())
        return None if failed else (torch.from_numpy(u).reshape(b.shape), torch.from_numpy(d))

    def pivots(self, factors: Factors) -> Tensor:
        return factors[1]


class General(Backend):
    """LAPACK's `gbtrf` and `gbtrs`. Factors: its array, columns first, `(*batch, n, 2 lower + upper + 1)`; pivots."""

    def factor(self, entries: Tensor) -> Factors:
        *batch, m, n = entries.shape
        columns = pad(entries.mT.reshape(-1, m), (self.lower, 0))
        if not columns.numel():
            return columns.reshape(*batch, n, m + self.lower), columns.new_zeros(*batch, n, dtype=torch.int32)
        lu, pivots, _ = _routine("gbtrf", entries)(columns.numpy().T, self.lower, self.upper, overwrite_ab=True)
        index = torch.from_numpy(pivots) - torch.arange(pivots.size, dtype=torch.int32)
        return torch.from_numpy(lu.T).reshape(*batch, n, m + self.lower), index.reshape(*batch, n)

    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        lu, index = factors[0].flatten(0, -2), factors[1].reshape(-1)
        pivots = index + torch.arange(index.numel(), dtype=torch.int32)
        trans = {"N": 0, "T": 1, "C": 2}[str(_transposition(b, adjoint))]
        u, _ = _routine("gbtrs", b)(
            lu.contiguous().numpy().T, self.lower, self.upper, _as_columns(b), pivots.numpy(), trans=trans
        )
        return _from_columns(u, b)

    def pivots(self, factors: Factors) -> Tensor:
        return factors[0][..., self.lower + self.upper]


def _as_columns(b: Tensor) -> Any:
    """All events below each other, `(events n, k)`, columns contiguous."""
    return b.movedim(-1, 0).reshape(b.shape[-1], -1).resolve_conj().numpy().T


def _from_columns(u: Any, like: Tensor) -> Tensor:
    return torch.from_numpy(u.T).reshape(like.shape[-1], *like.shape[:-1]).movedim(0, -1)


class InTorch(Backend):
    """Row by row in Python, for all events at once: O(n) kernels.

    Factors: the rows `(*batch, n + lower, w)`, `w = 2 lower + upper + 1`, element `(i, j)` at `[i, j - i + lower]`;
    U, and below it the multipliers of each step as they were when it was made; and the row taken in each step.
    The block of step j is a view of them: one row further down its first column is one place further left.
    """

    def factor(self, entries: Tensor) -> Factors:
        *batch, m, n = entries.shape
        rows = entries.new_zeros(math.prod(batch), n + self.lower, m + self.lower)
        for d in range(m):  # entries[d, j] is a[j - self.upper + d, j]
            first, last = max(0, self.upper - d), min(n, n + self.upper - d)
            if last > first:
                diagonal = entries[..., d, first:last].reshape(len(rows), -1)
                rows[:, first - self.upper + d : last - self.upper + d, self.upper - d + self.lower] = diagonal
        taken = torch.zeros(len(rows), n, dtype=torch.int64, device=entries.device)
        events = torch.arange(len(rows), device=entries.device)
        for j in range(n):
            block = self._block(rows, j)
            pivot = block[:, :, 0].abs().argmax(1)
            taken[:, j] = pivot
            top, chosen = block[:, 0].clone(), block[events, pivot]
            block[events, pivot] = top
            block[:, 0] = chosen
            block[:, 1:, 0] /= torch.where(chosen[:, :1] == 0, 1.0, chosen[:, :1])
            block[:, 1:, 1:] -= block[:, 1:, :1] * chosen[:, None, 1:]
        return rows.reshape(*batch, n + self.lower, m + self.lower), taken.reshape(*batch, n)

    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        rows, taken = (t.reshape(-1, *t.shape[t.dim() - k :]) for t, k in zip(factors, (2, 1), strict=True))
        n, k = b.shape[-2:]
        u = pad(b.reshape(-1, n, k), (0, 0, 0, self.lower + self.upper))
        eliminate = self._eliminate_adjoint if adjoint else self._eliminate
        eliminate(rows, taken, u)
        return u[:, :n].reshape(b.shape)

    def _eliminate(self, rows: Tensor, taken: Tensor, u: Tensor) -> None:
        events = torch.arange(len(u), device=u.device)
        n = taken.shape[-1]
        for j in range(n):
            self._exchange(u, events, j, taken[:, j])
            u[:, j + 1 : j + 1 + self.lower] -= self._block(rows, j)[:, 1:, :1] * u[:, j : j + 1]
        for j in reversed(range(n)):
            row = rows[:, j, self.lower :]
            known = (row[:, 1:, None] * u[:, j + 1 : j + 1 + self.lower + self.upper]).sum(1)
            u[:, j] = (u[:, j] - known) / row[:, :1]

    def _eliminate_adjoint(self, rows: Tensor, taken: Tensor, u: Tensor) -> None:
        events = torch.arange(len(u), device=u.device)
        n = taken.shape[-1]
        for j in range(n):
            row = rows[:, j, self.lower :].conj()
            u[:, j] /= row[:, :1]
            u[:, j + 1 : j + 1 + self.lower + self.upper] -= row[:, 1:, None] * u[:, j : j + 1]
        u[:, n:] = 0
        for j in reversed(range(n)):
            multipliers = self._block(rows, j)[:, 1:, :1].conj()
            u[:, j] -= (multipliers * u[:, j + 1 : j + 1 + self.lower]).sum(1)
            self._exchange(u, events, j, taken[:, j])

    @staticmethod
    def _exchange(u: Tensor, events: Tensor, j: int, pivot: Tensor) -> None:
        top, chosen = u[:, j].clone(), u[events, j + pivot]
        u[events, j + pivot] = top
        u[:, j] = chosen

    def _block(self, rows: Tensor, j: int) -> Tensor:
        """Rows j to j + lower, columns j to j + lower + upper, as a view."""
        events, height, width = rows.shape
        shape, stride = (events, self.lower + 1, self.lower + self.upper + 1), (height * width, width - 1, 1)
        return rows.as_strided(shape, stride, rows.storage_offset() + j * width + self.lower)

    def pivots(self, factors: Factors) -> Tensor:
        return factors[0][..., : factors[1].shape[-1], self.lower]

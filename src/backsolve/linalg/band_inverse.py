"""The entries of A^-H within the bands of a band matrix A, in O(n log n).

Cut A in halves, `A = [[B, E], [F, D]]`, where only the corners of E and F are not zero. The first diagonal block of
A^-1 is the inverse of the Schur complement `B - E D^-1 F`, which is B with another last corner: a band matrix of half
the size. So all halves, quarters, ... are treated alike, until they are small enough to be inverted as they are.

Blocks are eliminated without pivots from their neighbours, and a block of a good matrix may be singular (as is a
tridiagonal one of odd size with a zero diagonal). `holds` tells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from backsolve.linalg.dense import LU
from backsolve.linalg.factored import Factored, Structure

SMALLEST = 32  # columns: below twice that, blocks are not cut


def band_of_inverse(structure: Structure, entries: Tensor, lower: int, upper: int) -> Tensor:
    """`conj((A^-1)_ji)` in the place of each entry a_ij.

    Args:
        structure: that of A and of its blocks.
        entries: the bands of A, shape `(*batch, lower + upper + 1, n)`.
        lower: the number of diagonals below the main one, not 0.
        upper: the number of diagonals above it, not 0.
    """
    n, size, halvings = entries.shape[-1], entries.shape[-1], 0
    while size >= 2 * max(SMALLEST, lower + upper):
        size, halvings = -(-size // 2), halvings + 1
    filling = size * 2**halvings - n
    identity = entries.new_zeros(lower + upper + 1, filling)
    identity[upper] = 1
    filled = torch.cat([entries, identity.expand(*entries.shape[:-1], filling)], -1)
    return _Cutting(structure, lower, upper, size).inverse(_without_corners(filled, upper))[..., :n]


def holds(entries: Tensor, inverse: Tensor) -> bool:
    """Whether `(A^-1 A)_jj = 1` for all j, up to rounding errors; for plain tensors."""
    terms = entries * inverse.conj()
    return bool(((terms.sum(-2) - 1).abs() <= torch.finfo(entries.dtype).eps ** 0.8 * terms.abs().sum(-2)).all())


class _Cutting:
    def __init__(self, structure: Structure, lower: int, upper: int, smallest: int) -> None:
        self.structure, self.lower, self.upper, self.smallest = structure, lower, upper, smallest

    def inverse(self, a: Tensor) -> Tensor:
        """For blocks of shape `(*batch, lower + upper + 1, size)`."""
        if a.shape[-1] == self.smallest:
            identity = torch.eye(self.smallest, dtype=a.dtype, device=a.device).expand(*a.shape[:-2], -1, -1)
            inverse = Factored(LU(), self.structure.matrix(a)).solve(identity, adjoint=True)
            return self.structure.outer(inverse, identity)
        lower, upper, half = self.lower, self.upper, a.shape[-1] // 2
        first, second = a[..., :half], a[..., half:]
        above, below = self._above(second), self._below(first)  # the corners of E and F
        ends = torch.cat([units(a, half, half - upper, upper), units(a, half, 0, lower)], -1)
        columns = Factored(self.structure, torch.stack([first, second], -3)).solve(
            ends.expand(*a.shape[:-2], 2, half, upper + lower)
        )
        last = columns[..., 0, half - lower :, :upper]  # of B^-1, which is what F and E see of it
        start = columns[..., 1, :upper, upper:]  # of D^-1
        there, back = above @ start @ below, below @ last @ above
        cut = torch.stack(
            [
                first - pad(self._in_bands(there, lower), (half - lower, 0)),
                second - pad(self._in_bands(back, upper), (0, half - upper)),
            ],
            -3,
        )
        # (A^-1)_12 = -(B - E D^-1 F)^-1 E D^-1 at its corner, and the same for (A^-1)_21
        one = _resolve(last @ there, last @ above @ start)
        other = _resolve(start @ back, start @ below @ last)
        inner = self.inverse(cut)
        return torch.cat(
            [
                inner[..., 0, :, :] - pad(self._from_below(one.mH), (half - lower, 0)),
                inner[..., 1, :, :] - pad(self._from_above(other.mH), (0, half - upper)),
            ],
            -1,
        )

    def _below(self, first: Tensor) -> Tensor:
        """F's corner from the last columns of B: column q has its entries in rows 0 to q."""
        last, k = first[..., first.shape[-1] - self.lower :], self.lower
        return torch.stack([pad(last[..., self.upper + k - q :, q], (0, k - 1 - q)) for q in range(k)], -1)

    def _above(self, second: Tensor) -> Tensor:
        """E's corner from the first columns of D: column q has its entries from row q on."""
        return torch.stack([pad(second[..., : self.upper - q, q], (q, 0)) for q in range(self.upper)], -1)

    def _from_below(self, corner: Tensor) -> Tensor:
        """The inverse of `_below`: the last columns in bands."""
        m, k = self.lower + self.upper + 1, self.lower
        return torch.stack([pad(corner[..., : q + 1, q], (m - q - 1, 0)) for q in range(k)], -1)

    def _from_above(self, corner: Tensor) -> Tensor:
        """The inverse of `_above`: the first columns in bands."""
        m, k = self.lower + self.upper + 1, self.upper
        return torch.stack([pad(corner[..., q:, q], (0, m - k + q)) for q in range(k)], -1)

    def _in_bands(self, corner: Tensor, begin: int) -> Tensor:
        """A corner of the diagonal, whose entry (0, 0) is in band `begin`: each column is one band higher up."""
        m, height = self.lower + self.upper + 1, corner.shape[-2]
        columns = [pad(corner[..., q], (begin - q, m - height - begin + q)) for q in range(corner.shape[-1])]
        return torch.stack(columns, -1)


def units(like: Tensor, n: int, begin: int, number: int) -> Tensor:
    """Columns of the identity."""
    return pad(torch.eye(number, dtype=like.dtype, device=like.device), (0, 0, begin, n - begin - number))


def _resolve(product: Tensor, b: Tensor) -> Tensor:
    """`(1 - product)^-1 b`, for small matrices."""
    identity = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return Factored(LU(), identity - product).solve(b)


def _without_corners(entries: Tensor, upper: int) -> Tensor:
    """Zeros where the bands lie outside of the matrix."""
    m, n = entries.shape[-2:]
    band, column = torch.arange(m, device=entries.device)[:, None], torch.arange(n, device=entries.device)
    row = column - upper + band
    return torch.where((row >= 0) & (row < n), entries, 0.0)

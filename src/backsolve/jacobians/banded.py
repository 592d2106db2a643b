"""f_i depends on its neighbours only, as on a grid: J is a band matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from backsolve import errors
from backsolve.jacobians.base import Assembled, Entries, Jacobian, Linearized
from backsolve.jacobians.factored import FactoredAt, split
from backsolve.jacobians.probe import find_outside
from backsolve.linalg import BandLU

_LARGE = 10_000  # elements: from here on a copy of the results costs more than calls of the engine


@dataclass(frozen=True)
class Banded(Jacobian):
    """`df_i / dy_j` is zero for `j < i - lower` and for `j > i + upper`, i and j counting the elements of an event.

    `lower + upper + 1` vector-Jacobian products give all of J: rows that far apart share no column, so one cotangent
    serves all of them (Curtis, Powell and Reid 1974). Time and memory are O(n): LAPACK's band LU on a CPU where SciPy
    is installed, the same algorithm in torch elsewhere (n small steps in Python); in a compiled function, too. The
    claim is checked.
    The gradient of the log-determinant takes O(n log n), and O(n^2) time where blocks of J are singular and J is not.

    Args:
        lower: the number of diagonals below the main one.
        upper: the number of diagonals above it.
        entries: the bands if they are known, called as `entries(y, *params, **kwargs)`, of shape
            `(*batch, lower + upper + 1, n)` in the layout of LAPACK and `scipy.linalg.solve_banded`:
            `entries[..., upper + i - j, j] = df_i / dy_j`. Corners outside of the matrix are not read.

    Example:
        >>> import torch
        >>> from backsolve import Banded, inverse
        >>> from torch.nn.functional import pad
        >>> f = lambda y: 3 * y - pad(y[..., :-1], (1, 0)) - pad(y[..., 1:], (0, 1))
        >>> A = torch.autograd.functional.jacobian(f, torch.zeros(4))
        >>> smooth = inverse(f, lambda x: torch.linalg.solve(A, x), event_dim=1, jacobian=Banded(1, 1))
        >>> x = torch.ones(4, requires_grad=True)
        >>> smooth(x).sum().backward()
        >>> x.grad
        tensor([0.6000, 0.8000, 0.8000, 0.6000])

    Reference:
        A. R. Curtis, M. J. D. Powell, J. K. Reid, On the estimation of sparse Jacobian matrices, 1974.
    """

    lower: int
    upper: int
    entries: Entries | None = None

    fills_when_traced = True

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise errors.bad_option(f"Banded({name})", "an integer >= 0", value)

    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:
        """The bands of each event."""
        k = len(y) - event_dim
        return torch.Size((*y[:k], self.lower + self.upper + 1, math.prod(y[k:])))

    def assemble(self, at: Linearized) -> Assembled:
        """Run `lower + upper + 1` vector-Jacobian products, or none if the entries are known."""
        return FactoredAt(BandLU(self.lower, self.upper), at, self._bands)

    def _bands(self, at: Linearized) -> Tensor:
        if at.known is not None:
            return at.known
        batch, event = split(at.y, at.event_dim)
        n, m = math.prod(event), self.lower + self.upper + 1

        units = at.y.new_zeros(n + m - 1)
        units[m - 1 :: m] = 1

        def rows_of(colour: int) -> Tensor:
            """1 in every m-th element from this one on: a window on the same memory for each colour."""
            cotangent = units[m - 1 - colour :][:n]
            return cotangent.reshape(*(1,) * len(batch), *event).expand(at.y.shape)

        if at.y.numel() > _LARGE:
            pulled = (at.pull(rows_of(colour)) for colour in range(m))  # each is sorted while it is in the cache
        else:
            pulled = at.pull_many(torch.stack([rows_of(colour) for colour in range(m)])).unbind()
        rows = (p.reshape(*batch, n).conj() for p in pulled)
        if at.transformed or torch.is_grad_enabled():
            return self._sorted(list(rows))
        return self._sorted_in_place(rows, at.y.new_empty(*batch, m, n))

    def _sorted(self, rows: list[Tensor]) -> Tensor:
        """The bands from what was pulled back: row `j - upper + d`, of the colour of this number, has entry [d, j]."""
        n, m = rows[0].shape[-1], len(rows)
        padded = [pad(p, (0, -n % m)).unflatten(-1, (-1, m)) for p in rows]
        bands = [
            torch.stack([padded[(j - self.upper + d) % m][..., j] for j in range(m)], -1).flatten(-2)[..., :n]
            for d in range(m)
        ]
        return torch.stack(bands, -2)

    def _sorted_in_place(self, rows: Iterable[Tensor], bands: Tensor) -> Tensor:
        """The same without a graph: each number is copied once."""
        m = bands.shape[-2]
        for colour, row in enumerate(rows):
            for d in range(m):
                j = (colour + self.upper - d) % m
                bands[..., d, j::m] = row[..., j::m]
        return bands

    def contradiction(self, at: Linearized, assembled: Assembled) -> str | None:
        """Look for an entry outside of the bands."""

        def reaches(columns: Tensor, rows: Tensor) -> Tensor:
            return (rows >= columns - self.upper) & (rows <= columns + self.lower)

        return find_outside(at, assembled, reaches)

"""What `jacobian=None` means where f mixes the elements of an event."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backsolve.jacobians.base import Assembled, Jacobian, Linearized
from backsolve.jacobians.dense import Dense
from backsolve.jacobians.matrix_free import MatrixFree, MatrixFreeAt

_MANY, _TOO_MANY = 2**18, 2**28  # entries of J in all events: from here on products are faster; no memory for more
_LONG = 256  # elements of an event: from here on GMRES pays, too, and not only the plain iteration
_PRODUCTS = 50
_PAUSE = 64  # calls
_DENSE = Dense()


@dataclass(frozen=True)
class Default(Jacobian):
    """J as a matrix, and as products where these were measured to be faster: from 2^18 entries on, on a CPU.

    There `w += v - J^T w` is tried, then GMRES for events of 256 elements and more, at most 50 products in all. Its
    residual is checked as always, and what it does not solve is solved with the matrix, which also tells if J is
    singular; the next 64 calls for events of this kind then begin with the matrix. If J has more than 2^28 entries
    there is no matrix, and an error says what to declare. The same holds in compiled functions and under torch.func,
    where the samples of a vmap count together, or each by itself if the levels need rules that compose.
    """

    _paused: dict[Any, int] = field(default_factory=dict, repr=False, compare=False)

    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:
        """A matrix for each event."""
        return _DENSE.entries_shape(y, event_dim)

    def is_formed(self, y: Tensor, event_dim: int) -> bool:
        """For few entries, and where products were not measured."""
        return _entries(y, event_dim) < _MANY or y.device.type != "cpu" or y.dtype not in (torch.float32, torch.float64)

    def assemble(self, at: Linearized) -> Assembled:
        """Choose by the number of entries, and by what happened before."""
        if torch.compiler.is_compiling() or self.is_formed(at.y, at.event_dim):
            return _DENSE.assemble(at)
        event = at.y.shape[at.y.dim() - at.event_dim :]
        n = math.prod(event)
        key = event, at.y.dtype
        if self._is_paused(key):
            return _DENSE.assemble(at)
        method = "gmres" if n >= _LONG else "richardson"
        if _entries(at.y, at.event_dim) > _TOO_MANY:
            return MatrixFreeAt(MatrixFree(), at)
        options = MatrixFree(method, maxiter=_PRODUCTS, restart=_PRODUCTS, fallback=_DENSE)
        return MatrixFreeAt(options, at, lambda: self._paused.update({key: _PAUSE}))

    def _is_paused(self, key: Any) -> bool:
        left = self._paused.get(key, 0)
        if left:
            self._paused[key] = left - 1
        return left > 0


def _entries(y: Tensor, event_dim: int) -> int:
    """How many entries J has in all events."""
    return y.numel() * math.prod(y.shape[y.dim() - event_dim :])

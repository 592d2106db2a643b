"""What `jacobian=None` means where f mixes the elements of an event."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backsolve.jacobians.base import Assembled, Jacobian, Linearized
from backsolve.jacobians.dense import Dense
from backsolve.jacobians.matrix_free import MatrixFree, MatrixFreeAt, Trial

_MANY, _TOO_MANY = 2**18, 2**28  # entries of J in all events: from here on products are faster; no memory for more
_LONG = 256  # elements of an event: from here on GMRES pays, too, and not only the plain iteration
_PRODUCTS = 60
_PAUSE = 64  # calls
_ROUNDINGS = 8  # of |v|: the residual to reach, nearly that of a direct solver, as nobody chose to have fewer digits
_CONDITION = 64.0  # of J, as far as it is seen: beyond, the digits that LU has more of begin to count
_DENSE = Dense()


@dataclass(frozen=True)
class Default(Jacobian):
    """J as a matrix, and as products where these were measured to be faster: from 2^18 entries on, on a CPU.

    There `w += v - J^T w` is tried (for more events than one), then GMRES for events of 256 elements and more, at most
    60 products in all, down to a residual of 8 eps. What that does not solve, or shows to be worse conditioned than 64,
    is solved with the matrix, which also tells if J is singular; the next 64 calls for events of this kind then begin
    with the matrix.

    A residual says nothing of a direction in which J is small and that v has no part in. So at the 1st, 2nd, 4th, ...
    and each 64th such solve for a kind of event a Gaussian vector, which has a part in every direction, is solved for
    as well.

    If J has more than 2^28 entries there is no matrix, and an error says what to declare. The same holds in compiled
    functions and under torch.func, where the samples of a vmap count together, or each by itself if the levels need
    rules that compose.
    """

    _trials: dict[Any, Trial] = field(default_factory=dict, repr=False, compare=False)

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
        if _entries(at.y, at.event_dim) > _TOO_MANY:
            return MatrixFreeAt(MatrixFree(), at)
        trial = self._trials.setdefault((event, at.y.dtype), Trial(_PAUSE))
        if trial.is_paused():
            return _DENSE.assemble(at)
        options = MatrixFree(
            "gmres" if n >= _LONG else "richardson",
            rtol=_ROUNDINGS * torch.finfo(at.y.dtype).eps,
            maxiter=_PRODUCTS,
            restart=_PRODUCTS,
            fallback=_DENSE,
            max_condition=_CONDITION,
        )
        return MatrixFreeAt(options, at, trial)


def _entries(y: Tensor, event_dim: int) -> int:
    """How many entries J has in all events."""
    return y.numel() * math.prod(y.shape[y.dim() - event_dim :])

"""f mixes all the elements of an event: J is a square matrix for each batch element."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from backsolve import errors
from backsolve.jacobians.base import Assembled, Entries, Jacobian, Linearized, evaluate_near
from backsolve.linalg import LU, Factored, spectral_radius


@dataclass(frozen=True)
class Dense(Jacobian):
    """J is a full n x n matrix for each batch element, n being the number of elements of an event.

    n vector-Jacobian products, run as one vectorised backward pass, give J; one LU factorisation (of J in float32 if
    y is float16 or bfloat16) solves with J and its transpose and gives the determinant. Time O(n^3), memory O(n^2) a
    batch element.

    Args:
        entries: J if it is known, called as `entries(y, *params, **kwargs)`, of shape `(*batch, *event, *event)` with
            the elements of f first: `entries[..., i, j] = df_i / dy_j`. It is itself differentiated for higher
            derivatives.

    Example:
        >>> import torch
        >>> from backsolve import inverse
        >>> A = torch.tensor([[2.0, 1.0], [0.0, 4.0]], dtype=torch.float64)
        >>> solve = inverse(lambda y: y @ A.T, lambda x: torch.linalg.solve(A, x), event_dim=1)
        >>> x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> solve(x).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.1250], dtype=torch.float64)
    """

    entries: Entries | None = None

    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:
        """A matrix for each event."""
        return y + y[len(y) - event_dim :]

    def assemble(self, at: Linearized) -> Assembled:
        """Run n vector-Jacobian products, or none if the entries are known."""
        return _DenseAt(self._matrix(at), at, self._matrix)

    @staticmethod
    def _matrix(at: Linearized) -> Tensor:
        batch, event = _split(at.y, at.event_dim)
        n = math.prod(event)
        if at.known is not None:
            return at.known.reshape(*batch, n, n)
        identity = torch.eye(n, dtype=at.y.dtype, device=at.y.device)
        cotangents = identity.reshape(n, *(1,) * len(batch), *event).expand(n, *batch, *event)
        return at.pull_many(cotangents).reshape(n, *batch, n).movedim(0, -2).conj()  # J^H e_i is the conjugate of row i


class _DenseAt(Assembled):
    def __init__(self, matrix: Tensor, at: Linearized, make: Callable[[Linearized], Tensor]) -> None:
        self.matrix = _at_least_float32(matrix)  # (*batch, n, n)
        self.at = at
        self.make = make

    @cached_property
    def lu(self) -> Factored:
        return Factored(LU(), self.matrix)

    def solve(self, b: Tensor) -> Tensor:
        return self.lu.solve(self._column(b)).reshape(b.shape).to(b.dtype)

    def solve_transposed(self, v: Tensor) -> Tensor:
        return self.lu.solve(self._column(v), adjoint=True).reshape(v.shape).to(v.dtype)

    def log_abs_det(self) -> Tensor:
        return self.lu.log_abs_det().to(self.at.y.dtype)

    def inverse(self) -> Tensor:
        n, (batch, event) = self.matrix.shape[-1], _split(self.at.y, self.at.event_dim)
        identity = torch.eye(n, dtype=self.matrix.dtype, device=self.matrix.device).expand_as(self.matrix)
        return self.lu.solve(identity).reshape(*batch, *event, *event).to(self.at.y.dtype)

    def singular(self) -> Tensor | None:
        """Where J is singular to working precision, or carries no digit because of the rounding of y.

        The second happens where some equation is at a turning point: `(J y)_i` is as small as the rounding of f_i.
        Then J is worked out once more at a y moved by its rounding, and must not change by half, relative to itself.
        """
        failed = self.lu.singular()
        if not self._is_suspect():
            return failed
        return self._lost() if failed is None else failed | self._lost()

    def singular_mask(self) -> Tensor:
        """The same with the second look at every event."""
        return self.lu.singular_mask() | self._lost()

    def _lost(self) -> Tensor:
        """Where the rounding of y alone changes J by half, so that no digit of its inverse is left."""
        near = evaluate_near(self.make, self.at, self.at.y * (1 + 4 * torch.finfo(self.at.y.dtype).eps))
        if near is None or not near.numel():
            return torch.full(self.matrix.shape[:-2], near is None, device=self.matrix.device)
        with torch.no_grad():
            return ~(spectral_radius(self.lu.solve(_at_least_float32(near) - self.matrix).abs()) < 0.5)

    def _is_suspect(self) -> bool:
        """Whether any event is; an implicit function has no x to compare with, so all of its events are."""
        if self.at.implicit or not self.matrix.numel():
            return self.at.implicit
        change = self.matrix.detach() @ self._column(self.at.y.detach())  # at most |J| |y|, and a kernel less
        size = self._column(self.at.value)
        return not bool((change.abs_() > 4 * torch.finfo(self.at.y.dtype).eps * size.abs()).all())

    def transposed_times(self, u: Tensor) -> Tensor:
        return (self.matrix.mH @ self._column(u)).reshape(u.shape).to(u.dtype)

    def rounding(self, u: Tensor) -> Tensor:
        bound = (self.matrix.mT.abs() @ self._column(u).abs()).reshape(u.shape).to(u.dtype)
        return 8 * self.matrix.shape[-1] * torch.finfo(u.dtype).eps * bound

    def numbers(self, index: tuple[int, ...]) -> str:
        return errors.singular_values(self.matrix[index])

    def _column(self, b: Tensor) -> Tensor:
        return b.reshape(*self.matrix.shape[:-1], 1).to(self.matrix.dtype)


def _at_least_float32(t: Tensor) -> Tensor:
    """No LU exists for less."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _split(y: Tensor, event_dim: int) -> tuple[torch.Size, torch.Size]:
    """The batch and the event part of a shape."""
    return y.shape[: y.dim() - event_dim], y.shape[y.dim() - event_dim :]

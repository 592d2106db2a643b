"""f mixes all the elements of an event: J is a square matrix for each batch element."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backsolve import errors
from backsolve.jacobians.base import Assembled, Entries, Jacobian, Linearized
from backsolve.jacobians.equations import Equations
from backsolve.jacobians.factored import FactoredAt, dense_matrix
from backsolve.linalg import LU, Cholesky


@dataclass(frozen=True)
class Dense(Jacobian):
    """J is a full n x n matrix for each batch element, n being the number of elements of an event.

    n vector-Jacobian products, run as one vectorised backward pass, or as several where that keeps them in the cache,
    give J; one factorisation (of J in float32 if y is float16 or bfloat16) solves with J and its transpose and gives
    the determinant. Time O(n^3), memory O(n^2) a batch element.

    Args:
        entries: J if it is known, called as `entries(y, *params, **kwargs)`, of shape `(*batch, *event, *event)` with
            the elements of f first: `entries[..., i, j] = df_i / dy_j`. It is itself differentiated for higher
            derivatives.
        symmetric: the claim that J is symmetric, which is then checked; the work is that of LU all the same.
        positive_definite: the claim that J is symmetric and positive definite: Cholesky in the place of LU. A negative
            eigenvalue raises StructureError at every solve.
        gauge: what determines y where f has fewer equations than unknowns: `MinimumNorm()` or `Constrained(h)`.
        subspace: where y lives if f maps only a subspace of matrices invertibly: `Symmetric()` or `LowerTriangular()`.

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
    symmetric: bool = False
    positive_definite: bool = False
    gauge: Equations | None = None
    subspace: Equations | None = None

    def __post_init__(self) -> None:
        if self.gauge is not None and self.subspace is not None:
            raise errors.bad_option("Dense(gauge, subspace)", "one of them", (self.gauge, self.subspace))
        if self.equations is not None and (self.entries or self.symmetric or self.positive_definite):
            raise errors.bad_option("Dense(gauge or subspace)", "no claims about J beside it", self)

    @property
    def equations(self) -> Equations | None:
        """What is added to `f(y) = x`."""
        return self.gauge or self.subspace

    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:
        """A matrix for each event."""
        return y + y[len(y) - event_dim :]

    def assemble(self, at: Linearized) -> Assembled:
        """Run n vector-Jacobian products, or none if the entries are known."""
        return FactoredAt(Cholesky() if self.positive_definite else LU(), at, dense_matrix)

    def contradiction(self, at: Linearized, assembled: Assembled) -> str | None:  # noqa: ARG002
        """Compare J with its transpose, if it was declared symmetric."""
        assert isinstance(assembled, FactoredAt)
        a = assembled.entries.detach()
        if not (self.symmetric or self.positive_definite) or not a.numel():
            return None
        # Both halves come from one formula by different orders of the same sums: a quarter of the digits is granted.
        size = a.abs().amax((-2, -1), keepdim=True)
        wrong = (a - a.mH).abs() > torch.finfo(a.dtype).eps ** 0.75 * size
        if not wrong.any():
            return None
        *batch, i, j = (int(k) for k in wrong.nonzero()[0])
        at_index = (*batch, i, j), (*batch, j, i)
        return "; ".join(f"J{list(index)} = {a[index].item():.9g}" for index in at_index)

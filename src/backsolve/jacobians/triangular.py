"""f_i depends on y_j for j <= i only, as in autoregressive flows: J is a triangular matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve.jacobians.base import Assembled, Entries, Jacobian, Linearized
from backsolve.jacobians.factored import FactoredAt, dense_matrix
from backsolve.jacobians.probe import find_outside
from backsolve.linalg import Substitution


@dataclass(frozen=True)
class Triangular(Jacobian):
    """J is a lower (or upper) triangular matrix for each batch element.

    n vector-Jacobian products give J; substitution solves, without a factorisation and without its O(n^3). The
    determinant is the product of the diagonal. The claim is checked.

    Args:
        upper: f_i depends on y_j for j >= i; by default, for j <= i.
        entries: J if it is known, as for `Dense`; the other triangle is not read.

    Example:
        >>> import torch
        >>> from backsolve import Triangular, inverse
        >>> f = lambda y: y.cumsum(-1)
        >>> steps = inverse(f, lambda x: x.diff(prepend=x.new_zeros(1)), event_dim=1, jacobian=Triangular())
        >>> x = torch.tensor([1.0, 3.0, 6.0], requires_grad=True)
        >>> steps(x)[2].backward()
        >>> x.grad  # y_2 = x_2 - x_1
        tensor([ 0., -1.,  1.])
    """

    upper: bool = False
    entries: Entries | None = None

    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:
        """A matrix for each event."""
        return y + y[len(y) - event_dim :]

    def assemble(self, at: Linearized) -> Assembled:
        """Run n vector-Jacobian products, or none if the entries are known."""
        return FactoredAt(Substitution(self.upper), at, dense_matrix)

    def contradiction(self, at: Linearized, assembled: Assembled) -> str | None:
        """Look for an entry in the other triangle."""

        def reaches(columns: Tensor, rows: Tensor) -> Tensor:
            return rows <= columns if self.upper else rows >= columns

        return find_outside(at, assembled, reaches)

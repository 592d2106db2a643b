"""The contract of every Jacobian structure.

To add a structure, write a `Jacobian` (the claim: a frozen dataclass with the user's options) and an `Assembled` (its
numbers at one y), export it, and add it to the table of problems in the tests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from backsolve.jacobians.equations import Equations

Entries = Callable[..., Tensor]  # entries(y, *params, **kwargs) -> the known entries of J


class Linearized(Protocol):
    """What a structure may ask of f at one y. With grad mode on, everything here is differentiable."""

    y: Tensor  # (*batch, *event)
    inputs: Sequence[Tensor]  # the params' tensors, and what f closes over
    event_dim: int
    implicit: bool  # whether f(y) is 0 by definition, so that its size says nothing
    transformed: bool  # whether products come from torch.func, and tensors may be wrapped
    known: Tensor | None  # the entries of J by the user's formula, if there is one

    @property
    def value(self) -> Tensor:
        """f(y), shape `(*batch, *event)`, detached; for plain tensors only."""
        ...

    def pull(self, v: Tensor) -> Tensor:
        """`J^T v` for one cotangent of the shape of y: one vector-Jacobian product."""
        ...

    def pull_many(self, vs: Tensor) -> Tensor:
        """`J^T v` for a stack of cotangents, shape `(k, *batch, *event)`."""
        ...

    def pull_inputs(self, v: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """`f_p^T v` for the inputs that are wanted, None for the others and for those that f does not use."""
        ...

    def moved(self, y: Tensor) -> Linearized:
        """f linearised at another y."""
        ...


class Assembled(ABC):
    """J at one y, ready to solve. One factorisation serves every method."""

    @abstractmethod
    def solve(self, b: Tensor) -> Tensor:
        """`J^-1 b`, shape `(*batch, *event)`."""

    @abstractmethod
    def solve_transposed(self, v: Tensor) -> Tensor:
        """`J^-T v`, shape `(*batch, *event)`."""

    @abstractmethod
    def log_abs_det(self) -> Tensor:
        """`log|det J|`, shape `(*batch,)`."""

    @abstractmethod
    def inverse(self) -> Tensor:
        """`J^-1 = dy/dx`, shape of y if `event_dim = 0`, else `(*batch, *event, *event)`."""

    @abstractmethod
    def singular(self) -> Tensor | None:
        """Which events have no usable inverse, shape `(*batch,)`; None if it is plain that there is none.

        Cheap tests first: only suspects are looked at twice. That branches on values, so y and J must be plain tensors:
        under torch.func it is called `concretely`.
        """

    @abstractmethod
    def suspicious(self) -> Tensor:
        """Whether some event may be singular, as a 0-d tensor, for a compiled graph, which cannot branch.

        Cheap, and True too often rather than too rarely: then `singular` is asked outside of the graph.
        """

    @abstractmethod
    def times(self, u: Tensor) -> Tensor:
        """`J u`, without a graph."""

    @abstractmethod
    def transposed_times(self, u: Tensor) -> Tensor:
        """`J^T u` from the assembled entries."""

    @abstractmethod
    def rounding(self, u: Tensor) -> Tensor:
        """A bound on the rounding error of `transposed_times(u)`, elementwise."""

    def formed(self, purpose: str) -> Assembled:  # noqa: ARG002
        """J with its entries, for a purpose that needs them; raises if they would be too many."""
        return self

    @abstractmethod
    def numbers(self, index: tuple[int, ...]) -> str:
        """What to print about the event at this index in an error."""


class Jacobian(ABC):
    """A claim about the structure of J."""

    entries: Entries | None = None
    """The entries of J where they are known; autograd finds them otherwise."""

    unit_dims: int | None = None
    """How many rightmost dimensions of y form one unit that no other unit influences; None: those of the event."""

    fills_when_traced: bool = False
    """Whether torch.func in a compiled graph would make a matrix of entries that are fewer."""

    @property
    def equations(self) -> Equations | None:
        """What determines y besides `f(y) = x`."""
        return None

    @abstractmethod
    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:
        """The shape of the entries for a y of this shape."""

    def is_formed(self, y: Tensor, event_dim: int) -> bool:  # noqa: ARG002
        """Whether entries of J are worked out for a y of this shape, dtype and device, rather than products only."""
        return True

    @abstractmethod
    def assemble(self, at: Linearized) -> Assembled:
        """Work out J at `at.y`, from `at.known` or by vector-Jacobian products."""

    def contradiction(self, at: Linearized, assembled: Assembled) -> str | None:  # noqa: ARG002
        """What in J contradicts the claim, if the claim is about the inside of an event; None if nothing does."""
        return None


def evaluate_near(make: Callable[[Linearized], Tensor], at: Linearized, y: Tensor) -> Tensor | None:
    """The entries of J at a y beside `at.y`, without a graph; None if f raises there, outside its domain."""
    try:
        with torch.no_grad():
            return make(at.moved(y.detach()))
    except Exception:  # noqa: BLE001 (f may raise whatever it likes)
        return None

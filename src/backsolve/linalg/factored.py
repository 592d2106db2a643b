"""One factorisation of a structured matrix for A, its adjoint and log|det A|, differentiable to any order.

A is given by a tensor of entries (all of a dense matrix, the bands of a banded one) in which it is linear. What depends
on the structure is in a `Structure`; the calculus is written here once for all:

    u = A^-1 b       du = A^-1 (db - dA u)          gradient of b: h = A^-H v, of the entries: -(dA -> dA u)^H h
    log|det A|       d log|det A| = Re tr(A^-1 dA)  gradient of the entries: (dA -> dA I)^H A^-H

For `A^H` in the place of A, exchange h and u in the gradient of the entries.

`torch.linalg.solve` factorises anew in each backward pass, and in torch 2.13 it, `lu_solve` and `det` return wrong
numbers under some nested transforms (vmap of jacfwd, vmap of vmap, jacfwd of jacfwd).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from backsolve._functorch import fold_batched_grads, is_grads_batched
from backsolve._torch import active_transform, tangents_of_tangents, without_autocast
from backsolve.linalg import traced
from backsolve.linalg.concrete import concretely, to_front

Factors = tuple[Tensor, ...]


class Structure(ABC):
    """Which entries a matrix has, and how it is factorised. Right-hand sides have the shape `(*batch, n, k)`.

    `factor`, `solve`, `log_abs_det` and `singular` see plain tensors and need not be differentiable; the others are
    written in differentiable operations that do not branch on values.
    """

    @property
    def bands(self) -> tuple[int, int] | None:
        """How many diagonals there are below and above the main one, if these are the entries."""
        return None

    @abstractmethod
    def factor(self, entries: Tensor) -> Factors:
        """Factorise; every factor has the batch dimensions of the entries on its left."""

    @abstractmethod
    def solve(self, factors: Factors, b: Tensor, adjoint: bool) -> Tensor:
        """`A^-1 b`, or `A^-H b`; one k for all events, batch dimensions equal."""

    @abstractmethod
    def log_abs_det(self, factors: Factors) -> Tensor:
        """`log|det A|`, shape `(*batch,)`; minus infinity where A is singular."""

    @abstractmethod
    def singular(self, entries: Tensor, factors: Factors) -> Tensor | None:
        """Which matrices are singular to working precision, shape `(*batch,)`; None if it is plain that none is."""

    @abstractmethod
    def times(self, entries: Tensor, u: Tensor, adjoint: bool) -> Tensor:
        """`A u`, or `A^H u`."""

    @abstractmethod
    def outer(self, h: Tensor, u: Tensor) -> Tensor:
        """The adjoint of `entries -> A u` at h: those entries of `h u^H` that A has."""

    @abstractmethod
    def matrix(self, entries: Tensor) -> Tensor:
        """A in full, shape `(*batch, n, n)`."""

    @abstractmethod
    def diagonal(self, entries: Tensor) -> Tensor:
        """The main diagonal of A, shape `(*batch, n)`."""

    def solve_once(self, entries: Tensor, b: Tensor, adjoint: bool) -> Tensor | None:  # noqa: ARG002
        """`A^-1 b` where one call does that faster than `factor` and `solve`, and A is far from singular; else None."""
        return None

    def factor_and_solve(self, entries: Tensor, b: Tensor, adjoint: bool) -> tuple[Factors, Tensor]:
        """Both at once, for structures that have one call for it."""
        factors = self.factor(entries)
        return factors, self.solve(factors, b, adjoint)

    def log_det_gradient(self, a: Factored) -> Tensor:
        """The gradient of `log|det A|` with respect to the entries: those of `A^-H` that A has."""
        n = a.entries.shape[-1]
        identity = torch.eye(n, dtype=a.entries.dtype, device=a.entries.device)
        identity = identity.expand(*a.batch, n, n)
        return self.outer(a.solve(identity, adjoint=True), identity)


class Factored:
    """A batch of matrices with their factorisation.

    Gradients flow to `entries` and to the right-hand sides.

    Args:
        structure: what the entries are entries of.
        entries: of shape `(*batch, m, n)`, n being the size of the matrices.
        factors: those of the entries, if they are known.
    """

    def __init__(self, structure: Structure, entries: Tensor, factors: Factors | None = None) -> None:
        self.structure = structure
        self.entries = entries
        if torch.compiler.is_compiling():  # torch drops the gradients of custom Functions there (pytorch #193279)
            factors = ()
        self._factors = factors
        self._plainly_regular = False

    @property
    def factors(self) -> Factors:
        """Those of A, worked out when they are first needed."""
        if self._factors is None:
            self._factors = concretely(self.structure.factor, self.entries)
        return self._factors

    @property
    def batch(self) -> torch.Size:
        """The batch dimensions."""
        return self.entries.shape[:-2]

    def solve(self, b: Tensor, *, adjoint: bool = False) -> Tensor:
        """Solve `A u = b`, or `A^H u = b`; b has shape `(*batch, n, k)`."""
        if torch.compiler.is_compiling():
            return traced.solve(self.structure, self.entries, b, adjoint)
        if is_grads_batched(b):
            return fold_batched_grads(lambda columns: self._solve_columns(columns, adjoint), b)
        if active_transform() is not None:
            return _Solve.apply(self.structure, adjoint, self.entries, b, *self.factors)
        if torch.is_grad_enabled() and (self.entries.requires_grad or b.requires_grad):
            return _EagerSolve.apply(self, adjoint, self.entries, b)
        if self._factors is not None:
            return self.structure.solve(self._factors, b, adjoint)
        if (u := self.structure.solve_once(self.entries, b, adjoint)) is not None:
            self._plainly_regular = True
            return u
        self._factors, u = self.structure.factor_and_solve(self.entries, b, adjoint)
        return u

    def _solve_columns(self, columns: Tensor, adjoint: bool) -> Tensor:
        """Solve for right-hand sides of shape `(*batch, n, k, l)`."""
        return self.solve(columns.flatten(-2), adjoint=adjoint).unflatten(-1, columns.shape[-2:])

    def log_abs_det(self) -> Tensor:
        """Return `log|det A|`, shape `(*batch,)`; minus infinity where A is singular."""
        if torch.compiler.is_compiling():
            return traced.log_abs_det(self.structure, self.entries)
        return _LogAbsDet.apply(self.structure, self.entries, *self.factors)

    def singular(self) -> Tensor | None:
        """Tell which matrices are singular to working precision, shape `(*batch,)`; None if it is plain that none is.

        For plain tensors: under a transform, call it `concretely`.
        """
        return None if self._plainly_regular else self.structure.singular(self.entries.detach(), self.factors)

    def suspicious(self) -> Tensor:
        """Whether some matrix may be singular, as a 0-d tensor, without branching; see `Structure.singular`."""
        return traced.suspicious(self.structure, self.entries.detach())


def _solve_vjp(a: Factored, adjoint: bool, u: Tensor, v: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor]:
    """The gradients of the entries and of b."""
    with without_autocast(v.device):
        h = a.solve(v, adjoint=not adjoint)
        by_entries = -(a.structure.outer(u, h) if adjoint else a.structure.outer(h, u)) if wanted else None
    return by_entries, h


class _EagerSolve(torch.autograd.Function):
    """`u = A^-1 b`, or `A^-H b`, outside of transforms: a third of the overhead of `_Solve`."""

    @staticmethod
    def forward(ctx: Any, a: Factored, adjoint: bool, entries: Tensor, b: Tensor) -> Tensor:
        u = a.structure.solve(a.factors, b, adjoint)
        ctx.structure, ctx.factors, ctx.adjoint = a.structure, a.factors, adjoint
        ctx.save_for_backward(entries, u)
        return u

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        entries, u = ctx.saved_tensors
        a = Factored(ctx.structure, entries, ctx.factors)
        return None, None, *_solve_vjp(a, ctx.adjoint, u, grads[0], ctx.needs_input_grad[2])


class _Solve(torch.autograd.Function):
    """`u = A^-1 b`, or `A^-H b`, under any transform."""

    @staticmethod
    def forward(structure: Structure, adjoint: bool, entries: Tensor, b: Tensor, *factors: Tensor) -> Tensor:
        return structure.solve(factors, b, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, ctx.adjoint, entries, _, *factors = inputs
        ctx.save_for_backward(entries, output, *factors)
        ctx.save_for_forward(entries, output, *factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        entries, u, *factors = ctx.saved_tensors
        a = Factored(ctx.structure, entries, tuple(factors))
        gradients = _solve_vjp(a, ctx.adjoint, u, grads[0], ctx.needs_input_grad[2])
        return None, None, *gradients, *(None for _ in factors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        _, _, t_entries, t_b, *_ = tangents
        with tangents_of_tangents():
            entries, u, *factors = (primal(t) for t in ctx.saved_tensors)
            b = torch.zeros_like(u) if t_b is None else primal(t_b)
            if t_entries is not None:
                b = b - ctx.structure.times(primal(t_entries), u, ctx.adjoint)
            return Factored(ctx.structure, entries, tuple(factors)).solve(b, adjoint=ctx.adjoint)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        structure, adjoint, entries, b, *factors = args
        b_dim = in_dims[3]
        if b_dim is not None and all(d is None for d in (in_dims[2], *in_dims[4:])):
            columns = b.movedim(b_dim, -1)  # one matrix for all right-hand sides: (*batch, n, k, size)
            u = _Solve.apply(structure, adjoint, entries, columns.flatten(-2), *factors)
            return u.unflatten(-1, columns.shape[-2:]), u.dim()
        moved = to_front(info.batch_size, in_dims[2:], (entries, b, *factors))
        return _Solve.apply(structure, adjoint, *moved), 0


class _LogAbsDet(torch.autograd.Function):
    """`log|det A|` from the factors, under any transform."""

    @staticmethod
    def forward(structure: Structure, entries: Tensor, *factors: Tensor) -> Tensor:
        return structure.log_abs_det(factors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.structure, entries, *factors = inputs
        ctx.save_for_backward(entries, *factors)
        ctx.save_for_forward(entries, *factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        entries, *factors = ctx.saved_tensors
        with without_autocast(entries.device):
            gradient = ctx.structure.log_det_gradient(Factored(ctx.structure, entries, tuple(factors)))
            return None, grads[0][..., None, None] * gradient, *(None for _ in factors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        t_entries = tangents[1]
        assert t_entries is not None
        with tangents_of_tangents():
            entries, *factors = (primal(t) for t in ctx.saved_tensors)
            gradient = ctx.structure.log_det_gradient(Factored(ctx.structure, entries, tuple(factors)))
            return (gradient.conj() * primal(t_entries)).sum((-2, -1)).real

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        structure, *tensors = args
        return _LogAbsDet.apply(structure, *to_front(info.batch_size, in_dims[1:], tensors)), 0


def primal(t: Tensor) -> Tensor:
    """A tensor without its tangent at the innermost level of forward AD."""
    return forward_ad.unpack_dual(t).primal

"""J is never formed: only its products with vectors are, in a Krylov method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from backsolve import errors
from backsolve._torch import GradMode, active_transform, fold_batched_grads, is_grads_batched
from backsolve.jacobians.base import Assembled, Jacobian, Linearized
from backsolve.jacobians.factored import FactoredAt, dense_matrix, split
from backsolve.linalg import LU, Krylov, Operator, bicgstab, gmres

Preconditioner = Callable[[Tensor, Tensor, bool], Tensor]

_DENSE = 1024  # elements of an event: up to here J may be formed where there is no other way


@dataclass(frozen=True)
class MatrixFree(Jacobian):
    """J is used through vector-Jacobian products only: memory O(n) times the size of the Krylov space.

    `J^T w = v` is solved by iteration, every event by itself, and its residual is computed from its definition at the
    end: what has not converged raises ConvergenceError or goes to the fallback. The derivative of such a solve is
    another one, to any order.

    A J that is singular, or at a turning point, shows only as a solve that does not converge; what happens then, says
    `on_failure`. The log-determinant,
    `Inverse.jacobian`, torch.func, forward-mode AD and torch.compile need all of J, which is formed for events of up to
    1024 elements and refused with StructureError for larger ones.

    Args:
        method: "gmres", which is robust and keeps `restart` vectors, or "bicgstab", which keeps seven.
        rtol: the relative residual `|J^T w - v| / |v|` to reach, in the Euclidean norm of each event; the default is
            `eps ** 0.8` of the dtype (3e-13 in float64, 3e-6 in float32). A residual of `4 eps |J| |w|`, the best that
            a direct solver can do, is enough as well, as long as it is below `sqrt(eps) |v|`.
        maxiter: the largest number of products with J or its transpose.
        restart: the size at which GMRES throws its basis away.
        preconditioner: called as `preconditioner(r, y, transposed)`, an approximation of `J^-1 r` at y, or of
            `J^-T r`; linear in r, and batched as y is.
        fallback: what solves for the events that have not converged, such as `Dense()`; None: raise.

    Example:
        >>> import torch
        >>> from backsolve import MatrixFree, inverse
        >>> f = lambda y: y + 0.1 * y.roll(1, -1)
        >>> g = lambda x: torch.linalg.solve(f(torch.eye(3)).mT, x)
        >>> x = torch.ones(3, requires_grad=True)
        >>> inverse(f, g, event_dim=1, jacobian=MatrixFree())(x).sum().backward()
        >>> x.grad
        tensor([0.9091, 0.9091, 0.9091])
    """

    method: Literal["gmres", "bicgstab"] = "gmres"
    rtol: float | None = None
    maxiter: int = 1000
    restart: int = 50
    preconditioner: Preconditioner | None = None
    fallback: Jacobian | None = None

    def __post_init__(self) -> None:
        if self.method not in ("gmres", "bicgstab"):
            raise errors.bad_option("MatrixFree(method)", "'gmres' or 'bicgstab'", self.method)
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise errors.bad_option("MatrixFree(rtol)", "None, or a number between 0 and 1", self.rtol)
        for name in ("maxiter", "restart"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise errors.bad_option(f"MatrixFree({name})", "an integer >= 1", value)

    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:
        """There are none."""
        raise NotImplementedError

    def assemble(self, at: Linearized) -> Assembled:
        """Keep f at y: the work is in the solves."""
        if active_transform() is not None or is_compiling():
            return formed(at, "a transform of torch")
        return MatrixFreeAt(self, at)


class MatrixFreeAt(Assembled):
    """J at one y, as products. What it returns carries no graph: the implicit rule is applied to the linear system."""

    def __init__(self, options: MatrixFree, at: Linearized) -> None:
        self.options = options
        self.at = at
        self.unsolved: tuple[Tensor, errors.ConvergenceError] | None = None  # events of the last solve, which are NaN

    def suspicious(self) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=self.at.y.device)

    def transposed_structure(self) -> Jacobian:
        """How to represent `J^T`, the Jacobian of `w -> J^T w`."""
        own, y = self.options.preconditioner, self.at.y.detach()
        if own is None:
            return replace(self.options, fallback=None)
        return replace(self.options, preconditioner=lambda r, _, transposed: own(r, y, not transposed), fallback=None)

    @torch.no_grad()
    def solve(self, b: Tensor) -> Tensor:
        with GradMode(True):  # J t is the transpose of v -> J^T v
            v = torch.zeros_like(self.at.y).requires_grad_()
            pulled = self.at.pull(v)

        def push(t: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(pulled, v, t, retain_graph=True, materialize_grads=True)
            return product

        return self._iterate(push, b, transposed=False)

    @torch.no_grad()
    def solve_transposed(self, v: Tensor) -> Tensor:
        return self._iterate(self.at.pull, v, transposed=True)

    def _iterate(self, apply: Operator, b: Tensor, transposed: bool) -> Tensor:
        options, y = self.options, self.at.y.detach()
        n = math.prod(split(b, self.at.event_dim)[1])
        if not b.numel():
            return b.clone()  # b itself would be an input and the output of one autograd node
        if is_grads_batched(b):

            def each(columns: Tensor) -> Tensor:
                return torch.stack([self._iterate(apply, c, transposed) for c in columns.unbind(-1)], -1)

            return fold_batched_grads(each, b)
        own = options.preconditioner

        def precondition(r: Tensor) -> Tensor:
            assert own is not None
            return own(r.reshape(b.shape), y, transposed).reshape(r.shape)

        def product(u: Tensor) -> Tensor:
            return apply(u.reshape(b.shape)).reshape(u.shape)

        found = self._method(product, b.detach().reshape(-1, n), precondition if own else None)
        u = found.solution.reshape(b.shape)
        if found.converged.all():
            return u
        batch = split(b, self.at.event_dim)[0]
        converged = found.converged.reshape(*batch, *(1,) * self.at.event_dim)
        if options.fallback is None:
            self.unsolved = ~found.converged.reshape(batch), self._error(found, batch)
            return torch.where(converged, u, torch.nan)
        direct = options.fallback.assemble(self.at)
        return torch.where(converged, u, direct.solve_transposed(b) if transposed else direct.solve(b))

    def _method(self, apply: Operator, b: Tensor, precondition: Operator | None) -> Krylov:
        options = self.options
        rtol = torch.finfo(b.dtype).eps ** 0.8 if options.rtol is None else options.rtol
        k = options.maxiter
        if options.method == "gmres":
            return gmres(apply, b, rtol=rtol, maxiter=k, restart=options.restart, precondition=precondition)
        return bicgstab(apply, b, rtol=rtol, maxiter=k, precondition=precondition)

    def _error(self, found: Krylov, batch: torch.Size) -> errors.ConvergenceError:
        failed = ~found.converged.reshape(batch)
        first = tuple(int(i) for i in failed.nonzero()[0])
        residual = found.residual.reshape(batch)[first].item()
        return errors.krylov(self.options.method, int(failed.sum()), failed.numel(), first, residual, found.products)

    def log_abs_det(self) -> Tensor:
        return formed(self.at, "the log-determinant").log_abs_det()

    def inverse(self) -> Tensor:
        return formed(self.at, "Inverse.jacobian").inverse()

    def singular(self) -> Tensor | None:
        """Which events the last solve left unsolved; a singular J shows in nothing else."""
        return None if self.unsolved is None else self.unsolved[0]

    def singular_mask(self) -> Tensor:
        return torch.zeros(split(self.at.y, self.at.event_dim)[0], dtype=torch.bool, device=self.at.y.device)

    def transposed_times(self, u: Tensor) -> Tensor:
        return self.at.pull(u)

    def rounding(self, u: Tensor) -> Tensor:
        """Below every difference: nothing was assembled to compare with, so every event is examined."""
        return torch.full_like(u, -1.0)

    def numbers(self, index: tuple[int, ...]) -> str:
        return f"y = {self.at.y[index].flatten()[:3].tolist()}"


def formed(at: Linearized, purpose: str) -> FactoredAt:
    """J as a matrix after all, for what has no other way."""
    n = math.prod(split(at.y, at.event_dim)[1])
    if n > _DENSE:
        raise errors.needs_matrix(purpose, n, _DENSE)
    return FactoredAt(LU(), at, dense_matrix)

"""J is never formed: only its products with vectors are, in a Krylov method."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from backsolve import errors
from backsolve._functorch import fold_batched_grads, is_grads_batched
from backsolve._random import gaussian_like
from backsolve._solution import event_norm, first_index
from backsolve._torch import GradMode, not_traced
from backsolve.jacobians.base import Assembled, Jacobian, Linearized
from backsolve.jacobians.dense import Dense
from backsolve.jacobians.factored import FactoredAt, dense_matrix, split
from backsolve.linalg import LU, Krylov, Operator, bicgstab, cg, gmres, richardson

Preconditioner = Callable[[Tensor, Tensor, bool], Tensor]

_DENSE = 1024  # elements of an event: up to here J may be formed where there is no other way


@dataclass(frozen=True)
class MatrixFree(Jacobian):
    """J is used through vector-Jacobian products only: memory O(n) times the size of the Krylov space.

    `J^T w = v` is solved by iteration, every event by itself, and its residual is computed from its definition at the
    end: what has not converged raises ConvergenceError or goes to the fallback. The derivative of such a solve is
    another one, to any order.

    A singular J shows as a solve that does not converge, and a turning point of f as one whose large solution means
    nothing for a J beside y; what happens then, says `on_failure`. All of this holds under torch.func and forward-mode
    AD, where mapped dimensions are batch dimensions of the iteration, and in compiled functions. The log-determinant
    and `Inverse.jacobian` need all of J, which is formed for events of up to 1024 elements and refused with
    StructureError for larger ones.

    Args:
        method: "gmres", which is robust and keeps `restart` vectors; "bicgstab", which keeps seven; "cg" for a J that
            is symmetric, which is checked, and positive definite: a direction of negative curvature raises
            StructureError; "richardson", `w += v - J^T w`, the adjoint of a fixed-point iteration, for a J within 1/2
            of the identity.
        rtol: the relative residual `|J^T w - v| / |v|` to reach, in the Euclidean norm of each event; the default is
            `eps ** 0.8` of the dtype (3e-13 in float64, 3e-6 in float32). A residual of `4 eps |J| |w|`, the best that
            a direct solver can do, is enough as well, as long as it is below `sqrt(eps) |v|`.
        maxiter: the largest number of products with J or its transpose.
        restart: the size at which GMRES throws its basis away.
        preconditioner: called as `preconditioner(r, y, transposed)`, an approximation of `J^-1 r` at y, or of
            `J^-T r`; linear in r, and batched as y is, mapped dimensions first: it sees plain tensors.
        fallback: what solves for the events that have not converged, such as `Dense()`, and those with so large a w
            that J may be singular; it also gives what needs all of J. None: raise.
        max_condition: the largest condition of J (as it is preconditioned) with which GMRES is believed: the error of w
            is up to that times the residual. It is estimated from the Krylov space of v, so that only a direction that
            v has a part in is seen. An event beyond goes to the fallback, or is an error. None: any.

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

    method: Literal["gmres", "bicgstab", "cg", "richardson"] = "gmres"
    rtol: float | None = None
    maxiter: int = 1000
    restart: int = 50
    preconditioner: Preconditioner | None = None
    fallback: Jacobian | None = None
    max_condition: float | None = None

    def __post_init__(self) -> None:
        if self.method not in ("gmres", "bicgstab", "cg", "richardson"):
            raise errors.bad_option("MatrixFree(method)", "'gmres', 'bicgstab', 'cg' or 'richardson'", self.method)
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise errors.bad_option("MatrixFree(rtol)", "None, or a number between 0 and 1", self.rtol)
        if self.max_condition is not None and not self.max_condition > 1:
            raise errors.bad_option("MatrixFree(max_condition)", "None, or a number above 1", self.max_condition)
        for name in ("maxiter", "restart"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise errors.bad_option(f"MatrixFree({name})", "an integer >= 1", value)

    def entries_shape(self, y: torch.Size, event_dim: int) -> torch.Size:
        """There are none."""
        raise NotImplementedError

    def is_formed(self, y: Tensor, event_dim: int) -> bool:
        """Never, if there is a choice."""
        return False

    def assemble(self, at: Linearized) -> Assembled:
        """Keep f at y: the work is in the solves."""
        if torch.compiler.is_compiling():  # the log-determinant and the inverse, traced (pytorch #193279)
            return formed(at, "the log-determinant, or Inverse.jacobian, of a compiled function")
        return MatrixFreeAt(self, at)

    @torch.no_grad()
    def contradiction(self, at: Linearized, assembled: Assembled) -> str | None:
        """Compare `a . J b` with `b . J a` for two Gaussian vectors, if J has to be symmetric."""
        if self.method != "cg" or not at.y.numel():
            return None
        a, b = gaussian_like(torch.stack([at.y.detach()] * 2)).flatten(-at.event_dim)
        one, other = (at.pull(t.reshape(at.y.shape)).reshape(t.shape) for t in (a, b))
        products = (one.conj() * b).sum(-1), (a.conj() * other).sum(-1)
        size = sum(torch.linalg.vector_norm(t, dim=-1) for t in (one, other)) * torch.linalg.vector_norm(a, dim=-1)
        wrong = (products[0] - products[1]).abs() > torch.finfo(a.dtype).eps ** 0.75 * size
        if not wrong.any():
            return None
        index = tuple(int(i) for i in wrong.nonzero()[0])
        numbers = ", ".join(f"{p[index].item():.9g}" for p in products)
        return f"J is not symmetric: a . J b and b . J a are {numbers} at index {index}, for Gaussian a and b"


@dataclass
class Trial:
    """What is remembered of products that were tried because nobody declared anything.

    Attributes:
        pause: for how many calls the matrix is used after products failed.
        paused: how many of these are left.
        solves: how many solves there were since.
    """

    pause: int
    paused: int = 0
    solves: int = 0

    def is_paused(self) -> bool:
        """Whether this call begins with the matrix."""
        self.paused, paused = max(self.paused - 1, 0), self.paused
        return paused > 0

    def is_due(self) -> bool:
        """Whether this solve is one of those at which J is probed."""
        self.solves += 1
        return not self.solves & (self.solves - 1) or not self.solves % 64

    def failed(self) -> None:
        """Pause, and begin anew."""
        self.paused, self.solves = self.pause, 0


class MatrixFreeAt(Assembled):
    """J at one y, as products. What it returns carries no graph: the implicit rule is applied to the linear system."""

    def __init__(self, options: MatrixFree, at: Linearized, trial: Trial | None = None) -> None:
        self.options = options
        self.at = at
        self.trial = trial
        self.unsolved: tuple[Tensor, errors.ConvergenceError] | None = None  # events of the last solve, which are NaN
        self.lost: Tensor | None = None  # events of the last solve without a digit
        self.direct: Assembled | None = None  # what solved for some events instead

    def suspicious(self) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=self.at.y.device)

    def transposed_structure(self) -> Jacobian:
        """How to represent `J^T`, the Jacobian of `w -> J^T w`."""
        own, y = self.options.preconditioner, self.at.y.detach()
        fallback = Dense() if isinstance(self.options.fallback, Dense) else None  # others fit J only
        if fallback is not None and self.direct is not None:  # products have just failed
            return fallback
        if own is None:
            return replace(self.options, fallback=fallback)
        flipped: Preconditioner = lambda r, _, transposed: own(r, y, not transposed)  # noqa: E731
        return replace(self.options, preconditioner=flipped, fallback=fallback)

    @torch.no_grad()
    def solve(self, b: Tensor) -> Tensor:
        return self._iterate(b, transposed=False)

    @torch.no_grad()
    def solve_transposed(self, v: Tensor) -> Tensor:
        return self._iterate(v, transposed=True)

    def _products(self, at: Linearized, transposed: bool) -> Operator:
        """`u -> J u`, or `J^T u`, with J at `at.y`."""
        if transposed or self.options.method == "cg":
            return at.pull
        with GradMode(True):  # J t is the transpose of v -> J^T v
            v = torch.zeros_like(at.y).requires_grad_()
            pulled = at.pull(v)

        def push(t: Tensor) -> Tensor:
            (product,) = torch.autograd.grad(pulled, v, t, retain_graph=True, materialize_grads=True)
            return product

        return push

    def _iterate(self, b: Tensor, transposed: bool) -> Tensor:
        if not b.numel():
            return b.clone()  # b itself would be an input and the output of one autograd node
        if is_grads_batched(b):

            def each(columns: Tensor) -> Tensor:
                return torch.stack([self._iterate(c, transposed) for c in columns.unbind(-1)], -1)

            return fold_batched_grads(each, b)
        if self.trial is not None:
            return self._tried(self.trial, b, transposed)
        found = self._run(b, transposed)
        return self._own(found, b) if found.solved else self._judged(found, b, transposed)

    @staticmethod
    def _own(found: Krylov, b: Tensor) -> Tensor:
        """The solution, on a memory of its own also where it is b: autograd accumulates into what it is given."""
        u = found.solution.reshape(b.shape)
        return u.clone() if u.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() else u

    def _tried(self, trial: Trial, b: Tensor, transposed: bool) -> Tensor:
        """The solution if every event can be believed, and a probe of J where that is due; else all by the fallback."""
        if self.direct is None:
            if not trial.paused:  # else products failed a moment ago, in the solve that this is a derivative of
                found = self._run(b, transposed)
                if self._is_believed(found) and not (trial.is_due() and self._is_doubtful(b, transposed)):
                    return self._own(found, b)
                trial.failed()
            assert self.options.fallback is not None
            self.direct = self.options.fallback.assemble(self.at)
        return self.direct.solve_transposed(b) if transposed else self.direct.solve(b)

    def _is_doubtful(self, like: Tensor, transposed: bool) -> bool:
        """Whether a vector with a part in every direction shows what the right-hand side has no part in."""
        return not self._is_believed(self._run(gaussian_like(like), transposed))

    def _is_believed(self, found: Krylov) -> bool:
        """Whether a fallback has nothing to do for any event."""
        return found.solved or bool((self._is_well_conditioned(found) & ~self._is_large(found)).all())

    def _is_large(self, found: Krylov) -> Tensor:
        """Which events have so large a solution that J may be singular."""
        if found.growth is None:
            return torch.zeros_like(found.converged)
        return found.growth * torch.finfo(found.norm.dtype).eps ** 0.5 > 1

    def _is_well_conditioned(self, found: Krylov) -> Tensor:
        """Which events were solved with a J whose condition is believed."""
        if found.condition is None or self.options.max_condition is None:
            return found.converged
        return found.converged & (found.condition <= self.options.max_condition)

    def _judged(self, found: Krylov, b: Tensor, transposed: bool) -> Tensor:
        """The solution where it has converged; by the fallback, or NaN, where it has not."""
        batch = split(b, self.at.event_dim)[0]
        if found.indefinite is not None and found.indefinite.any():
            raise errors.negative_curvature(tuple(int(i) for i in found.indefinite.reshape(batch).nonzero()[0]))
        u, fallback = self._own(found, b), self.options.fallback
        converged = self._is_well_conditioned(found)
        suspects = self._is_large(found)
        if fallback is not None:
            converged = converged & ~suspects
        elif suspects.any():
            self.lost = suspects.reshape(batch) & self._changes_by_half(u, b, transposed)
        if converged.all():
            return u
        mask = converged.reshape(*batch, *(1,) * self.at.event_dim)
        if fallback is None:
            self.unsolved = ~converged.reshape(batch), self._error(found, converged, batch)
            return torch.where(mask, u, torch.nan)
        direct = self.direct = fallback.assemble(self.at)
        return torch.where(mask, u, direct.solve_transposed(b) if transposed else direct.solve(b))

    def _run(self, b: Tensor, transposed: bool) -> Krylov:
        """Solve the systems of all events, one in each row."""
        options, y = self.options, self.at.y.detach()
        apply, own = self._products(self.at, transposed), options.preconditioner

        def precondition(r: Tensor) -> Tensor:
            assert own is not None
            return own(r.reshape(b.shape), y, transposed).reshape(r.shape)

        def reshaped(u: Tensor) -> Tensor:
            return apply(u.reshape(b.shape)).reshape(u.shape)

        rows = b.detach().reshape(-1, math.prod(split(b, self.at.event_dim)[1]))
        product = apply if rows.shape == b.shape else reshaped  # two views take a tenth of the time of a small product
        scale = _scale(rows)
        if scale is None:
            return self._method(product, rows, precondition if own else None)
        found = self._method(product, rows / scale, precondition if own else None)
        return replace(found, solution=found.solution * scale)

    def _changes_by_half(self, u: Tensor, b: Tensor, transposed: bool) -> Tensor:
        """Where the rounding of y alone changes `J u = b` by half: at a turning point of f u is large, and noise."""
        try:
            beside = self.at.moved(self.at.y.detach() * (1 + 4 * torch.finfo(b.dtype).eps))
            change = self._products(beside, transposed)(u) - b
        except Exception:  # noqa: BLE001 (outside its domain f may raise whatever it likes)
            change = torch.full_like(b, torch.nan)
        return ~(event_norm(change, self.at.event_dim) < event_norm(b, self.at.event_dim) / 2)  # NaN compares false

    def _method(self, apply: Operator, b: Tensor, precondition: Operator | None) -> Krylov:
        options = self.options
        rtol = torch.finfo(b.dtype).eps ** 0.8 if options.rtol is None else options.rtol
        k = options.maxiter
        if options.method == "gmres":
            return gmres(apply, b, rtol=rtol, maxiter=k, restart=options.restart, precondition=precondition)
        method = {"bicgstab": bicgstab, "cg": cg, "richardson": richardson}[options.method]
        return method(apply, b, rtol=rtol, maxiter=k, precondition=precondition)

    def _error(self, found: Krylov, converged: Tensor, batch: torch.Size) -> errors.ConvergenceError:
        failed, limit = ~converged.reshape(batch), self.options.max_condition
        first = first_index(failed)
        numbers = int(failed.sum()), failed.numel(), first
        if found.converged.reshape(batch)[first] and found.condition is not None and limit is not None:
            condition = found.condition.reshape(batch)[first].item()
            return errors.ill_conditioned(self.options.method, *numbers, condition, limit)
        residual = found.residual.reshape(batch)[first].item()
        return errors.krylov(self.options.method, *numbers, residual, found.products)

    def log_abs_det(self) -> Tensor:
        return self.formed("the log-determinant").log_abs_det()

    def inverse(self) -> Tensor:
        return self.formed("Inverse.jacobian").inverse()

    def formed(self, purpose: str) -> Assembled:
        fallback = self.options.fallback
        self.direct = formed(self.at, purpose) if fallback is None else fallback.assemble(self.at)
        return self.direct

    def singular(self) -> Tensor | None:
        """Which events the last solve left unsolved or without a digit, or which J as a matrix shows to be singular."""
        if self.unsolved is not None:
            return self.unsolved[0] if self.lost is None else self.unsolved[0] | self.lost
        return self.lost if self.direct is None else self.direct.singular()

    @torch.no_grad()
    def times(self, u: Tensor) -> Tensor:
        return self._products(self.at, transposed=False)(u)

    def transposed_times(self, u: Tensor) -> Tensor:
        return self.at.pull(u)

    def rounding(self, u: Tensor) -> Tensor:
        """Below every difference: nothing was assembled to compare with, so every event is examined."""
        return torch.full_like(u.real, -1.0)

    def numbers(self, index: tuple[int, ...]) -> str:
        if self.direct is not None:
            return self.direct.numbers(index)
        return f"y = {self.at.y[index].flatten()[:3].tolist()}"


def formed(at: Linearized, purpose: str) -> FactoredAt:
    """J as a matrix after all, for what has no other way."""
    n = math.prod(split(at.y, at.event_dim)[1])
    if n > _DENSE:
        _refuse(purpose, n)
    return FactoredAt(LU(), at, dense_matrix)


@not_traced(errors.NEEDS_MATRIX)
def _refuse(purpose: str, n: int) -> None:
    raise errors.needs_matrix(purpose, n, _DENSE)


def _scale(rows: Tensor) -> Tensor | None:
    """The size of each row, shape `(events, 1)`, if the square of some would overflow or vanish; else None."""
    size = rows.abs().amax(-1, keepdim=True)
    low, high = (v.item() for v in torch.aminmax(size))
    limits = torch.finfo(size.dtype)
    if limits.tiny**0.25 < low and high < limits.max**0.25:
        return None
    return torch.where((size > 0) & size.isfinite(), size, 1.0)

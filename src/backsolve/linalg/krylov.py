"""Krylov methods: solve `A u = b` with nothing but products `A v`, for a batch of independent systems at once.

Both stop each system by itself, and both end with the residual that they were asked for, computed from its definition:
the cheap recurrences for it drift.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]  # (events, n) -> (events, n)


@dataclass(frozen=True)
class Krylov:
    """What a solve produced.

    Attributes:
        solution: u, shape `(events, n)`.
        residual: `|b - A u| / |b|` in the Euclidean norm, shape `(events,)`.
        converged: whether that is small enough, shape `(events,)`.
        products: how often A was applied.
    """

    solution: Tensor
    residual: Tensor
    converged: Tensor
    products: int


@dataclass
class _System:
    """`A u = b` with a count of the products, and the tolerance on the residual of each event.

    A residual of `4 eps |A| |u|` is that of a direct solver, and is accepted however small rtol is, as long as half of
    the digits of b are met: |u| explodes where A is singular. |A| is at least the largest stretch that was seen.
    """

    apply: Operator
    precondition: Operator
    b: Tensor
    rtol: float
    products: int = 0

    def __post_init__(self) -> None:
        self.size = _norm(self.b)
        self.stretch = torch.zeros_like(self.size)

    def times(self, v: Tensor) -> Tensor:
        """`A v`."""
        self.products += 1
        product = self.apply(v)
        length = _norm(v)
        self.stretch = torch.maximum(self.stretch, _norm(product) / torch.where(length > 0, length, 1.0))
        return product

    def tolerance(self, u: Tensor) -> Tensor:
        """The largest residual that is good enough at u."""
        eps = torch.finfo(self.size.dtype).eps
        rounding = torch.minimum(4 * eps * self.stretch * _norm(u), eps**0.5 * self.size)
        return torch.maximum(self.rtol * self.size, rounding)

    def report(self, u: Tensor, r: Tensor) -> Krylov:
        """The verdict on u with the residual r."""
        norm = _norm(r)
        converged = norm <= self.tolerance(u)  # NaN compares false
        return Krylov(u, norm / torch.where(self.size > 0, self.size, 1.0), converged, self.products)


def gmres(apply: Operator, b: Tensor, *, rtol: float, maxiter: int, restart: int, precondition: Operator) -> Krylov:
    """The generalised minimal residual method, preconditioned from the right, for any invertible A.

    Each step adds one vector to an orthonormal basis of the Krylov space and minimises the residual over it. The basis
    is thrown away after `restart` steps, and at every look at the true residual.

    Args:
        apply: A, linear; every event by itself.
        b: shape `(events, n)`.
        rtol: the relative residual to reach.
        maxiter: the largest number of products.
        restart: the largest size of the basis.
        precondition: an approximation of `A^-1 v`.

    Reference:
        Y. Saad, M. H. Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7, 1986.
    """
    system = _System(apply, precondition, b, rtol)
    u, r = torch.zeros_like(b), b
    while True:
        done = _norm(r) <= system.tolerance(u)
        if done.all() or system.products >= maxiter:
            return system.report(u, r)
        before = _norm(r)
        u = u + precondition(
            _cycle(system, r, system.tolerance(u), min(restart, b.shape[-1], maxiter - system.products))
        )
        r = b - system.times(u)
        if not (_norm(r) < before)[~done].any():  # nothing moves any more: NaN, or the end of the digits
            return system.report(u, r)


def _cycle(system: _System, r: Tensor, tolerance: Tensor, steps: int) -> Tensor:
    """Minimise `|r - A M z|` over a Krylov space; returns z.

    `rotation @ hessenberg` is upper triangular; each step appends one column and one Givens rotation. The last element
    of `rotation @ (|r| e_1)` is the norm of the residual.
    """
    events, n = r.shape
    size = _norm(r)
    basis = r.new_zeros(events, steps + 1, n)
    basis[:, 0] = _divide(r, size)
    triangle = torch.eye(steps, dtype=r.dtype, device=r.device).repeat(events, 1, 1)
    rotation = torch.eye(steps + 1, dtype=r.dtype, device=r.device).repeat(events, 1, 1)
    target = r.new_zeros(events, steps)
    rest = size.to(r.dtype)  # the last element of the rotated right-hand side
    active = size > tolerance
    for k in range(steps):
        w = system.times(system.precondition(basis[:, k]))
        known = basis[:, : k + 1]
        column = r.new_zeros(events, steps + 1)
        for _ in range(2):  # Gram-Schmidt, twice, keeps the basis orthogonal to rounding
            part = (known.conj() @ w[..., None])[..., 0]
            w = w - (part[:, None] @ known)[:, 0]
            column[:, : k + 1] += part
        length = _norm(w)
        column[:, k + 1] = length
        basis[:, k + 1] = _divide(w, length)
        column = (rotation @ column[..., None])[..., 0]
        top, below = column[:, k], column[:, k + 1]
        scale = (top.abs().square() + below.abs().square()).sqrt()
        active = active & (scale > 0)  # an exactly singular A, or NaN
        c, s = _divide(top, scale).conj(), _divide(below, scale).conj()
        upper, lower = rotation[:, k].clone(), rotation[:, k + 1].clone()
        rotation[:, k] = c[:, None] * upper + s[:, None] * lower
        rotation[:, k + 1] = c.conj()[:, None] * lower - s.conj()[:, None] * upper
        triangle[active, :k, k] = column[active, :k]
        triangle[active, k, k] = scale[active].to(r.dtype)
        target[active, k] = (c * rest)[active]
        rest = torch.where(active, -s.conj() * rest, rest)
        active = active & (rest.abs() > tolerance)
        if not active.any():
            break
    z = torch.linalg.solve_triangular(triangle, target[..., None], upper=True)
    return (z.mT @ basis[:, :-1])[:, 0]


def bicgstab(apply: Operator, b: Tensor, *, rtol: float, maxiter: int, precondition: Operator) -> Krylov:
    """The stabilised biconjugate gradient method, preconditioned from the right: short recurrences, seven vectors.

    Where it breaks down (a scalar product that should be far from zero is not) it starts again from the true residual;
    it gives up when that no longer helps.

    Args:
        apply: A, linear; every event by itself.
        b: shape `(events, n)`.
        rtol: the relative residual to reach.
        maxiter: the largest number of products.
        precondition: an approximation of `A^-1 v`.

    Reference:
        H. A. van der Vorst, Bi-CGSTAB, SIAM J. Sci. Stat. Comput. 13, 1992.
    """
    system = _System(apply, precondition, b, rtol)
    u, r = torch.zeros_like(b), b
    failures = 0
    while True:
        norm = _norm(r)
        done = norm <= system.tolerance(u)
        if done.all() or system.products >= maxiter or failures > 3:
            return system.report(u, r)
        u = _sweep(system, u, r, ~done, maxiter)
        r = b - system.times(u)
        failures += not (_norm(r) < norm / 2)[~done].any()


def _sweep(system: _System, u: Tensor, r: Tensor, active: Tensor, maxiter: int) -> Tensor:
    """Iterate from u until every event has converged by the recurrence for r, or has broken down."""
    shadow = r
    rho = _dot(shadow, r)
    p = r
    eps = torch.finfo(system.size.dtype).eps
    while active.any() and system.products < maxiter:
        p_hat = system.precondition(p)
        v = system.times(p_hat)
        alpha = _divide(rho, _dot(shadow, v))
        s = r - alpha[:, None] * v
        s_hat = system.precondition(s)
        t = system.times(s_hat)
        omega = _divide(_dot(t, s), _dot(t, t))
        step = alpha[:, None] * p_hat + omega[:, None] * s_hat
        usable = active & step.isfinite().all(-1)
        u = torch.where(usable[:, None], u + step, u)
        r = torch.where(usable[:, None], s - omega[:, None] * t, r)
        rho_new = _dot(shadow, r)
        broken = (rho_new.abs() <= eps * _norm(shadow) * _norm(r)) | (omega == 0)
        beta = _divide(rho_new, rho) * _divide(alpha, omega)
        p = r + beta[:, None] * (p - omega[:, None] * v)
        rho = rho_new
        active = usable & ~broken & (_norm(r) > system.tolerance(u))
    return u


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).sum(-1)


def _divide(a: Tensor, by: Tensor) -> Tensor:
    """a / by, and 0 where that is 0 / 0 or worse: a broken system stands still."""
    by = by.reshape(by.shape + (1,) * (a.dim() - by.dim()))
    return torch.where(by == 0, 0.0, a / torch.where(by == 0, 1.0, by))

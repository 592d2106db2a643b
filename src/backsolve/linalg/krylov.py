"""Krylov methods: solve `A u = b` with nothing but products `A v`, for a batch of independent systems at once.

GMRES, BiCGSTAB and CG stop each system by itself; all end with the residual that they were asked for, computed from
its definition: the cheap recurrences for it drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from backsolve.linalg.space import Space

Operator = Callable[[Tensor], Tensor]  # (events, n) -> (events, n)

_SURELY = 16.0  # a condition: up to here an estimate needs no second look
_UNSEEN = 8  # products of Richardson's iteration, at most, between two looks at the residual


@dataclass(frozen=True)
class Krylov:
    """What a solve produced.

    Attributes:
        solution: u, shape `(events, n)`.
        norm: `|b - A u|` in the Euclidean norm, shape `(events,)`.
        allowed: how large that may be.
        size: `|b|`.
        products: how often A was applied.
        reach: `|A| |u|`, as far as |A| was seen; None: u is not large.
        condition: `|A| |A^-1|`, as far as a Krylov space showed both, shape `(events,)`; None: there was none.
        indefinite: where a direction of negative curvature was met, shape `(events,)`; for `cg`.
        solved: whether it is known that all have converged, with a u that is not large.
    """

    solution: Tensor
    norm: Tensor
    allowed: Tensor
    size: Tensor
    products: int
    reach: Tensor | None = None
    condition: Tensor | None = None
    indefinite: Tensor | None = None
    solved: bool = False

    @property
    def converged(self) -> Tensor:
        """Whether the residual is small enough, shape `(events,)`."""
        small = self.norm <= self.allowed  # NaN compares false
        return small if self.indefinite is None else small & ~self.indefinite

    @property
    def residual(self) -> Tensor:
        """`|b - A u| / |b|`, shape `(events,)`."""
        return self.norm / torch.where(self.size > 0, self.size, 1.0)

    @property
    def growth(self) -> Tensor | None:
        """`|A| |u| / |b|`, as far as |A| was seen, shape `(events,)`: large where A is close to singular."""
        return None if self.reach is None else self.reach / torch.where(self.size > 0, self.size, 1.0)


class _System:
    """`A u = b` with a count of the products, and the tolerance on the residual of each event.

    A residual of `4 eps |A| |u|` is that of a direct solver, and is accepted however small rtol is, as long as half of
    the digits of b are met: |u| explodes where A is singular.
    """

    def __init__(self, apply: Operator, precondition: Operator | None, b: Tensor, rtol: float) -> None:
        self.apply = apply
        self.precondition = precondition
        self.size = _norm(b)
        self.goal = torch.where(self.size.isfinite(), rtol * self.size, torch.nan)  # else inf <= inf
        self.eps = torch.finfo(self.size.dtype).eps
        self.stretch = torch.zeros_like(self.size)  # what was seen of |A|, of the unknowns as they are preconditioned
        self.shrink: Tensor | None = None  # and of |A^-1|
        self.products = 0

    def preconditioned(self, v: Tensor) -> Tensor:
        """`M v`."""
        return v if self.precondition is None else self.precondition(v)

    def times(self, v: Tensor) -> Tensor:
        """`A v`."""
        self.products += 1
        return self.apply(v)

    def tolerance(self, u_norm: Tensor) -> Tensor:
        """The largest residual that is good enough."""
        rounding = torch.minimum(4 * self.eps * self.stretch * u_norm, self.eps**0.5 * self.size)
        return torch.maximum(self.goal, rounding)

    def report(self, u: Tensor, norm: Tensor, u_norm: Tensor) -> Krylov:
        """The verdict on u, whose residual has this norm."""
        condition = None if self.shrink is None else self.stretch * self.shrink
        return Krylov(u, norm, self.tolerance(u_norm), self.size, self.products, self.stretch * u_norm, condition)

    def learn(self, triangle: Tensor, directions: Space, used: Tensor) -> None:
        """Note how far A stretches and shrinks vectors: `A^-1 Q = Z / R`.

        Args:
            triangle: the R of `A Z = Q R`, with columns of Z of length 1, shape `(events, k, k)`.
            directions: Z.
            used: which columns an event had a use for; later ones, while others went on, may depend on these.
        """
        self.stretch = torch.maximum(self.stretch, _norm(triangle.mT).amax(-1).nan_to_num(0.0))
        identity = torch.eye(triangle.shape[-1], dtype=triangle.dtype, device=triangle.device)
        columns = torch.where(used[:, None], triangle, identity)
        inverse = torch.linalg.solve_triangular(columns, identity, upper=True)
        inverse = inverse * used[:, None]
        square = inverse.abs().square().sum((-2, -1))  # as if Z were orthogonal, which costs nothing to suppose
        if (self.stretch * square.sqrt()).amax() > _SURELY:
            rounding = len(inverse[0]) * self.eps * square
            square = (inverse.conj() * (directions.gram() @ inverse)).real.sum((-2, -1)).clamp_min(0) + rounding
        shrink = square.sqrt().nan_to_num(torch.inf)
        self.shrink = shrink if self.shrink is None else torch.maximum(self.shrink, shrink)


def richardson(
    apply: Operator, b: Tensor, *, rtol: float, maxiter: int, precondition: Operator | None = None
) -> Krylov:
    """Richardson's iteration `u += M (b - A u)`: what one writes by hand for an A close to the identity.

    It goes on while the worst residual halves, which it does where `|1 - A M| <= 1/2`. There it needs hardly more
    products than GMRES, and nothing but products. The arguments are those of `gmres`.
    """
    system = _System(apply, precondition, b, rtol)
    return _relaxed(system, b, rtol, maxiter, keep=False).report(system, b)


def gmres(
    apply: Operator, b: Tensor, *, rtol: float, maxiter: int, restart: int, precondition: Operator | None = None
) -> Krylov:
    """The generalised minimal residual method, preconditioned from the right, for any invertible A.

    Each step adds one direction to a Krylov space and minimises the residual over it. The space is thrown away after
    `restart` steps, and at every look at the true residual. For many systems at once these minimisations take longer
    than products do; there `u += M (b - A u)` goes first, for as long as it halves the worst residual.

    Args:
        apply: A, linear; every event by itself.
        b: shape `(events, n)`.
        rtol: the relative residual to reach.
        maxiter: the largest number of products.
        restart: the largest dimension of the space.
        precondition: M, an approximation of `A^-1`.

    Reference:
        Y. Saad, M. H. Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7, 1986.
    """
    system = _System(apply, precondition, b, rtol)
    begun = _Begun(None, b, system.size)
    if len(b) > 1:
        begun = _relaxed(system, b, rtol, maxiter, keep=True)
        if begun.done:
            return begun.report(system, b)
    u, r, norm, known = torch.zeros_like(b) if begun.u is None else begun.u, begun.r, begun.norm, begun.known
    u_norm = _norm(u)
    while True:
        open_ = norm > system.tolerance(u_norm)
        if not open_.any() or (system.products >= maxiter and not known):
            return system.report(u, norm, u_norm)
        steps = min(restart, b.shape[-1], maxiter - system.products + len(known))
        z = _minimise(system, r, norm, u_norm, steps, known)
        u, u_norm, known = u + system.preconditioned(z), u_norm + _norm(z), ()
        r, before = b - system.times(u), norm
        norm = _norm(r)
        if not (norm < before)[open_].any():  # nothing moves any more: NaN, or the end of the digits
            return system.report(u, norm, u_norm)


@dataclass(frozen=True)
class _Begun:
    """How far Richardson's iteration got.

    Attributes:
        u: None stands for 0.
        r: `b - A u`.
        norm: that of r, for each event.
        known: pairs of a direction z and `A M z`, from the steps after u.
        done: whether every event has reached its goal.
    """

    u: Tensor | None
    r: Tensor
    norm: Tensor
    known: Sequence[tuple[Tensor, Tensor]] = ()
    done: bool = False

    def report(self, system: _System, b: Tensor) -> Krylov:
        """The verdict on u."""
        u = torch.zeros_like(b) if self.u is None else self.u
        return Krylov(u, self.norm, system.goal, system.size, system.products, solved=self.done)


def _relaxed(system: _System, b: Tensor, rtol: float, maxiter: int, keep: bool) -> _Begun:
    """Richardson's iteration while it halves the worst residual; what its last steps told, if that is to be kept.

    A look at the residuals costs as much as a small product. They fall at a steady rate, which says when to look next.
    """
    goal = system.goal.clamp_min(torch.finfo(system.size.dtype).tiny)
    found, worst, ahead = _Begun(None, b, system.size), 1 / rtol, 1
    while worst > 1 and system.products < maxiter:
        u, r, ahead = found.u, found.r, min(ahead, maxiter - system.products)
        residuals = [r]
        for _ in range(ahead):
            step = system.preconditioned(r)
            u = step if u is None else u + step
            r = b - system.times(u)
            if keep:
                residuals.append(r)
        norm = _norm(r)
        left = max((norm / goal).amax().item(), 1.0)
        if not left <= max(worst / 2**ahead, 1.0):  # NaN compares false
            return replace(found, known=[_normalised(r, r - after) for r, after in pairwise(residuals)])
        rate, worst = math.log(worst / left) / ahead, left
        ahead = max(1, min(math.ceil(math.log(left) / rate), _UNSEEN))
        found = _Begun(u, r, norm)
    return replace(found, done=worst <= 1)


def _normalised(z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """A direction of length 1 and its image, from some direction and its image."""
    inverse = _inverse(_norm(z))
    return z * inverse, w * inverse


def _minimise(
    system: _System,
    r: Tensor,
    norm: Tensor,
    u_norm: Tensor,
    steps: int,
    known: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """Minimise `|r - A M z|` over a Krylov space, begun with directions whose images are known; returns z.

    With directions Z and `A M Z = Q R`, Q orthonormal, each step takes the component along its column of Q out of r;
    there is no Hessenberg matrix to rotate. The next direction is r itself while it shrinks, else the last column of
    Q: then Z stays well-conditioned (Jiránek, Rozložník, Adaptive version of simpler GMRES, 2010).
    """
    directions, images = Space(r, steps), Space(r, steps)
    columns: list[Tensor] = []
    parts: list[Tensor] = []
    used: list[Tensor] = []
    tolerance = system.tolerance(u_norm)
    active = norm > tolerance
    z = r * _inverse(norm)
    for k in range(steps):
        z, w = known[k] if k < len(known) else (z, system.times(system.preconditioned(z)))
        directions.place().copy_(z)
        q, column = _orthonormalised(w, images)
        part = torch.where(active, _dot(q, r), 0.0)
        r = torch.addcmul(r, part[:, None], q, value=-1)
        before, norm = norm, _norm(r)
        columns.append(column)
        parts.append(part)
        used.append(active & (column[-1] != 0))
        active = active & (norm > tolerance) & (column[-1] != 0)
        if not active.any():
            break
        shrinks = norm <= 0.9 * before
        if shrinks.all():
            z = r * _inverse(norm)
        else:
            z = torch.where(shrinks[:, None], r * _inverse(norm), q) if shrinks.any() else q
    k = len(parts)
    triangle = r.new_zeros(r.shape[0], k, k)
    for i, column in enumerate(columns):
        triangle[:, : i + 1, i] = column.mT
    triangle.diagonal(dim1=-2, dim2=-1).masked_fill_(torch.stack([column[-1] == 0 for column in columns], -1), 1.0)
    system.learn(triangle, directions, torch.stack(used, -1))
    z = torch.linalg.solve_triangular(triangle, torch.stack(parts, -1)[..., None], upper=True)[..., 0]
    return directions.combination(z.mT)


def _orthonormalised(w: Tensor, basis: Space) -> tuple[Tensor, Tensor]:
    """Add to an orthonormal basis the part of w that is orthogonal to it; returns that, and the column of R.

    0 where nothing is left.
    """
    size = _norm(w)
    column = basis.projections(w)
    w = basis.without(column, w)
    length = _norm(w)
    if len(column) and not (length > 0.1 * size).all():  # much was cancelled: once more, and it is orthogonal
        again = basis.projections(w)
        w, column = basis.without(again, w), column + again
        length = _norm(w)
        length = torch.where(length > 8 * torch.finfo(size.dtype).eps * size, length, 0.0)
    q = torch.mul(w, _inverse(length), out=basis.place())
    return q, torch.cat([column, length[None].to(w.dtype)])


def _inverse(length: Tensor) -> Tensor:
    """`1 / length` as a column, and 0 where the length is 0."""
    return torch.where(length >= torch.finfo(length.dtype).tiny, 1 / length, 0.0)[:, None]


def bicgstab(apply: Operator, b: Tensor, *, rtol: float, maxiter: int, precondition: Operator | None = None) -> Krylov:
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
    u, r, norm = torch.zeros_like(b), b, system.size
    failures = 0
    while True:
        open_ = norm > system.tolerance(_norm(u))
        if not open_.any() or system.products >= maxiter or failures > 3:
            return system.report(u, norm, _norm(u))
        u = _sweep(system, u, r, open_, maxiter)
        r, before = b - system.times(u), norm
        norm = _norm(r)
        failures += not (norm < before / 2)[open_].any()


def cg(apply: Operator, b: Tensor, *, rtol: float, maxiter: int, precondition: Operator | None = None) -> Krylov:
    """The method of conjugate gradients, for A (and M, if there is one) Hermitian and positive definite.

    A direction p with `p^H A p < 0` proves that A is not: that system is given up, and reported as indefinite.

    Args:
        apply: A, linear; every event by itself.
        b: shape `(events, n)`.
        rtol: the relative residual to reach.
        maxiter: the largest number of products.
        precondition: M, an approximation of `A^-1`.

    Reference:
        M. R. Hestenes, E. Stiefel, Methods of conjugate gradients for solving linear systems, 1952.
    """
    system = _System(apply, precondition, b, rtol)
    u, r, norm = torch.zeros_like(b), b, system.size
    indefinite = torch.zeros_like(norm, dtype=torch.bool)
    failures = 0
    while True:
        open_ = (norm > system.tolerance(_norm(u))) & ~indefinite
        if not open_.any() or system.products >= maxiter or failures > 3:
            return replace(system.report(u, norm, _norm(u)), indefinite=indefinite)
        u, negative = _descend(system, u, r, open_, maxiter)
        indefinite = indefinite | negative
        r, before = b - system.times(u), norm
        norm = _norm(r)
        failures += not (norm < before / 2)[open_].any()


def _descend(system: _System, u: Tensor, r: Tensor, active: Tensor, maxiter: int) -> tuple[Tensor, Tensor]:
    """Conjugate gradients from u until every event has converged by the recurrence for r, or met negative curvature."""
    z = p = system.preconditioned(r)
    rho = _dot(r, z)
    negative = torch.zeros_like(active)
    while active.any() and system.products < maxiter:
        v = system.times(p)
        p_norm, v_norm = _norm(p), _norm(v)
        stretch = v_norm / p_norm.clamp_min(torch.finfo(system.size.dtype).tiny)
        system.stretch = torch.maximum(system.stretch, stretch.nan_to_num(0.0))
        curvature = _dot(p, v)
        negative = negative | active & (curvature.real < -16 * system.eps * p_norm * v_norm)
        step = _divide(rho, curvature)[:, None]
        usable = active & ~negative & (step * p).isfinite().all(-1)
        u = torch.where(usable[:, None], u + step * p, u)
        r = torch.where(usable[:, None], r - step * v, r)
        z = system.preconditioned(r)
        rho, before = _dot(r, z), rho
        p = z + _divide(rho, before)[:, None] * p
        active = usable & (_norm(r) > system.tolerance(_norm(u)))
    return u, negative


def _sweep(system: _System, u: Tensor, r: Tensor, active: Tensor, maxiter: int) -> Tensor:
    """Iterate from u until every event has converged by the recurrence for r, or has broken down."""
    shadow, p = r, r
    rho = _dot(shadow, r)
    while active.any() and system.products < maxiter:
        p_hat = system.preconditioned(p)
        v = system.times(p_hat)
        stretch = _norm(v) / _norm(p_hat).clamp_min(torch.finfo(system.size.dtype).tiny)
        system.stretch = torch.maximum(system.stretch, stretch.nan_to_num(0.0))
        alpha = _divide(rho, _dot(shadow, v))
        s = r - alpha[:, None] * v
        s_hat = system.preconditioned(s)
        t = system.times(s_hat)
        omega = _divide(_dot(t, s), _dot(t, t))
        step = alpha[:, None] * p_hat + omega[:, None] * s_hat
        usable = active & step.isfinite().all(-1)
        u = torch.where(usable[:, None], u + step, u)
        r = torch.where(usable[:, None], s - omega[:, None] * t, r)
        rho, rho_before = _dot(shadow, r), rho
        norm = _norm(r)
        broken = (rho.abs() <= system.eps * _norm(shadow) * norm) | (omega == 0)
        beta = _divide(rho, rho_before) * _divide(alpha, omega)
        p = r + beta[:, None] * (p - omega[:, None] * v)
        active = usable & ~broken & (norm > system.tolerance(_norm(u)))
    return u


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if len(a) == 1:
        return torch.vdot(a[0], b[0])[None]
    return (a.conj() * b).sum(-1)


def _divide(a: Tensor, by: Tensor) -> Tensor:
    """a / by, and 0 where that is 0 / 0 or worse: a broken system stands still."""
    return torch.where(by == 0, 0.0, a / torch.where(by == 0, 1.0, by))

"""Fixed-point iteration with Anderson's acceleration, for f close to the identity."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve import errors
from backsolve._linearize import Forward
from backsolve._torch import GradMode, without_autocast
from backsolve.solvers.base import Found, NumericalSolver, may_look
from backsolve.solvers.iterate import Progress, Start, relative_size, start_of
from backsolve.solvers.state import frozen


@dataclass(frozen=True)
class FixedPoint(NumericalSolver):
    """Solve `y + h(y) = x` for a contraction h, such as a residual block with a Lipschitz constant below 1.

    The iteration is `y <- x - h(y) = y + (x - f(y))`, one evaluation of f a step and no derivative. Anderson's
    acceleration combines the last few steps such that the residual would vanish if f were linear.

    Args:
        init: where to start, as for `Newton`.
        history: how many former steps are combined; 0 for the plain iteration.
        maxiter: how many steps are taken at most.

    Raises:
        ConvergenceError: when called, if an event does not converge.

    Example:
        >>> import torch
        >>> from backsolve import inverse
        >>> from backsolve.solvers import FixedPoint
        >>> block = inverse(lambda y: y + 0.5 * torch.tanh(y.flip(-1)), FixedPoint(), event_dim=1)
        >>> y = torch.tensor([1.0, -2.0], dtype=torch.float64)
        >>> torch.allclose(block(y + 0.5 * torch.tanh(y.flip(-1))), y, rtol=1e-14)
        True

    Reference:
        H. F. Walker, P. Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49 (2011) 1715.
    """

    init: Start = None
    history: int = 5
    maxiter: int = 500

    def __post_init__(self) -> None:
        for name, least in (("history", 0), ("maxiter", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise errors.bad_setting("FixedPoint", name, f"an integer >= {least}", value)

    def find(self, forward: Forward, x: Tensor | None) -> Found:
        """Iterate every event; see `NumericalSolver`."""
        with GradMode(False), frozen(forward) as forward:
            y = start_of(self.init, forward, x, "FixedPoint")
            with without_autocast(y.device):
                return self._iterate(forward, x, y)

    def _iterate(self, forward: Forward, x: Tensor | None, y: Tensor) -> Found:
        k, eps = forward.model.event_dim, torch.finfo(y.dtype).eps
        progress, anderson = Progress(y, k), _Anderson(self.history)
        best, smallest = y, torch.full_like(progress.steps, torch.inf, dtype=y.dtype)
        since = torch.zeros_like(progress.steps)
        for count in range(self.maxiter):
            z = forward.value(y)
            r = -z if x is None else x - z
            size = relative_size(r, y, k)
            progress.steps += progress.active
            better = progress.active & (size < smallest)
            best = torch.where(progress.spread(better), y, best)
            smallest, since = torch.where(better, size, smallest), torch.where(better, 0, since + 1)
            # Near the rounding errors of f the residual only jumps about: the best of the last steps is the answer.
            progress.done |= progress.active & ((smallest <= eps) | ((smallest <= 64 * eps) & (since >= 3)))
            progress.lost |= progress.active & size.isinf()
            if may_look(y.device, count) and not progress.active.any():
                break
            y = y + anderson.step(_as_vectors(y, k), _as_vectors(r, k)).reshape(y.shape)

        def error(first: tuple[int, ...], many: str, steps: int) -> errors.BacksolveError:
            return errors.not_converged(
                forward.model.call,
                "the fixed-point iteration did not converge.",
                "residuals x - f(y) that become as small as the rounding errors of y",
                f"{many}: after {steps} steps the smallest was {smallest[first].item():.3g} of the size of y",
                "f must be y + h(y) with h a contraction; Newton() needs none; raise maxiter if it was merely slow",
            )

        return progress.found(best, error)


def _as_vectors(t: Tensor, event_dim: int) -> Tensor:
    return t.flatten(-event_dim) if event_dim else t[..., None]


class _Anderson:
    """The differences of the last few iterates and residuals, and the step that they suggest."""

    def __init__(self, history: int) -> None:
        self.history = history
        self.last: tuple[Tensor, Tensor] | None = None
        self.dy: list[Tensor] = []
        self.dr: list[Tensor] = []

    def step(self, y: Tensor, r: Tensor) -> Tensor:
        """With r = x - f(y): the step to y + r - (dY + dR) c, where c minimises |r - dR c|; shapes (*batch, n)."""
        if self.last is not None and self.history:
            self.dy, self.dr = (
                [*self.dy, y - self.last[0]][-self.history :],
                [*self.dr, r - self.last[1]][-self.history :],
            )
        self.last = y, r
        if not self.dr:
            return r
        changes = torch.stack(self.dr, -1)  # (*batch, n, m)
        scale = changes.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)
        normal = (changes / scale).mT @ (changes / scale)
        # Equal columns are the rule near the end: a ridge of the size of the rounding errors keeps c finite.
        ridge = 8 * torch.finfo(r.dtype).eps * torch.eye(normal.shape[-1], dtype=r.dtype, device=r.device)
        right = (changes / scale).mT @ r[..., None]
        c = torch.linalg.solve_ex(normal + ridge, right).result / scale.mT
        c = torch.where(c.isfinite().all(-2, keepdim=True), c, 0.0)
        return r - ((torch.stack(self.dy, -1) + changes) @ c)[..., 0]

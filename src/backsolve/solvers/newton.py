"""Newton's method for events of any size, each with its own line search."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backsolve import errors
from backsolve._linearize import Forward, linearize
from backsolve._solution import event_norm
from backsolve._torch import GradMode, without_autocast
from backsolve.jacobians import Assembled
from backsolve.solvers.base import Found, NumericalSolver, may_look
from backsolve.solvers.iterate import Progress, Start, relative_size, start_of
from backsolve.solvers.state import frozen

_TRIALS = 31  # of a step, each half as long as the one before
_SHORTEST = 2.0 ** (1 - _TRIALS)


@dataclass(frozen=True)
class Newton(NumericalSolver):
    """Solve `f(y, *params) = x` by steps `J^-1 (f(y) - x)`, each event by itself.

    J is represented and solved as the `jacobian` of the call says (`Triangular()` for autoregressive f costs no
    factorisation). A step is shortened until the next one, foreseen with the same J, is smaller by a quarter of the
    fraction taken: Deuflhard's natural monotonicity test, which does not depend on the scale of f or on that of its
    components. An event is done when its step is a few rounding errors of y, or when such steps help no more.

    Args:
        init: where to start: a tensor or a number, or a function that is called like a g, `init(x, *params)`, or
            `init(*params)` in an `implicit_function`. Default: at x or at 0,
            whichever is closer to a solution.
        maxiter: how many steps are taken at most.

    Raises:
        ConvergenceError: when called, if an event does not converge, or meets a singular J.

    Example:
        >>> import torch
        >>> from backsolve import inverse
        >>> from backsolve.solvers import Newton
        >>> A = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
        >>> inv = inverse(lambda y: y @ A.T + y**3, Newton(), event_dim=1)
        >>> inv(torch.tensor([4.0, 4.0], dtype=torch.float64))
        tensor([1., 1.], dtype=torch.float64)

    Reference:
        P. Deuflhard, Newton Methods for Nonlinear Problems, Springer 2004, section 3.3.
    """

    init: Start = None
    maxiter: int = 100

    def __post_init__(self) -> None:
        if not isinstance(self.maxiter, int) or self.maxiter < 1:
            raise errors.bad_setting("Newton", "maxiter", "a positive integer", self.maxiter)

    def find(self, forward: Forward, x: Tensor | None) -> Found:
        """Iterate every event; see `NumericalSolver`."""
        with GradMode(False), frozen(forward) as forward:
            y = start_of(self.init, forward, x, "Newton")
            with without_autocast(y.device):
                return _Iteration(forward, x, y).run(self.maxiter)


class _Iteration:
    def __init__(self, forward: Forward, x: Tensor | None, y: Tensor) -> None:
        self.forward, self.x, self.y = forward, x, y
        self.k = forward.model.event_dim
        self.progress = Progress(y, self.k)
        self.floor = torch.finfo(y.dtype).eps ** 0.5
        self.size = torch.zeros_like(self.progress.steps, dtype=y.dtype)
        self.fraction = torch.ones_like(self.size)  # of the next step

    def run(self, maxiter: int) -> Found:
        progress, fine = self.progress, 4 * torch.finfo(self.y.dtype).eps
        for count in range(maxiter):
            at = linearize(self.forward, self.y)
            assembled = self.forward.model.jacobian.assemble(at)
            r = self._residual(at.value)
            step = torch.where(progress.spread(event_norm(r, self.k) == 0), 0.0, assembled.solve(r))
            progress.steps += progress.active
            self.size = torch.where(progress.active, relative_size(step, self.y, self.k), self.size)
            moved, waiting = self._search(assembled, step, may_look(self.y.device, count))
            arrived = progress.active & ((self.size <= fine) | (~moved & (self.size <= self.floor)))
            progress.done |= arrived
            progress.lost |= progress.active & ~moved & ~waiting
            if may_look(self.y.device, count) and not progress.active.any():
                break
        return progress.found(self.y, self._error)

    def _residual(self, z: Tensor) -> Tensor:
        return z if self.x is None else z - self.x

    def _search(self, assembled: Assembled, step: Tensor, look: bool) -> tuple[Tensor, Tensor]:
        """Move y along the step as far as each event may go; return which events moved, and which wait for a shorter.

        Without a look only one fraction of the step is tried, and a shorter one with the next J, at the same y.
        """
        progress, k = self.progress, self.k
        length = event_norm(step, k)
        waiting = progress.active & length.isfinite()
        moved = progress.done.clone()
        for _ in range(_TRIALS if look else 1):
            if look and not waiting.any():
                break
            trial = torch.where(progress.spread(waiting), self.y - progress.spread(self.fraction) * step, self.y)
            r = self._residual(self.forward.value(trial))
            foreseen = event_norm(assembled.solve(r), k)
            good = waiting & ((foreseen <= (1 - self.fraction / 4) * length) | (event_norm(r, k) == 0))
            self.y = torch.where(progress.spread(good), trial, self.y)
            moved |= good
            waiting &= ~good & (self.size > self.floor)  # within rounding errors no shorter step is any better
            self.fraction = torch.where(waiting, self.fraction / 2, torch.where(good, 1.0, self.fraction))
            waiting &= self.fraction >= _SHORTEST
        return moved, waiting

    def _error(self, first: tuple[int, ...], many: str, steps: int) -> errors.BacksolveError:
        size = self.size[first].item()
        return errors.not_converged(
            self.forward.model.call,
            "Newton's method did not converge.",
            "steps that become as small as the rounding errors of y",
            f"{many}: after {steps} steps the next would move y by {size:.3g} of its size",
            "start closer to the solution: Newton(init), or raise maxiter; an infinite step means a singular J",
        )

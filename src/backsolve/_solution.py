"""What a solve produced, whether it solves `f(y) = x`, and what happens where it does not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from backsolve import errors
from backsolve._nearby import not_bracketed
from backsolve._reduce import FEW, extremes

OnFailure = Literal["raise", "warn", "nan", "ignore"]


@dataclass(frozen=True)
class Solution:
    """The result of `Inverse.solve`: y and how well it solves `f(y) = x`.

    Attributes:
        y: the solution, differentiable like the result of calling the `Inverse`; shape `(*batch, *event)`.
        residual: `max |f(y) - x|` over each event, shape `(*batch,)` (the shape of y if `event_dim = 0`); no gradient.
        converged: whether each event passed the residual test, shape `(*batch,)`; True without a test.
        iterations: how many iterations the solver took for each event, shape `(*batch,)`; None if it does not say.
    """

    y: Tensor
    residual: Tensor
    converged: Tensor
    iterations: Tensor | None = None
    _log_abs_det: Callable[[], Tensor] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def log_abs_det_jacobian(self) -> Tensor:
        """`log|det dy/dx| = -log|det J|`, shape `(*batch,)`, differentiable; computed when first read."""
        if self._log_abs_det is None:
            raise errors.DerivativeError("an implicit function has no x, and so no determinant of dy/dx")
        return self._log_abs_det()


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)
_HALF_THE_DIGITS = {dtype: math.sqrt(torch.finfo(dtype).eps) for dtype in FLOATS}


@dataclass(frozen=True)
class Tolerance:
    """When an event counts as solved.

    The free test is `|f(y) - x| <= rtol max(|x|, |f(y)|)` in each component. A component that fails it may still be as
    good as the arithmetic allows (x near 0, or an f that subtracts large numbers): it passes if f passes x within
    `min(rtol, 64 eps) |y|` of y. An event with any other is judged by its Newton step instead: it passes if that moves
    y by at most `rtol |y| + atol`, in the maximum norm, and f responds as J says.

    `rtol=None` is sqrt(eps) of the dtype. `atol=None` is eps, but 0 for events with |x| < eps, as a probability of
    1e-300 must not pass with any tiny y; and 0 where the residual is above eps, as y may be small by its unit.
    """

    rtol: float | None = None
    atol: float | None = None

    @staticmethod
    def of(residual_tol: float | tuple[float, float] | None) -> Tolerance:
        """Read the option `residual_tol`."""
        parts = residual_tol if isinstance(residual_tol, tuple) else (residual_tol,)
        valid = len(parts) in (1, 2) and all(p is None or (isinstance(p, int | float) and p >= 0) for p in parts)
        if not valid:
            raise errors.bad_option("residual_tol", "None, a number >= 0, or a pair (rtol, atol) of such", residual_tol)
        return Tolerance(*parts)

    @property
    def off(self) -> bool:
        """Whether everything passes."""
        return self.rtol == math.inf

    def relative(self, dtype: torch.dtype) -> float:
        """The relative tolerance for this dtype."""
        return _HALF_THE_DIGITS[dtype] if self.rtol is None else self.rtol

    def absolute(self, x_norm: Tensor, residual: Tensor) -> Tensor | float:
        """The absolute tolerance on the Newton step, per event."""
        if self.atol is not None:
            return self.atol
        eps = torch.finfo(x_norm.dtype).eps
        return torch.where((x_norm < eps) | (residual > eps), 0.0, eps)


class Solvable(Protocol):
    """J at y, as far as the residual test needs it."""

    def solve(self, b: Tensor) -> Tensor:
        """`J^-1 b`."""
        ...

    def times(self, u: Tensor) -> Tensor:
        """`J u`."""
        ...


@dataclass(frozen=True)
class Check:
    """The verdict of the residual test. `step` is the norm of the Newton step where one was needed."""

    failed: Tensor
    residual: Tensor
    step: Tensor | None = None


def event_norm(t: Tensor, event_dim: int) -> Tensor:
    """The maximum norm of each event, shape `(*batch,)`."""
    t = t.detach().abs()
    if not event_dim:
        return t
    flat = t.flatten(-event_dim)
    return flat.amax(-1) if flat.shape[-1] else flat.sum(-1)


def check_residual(
    y: Tensor,
    x: Tensor | None,
    z: Tensor,
    event_dim: int,
    tolerance: Tolerance,
    value: Callable[[Tensor], Tensor],
    jacobian: Callable[[], Solvable],
) -> Check:
    """Test `z = f(y)` against x, event by event.

    Args:
        y: the solution, shape `(*batch, *event)`.
        x: what f(y) should be; None stands for 0.
        z: `f(y)`.
        event_dim: the number of event dimensions.
        tolerance: when an event counts as solved.
        value: evaluates f; called only if the free test fails somewhere, as is `jacobian`.
        jacobian: works out J at y.
    """
    difference = z if x is None else torch.where(z == x, 0.0, z - x)  # inf - inf is NaN, yet inf = inf
    residual = event_norm(difference, event_dim)
    if tolerance.off:
        return Check(torch.zeros_like(residual, dtype=torch.bool), residual)
    rtol = tolerance.relative(y.dtype)
    size = z.abs() if x is None else torch.maximum(z.abs(), x.abs())
    near = (difference.abs() <= rtol * size) & size.isfinite()  # NaN compares false
    solved = near | (difference == 0)
    failed = ~_in_each_event(solved, event_dim)
    if failed.any() and not y.is_complex():
        left = not_bracketed(y, x, z, (~solved).flatten().nonzero()[:, 0], rtol, event_dim, value)
        solved = torch.ones(solved.shape, dtype=torch.bool, device=solved.device)  # in the order of the numbers
        solved.view(-1)[left] = False
        failed = ~_in_each_event(solved, event_dim)
    if not failed.any():
        return Check(failed, residual)
    step = jacobian().solve(difference)
    step_norm, y_norm = event_norm(step, event_dim), event_norm(torch.where(y.isfinite(), y, 0.0), event_dim)
    x_norm = torch.zeros_like(residual) if x is None else event_norm(x, event_dim)
    allowed = rtol * y_norm + tolerance.absolute(x_norm, residual)
    passed = (step_norm <= allowed) & residual.isfinite()
    asked = failed & passed
    if asked.any():
        in_event = asked.reshape(asked.shape + (1,) * event_dim)
        responds = _responds(y, step, in_event, rtol, event_dim, value, jacobian().times)
        passed &= _in_each_event(responds | solved, event_dim)
    return Check(failed & ~passed, residual, step_norm)


def _responds(
    y: Tensor,
    step: Tensor,
    asked: Tensor,
    rtol: float,
    event_dim: int,
    value: Callable[[Tensor], Tensor],
    times: Callable[[Tensor], Tensor],
) -> Tensor:
    """Which components of f really change as J says, on a scale that contains the Newton step; in events asked about.

    Only then does a small step mean that the root is near. Beside a pole (tan at pi / 2), at a steep end (logit at
    1) and in a tail where f is rounded to a constant (a normal cdf at -40) every step is small; where J is infinite
    (a square root at 0) it is 0. Two scales are tried: that of the step itself, which stays inside a narrow domain,
    and rtol |y|, above the rounding errors of an f that subtracts large numbers.
    """
    limits, y = torch.finfo(y.dtype), y.detach()
    direction = torch.where(step == 0, 1.0, step.sgn())
    believed = torch.zeros_like(y, dtype=torch.bool)
    for relative in (4 * limits.eps, rtol):
        width = torch.maximum(8 * step.abs(), relative * y.abs())
        still = (event_norm(width, event_dim) == 0).reshape(asked.shape)
        change = torch.where(asked, direction * torch.where(still, limits.tiny, width), 0.0)
        ahead, behind = y + change, y - change
        try:
            response = value(ahead) - value(behind)
        except Exception:  # noqa: BLE001 (f may raise outside its domain, whatever it likes)
            continue
        expected = times(ahead - behind)
        off = (response - expected).abs()
        believed |= (off <= expected.abs() / 2) & expected.isfinite() & (expected != 0)  # NaN compares false
    return believed


def _in_each_event(mask: Tensor, event_dim: int) -> Tensor:
    return mask.flatten(-event_dim).all(-1) if event_dim else mask


def obviously_solved(x: Tensor, z: Tensor, rtol: float) -> bool:
    """The free test in the fewest kernels, for the common case that every element passes by itself."""
    if z.is_complex():  # Python's abs of a complex number may raise
        return not z.numel() or extremes(lambda z, x: (z / x - 1).abs(), z, x.detach())[1] <= rtol
    if z.numel() == 1:
        target = x.item()
        return abs(z.item() - target) <= rtol * abs(target) < math.inf
    if z.numel() <= FEW:
        pairs = zip(z.flatten().tolist(), x.flatten().tolist(), strict=True)
        return all(abs(value - target) <= rtol * abs(target) < math.inf for value, target in pairs)
    low, high = extremes(torch.div, z, x.detach())
    return 1 - rtol <= low and high <= 1 + rtol  # NaN compares false


def handle_failure(
    on_failure: OnFailure,
    failed: Tensor,
    event_dim: int,
    result: Tensor,
    error: Callable[[], errors.BacksolveError],
) -> Tensor:
    """Do with the failed events what the caller asked for: raise, warn, spoil them, or nothing."""
    if on_failure == "ignore" or not failed.any():
        return result
    if on_failure == "raise":
        raise error()
    if on_failure == "warn":
        warnings.warn(str(error()), errors.BacksolveWarning, stacklevel=2)
        return result
    return spoil(failed, event_dim, result)


def spoil(failed: Tensor, event_dim: int, result: Tensor) -> Tensor:
    """Turn the failed events to NaN, and their gradients of every order.

    They are multiplied by NaN; overwriting would cut the graph, and leave gradients of 0.
    """
    factor = torch.where(failed, torch.nan, 1.0).to(result.dtype)
    return result * factor.reshape(factor.shape + (1,) * event_dim)


def first_index(failed: Tensor) -> tuple[int, ...]:
    """The index of the first True, `()` for a 0-d tensor."""
    return tuple(int(i) for i in failed.nonzero()[0])


PERIODS = {"2 pi": 2 * math.pi, "pi": math.pi, "360": 360.0, "180": 180.0, "1": 1.0}


def residual_error(
    call: str,
    check: Check,
    y: Tensor,
    x: Tensor | None,
    z: Tensor,
    z_as_found: Tensor,
    event_dim: int,
    tolerance: Tolerance,
) -> errors.ResidualError:
    """Say which events fail, by how much, and what would mend it. `z_as_found` is f at what g returned, unrefined."""
    rtol = tolerance.relative(y.dtype)
    target = torch.zeros_like(z) if x is None else x
    first = first_index(check.failed)
    noun = "event" if event_dim else "element"
    numbers = f"x = {_show(target[first])}, y = g(x) = {_show(y[first])}, f(y) = {_show(z[first])}"
    step = math.nan if check.step is None else check.step[first].item()
    got = (
        f"{errors.count(int(check.failed.sum()), check.failed.numel(), noun)} differ, the first at index {first}: "
        f"{numbers}, |f(y) - x| = {check.residual[first].item():.3g}, a Newton step would move y by {step:.3g}"
    )
    criterion = (
        f"|f(y) - x| <= {rtol:.2g} max(|x|, |f(y)|), or a Newton step of at most {rtol:.2g} |y| + atol, per {noun}"
    )
    return errors.residual_failed(call, criterion, got, _remedy(check, y, target, z_as_found, event_dim))


def _remedy(check: Check, y: Tensor, x: Tensor, z: Tensor, event_dim: int) -> str:
    for name, period in ({} if y.is_complex() else PERIODS).items():
        turns = ((z - x).detach() / period)[check.failed].reshape(int(check.failed.sum()), -1)  # (failed, event)
        whole = (turns - turns.round()).abs() < 1e-4
        if whole.all() and (turns.round() != 0).any(1).all():
            return (
                f"the differences are whole multiples of {name}: f(y) and x agree up to a period. Reduce x to the "
                "principal period before the call, or let g return the y of the same revolution as x"
            )
    eps = torch.finfo(y.dtype).eps
    near_zero = event_norm(y, event_dim) <= eps**0.5
    if check.step is not None and bool(((check.step <= eps**0.5) & near_zero)[check.failed].all()):
        return (
            "y is 0 up to the step named above. If such an error does not matter to you, say how large it may be: "
            "residual_tol=(None, atol)"
        )
    if check.step is not None and bool((check.step <= 0.1 * event_norm(y, event_dim))[check.failed].all()):
        return (
            "g is close but not exact: refine=5 polishes y with up to 5 Newton steps; or tighten g's own tolerance, "
            "or accept its error with residual_tol=(rtol, atol)"
        )
    return (
        "check that f is the inverse of g, with the same arguments in the same order and units, and that g has "
        'converged; on_failure="nan" keeps the good events'
    )


def _show(t: Tensor) -> str:
    values = t.detach().flatten().tolist()
    if t.dim() == 0:
        return f"{values[0]:.6g}"
    head = ", ".join(f"{v:.6g}" for v in values[:6])
    return f"[{head}{', ...' if len(values) > 6 else ''}]"

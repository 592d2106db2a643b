"""The public face of the core: inverse, inverse_of, implicit_function and the callables that they return."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function, has_torch_function_unary

from backsolve import _beneath, _compiled, _functional, _sharded, _solve, errors
from backsolve._arguments import Arguments
from backsolve._attach import Rule
from backsolve._levels import Peeled
from backsolve._solution import FLOATS, OnFailure, Solution, Tolerance
from backsolve._solve import ParamEventDims, Problem
from backsolve._torch import PLAIN, active_transform, alias, is_distributed, never_compiled, not_traced
from backsolve.jacobians import Default, Diagonal, Jacobian
from backsolve.solvers.foreign import Solver, as_solver, name_of


class Inverse:
    """The inverse g of f as a differentiable function: `y = g(x, *params)` with `f(y, *params) = x`.

    Made by `inverse` or `inverse_of`, which document the options. Calling it runs the solver, tests that `f(y) = x`,
    and attaches the derivatives

        dy = J^-1 (dx - f_p dp),    J = df/dy at y,

    so gradients of any order flow to x, to every tensor in params (pytrees and keywords included) and to every tensor
    that f closes over. Shapes: x is `(*batch, *event)` with `event_dim` event dimensions, and so is y, with a batch
    that is broadcast with the params as f broadcasts them.
    """

    def __init__(self, f: Callable[..., Tensor], solver: Solver, options: dict[str, Any]) -> None:
        self._f, self._solver, self._options = f, solver, options
        self._problem = _problem("inverse", f, solver, **options)
        self._text = _representation("inverse", f, solver, options)

    def __call__(self, x: Tensor, /, *params: Any, **kwargs: Any) -> Tensor:
        """Return y with `f(y, *params, **kwargs) = x`.

        Raises:
            ArgumentError: x is no real floating-point tensor, or a param lives on another device.
            SolverOutputError, ForwardOutputError: g or f returned something of the wrong type, shape, dtype or device.
            ResidualError: `f(y)` is not x (with `on_failure="raise"`).
            SingularJacobianError, StructureError: in the backward pass, J has no inverse or not the declared structure.
        """
        if type(x) not in PLAIN and is_distributed(x):
            return _sharded_call(self._problem, _with_problem(self, _sharded.guarded(self._problem)), x, params, kwargs)
        return self._run(x, params, kwargs).y

    def solve(self, x: Tensor, /, *params: Any, **kwargs: Any) -> Solution:
        """Return y together with its residual and convergence, as a `Solution`."""
        solved = self._run(x, params, kwargs, report=True)
        with_grad = torch.is_grad_enabled()  # now, not when somebody prints it

        def log_abs_det() -> Tensor:
            with torch.set_grad_enabled(with_grad):
                return self._log_det(solved)

        return _solution(solved, log_abs_det)

    def with_log_det(self, x: Tensor, /, *params: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return `(y, log|det dy/dx|)`, the second of shape `(*batch,)` and differentiable like y.

        With `event_dim = 0` it is `log|dy/dx|` of each element, not summed, as in torch.distributions.
        """
        solved = self._run(x, params, kwargs)
        return solved.y, self._log_det(solved)

    def jacobian(self, x: Tensor, /, *params: Any, **kwargs: Any) -> Tensor:
        """Return `dy/dx = J^-1`, differentiable: of the shape of y if `event_dim = 0`, else `(*batch, *event, *event)`.

        The first group of event dimensions counts the elements of y, the second those of x.
        """
        if self._problem.rule.jacobian.equations is not None:
            raise errors.no_square_map(self._problem.call, self._problem.rule.jacobian)
        return self._run(x, params, kwargs).made_of_jacobian(lambda j: j.inverse(), 2)

    def starting_at(self, previous: Solution | Tensor) -> Inverse:
        """The same inverse, whose numerical solver starts at a previous solution, for an x or params that moved little.

        The shape of y must be that of the previous one. Where that is no help (NaN, or outside of a `Bracket`), the
        solver starts as it does without.
        """
        return _starting_at(self, previous)

    def __repr__(self) -> str:
        return self._text  # vmap asks for it, and torch.compile would trace how it is made

    def __reduce__(self) -> Any:
        """Pickle by qualified name if this is what stands there (a decorated solver), else by f, g and options."""
        name = self.__dict__.get("__qualname__")
        if name and functools.reduce(_getattr, name.split("."), sys.modules.get(self.__module__)) is self:
            return name
        return _rebuild, (type(self), self._f, self._solver, self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Inverse:
        return _deepcopy(self, memo)

    def _run(self, x: Tensor, params: tuple[Any, ...], kwargs: dict[str, Any], report: bool = False) -> Solved:
        problem, arguments = self._problem, Arguments(params, kwargs)
        if not (
            isinstance(x, Tensor)
            and x.dtype in FLOATS
            and not x.is_meta
            and x.layout is torch.strided
            and x.dim() >= problem.rule.event_dim
        ):
            raise _bad_x(problem, x)
        if type(x) not in PLAIN and is_distributed(x):
            raise errors.distributed(problem.call, "the value of y alone", "a question about x that has other answers")
        if problem.rule.jacobian.equations is not None:  # c(y, x, *params) = 0: x is one of the params
            if is_compiling():
                return _compiled_call(problem, None, Arguments((x, *params), kwargs), report)
            return _run_implicit(problem, Arguments((x, *params), kwargs), report)
        if arguments.tensors:
            _check_call(problem, x, arguments)
        if is_compiling():
            return _compiled_call(problem, x, arguments, report)
        if has_torch_function_unary(x):
            x = alias(x)
            arguments.through_modes()
        return _call(problem, x, arguments, report=report)

    def _log_det(self, solved: Solved) -> Tensor:
        equations = self._problem.rule.jacobian.equations
        if equations is not None and not equations.has_log_det:
            raise errors.no_square_map(self._problem.call, self._problem.rule.jacobian)
        return solved.made_of_jacobian(lambda j: -j.log_abs_det(), 0)


class ImplicitFunction:
    """A function given by an equation: `y = h(*params)` with `c(y, *params) = 0`. Made by `implicit_function`."""

    def __init__(self, c: Callable[..., Tensor], solver: Solver, options: dict[str, Any]) -> None:
        self._f, self._solver, self._options = c, solver, options
        self._problem = _problem("implicit_function", c, solver, **options)
        self._text = _representation("implicit_function", c, solver, options)

    def __call__(self, *params: Any, **kwargs: Any) -> Tensor:
        """Return y with `c(y, *params, **kwargs) = 0`."""
        return self._run(params, kwargs).y

    def solve(self, *params: Any, **kwargs: Any) -> Solution:
        """Return y together with its residual `max |c(y)|` and convergence, as a `Solution`."""
        return _solution(self._run(params, kwargs, report=True), None)

    def starting_at(self, previous: Solution | Tensor) -> ImplicitFunction:
        """The same function, whose numerical solver starts at a previous solution; see `Inverse.starting_at`."""
        return _starting_at(self, previous)

    def __repr__(self) -> str:
        return self._text

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self._f, self._solver, self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> ImplicitFunction:
        return _deepcopy(self, memo)

    def _run(self, params: tuple[Any, ...], kwargs: dict[str, Any], report: bool = False) -> Solved:
        if is_compiling():
            return _compiled_call(self._problem, None, Arguments(params, kwargs), report)
        return _run_implicit(self._problem, Arguments(params, kwargs), report)


def _run_implicit(problem: Problem, arguments: Arguments, report: bool) -> Solved:
    _check_call(problem, None, arguments)
    if has_torch_function(arguments.tensors):
        arguments.through_modes()
    return _call(problem, None, arguments, report=report)


@not_traced(errors.MADE_INSIDE)
def inverse(
    f: Callable[..., Tensor],
    solver: Solver,
    *,
    event_dim: int = 0,
    jacobian: Jacobian | None = None,
    param_event_dims: ParamEventDims = None,
    refine: int = 0,
    residual_tol: float | tuple[float, float] | None = None,
    on_failure: OnFailure = "raise",
    verify: bool = True,
) -> Inverse:
    """Make the inverse of f, computed by any code, a differentiable torch function.

    With `f(y, *params) = x` and `y = g(x, *params)`, the inverse function theorem gives

        dy = J^-1 (dx - f_p dp),    J = df/dy at y.

    Autograd need not see into g; it differentiates f. Gradients of any order flow to x, params and whatever f closes
    over.

    Args:
        f: the forward function in torch, `f(y, *params, **kwargs) -> x`, of the shape of y.
        solver: g, called as `solver(x, *params, **kwargs)` with detached tensors, under `torch.no_grad()`, once a call;
            returns y and writes into none of its arguments. A torch function, a NumPy or SciPy ufunc, or
            `backsolve.solvers.numpy_solver(fn)`. What g computes for a cache that f reads too has no graph.
        event_dim: how many rightmost dimensions f mixes: 0 if it is elementwise, 1 for vectors, 2 for matrices. All
            dimensions to the left are batch.
        jacobian: the structure of J: `Diagonal()` if `event_dim = 0`, else `Dense()`, by products where that is faster,
            unless said otherwise.
        param_event_dims: the event dimensions of the params: a tuple for positional ones, a dict for keywords; what
            is not named has 0 if `event_dim = 0`, else is unknown.
        refine: polish y by up to so many Newton steps, each kept only where it lowers the residual.
        residual_tol: rtol, or `(rtol, atol)`, of the residual test: an event passes if
            `|f(y) - x| <= rtol max(|x|, |f(y)|)` in each component, or f passes x a few roundings of y away, or if a
            Newton step would move y by at most `rtol |y| + atol`. Default: rtol = sqrt(eps) of the dtype; atol = eps,
            and 0 for events with |x| < eps. `math.inf`: no test.
        on_failure: what happens to events that fail the test, or whose J is singular: "raise" an error, "warn", turn
            them and all their gradients to "nan", or "ignore" it. A param that failed events share has a gradient
            of NaN, as it is a sum over events; select the good events before the call to keep it.
        verify: probe that f mixes no more than was declared, before the first gradient for a new event shape, dtype,
            device or pattern of batch dimensions, and again at the 2nd, 4th, 8th, ... and each 64th time.

    Returns:
        An `Inverse`, to be called as `y = inv(x, *params, **kwargs)`.

    Raises:
        ArgumentError: an option has a value that makes no sense.

    Example:
        >>> import numpy as np, torch
        >>> from backsolve import inverse
        >>> arcsin = inverse(torch.sin, np.arcsin)
        >>> x = torch.tensor([0.0, 0.6], dtype=torch.float64, requires_grad=True)
        >>> arcsin(x).sum().backward()
        >>> x.grad  # 1 / sqrt(1 - x^2)
        tensor([1.0000, 1.2500], dtype=torch.float64)

    Reference:
        S. G. Krantz, H. R. Parks, The Implicit Function Theorem, Birkhäuser 2002.
    """
    options = {
        "event_dim": event_dim,
        "jacobian": jacobian,
        "param_event_dims": param_event_dims,
        "refine": refine,
        "residual_tol": residual_tol,
        "on_failure": on_failure,
        "verify": verify,
    }
    return Inverse(f, solver, options)


@not_traced(errors.MADE_INSIDE)
def inverse_of(f: Callable[..., Tensor], **options: Any) -> Callable[[Solver], Inverse]:
    """Decorate the solver of `f(y, *params) = x`: the same as `inverse(f, solver, **options)`.

    Args:
        f: the forward function in torch.
        **options: those of `inverse`.

    Example:
        >>> import torch
        >>> from backsolve import inverse_of
        >>> @inverse_of(lambda y, a: a * y.exp())
        ... def scaled_log(x, a):
        ...     return (x / a).log()
        >>> a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> scaled_log(torch.tensor(3.0, dtype=torch.float64), a).backward()
        >>> a.grad  # -1 / a
        tensor(-0.5000, dtype=torch.float64)
    """

    def decorate(solver: Solver) -> Inverse:
        decorated = Inverse(f, solver, _options(options))
        functools.update_wrapper(decorated, solver, updated=())  # not its attributes: it may be an Inverse
        return decorated

    return decorate


@not_traced(errors.MADE_INSIDE)
def implicit_function(c: Callable[..., Tensor], solver: Solver, **options: Any) -> ImplicitFunction:
    """Make the solution of `c(y, *params) = 0` a differentiable function of the params.

    The inverse at x = 0: `dy = -J^-1 c_p dp` with `J = dc/dy`.

    Args:
        c: the conditions in torch, `c(y, *params, **kwargs)`, of the shape of y.
        solver: called as `solver(*params, **kwargs)` with detached tensors; returns y.
        **options: those of `inverse`.

    Example:
        >>> import torch
        >>> from backsolve import implicit_function
        >>> root = implicit_function(lambda y, p: y**2 - p, torch.sqrt)
        >>> p = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
        >>> root(p).backward()
        >>> p.grad  # 1 / (2 sqrt(p))
        tensor(0.2500, dtype=torch.float64)
    """
    return ImplicitFunction(c, solver, _options(options))


_DEFAULTS: dict[str, Any] = dict(inverse.__kwdefaults__ or {})  # one place for the options of all three


def _options(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in _DEFAULTS:
            raise errors.bad_option(name, f"one of {', '.join(_DEFAULTS)}", given[name])
    return {**_DEFAULTS, **given}


def _problem(
    kind: str,
    f: Any,
    solver: Any,
    event_dim: int,
    jacobian: Jacobian | None,
    param_event_dims: ParamEventDims,
    refine: int,
    residual_tol: Any,
    on_failure: OnFailure,
    verify: bool,
) -> Problem:
    """Check the options and put them together."""
    for name, value in (("f", f), ("solver", solver)):
        if not callable(value):
            raise errors.bad_option(name, "a callable", value)
    for name, value in (("event_dim", event_dim), ("refine", refine)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise errors.bad_option(name, "an integer >= 0", value)
    if jacobian is not None and not isinstance(jacobian, Jacobian):
        raise errors.bad_option("jacobian", "a structure such as Diagonal() or Dense(), or None", jacobian)
    if on_failure not in get_args(OnFailure):
        raise errors.bad_option("on_failure", f"one of {get_args(OnFailure)}", on_failure)
    _check_event_dims(param_event_dims)
    structure = jacobian or (Default() if event_dim else Diagonal())
    call = f"{kind}({name_of(f)}, {name_of(solver)})"
    if structure.equations is not None:
        if kind != "inverse" or event_dim != structure.equations.event_dim:
            expected = f"a gauge or a subspace in an inverse with event_dim={structure.equations.event_dim}"
            raise errors.bad_option("jacobian", expected, f"{structure!r} in {kind}(..., event_dim={event_dim})")
        f = structure.equations.conditions(f)
    rule = Rule(structure, event_dim, on_failure, verify, call)
    return Problem(f, as_solver(solver), rule, refine, Tolerance.of(residual_tol), param_event_dims)


def _check_event_dims(dims: ParamEventDims) -> None:
    values = dims.values() if isinstance(dims, Mapping) else (dims or ())
    if isinstance(dims, str) or any(not isinstance(d, int) or d < 0 for d in values):
        raise errors.bad_option(
            "param_event_dims", "None, a tuple of integers >= 0, or a dict of such by keyword", dims
        )


def _bad_x(problem: Problem, x: Any) -> errors.ArgumentError:
    if isinstance(x, Tensor) and x.dtype in FLOATS and not x.is_meta and x.layout is torch.strided:
        return errors.too_few_dimensions(problem.call, x.shape, problem.rule.event_dim)
    return errors.bad_input(problem.call, x)


def _check_call(problem: Problem, x: Tensor | None, arguments: Arguments) -> None:
    """Refuse what cannot be solved before any work is done."""
    like = x if x is not None else next((t for t in arguments.tensors if t.dim()), None)
    for t in arguments.tensors:
        if type(t) not in PLAIN and is_distributed(t):
            raise errors.distributed(problem.call, "an x that is a DTensor, too", errors.describe(t))
        if like is not None and t.device != like.device and t.dim():
            raise errors.mixed_devices(problem.call, like, t)


Solved = _solve.Solved | _functional.Solved | _compiled.Solved


def _call(problem: Problem, x: Tensor | None, arguments: Arguments, *, report: bool) -> Solved:
    """By the lean path, or by the one that composes with the transforms."""
    if not active_transform():
        return _solve.solve(problem, x, arguments, report=report)
    for t in arguments.tensors if x is None else (x, *arguments.tensors):
        if is_distributed(Peeled(t).plain):
            raise errors.distributed(problem.call, "an eager call, without torch.func", "a DTensor inside a transform")
    return _beneath.solve(problem, x, arguments, report=report)


# What walks autograd graphs must not be traced.
_uncompiled_call = never_compiled(_call, errors.NOT_COMPILED)
_sharded_call = never_compiled(_sharded.call, errors.SHARDED_NOT_COMPILED)


def _compiled_call(problem: Problem, x: Tensor | None, arguments: Arguments, report: bool) -> Solved:
    """In the graph; around it where the verdict is asked for, or the shape of y does not follow from the arguments.

    To be called by a frame that holds tensors itself: others are not traced after a graph break, and what they call is.
    """
    if report or (x is None and problem.rule.event_dim):
        return _uncompiled_call(problem, x, arguments, report=report)
    return _compiled.solve(problem, x, arguments)


def _solution(solved: Solved, log_abs_det: Callable[[], Tensor] | None) -> Solution:
    assert solved.check is not None
    return Solution(solved.y, solved.check.residual, ~solved.check.failed, solved.iterations, log_abs_det)


def _representation(kind: str, f: Any, solver: Any, options: dict[str, Any]) -> str:
    given = "".join(f", {name}={value!r}" for name, value in options.items() if value != _DEFAULTS[name])
    return f"{kind}({name_of(f)}, {name_of(solver)}{given})"


def _rebuild(kind: type, f: Any, solver: Any, options: dict[str, Any]) -> Any:
    return kind(f, solver, options)


def _deepcopy(original: Any, memo: dict[int, Any]) -> Any:
    twin = type(original)(*(copy.deepcopy(part, memo) for part in (original._f, original._solver, original._options)))
    twin._problem.rule.verified.update(original._problem.rule.verified)
    return twin


def _starting_at(original: Any, previous: Solution | Tensor) -> Any:
    solver = original._solver
    if not (is_dataclass(solver) and not isinstance(solver, type) and hasattr(solver, "init")):
        raise errors.bad_setting(
            "starting_at", "solver", "one that starts somewhere: Bracket, Newton, FixedPoint", solver
        )
    y = (previous.y if isinstance(previous, Solution) else previous).detach()
    twin = type(original)(original._f, replace(solver, init=y), original._options)
    twin._problem.rule.verified.update(original._problem.rule.verified)
    return twin


def _with_problem(original: Inverse, problem: Problem) -> Inverse:
    twin = object.__new__(type(original))
    vars(twin).update(vars(original), _problem=problem)
    return twin


def _getattr(owner: Any, name: str) -> Any:
    return getattr(owner, name, None)

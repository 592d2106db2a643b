"""One call from end to end: run the solver, check what it returned, attach the derivatives."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from sys import getrefcount
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._attach import Rule, attach
from backsolve._linearize import (
    Forward,
    Linearization,
    Model,
    check_value,
    linearize,
    linearize_connected,
    linearize_unevaluated,
)
from backsolve._nearby import solved_but_for_rounding
from backsolve._solution import (
    Check,
    Tolerance,
    check_residual,
    event_norm,
    handle_failure,
    obviously_solved,
    residual_error,
    spoil,
)
from backsolve._torch import (
    GradMode,
    is_torch_function,
    is_traced,
    owns_its_memory,
    versions,
    without_autocast,
    without_graph,
)
from backsolve.errors import ResidualError
from backsolve.jacobians import Assembled
from backsolve.solvers.base import Found, NumericalSolver
from backsolve.solvers.foreign import NumpySolver, Solver, to_tensor

_numbers = itertools.count()
_problems: WeakValueDictionary[str, Problem] = WeakValueDictionary()
ParamEventDims = Sequence[int] | Mapping[str, int] | None


@dataclass(frozen=True)
class Problem:
    """`f(y, *params) = x` with the solver g for it, and how careful to be."""

    f: Any
    solver: Solver
    rule: Rule
    refine: int
    tolerance: Tolerance
    param_event_dims: ParamEventDims = None
    name: str = field(default_factory=lambda: str(next(_numbers)), compare=False)
    """Under which compiled graphs know it, as they can hold constants and tensors only."""
    model: Model = field(init=False, repr=False, compare=False)
    """f and what is claimed of it."""
    numerical: NumericalSolver | None = field(init=False, repr=False, compare=False)
    """The solver, if it works with f alone."""
    g_is_pure: bool = field(init=False, repr=False, compare=False)
    """Whether it is plain that g reads no tensors but its arguments, and, unless there are keywords, writes none."""
    is_tested: bool = field(init=False)
    """Whether somebody wants to know if `f(y) = x`."""

    def __post_init__(self) -> None:
        # Fields, no cached properties: before Python 3.12 these have a lock, which torch.compile cannot trace.
        model = Model(self.f, self.rule.jacobian, self.rule.event_dim, self.rule.call)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "numerical", self.solver if isinstance(self.solver, NumericalSolver) else None)
        object.__setattr__(self, "g_is_pure", is_torch_function(self.solver))
        object.__setattr__(self, "is_tested", not (self.tolerance.off or self.rule.on_failure == "ignore"))
        _problems[self.name] = self

    @staticmethod
    def named(name: str) -> Problem:
        """The problem of this name, if it still lives."""
        if (problem := _problems.get(name)) is None:
            raise errors.forgotten_problem()
        return problem

    @property
    def call(self) -> str:
        """How messages name this problem."""
        return self.rule.call

    def bind(self, arguments: Arguments, *, implicit: bool) -> Forward:
        """f with the params of one call."""
        return Forward(self.model, arguments, implicit)


@dataclass(slots=True)  # frozen, it would take three times as long
class Solved:
    """What one call found: the differentiable y, f with its params, and the verdict if it was asked for."""

    y: Tensor
    forward: Forward
    check: Check | None
    value: Tensor | None  # f(y), if it was worked out for the verdict
    rule: Rule
    iterations: Tensor | None = None

    def made_of_jacobian(self, make: Callable[[Assembled], Tensor], event_groups: int) -> Tensor:
        """A function of J at y, differentiable in everything that y depends on; NaN where y is.

        Args:
            make: the function, of shape `(*batch, *trailing)`.
            event_groups: how many times `trailing` holds the event dimensions.
        """
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.no_grad():
                return self.made_of_jacobian(make, event_groups)
        rule, trailing_dims = self.rule, self.rule.event_dim * event_groups
        with without_autocast(self.y.device):
            at = linearize_connected(self.forward, self.y)
            if self.value is not None:  # f is evaluated later than in the call, which may be much later
                check_value(at, torch.where(self.y.isnan(), at.value, self.value))
            assembled = rule.assemble(at, differentiated=self.y.requires_grad)
            result = rule.spoil_singular(assembled, make(assembled), trailing_dims)
        if self.check is not None and rule.on_failure == "nan":
            result = spoil(self.check.failed, trailing_dims, result)
        return result if self.y.requires_grad else result.detach()


def solve(problem: Problem, x: Tensor | None, arguments: Arguments, *, report: bool = False) -> Solved:
    """Solve `f(y, *params) = x` and attach the derivatives to y.

    Args:
        problem: f, g and the options.
        x: a checked tensor; None for an implicit function, which has 0 in its place.
        arguments: the params.
        report: work out the verdict for every event, also where the options need none.
    """
    forward = Forward(problem.model, arguments, x is None)
    solution = run_solver(problem, x, arguments, forward)
    found = solution.y
    if x is not None and x.shape != found.shape:
        x = x.expand(found.shape)
    y = refine(problem, forward, found, x) if problem.refine else found
    tested = report or problem.is_tested or solution.failed is not None
    at, z = _evaluate(forward, y, x, tested)
    check = _check(problem, forward, y, x, z, at, report) if tested and z is not None else None
    result = y if at is None else attach(problem.rule, at, y, x)
    if check is None:
        return Solved(result, forward, None, None, problem.rule)
    verdict, value = check
    if solution.failed is not None:
        verdict = replace(verdict, failed=verdict.failed | solution.failed)
    result = handle_failure(
        problem.rule.on_failure,
        verdict.failed,
        problem.rule.event_dim,
        result,
        solution.error or (lambda: _residual_error(problem, forward, verdict, found, y, x, value)),
    )
    return Solved(result, forward, verdict, value, problem.rule, solution.iterations)


def run_solver(problem: Problem, x: Tensor | None, arguments: Arguments, forward: Forward) -> Found:
    """Call g on detached tensors, without a graph, and make sure that what it returns can be y; or solve with f."""
    if is_traced():
        raise errors.traced(problem.call)
    if problem.numerical:
        if x is not None and x.is_complex():
            raise errors.complex_bracket(problem.call, problem.solver)
        solution = problem.numerical.find(forward, None if x is None else x.detach())
        if solution.error is not None and problem.rule.on_failure == "raise":
            raise solution.error()
        return solution
    detached = [t.detach() for t in arguments.tensors]
    args, kwargs = arguments.rebuild(detached)
    if x is not None:
        detached.insert(0, x.detach())
        args = (detached[0], *args)
    watched = () if problem.g_is_pure and not kwargs else detached
    before = versions(watched)
    result = without_graph(problem.solver, *args, **kwargs)
    if watched and (after := versions(watched)) != before:
        changed = "x" if x is not None and after[0] != before[0] else "params"
        raise errors.solver_changed_input(problem.call, changed)
    fresh = isinstance(problem.solver, NumpySolver) or not isinstance(result, Tensor)
    held = getrefcount(result) > _REFERENCES
    like = next(filter(has_derivatives, detached), None) if x is None else x
    y = as_solution(problem.rule.call, result, like)
    if x is not None and x.shape != y.shape:
        _check_broadcast(problem, forward, y, x)
    del result
    # A buffer that g will write to again, a view of x, a weight: y must not change with them.
    return Found(y if fresh or (owns_its_memory(y) and not held) else y.clone())


def has_derivatives(t: Tensor) -> bool:
    """Whether a tensor is of a type that can carry a gradient."""
    return t.is_floating_point() or t.is_complex()


def _count_references() -> int:
    fresh = object()
    return getrefcount(fresh)


_REFERENCES = _count_references()  # of an object that only one local variable holds


def as_solution(call: str, result: Any, like: Tensor | None) -> Tensor:
    """What g returned as a tensor without a graph, of the dtype and device of `like`."""
    if not isinstance(result, Tensor):
        if not hasattr(result, "__array__"):
            raise errors.bad_solver_output(
                call,
                "a torch.Tensor (or a NumPy array)",
                errors.describe(result),
                "return one tensor of the shape, dtype and device of x; for NumPy code there is solvers.numpy_solver",
            )
        result = to_tensor(result, like, copy=True, call=call)
    y: Tensor = result if type(result) is Tensor and not result.requires_grad else result.detach()
    if y.is_inference() and not torch.is_inference_mode_enabled():
        y = y.clone()  # autograd cannot save what g made in its own inference mode
    model: Tensor = y if like is None else like
    if y.dtype != model.dtype or y.device != model.device or y.layout is not torch.strided:
        raise errors.bad_solver_output(
            call,
            f"dtype {model.dtype} on {model.device}, like x, and dense",
            errors.describe(y),
            f"convert the result in g: y.to(x), that is, to {model.dtype} on {model.device}",
        )
    return y


def _check_broadcast(problem: Problem, forward: Forward, y: Tensor, x: Tensor) -> None:
    """Accept a y larger than x only if f, given a y of the shape of x, broadcasts it to that size by its params."""
    k = problem.rule.event_dim
    extra = y.dim() - x.dim()
    fits = extra >= 0 and y.shape[y.dim() - k :] == x.shape[x.dim() - k :]
    fits = fits and all(n in (m, 1) for n, m in zip(x.shape, y.shape[extra:], strict=True))
    if fits and y.numel():
        small = y[(0,) * extra]
        for dim, n in enumerate(x.shape):
            small = small.narrow(dim, 0, n)
        args, kwargs = forward.arguments.rebuild(forward.arguments.tensors)
        z = problem.f(small.clone(), *args, **kwargs)
        fits = isinstance(z, Tensor) and z.shape == y.shape
    if not fits:
        if y.shape[y.dim() - k :] != x.shape[x.dim() - k :] and y.shape[: y.dim() - k] == x.shape[: x.dim() - k]:
            args, kwargs = forward.arguments.rebuild(forward.arguments.tensors)
            z = problem.f(y.clone(), *args, **kwargs)
            if isinstance(z, Tensor) and z.shape == x.shape:
                raise errors.not_square(problem.call, y.shape[y.dim() - k :], x.shape[x.dim() - k :])
        raise errors.bad_solver_output(
            problem.call,
            f"the shape of x, {tuple(x.shape)}, broadcast with the params as f broadcasts them",
            errors.describe(y),
            "let g return one y for each x; numpy.squeeze, atleast_1d and the like change shapes on the way",
        )


def _evaluate(
    forward: Forward, y: Tensor, x: Tensor | None, tested: bool
) -> tuple[Linearization | None, Tensor | None]:
    """f with its graph, if x, a param or a tensor that f closes over needs a gradient; and f(y), if it is needed."""
    if not torch.is_grad_enabled():
        return None, forward.value(y) if tested else None
    tensors = forward.arguments.tensors
    if not (x is not None and x.requires_grad) and not (tensors and any(t.requires_grad for t in tensors)):
        if not tested and forward.model.f_is_pure:
            return None, None
        z = forward(y, tensors)
        if not z.requires_grad:  # nor does anything that f closes over
            return None, z
    elif not tested and x is not None and (at := linearize_unevaluated(forward, y, x)):
        return at, None
    at = linearize(forward, y)
    return at, at.value


def _check(
    problem: Problem,
    forward: Forward,
    y: Tensor,
    x: Tensor | None,
    z: Tensor,
    at: Linearization | None,
    report: bool,
) -> tuple[Check, Tensor] | None:
    """The residual test: None if it is plain at first sight that every event passes."""
    if not report and x is not None:
        rtol = problem.tolerance.relative(y.dtype)
        if obviously_solved(x, z, rtol):
            return None
        with GradMode(False), without_autocast(y.device):
            if solved_but_for_rounding(y, x, z, rtol, problem.rule.event_dim, forward.value):
                return None

    @functools.cache
    def assembled() -> Assembled:
        return problem.rule.jacobian.assemble(linearize(forward, y) if at is None else at)

    with GradMode(False), without_autocast(y.device):
        return check_residual(y, x, z, problem.rule.event_dim, problem.tolerance, forward.value, assembled), z


def judge(
    problem: Problem,
    forward: Forward,
    solution: Found,
    x: Tensor | None,
    *,
    report: bool = False,
    refining: bool = True,
    at: Linearization | None = None,
) -> tuple[Tensor, Tensor | None, Check | None]:
    """y, refined, f(y) and the verdict where one is asked for; raise or warn as the policy says.

    `at` is f at what g returned, if that is known; perhaps without a graph.
    """
    found = solution.y
    y = refine(problem, forward, found, x) if problem.refine and refining else found
    at = at if y is found else None
    if not (report or problem.is_tested or solution.failed is not None):
        return y, None, None
    z = forward.value(y) if at is None else at.value
    at = at if at is not None and at.depends_on_y else None
    check = _check(problem, forward, y, x, z, at, report or solution.failed is not None)
    if check is None:
        return y, z, None
    verdict, value = check
    if solution.failed is not None:
        verdict = replace(verdict, failed=verdict.failed | solution.failed)
    if problem.rule.on_failure != "nan":
        error = solution.error or (lambda: _residual_error(problem, forward, verdict, found, y, x, value))
        handle_failure(problem.rule.on_failure, verdict.failed, problem.rule.event_dim, y, error)
    return y, z, verdict


def _residual_error(
    problem: Problem, forward: Forward, check: Check, found: Tensor, y: Tensor, x: Tensor | None, z: Tensor
) -> ResidualError:
    # A y on the wrong revolution is off by a whole period as g found it, and by anything once Newton has moved it.
    as_found = z if found is y else forward.value(found)
    return residual_error(problem.call, check, y, x, z, as_found, problem.rule.event_dim, problem.tolerance)


@torch.no_grad()
def refine(problem: Problem, forward: Forward, y: Tensor, x: Tensor | None) -> Tensor:
    """Polish y by Newton steps, each kept only in the events where it lowers the residual.

    A step on a y that is already as good as its rounding would make it worse: one float32 step on a correctly rounded y
    multiplies its error by four.
    """
    k = problem.rule.event_dim
    at = linearize(forward, y)
    for _ in range(problem.refine):
        difference = at.value if x is None else at.value - x
        before = event_norm(difference, k)
        with without_autocast(y.device):
            trial = y - problem.rule.jacobian.assemble(at).solve(difference)
        trial_value = forward.value(trial)
        better = event_norm(trial_value if x is None else trial_value - x, k) < before  # NaN is never better
        if not better.any():
            break
        y = torch.where(better.reshape(better.shape + (1,) * k), trial, y)
        at = linearize(forward, y)
    return y

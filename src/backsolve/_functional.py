"""One call under torch.func or forward-mode AD, where tensors are wrapped and their values cannot be looked at.

Everything that depends on values (g, the residual test, the test for a singular J, the probes) runs `concretely`, on
plain tensors. The implicit rule is `_Attached`, whose backward and jvp are made of differentiable torch operations at
the y that the caller holds, so the transforms compose to any order. A mapped dimension becomes one more batch dimension
on the left, and f becomes `torch.vmap(f)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._attach import Rule
from backsolve._closure import Capture, Reading
from backsolve._functorch import alive, apply_under_transforms, depth_of_transforms, is_differentiated
from backsolve._levels import Mapping, Outputs, concretely
from backsolve._linearize import Forward
from backsolve._mapped import Mapped
from backsolve._mapped_solver import solve_mapped
from backsolve._products import linearize_again, solve_by_products, spoiled
from backsolve._solution import Check, spoil
from backsolve._solve import Problem, judge
from backsolve._torch import GradMode, tangents_of_tangents, without_autocast
from backsolve.jacobians import Assembled, MatrixFreeAt
from backsolve.linalg.factored import primal
from backsolve.solvers.base import Found


class Functional:
    """f at one y, differentiated by torch.func: a `Linearized` whose every method composes with the transforms."""

    def __init__(self, forward: Mapped, y: Tensor, inputs: Sequence[Tensor], value: Tensor | None = None) -> None:
        self.forward = forward
        self.y = y
        self.inputs = inputs
        self.event_dim = forward.model.event_dim
        self.implicit = forward.implicit
        self.transformed = True
        self.known = self._known()
        self._value = value
        self._pull: Callable[[Tensor], tuple[Tensor]] | None = None

    def _known(self) -> Tensor | None:
        """The entries of J by the user's formula, if there is one."""
        if self.forward.model.jacobian.entries is None:
            return None
        return self.forward.with_entries(self.y, self.inputs)[1]

    @property
    def value(self) -> Tensor:
        """f(y)."""
        return self.forward(self.y, self.inputs).detach() if self._value is None else self._value

    def pull(self, v: Tensor) -> Tensor:
        """`J^T v`."""
        if self._pull is None:  # no cached_property: before Python 3.12 it has a lock, which cannot be compiled
            self._pull = _vjp(lambda y: self.forward(y, self.inputs), self.y)
        return self._pull(v.contiguous())[0]  # torch's forward formulas write into tangents, which may be expanded

    def pull_many(self, vs: Tensor) -> Tensor:
        """`J^T v` for a stack of cotangents."""
        if not vs.numel():
            return vs + self.pull(vs.sum(0))  # with a graph, if there is one

        def pull(v: Tensor) -> Tensor:  # vmap asks for the repr of what it maps, and that of a method is not traceable
            return self.pull(v)

        return torch.vmap(pull)(vs)

    def moved(self, y: Tensor) -> Functional:
        """f linearised at another y."""
        return Functional(self.forward, y, self.inputs)

    def pull_inputs(self, v: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """`f_p^T v` for the inputs that are wanted, None for the others."""
        if not any(wanted):
            return [None] * len(wanted)
        found = iter(self._by_inputs(wanted)(v))
        return [next(found) if w else None for w in wanted]

    def push_inputs(self, tangents: Sequence[Tensor | None]) -> Tensor | None:
        """`f_p t`, as the transpose of the linear map `v -> f_p^T v`; torch refuses a jvp inside forward-mode AD."""
        wanted = [t is not None for t in tangents]
        if not any(wanted):
            return None
        push = _vjp(self._by_inputs(wanted), torch.zeros_like(self.y))
        return push(tuple(t for t in tangents if t is not None))[0]

    def _by_inputs(self, wanted: Sequence[bool]) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def of_wanted(*chosen: Tensor) -> Tensor:
            replaced = iter(chosen)
            return self.forward(self.y, [next(replaced) if w else t for t, w in zip(self.inputs, wanted, strict=True)])

        return _vjp(of_wanted, *(t for t, w in zip(self.inputs, wanted, strict=True) if w))


def _vjp(function: Callable[..., Any], *at: Tensor) -> Callable[..., Any]:
    """The vector-Jacobian product of a function."""
    return torch.func.vjp(function, *at)[1]


def _examine(rule: Rule, forward: Mapped, y: Tensor, z: Tensor | None, inputs: Sequence[Tensor]) -> Tensor | None:
    """Verify the structure of J and that it is not singular; NaN for the events to spoil, None if there are none.

    Args:
        rule: how to solve with J.
        forward: f.
        y: where.
        z: what f(y) was in the call, if f could have changed since.
        inputs: those of f.
    """
    n = 1 if z is None else 2
    known = rule.jacobian.entries is not None
    # With known entries always: levels around a backward pass may have ended by now, and more of them may follow.
    twice = known or depth_of_transforms() > 1
    asked = [known and is_differentiated(t) for t in inputs]

    def run(plain: Sequence[Tensor], mapping: Mapping) -> Outputs:
        y = mapping.fill(plain[0], 0)
        inputs = [t.requires_grad_() if a else t for t, a in zip(plain[n:], asked, strict=True)]
        with without_autocast(y.device):
            values = [mapping.fill(t, k) for k, t in enumerate(plain[1:n], 1)]
            at = linearize_again(rule, forward.within(mapping[n:], inputs), y, values)
            assembled = rule.assemble(at, differentiated=twice).formed("the test for a singular J")
            failed = None if rule.on_failure == "ignore" else assembled.singular()
            if failed is None:
                return [None]
            good = torch.ones(failed.shape, dtype=y.dtype, device=y.device)
            return [rule.spoil_singular(assembled, good, 0)]

    return concretely(run, (y, *([] if z is None else [z]), *inputs))[0]


def _solve_with(rule: Rule, at: Functional, z: Tensor | None, b: Tensor, transposed: bool) -> Tensor:
    """`J^-1 b`, or `J^-T b`, as every level sees it, after a look at J; `z` is that of `_examine`."""
    assembled = rule.jacobian.assemble(at)
    if isinstance(assembled, MatrixFreeAt):
        return solve_by_products(rule, assembled, at.forward, z, b, transposed, _attach)
    factor = _examine(rule, at.forward, at.y, z, at.inputs)
    return spoiled(assembled.solve_transposed(b) if transposed else assembled.solve(b), factor, at.event_dim)


def vjp(
    rule: Rule,
    forward: Mapped,
    y: Tensor,
    z: Tensor | None,
    inputs: Sequence[Tensor],
    v: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """`w = J^-T v` and `-f_p^T w`, in operations that every transform can differentiate."""
    with without_autocast(y.device):
        at = Functional(forward, y, inputs)
        w = _solve_with(rule, at, z, v, transposed=True)
        return [w, *at.pull_inputs(-w, wanted)]


class _Attached(torch.autograd.Function):
    """The implicit rule as the transforms see it: y out; x and the inputs of f in."""

    @staticmethod
    def forward(  # z is f(y), if f could change
        rule: Rule, forward: Mapped, y: Tensor, z: Tensor | None, x: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rule, ctx.forward, _, z, x, *tensors = inputs
        ctx.has_x = x is not None
        ctx.set_materialize_grads(False)
        ctx.has_value = z is not None
        saved = (output, *([] if z is None else [z]), *tensors)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y, *inputs = map(alive, ctx.saved_tensors)
        z = inputs.pop(0) if ctx.has_value else None
        (v,) = grads
        if v is None:
            return (None,) * (5 + len(inputs))
        w, *others = vjp(ctx.rule, ctx.forward, y, z, inputs, v, ctx.needs_input_grad[5:])
        return None, None, None, None, w if ctx.has_x else None, *others

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        # torch switches forward mode off in here, and a nested jvp would silently be 0 (pytorch issue 197867)
        with tangents_of_tangents():
            y, *inputs = (primal(t) for t in ctx.saved_tensors)
            z = inputs.pop(0) if ctx.has_value else None
            t_x, *t_inputs = (None if t is None else primal(t) for t in tangents[4:])
            with without_autocast(y.device):
                at = Functional(ctx.forward, y, inputs)
                pushed = at.push_inputs(t_inputs)
                t_z = torch.zeros_like(y) if t_x is None else t_x
                t_z = t_z if pushed is None else t_z - pushed
                return _solve_with(ctx.rule, at, z, t_z, transposed=False)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        rule, forward, *tensors = args
        dims = in_dims[2:]
        y, z, x, *inputs = (t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True))
        if dims[0] is None:
            y = y.expand(info.batch_size, *y.shape)
        if x is not None:
            x = x.expand(y.shape)
        if z is not None:
            z = z.expand(y.shape)
        outer = Mapping((info.batch_size,), tuple((d is not None,) for d in dims[3:]))
        return apply_under_transforms(_Attached, rule, forward.within(outer, inputs), y, z, x, *inputs), 0


@dataclass(frozen=True)
class Solved:
    """What one call found."""

    y: Tensor
    value: Tensor | None  # f(y), if f could change
    check: Check | None
    rule: Rule
    forward: Mapped
    iterations: Tensor | None = None

    def made_of_jacobian(self, make: Callable[[Assembled], Tensor], event_groups: int) -> Tensor:
        """A function of J at y, differentiable in everything that y depends on; NaN where y is."""
        inputs = self.forward.arguments.tensors
        k = self.rule.event_dim * event_groups
        with without_autocast(self.y.device):
            assembled = self.rule.jacobian.assemble(Functional(self.forward, self.y, inputs))
            result = spoiled(make(assembled), _examine(self.rule, self.forward, self.y, self.value, inputs), k)
        if self.check is not None and self.rule.on_failure == "nan":
            result = spoil(self.check.failed, k, result)
        return result


def solve(
    problem: Problem,
    x: Tensor | None,
    arguments: Arguments,
    *,
    report: bool = False,
    solution: Found | None = None,
) -> Solved:
    """Solve `f(y, *params) = x` and attach the derivatives to y; the arguments are those of `_solve.solve`.

    The solution is what g returned, if that is known.
    """
    if solution is None:
        solution = solve_mapped(problem, x, arguments)
    found = solution.y
    if x is not None and x.shape != found.shape:
        x = x.expand(found.shape)
    inner = problem.bind(arguments, implicit=x is None)
    captures = _captures(inner, found)
    inputs = (*arguments.tensors, *(c.tensor for c in captures))
    forward = Mapped(inner, captures, Mapping(), inputs)
    y, z, check = _checked(problem, forward, solution, x, report)
    result = _attach(problem.rule, forward, y, z, x, *inputs)
    if check is not None and problem.rule.on_failure == "nan":
        result = spoil(check.failed, problem.rule.event_dim, result)
    return Solved(result, z, check, problem.rule, forward, solution.iterations)


def _attach(rule: Rule, forward: Mapped, y: Tensor, *tensors: Tensor | None) -> Tensor:
    """Apply the rule; inside the f of another Inverse as a torch function, so that it knows the result for its own."""
    if has_torch_function_unary(y):
        return handle_torch_function(_attach, (y,), rule, forward, y, *tensors)
    return apply_under_transforms(_Attached, rule, forward, y, *tensors)


def _captures(forward: Forward, y: Tensor) -> list[Capture]:
    """The tensors that f closes over. It sees views of y and the params, so that these are not mistaken for them."""
    if forward.model.closes_over_nothing:
        return []
    given = [t.view_as(t) for t in (y, *forward.arguments.tensors)]

    def read() -> tuple[Reading, Sequence[Tensor]]:
        with Reading(given) as reading, GradMode(True):
            return reading, forward.with_entries(given[0], given[1:])

    reading, values = read()
    if reading.hidden:
        raise errors.hidden_tensor(forward.model.call)
    captures = reading.captures((forward.model.f, forward.model.jacobian.entries))
    again = read()[0].read if captures else {}
    if any(id(v) not in reading.own for v in values) or any(id(c.read) not in again for c in captures):
        # Something else than a torch function made it, and nobody has seen from what.
        raise errors.unseen_code(forward.model.call)
    return captures


def _checked(
    problem: Problem, forward: Mapped, solution: Found, x: Tensor | None, report: bool
) -> tuple[Tensor, Tensor | None, Check | None]:
    """y with all mapped dimensions, refined; f(y), if f could change; and the verdict."""
    given = [t for t in (solution.y, x, solution.failed) if t is not None]
    n = len(given)

    def run(plain: Sequence[Tensor], mapping: Mapping) -> Outputs:
        filled = [mapping.fill(t, i) for i, t in enumerate(plain[:n])]
        found = Found(filled[0], None if solution.failed is None else filled[-1], None, solution.error)
        at = forward.within(mapping[n:], plain[n:])
        with without_autocast(found.y.device):
            y, z, check = judge(problem, at, found, None if x is None else filled[1], report=report)
            if problem.model.closes_over_nothing:
                z = None
            elif z is None:
                z = at.value(y)
        return [y, z, None, None] if check is None else [y, z, check.failed, check.residual]

    y, z, failed, residual = concretely(run, (*given, *forward.arguments.tensors))
    assert y is not None
    return y, z, None if failed is None or residual is None else Check(failed, residual)

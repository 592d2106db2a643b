"""One call under `torch.compile`, in operations that the compiler traces without a graph break.

g runs inside one custom operation. Outside of torch.func one derivative is all that torch takes of a compiled function;
there `_Implicit` is the rule. Under torch.func, vmap included, its backward would be dropped silently (pytorch #193279,
#192985), so that the derivatives come from k connected Newton steps,

    y <- y - (d - d.detach()),    d = J^-1 (f(y) - x),

that leave the bits of y alone: a step from a y whose derivatives are right to order m makes them right to order 2m + 1.

A J that is to be no matrix is solved with in an operation that has derivatives, and the steps are chord steps: see
`_Linear`. The residual is part of the graph. Where it is large, a second custom operation looks closer, and raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsolve._arguments import Arguments
from backsolve._functional import Functional
from backsolve._functorch import apply_at_one_level, at_outer_levels, depth_of_transforms
from backsolve._levels import Mapping
from backsolve._library import library
from backsolve._mapped import Mapped
from backsolve._operations import CONNECT, SOLVE_J, SOLVE_TRANSPOSED, excess_of, layout_of
from backsolve._solve import Problem
from backsolve._torch import active_transform, stored, tangents_of_tangents, without_autocast
from backsolve.jacobians import Assembled
from backsolve.linalg.factored import primal


class _Implicit(torch.autograd.Function):
    """The rule for a backward pass alone: y out, the gradient of `r = x - f(y)` is `w = J^-T v`.

    The params are saved as tensors are: what a compiled Function finds elsewhere is not tested for changes in place.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, r: Tensor, call: Call, value: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.value = call, value
        ctx.save_for_backward(y, *tensors)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (v,), (y, *tensors) = grads, ctx.saved_tensors
        call, no_more = ctx.call.of_tensors(tensors), [None] * len(tensors)
        if not call.is_formed(y):
            return None, call.solve(SOLVE_TRANSPOSED, v, y, ctx.value), None, None, *no_more
        y_later = y + (v - v)  # 0: or torch makes J in the forward pass, where it is not needed
        assembled = call.assemble(y_later, ctx.value)
        w = assembled.solve_transposed(v)
        if call.rule.on_failure != "ignore":
            call.spoil(w, assembled.suspicious(), y)
        return None, w, None, None, *no_more


class _Linear(torch.autograd.Function):
    """The derivatives of `solve_linear`, at one level of torch.func or in plain autograd: all but b are constants.

    As a kernel of an operation dynamo does not see it, and so cannot drop it.
    """

    @staticmethod
    def forward(ctx: Any, problem: tuple[Any, ...], kind: int, mapped: list[int], b: Tensor, *given: Tensor) -> Tensor:
        ctx.problem, ctx.kind, ctx.mapped = problem, kind, mapped
        ctx.save_for_backward(*given)
        ctx.save_for_forward(*given)
        with at_outer_levels():
            return _solve_linear(problem, kind, mapped, b, given)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kind = SOLVE_J if ctx.kind == SOLVE_TRANSPOSED else SOLVE_TRANSPOSED
        given = ctx.saved_tensors
        return None, None, None, _solve_linear(ctx.problem, kind, ctx.mapped, grads[0], given), *(None for _ in given)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        t = tangents[3]
        assert t is not None
        with tangents_of_tangents():
            given = [primal(t) for t in ctx.saved_tensors]
            kind = SOLVE_TRANSPOSED if ctx.kind == SOLVE_TRANSPOSED else SOLVE_J
            return _solve_linear(ctx.problem, kind, ctx.mapped, primal(t), given)


def _solve_linear(problem: tuple[Any, ...], kind: int, mapped: list[int], b: Tensor, given: Sequence[Tensor]) -> Tensor:
    y, value, *params = given
    return torch.ops.backsolve.solve_linear(*problem, kind, mapped, b, y, value, params)


def _differentiable(
    name: str, layout: str, has_x: bool, kind: int, mapped: list[int], b: Tensor, y: Tensor, value: Tensor,
    params: list[Tensor],
) -> Tensor:  # fmt: skip
    return apply_at_one_level(_Linear, (name, layout, has_x), kind, mapped, b, y, value, *params)


library.impl("backsolve::solve_linear", "Autograd", _differentiable)


@dataclass(frozen=True)
class Solved:
    """What one call found."""

    y: Tensor
    call: Call
    check: None = None

    def made_of_jacobian(self, make: Callable[[Assembled], Tensor], event_groups: int) -> Tensor:
        """A function of J at y, differentiable in everything that y depends on; NaN where J is singular or y is NaN."""
        assembled = self.call.assemble(self.y)
        return self.call.spoil_singular(assembled, self.y, make(assembled), self.call.rule.event_dim * event_groups)


def solve(problem: Problem, x: Tensor | None, arguments: Arguments) -> Solved:
    """Solve `f(y, *params) = x` and attach the derivatives to y.

    Args:
        problem: f, g and the options.
        x: a checked tensor; None for an implicit function, which has 0 in its place.
        arguments: the params.
    """
    call = Call(problem, x is not None, arguments)
    with torch.no_grad():
        y = call.run_solver(x)
    if x is not None and x.shape != y.shape:
        x = x.expand(y.shape)
    with without_autocast(y.device):
        with torch.no_grad():
            y = call.judged(y, x)
        return Solved(call.attached(y, x), call)


class Call:
    """One call as the custom operations see it: by name, layout and tensors."""

    def __init__(self, problem: Problem, has_x: bool, arguments: Arguments) -> None:
        self.arguments = arguments
        self.problem = problem
        self.rule = problem.rule
        self.has_x = has_x
        self.is_judged = problem.is_tested or problem.rule.verify
        self.depth = depth_of_transforms()
        self.tensors = arguments.tensors
        self.detached = [t.detach() for t in arguments.tensors]
        self.forward = Mapped(problem.bind(arguments, implicit=not has_x), (), Mapping(), arguments.tensors)
        self.layout = layout_of(*arguments.rebuild(arguments.tensors), problem.call)

    def of_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """The same call with other params."""
        return Call(self.problem, self.has_x, self.arguments.with_tensors(tensors))

    def run_solver(self, x: Tensor | None) -> Tensor:
        """What g returns; a function of torch itself is traced, for the compiler to fuse."""
        given = self.detached if x is None else [x.detach(), *self.detached]
        if x is not None and self.problem.g_is_pure and not self.problem.refine:
            return stored(self.problem.solver(*given).clone(memory_format=torch.contiguous_format))
        return torch.ops.backsolve.solve(self.problem.name, self.layout, self.has_x, [], given)

    def judged(self, y: Tensor, x: Tensor | None) -> Tensor:
        """y after the residual test, which the operation makes where the traced residual is large."""
        if self.depth and not self.is_judged:  # else it sees to it that no tangent is lost
            return y
        worst = torch.zeros((), device=y.device)
        if self.problem.is_tested and y.numel():
            z = self.forward(y, self.detached)
            worst = excess_of(self.problem, z, None if x is None else x.detach()).amax()
        given = self.detached if x is None else [x.detach(), *self.detached]
        torch.ops.backsolve.judge(y, self.problem.name, self.layout, self.has_x, not self.depth, [], worst, given)
        return y

    def attached(self, y: Tensor, x: Tensor | None) -> Tensor:
        """y with its derivatives, as many as can be asked for."""
        if not self.depth and not torch.is_grad_enabled():
            return y
        if not active_transform():
            z = self.forward(y, self.tensors)
            value = x if self.problem.is_tested else None
            r = -z if x is None else x - z
            if not r.requires_grad:
                return y
            own = [t.view_as(t) for t in self.tensors]  # a custom Function takes no tensor twice
            return _Implicit.apply(y, r, self, value if self.is_formed(y) else z.detach(), *own)
        if self.rule.jacobian.fills_when_traced or not self.is_formed(y):
            return self._connected(y, x)
        order = 0
        # a derivative for each level, and one for the backward pass of the compiled function
        while order <= self.depth:
            assembled = self.assemble(y)
            z = self.forward(y, self.tensors)
            r = self.spoil_singular(assembled, y, -z if x is None else x - z, self.rule.event_dim)
            d = assembled.solve(r)
            y = y + (d - d.detach())
            order = 2 * order + 1
        return y

    def assemble(self, y: Tensor, value: Tensor | None = None) -> Assembled:
        """J at y, where f has a value that need not be worked out if it is given."""
        return self.rule.jacobian.assemble(Functional(self.forward, y, self.tensors, value))

    def spoil_singular(self, assembled: Assembled, y: Tensor, result: Tensor, trailing_dims: int) -> Tensor:
        """NaN where J is singular: a compiled graph cannot raise in its backward pass."""
        if self.rule.on_failure == "ignore":
            return result
        with torch.no_grad():
            factor = y.detach().new_ones(y.shape[: y.dim() - self.rule.event_dim], dtype=y.real.dtype)
            self.spoil(factor, assembled.suspicious().detach(), y.detach())
        return result * factor.reshape(factor.shape + (1,) * trailing_dims)

    def spoil(self, result: Tensor, suspicious: Tensor, y: Tensor) -> None:
        """NaN in place for the events whose J is singular, to be looked for if there is a reason."""
        given = self.problem.name, self.layout, self.has_x, [], suspicious, y, self.detached
        torch.ops.backsolve.spoil_singular(result, *given)

    def is_formed(self, y: Tensor) -> bool:
        """Whether J is a matrix, or entries of one, in the graph."""
        return self.rule.jacobian.is_formed(y, self.rule.event_dim)

    def solve(self, kind: int, b: Tensor, y: Tensor, value: Tensor) -> Tensor:
        """`J^-1 b` or `J^-T b` where J is not in the graph; the operation raises, or warns, as the policy says."""
        given = self.problem.name, self.layout, self.has_x, kind, [], b, y, value, self.detached
        return torch.ops.backsolve.solve_linear(*given)

    def _connected(self, y: Tensor, x: Tensor | None) -> Tensor:
        """y by chord steps, whose J is that at the y of g, a constant: each makes one more derivative right."""
        with torch.no_grad():
            start, value = y.detach(), self.forward(y, self.detached).detach()
        for _ in range(self.depth + 1):  # as above
            z = self.forward(y, self.tensors)
            y = y + self.solve(CONNECT, -z if x is None else x - z, start, value)
        return y

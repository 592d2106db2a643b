"""One call under `torch.compile`, in operations that the compiler traces without a graph break.

g runs inside one custom operation. The derivatives come from k connected Newton steps,

    y <- y - (d - d.detach()),    d = J^-1 (f(y) - x),

that leave the bits of y alone: a step from a y whose derivatives are right to order m makes them right to order 2m + 1.
Outside of torch.func one derivative is all that torch takes of a compiled function; there J^-1 is a constant and
`_Straight` spares the forward pass the step. Under torch.func its backward would be dropped silently (pytorch #193279,
#192985).

The residual is part of the graph. Where it is large, a second custom operation looks closer, and raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsolve._arguments import Arguments
from backsolve._attach import Rule
from backsolve._functional import Functional, Mapped
from backsolve._levels import Mapping
from backsolve._operations import excess_of, layout_of
from backsolve._solve import Problem
from backsolve._torch import depth_of_transforms, is_torch_function, without_autocast
from backsolve.jacobians import Assembled


class _Straight(torch.autograd.Function):
    """y in the forward pass, -d in the backward pass; d itself is needed in neither."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, d: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, -grads[0]


@dataclass(frozen=True)
class Solved:
    """What one call found."""

    y: Tensor
    rule: Rule
    forward: Mapped
    check: None = None

    def made_of_jacobian(self, make: Callable[[Assembled], Tensor], event_groups: int) -> Tensor:
        """A function of J at y, differentiable in everything that y depends on; NaN where J is singular or y is NaN."""
        assembled = self.rule.jacobian.assemble(Functional(self.forward, self.y, self.forward.arguments.tensors))
        return _spoiled(self.rule, assembled, make(assembled), self.rule.event_dim * event_groups)


def solve(problem: Problem, x: Tensor | None, arguments: Arguments) -> Solved:
    """Solve `f(y, *params) = x` and attach the derivatives to y.

    Args:
        problem: f, g and the options.
        x: a checked tensor; None for an implicit function, which has 0 in its place.
        arguments: the params.
    """
    tensors = arguments.tensors
    forward = Mapped(problem.bind(arguments, implicit=x is None), (), Mapping(), tensors)
    given = [t.detach() for t in (tensors if x is None else (x, *tensors))]
    layout = layout_of(*arguments.rebuild(tensors), problem.call)
    with torch.no_grad():
        if is_torch_function(problem.solver) and x is not None and not problem.refine:
            y = problem.solver(*given)
        else:
            y = torch.ops.backsolve.solve(problem.name, layout, x is not None, [], given)
    if x is not None and x.shape != y.shape:
        x = x.expand(y.shape)
        given[0] = x.detach()
    with without_autocast(y.device):
        with torch.no_grad():
            z = forward(y, given[x is not None :])
            excess = excess_of(problem, z, None if x is None else given[0])
            worst = excess.amax() if y.numel() else y.new_zeros(())
            factor = torch.ops.backsolve.judge(problem.name, layout, x is not None, [], worst, [y, *given])
            y = y * factor.reshape(factor.shape + (1,) * problem.rule.event_dim if factor.dim() else ())
        result = _attach(problem.rule, forward, y, x)
    return Solved(result, problem.rule, forward)


def _attach(rule: Rule, forward: Mapped, y: Tensor, x: Tensor | None) -> Tensor:
    """y with its derivatives, as many as can be asked for."""
    tensors, depth = forward.arguments.tensors, depth_of_transforms()
    if not depth:
        z = forward(y, tensors)
        with torch.no_grad():
            assembled = rule.jacobian.assemble(Functional(forward, y, tensors))
        return _Straight.apply(y, _step(rule, assembled, z if x is None else z - x))
    order = 0
    while order <= depth:  # one level of torch.func each, and the backward pass of the compiled function
        z = forward(y, tensors)
        assembled = rule.jacobian.assemble(Functional(forward, y, tensors))
        d = _step(rule, assembled, z if x is None else z - x)
        y = y - (d - d.detach())
        order = 2 * order + 1
    return y


def _step(rule: Rule, assembled: Assembled, residual: Tensor) -> Tensor:
    return _spoiled(rule, assembled, assembled.solve(residual), rule.event_dim)


def _spoiled(rule: Rule, assembled: Assembled, result: Tensor, trailing_dims: int) -> Tensor:
    """NaN where J is singular: no value may be looked at here, so that it cannot raise."""
    if rule.on_failure == "ignore":
        return result
    factor = torch.where(assembled.singular_mask(), torch.nan, 1.0).to(result.dtype)
    return result * factor.reshape(factor.shape + (1,) * trailing_dims)

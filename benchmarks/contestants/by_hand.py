"""What one could write without a package: from everything known about f to nothing known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Function, Run


def closed_form(case: Case) -> Run | None:
    """g itself, where torch has it and its derivative."""
    return case.run(case.problem.closed_form) if case.problem.closed_form else None


def hand_written(case: Case) -> Run:
    """The limit: an autograd.Function with the derivatives of f worked out on paper."""
    f, g, hand = case.problem.f, case.g, case.problem.hand

    def solve_and_evaluate(x: Tensor, *params: Tensor) -> Tensor:
        y = g(x, *params)
        f(y, *params)  # by which the answer could be checked
        return y

    return case.run(solve_and_evaluate if case.task == "no gradient" else lambda *inputs: hand.apply(g, *inputs))


def composable(case: Case) -> Run | None:
    """The limit under torch.func: what an autograd.Function costs that has rules for vmap and forward mode."""
    function: Any = case.problem.composable
    return None if function is None else case.run(function.apply)


def floor(case: Case) -> Run:
    """The shortest code that sees f only through autograd; first derivatives only, and no check of anything."""
    function: Any = case.problem.floor or (_DenseFloor if case.problem.event_dim else _Floor)
    f, g = case.problem.f, case.g
    return case.run(lambda *inputs: function.apply(f, g, *inputs))


def solver_alone(case: Case) -> Run:
    """The real g, without any derivative: what comes on top of all the others where g answers from memory."""
    return replace(case, task="no gradient").run(case.problem.g)


def original(case: Case) -> Run:
    """A dense Jacobian by autograd.functional and its explicit inverse, for inputs of shape (b, n): x only."""
    f, g = case.problem.f, case.g

    def function(x: Tensor, *params: Tensor) -> Tensor:
        if x.dim() > 1:
            return _Original.apply(lambda y: f(y, *params), lambda x: g(x, *params), x)
        columns = [p[:, None] for p in params]
        return _Original.apply(lambda y: f(y, *columns), lambda x: g(x, *columns).view_as(x), x[:, None])[:, 0]

    return case.run(function)


class _Floor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Function, g: Function, x: Tensor, *params: Tensor) -> Tensor:
        y = g(x, *params)
        ctx.f = f
        ctx.save_for_backward(y, *params)
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        y, *params = ctx.saved_tensors
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            x = ctx.f(y, *params)
        (slope,) = torch.autograd.grad(x, y, torch.ones_like(x), retain_graph=bool(params))
        w = v / slope
        return None, None, w, *(torch.autograd.grad(x, params, -w) if params else ())


class _DenseFloor(torch.autograd.Function):
    forward = _Floor.forward

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        y, *params = ctx.saved_tensors
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            x = ctx.f(y, *params)
        n = y.shape[-1]
        units = torch.eye(n, dtype=y.dtype, device=y.device)[:, None].expand(n, *y.shape)
        (rows,) = torch.autograd.grad(x, y, units, retain_graph=True, is_grads_batched=True)
        w = torch.linalg.solve(rows.movedim(0, -1), v)  # rows[i] is e_i^T J: moved to the end, they form J^T
        return None, None, w, *torch.autograd.grad(x, params, -w)


class _Original(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Function, g: Function, x: Tensor) -> Tensor:
        y = g(x)
        summed = torch.autograd.functional.jacobian(lambda y: f(y).sum(0), y)  # (n, b, n): the rows are independent
        ctx.save_for_backward(summed.movedim(0, 1))
        return y

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        return None, None, torch.einsum("bi,bij->bj", v, torch.inverse(jacobian))

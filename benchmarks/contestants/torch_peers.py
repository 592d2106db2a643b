"""Other packages in torch, each with the options that serve it best; all get the same y as everybody else."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Function, Run

TIGHT = 1e-10  # for iterative linear solvers in float64; their defaults leave five digits


def torchopt(case: Case) -> Run:
    """TorchOpt's custom_root: with a division where J is diagonal, else its default, CG on the normal equations."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_normal_cg

    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")
    g = case.g
    solve = solve_normal_cg(rtol=TIGHT) if case.problem.event_dim else _divide
    count = len(case.inputs)

    @custom_root(_condition(case), argnums=tuple(range(1, count + 1)), solve=solve)
    def solver(start: Tensor, x: Tensor, *params: Tensor) -> Tensor:  # noqa: ARG001
        return g(x, *params)

    start = torch.zeros_like(case.y)
    return case.run(lambda *inputs: solver(start, *inputs))


def _divide(matvec: Function, b: Any) -> Any:
    (rhs,) = b
    return (rhs / matvec((torch.ones_like(rhs),))[0],)


def xitorch(case: Case) -> Run:
    """xitorch's rootfinder."""
    from xitorch.optimize import rootfinder

    condition, g = _condition(case), case.g
    options: dict[str, Any] = {"method": "bicgstab", "rtol": TIGHT} if case.problem.event_dim else {"method": _diagonal}

    def solver(fcn: Function, start: Tensor, params: tuple[Tensor, ...], **_: Any) -> Tensor:  # noqa: ARG001
        return g(*params)

    start = torch.zeros_like(case.y)
    return case.run(lambda *inputs: rootfinder(condition, start, inputs, bck_options=options, method=solver))


def _diagonal(a: Any, b: Tensor, *_: Any, **__: Any) -> Tensor:
    return b / a.mm(torch.ones_like(b))


def torchdeq(case: Case) -> Run | None:
    """torchdeq's implicit differentiation of the fixed point of `y - (f(y) - x)`, where that is a contraction."""
    if not case.problem.contracts:
        return None
    from torchdeq import get_deq

    f, g = case.problem.f, case.g
    tol = TIGHT if case.problem.dtype == torch.float64 else 1e-7
    deq = get_deq(ift=True, f_max_iter=1, b_max_iter=200, b_tol=tol, b_stop_mode="rel").train()

    def function(x: Tensor, *params: Tensor) -> Tensor:
        with torch.no_grad():
            y = g(x, *params)
        (row,), _ = deq(lambda row: row - (f(row.view_as(x), *params) - x).view_as(row), y if x.dim() > 1 else y[None])
        return row.view_as(x)

    return case.run(function)


def zuko(case: Case) -> Run | None:
    """zuko's bisection, for elementwise f: with no step to take between y and y it keeps y."""
    if case.problem.event_dim:
        return None
    from zuko.utils import bisection

    f, g = case.problem.f, case.g

    def function(x: Tensor, *params: Tensor) -> Tensor:
        with torch.no_grad():
            y = g(x, *params)
        return bisection(lambda y: f(y, *params), x, a=y, b=y, n=0, phi=params)

    return case.run(function)


def _condition(case: Case) -> Function:
    f = case.problem.f
    return lambda y, x, *params: f(y, *params) - x

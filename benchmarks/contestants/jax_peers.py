"""Packages in JAX: compiled as a whole before they are timed, mapped over what f does not mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.case import Case, Run

Solve = Callable[..., Any]  # y = solve(y, x, *params), for one event, where the first y is g's answer


def jaxopt(case: Case) -> Run | None:
    """jaxopt's custom_root: with a division where J is diagonal, else LU."""
    import jaxopt

    f, _ = case.problem.in_jax()
    solve = jaxopt.linear_solve.solve_lu if case.problem.event_dim else _divide

    @jaxopt.implicit_diff.custom_root(lambda y, x, *params: f(y, *params) - x, solve=solve)
    def solver(y: Any, x: Any, *params: Any) -> Any:  # noqa: ARG001
        return y

    return _run(case, solver)


def _divide(matvec: Callable[[Any], Any], b: Any) -> Any:
    return b / matvec(b * 0 + 1)


def optimistix(case: Case) -> Run | None:
    """optimistix's root_find, by Newton's method begun at the solution."""
    import optimistix

    f, _ = case.problem.in_jax()
    newton = optimistix.Newton(rtol=1e-4, atol=1e-4)  # satisfied with where it begins

    def solve(y: Any, x: Any, *params: Any) -> Any:
        condition = lambda y, args: f(y, *args[1:]) - args[0]  # noqa: E731
        return optimistix.root_find(condition, newton, y, (x, *params)).value

    return _run(case, solve)


def _run(case: Case, solve: Solve) -> Run | None:
    import jax

    if case.task not in _TASKS:
        return None
    jax.config.update("jax_enable_x64", True)
    y, v, *inputs = (jax.numpy.asarray(t.detach().numpy()) for t in (case.y, case.v, *case.inputs))
    u = [jax.numpy.asarray(t.numpy()) for t in case.u]
    _, g = case.problem.in_jax()
    params = None if case.problem.event_dim else 0  # an event's params are shared by the batch
    mapped = jax.vmap(solve, in_axes=(0, 0, *[params for _ in inputs[1:]]))
    for _ in range(case.y.dim() - case.problem.event_dim - 1):
        mapped = jax.vmap(mapped)

    def function(y: Any, *inputs: Any) -> Any:
        return mapped(y if g is None else jax.lax.stop_gradient(g(*inputs)), *inputs)

    compiled = jax.jit(partial(_TASKS[case.task], function))
    return lambda: jax.block_until_ready(compiled(y, inputs, v, u))


def _gradients(function: Solve, y: Any, inputs: Sequence[Any], v: Any, _u: Any) -> Any:
    import jax

    return jax.vjp(partial(function, y), *inputs)[1](v)


def _hessian_vector(function: Solve, y: Any, inputs: Sequence[Any], v: Any, u: Any) -> Any:
    import jax

    def loss(*inputs: Any) -> Any:
        return ((v * function(y, *inputs)) ** 2).sum() / 2

    return jax.vjp(jax.grad(loss, argnums=tuple(range(len(inputs)))), *inputs)[1](tuple(u))


def _value(function: Solve, y: Any, inputs: Sequence[Any], _v: Any, _u: Any) -> Any:
    return [function(y, *inputs)]


_TASKS = {
    "gradients": _gradients,
    "Hessian-vector product": _hessian_vector,
    "call only": _value,
    "no gradient": _value,
}

"""The custom operations of a compiled call, into which nothing is traced: g, and closer looks at residuals and J.

They take tensors and constants only: a problem by the name under which it is registered, the params by their tensors
and a `layout` that says what is around these. Under `vmap` they get the mapped dimensions on the left of the tensors,
and `mapped` says, tensor by tensor and level by level, which tensors have them.
"""

# ruff: noqa: ARG001 (one schema for an operation and for its rules)

from __future__ import annotations

import ast
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._functional import Mapped
from backsolve._levels import Mapping
from backsolve._linearize import linearize
from backsolve._mapped_solver import MappedCall
from backsolve._solve import Problem, judge, refine
from backsolve._torch import eagerly, in_forward_mode, without_autocast
from backsolve.solvers.base import Found


def layout_of(args: tuple[Any, ...], kwargs: dict[str, Any], call: str) -> str:
    """The arguments as a literal, with the positions of tensors in the place of tensors."""
    positions = itertools.count()

    def describe(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"('tensor', {next(positions)})"
        if type(value) in (tuple, list):
            return f"('{type(value).__name__}', [{', '.join([describe(v) for v in value])}])"
        if type(value) is dict:
            return f"('dict', {{{', '.join([f'{k!r}: {describe(v)}' for k, v in value.items()])}}})"
        if value is None or type(value) in (bool, int, float, str):
            return f"('constant', {value!r})"
        raise errors.uncompiled_argument(call, value)

    return describe((args, kwargs))


def _arguments(layout: str, tensors: Sequence[Tensor]) -> Arguments:
    """The arguments again, with tensors in their positions."""

    def restore(node: tuple[str, Any]) -> Any:
        kind, value = node
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {k: restore(v) for k, v in value.items()}
        if kind == "constant":
            return value
        items = [restore(v) for v in value]
        return tuple(items) if kind == "tuple" else items

    return Arguments(*restore(ast.literal_eval(layout)))


def _mapping(mapped: Sequence[int], tensors: Sequence[Tensor]) -> Mapping:
    """The flags, level by level for one tensor after the other, as a `Mapping`."""
    levels = len(mapped) // max(1, len(tensors))
    rows = [tuple(bool(m) for m in mapped[i * levels : (i + 1) * levels]) for i in range(len(tensors))]
    sizes = (next(t.shape[sum(r[:n])] for t, r in zip(tensors, rows, strict=True) if r[n]) for n in range(levels))
    return Mapping(tuple(sizes), tuple(rows))


def _one_more(mapped: Sequence[int], dims: Sequence[int | None]) -> list[int]:
    """The flags with one more level on the outside."""
    levels = len(mapped) // max(1, len(dims))
    flags: list[int] = []
    for i, dim in enumerate(dims):
        flags += [int(dim is not None), *mapped[i * levels : (i + 1) * levels]]
    return flags


def _to_front(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    return [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]


# ---- g --------------------------------------------------------------------------------------------------------------

SOLVE = "(str name, str layout, bool has_x, int[] mapped, Tensor[] tensors) -> Tensor"


@torch.library.custom_op("backsolve::solve", mutates_args=(), schema=SOLVE)
def solve_op(name: str, layout: str, has_x: bool, mapped: list[int], tensors: list[Tensor]) -> Tensor:
    """y from x, if there is one, and the tensors of the params."""
    problem = Problem.named(name)
    x, params = (tensors[0], tensors[1:]) if has_x else (None, tensors)
    arguments, mapping = _arguments(layout, params), _mapping(mapped, tensors)
    with eagerly():
        found = MappedCall(problem, arguments, has_x, ()).solve(tensors, (), mapping)
        y = found.y
        if problem.refine:
            forward = Mapped(problem.bind(arguments, implicit=not has_x), (), mapping[has_x:], params)
            y = refine(problem, forward, y, None if x is None else mapping.fill(x, 0).expand(y.shape))
    expected = _shape_of_y(problem, arguments, mapping, tensors, has_x)
    if y.shape != expected:
        raise errors.unforeseen_shape(problem.call, expected, y.shape)
    return y.contiguous()


@solve_op.register_fake
def _(name: str, layout: str, has_x: bool, mapped: list[int], tensors: list[Tensor]) -> Tensor:
    problem = Problem.named(name)
    arguments = _arguments(layout, tensors[has_x:])
    return tensors[0].new_empty(_shape_of_y(problem, arguments, _mapping(mapped, tensors), tensors, has_x))


def _shape_of_y(
    problem: Problem, arguments: Arguments, mapping: Mapping, tensors: Sequence[Tensor], has_x: bool
) -> torch.Size:
    """The shape that broadcasting x with those params gives whose event dimensions are known."""
    k = problem.rule.event_dim
    dims = [k] * has_x + arguments.event_dims(problem.param_event_dims, None if k else 0)
    inside = [t.shape[sum(m) :] for t, m in zip(tensors, mapping.mapped or ((),) * len(tensors), strict=True)]
    batch = torch.broadcast_shapes(*(s[: len(s) - d] for s, d in zip(inside, dims, strict=True) if d is not None))
    return torch.Size((*mapping.sizes, *batch, *(inside[0][len(inside[0]) - k :] if has_x else ())))


@solve_op.register_vmap
def _(info: Any, in_dims: Any, name: str, layout: str, has_x: bool, mapped: list[int], tensors: list[Tensor]) -> Any:
    dims = in_dims[4]
    moved = _to_front(tensors, dims)
    return torch.ops.backsolve.solve(name, layout, has_x, _one_more(mapped, dims), moved), 0


# ---- the residual ---------------------------------------------------------------------------------------------------

JUDGE = (
    "(str name, str layout, bool has_x, bool backward_only, int[] mapped, Tensor excess, Tensor[] tensors) -> Tensor"
)


@torch.library.custom_op("backsolve::judge", mutates_args=(), schema=JUDGE)
def judge_op(
    name: str, layout: str, has_x: bool, backward_only: bool, mapped: list[int], excess: Tensor, tensors: list[Tensor]
) -> Tensor:
    """What y is to be multiplied by: 1, or NaN for failed events with `on_failure="nan"`.

    Args:
        name: that of the problem.
        layout: of the params.
        has_x: whether there is an x.
        backward_only: whether the graph was traced for a backward pass alone, and would lose a tangent.
        mapped: which of the tensors are mapped.
        excess: how much the residual of the traced f exceeds the tolerance at most; the closer look happens if it does.
        tensors: y, x if there is one, and the tensors of the params.
    """
    problem, n, mapping = Problem.named(name), 1 + has_x, _mapping(mapped, tensors)
    if backward_only and in_forward_mode():
        raise errors.compiled_without_tangents(problem.call)
    y = mapping.fill(tensors[0], 0)
    x = mapping.fill(tensors[1], 1) if has_x else None
    inner = problem.bind(_arguments(layout, tensors[n:]), implicit=not has_x)
    with eagerly():
        return _factor(problem, Mapped(inner, (), mapping[n:], tensors[n:]), y, x, excess)


def _factor(problem: Problem, forward: Mapped, y: Tensor, x: Tensor | None, excess: Tensor) -> Tensor:
    rule, good = problem.rule, y.new_ones(_shape_of_factor(problem, y))
    rule.verify_if_due(y, forward)
    if not problem.is_tested or bool((excess <= 0).all()):
        return good
    _, check = judge(problem, forward, Found(y), x, refining=False)
    if check is not None and check.failed.any():
        return torch.where(check.failed, torch.nan, good) if rule.on_failure == "nan" else good
    z = forward.value(y)
    rounding = problem.tolerance.relative(y.dtype) * (z.abs().amax() + y.abs().amax()).item()
    if not torch.isclose(excess_of(problem, z, x).amax(), excess.amax(), atol=rounding, equal_nan=True):
        raise errors.other_closure(problem.call)
    return good


@judge_op.register_fake
def _(
    name: str, layout: str, has_x: bool, backward_only: bool, mapped: list[int], excess: Tensor, tensors: list[Tensor]
) -> Tensor:
    mapping = _mapping(mapped, tensors)
    return tensors[0].new_empty(_shape_of_factor(Problem.named(name), mapping.fill(tensors[0], 0)))


@judge_op.register_vmap
def _(
    info: Any,
    in_dims: Any,
    name: str,
    layout: str,
    has_x: bool,
    backward_only: bool,
    mapped: list[int],
    excess: Tensor,
    tensors: list[Tensor],
) -> Any:
    dims = in_dims[6]
    moved = _to_front(tensors, dims)
    factor = torch.ops.backsolve.judge(name, layout, has_x, backward_only, _one_more(mapped, dims), excess, moved)
    return factor, 0 if Problem.named(name).rule.on_failure == "nan" else None


def _shape_of_factor(problem: Problem, y: Tensor) -> torch.Size:
    """One factor an event if failed ones are to be spoiled, else one for all."""
    return y.shape[: y.dim() - problem.rule.event_dim] if problem.rule.on_failure == "nan" else torch.Size()


def excess_of(problem: Problem, z: Tensor, x: Tensor | None) -> Tensor:
    """By how much the residual exceeds the tolerance of the free test; not positive where `z = f(y)` passes."""
    return z.abs() if x is None else (z - x).abs() - problem.tolerance.relative(z.dtype) * x.abs()


# ---- a singular J ---------------------------------------------------------------------------------------------------

SINGULAR = "(str name, str layout, bool has_x, int[] mapped, Tensor suspicious, Tensor[] tensors) -> Tensor"


@torch.library.custom_op("backsolve::singular", mutates_args=(), schema=SINGULAR)
def singular_op(
    name: str, layout: str, has_x: bool, mapped: list[int], suspicious: Tensor, tensors: list[Tensor]
) -> Tensor:
    """Which events have no usable derivative, looked at if any is suspicious; the tensors are y and the params'."""
    problem, mapping = Problem.named(name), _mapping(mapped, tensors)
    y = mapping.fill(tensors[0], 0)
    none = torch.zeros(y.shape[: y.dim() - problem.rule.event_dim], dtype=torch.bool, device=y.device)
    if not suspicious.any():
        return none
    inner = problem.bind(_arguments(layout, tensors[1:]), implicit=not has_x)
    with eagerly(), without_autocast(y.device):
        at = linearize(Mapped(inner, (), mapping[1:], tensors[1:]), y)
        found = problem.rule.jacobian.assemble(at).formed("torch.compile").singular()
    return none if found is None else found


@singular_op.register_fake
def _(name: str, layout: str, has_x: bool, mapped: list[int], suspicious: Tensor, tensors: list[Tensor]) -> Tensor:
    y, k = _mapping(mapped, tensors).fill(tensors[0], 0), Problem.named(name).rule.event_dim
    return y.new_empty(y.shape[: y.dim() - k], dtype=torch.bool)


@singular_op.register_vmap
def _(
    info: Any,
    in_dims: Any,
    name: str,
    layout: str,
    has_x: bool,
    mapped: list[int],
    suspicious: Tensor,
    tensors: list[Tensor],
) -> Any:
    dims = in_dims[5]
    moved = _to_front(tensors, dims)
    return torch.ops.backsolve.singular(name, layout, has_x, _one_more(mapped, dims), suspicious, moved), 0

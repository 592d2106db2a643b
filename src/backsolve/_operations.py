"""The custom operations of a compiled call, into which nothing is traced: g, and closer looks at residuals and J.

They take tensors and constants only: a problem by the name under which it is registered, the params by their tensors
and a `layout` that says what is around these. Under `vmap` they get the mapped dimensions on the left of the tensors,
and `mapped` says, tensor by tensor and level by level, which tensors have them.
"""

# ruff: noqa: ARG001 (one schema for an operation and for its rules)

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._levels import Mapping
from backsolve._library import library, operation
from backsolve._linearize import check_value, linearize
from backsolve._mapped import Mapped
from backsolve._mapped_solver import MappedCall
from backsolve._solution import spoil
from backsolve._solve import Problem, judge, refine
from backsolve._torch import GradMode, eagerly, in_forward_mode, without_autocast
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


_read_layout = functools.lru_cache(ast.literal_eval)


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

    return Arguments(*restore(_read_layout(layout)))


def _mapping(mapped: Sequence[int], tensors: Sequence[Tensor]) -> Mapping:
    """The flags, level by level for one tensor after the other, as a `Mapping`."""
    levels = len(mapped) // max(1, len(tensors))
    rows = [tuple(bool(m) for m in mapped[i * levels : (i + 1) * levels]) for i in range(len(tensors))]
    sizes = (next(t.shape[sum(r[:n])] for t, r in zip(tensors, rows, strict=True) if r[n]) for n in range(levels))
    return Mapping(tuple(sizes), tuple(rows))


def _moved(
    tensors: Sequence[Tensor], dims: Sequence[int | None], mapped: Sequence[int]
) -> tuple[list[Tensor], list[int]]:
    """What every vmap rule does: the mapped dimension to the front, and one more level on the outside of the flags."""
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    levels = len(mapped) // max(1, len(dims))
    rows = ([int(d is not None), *mapped[i * levels : (i + 1) * levels]] for i, d in enumerate(dims))
    return moved, list(itertools.chain.from_iterable(rows))


def _forward(problem: Problem, layout: str, has_x: bool, mapping: Mapping, params: Sequence[Tensor]) -> Mapped:
    """f, with those params."""
    return Mapped(problem.bind(_arguments(layout, params), implicit=not has_x), (), mapping, params)


# ---- g --------------------------------------------------------------------------------------------------------------

SOLVE = "(str name, str layout, bool has_x, int[] mapped, Tensor[] tensors) -> Tensor"


@operation("solve", SOLVE)
def solve_op(name: str, layout: str, has_x: bool, mapped: list[int], tensors: list[Tensor]) -> Tensor:
    """y from x, if there is one, and the tensors of the params."""
    problem = Problem.named(name)
    x, params = (tensors[0], tensors[1:]) if has_x else (None, tensors)
    arguments, mapping = _arguments(layout, params), _mapping(mapped, tensors)
    with eagerly():
        found = MappedCall(problem, arguments, has_x, ()).solve(tensors, (), mapping)
        y = found.y
        if problem.refine:
            forward = _forward(problem, layout, has_x, mapping[has_x:], params)
            y = refine(problem, forward, y, None if x is None else mapping.fill(x, 0).expand(y.shape))
    expected = _shape_of_y(problem, arguments, mapping, tensors, has_x)
    if y.shape != expected:
        raise errors.unforeseen_shape(problem.call, expected, y.shape)
    return y.contiguous()


@library.register_fake("backsolve::solve")
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


@library.register_vmap("backsolve::solve")
def _(info: Any, in_dims: Any, name: str, layout: str, has_x: bool, mapped: list[int], tensors: list[Tensor]) -> Any:
    moved, mapped = _moved(tensors, in_dims[4], mapped)
    return torch.ops.backsolve.solve(name, layout, has_x, mapped, moved), 0


# ---- the residual ---------------------------------------------------------------------------------------------------

JUDGE = (
    "(Tensor(a!) y, str name, str layout, bool has_x, bool backward_only, int[] mapped, Tensor excess, "
    "Tensor[] given) -> ()"
)


@operation("judge", JUDGE)
def judge_op(
    y: Tensor, name: str, layout: str, has_x: bool, backward_only: bool, mapped: list[int], excess: Tensor,
    given: list[Tensor],
) -> None:  # fmt: skip
    """Judge y: raise, warn, or turn its failed events to NaN in place.

    That y is changed, though rarely, is what keeps the operation in the graph: it has no result that costs a pass over
    memory to use.

    Args:
        y: with all mapped dimensions on the left.
        name: that of the problem.
        layout: of the params.
        has_x: whether there is an x.
        backward_only: whether the graph was traced for a backward pass alone, and would lose a tangent.
        mapped: which of the given tensors are mapped.
        excess: how much the residual of the traced f exceeds the tolerance at most; the closer look happens if it does.
        given: x if there is one, and the tensors of the params.
    """
    problem, mapping = Problem.named(name), _mapping(mapped, [y, *given])
    if backward_only and in_forward_mode():
        raise errors.compiled_without_tangents(problem.call)
    x = mapping.fill(given[0], 1) if has_x else None
    forward = _forward(problem, layout, has_x, mapping[1 + has_x :], given[has_x:])
    with eagerly():
        problem.rule.verify_if_due(y, forward)
        if problem.is_tested and not bool((excess <= 0).all()):  # NaN compares false
            _judge_closely(problem, forward, y, x, excess)


def _judge_closely(problem: Problem, forward: Mapped, y: Tensor, x: Tensor | None, excess: Tensor) -> None:
    _, z, check = judge(problem, forward, Found(y), x, refining=False)
    if check is not None and check.failed.any():
        if problem.rule.on_failure == "nan":
            y.copy_(spoil(check.failed, problem.rule.event_dim, y))
        return
    assert z is not None
    rounding = problem.tolerance.relative(y.dtype) * (z.abs().amax() + y.abs().amax()).item()
    if not torch.isclose(excess_of(problem, z, x).amax(), excess.amax(), atol=rounding, equal_nan=True):
        raise errors.other_closure(problem.call)


@library.register_vmap("backsolve::judge")
def _(
    info: Any, in_dims: Any, y: Tensor, name: str, layout: str, has_x: bool, backward_only: bool, mapped: list[int],
    excess: Tensor, given: list[Tensor],
) -> Any:  # fmt: skip
    (y, *moved), mapped = _moved([y, *given], [in_dims[0], *in_dims[7]], mapped)
    torch.ops.backsolve.judge(y, name, layout, has_x, backward_only, mapped, excess, moved)
    return None, None


def excess_of(problem: Problem, z: Tensor, x: Tensor | None) -> Tensor:
    """By how much the residual exceeds the tolerance of the free test; not positive where `z = f(y)` passes."""
    return z.abs() if x is None else (z - x).abs() - problem.tolerance.relative(z.dtype) * x.abs()


# ---- a singular J ---------------------------------------------------------------------------------------------------

SPOIL = (
    "(Tensor(a!) result, str name, str layout, bool has_x, int[] mapped, Tensor suspicious, Tensor y, "
    "Tensor[] params) -> ()"
)


@operation("spoil_singular", SPOIL)
def spoil_singular_op(
    result: Tensor, name: str, layout: str, has_x: bool, mapped: list[int], suspicious: Tensor, y: Tensor,
    params: list[Tensor],
) -> None:  # fmt: skip
    """Turn the events of a result to NaN in place whose J is singular; a closer look, for which there must be a reason.

    Args:
        result: of the shape of y, or of its batch.
        name: that of the problem.
        layout: of the params.
        has_x: whether there is an x.
        mapped: which of result, y and params are mapped.
        suspicious: whether there is a reason.
        y: where J is.
        params: their tensors.
    """
    if not suspicious.any():
        return
    problem, mapping = Problem.named(name), _mapping(mapped, [result, y, *params])
    with eagerly(), without_autocast(y.device):
        at = linearize(_forward(problem, layout, has_x, mapping[2:], params), mapping.fill(y, 1))
        failed = problem.rule.jacobian.assemble(at).formed("torch.compile").singular()
        if failed is not None:
            result.copy_(spoil(failed, result.dim() - failed.dim(), result))


@library.register_vmap("backsolve::spoil_singular")
def _(
    info: Any, in_dims: Any, result: Tensor, name: str, layout: str, has_x: bool, mapped: list[int],
    suspicious: Tensor, y: Tensor, params: list[Tensor],
) -> Any:  # fmt: skip
    (result, y, *params), mapped = _moved([result, y, *params], [in_dims[0], in_dims[6], *in_dims[7]], mapped)
    torch.ops.backsolve.spoil_singular(result, name, layout, has_x, mapped, suspicious, y, params)
    return None, None


# ---- a solve with J -------------------------------------------------------------------------------------------------

CONNECT, SOLVE_J, SOLVE_TRANSPOSED = 0, 1, 2

SOLVE_LINEAR = (
    "(str name, str layout, bool has_x, int kind, int[] mapped, Tensor b, Tensor y, Tensor value, Tensor[] params) "
    "-> Tensor"
)


@operation("solve_linear", SOLVE_LINEAR)
def solve_linear_op(
    name: str, layout: str, has_x: bool, kind: int, mapped: list[int], b: Tensor, y: Tensor, value: Tensor,
    params: list[Tensor],
) -> Tensor:  # fmt: skip
    """`J^-1 b`, or `J^-T b`, as eager code has it, for a J that is not in the graph; `_compiled` has the derivatives.

    Args:
        name: that of the problem.
        layout: of the params.
        has_x: whether there is an x.
        kind: SOLVE_J, SOLVE_TRANSPOSED, or CONNECT for 0 with the derivatives of `J^-1 b`.
        mapped: which of b, y, value and params are mapped; b always is.
        b: the right-hand side.
        y: where J is.
        value: f(y) in the call; f must not have changed since.
        params: their tensors.
    """
    if kind == CONNECT:
        return torch.zeros_like(b, memory_format=torch.contiguous_format)
    problem, mapping = Problem.named(name), _mapping(mapped, [b, y, value, *params])
    rule = problem.rule
    b, y, value = (mapping.fill(t, i) for i, t in enumerate((b, y, value)))
    with eagerly(), GradMode(False), without_autocast(y.device):
        at = linearize(_forward(problem, layout, has_x, mapping[3:], params), y)
        check_value(at, torch.where(y.isnan(), at.value, value))
        assembled = rule.jacobian.assemble(at)
        u = assembled.solve_transposed(b) if kind == SOLVE_TRANSPOSED else assembled.solve(b)
        u = rule.spoil_singular(assembled, u, rule.event_dim)
        return u.clone(memory_format=torch.contiguous_format)  # it may be b itself, where J is the identity


@library.register_fake("backsolve::solve_linear")
def _(
    name: str, layout: str, has_x: bool, kind: int, mapped: list[int], b: Tensor, y: Tensor, value: Tensor,
    params: list[Tensor],
) -> Tensor:  # fmt: skip
    return b.new_empty(b.shape)


@library.register_vmap("backsolve::solve_linear")
def _(
    info: Any, in_dims: Any, name: str, layout: str, has_x: bool, kind: int, mapped: list[int], b: Tensor, y: Tensor,
    value: Tensor, params: list[Tensor],
) -> Any:  # fmt: skip
    b_dim = in_dims[5]
    if b_dim is None:  # the gradient of a b that is not mapped is a sum, which belongs to `expand`
        b, b_dim = b.expand(info.batch_size, *b.shape), 0
    (b, y, value, *params), mapped = _moved([b, y, value, *params], [b_dim, *in_dims[6:8], *in_dims[8]], mapped)
    return torch.ops.backsolve.solve_linear(name, layout, has_x, kind, mapped, b, y, value, params), 0

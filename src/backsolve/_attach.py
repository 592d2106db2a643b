"""The implicit rule: given y with `f(y, p) = x`, attach the derivatives that y has as a function of x and p.

By the inverse function theorem `J dy = dx - f_p dp` with `J = df/dy` at y. Read backwards, for a cotangent v of y:

    w = J^-T v,    gradient of x = w,    gradient of p = -f_p^T w.

Everything is evaluated at the y that the caller holds, which is itself a function of x and p; so this rule,
differentiated as it stands, gives every higher derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._functorch import for_each_batched_grad, is_grads_batched
from backsolve._linearize import Forward, Linearization, Model, gradients, linearize, relinearize
from backsolve._random import gaussian_like
from backsolve._solution import OnFailure, event_norm, first_index, handle_failure
from backsolve._torch import (
    GradMode,
    beside_leaf,
    eager_apply,
    gradient_edge,
    graph_is_kept,
    outside_autocast,
    wanted_gradients,
    without_autocast,
)
from backsolve.jacobians import (
    Assembled,
    Jacobian,
    MatrixFreeAt,
    find_coupling,
    find_false_curvature,
    find_false_derivative,
    find_lost_input,
    find_wrong_entries,
)

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Rule:
    """How J is represented, and what happens where it cannot be trusted."""

    jacobian: Jacobian
    event_dim: int
    on_failure: OnFailure
    verify: bool
    call: str
    verified: dict[Any, int] = field(default_factory=dict, compare=False)
    unit_dims: int = field(init=False)
    """How many rightmost dimensions form a unit that no other unit may influence."""

    def __post_init__(self) -> None:
        dims = self.event_dim if self.jacobian.unit_dims is None else self.jacobian.unit_dims
        object.__setattr__(self, "unit_dims", dims)

    def assemble(self, at: Linearization, *, differentiated: bool) -> Assembled:
        """Assemble J, and verify its structure where that is due; and its derivative, if that may be asked for."""
        assembled = self.jacobian.assemble(at)
        self.examine(at, assembled, differentiated=differentiated)
        return assembled

    def examine(self, at: Linearization, assembled: Assembled, *, differentiated: bool) -> None:
        """Verify the structure of an assembled J where that is due; and its derivative, if that may be asked for."""
        due = self.verify and self._is_due(at.y, at.forward, differentiated)
        if due or at.y.is_complex():
            self._examine(at, assembled, due, differentiated)

    def verify_if_due(self, y: Tensor, forward: Forward) -> None:
        """Verify the structure of J, where nothing else needs J to be assembled."""
        due = self.verify and self._is_due(y, forward)
        if due or y.is_complex():
            at = linearize(forward, y)
            self._examine(at, self.jacobian.assemble(at), due, False)

    def _examine(self, at: Linearization, assembled: Assembled, due: bool, differentiated: bool) -> None:
        if at.y.is_complex():
            self._check_holomorphic(at)
        if due:
            self._verify(at, assembled)
        if due and differentiated:
            self._check_curvature(at)

    def _is_due(self, y: Tensor, forward: Forward, differentiated: bool = False) -> bool:
        """Whether to probe: the first time for an event shape, dtype, device and pattern of batch dimensions of size 1.

        Then at the 2nd, 4th, 8th, ... and each 64th time: a coupling may be invisible at first, with weights that start
        at zero, or appear in training. One element alone has nothing to be coupled with, and torch's own functions
        hide nothing from autograd.
        """
        if y.numel() == 1 and forward.model.closes_over_nothing:
            return False
        shape = tuple(y.shape)
        units = len(shape) - self.unit_dims
        key = (shape[units:], tuple(map((1).__lt__, shape[:units])), y.dtype, y.device, differentiated)
        times = self.verified[key] = self.verified.get(key, 0) + 1
        return not times & (times - 1) or not times % 64

    def spoil_singular(self, assembled: Assembled, result: Tensor, event_dim: int) -> Tensor:
        """Apply the failure policy to the events whose J has no inverse."""
        if self.on_failure == "ignore":
            return result
        failed = assembled.singular()
        if failed is None:
            return result
        return handle_failure(self.on_failure, failed, event_dim, result, lambda: self._singular(failed, assembled))

    def _singular(self, failed: Tensor, assembled: Assembled) -> errors.BacksolveError:
        if isinstance(assembled, MatrixFreeAt) and assembled.unsolved is not None:
            return assembled.unsolved[1]
        first = first_index(failed)
        noun = "event" if self.event_dim else "element"
        numbers = assembled.numbers(first)
        return errors.singular(self.call, noun, int(failed.sum()), failed.numel(), first, numbers)

    @torch.no_grad()
    def _check_holomorphic(self, at: Linearization) -> None:
        """Refuse an f whose real derivative is not complex linear: then `J^H (i u) = i J^H u` fails."""
        if at.known is not None:
            at = linearize(at.forward, at.y, to_y=True)
            if not at.depends_on_y:
                return
        u = gaussian_like(at.y)
        one, other = 1j * at.pull(u), at.pull(1j * u)
        size = torch.maximum(event_norm(one, self.event_dim), event_norm(other, self.event_dim))
        wrong = event_norm(one - other, self.event_dim) > torch.finfo(u.dtype).eps ** 0.75 * size
        if wrong.any():
            raise errors.not_holomorphic(self.call, first_index(wrong))

    @torch.no_grad()
    def _verify(self, at: Linearization, assembled: Assembled) -> None:
        """Probe the known entries and the declared structure."""
        if at.known is not None:
            at = linearize(at.forward, at.y, to_y=True)
            if not at.depends_on_y:  # an opaque f: its values are all there is to compare its entries with
                return self._check_values(at, assembled)
            wrong = find_wrong_entries(at, assembled)
            if wrong is not None:
                raise errors.wrong_entries(self.call, *wrong)
        if math.prod(at.y.shape[: at.y.dim() - self.unit_dims]) > 1:  # one unit alone cannot show a coupling
            coupling = find_coupling(at, assembled, self.unit_dims)
            if coupling is not None:
                raise errors.coupled(self.call, "event" if self.unit_dims else "element", *coupling)
        contradiction = self.jacobian.contradiction(at, assembled)
        if contradiction is not None:
            raise errors.contradicted(self.call, self.jacobian, contradiction)
        return self._check_values(at, assembled)

    def _check_values(self, at: Linearization, assembled: Assembled) -> None:
        """Probe by finite differences that J is the derivative of the values of f."""
        false = find_false_derivative(at, assembled, self.unit_dims)
        if false is not None and _is_as_in_the_call(at):
            raise errors.false_derivative(self.call, "event" if self.unit_dims else "element", *false)

    @torch.no_grad()
    def _check_curvature(self, at: Linearization) -> None:
        """Probe that the derivatives of f's gradients are those of their values, and that known entries lack none."""
        params = at.inputs[: len(at.forward.arguments.tensors)]  # under a transform their plain tensors require nothing
        at = linearize(at.forward, at.y, to_y=True, asked=[t.requires_grad for t in params])
        if at.known is not None and at.depends_on_y:
            with GradMode(True):
                assembled = self.jacobian.assemble(at)
            lost = find_lost_input(at, assembled)
            if lost is not None:
                number, *slopes = lost
                raise errors.lost_input(self.call, [t for t in at.inputs if t.requires_grad][number], *slopes)
        false = find_false_curvature(at, self.unit_dims)
        if false is not None and _is_as_in_the_call(at):
            raise errors.false_curvature(self.call, "event" if self.unit_dims else "element", *false)


def _is_as_in_the_call(at: Linearization) -> bool:
    """Whether f has not changed since: after torch.func.functional_call J is right, but cannot be probed any more."""
    half = torch.finfo(at.y.dtype).eps ** 0.5
    scale = half * float(event_norm(at.value, at.value.dim()))
    return torch.allclose(at.forward.value(at.y), at.value, rtol=half, atol=scale, equal_nan=True)


def vjp(v: Tensor, rule: Rule, at: Linearization, wanted: Sequence[bool]) -> Gradients:
    """Pull v back to x and to the inputs of f: `w = J^-T v` and `-f_p^T w`."""
    assembled = rule.assemble(at, differentiated=torch.is_grad_enabled())
    w = assembled.solve_transposed(v)
    if torch.is_grad_enabled() and isinstance(assembled, MatrixFreeAt):
        w = _attach_transposed(rule, assembled.transposed_structure(), at, w, v)
    w = rule.spoil_singular(assembled, w, rule.event_dim)
    return [w, *at.pull_inputs(-w, wanted)] if any(wanted) else [w, *[None] * len(wanted)]


def jvp(
    t_x: Tensor | None,
    t_inputs: Sequence[Tensor | None],
    rule: Rule,
    at: Linearization,
    over: Callable[..., Tensor],
) -> Tensor:
    """Push tangents of x and of the inputs of f forward: `J^-1 (t_x - f_p t)`.

    The tangents may have more dimensions than y, over which `over` maps a function of them; None is passed on.
    """
    assembled = rule.assemble(at, differentiated=torch.is_grad_enabled())

    def pushed(t_x: Tensor | None, *t_inputs: Tensor | None) -> Tensor:
        f_p_t = push_inputs(at, t_inputs)
        if t_x is None:
            return assembled.solve(torch.zeros_like(at.y) if f_p_t is None else -f_p_t)
        return assembled.solve(t_x if f_p_t is None else t_x - f_p_t)

    return rule.spoil_singular(assembled, over(pushed, t_x, *t_inputs), rule.event_dim)


def push_inputs(at: Linearization, tangents: Sequence[Tensor | None]) -> Tensor | None:
    """`f_p t`, as the transpose of the linear map `u -> f_p^T u`."""
    wanted = [t is not None for t in tangents]
    if not any(wanted):
        return None
    u = torch.zeros_like(at.y, requires_grad=True)
    with GradMode(True):
        pulled = at.pull_inputs(u, wanted)
    live = [(gradient_edge(p), t) for p, t in zip(pulled, tangents, strict=True) if p is not None and t is not None]
    return gradients(tuple(edge for edge, _ in live), [u], tuple(t for _, t in live))[0]


def attach(rule: Rule, at: Linearization, y: Tensor, x: Tensor | None) -> Tensor:
    """Return y as a differentiable function of x, the params and what f closes over.

    Args:
        rule: how to solve with J.
        at: f linearised at y.
        y: the solution, without a graph; the result shares its storage.
        x: `f(y)`, of the shape of y; None for an implicit function.
    """
    if not at.depends_on_y and rule.jacobian.entries is None:
        raise errors.no_dependence(rule.call)
    tensors = at.forward.arguments.tensors
    if at.captures:
        tensors = (*tensors, *[c.tensor for c in at.captures])
    return _Implicit.apply_eagerly(rule, at, [y], x, *map(beside_leaf, tensors))


def _attach_transposed(rule: Rule, structure: Jacobian, at: Linearization, w: Tensor, v: Tensor) -> Tensor:
    """Return w as a differentiable function of v and of all that J depends on: `J^T w = v` is an inverse problem, too.

    Its f is `w -> J^T w`, with y and the inputs of the original f as params; its Jacobian is `J^T`.
    """
    n_params = len(at.inputs) - len(at.captures)
    stand_ins = [t for t, c in zip(at.inputs[n_params:], at.captures, strict=True) if c.read is not None]

    def transposed_product(w: Tensor, y: Tensor, *given: Tensor) -> Tensor:
        replaced = iter(given[n_params:])
        captured = (next(replaced) if c.read is not None else c.tensor for c in at.captures)
        return relinearize(at, y, (*given[:n_params], *captured)).pull(w)

    arguments = Arguments((at.y, *at.inputs[:n_params], *stand_ins), {})
    model = Model(transposed_product, structure, rule.event_dim, rule.call)
    linear_rule = Rule(structure, rule.event_dim, rule.on_failure, False, rule.call)
    return attach(linear_rule, linearize(Forward(model, arguments, False), w), w, v)


class _Implicit(torch.autograd.Function):
    """The rule as autograd sees it: y out; x, params and captures in."""

    apply_eagerly: Any = eager_apply

    @staticmethod
    def forward(ctx: Any, rule: Rule, at: Linearization, y: list[Tensor], x: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.rule, ctx.at, ctx.has_x = rule, at, x is not None
        output = y.pop()  # from its list: autograd sees a new tensor, and ctx does not hold it in a cycle
        ctx.save_for_backward(output, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, *tensors = ctx.saved_tensors  # also autograd's test for changes in place
        wanted = wanted_gradients(ctx, ctx.has_x) if tensors else []
        rule, at, (v,) = ctx.rule, ctx.at, grads
        if not torch.is_grad_enabled():
            w, *others = outside_autocast(vjp, v, rule, at, wanted)
        elif is_grads_batched(v):
            w, *others = for_each_batched_grad(lambda v: differentiable_vjp(y, v, rule, at, tensors, wanted), v)
        else:
            w, *others = outside_autocast(differentiable_vjp, y, v, rule, at, tensors, wanted)
        if not graph_is_kept():
            ctx.at = None
        return None, None, None, w if ctx.has_x else None, *others


def differentiable_vjp(
    y: Tensor,
    v: Tensor,
    rule: Rule,
    at: Linearization,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    by: Callable[[Tensor, Rule, Linearization, Sequence[bool]], Gradients] = vjp,
) -> Gradients:
    """`vjp` as a differentiable function of y, v and the inputs of f, all of which are connected."""

    def pulled(y: Tensor, v: Tensor, *inputs: Tensor) -> list[Tensor]:
        results = by(v, rule, relinearize(at, y, inputs), wanted)
        return _filled(results, (v, *inputs))

    n_params = len(tensors) - len(at.captures)
    in_place = [None] * (2 + n_params) + [c.tensor if c.read is None else None for c in at.captures]
    results = _OnLeaves.apply(pulled, in_place, y, v, *tensors)
    return [r if w else None for r, w in zip(results, (True, *wanted), strict=True)]


def differentiable_jvp(
    y: Tensor,
    t_x: Tensor | None,
    t_inputs: Sequence[Tensor | None],
    rule: Rule,
    at: Linearization,
    tensors: Sequence[Tensor],
    over: Callable[..., Tensor],
) -> Tensor:
    """`jvp` as a differentiable function of y, the tangents and the inputs of f, all of which are connected."""
    tangents = [t for t in (t_x, *t_inputs) if t is not None]
    n = len(tangents)

    def pushed(y: Tensor, *given: Tensor) -> list[Tensor]:
        rest = iter(given[:n])
        t_x_given, *others = (None if t is None else next(rest) for t in (t_x, *t_inputs))
        return [jvp(t_x_given, others, rule, relinearize(at, y, given[n:]), over)]

    n_params = len(tensors) - len(at.captures)
    in_place = [None] * (1 + n + n_params) + [c.tensor if c.read is None else None for c in at.captures]
    return _OnLeaves.apply(pushed, in_place, y, *tangents, *tensors)[0]


class _OnLeaves(torch.autograd.Function):
    """Evaluates phi on fresh leaves, and is differentiable to any order: its backward is itself, applied to phi's VJP.

    The leaves isolate phi. In a connected graph y leads on to the params, and a partial derivative with respect to a
    param would wander through y back into the node that is being differentiated.

    Args of `apply`:
        phi: a function of tensors that returns a list of tensors.
        in_place: for each tensor, the leaf that phi reads by itself (a weight that f closes over), or None.
        tensors: the connected arguments of phi.
    """

    @staticmethod
    def forward(
        ctx: Any, phi: Callable[..., list[Tensor]], in_place: list[Tensor | None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        leaves = [
            t.detach().requires_grad_(t.requires_grad) if own is None else own
            for t, own in zip(tensors, in_place, strict=True)
        ]
        with GradMode(True), without_autocast(leaves[0].device):
            outputs = phi(*leaves)
        ctx.phi, ctx.in_place, ctx.leaves, ctx.outputs = phi, in_place, leaves, outputs
        ctx.save_for_backward(*tensors)
        return tuple(o.detach() for o in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        if not torch.is_grad_enabled():
            with without_autocast(cotangents[0].device):
                grads = _pull(ctx.outputs, ctx.leaves, cotangents)
            if not graph_is_kept():
                ctx.outputs = None
            return None, None, *grads
        phi, n = ctx.phi, len(tensors)

        def pulled(*arguments: Tensor) -> list[Tensor]:
            leaves, v = arguments[:n], arguments[n:]
            return _filled(_pull(phi(*leaves), leaves, v), leaves)

        results = _OnLeaves.apply(pulled, [*ctx.in_place, *[None] * len(cotangents)], *tensors, *cotangents)
        return None, None, *(r if needed else None for r, needed in zip(results, ctx.needs_input_grad[2:], strict=True))


def _pull(outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Gradients:
    """The gradients of those outputs that have any."""
    live = [(gradient_edge(o), v) for o, v in zip(outputs, cotangents, strict=True) if o.requires_grad]
    return gradients(tuple(o for o, _ in live), leaves, tuple(v for _, v in live))


def _filled(results: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros for the gradients that do not exist."""
    return [torch.zeros_like(t) if r is None else r for r, t in zip(results, like, strict=True)]

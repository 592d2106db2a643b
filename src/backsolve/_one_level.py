"""The implicit rule at the only level of grad that differentiates, perhaps over one of jvp, on plain tensors.

The first derivative comes from the graph that the call stored, as in an eager backward pass. `torch.func.grad` asks for
a differentiable one even where nobody differentiates it, so the result goes through a node that evaluates the rule of
`_functional` only when somebody does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backsolve import _functional
from backsolve._attach import Rule, differentiable_vjp, vjp
from backsolve._closure import Capture
from backsolve._functorch import (
    Beneath,
    Level,
    active_levels,
    alive,
    apply_at_one_level,
    is_grads_batched,
    level_of,
    over_first_dims,
    wrap_for_grad,
)
from backsolve._levels import Mapping, Peeled, dress, spread
from backsolve._linearize import Forward, Linearization
from backsolve._mapped import Mapped
from backsolve._solve import has_derivatives
from backsolve._torch import GradMode, outside_autocast
from backsolve._two_levels import pull_along_tangents

Gradients = list[Tensor | None]


def requiring_grad(tensors: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """The tensors, of which some must require a gradient in the eager graph, as the level wants it."""
    pairs = zip(tensors, wanted, strict=False)
    return [t.detach().requires_grad_() if w and not t.requires_grad else t for t, w in pairs]


def grad_mode_beneath(levels: Sequence[Level]) -> bool:
    """Whether eager graphs are recorded, beneath all levels."""
    return torch.is_grad_enabled() and all(level.grad_mode_beneath for level in levels if level.kind == "grad")


@dataclass(slots=True)
class Attachment:
    """One call, as the level that differentiates needs it later.

    Attributes:
        rule: how to solve with J.
        at: f linearised at the plain y, which has the dimensions of `outer`, then those of `inner` levels of vmap.
        level: the number of the level.
        pushed: that of a level of jvp beneath it, which differentiates, too; 0 if there is none.
        outer: the levels of vmap outside of it that map y.
        leading: for each input of f, those of them that its leaf in `at` has dimensions for.
        inner: the levels inside of it, and which of the inputs they map.
        forward: f, with the params of the call.
        captures: what f closes over; these inputs come last.
        sizes: those of the mapped dimensions.
        eager: whether an eager graph leads on from y.
    """

    rule: Rule
    at: Linearization
    level: int
    pushed: int
    outer: Sequence[int]
    leading: Sequence[Sequence[int]]
    inner: Mapping
    forward: Forward
    captures: Sequence[Capture]
    sizes: dict[int, int]
    eager: bool

    def pull(self, y: Tensor, inputs: Sequence[Tensor], v: Tensor, wanted: Sequence[bool]) -> Gradients:
        """The gradients of x and the inputs, from the stored graph where that is possible."""
        living = level_of(y) == self.level
        connected, y = y, alive(y)
        lowered = None if is_grads_batched(v) else self._lowered(y, inputs, v, wanted, living)
        if lowered is None:
            return self.pull_generally(y, [alive(t) for t in inputs], v, wanted)
        if not living:
            return lowered
        if not torch.is_grad_enabled():
            return [None if r is None else wrap_for_grad(r, self.level) for r in lowered]
        return self._again(lowered, connected, v, inputs)

    def _lowered(
        self, y: Tensor, inputs: Sequence[Tensor], v: Tensor, wanted: Sequence[bool], living: bool
    ) -> Gradients | None:
        """The gradients beneath the level; None where they must be made of rules that compose."""
        peeled = Peeled(v)
        pushed = self.pushed > 0 and any(n == self.pushed for n, _ in Peeled(y).wrappers)
        if not self._fits(peeled, living, pushed):
            return None
        differentiable = (self.eager or peeled.plain.requires_grad) and grad_mode_beneath(active_levels())
        extra = [n for n in peeled.levels if n not in self.outer]
        if (differentiable and pushed) or ((extra or pushed) and not self._is_formed()):
            return None
        if pushed:
            return outside_autocast(self._pull_along_tangents, y, inputs, v, wanted)
        order = [*extra, *self.outer]
        with Beneath(), GradMode(differentiable):
            sizes = {**self.sizes, **peeled.sizes} if extra else self.sizes
            plain = spread(peeled.stacked, peeled.levels, order, sizes)
            by = _vjp_of_many(len(extra)) if extra else vjp
            if differentiable:
                results = self._pull_differentiably(y, inputs, plain, wanted, by)
            else:
                results = outside_autocast(by, plain, self.rule, self.at, wanted)
        return [None if r is None else dress(r, order) for r in results]

    def pull_generally(self, y: Tensor, inputs: Sequence[Tensor], v: Tensor, wanted: Sequence[bool]) -> Gradients:
        """The same in operations that every transform can differentiate."""
        z = None if self.forward.model.closes_over_nothing else dress(self.at.value, self.outer)
        forward = Mapped(self.forward, self.captures, self.inner, inputs)
        return _functional.vjp(self.rule, forward, y, z, inputs, v, wanted)

    def _is_formed(self) -> bool:
        return self.rule.jacobian.is_formed(self.at.y, self.rule.event_dim)

    def _fits(self, v: Peeled, living: bool, pushed: bool) -> bool:
        """Whether v belongs to no level but those of the call, and to others that only map."""
        known = [*([self.level] if living else []), *([self.pushed] if pushed else [])]
        return all(n in known for n, _ in v.wrappers) and (not living or all(n < self.level for n in v.levels))

    def _pull_along_tangents(
        self, y: Tensor, inputs: Sequence[Tensor], v: Tensor, wanted: Sequence[bool]
    ) -> Gradients | None:
        def pull(v: Tensor, extra: int) -> Gradients:
            return (_vjp_of_many(extra) if extra else vjp)(v, self.rule, self.at, wanted)

        leading = [self.outer, *self.leading]
        tensors = [y, *inputs[: len(self.leading)]]
        leaves = [self.at.y, *self.at.inputs[: len(self.leading)]]
        return pull_along_tangents(pull, leaves, tensors, v, self.pushed, self.outer, leading, self.sizes)

    def _pull_differentiably(
        self, y: Tensor, inputs: Sequence[Tensor], v: Tensor, wanted: Sequence[bool], by: Any
    ) -> Gradients:
        at = self.at
        tensors = [self._plain(t, k) for k, t in enumerate(inputs[: len(self.leading)])]
        tensors = [*requiring_grad(tensors, wanted), *(c.tensor for c in at.captures)]
        (y,) = requiring_grad([Peeled(y).stacked], [True])  # J is a function of it
        return outside_autocast(differentiable_vjp, y, v, self.rule, at, tensors, wanted, by)

    def _plain(self, tensor: Tensor, position: int) -> Tensor:
        peeled = Peeled(tensor)
        return spread(peeled.stacked, peeled.levels, self.leading[position], self.sizes)

    def _again(self, results: Gradients, y: Tensor, v: Tensor, inputs: Sequence[Tensor]) -> Gradients:
        """The results as differentiable functions of y, v and the inputs."""
        found = [r for r in results if r is not None]
        which = [r is not None for r in results]
        v, *tensors = (self.own(t) for t in (v, *inputs))
        again = iter(apply_at_one_level(_Again, self, found, which, y, v, *tensors))
        return [next(again) if w else None for w in which]

    def own(self, tensor: Tensor) -> Tensor:
        """The tensor as one of the level."""
        return tensor if level_of(tensor) == self.level else wrap_for_grad(tensor, self.level)


def _vjp_of_many(extra: int) -> Callable[..., Gradients]:
    """`vjp` for cotangents that have some more dimensions on the left than y."""

    def vjp_of_many(v: Tensor, rule: Rule, at: Linearization, wanted: Sequence[bool]) -> Gradients:
        assembled = rule.assemble(at, differentiated=torch.is_grad_enabled())
        w = over_first_dims(extra, lambda v: [assembled.solve_transposed(v)], [v])[0]
        w = rule.spoil_singular(assembled, w, rule.event_dim)
        if not any(wanted):
            return [w, *[None] * len(wanted)]

        def pull_inputs(u: Tensor) -> list[Tensor]:
            found = zip(at.pull_inputs(u, wanted), at.inputs, wanted, strict=True)
            return [torch.zeros_like(t) if r is None else r for r, t, is_wanted in found if is_wanted]

        found = iter(over_first_dims(extra, pull_inputs, [-w]))
        return [w, *(next(found) if is_wanted else None for is_wanted in wanted)]

    return vjp_of_many


class _OneLevel(torch.autograd.Function):
    """The rule at a level of grad: y out; x and the inputs of f in, all of them tensors of the level."""

    @staticmethod
    def forward(ctx: Any, attachment: Attachment, y: list[Tensor], x: Tensor | None, *inputs: Tensor) -> Tensor:
        ctx.attachment = attachment
        output = wrap_for_grad(y.pop(), attachment.level)
        ctx.save_for_backward(output, *inputs)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, *inputs = ctx.saved_tensors
        w, *others = ctx.attachment.pull(y, inputs, grads[0], ctx.needs_input_grad[3:])
        return None, None, w if ctx.needs_input_grad[2] else None, *others


class _Again(torch.autograd.Function):
    """Results of the rule that are known already; its backward is that of the rule."""

    @staticmethod
    def forward(
        ctx: Any,
        attachment: Attachment,
        results: list[Tensor],
        which: list[bool],
        y: Tensor,
        v: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.attachment, ctx.which = attachment, which
        ctx.save_for_backward(y, v, *inputs)
        return tuple(wrap_for_grad(r, attachment.level) for r in results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        attachment, which = ctx.attachment, ctx.which
        given = [alive(t) for t in ctx.saved_tensors]
        moving = [has_derivatives(t) for t in given]

        def rule(*chosen: Tensor) -> tuple[Tensor, ...]:
            rest = iter(chosen)
            y, v, *inputs = (next(rest) if m else t for t, m in zip(given, moving, strict=True))
            results = attachment.pull_generally(y, inputs, v, which[1:])
            like = zip(results, (y, *inputs), which, strict=True)
            return tuple(torch.zeros_like(t) if r is None else r for r, t, w in like if w)

        pull: Any = torch.func.vjp(rule, *(t for t, m in zip(given, moving, strict=True) if m))[1]
        found = iter(pull(tuple(grads)))
        return None, None, None, *(next(found) if m else None for m in moving)


def attach_for_grad(attachment: Attachment, y: Tensor, x: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
    """y, which lives beneath the level, as a differentiable function of tensors of the level."""
    x = None if x is None else attachment.own(x)
    return apply_at_one_level(_OneLevel, attachment, [y], x, *map(attachment.own, inputs))

"""f at one y, with the graph that differentiates it there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._closure import Capture, Graph, replacing, trace
from backsolve._functorch import pull_back_many
from backsolve._random import gaussian_like
from backsolve._torch import GradMode, gradient_edge, is_torch_function, outside_autocast, pull_back, versions
from backsolve.jacobians import Jacobian


@dataclass(frozen=True)
class Model:
    """f and what is claimed of it.

    Attributes:
        f: the forward function.
        jacobian: the structure of J.
        event_dim: how many rightmost dimensions f mixes.
        call: how messages name the problem.
    """

    f: Callable[..., Tensor]
    jacobian: Jacobian
    event_dim: int
    call: str

    f_is_pure: bool = field(init=False)
    """Whether it is plain that f reads no tensors but its arguments, and, unless there are keywords, writes none."""
    closes_over_nothing: bool = field(init=False)
    """Whether it is plain that f reads no tensors but its arguments, and the formula of J neither."""

    def __post_init__(self) -> None:
        entries, pure = self.jacobian.entries, is_torch_function(self.f)
        object.__setattr__(self, "f_is_pure", pure)
        object.__setattr__(self, "closes_over_nothing", pure and (entries is None or is_torch_function(entries)))


class Forward:
    """f together with the params of one call: a function of y and of tensors to put in the place of the params'."""

    __slots__ = ("arguments", "implicit", "model")

    def __init__(self, model: Model, arguments: Arguments, implicit: bool) -> None:
        self.model = model
        self.arguments = arguments
        self.implicit = implicit

    def __call__(self, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate f(y, *params) with autocast off, and check that the result can be x."""
        model = self.model
        args, kwargs = self.arguments.rebuild(tensors)
        watched = () if model.f_is_pure and not kwargs else (y, *tensors)
        before = versions(watched)
        z = outside_autocast(model.f, y, *args, **kwargs)
        if not isinstance(z, Tensor) or z.shape != y.shape or z.dtype is not y.dtype or z.device != y.device:
            raise self._bad_output(y, z)
        if watched and versions(watched) != before:
            raise errors.forward_changed_input(model.call)
        return z

    def value(self, y: Tensor) -> Tensor:
        """f(y) without a graph."""
        with GradMode(False):
            return self(y, self.arguments.tensors)

    def with_f(self, f: Callable[..., Tensor]) -> Forward:
        """The same call with another f."""
        return Forward(replace(self.model, f=f), self.arguments, self.implicit)

    def with_entries(self, y: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """f(y) and, if the user knows J, its entries."""
        z = self(y, tensors)
        return (z,) if self.model.jacobian.entries is None else (z, self.entries(y, tensors))

    def entries(self, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The entries of J at y, by the formula that the user gave."""
        known = self.model.jacobian.entries
        assert known is not None
        args, kwargs = self.arguments.rebuild(tensors)
        entries = outside_autocast(known, y, *args, **kwargs)
        shape = self.model.jacobian.entries_shape(y.shape, self.model.event_dim)
        if not isinstance(entries, Tensor) or entries.shape != shape or entries.dtype != y.dtype:
            raise errors.bad_entries(self.model.call, shape, y.dtype, entries)
        return entries

    def _bad_output(self, y: Tensor, z: Any) -> errors.ForwardOutputError:
        if not isinstance(z, Tensor):
            remedy = "let f return one tensor, made by torch operations"
            return errors.bad_forward_output(self.model.call, "a torch.Tensor", errors.describe(z), remedy)
        k = self.model.event_dim
        if z.shape == y.shape:
            expected = f"dtype {y.dtype} on {y.device}, like y"
            remedy = "give the constants and parameters of f the dtype and device of x"
        elif k and z.dim() >= k and z.shape[-k:] != y.shape[-k:] and z.shape[:-k] == y.shape[:-k]:
            return errors.not_square(self.model.call, y.shape[-k:], z.shape[-k:])
        else:
            expected = f"the shape of y, {tuple(y.shape)}"
            remedy = "let f map each event of y to one of the same shape; check the broadcasting of its parameters"
        return errors.bad_forward_output(self.model.call, expected, errors.describe(z), remedy)


class Linearization:
    """f near one y: its value and its vector-Jacobian products, from the graph of one evaluation.

    `inputs` are the leaves that stand for the params' tensors and for the captures, in this order. `known` are the
    entries of J that the user's formula gave in the same evaluation. Where there are any, the graph need not lead to y.
    `evaluated` tells whether `value` is f(y), and not only what it should be.
    """

    transformed = False
    __slots__ = (
        "_output", "captures", "depends_on_y", "evaluated", "event_dim", "forward", "implicit", "inputs", "known",
        "value", "y",
    )  # fmt: skip

    def __init__(
        self,
        forward: Forward,
        y: Tensor,
        inputs: Sequence[Tensor],
        values: Sequence[Tensor],
        captures: Sequence[Capture] = (),
        depends_on_y: bool = True,
        evaluated: bool = True,
    ) -> None:
        self.forward = forward
        self.evaluated = evaluated
        self.event_dim = forward.model.event_dim
        self.implicit = forward.implicit
        self.y = y
        self.inputs = inputs
        self.captures = captures
        output, *entries = values
        self.value = output.detach()
        self.known = entries[0] if entries else None
        # The edge keeps the graph, but not the data of f(y).
        self._output = (gradient_edge(output),) if output.requires_grad else ()
        self.depends_on_y = depends_on_y and output.requires_grad

    def pull(self, v: Tensor) -> Tensor:
        """`J^T v`."""
        if not self.depends_on_y:
            raise errors.no_dependence(self.forward.model.call)
        (result,) = pull_back(self._output, (self.y,), (v,))
        return torch.zeros_like(v) if result is None else result

    def pull_many(self, vs: Tensor) -> Tensor:
        """`J^T v` for a stack of cotangents: one vectorised pass, or one each if f has no vmap rule."""
        if not self.depends_on_y:
            raise errors.no_dependence(self.forward.model.call)
        if not vs.numel():
            return vs + self.pull(vs.sum(0))  # with a graph, if there is one
        try:
            result = pull_back_many(self._output, self.y, vs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a Function without vmap support, data-dependent control flow, ...
            return torch.stack([self.pull(v) for v in vs])
        return torch.zeros_like(vs) if result is None else result

    def pull_inputs(self, v: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """`f_p^T v` for the inputs that are wanted, None for the others and for those that f does not use."""
        if not self._output or not any(wanted):
            return [None] * len(wanted)
        leaves = [t if w else None for t, w in zip(self.inputs, wanted, strict=True)]
        return gradients(self._output, leaves, (v,))

    def moved(self, y: Tensor) -> Linearization:
        """f linearised at another y."""
        return linearize(self.forward, y)


def gradients(
    outputs: tuple[GradientEdge, ...], leaves: Sequence[Tensor | None], cotangents: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The gradient for each leaf, differentiable if grad mode is on; None where there is none to have."""
    chosen = tuple([t for t in leaves if t is not None and t.requires_grad])
    if not outputs or not chosen:
        return [None] * len(leaves)
    if any(t._backward_hooks for t in chosen):  # they would run on this inner gradient, and once more on the final one
        raise errors.late_hook()
    found = iter(pull_back(outputs, chosen, cotangents))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]


def linearize(forward: Forward, y: Tensor, *, to_y: bool | None = None, asked: Sequence[bool] = ()) -> Linearization:
    """Evaluate f at y on fresh leaves, and find what it closes over.

    Args:
        forward: f.
        y: where.
        to_y: whether the graph must lead to y; None: unless the entries of J are known.
        asked: to which params it must lead, beside those that require a gradient.
    """
    if not torch.is_grad_enabled():
        with torch.inference_mode(False), torch.enable_grad():
            return linearize(forward, y, to_y=to_y, asked=asked)
    model = forward.model
    y = _leaf(y, model.jacobian.entries is None if to_y is None else to_y)
    params = forward.arguments.tensors
    asked = asked or [False] * len(params)
    tensors = [_leaf(t, a or t.requires_grad) for t, a in zip(params, asked, strict=True)]
    if model.closes_over_nothing:
        return Linearization(forward, y, tensors, forward.with_entries(y, tensors), depends_on_y=y.requires_grad)
    traced = trace(lambda: forward.with_entries(y, tensors), (y, *tensors), model.call)
    return Linearization(forward, y, (*tensors, *traced.leaves), traced.values, traced.captures, traced.depends_on_y)


def linearize_unevaluated(forward: Forward, y: Tensor, x: Tensor) -> Linearization | None:
    """f at y by the entries of J alone, where nobody asks if `f(y) = x`; None if f itself must be seen.

    That is so where something besides y and x may need a gradient: params, and what f closes over.
    """
    model = forward.model
    if model.jacobian.entries is None or not (model.closes_over_nothing and forward.arguments.empty):
        return None
    y = _leaf(y, False)
    return Linearization(forward, y, (), (x.detach(), forward.entries(y, ())), (), False, False)


def _leaf(t: Tensor, requires_grad: bool) -> Tensor:
    """A leaf on the memory of t; autograd cannot record what inference mode made, so that is copied."""
    return (t.clone() if t.is_inference() else t.detach()).requires_grad_(requires_grad)


def linearize_connected(forward: Forward, y: Tensor) -> Linearization:
    """Evaluate f at a y with a graph of its own: what is made of J there is a function of x and the params."""
    y = y.view_as(y) if y.requires_grad else _leaf(y, True)
    with GradMode(True):
        values = forward.with_entries(y, forward.arguments.tensors)
    return Linearization(forward, y, forward.arguments.tensors, values)


def relinearize(first: Linearization, y: Tensor, inputs: Sequence[Tensor]) -> Linearization:
    """Evaluate f again on other leaves, for a derivative of a derivative; refuse an f that is no longer the same."""
    forward, captures = first.forward, first.captures
    n_params = len(inputs) - len(captures)
    stand_ins = inputs[n_params:]
    with replacing(captures, stand_ins):
        values = forward.with_entries(y, inputs[:n_params])
    known = {id(t) for t in (y, *inputs)}
    for leaf in Graph(values).leaves:
        if id(leaf) not in known:
            what = f"another leaf than in the call, {errors.describe(leaf)}; is it cached?"
            raise errors.untraceable(forward.model.call, what)
    again = Linearization(forward, y, inputs, values, captures, first.depends_on_y)
    with GradMode(False):
        _check_same(first, again)
    return again


def _check_same(first: Linearization, again: Linearization) -> None:
    """Refuse an f that is no longer the f of the call: another value, other entries, or other first derivatives.

    The pull through the old graph is also autograd's own test for changes in place.
    """
    if first.known is not None and again.known is not None:
        check_close(first, first.known, again.known, first.known)
    u = gaussian_like(first.y)
    before, after = (gradients(at._output, [at.y, *at.inputs], (u,)) for at in (first, again))
    for old, new in zip(before, after, strict=True):
        if old is not None and new is not None:
            check_close(first, old, new, old)
    if first.evaluated:
        check_value(again, first.value)


def check_value(at: Linearization, before: Tensor) -> None:
    """Compare f(y) with what it was, up to the rounding errors of its terms, which are of the size of J y."""
    if torch.equal(before, at.value):
        return
    with GradMode(False):
        terms = at.pull(torch.ones_like(at.y)) * at.y if at.depends_on_y else at.value
    check_close(at, before, at.value, before.abs() + terms.detach().abs())


def check_close(first: Linearization, before: Tensor, after: Tensor, size: Tensor) -> None:
    """Refuse a difference; equal bits are the rule, but rounding errors may differ on some devices."""
    if torch.equal(before, after):
        return
    same = (before == after) | (before.isnan() & after.isnan())
    difference = torch.where(same, 0.0, (before - after).abs())
    k = min(first.event_dim, difference.dim())
    size = size.abs().nan_to_num(0.0, 0.0, 0.0)
    scale = size.flatten(-k).amax(-1).reshape(size.shape[: size.dim() - k] + (1,) * k) if k and size.numel() else size
    if not (difference <= math.sqrt(torch.finfo(before.dtype).eps) * scale).all():
        raise errors.changed_between(first.forward.model.call, difference.nan_to_num(math.inf).max().item())

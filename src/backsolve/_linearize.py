"""f at one y, with the graph that differentiates it there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._closure import Capture, Reached, Replacing, find_captures, replacements
from backsolve._torch import GradMode, autocast_is_on, gradient_edge, pull_back, sequence_number


class Forward:
    """f together with the params of one call: a function of y and of tensors to put in the place of the params'."""

    __slots__ = ("arguments", "call", "event_dim", "f", "implicit")

    def __init__(
        self, f: Callable[..., Tensor], arguments: Arguments, event_dim: int, call: str, implicit: bool
    ) -> None:
        self.f = f
        self.implicit = implicit
        self.arguments = arguments
        self.event_dim = event_dim
        self.call = call

    def __call__(self, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate f(y, *params) with autocast off, and check that the result can be x."""
        args, kwargs = self.arguments.rebuild(tensors)
        if autocast_is_on():
            with torch.autocast(y.device.type, enabled=False):
                z = self.f(y, *args, **kwargs)
        else:
            z = self.f(y, *args, **kwargs)
        if not isinstance(z, Tensor) or z.shape != y.shape or z.dtype != y.dtype or z.device != y.device:
            raise self._bad_output(y, z)
        return z

    def value(self, y: Tensor) -> Tensor:
        """f(y) without a graph."""
        with torch.no_grad():
            return self(y, self.arguments.tensors)

    @property
    def closes_over_nothing(self) -> bool:
        """Whether f is a function of torch itself, such as torch.sin. A tensor's bound method is not."""
        return isinstance(self.f, BuiltinFunctionType) and isinstance(self.f.__self__, type | ModuleType)

    def _bad_output(self, y: Tensor, z: Any) -> errors.ForwardOutputError:
        if not isinstance(z, Tensor):
            remedy = "let f return one tensor, made by torch operations"
            return errors.bad_forward_output(self.call, "a torch.Tensor", errors.describe(z), remedy)
        k = self.event_dim
        if z.shape == y.shape:
            expected = f"dtype {y.dtype} on {y.device}, like y"
            remedy = "give the constants and parameters of f the dtype and device of x"
        elif k and z.dim() >= k and z.shape[-k:] != y.shape[-k:] and z.shape[:-k] == y.shape[:-k]:
            return errors.not_square(self.call, y.shape[-k:], z.shape[-k:])
        else:
            expected = f"the shape of y, {tuple(y.shape)}"
            remedy = "let f map each event of y to one of the same shape; check the broadcasting of its parameters"
        return errors.bad_forward_output(self.call, expected, errors.describe(z), remedy)


class Linearization:
    """f near one y: its value and its vector-Jacobian products, from the graph of one evaluation.

    `inputs` are the leaves that stand for the params' tensors and for the captures, in this order.
    """

    __slots__ = ("_output", "captures", "depends_on_y", "event_dim", "forward", "implicit", "inputs", "value", "y")

    def __init__(
        self,
        forward: Forward,
        y: Tensor,
        output: Tensor,
        inputs: Sequence[Tensor] = (),
        captures: Sequence[Capture] = (),
        depends_on_y: bool = True,
    ) -> None:
        self.forward = forward
        self.event_dim = forward.event_dim
        self.implicit = forward.implicit
        self.y = y
        self.inputs = inputs
        self.captures = captures
        self.value = output.detach()
        self.depends_on_y = depends_on_y
        # The edge keeps the graph, but not the data of f(y).
        self._output = [gradient_edge(output)] if output.requires_grad else []

    def pull(self, v: Tensor) -> Tensor:
        """`J^T v`."""
        (result,) = pull_back(self._edge(), (self.y,), (v,))
        return torch.zeros_like(v) if result is None else result

    def pull_many(self, vs: Tensor) -> Tensor:
        """`J^T v` for a stack of cotangents in one vectorised pass, or in one each where f has no vmap rule."""
        if not vs.numel():
            return vs
        if vs.shape[0] == 1:
            return self.pull(vs[0])[None]
        options = {"retain_graph": True, "create_graph": torch.is_grad_enabled(), "materialize_grads": True}
        try:
            return torch.autograd.grad(self._edge(), (self.y,), (vs,), is_grads_batched=True, **options)[0]
        except RuntimeError:  # a Function without vmap support, data-dependent control flow, ...
            return torch.stack([self.pull(v) for v in vs])

    def _edge(self) -> list[GradientEdge]:
        if not (self.depends_on_y and self._output):
            raise errors.no_dependence(self.forward.call)
        return self._output

    def pull_inputs(self, v: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """`f_p^T v` for the inputs that are wanted, None for the others and for those that f does not use."""
        if not self._output or not any(wanted):
            return [None] * len(wanted)
        leaves = [t if w else None for t, w in zip(self.inputs, wanted, strict=True)]
        return gradients(self._output, leaves, [v])

    def entries(self, known: Callable[..., Tensor], shape: torch.Size) -> Tensor:
        """The user's formula for J at this y, with the same replacements as f."""
        n_params = len(self.inputs) - len(self.captures)
        args, kwargs = self.forward.arguments.rebuild(self.inputs[:n_params])
        with Replacing(replacements(self.captures, self.inputs[n_params:])):
            found = known(self.y, *args, **kwargs)
        if not isinstance(found, Tensor) or found.shape != shape or found.dtype != self.y.dtype:
            raise errors.bad_entries(self.forward.call, shape, self.y.dtype, found)
        return found

    def derivative_near(self, y: Tensor, v: Tensor) -> Tensor:
        """`J(y)^T v` at another y."""
        y = y.detach().requires_grad_()
        with torch.enable_grad():
            z = self.forward(y, self.forward.arguments.tensors)
        return torch.autograd.grad(z, y, v)[0]


def gradients(
    outputs: Sequence[GradientEdge], leaves: Sequence[Tensor | None], cotangents: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradient for each leaf, differentiable if grad mode is on; None where there is none to have."""
    chosen = [t for t in leaves if t is not None and t.requires_grad]
    if not outputs or not chosen:
        return [None] * len(leaves)
    if any(t._backward_hooks for t in chosen):  # they would run on this inner gradient, and once more on the final one
        raise errors.untraceable("inverse(...)", "a leaf on which a gradient hook was registered after the call")
    found = iter(pull_back(outputs, chosen, cotangents))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]


def linearize(forward: Forward, y: Tensor) -> Linearization:
    """Evaluate f at y on fresh leaves, and find what it closes over."""
    y = y.detach().requires_grad_()
    tensors = [t.detach().requires_grad_(t.requires_grad) for t in forward.arguments.tensors]
    with GradMode(True):
        since = sequence_number()
        value = forward(y, tensors)
        if forward.closes_over_nothing:
            return Linearization(forward, y, value, tensors, (), value.requires_grad)
        value, captures, leaves, depends_on_y = find_captures(
            lambda: forward(y, tensors), value, since, (y, *tensors), forward.call
        )
    return Linearization(forward, y, value, (*tensors, *leaves), captures, depends_on_y)


def linearize_connected(forward: Forward, y: Tensor) -> Linearization:
    """Evaluate f at a y with a graph of its own: what is made of J there is a function of x and the params."""
    y = y.view_as(y) if y.requires_grad else y.detach().requires_grad_()
    return Linearization(forward, y, forward(y, forward.arguments.tensors), forward.arguments.tensors)


def relinearize(first: Linearization, y: Tensor, inputs: Sequence[Tensor]) -> Linearization:
    """Evaluate f again on other leaves, for a derivative of a derivative."""
    forward, captures = first.forward, first.captures
    n_params = len(inputs) - len(captures)
    with Replacing(replacements(captures, inputs[n_params:])):
        value = forward(y, inputs[:n_params])
    _check_same(first, value)
    known = {id(t) for t in (y, *inputs)}
    for leaf in Reached(value, 0).leaves:
        if id(leaf) not in known:
            raise errors.untraceable(
                forward.call, f"another leaf than in the call, {errors.describe(leaf)}; is it cached?"
            )
    return Linearization(forward, y, value, inputs, captures, first.depends_on_y)


def _check_same(first: Linearization, value: Tensor) -> None:
    """Refuse an f that is no longer the f of the call; equal bits are the rule, rounding may differ on some devices."""
    if torch.equal(first.value, value.detach()):
        return
    difference = (first.value - value.detach()).abs()
    tolerance = math.sqrt(torch.finfo(value.dtype).eps) * first.value.abs().amax()
    if not (difference <= tolerance).all():
        raise errors.changed_between(first.forward.call, difference.nan_to_num(math.inf).max().item())

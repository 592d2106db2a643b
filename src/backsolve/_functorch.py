"""The private names of torch.func that backsolve uses, each with what it buys; a test fails when torch moves one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import RandomnessType, TransformType
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

from backsolve._torch import eager_apply, in_forward_mode, pull_back, tangents_of_tangents

_TORCH: Any = torch
_C: Any = torch._C  # its submodules have no stubs


def apply_under_transforms(function: Any, *args: Any) -> Any:
    """`torch.autograd.Function.apply` where torch.func is active, without 40 us of looking at the signature."""
    if _C._functorch.peek_interpreter_stack() is None:
        return function.apply(*args)
    call: Any = custom_function_call
    return call(function, *args)


def apply_at_one_level(function: Any, *args: Any) -> Any:
    """`torch.autograd.Function.apply` for tensors of one level of torch.func; its forward wraps what it returns.

    `torch._functorch.autograd_function.custom_function_call` makes a class for each call, and each level beneath.
    """
    allowed: Any = _C._functorch
    before = allowed.get_single_level_autograd_function_allowed()
    allowed.set_single_level_autograd_function_allowed(True)
    try:
        return eager_apply.__get__(None, function)(*args)
    finally:
        allowed.set_single_level_autograd_function_allowed(before)


@contextmanager
def at_outer_levels() -> Generator[None]:
    """Inside of the forward of a Function that is applied at one level: an operation goes on to the other levels."""
    with torch.enable_grad(), tangents_of_tangents(), _C._AutoDispatchBelowAutograd():
        yield


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a level of torch.func."""
    return _C._functorch.is_functorch_wrapped_tensor(tensor)


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a derivative of any kind could flow to a tensor, or a level of torch.func maps it."""
    if tensor.requires_grad or is_functorch_wrapped(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def current_level() -> int:
    """The number of the innermost active level of torch.func; 0 outside of all."""
    interpreter = _C._functorch.peek_interpreter_stack()
    return 0 if interpreter is None else interpreter.level()


def depth_of_transforms() -> int:
    """How many levels of grad, jvp and forward AD are active; while compiling, those at the time of tracing."""
    levels = sum(i.key() in (TransformType.Grad, TransformType.Jvp) for i in retrieve_all_functorch_interpreters())
    return levels + in_forward_mode()


depth_of_transforms.__dict__["_dynamo_marked_constant"] = True


def level_of(tensor: Tensor) -> int:
    """The level of torch.func whose wrapper a tensor is; -1 if it is none, -2 if that level has ended."""
    return _C._functorch.maybe_get_level(tensor)


def is_mapped_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is the wrapper of a level of vmap."""
    return _C._functorch.is_batchedtensor(tensor)


def down_to(tensor: Tensor, level: int) -> Iterator[Tensor]:
    """The tensor, and what it wraps for active levels of torch.func, down to the one that the given level knows."""
    yield tensor
    while is_functorch_wrapped(tensor) and level < _C._functorch.maybe_get_level(tensor) <= current_level():
        tensor = _C._functorch.get_unwrapped(tensor)
        yield tensor


def unwrap_once(tensor: Tensor) -> tuple[Tensor, int | None]:
    """What a wrapper of torch.func holds, and the dimension that it maps, or None."""
    dim = _C._functorch.maybe_get_bdim(tensor) if _C._functorch.is_batchedtensor(tensor) else None
    return _C._functorch.get_unwrapped(tensor), dim


def alive(tensor: Tensor) -> Tensor:
    """The tensor without the wrappers of levels that have ended; custom Functions do not take them off by themselves.

    A backward pass may run after the level of its forward pass, as that of `torch.func.vjp` does.
    """
    while (inner := _C._functorch.unwrap_if_dead(tensor)) is not tensor:
        tensor = inner
    return tensor


def wrap_for_grad(tensor: Tensor, level: int) -> Tensor:
    """A tensor of a level of grad, from one of the levels beneath."""
    return _C._functorch._wrap_for_grad(tensor, level)


def add_mapped_dim(tensor: Tensor, level: int, dim: int = 0) -> Tensor:
    """Let a level of vmap map a dimension of a tensor."""
    return _C._functorch._add_batch_dim(tensor, dim, level)


class Level:
    """An active level of torch.func; `kind` is "vmap", "grad", "jvp" or "other"."""

    __slots__ = ("_interpreter", "kind", "number")

    def __init__(self, interpreter: Any) -> None:
        self.number: int = interpreter.level()
        self.kind = _KINDS.get(interpreter.key().value, "other")
        self._interpreter = interpreter

    @property
    def randomness(self) -> str:
        """What a vmap says about random numbers."""
        return _RANDOMNESS[_C._functorch.CVmapInterpreterPtr(self._interpreter).randomness().value]

    @property
    def grad_mode_beneath(self) -> bool:
        """The grad mode in which a grad was entered: inside of it another one is set."""
        return _C._functorch.CGradInterpreterPtr(self._interpreter).prevGradMode()


_KINDS = {TransformType.Vmap.value: "vmap", TransformType.Grad.value: "grad", TransformType.Jvp.value: "jvp"}
_RANDOMNESS = {getattr(RandomnessType, r).value: r.lower() for r in ("Error", "Same", "Different")}


def active_levels() -> list[Level]:
    """The active levels of torch.func, outermost first."""
    return [Level(i) for i in _C._functorch.get_interpreter_stack() or ()]


class Beneath:
    """A context in which only the levels of torch.func up to one are active; 0: none; and in which nothing is compiled.

    `torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack` in a third of the time. After a graph break in
    a transform dynamo compiles the functions that are called: none where a level is active, but here, where it fails
    over the wrappers.
    """

    __slots__ = ("before", "level", "popped")

    def __init__(self, level: int = 0) -> None:
        self.level = level

    def __enter__(self) -> None:
        self.before = _C._dynamo.eval_frame.set_eval_frame(None)
        self.popped: list[Any] = []
        while (top := _C._functorch.peek_interpreter_stack()) is not None and top.level() > self.level:
            self.popped.append(_C._functorch.pop_dynamic_layer_stack())

    def __exit__(self, *_: object) -> None:
        while self.popped:
            _C._functorch.push_dynamic_layer_stack(self.popped.pop())
        _C._dynamo.eval_frame.set_eval_frame(self.before)


class Idle:
    """A context with levels of vmap that map nothing; torch.func numbers further levels from there.

    An operation on a tensor of another level is then an error, instead of one on what it wraps.
    """

    __slots__ = ("randomness",)

    def __init__(self, randomness: Sequence[str]) -> None:
        self.randomness = randomness

    def __enter__(self) -> None:
        for r in self.randomness:
            _C._functorch._vmap_increment_nesting(1, r)

    def __exit__(self, *_: object) -> None:
        for _r in self.randomness:
            _C._functorch._vmap_decrement_nesting()


def map_first_dims(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    mapped: Sequence[bool],
    size: int,
    randomness: str,
) -> list[Tensor]:
    """`torch.vmap` over the first dimension of some tensors, without its 40 us of checks."""
    level = _C._functorch._vmap_increment_nesting(size, randomness)
    try:
        given = [_C._functorch._add_batch_dim(t, 0, level) if m else t for t, m in zip(tensors, mapped, strict=True)]
        return [_C._functorch._remove_batch_dim(r, level, size, 0) for r in function(*given)]
    finally:
        _C._functorch._vmap_decrement_nesting()


def over_first_dims(
    number: int, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Map a function over the first few dimensions of all tensors; one by one where an operation of f has no vmap."""
    if not number:
        return function(*tensors)
    try:
        sizes = tensors[0].shape[:number]
        return _vmapped(sizes, function, tensors)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        each = [over_first_dims(number - 1, function, sample) for sample in zip(*tensors, strict=True)]
        return [torch.stack(results) for results in zip(*each, strict=True)]


def _vmapped(
    sizes: Sequence[int], function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]
) -> Sequence[Tensor]:
    if not sizes:
        return function(*tensors)

    def inner(*given: Tensor) -> Sequence[Tensor]:
        return _vmapped(sizes[1:], function, given)

    return map_first_dims(inner, tensors, [True] * len(tensors), sizes[0], "same")


def pull_back_many(outputs: tuple[GradientEdge, ...], leaf: Tensor, cotangents: Tensor) -> Tensor | None:
    """`pull_back` for a stack of cotangents in one pass: `torch.vmap` without its 80 us of checks.

    `torch.autograd.grad(..., is_grads_batched=True)` has an older vmap, which knows fewer operations.
    """
    level = _C._functorch._vmap_increment_nesting(len(cotangents), "error")
    try:
        (found,) = pull_back(outputs, (leaf,), (_C._functorch._add_batch_dim(cotangents, 0, level),))
        return None if found is None else _C._functorch._remove_batch_dim(found, level, len(cotangents), 0)
    finally:
        _C._functorch._vmap_decrement_nesting()


def is_grads_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for a batch of cotangents, in `torch.autograd.grad(..., is_grads_batched=True)`.

    That is a vmap of its own, older than torch.func, which knows nothing of custom Functions.
    """
    return _C._functorch.is_legacy_batchedtensor(tensor)


def fold_batched_grads(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a function of plain tensors to such a tensor; it sees the batch of cotangents as the last dimension."""
    level = _C._vmapmode_increment_nesting() - 1
    _C._vmapmode_decrement_nesting()
    plain: Tensor = _TORCH._remove_batch_dim(tensor, level, 0, tensor.dim())
    return _TORCH._add_batch_dim(function(plain), tensor.dim(), level)


def for_each_batched_grad(function: Callable[[Tensor], Sequence[Tensor | None]], tensor: Tensor) -> list[Tensor | None]:
    """Apply a function of plain tensors to each cotangent that such a tensor stands for."""
    level = _C._vmapmode_increment_nesting() - 1
    _C._vmapmode_decrement_nesting()
    plain: Tensor = _TORCH._remove_batch_dim(tensor, level, 0, 0)
    results = zip(*(function(v) for v in plain.unbind()), strict=True)
    return [None if r[0] is None else _TORCH._add_batch_dim(torch.stack(r), 0, level) for r in results]

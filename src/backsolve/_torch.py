"""The private names of torch that backsolve uses, each with what it buys; a test fails when torch moves one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from operator import attrgetter
from types import BuiltinFunctionType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import RandomnessType, TransformType
from torch._compile import _disable_dynamo
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.autograd.variable import Variable
from torch.nn import Parameter
from torch.nn.utils import parametrize

Function = TypeVar("Function", bound=Callable[..., Any])
_TORCH: Any = torch
_C: Any = torch._C  # its submodules have no stubs

_VERSION = attrgetter("_version")  # unlike a comprehension, without a frame of Python for each call
_set_grad_mode: Any = _C._set_grad_enabled  # names of their own, as a look into torch._C takes as long as the call
_tracing_state: Any = _C._get_tracing_state
_dispatch_mode: Any = _C._get_dispatch_mode
_is_any_autocast_enabled: Any = _C._is_any_autocast_enabled
_PROXY: Any = _C._TorchDispatchModeKey.PROXY
_NO_CONTEXT: AbstractContextManager[Any] = nullcontext()
_ENGINE: Any = Variable._execution_engine
LEAF_NODE: Any = _C._functions.AccumulateGrad
"""The node that ends every path of a graph and holds its leaf tensor as `variable`."""

PLAIN = (Tensor, Parameter)
"""The types of a tensor that is no subclass: wrappers of torch.func and dual tensors have them, DTensors have not."""

eager_apply: Any = vars(_C._FunctionBase)["apply"]
"""`torch.autograd.Function.apply` without its look at torch.func, a third of its time: for use where none is active."""


def apply_under_transforms(function: Any, *args: Any) -> Any:
    """`torch.autograd.Function.apply` where torch.func is active, without 40 us of looking at the signature."""
    if _C._functorch.peek_interpreter_stack() is None:
        return function.apply(*args)
    call: Any = custom_function_call
    return call(function, *args)


def without_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with grad mode off.

    But leave it on if `parametrize.cached()` is active: a weight that is first computed without a graph would stay so.
    """
    before = torch.is_grad_enabled()
    _set_grad_mode(before and parametrize._cache_enabled > 0)
    try:
        return function(*args, **kwargs)
    finally:
        _set_grad_mode(before)


class GradMode:
    """`torch.set_grad_enabled` as a context, without its Python layers: 0.4 us instead of 1.5."""

    __slots__ = ("before", "enabled")

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        _set_grad_mode(self.enabled)

    def __exit__(self, *_: object) -> None:
        _set_grad_mode(self.before)


def sequence_number() -> int:
    """The number that the next autograd node of this thread gets: tells nodes of f from older ones."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]


def is_torch_function(f: Any) -> bool:
    """Whether f is a function of torch itself, such as torch.sin: it reads its arguments alone, and writes into none.

    A bound method of a tensor, such as weight.mul, is a builtin function too, and reads that tensor; torch.sin_ writes.
    """
    if not isinstance(f, BuiltinFunctionType) or f.__name__.endswith("_"):
        return False
    owner = f.__self__
    return owner is None or (isinstance(owner, ModuleType) and owner.__name__.startswith("torch."))


def gradient_edge(tensor: Tensor) -> GradientEdge:
    """Where the graph of a tensor starts; `get_gradient_edge` without 2 us of checks."""
    node = tensor.grad_fn
    return get_gradient_edge(tensor) if node is None else GradientEdge(node, tensor.output_nr)


def pull_back(
    outputs: tuple[GradientEdge, ...], inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` that keeps the graph, without its 10 us of checks; None for inputs that are not reached.

    The result is differentiable if grad mode is on.
    """
    return _ENGINE.run_backward(  # outputs, cotangents, keep_graph, create_graph, inputs, allow_unreachable
        outputs, cotangents, True, torch.is_grad_enabled(), inputs, True, accumulate_grad=False
    )


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


def solve_and_factor(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`a^-1 b` with the LU factors of a and their pivots: what `torch.linalg.solve` keeps to itself."""
    u, lu, pivots, _ = _TORCH._linalg_solve_ex(a, b)
    return u, lu, pivots


def is_distributed(value: Any) -> bool:
    """Whether a value is a DTensor; torch does not import them by itself."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which autocast is off: J in bfloat16 would be off by a percent."""
    return torch.autocast(device.type, enabled=False) if _is_any_autocast_enabled() else _NO_CONTEXT


def outside_autocast(function: Callable[..., Any], y: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call `function(y, ...)` with autocast off: `with without_autocast(y.device)` costs a microsecond."""
    if not _is_any_autocast_enabled():
        return function(y, *args, **kwargs)
    with torch.autocast(y.device.type, enabled=False):
        return function(y, *args, **kwargs)


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The counters of changes in place, which a tensor shares with its views and detached aliases."""
    if not tensors:
        return []
    if torch.compiler.is_dynamo_compiling():  # not traceable; f is also run outside of the graph, where this is seen
        return []
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:  # what inference mode made does not count
        return [0 if t.is_inference() else t._version for t in tensors]


def graph_is_kept() -> bool:
    """Whether the running backward pass was asked to keep its graph, so that ours can be freed with the caller's."""
    return _C._autograd._get_current_graph_task_keep_graph()


def wanted_gradients(node: Any, skip: int) -> list[bool]:
    """Which gradients this backward pass will use of the tensors that went into a custom Function, without some first.

    `ctx.needs_input_grad` only says which inputs require one; computing the others costs time, and raises where torch
    has no such derivative.
    """
    return [following is not None and _will_execute(following) for following, _ in node.next_functions[skip:]]


def beside_leaf(tensor: Tensor) -> Tensor:
    """The tensor, or a view of it if it is a leaf: of leaves `wanted_gradients` learns by an exception, for 17 us."""
    return tensor.view_as(tensor) if tensor.requires_grad and tensor.is_leaf else tensor


def _will_execute(node: Any) -> bool:
    try:
        return _C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf named in autograd.grad(..., inputs): the query does not support it, but it is wanted
        return True


def active_transform() -> str | None:
    """The name of a torch transform around this call, if there is one."""
    if _C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transform (grad, vjp, jvp, vmap, ...)"
    if forward_ad._current_level >= 0:
        return "torch.autograd.forward_ad dual level"
    return None


def is_traced() -> bool:
    """Whether torch.jit.trace or make_fx is recording: what g computes elsewhere would become a constant."""
    return _tracing_state() is not None or _dispatch_mode(_PROXY) is not None


active_transform.__dict__["_dynamo_marked_constant"] = True  # torch.compiler.assume_constant_result imports dynamo


def stored(tensor: Tensor) -> Tensor:
    """The tensor, written to memory once if a compiler would else work it out anew in each loop that reads it.

    inductor inlines cheap expressions into all their readers; of what has strides it makes a buffer.
    """
    if not torch.compiler.is_compiling() or active_transform():
        return tensor
    return tensor.as_strided(tensor.size(), tensor.stride())


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a level of torch.func."""
    return _C._functorch.is_functorch_wrapped_tensor(tensor)


def current_level() -> int:
    """The number of the innermost active level of torch.func; 0 outside of all."""
    interpreter = _C._functorch.peek_interpreter_stack()
    return 0 if interpreter is None else interpreter.level()


def down_to(tensor: Tensor, level: int) -> Iterator[Tensor]:
    """The tensor, and what it wraps for active levels of torch.func, down to the one that the given level knows."""
    yield tensor
    while is_functorch_wrapped(tensor) and level < _C._functorch.maybe_get_level(tensor) <= current_level():
        tensor = _C._functorch.get_unwrapped(tensor)
        yield tensor


def owns_its_memory(tensor: Tensor) -> bool:
    """Whether no other tensor, and no foreign library, knows the storage of this one."""
    storage = tensor.untyped_storage()
    return storage.resizable() and _C._storage_Use_Count(storage._cdata) <= 2  # the tensor's, and `storage` itself


def in_forward_mode() -> bool:
    """Whether a dual level of forward AD is active."""
    return forward_ad._current_level >= 0


def depth_of_transforms() -> int:
    """How many levels of grad, jvp and forward AD are active; while compiling, those at the time of tracing."""
    levels = sum(i.key() in (TransformType.Grad, TransformType.Jvp) for i in retrieve_all_functorch_interpreters())
    return levels + in_forward_mode()


depth_of_transforms.__dict__["_dynamo_marked_constant"] = True


def never_compiled(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """A function that breaks a graph for this reason; `torch.compiler.disable` would import the compiler at once."""
    return not_traced(reason)(_disable_dynamo(function))


def not_traced(reason: str) -> Callable[[Function], Function]:
    """Mark a function at which a graph breaks for this reason, with `fullgraph=True` an error that states it."""

    def mark(function: Function) -> Function:
        vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        return function

    return mark


def alive(tensor: Tensor) -> Tensor:
    """The tensor without the wrappers of levels that have ended; custom Functions do not take them off by themselves.

    A backward pass may run after the level of its forward pass, as that of `torch.func.vjp` does.
    """
    while (inner := _C._functorch.unwrap_if_dead(tensor)) is not tensor:
        tensor = inner
    return tensor


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


def level_of(tensor: Tensor) -> int:
    """The level of torch.func whose wrapper a tensor is; -1 if it is none, -2 if that level has ended."""
    return _C._functorch.maybe_get_level(tensor)


def unwrap_once(tensor: Tensor) -> tuple[Tensor, int | None]:
    """What a wrapper of torch.func holds, and the dimension that it maps, or None."""
    dim = _C._functorch.maybe_get_bdim(tensor) if _C._functorch.is_batchedtensor(tensor) else None
    return _C._functorch.get_unwrapped(tensor), dim


def wrap_for_grad(tensor: Tensor, level: int) -> Tensor:
    """A tensor of a level of grad, from one of the levels beneath."""
    return _C._functorch._wrap_for_grad(tensor, level)


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


def no_function_modes() -> bool:
    """Whether no TorchFunctionMode is active."""
    return _C._len_torch_function_stack() == 0


_DISPATCH = (_C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set())


def eagerly() -> AbstractContextManager[Any]:
    """A context in which torch dispatches as in eager code; inside of a custom operation autograd is out of reach."""
    return _C._ForceDispatchKeyGuard(*_DISPATCH)


@contextmanager
def at_outer_levels() -> Generator[None]:
    """Inside of the forward of a Function that is applied at one level: an operation goes on to the other levels."""
    with torch.enable_grad(), tangents_of_tangents(), _C._AutoDispatchBelowAutograd():
        yield


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a derivative of any kind could flow to a tensor, or a level of torch.func maps it."""
    if tensor.requires_grad or is_functorch_wrapped(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def tangents_of_tangents() -> AbstractContextManager[Any]:
    """Inside the jvp of a custom Function: forward AD stays on; else nested tangents are 0 (pytorch #197867)."""
    return forward_ad._set_fwd_grad_enabled(True)


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

"""The private names of torch that backsolve uses, each with what it buys; a test fails when torch moves one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from types import BuiltinFunctionType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
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
_ALIAS: Any = torch.ops.aten.alias.default
_ENGINE: Any = Variable._execution_engine
LEAF_NODE: Any = _C._functions.AccumulateGrad
"""The node that ends every path of a graph and holds its leaf tensor as `variable`."""

PLAIN = (Tensor, Parameter)
"""The types of a tensor that is no subclass: wrappers of torch.func and dual tensors have them, DTensors have not."""

eager_apply: Any = vars(_C._FunctionBase)["apply"]
"""`torch.autograd.Function.apply` without its look at torch.func, a third of its time: for use where none is active."""


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


def alias(tensor: Tensor) -> Tensor:
    """The same numbers as another tensor of the graph, to which gradients are handed on as they are.

    `tensor.view_as(tensor)` hands on aliases of them; autograd takes the alias for a tensor that nobody else holds, and
    leaves that accumulate one gradient each, equal ones of two params say, accumulate both in one memory.
    """
    return _ALIAS(tensor)


def beside_leaf(tensor: Tensor) -> Tensor:
    """The tensor, or an alias of it if it is a leaf: of leaves `wanted_gradients` learns by an exception, for 17 us."""
    return _ALIAS(tensor) if tensor.requires_grad and tensor.is_leaf else tensor


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


active_transform.__dict__["_dynamo_marked_constant"] = True  # torch.compiler.assume_constant_result imports dynamo


def is_traced() -> bool:
    """Whether torch.jit.trace or make_fx is recording: what g computes elsewhere would become a constant."""
    return _tracing_state() is not None or _dispatch_mode(_PROXY) is not None


def stored(tensor: Tensor) -> Tensor:
    """The tensor, written to memory once if a compiler would else work it out anew in each loop that reads it.

    inductor inlines cheap expressions into all their readers; of what has strides it makes a buffer.
    """
    if not torch.compiler.is_compiling() or active_transform():
        return tensor
    return tensor.as_strided(tensor.size(), tensor.stride())


def owns_its_memory(tensor: Tensor) -> bool:
    """Whether no other tensor, and no foreign library, knows the storage of this one."""
    storage = tensor.untyped_storage()
    return storage.resizable() and _C._storage_Use_Count(storage._cdata) <= 2  # the tensor's, and `storage` itself


def in_forward_mode() -> bool:
    """Whether a dual level of forward AD is active."""
    return forward_ad._current_level >= 0


def never_compiled(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """A function that breaks a graph for this reason; `torch.compiler.disable` would import the compiler at once."""
    return not_traced(reason)(_disable_dynamo(function))


def not_traced(reason: str) -> Callable[[Function], Function]:
    """Mark a function at which a graph breaks for this reason, with `fullgraph=True` an error that states it."""

    def mark(function: Function) -> Function:
        vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        return function

    return mark


def no_function_modes() -> bool:
    """Whether no TorchFunctionMode is active."""
    return _C._len_torch_function_stack() == 0


_DISPATCH = (_C._dispatch_tls_local_include_set(), _C._dispatch_tls_local_exclude_set())


def eagerly() -> AbstractContextManager[Any]:
    """A context in which torch dispatches as in eager code; inside of a custom operation autograd is out of reach."""
    return _C._ForceDispatchKeyGuard(*_DISPATCH)


def tangents_of_tangents() -> AbstractContextManager[Any]:
    """Inside the jvp of a custom Function: forward AD stays on; else nested tangents are 0 (pytorch #197867)."""
    return forward_ad._set_fwd_grad_enabled(True)

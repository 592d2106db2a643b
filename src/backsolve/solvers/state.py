"""What f remembers from call to call stays as it is during a solve."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

from backsolve._linearize import Forward

_MOST = 1000  # objects to look at in search of modules


@contextmanager
def frozen(forward: Forward) -> Generator[Forward]:
    """A context in which f, as the returned Forward has it, starts each time from the same state.

    Spectral normalisation moves its vectors, and batch normalisation its averages, at every call in training mode: each
    evaluation of f would be one of another function. So the buffers of such modules are replaced by fresh copies
    before each call, and those that were there come back in the end, unchanged. Only modules that can be found from f
    are treated so: through closures, globals, containers, and attributes of objects. No other thread may use them
    meanwhile.
    """
    owned = [
        (module._buffers, name, buffer)
        for root in _modules(forward.model.f)
        for module in root.modules()
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    if not owned:
        yield forward
        return

    def from_the_same_state(*args: Any, **kwargs: Any) -> Tensor:
        for buffers, name, buffer in owned:
            buffers[name] = buffer.clone()
        return forward.model.f(*args, **kwargs)

    try:
        yield forward.with_f(from_the_same_state)
    finally:
        for buffers, name, buffer in owned:
            buffers[name] = buffer


def _modules(f: Callable[..., Any]) -> list[Module]:
    """The modules that f is, is bound to, closes over, or reads as globals, be it as a part of something else."""
    found: list[Module] = []
    seen: dict[int, Any] = {}
    stack: list[Any] = [f]
    while stack and len(seen) < _MOST:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Module):
            found.append(value)
        else:
            stack += _parts(value)
    return found


def _parts(value: Any) -> list[Any]:
    """What a function reads, or an object is made of."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        names = value.__code__.co_names
        read = [value.__globals__.get(name) for name in names]
        of_namespaces = [vars(space).get(name) for space in read if isinstance(space, ModuleType) for name in names]
        return [*(cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)), *read, *of_namespaces]
    if isinstance(value, list | tuple):
        return list(value[:_MOST])
    if isinstance(value, dict):
        return list(value.values())[:_MOST]
    if isinstance(value, type | ModuleType | Tensor):
        return []
    attributes = getattr(value, "__dict__", None)
    return list(attributes.values()) if isinstance(attributes, dict) else []


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (an empty cell raises)
    except ValueError:
        return False
    return True

"""Where in a module the tensors stand that f reads.

`torch.func.functional_call` puts other tensors in the place of a module's parameters, and takes them away again before
any derivative is worked out. So it is not enough to know a tensor that f has read; its place must be known as well.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

Place = tuple[dict[str, Any], str]  # the `_parameters` or `_buffers` of a module, and a name in it

_EMPTY = CellType()  # of a variable that has no value yet
_DEPTH = 4  # of functions, objects and containers inside each other


def places_of(tensors: Iterable[Tensor], functions: Iterable[Any]) -> dict[int, list[Place]]:
    """For the id of each tensor, its places in the modules that the functions hold or name."""
    found: dict[int, list[Place]] = {id(t): [] for t in tensors}
    seen: set[int] = set()
    for function in functions if found else ():
        for module in _modules(function, seen, _DEPTH):
            for inner in module.modules():
                for held in (inner._parameters, inner._buffers):
                    for name, tensor in held.items():
                        if id(tensor) in found and (held, name) not in found[id(tensor)]:
                            found[id(tensor)].append((held, name))
    return found


def _modules(holder: Any, seen: set[int], depth: int) -> Iterator[nn.Module]:
    if id(holder) in seen or depth < 0:
        return
    seen.add(id(holder))
    if isinstance(holder, nn.Module):
        yield holder
        return
    for part in _parts(holder):
        yield from _modules(part, seen, depth - 1)


def _parts(holder: Any) -> Sequence[Any]:
    """What a function or an object holds."""
    if isinstance(holder, functools.partial):
        return (holder.func, *holder.args, *holder.keywords.values())
    if isinstance(holder, MethodType):
        return (holder.__self__,)
    if isinstance(holder, FunctionType):
        cells = [c.cell_contents for c in holder.__closure__ or () if c != _EMPTY]
        named = [holder.__globals__[n] for n in holder.__code__.co_names if n in holder.__globals__]
        return (*cells, *(n for n in named if isinstance(n, nn.Module | FunctionType)), *(holder.__defaults__ or ()))
    if isinstance(holder, dict):
        return tuple(holder.values())
    if isinstance(holder, tuple | list):
        return holder
    return tuple(getattr(holder, "__dict__", {}).values())

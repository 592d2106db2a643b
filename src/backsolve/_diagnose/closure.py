"""Which tensors f reads without being given them, and which ones f and g can see."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

from backsolve._diagnose.finding import Finding
from backsolve._diagnose.subject import Subject
from backsolve._inverse import Inverse
from backsolve.jacobians import Jacobian

_DEPTH = 6  # of attributes, containers and closures inside each other
_MANY = 100  # elements of a container are looked through


@dataclass(frozen=True)
class Closure:
    """The tensors behind f and g.

    Attributes:
        read: the tensors that f(y) leads to, by name.
        unread: the leaves that require a gradient and that f or g can see, but f(y) does not lead to, by name.
        histories: those of `read` that have a history of their own.
    """

    read: tuple[tuple[str, Tensor], ...]
    unread: tuple[tuple[str, Tensor], ...]
    histories: tuple[str, ...]

    @property
    def leaves(self) -> list[tuple[str, Tensor]]:
        """The leaves with gradients, read or not."""
        return [(name, t) for name, t in (*self.read, *self.unread) if t.is_leaf and t.numel()]

    def findings(self) -> Iterator[Finding]:
        """What f closes over."""
        if not self.read:
            yield Finding("closure", "good", "f reads no tensor with a gradient that it is not given")
        else:
            names = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.read)
            yield Finding("closure", "note", f"f closes over {names}; gradients reach them")
        if self.unread:
            names = ", ".join(name for name, _ in self.unread)
            text = f"f or g can see {names}, but f(y) does not lead there: no gradient"
            yield Finding("closure", "note", text, "expected? If y depends on it, f must read it with its graph")


def visible(inv: Inverse) -> dict[str, Any]:
    """The tensors and modules that f and g can see, by name."""
    found = dict(_visible(inv._problem.solver, "g"))
    return found | dict(_visible(inv._f, "f"))


def modules_of(inv: Inverse) -> tuple[tuple[str, Module], ...]:
    """The modules that f and g can see, by name."""
    return tuple({id(m): (name, m) for name, m in visible(inv).items() if isinstance(m, Module)}.values())


def measure_closure(subject: Subject) -> Closure:
    """Walk the graph of f(y) for what it reads, and f and g themselves for names and for what is not read."""
    seen = {name: value for name, value in visible(subject.inv).items() if isinstance(value, Tensor)}
    names = {id(t): name for name, t in seen.items()}
    captured = [c.tensor if c.read is None else c.read for c in subject.linearization.captures]
    read = tuple((names.get(id(t), f"tensor {i}"), t) for i, t in enumerate(captured))
    known = {id(t) for t in captured}
    unread = {id(t): (names[id(t)], t) for t in seen.values() if t.requires_grad and t.is_leaf and id(t) not in known}
    return Closure(read, tuple(unread.values()), tuple(name for name, t in read if not t.is_leaf))


def _visible(root: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The tensors and modules that can be reached from a callable, with the path to each."""
    seen: set[int] = set()
    stack: list[tuple[str, Any, int]] = [(name, root, 0)]
    while stack:
        path, value, depth = stack.pop()
        if id(value) in seen or depth > _DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor | Module):
            yield path, value
        for step, child in _children(value):
            stack.append((f"{path}{step}" if step[0] in ".[" else step, child, depth + 1))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds, with what to append to its path: `.name` or `[index]`, or a variable's own name."""
    if isinstance(value, Tensor | ModuleType | type | str | bytes | int | float | None):
        return
    if isinstance(value, Module):
        yield from ((f".{n}", t) for n, t in (*value.named_parameters(), *value.named_buffers()))
        yield from ((f".{n}", m) for n, m in value.named_modules() if n)
        yield from ((f".{n}", v) for n, v in vars(value).items() if not n.startswith("_"))
    elif isinstance(value, Mapping):
        yield from ((f"[{k!r}]", v) for k, v in list(value.items())[:_MANY])
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{i}]", v) for i, v in enumerate(list(value)[:_MANY]))
    elif isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    elif isinstance(value, MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, Jacobian):
        yield ".entries", value.entries
    elif hasattr(value, "__dict__"):
        yield from ((f".{n}", v) for n, v in vars(value).items())


def _of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """The variables that a function closes over, its defaults, and the globals that its code names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a cell that is still empty
            yield name, cell.cell_contents
    yield from ((n, function.__globals__[n]) for n in function.__code__.co_names if n in function.__globals__)
    yield ".__defaults__", function.__defaults__
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield ".__wrapped__", wrapped

"""Tensors that f reads without being given them become explicit inputs.

The graph of f(y) is the witness: whatever it ends in, other than y and the params, was closed over. Leaves (weights)
can be differentiated where they stand. Tensors with a history of their own are replaced by fresh leaves while f
runs, since a derivative with respect to such a tensor and one with respect to a leaf upstream of it would otherwise
overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode, has_torch_function_unary

from backsolve import errors
from backsolve._functorch import current_level, down_to, is_differentiated, is_functorch_wrapped
from backsolve._levels import tensors_in
from backsolve._places import Place, places_of
from backsolve._torch import LEAF_NODE, alias, sequence_number

Edge = tuple[Node, int]


@dataclass(frozen=True)
class Capture:
    """A tensor that f closes over.

    Attributes:
        tensor: what gradients flow to, an input of the implicit rule.
        read: the object that f reads, by whose identity it is replaced; None for a leaf, which f may go on reading.
        places: where it stood in modules. Where something else stands by now, it is put back while f runs.
    """

    tensor: Tensor
    read: Tensor | None
    places: Sequence[Place] = ()


@dataclass(frozen=True)
class Traced:
    """One evaluation of f whose graph ends in known leaves only.

    Attributes:
        values: what the evaluation returned.
        captures: what f closes over.
        leaves: for each capture, the leaf that stands for it in the graph of the values.
        depends_on_y: whether the graph of the first value leads to y.
    """

    values: Sequence[Tensor]
    captures: Sequence[Capture] = ()
    leaves: Sequence[Tensor] = ()
    depends_on_y: bool = True


class Graph:
    """The nodes behind some values, up to nodes that are outside.

    Attributes:
        nodes: the nodes inside.
        leaves: the leaf tensors, in the order in which they are met.
        foreign: the edges that lead outside, to tensors that were not computed by f.
    """

    __slots__ = ("foreign", "leaves", "nodes")

    def __init__(self, values: Iterable[Tensor], outside: Container[Any] = ()) -> None:
        self.nodes: set[Node] = set()
        self.leaves: list[Tensor] = []
        self.foreign: list[Edge] = []
        seen: set[Node | Edge] = set()
        stack: list[tuple[Node | None, int]] = []
        for value in values:
            if value.grad_fn is not None:
                stack.append((value.grad_fn, value.output_nr))
            elif value.requires_grad:
                self.leaves.append(value)
        while stack:
            node, output = stack.pop()
            if node is None:
                continue
            is_foreign = node in outside
            mark = (node, output) if is_foreign else node
            if mark in seen:
                continue
            seen.add(mark)
            if isinstance(node, LEAF_NODE):
                self.leaves.append(getattr(node, "variable"))
            elif is_foreign:
                self.foreign.append((node, output))
            else:
                self.nodes.add(node)
                stack.extend(node.next_functions)

    def meets(self, leaf: Tensor) -> bool:
        """Whether this leaf is among those reached."""
        return any(t is leaf for t in self.leaves)

    def made_between(self, since: int, until: int) -> bool:
        """Whether the numbers of the nodes say that all were made by this thread between two moments.

        Each thread counts its own nodes, so a node that another thread made shows as a number that is out of range or
        taken twice.
        """
        numbers = {node._sequence_nr() for node in self.nodes}
        return len(numbers) == len(self.nodes) and all(since <= n < until for n in numbers)


class Recording(TorchFunctionMode):
    """While active, keeps every tensor that torch functions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}  # alive, so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs)):
            self.seen[id(tensor)] = tensor
        return func(*args, **(kwargs or {}))

    def captures(self, edges: Iterable[Edge]) -> list[Capture]:
        """Those whose graph starts at one of the edges.

        A view is taken of each, under the modes outside of this one. Inside the f of another Inverse that is a view of
        what the other one replaces the tensor with; the graph of the view leads on to the edge.
        """
        wanted = set(edges)
        found = []
        for tensor in self.seen.values():
            if tensor.requires_grad and not is_functorch_wrapped(tensor):
                view = alias(tensor)
                if view.grad_fn is not None and view.grad_fn.next_functions[0] in wanted:
                    found.append(Capture(view, tensor))
        return found


class Replacing(TorchFunctionMode):
    """While active, torch functions see other tensors in the place of some, by identity."""

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self.replacements = replacements
        self.met: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._replace(args), **self._replace(kwargs or {}))

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.replacements:
                return value
            self.met.add(id(value))
            return self.replacements[id(value)]
        if type(value) in (tuple, list):
            return type(value)(self._replace(v) for v in value)
        if type(value) is dict:
            return {k: self._replace(v) for k, v in value.items()}
        return value


class Reading(TorchFunctionMode):
    """While active, keeps the tensors that f reads and has not made, of those that a derivative could flow to.

    Under torch.func the graph of f(y) does not tell: each level has its own.

    Attributes:
        read: these, by identity.
        hidden: whether f hands one of them to a transform of its own, whose wrapper cannot be replaced later.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.level = current_level()  # f may open more, and read by their wrappers
        self.own = {id(t): t for t in given}  # alive, so that no id is used twice
        self.read: dict[int, Tensor] = {}
        self.hidden = False
        self.paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        for tensor in tensors_in((args, kwargs)):
            *inner, innermost = down_to(tensor, self.level)
            if not any(id(t) in self.own for t in (*inner, innermost)):
                self.read.setdefault(id(innermost), innermost)
                self.hidden |= bool(inner) and is_differentiated(innermost)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.own.update((id(t), t) for t in down_to(tensor, self.level))
        return result

    def captures(self, functions: Iterable[Any]) -> list[Capture]:
        """What f closes over; as in `Recording`, the modes outside of this one may replace it.

        Args:
            functions: f, and what else was called; the modules in them are searched for what was read.
        """
        read = [t for t in self.read.values() if is_differentiated(t)]
        places = places_of(read, functions)
        return [Capture(alias(t), t, places[id(t)]) for t in read]


def trace(evaluate: Callable[[], Sequence[Tensor]], known: Sequence[Tensor], call: str) -> Traced:
    """Evaluate f and find what it closes over; evaluate it again if something must be replaced.

    Args:
        evaluate: runs f and returns what it computed; called with grad mode on.
        known: the leaves that f is given, y first.
        call: how messages name the call.
    """
    since = sequence_number()
    values = evaluate()
    graph = Graph(values)
    own, hooked = _closed_over(graph, known)
    # Under another mode a leaf may itself be what that mode puts in the place of a tensor; later f runs without it.
    nested = bool(own) and has_torch_function_unary(values[0])
    if not hooked and not nested and (not own or graph.made_between(since, sequence_number())):
        return Traced(values, [Capture(leaf, None) for leaf in own], own, _leads_to(known[0], values, graph))
    return _trace_replacing(evaluate, graph, known, call)


def _trace_replacing(
    evaluate: Callable[[], Sequence[Tensor]], first: Graph, known: Sequence[Tensor], call: str
) -> Traced:
    """Evaluate f twice more: to see every tensor that it reads, and with fresh leaves in the place of some."""
    with Recording() as recording:
        values = evaluate()
    outside = first.nodes & Graph(values).nodes  # made once, read by both
    graph = Graph(values, outside)
    own, hooked = _closed_over(graph, known)
    nested = [get_gradient_edge(t)[:2] for t in own] if has_torch_function_unary(known[0]) else []
    replaced = recording.captures([*graph.foreign, *hooked, *nested])
    stand_ins = [c.tensor.detach().requires_grad_() for c in replaced]
    with replacing(replaced, stand_ins):
        values = evaluate()
    graph = Graph(values, outside)
    own, hooked = _closed_over(graph, [*known, *stand_ins])
    if graph.foreign or hooked:
        raise errors.untraceable(call, _name([*graph.foreign, *hooked][0]))
    captures = [*(Capture(leaf, None) for leaf in own), *replaced]
    return Traced(values, captures, [*own, *stand_ins], _leads_to(known[0], values, graph))


def _leads_to(leaf: Tensor, values: Sequence[Tensor], graph: Graph) -> bool:
    """Whether the first value leads to the leaf; `graph` is that of all values."""
    return (graph if len(values) == 1 else Graph(values[:1])).meets(leaf)


def replacing(captures: Sequence[Capture], stand_ins: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """A context in which f sees the stand-ins of those captured tensors that are replaced."""
    swapped = {id(c.read): t for c, t in zip(captures, stand_ins, strict=True) if c.read is not None}
    put = [(p, c.read) for c in captures for p in c.places if p[0].get(p[1]) is not c.read]
    if put:
        return _putting_back(put, Replacing(swapped))
    return Replacing(swapped) if swapped else nullcontext()


@contextmanager
def _putting_back(read: Sequence[tuple[Place, Tensor | None]], mode: Replacing) -> Generator[Replacing]:
    """Put tensors back into the places where f read them."""
    before = [(held, name, held.get(name)) for (held, name), _ in read]
    try:
        for (held, name), tensor in read:
            held[name] = tensor
        with mode:
            yield mode
    finally:
        for held, name, tensor in before:
            held[name] = tensor


def _closed_over(graph: Graph, known: Sequence[Tensor]) -> tuple[list[Tensor], list[Edge]]:
    """The leaves to use as they are, and the edges of those whose gradient hooks forbid it.

    autograd.grad would run the hooks on our inner gradient, and once more on the final one.
    """
    given = {id(t) for t in known}
    closed = [t for t in graph.leaves if id(t) not in given]
    return (
        [t for t in closed if not t._backward_hooks],
        [get_gradient_edge(t)[:2] for t in closed if t._backward_hooks],
    )


def _name(edge: Edge) -> str:
    node = edge[0]
    if isinstance(node, LEAF_NODE):
        return f"a leaf with gradient hooks, {errors.describe(getattr(node, 'variable'))}"
    return f"a tensor computed outside f by {node.name()}"

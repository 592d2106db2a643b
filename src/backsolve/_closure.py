"""Tensors that f reads without being given them become explicit inputs.

The graph of f(y) is the witness: whatever it ends in, other than y and the params, was closed over. Leaves (weights)
can be differentiated where they stand. Tensors with a history of their own are replaced by fresh leaves while f
runs, since a derivative with respect to such a tensor and one with respect to a leaf upstream of it would otherwise
overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode, has_torch_function_unary

from backsolve import errors
from backsolve._torch import LEAF_NODE, is_functorch_wrapped, sequence_number

Edge = tuple[Node, int]


class Reached:
    """Where the graph of a value ends.

    Attributes:
        leaves: the leaf tensors, in the order in which they are met.
        foreign: the edges into nodes that existed before `since`, that is, into tensors computed outside f.
    """

    __slots__ = ("foreign", "leaves")

    def __init__(self, value: Tensor, since: int) -> None:
        self.leaves: list[Tensor] = []
        self.foreign: list[Edge] = []
        if value.grad_fn is None:
            self.leaves += [value] if value.requires_grad else []
            return
        seen: set[Node | Edge] = set()
        stack: list[tuple[Node | None, int]] = [(value.grad_fn, value.output_nr)]
        while stack:
            node, output = stack.pop()
            if node is None:
                continue
            leaf = isinstance(node, LEAF_NODE)
            outside = not leaf and node._sequence_nr() < since
            mark = (node, output) if outside else node
            if mark in seen:
                continue
            seen.add(mark)
            if leaf:
                self.leaves.append(getattr(node, "variable"))
            elif outside:
                self.foreign.append((node, output))
            else:
                stack.extend(node.next_functions)

    def meets(self, leaf: Tensor) -> bool:
        """Whether this leaf is among those reached."""
        return any(t is leaf for t in self.leaves)


class Capture:
    """A tensor that f closes over.

    Attributes:
        tensor: what gradients flow to, an input of the implicit rule.
        read: the object that f reads, by whose identity it is replaced; None for a leaf, which f may go on reading.
    """

    __slots__ = ("read", "tensor")

    def __init__(self, tensor: Tensor, read: Tensor | None) -> None:
        self.tensor = tensor
        self.read = read


class Recording(TorchFunctionMode):
    """While active, keeps every tensor that torch functions are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, Tensor] = {}  # alive, so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
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
                view = tensor.view_as(tensor)
                if view.grad_fn is not None and view.grad_fn.next_functions[0] in wanted:
                    found.append(Capture(view, tensor))
        return found


class Replacing(TorchFunctionMode):
    """While active, torch functions see other tensors in the place of some, by identity."""

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self._replace(args), **self._replace(kwargs or {}))

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.replacements.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(self._replace(v) for v in value)
        if type(value) is dict:
            return {k: self._replace(v) for k, v in value.items()}
        return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in arbitrarily nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list):
        for v in value:
            yield from _tensors(v)
    elif type(value) is dict:
        yield from _tensors(tuple(value.values()))


def find_captures(
    evaluate: Callable[[], Tensor], value: Tensor, since: int, known: Sequence[Tensor], call: str
) -> tuple[Tensor, list[Capture], list[Tensor], bool]:
    """Find what f closes over, given one evaluation of it, and evaluate it again if something must be replaced.

    Args:
        evaluate: runs f; called with grad mode on.
        value: what it returned.
        since: the autograd sequence number before it ran.
        known: the leaves that f was given, y first.
        call: how messages name the call.

    Returns:
        The value whose graph to use, the captures, the leaf of that graph that stands for each, and whether the graph
        leads to y.
    """
    reached = Reached(value, since)
    if not reached.foreign and len(reached.leaves) == 1 and reached.leaves[0] is known[0]:
        return value, [], [], True  # the common case: nothing is closed over
    own, overlapping = _closed_over(reached, known)
    # Under another mode a leaf may itself be what that mode puts in the place of a tensor; later f runs without it.
    replaceable = [get_gradient_edge(t)[:2] for t in own] if has_torch_function_unary(value) else []
    if not overlapping and not replaceable:
        return value, [Capture(leaf, None) for leaf in own], own, reached.meets(known[0])
    with Recording() as recording:
        evaluate()
    replaced = recording.captures([*overlapping, *replaceable])
    stand_ins = [c.tensor.detach().requires_grad_() for c in replaced]
    since = sequence_number()
    with Replacing(replacements(replaced, stand_ins)):
        value = evaluate()
    reached = Reached(value, since)
    own, overlapping = _closed_over(reached, [*known, *stand_ins])
    if overlapping:
        raise errors.untraceable(call, _name(overlapping[0]))
    captures = [*(Capture(leaf, None) for leaf in own), *replaced]
    return value, captures, [*own, *stand_ins], reached.meets(known[0])


def replacements(captures: Sequence[Capture], stand_ins: Sequence[Tensor]) -> dict[int, Tensor]:
    """What f shall see in the place of the captured tensors that are replaced."""
    return {id(c.read): t for c, t in zip(captures, stand_ins, strict=True) if c.read is not None}


def _closed_over(reached: Reached, known: Sequence[Tensor]) -> tuple[list[Tensor], list[Edge]]:
    """Split what was reached into leaves to use as they are, and edges whose tensors must be replaced."""
    given = {id(t) for t in known}
    own: list[Tensor] = []
    overlapping = list(reached.foreign)
    for leaf in reached.leaves:
        if id(leaf) in given:
            continue
        if leaf._backward_hooks:  # autograd.grad would run them on our inner gradient, and once more on the final one
            overlapping.append(get_gradient_edge(leaf)[:2])
        else:
            own.append(leaf)
    return own, overlapping


def _name(edge: Edge) -> str:
    node = edge[0]
    if isinstance(node, LEAF_NODE):
        return f"a leaf with gradient hooks, {errors.describe(getattr(node, 'variable'))}"
    return f"a tensor computed outside f by {node.name()}"

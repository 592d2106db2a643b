"""Tensors that f reads without being given them become explicit inputs.

The graph of f(y) is the witness: whatever it ends in, other than y and the params, was closed over. Leaves (weights)
can be differentiated where they stand. Tensors with a history of their own are replaced by fresh leaves while f
runs, since a derivative with respect to such a tensor and one with respect to a leaf upstream of it would otherwise
overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode, has_torch_function_unary

from backsolve import errors
from backsolve._torch import LEAF_NODE, sequence_number

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


class Replacing(TorchFunctionMode):
    """While active, torch functions see other tensors in the place of some, by identity."""

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self.replace(args), **self.replace(kwargs or {}))

    def replace(self, value: Any) -> Any:
        """Swap tensors in arbitrarily nested tuples, lists and dicts."""
        if isinstance(value, Tensor):
            return self.replacements.get(id(value), value)
        if type(value) in (tuple, list):
            return type(value)(self.replace(v) for v in value)
        if type(value) is dict:
            return {k: self.replace(v) for k, v in value.items()}
        return value


class Capturing(Replacing):
    """Replaces the tensors behind the given edges by fresh leaves when it meets them, and keeps them as captures."""

    def __init__(self, edges: Iterable[Edge]) -> None:
        super().__init__({})
        self.edges = set(edges)
        self.captures: list[Capture] = []
        self.seen: dict[int, Tensor] = {}  # keeps every examined tensor alive, so that no id is used twice

    def replace(self, value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) not in self.seen:
            self.seen[id(value)] = value
            self._examine(value)
        return super().replace(value)

    def _examine(self, tensor: Tensor) -> None:
        if not tensor.requires_grad:
            return
        # A view is taken under the modes outside of this one, so inside the f of another Inverse it is a view of
        # what that one replaces the tensor with. Its graph leads to the tensor's own edge.
        with torch.enable_grad():
            alias = tensor.view_as(tensor)
        source = alias.grad_fn.next_functions[0] if alias.grad_fn is not None else None
        if source in self.edges:
            self.captures.append(Capture(alias, tensor))
            self.replacements[id(tensor)] = tensor.detach().requires_grad_()


def find_captures(
    evaluate: Callable[[], Tensor], value: Tensor, since: int, known: Sequence[Tensor], call: str
) -> tuple[Tensor, list[Capture], list[Tensor], bool]:
    """Find what f closes over, given one evaluation of it, and evaluate it again if something must be replaced.

    Args:
        evaluate: runs f with grad mode on.
        value: what it returned.
        since: the autograd sequence number before it ran.
        known: the leaves that f was given, y first.
        call: how messages name the call.

    Returns:
        The value whose graph to use, the captures, the leaf of that graph that stands for each, and whether it leads
        to y.
    """
    reached = Reached(value, since)
    own, overlapping = _closed_over(reached, known)
    # Under another mode a leaf may itself be what that mode puts in the place of a tensor, which f reads again without it.
    replaceable = [get_gradient_edge(t)[:2] for t in own] if has_torch_function_unary(value) else []
    if not overlapping and not replaceable:
        return value, [Capture(leaf, None) for leaf in own], own, reached.meets(known[0])
    mode = Capturing([*overlapping, *replaceable])
    since = sequence_number()
    with mode:
        value = evaluate()
    stand_ins = [mode.replacements[id(c.read)] for c in mode.captures]
    reached = Reached(value, since)
    own, overlapping = _closed_over(reached, [*known, *stand_ins])
    if overlapping:
        raise errors.untraceable(call, _name(overlapping[0]))
    captures = [*(Capture(leaf, None) for leaf in own), *mode.captures]
    return value, captures, [*own, *stand_ins], reached.meets(known[0])


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

"""The params of one call, which may be pytrees, as a flat tuple of tensors and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from backsolve._torch import alias


class _Slot:
    """Stands for a tensor in a tree of arguments."""


class Arguments:
    """The params of one call: `tensors` can carry a gradient, `rebuild` puts others in their place."""

    __slots__ = ("_leaves", "_structure", "tensors")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tensors: tuple[Tensor, ...]
        self._structure: pytree.TreeSpec | None = None
        if not kwargs and (not args or all(type(a) is Tensor or type(a) is Parameter for a in args)):
            self.tensors = args  # the common case, without the 4 us of a tree walk
            return
        self._leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self.tensors = tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    @property
    def empty(self) -> bool:
        """Whether there are no params at all."""
        return not self.tensors and self._structure is None

    def rebuild(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments, with these tensors in the place of the original ones."""
        if self._structure is None:
            return tuple(tensors), {}
        replacements = iter(tensors)
        leaves = [next(replacements) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._structure)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Arguments:
        """The same with other tensors."""
        return Arguments(*self.rebuild(tensors))

    def event_dims(self, named: Sequence[int] | Mapping[str, int] | None, default: int | None) -> list[int | None]:
        """The number of event dimensions of each tensor, from a tuple by position or a dict by keyword."""
        slots = [_Slot() for _ in self.tensors]
        args, kwargs = self.rebuild(slots)
        pairs = named.items() if isinstance(named, Mapping) else enumerate(named or ())
        given = dict(pairs)
        found: list[int | None] = []
        for key, value in (*enumerate(args), *kwargs.items()):
            slots = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, _Slot)]
            found += [given.get(key, default)] * len(slots)
        return found

    def through_modes(self) -> None:
        """Pass each tensor through the active torch function modes, as any torch function would.

        Inside the f of another inverse such a mode puts other tensors in the place of those that f closes over; an
        autograd.Function would not notice.
        """
        self.tensors = tuple(alias(t) for t in self.tensors)

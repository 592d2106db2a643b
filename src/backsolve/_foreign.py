"""Tensors of levels of torch.func that f reads without being given them, found while f runs on plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from backsolve._functorch import alive, current_level, is_functorch_wrapped, level_of, unwrap_once
from backsolve._levels import Peeled, tensors_in


class Unprepared(BaseException):
    """f reads a tensor that it must be given in another manner. No Exception: f must not catch it."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class Hidden(BaseException):
    """f hands a tensor of a level to a transform of its own, in whose wrapper nothing can stand for it."""


class Foreign(TorchFunctionMode):
    """While active, torch functions see plain leaves in the place of tensors of levels.

    Attributes:
        found: what was replaced, and by what.
    """

    def __init__(self, depth: int, known: list[Tensor], stand_in: Callable[[Tensor, Peeled], Tensor | None]) -> None:
        """Make one.

        Args:
            depth: the number of the innermost level of the call; what is numbered higher belongs to f.
            known: the leaves of f's graph, to which those that are found are added.
            stand_in: the leaf for a tensor, or None if it must become an input of f first.
        """
        super().__init__()
        self.depth = depth
        self.known = known
        self.stand_in = stand_in
        self.found: list[tuple[Tensor, Peeled, Tensor]] = []
        self._leaves: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}  # alive, so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if current_level() < self.depth:  # another Inverse works beneath the levels, with levels of its own
            result = func(*args, **(kwargs or {}))
        else:
            result = func(*self._give(args), **(self._give(kwargs) if kwargs else {}))
        for tensor in tensors_in(result):
            self._made[id(tensor)] = tensor
        return result

    def has_seen(self, value: Tensor) -> bool:
        """Whether a torch function made a value here: what another thread or another kind of code made, it may hide."""
        return id(value) in self._made or any(value is t for t in self.known)

    def forget(self) -> None:
        """Let go of what was made."""
        self._made.clear()

    def _give(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._plain(value) if is_functorch_wrapped(value) else value
        if isinstance(value, tuple):
            given = [self._give(v) for v in value]
            return type(value)(*given) if hasattr(value, "_fields") else tuple(given)
        if type(value) is list:
            return [self._give(v) for v in value]
        if type(value) is dict:
            return {k: self._give(v) for k, v in value.items()}
        return value

    def _plain(self, tensor: Tensor) -> Tensor:
        innermost = alive(tensor)
        while is_functorch_wrapped(innermost) and level_of(innermost) > self.depth:
            innermost = alive(unwrap_once(innermost)[0])
        if not is_functorch_wrapped(innermost):
            return tensor
        if level_of(tensor) > self.depth:
            raise Hidden
        if (leaf := self._leaves.get(id(tensor))) is None:
            peeled = Peeled(tensor)
            leaf = self.stand_in(tensor, peeled)
            if leaf is None:
                raise Unprepared(tensor)
            self.found.append((tensor, peeled, leaf))  # which keeps the tensor alive, so that no id is used twice
            self._leaves[id(tensor)] = leaf
            self.known.append(leaf)
        return leaf

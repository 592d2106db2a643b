"""f under levels of `vmap`: mapped dimensions become batch dimensions on the left, and f becomes `torch.vmap(f)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._closure import Capture, replacing
from backsolve._functorch import map_first_dims
from backsolve._levels import Mapping
from backsolve._linearize import Forward


class Mapped(Forward):
    """f as a function of y and a flat list of tensors, with mapped dimensions on the left of y."""

    __slots__ = ("captures", "inner", "mapping", "randomness")

    def __init__(
        self,
        inner: Forward,
        captures: Sequence[Capture],
        mapping: Mapping,
        inputs: Sequence[Tensor],
        randomness: Sequence[str] = (),
    ) -> None:
        super().__init__(inner.model, Arguments(tuple(inputs), {}), inner.implicit)
        self.inner = inner
        self.captures = captures
        self.mapping = mapping
        self.randomness = randomness or ("different",) * len(mapping)  # where it is an error, the level says so

    def __call__(self, y: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Evaluate f."""
        return self._map(lambda y, given: (self.inner(y, given),))(y, *tensors)[0]

    def with_entries(self, y: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """f(y) and, if the user knows J, its entries."""
        return self._map(self.inner.with_entries)(y, *tensors)

    def within(self, outer: Mapping, inputs: Sequence[Tensor]) -> Mapped:
        """The same f for inputs that have the dimensions of another mapping on the outside."""
        return Mapped(self.inner, self.captures, self.mapping.within(outer), inputs)

    def _map(self, evaluate: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, ...]]) -> Callable[..., Any]:
        n_params = len(self.inner.arguments.tensors)

        def of_tensors(y: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            if not self.captures:
                return evaluate(y, tensors[:n_params])
            with replacing(self.captures, tensors[n_params:]) as mode:
                values = evaluate(y, tensors[:n_params])
            for capture in self.captures:
                if id(capture.read) not in mode.met:  # its gradient would be 0
                    raise errors.no_longer_read(self.inner.model.call, errors.describe(capture.tensor))
            return values

        mapped = of_tensors
        for level in reversed(range(len(self.mapping))):
            mapped = self._over(mapped, level)
        return mapped

    def _over(self, function: Callable[..., Any], level: int) -> Callable[..., Any]:
        mapped = (True, *(m[level] for m in self.mapping.mapped))
        size, randomness = self.mapping.sizes[level], self.randomness[level]
        return lambda *tensors: map_first_dims(function, tensors, mapped, size, randomness)

"""f under levels of `vmap`: mapped dimensions become batch dimensions on the left, and f becomes `torch.vmap(f)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backsolve import errors
from backsolve._arguments import Arguments
from backsolve._closure import Capture, replacing
from backsolve._levels import Mapping
from backsolve._linearize import Forward


class Mapped(Forward):
    """f as a function of y and a flat list of tensors, with mapped dimensions on the left of y."""

    __slots__ = ("captures", "inner", "mapping")

    def __init__(self, inner: Forward, captures: Sequence[Capture], mapping: Mapping, inputs: Sequence[Tensor]) -> None:
        super().__init__(inner.model, Arguments(tuple(inputs), {}), inner.implicit)
        self.inner = inner
        self.captures = captures
        self.mapping = mapping

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
            in_dims = (0, *self.mapping.in_dims(level))
            mapped = torch.vmap(
                mapped, in_dims, randomness="different"
            )  # where it is an error, the level itself says so
        return mapped

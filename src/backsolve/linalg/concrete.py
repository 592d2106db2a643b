"""Work on numbers, below every transform: what branches on values, factorises, or calls a foreign library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from backsolve._torch import active_transform

Results = tuple[Tensor, ...]


def concretely(function: Callable[..., Results], *tensors: Tensor) -> Results:
    """Evaluate a function that needs plain tensors, without derivatives, under whatever transform is active.

    Args:
        function: takes the tensors and returns a tuple of tensors. It may branch on values, index by masks and raise.
            Dimensions that a `vmap` maps become the leftmost batch dimensions of every tensor and every result.
        tensors: with equally many batch dimensions on their left.
    """
    detached = [t.detach() for t in tensors]
    return function(*detached) if active_transform() is None else _Concrete.apply(function, *detached)


class _Concrete(torch.autograd.Function):
    """A function without derivatives, whose vmap rule calls it once for the whole batch."""

    @staticmethod
    def forward(function: Callable[..., Results], *tensors: Tensor) -> Results:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * (1 + len(ctx.needs_input_grad[1:]))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Results, tuple[int, ...]]:
        function, *tensors = args
        results = _Concrete.apply(function, *to_front(info.batch_size, in_dims[1:], tensors))
        return results, (0,) * len(results)


def to_front(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Make the mapped dimension the first one of every tensor, of those too that have none."""
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)
    ]

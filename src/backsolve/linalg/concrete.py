"""Work on numbers, below every transform: what branches on values, factorises, or calls a foreign library."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from backsolve import _levels
from backsolve._levels import Mapping
from backsolve._torch import active_transform

Results = tuple[Tensor, ...]


def concretely(function: Callable[..., Results], *tensors: Tensor) -> Results:
    """Evaluate a function that needs plain tensors, without derivatives, under whatever transform is active.

    Args:
        function: takes the tensors and returns a tuple of tensors. It may branch on values, index by masks and raise.
            Dimensions that a `vmap` maps become the leftmost batch dimensions of every tensor and every result.
        tensors: with equally many batch dimensions on their left.
    """
    if active_transform() is None:
        return function(*(t.detach() for t in tensors))

    def run(plain: Sequence[Tensor], mapping: Mapping) -> Results:
        return function(*(mapping.fill(t, k) for k, t in enumerate(plain)))

    return tuple(t for t in _levels.concretely(run, tensors) if t is not None)


def to_front(size: int, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Make the mapped dimension the first one of every tensor, of those too that have none."""
    return [
        t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)
    ]

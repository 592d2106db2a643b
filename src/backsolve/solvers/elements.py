"""An elementwise f on any part of its elements, so that finished ones cost nothing more."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backsolve._linearize import Forward

_WORTH_IT = 4096  # elements: below, the overhead of Python is what counts
_SAMPLE = 7


@dataclass(frozen=True)
class Elements:
    """f for the elements of one call.

    Attributes:
        forward: f with the params.
        shape: of y.
        params: the tensors among the params; those that have a value for each element are flat, of shape `(n,)`.
        own: which ones these are.
        divisible: whether f may be evaluated for a part of the elements, as a vector; all at once, otherwise.
    """

    forward: Forward
    shape: torch.Size
    params: tuple[Tensor, ...]
    own: tuple[bool, ...]
    divisible: bool

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def alike(self) -> bool:
        """Whether f is known to be the same function for all elements."""
        return self.divisible and not any(self.own)

    def own_params(self) -> list[Tensor]:
        """What a part of the elements takes its part of."""
        return [t for t, own in zip(self.params, self.own, strict=True) if own]

    def part(self, chosen: Tensor) -> Elements:
        """Some of the elements, as a vector."""
        params = tuple(t[chosen] if own else t for t, own in zip(self.params, self.own, strict=True))
        return replace(self, shape=chosen.shape, params=params)

    def value(self, y: Tensor, own_params: Iterable[Tensor]) -> Tensor:
        """f at a vector y, one number for each element that the params belong to."""
        if not self.divisible:
            return self.forward.value(y.expand(self.count).reshape(self.shape).contiguous()).reshape(-1)
        rest, y = iter(own_params), y.contiguous()  # torch.func.jvp, for one, takes no elements that share a memory
        return self.forward(y, [next(rest) if own else t for t, own in zip(self.params, self.own, strict=True)])

    def value_and_slope(self, y: Tensor, own_params: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """f and its derivative f' at a vector y."""
        with torch.inference_mode(False), torch.enable_grad():
            at = y.clone().requires_grad_()
            z = self.value(at, own_params)
        (slope,) = torch.autograd.grad(z, at, torch.ones_like(z))
        return z.detach(), slope


def alike(forward: Forward, shape: torch.Size, points: Tensor) -> Elements | None:
    """f as one function for all elements, if it looks like that."""
    tensors = tuple(t.detach() for t in forward.arguments.tensors)
    found = Elements(forward, shape, tensors, (False,) * len(tensors), True)
    return found if found.count >= _WORTH_IT and _is_divisible(found, points) else None


def each_its_own(forward: Forward, shape: torch.Size, points: Tensor) -> Elements:
    """f with the params of each element, if these broadcast against y; else f for all of them at once."""
    tensors = tuple(t.detach() for t in forward.arguments.tensors)
    whole = Elements(forward, shape, tensors, (False,) * len(tensors), False)
    if whole.count < _WORTH_IT:
        return whole
    flat = [_flattened(t, shape) for t in tensors]
    params = tuple(t if f is None else f for t, f in zip(tensors, flat, strict=True))
    found = Elements(forward, shape, params, tuple(f is not None for f in flat), True)
    return found if _is_divisible(found, points) else whole


def _flattened(t: Tensor, shape: torch.Size) -> Tensor | None:
    """The value of a param for each element, if it broadcasts against y; None if it has only one."""
    if t.numel() == 1 or t.dim() > len(shape):
        return None
    fits = all(n in (1, m) for n, m in zip(reversed(t.shape), reversed(shape)))  # noqa: B905 (from the right)
    return t.expand(shape).reshape(-1) if fits else None


def _is_divisible(elements: Elements, points: Tensor) -> bool:
    """Try f on a few elements, and on fewer of them: what it says of one must not depend on the company.

    Args:
        elements: as they would be if f is divisible.
        points: two at which f can be evaluated, of shape `(2,)`, or `(2, n)` for each element.
    """
    index = torch.arange(_SAMPLE, device=points.device)
    chosen = index * ((elements.count - 1) // (_SAMPLE - 1))
    y = points[index % 2, chosen] if points.dim() > 1 else points[index % 2]
    own = [t[chosen] for t in elements.own_params()]
    try:
        many = elements.value(y, own)
        few = elements.value(y[:-2], [t[:-2] for t in own])
    except Exception:  # noqa: BLE001 (f may raise whatever it likes for a shape that it does not expect)
        return False
    near = (many[:-2] - few).abs() <= many[:-2].abs() * torch.finfo(y.dtype).eps ** 0.5
    return bool((near | (many[:-2].isnan() & few.isnan())).all())

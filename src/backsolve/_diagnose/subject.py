"""The pair f and g at one sample: what every measurement works on."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from backsolve._arguments import Arguments
from backsolve._inverse import Inverse
from backsolve._linearize import Linearization, linearize
from backsolve._random import gaussian_like
from backsolve._solution import Solution
from backsolve._torch import without_autocast
from backsolve.jacobians import Default, Dense, Jacobian


@dataclass(frozen=True)
class Subject:
    """An Inverse, x and params without gradients, and the y that g found for them.

    Attributes:
        inv: the inverse under diagnosis.
        x: the sample, `(*batch, *event)`, detached.
        arguments: the params, detached.
        names: what to call each tensor of the params.
        y: `g(x)`, broadcast with the params.
        solution: what the inverse says about y, with failures ignored.
    """

    inv: Inverse
    x: Tensor
    arguments: Arguments
    names: tuple[str, ...]
    y: Tensor
    solution: Solution

    @property
    def event_dim(self) -> int:
        """The declared number of event dimensions."""
        return self.inv._options["event_dim"]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the params."""
        return self.arguments.tensors

    def f(self, y: Tensor, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """Evaluate f at y, in the grad mode of the caller."""
        args, kwargs = self.arguments.rebuild(self.tensors if tensors is None else tensors)
        with without_autocast(y.device):
            return self.inv._f(y, *args, **kwargs)

    @torch.no_grad()
    def g(self, x: Tensor, tensors: Sequence[Tensor] | None = None) -> Tensor:
        """Run g as the inverse does, on copies, so that nothing it writes to is the sample's."""
        copies = [t.clone() for t in (self.tensors if tensors is None else tensors)]
        args, kwargs = self.arguments.rebuild(copies)
        y = self.inv._problem.solver(x.clone(), *args, **kwargs)
        return torch.as_tensor(y, dtype=self.y.dtype, device=self.y.device).detach().clone()

    def twin(self, **options: Any) -> Inverse:
        """The same inverse with other options; failures are ignored, and nothing is probed."""
        changed = {**self.inv._options, "on_failure": "ignore", "verify": False, **options}
        return Inverse(self.inv._f, self.inv._solver, changed)

    def at(self, y: Tensor) -> Linearization:
        """Linearise f at y."""
        return linearize(self.inv._problem.bind(self.arguments, implicit=False), y)

    @cached_property
    def linearization(self) -> Linearization:
        """Linearise f at the sample, once."""
        return self.at(self.y)

    @property
    def jacobian(self) -> Jacobian:
        """The declared structure."""
        jacobian = self.inv._problem.rule.jacobian
        return Dense() if isinstance(jacobian, Default) else jacobian

    def per_unit(self, t: Tensor, unit_dims: int | None = None) -> Tensor:
        """The sum over each event."""
        k = self.event_dim if unit_dims is None else unit_dims
        return t.flatten(-k).sum(-1) if k else t

    @cached_property
    def good(self) -> Tensor:
        """Which events passed the residual test with a finite y, shape `(*batch,)`."""
        return self.solution.converged & ~self.per_unit((~self.y.isfinite()).to(self.y.dtype)).bool()

    def cotangent(self) -> Tensor:
        """A Gaussian cotangent of y that is 0 in events that failed."""
        u = gaussian_like(self.y)
        return torch.where(self.good.reshape(self.good.shape + (1,) * self.event_dim), u, 0.0)


def examine(inv: Inverse, x: Tensor, params: tuple[Any, ...], kwargs: dict[str, Any]) -> Subject:
    """Run g once and judge what it returned, without raising for a y that is wrong."""
    x, args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach(), (x, params, kwargs))
    quiet = Inverse(inv._f, inv._solver, {**inv._options, "on_failure": "ignore", "verify": False})
    with torch.no_grad():
        solution = quiet.solve(x, *args, **kwargs)
    y = solution.y.detach()
    return Subject(inv, x.expand(y.shape), Arguments(args, kwargs), _names(inv._f, args, kwargs), y, solution)


def _names(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    """What the signature of f calls each tensor; a path such as `options['rate']` for one inside a pytree."""
    positional: list[str] = []
    with suppress(TypeError, ValueError):  # builtins have no signature
        positional = [p.name for p in inspect.signature(f).parameters.values() if p.kind < p.VAR_POSITIONAL][1:]
    positional += [f"params[{i}]" for i in range(len(positional), len(args))]
    named = [*zip(positional, args, strict=False), *kwargs.items()]
    return tuple(
        name + pytree.keystr(path)
        for name, value in named
        for path, leaf in pytree.tree_flatten_with_path(value)[0]
        if isinstance(leaf, Tensor)
    )


def direction(t: Tensor) -> Tensor:
    """A Gaussian direction of the size of t, element by element, so that small steps keep signs and domains."""
    size = t.abs()
    typical = size[size > 0].mean() if (size > 0).any() else torch.ones((), dtype=t.dtype, device=t.device)
    return gaussian_like(t).clamp(-2, 2) * torch.where(size > 0, size, typical)


@contextmanager
def moved(tensors: Sequence[Tensor], steps: Sequence[Tensor]) -> Generator[None]:
    """A context in which tensors that f closes over have other values; afterwards they have their old bits.

    Written through `.data`, so that graphs made earlier do not see a change in place.
    """
    before = [t.data.clone() for t in tensors]
    try:
        for t, step in zip(tensors, steps, strict=True):
            t.data.add_(step)
        yield
    finally:
        for t, old in zip(tensors, before, strict=True):
            t.data.copy_(old)

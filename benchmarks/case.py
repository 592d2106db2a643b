"""What is measured: a problem, its size, and what is to be computed of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backsolve.jacobians import Jacobian

Function = Callable[..., Tensor]  # y = function(x, *params)
Run = Callable[[], Sequence[Any]]  # what is timed: it computes what a case asks for, once


@dataclass(frozen=True)
class Problem:
    """f, its inverse g, and what hand-written code knows about them.

    Attributes:
        name: of the function g.
        f: `f(y, *params) = x`, in torch.
        g: the solver; autograd need not see into it.
        exact: g as autograd sees through it, to second order: the oracle, used in float64.
        hand: an autograd.Function with the derivatives worked out by hand; `hand.apply(g, x, *params)`.
        inputs: x and the params in float64, given the sizes.
        in_jax: returns f and g in JAX; None for a g that answers from memory.
        closed_form: g in torch, if torch has it.
        entries: `df/dy`, if it is written down.
        event_dim: how many rightmost dimensions f mixes.
        dtype: the dtype to measure with.
        remembered: whether g answers from memory while it is measured, so that a long solver hides nothing.
        bounds: of y, where only f is known.
        by_samples: g of one sample, in pure Python.
        composable: an autograd.Function like `hand` that torch.func can transform; `composable.apply(x)`.
        floor: an autograd.Function that sees f only through autograd, where there is a shorter one than for any f.
        structures: what else than the default a user could declare of J, by name.
        contracts: whether `y - (f(y) - x)` is a contraction, so that packages for fixed points can take part.
    """

    name: str
    f: Function
    g: Function
    exact: Function
    hand: type[torch.autograd.Function]
    inputs: Callable[..., tuple[Tensor, ...]]
    in_jax: Callable[[], tuple[Callable[..., Any], Callable[..., Any] | None]]
    closed_form: Function | None = None
    entries: Function | None = None
    event_dim: int = 0
    dtype: torch.dtype = torch.float64
    remembered: bool = True
    composable: type[torch.autograd.Function] | None = None
    floor: type[torch.autograd.Function] | None = None
    structures: Mapping[str, Jacobian] = field(default_factory=dict)
    contracts: bool = False
    bounds: tuple[float, float] | None = None
    by_samples: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        problem: f and g.
        size: as `problem.inputs` takes it.
        contestants: who is measured; the first is the reference of the ratios.
        task: one of `TASKS`.
        memory: whether peaks of memory are measured too.
        quick: whether the row belongs to the quick version.
        device: where the tensors are.
        processes: whether other processes do the work: then the time that passes is measured, not that of the CPU.
    """

    problem: Problem
    size: tuple[int, ...]
    contestants: tuple[str, ...]
    task: str = "gradients"
    memory: bool = False
    quick: bool = False
    device: str = "cpu"
    processes: bool = False

    @property
    def name(self) -> str:
        """The problem, its size and the task."""
        n, *batch = self.size
        size = f"n = {n:,}" + "".join(f", batch {b}" for b in batch)
        notes = [self.task] * (self.task != "gradients") + ["GPU"] * (self.device != "cpu")
        return ", ".join([self.problem.name, size, *notes])

    @property
    def group(self) -> str:
        """The table that the row stands in."""
        if self.task == "Hessian-vector product":
            return "Second derivatives"
        if self.task == "inversion":
            return "Only f is known"
        if self.processes:
            return "One sample at a time, by two processes (time that passes)"
        if self.task == "compiled":
            return "Compiled"
        if self.task in UNDER_TORCH_FUNC:
            return "Transforms"
        if self.task != "gradients":
            return "Calls without a backward pass"
        if (self.problem.structures and not self.problem.entries) or self.problem.dtype == torch.float32:
            return "Structures"
        return "Dense" if self.problem.event_dim else "Elementwise"

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """x and the params."""
        torch.manual_seed(0)
        given = self.problem.inputs(*self.size)
        wanted = self.task not in ("no gradient", "inversion", *UNDER_TORCH_FUNC)
        return tuple(t.to(self.device, self.problem.dtype).detach().requires_grad_(wanted) for t in given)

    @cached_property
    def y(self) -> Tensor:
        """The solution, as g finds it."""
        return self.problem.g(*(t.detach() for t in self.inputs))

    @cached_property
    def v(self) -> Tensor:
        """The cotangent of y."""
        return self._random(self.y)

    @cached_property
    def u(self) -> list[Tensor]:
        """The vectors of a Hessian-vector product, one for each input."""
        return [self._random(t) for t in self.inputs]

    @property
    def g(self) -> Function:
        """The solver that the contestants are given."""
        if not self.problem.remembered:
            return self.problem.g
        y = self.y
        return lambda *_: y.clone()

    @property
    def tolerance(self) -> float:
        """What is further from the truth has lost half of the digits, and counts as wrong."""
        return torch.finfo(self.problem.dtype).eps ** 0.5

    @cached_property
    def expected(self) -> list[Tensor]:
        """The true answer, in float64."""
        inputs = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in self.inputs)
        results = TASKS[self.task](self.problem.exact, inputs, self.v.double(), [u.double() for u in self.u])
        return [r.detach() for r in results]

    def run(self, function: Function) -> Run:
        """What is timed, for a contestant that is a differentiable torch function of x and the params."""
        task, inputs, v, u = TASKS[self.task], self.inputs, self.v, self.u
        if self.task == "compiled":
            function = torch.compile(function, fullgraph=True)
        return lambda: task(function, inputs, v, u)

    def error(self, results: Sequence[Any]) -> float:
        """The largest error of those results that exist, relative to the largest entry of that result in truth."""
        pairs = zip(results, self.expected, strict=True)
        return max((_distance(torch.as_tensor(r), e) for r, e in pairs if r is not None), default=torch.inf)

    def _random(self, like: Tensor) -> Tensor:
        """Numbers between 1/2 and 3/2: nothing cancels, and no element is left out."""
        return torch.rand_like(like, requires_grad=False) + 0.5


def _distance(actual: Tensor, expected: Tensor) -> float:
    off = (actual.detach().to(expected).reshape(expected.shape) - expected).abs().max() / expected.abs().max()
    return off.nan_to_num(torch.inf).item()


def _gradients(function: Function, inputs: Sequence[Tensor], v: Tensor, _u: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.autograd.grad(function(*inputs), inputs, v, allow_unused=True)


def _hessian_vector(function: Function, inputs: Sequence[Tensor], v: Tensor, u: Sequence[Tensor]) -> Sequence[Tensor]:
    loss = (v * function(*inputs)).square().sum() / 2  # not linear: a linear one would hide what is forgotten
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return torch.autograd.grad(first, inputs, u, allow_unused=True)


def _value(function: Function, inputs: Sequence[Tensor], _v: Tensor, _u: Sequence[Tensor]) -> Sequence[Tensor]:
    return [function(*inputs)]


def _grad(function: Function, inputs: Sequence[Tensor], v: Tensor, _u: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.func.grad(lambda inputs: (v * function(*inputs)).sum())(tuple(inputs))


def _jvp(function: Function, inputs: Sequence[Tensor], _v: Tensor, u: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.func.jvp(function, tuple(inputs), tuple(u))


def _vmap_grad(function: Function, inputs: Sequence[Tensor], v: Tensor, _u: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.vmap(torch.func.grad(lambda inputs, v: v * function(*inputs)))(tuple(inputs), v)


def _hessian(function: Function, inputs: Sequence[Tensor], v: Tensor, _u: Sequence[Tensor]) -> Sequence[Tensor]:
    (x,) = inputs
    return [torch.func.hessian(lambda x: (v * function(x)).square().sum() / 2)(x)]


TASKS: dict[str, Callable[..., Sequence[Tensor]]] = {
    "gradients": _gradients,  # forward and backward
    "Hessian-vector product": _hessian_vector,
    "call only": _value,  # forward, ready for a backward pass
    "no gradient": _value,  # nothing needs one
    "inversion": _value,  # nor has anybody a g
    "compiled": _gradients,  # of the function that torch.compile makes
    "func.grad": _grad,
    "func.jvp": _jvp,
    "vmap(grad)": _vmap_grad,  # each element is a sample
    "func.hessian": _hessian,
}

UNDER_TORCH_FUNC = {
    "func.grad": "gradients",
    "func.jvp": "gradients",
    "vmap(grad)": "gradients",
    "func.hessian": "Hessian-vector product",
}
"""Which task is the same one for those who do without torch.func."""

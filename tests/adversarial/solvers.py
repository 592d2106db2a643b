"""Hostile g's: what they write to, what they return, what they raise, what they call themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backsolve import errors, inverse
from backsolve.solvers import numpy_solver
from tests.adversarial.outcome import BLACK_BOX, Case, W, X, compare, cubic, cubic_root, tensor

Pairs = Sequence[tuple[Tensor, Tensor]]


def with_g(g: Any, *, order: int = 2, **options: Any) -> Callable[[], Pairs]:
    """The cubic with another g."""
    return lambda: compare(inverse(cubic, g, **options), cubic_root, X.clone(), W.clone(), order=order)


def newton_by_autograd(x: Tensor, w: Tensor) -> Tensor:
    """g that differentiates f itself, with grad mode switched on inside."""
    y = torch.zeros_like(x)
    for _ in range(80):
        y = y.detach().requires_grad_()
        with torch.enable_grad():
            z = cubic(y, w)
            (slope,) = torch.autograd.grad(z.sum(), y)
        y = y.detach() - ((z - x) / slope).detach().clamp(-1, 1)
    return y


def newton_by_func(x: Tensor, w: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for _ in range(80):
        z, pull = torch.func.vjp(lambda y: cubic(y, w), y)
        y = y - ((z - x) / pull(torch.ones_like(y))[0]).clamp(-1, 1)
    return y


def optimised(x: Tensor, w: Tensor) -> Tensor:
    """g that trains y by an optimiser of torch, with backward() and .grad."""
    y = torch.zeros_like(x).requires_grad_()
    optimiser = torch.optim.LBFGS([y], lr=1, max_iter=200, tolerance_grad=1e-15, tolerance_change=1e-18)

    def loss() -> Tensor:
        with torch.enable_grad():
            optimiser.zero_grad()
            value = ((cubic(y, w) - x) ** 2).sum()
            value.backward()
        return value

    optimiser.step(loss)
    return y


class SameBuffer:
    """g that hands out one buffer again and again."""

    def __init__(self) -> None:
        self.buffer = torch.empty(3, dtype=torch.float64)

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        return self.buffer.copy_(cubic_root(x, w))


def one_buffer() -> Pairs:
    """Two solutions of one g must not be one tensor."""
    inv = inverse(cubic, SameBuffer())

    def twice(function: Any) -> Any:
        return lambda x, w: function(x, w) * function(2 * x, w)

    return compare(twice(inv), twice(cubic_root), X, W)


def view_of_x() -> Pairs:
    """y must stay what it is if the caller then writes into x."""

    def run(function: Any) -> Any:
        def changed(x: Tensor) -> Tensor:
            x = x * 1
            y = function(x)
            x.mul_(3)
            return y * y

        return changed

    return compare(run(inverse(lambda y: 1 * y, lambda x: x[:])), run(lambda x: 1 * x), X)


def inverse_inside(x: Tensor, w: Tensor) -> Tensor:
    """g that is itself made of an Inverse, called and differentiated."""
    with torch.enable_grad():
        root = inverse(cubic, BLACK_BOX)
        leaf = x.clone().requires_grad_()
        y = root(leaf, w)
        torch.autograd.grad(y.sum(), leaf)
    return y


def itself_inside() -> Pairs:
    """g calls the very Inverse that calls it, on a simpler problem, as a recursion does."""
    depth: list[int] = []

    def g(x: Tensor, w: Tensor) -> Tensor:
        if len(depth) < 3:
            depth.append(1)
            return inv(x, w)
        return cubic_root(x, w)

    inv = inverse(cubic, g)
    return compare(inv, cubic_root, X, W)


def polished() -> Pairs:
    """A float32 g for float64 work, polished; rounding leaves a few more units in the last place."""
    g = numpy_solver(lambda x, w: cubic_root(x, w, np).astype(np.float32))
    return compare(inverse(cubic, g, refine=3), cubic_root, X, W)


def in_place_on_its_own(x: Tensor, w: Tensor) -> Tensor:
    y = x.clone()
    y.copy_(cubic_root(x, w))
    return y


def clipped_through_numpy(x: Tensor, w: Tensor) -> Tensor:
    """Writes into the caller's x past autograd's count of changes: all is right for what stands there afterwards."""
    array = x.numpy()
    np.clip(array, -1, 1, out=array)
    return cubic_root(x, w)


def scaled_by_data(x: Tensor, w: Tensor) -> Tensor:
    """The same with the caller's w."""
    w.data.mul_(2)
    return cubic_root(x, w)


RIGHT: dict[str, Callable[[], Pairs]] = {
    "runs autograd": with_g(newton_by_autograd),
    "runs torch.func": with_g(newton_by_func),
    "runs an optimiser": with_g(optimised, refine=2),
    "returns a y with a graph": with_g(lambda x, w: torch.enable_grad()(cubic_root)(x.requires_grad_(), w)),
    "returns a non-contiguous y": with_g(lambda x, w: torch.stack([cubic_root(x, w)] * 2, -1)[..., 0]),
    "returns a view of x": view_of_x,
    "returns an expanded y": lambda: compare(
        inverse(cubic, lambda x, w: cubic_root(x[:1], w).expand(3)), cubic_root, X[:1].expand(3), W
    ),
    "returns a Parameter": with_g(lambda x, w: torch.nn.Parameter(cubic_root(x, w))),
    "returns an inference tensor": with_g(lambda x, w: torch.inference_mode()(cubic_root)(x, w)),
    "returns one buffer again and again": one_buffer,
    "writes into its own tensors": with_g(in_place_on_its_own),
    "writes into its NumPy arrays": with_g(numpy_solver(lambda x, w: np.add(x, 0, out=x) * 0 + cubic_root(x, w, np))),
    "returns a NumPy array": with_g(lambda x, w: cubic_root(x.numpy(), w.numpy(), np)),
    "is made of an Inverse": with_g(inverse_inside),
    "calls the Inverse that calls it": itself_inside,
    "is polished from float32": polished,
    "changes the global random state": with_g(lambda x, w: (torch.rand(3), cubic_root(x, w))[1]),
    "changes x through NumPy": with_g(clipped_through_numpy),
    "changes its param through .data": with_g(scaled_by_data),
    "switches grad mode on and leaves it on": with_g(lambda x, w: (torch.set_grad_enabled(True), cubic_root(x, w))[1]),
}  # fmt: skip


def no_gradient(g: Any) -> Callable[[], Pairs]:
    return with_g(g, order=1)


def raises(*_: Tensor) -> Tensor:
    raise ZeroDivisionError("the bracket is empty")


REFUSED: dict[str, tuple[Callable[[], Pairs], type[Exception]]] = {
    "changes x in place": (no_gradient(lambda x, w: cubic_root(x.mul_(1.0), w)), errors.SolverOutputError),
    "changes its param in place": (no_gradient(lambda x, w: cubic_root(x, w.mul_(1.0))), errors.SolverOutputError),
    "returns x": (no_gradient(lambda x, w: x), errors.ResidualError),
    "returns another dtype": (no_gradient(lambda x, w: cubic_root(x, w).float()), errors.SolverOutputError),
    "returns complex numbers": (no_gradient(lambda x, w: cubic_root(x, w) + 0j), errors.SolverOutputError),
    "returns complex NumPy numbers": (
        no_gradient(lambda x, w: cubic_root(x.numpy(), w.numpy(), np) + 0j), errors.SolverOutputError
    ),
    "returns integers": (no_gradient(lambda x, w: cubic_root(x, w).long()), errors.SolverOutputError),
    "returns a Python float": (no_gradient(lambda x, w: 0.5), errors.SolverOutputError),
    "returns a list": (no_gradient(lambda x, w: cubic_root(x, w).tolist()), errors.SolverOutputError),
    "returns a pair": (no_gradient(lambda x, w: (cubic_root(x, w), True)), errors.SolverOutputError),
    "returns None": (no_gradient(lambda x, w: None), errors.SolverOutputError),
    "returns another shape": (no_gradient(lambda x, w: cubic_root(x, w)[:2]), errors.SolverOutputError),
    "returns one dimension more": (no_gradient(lambda x, w: cubic_root(x, w)[None]), errors.SolverOutputError),
    "returns a meta tensor": (no_gradient(lambda x, w: torch.empty(3, device="meta")), errors.SolverOutputError),
    "returns a sparse tensor": (no_gradient(lambda x, w: cubic_root(x, w).to_sparse()), errors.SolverOutputError),
    "returns NaN": (no_gradient(lambda x, w: x * torch.nan), errors.ResidualError),
    "returns another branch": (
        lambda: compare(inverse(torch.sin, lambda x: torch.asin(x) + 7), torch.asin, tensor(0.1, 0.2)),
        errors.ResidualError,
    ),
    "has not converged": (no_gradient(lambda x, w: cubic_root(x, w) * (1 + 1e-6)), errors.ResidualError),
    "confuses its arguments": (no_gradient(lambda x, w: cubic_root(w + 0 * x, x.abs())), errors.ResidualError),
    "couples the batch": (no_gradient(lambda x, w: cubic_root(x - x.mean(), w)), errors.ResidualError),
    "raises": (no_gradient(raises), ZeroDivisionError),
    "takes other arguments": (no_gradient(lambda x: x), TypeError),
}  # fmt: skip

SOLVERS = [
    *(Case(f"g {name}", "right", run) for name, run in RIGHT.items()),
    *(Case(f"g {name}", "refused", run, error) for name, (run, error) in REFUSED.items()),
]

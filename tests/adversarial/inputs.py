"""Hostile x and params: shapes, strides, dtypes, devices, special values, aliases."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special
import torch
from torch import Tensor

from backsolve import errors, inverse
from backsolve.solvers import numpy_solver
from tests.adversarial.outcome import BLACK_BOX, Case, W, X, compare, cubic, cubic_root, tensor

PLAIN = inverse(cubic, BLACK_BOX)


def plain(x: Tensor, w: Tensor = W) -> Any:
    return lambda: compare(PLAIN, cubic_root, x, w)


GRID = torch.linspace(-2.0, 2.0, 24, dtype=torch.float64)

SHAPES = {
    "a 0-d x": GRID[3],
    "one element": GRID[3:4],
    "six dimensions": GRID.reshape(1, 2, 3, 1, 2, 2),
    "no elements": GRID[:0],
    "an empty batch of rows": GRID.reshape(8, 3)[:0],
    "rows without elements": GRID.reshape(8, 3)[:, :0],
    "transposed": GRID.reshape(4, 6).T,
    "every third": GRID[::3],
    "expanded": GRID[:3].expand(4, 3),
    "expanded from one": GRID[:1].expand(5),
    "flipped": GRID.flip(0),
    "overlapping windows": GRID.unfold(0, 4, 2),
    "channels last": GRID.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "with an offset in its storage": GRID[5:],
    "permuted and cut": GRID.reshape(2, 3, 4).permute(2, 0, 1)[1:, :, ::2],
}


def low_precision(dtype: torch.dtype) -> Any:
    """The oracle is the float64 derivative at the rounded inputs, where f' is of size 1 to 40."""

    def run() -> list[tuple[Tensor, Tensor]]:
        x, w = X.to(dtype), W.to(dtype)
        pairs = compare(inverse(cubic, BLACK_BOX, residual_tol=0.05), cubic_root, x, w, order=1)
        exact = compare(cubic_root, cubic_root, x.double(), w.double(), order=1)
        return [(mine, right) for (mine, _), (right, _) in zip(pairs, exact, strict=True)]

    return run


def matrices(*shape: int) -> Tensor:
    noise = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 7).reshape(shape)
    return 2 * torch.eye(shape[-1], dtype=torch.float64) + 0.3 * noise


def linear(x: Tensor, a: Tensor) -> Any:
    inv = inverse(
        lambda y, a: (a @ y[..., None])[..., 0],
        numpy_solver(lambda x, a: np.linalg.solve(a, x[..., None])[..., 0]),
        event_dim=1,
    )
    return lambda: compare(inv, lambda x, a: torch.linalg.solve(a, x[..., None])[..., 0], x, a)


def refusing(make: Callable[[], Any], g: Any = cubic_root) -> Any:
    def run() -> list[tuple[Tensor, Tensor]]:
        y = inverse(cubic, g)(make())
        return [(y, torch.full_like(y, torch.nan))]

    return run


def special_values() -> list[tuple[Tensor, Tensor]]:
    """0, subnormal and huge numbers; y = x / 2 rounds in the subnormal range."""
    x = tensor(0.0, -0.0, 5e-324, 1e-310, 1e-300, 1e300, -1e308)
    return compare(inverse(lambda y: 2 * y, lambda x: x / 2), lambda x: x / 2, x[[0, 1, 3, 4, 5, 6]], order=1)


def infinite() -> list[tuple[Tensor, Tensor]]:
    """exp(y) = inf at y = inf: the value is right; the derivative there is 0 as in torch, or refused."""
    y = inverse(torch.log, torch.exp)(tensor(math.inf, 1.0))
    return [(y, tensor(math.inf, math.e))]


def frozen() -> list[tuple[Tensor, Tensor]]:
    """A frozen param gets nothing, and the others all."""
    x, w = X.clone().requires_grad_(), W.clone()
    y = PLAIN(x, w)
    y.sum().backward()
    exact = compare(cubic_root, cubic_root, X, W, order=0)
    (slope,) = torch.autograd.grad(cubic_root(x, w).sum(), x)
    assert w.grad is None
    assert x.grad is not None
    return [(y, exact[0][0]), (x.grad, slope)]


def without_derivative(*, wanted: bool) -> Any:
    """torch has no derivative of gammaincc in its first argument; the one in y is asked for alone, or both."""

    def run() -> list[tuple[Tensor, Tensor]]:
        a, x = tensor(2.0)[0].requires_grad_(wanted), tensor(0.2, 0.7).requires_grad_()
        inv = inverse(
            lambda y, a: torch.special.gammaincc(a, y), numpy_solver(lambda x, a: scipy.special.gammainccinv(a, x))
        )
        y = inv(x, a)
        y.sum().backward()
        assert x.grad is not None
        return [(x.grad, -torch.exp(y.detach()) / y.detach())]  # d gammaincc(2, y) / dy = -y exp(-y)

    return run


def twice(x: Tensor, w: Tensor) -> list[tuple[Tensor, Tensor]]:
    inv = inverse(lambda y, a, b: a * y + b * y**3, lambda x, a, b: cubic_root(x, a))
    return compare(lambda x, w: inv(x, w, w), cubic_root, x, w)


def aliases() -> list[tuple[Tensor, Tensor]]:
    """x and the param are views of one tensor."""
    both = torch.cat([X, tensor(1.5, 2.5, 0.7)])
    return compare(lambda t: PLAIN(t[:3], t[3:]), lambda t: cubic_root(t[:3], t[3:]), both)


def itself() -> list[tuple[Tensor, Tensor]]:
    """y + x y^3 = x: one tensor as x and as param."""

    def root(x: Any, p: Any, m: Any) -> Any:
        return 2 / m.sqrt(3 * p) * m.sinh(m.arcsinh(1.5 * x * m.sqrt(3 * p)) / 3)

    inv = inverse(lambda y, p: y + p * y**3, numpy_solver(lambda x, p: root(x, p, np)))
    return compare(lambda x: inv(x, x), lambda x: root(x, x, torch), tensor(0.5, 1.0, 3.0))


def solution_as_param() -> list[tuple[Tensor, Tensor]]:
    def chain(function: Any) -> Any:
        return lambda x, w: function(x, function(x, w) ** 2 + 1)

    return compare(chain(PLAIN), chain(cubic_root), X, W)


class Tagged(Tensor):
    """A subclass without behaviour of its own."""


def tagged() -> list[tuple[Tensor, Tensor]]:
    x = X.as_subclass(Tagged)
    return [(a.as_subclass(Tensor), b.as_subclass(Tensor)) for a, b in compare(PLAIN, cubic_root, x, W, order=1)]


def lazily_negative() -> Tensor:
    """The imaginary part of a conjugate: a view whose sign is a flag, which NumPy cannot read."""
    x = torch.complex(X, -X).conj().imag
    assert x.is_neg()
    return x


def without_history(make: Callable[[], Tensor]) -> Any:
    """A tensor of inference mode in the place of x, and a param that is trained."""

    def run() -> list[tuple[Tensor, Tensor]]:
        with torch.inference_mode():
            x = make()
        return compare(lambda w: PLAIN(x, w), lambda w: cubic_root(X, w), W)

    return run


def inference_param() -> list[tuple[Tensor, Tensor]]:
    """torch saves no such tensor for a backward pass."""
    with torch.inference_mode():
        w = W.clone()
    return compare(lambda x: PLAIN(x, w), lambda x: cubic_root(x, W), X)


class Plain:
    """Holds a tensor, and is no pytree."""

    def __init__(self, w: Tensor) -> None:
        self.w = w


def in_an_object() -> list[tuple[Tensor, Tensor]]:
    inv = inverse(lambda y, o: cubic(y, o.w), lambda x, o: cubic_root(x, o.w.detach()))
    return compare(lambda x, w: inv(x, Plain(w)), cubic_root, X, W)


def no_tensor(value: Any) -> Any:
    inv = inverse(lambda y, w: cubic(y, float(w)), lambda x, w: cubic_root(x, float(w)))
    return lambda: compare(lambda x: inv(x, value), lambda x: cubic_root(x, 1.5), X)


def param_and_closure() -> list[tuple[Tensor, Tensor]]:
    """One tensor as a param and, unseen, inside f: its gradient has both parts."""

    def actual(x: Tensor, w: Tensor) -> Tensor:
        return inverse(lambda y, p: p * y + w * y**3, lambda x, p: cubic_root(x, p))(x, w)

    return compare(actual, cubic_root, X, W, order=3)


def x_and_closure() -> list[tuple[Tensor, Tensor]]:
    """f reads x itself."""

    def actual(x: Tensor, w: Tensor) -> Tensor:
        return inverse(lambda y, w: cubic(y, w) + x / 2, lambda x, w: cubic_root(x / 2, w))(x, w)

    return compare(actual, lambda x, w: cubic_root(x / 2, w), X, W, order=3)


def compressed() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
        return torch.eye(2, dtype=torch.float64).to_sparse_csr()


NO_X: dict[str, Callable[[], Any]] = {
    "int64": lambda: torch.ones(3, dtype=torch.int64),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "a float": lambda: 0.5,
    "None": lambda: None,
    "a list": lambda: [0.5],
    "a NumPy array": lambda: np.ones(3),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(2, dtype=torch.float64).to_sparse(),
    "sparse, by rows": compressed,
    "on the meta device": lambda: torch.empty(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}

RIGHT: dict[str, Any] = {
    **{f"x: {name}": plain(x) for name, x in SHAPES.items()},
    **{f"x: {dtype}": low_precision(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)},
    "x: a Parameter": lambda: compare(lambda x: PLAIN(x, W), lambda x: cubic_root(x, W), torch.nn.Parameter(X)),
    "x: a subclass of Tensor": tagged,
    "x: lazily negative": lambda: compare(PLAIN, cubic_root, lazily_negative(), W),
    "x: made in inference mode": without_history(X.clone),
    "x: zeros, subnormal and huge": special_values,
    "x: infinite, and rightly so": infinite,
    "param: larger than x": plain(X, tensor(1.0, 2.0)[:, None]),
    "param: smaller than x": plain(GRID.reshape(2, 3, 4), tensor(1.0, 2.0, 3.0)[:, None]),
    "param: no elements, x one": plain(X[:1], tensor(1.0, 2.0)[:0]),
    "param: one matrix for all events": linear(GRID.reshape(8, 3), matrices(3, 3)),
    "param: a matrix for each event": linear(GRID.reshape(8, 3), matrices(8, 3, 3)),
    "param: a batch of matrices, one x": linear(X, matrices(4, 3, 3)),
    "param: an empty batch of matrices": linear(X, matrices(0, 3, 3)),
    "param: frozen": frozen,
    "param: without derivative in torch, frozen": without_derivative(wanted=False),
    "param: inside an object": in_an_object,
    "param: a Python number": no_tensor(1.5),
    "param: a NumPy array": no_tensor(np.array(1.5)),
    "param: closed over, too": param_and_closure,
    "param: x, closed over": x_and_closure,
    "param: used twice": lambda: twice(X, W),
    "param: a view of the tensor of which x is one": aliases,
    "param: x itself": itself,
    "param: another solution": solution_as_param,
}

REFUSED: dict[str, tuple[Any, type[Exception]]] = {
    **{f"x: {name}": (refusing(make), errors.ArgumentError) for name, make in NO_X.items()},
    "x: NaN": (refusing(lambda: tensor(math.nan, 1.0)), errors.ResidualError),
    "x: infinite for a finite y": (
        refusing(lambda: tensor(math.inf), lambda x: x.clamp(max=1e3)), errors.ResidualError
    ),
    "param: on the meta device": (
        lambda: compare(PLAIN, cubic_root, X, torch.empty(3, device="meta")), errors.ArgumentError
    ),
    "param: made in inference mode": (inference_param, RuntimeError),  # torch's own
    "param: that does not broadcast": (plain(X, tensor(1.0, 2.0)), ValueError),  # NumPy's own, out of g
    "param: without derivative in torch, wanted": (without_derivative(wanted=True), NotImplementedError),  # torch's own
}  # fmt: skip

INPUTS = [
    *(Case(name, "right", run) for name, run in RIGHT.items()),
    *(Case(name, "refused", run, error) for name, (run, error) in REFUSED.items()),
]

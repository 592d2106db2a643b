"""Where a transform meets code that runs later, elsewhere or inside of another `Inverse`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap

from backsolve import Dense, errors, inverse
from backsolve.jacobians import Constrained, MinimumNorm, Symmetric
from backsolve.solvers import Bracket, FixedPoint, Newton, numpy_solver
from tests.test_transforms import assert_same
from tests.transforms import OF_X, Transform, loss

X = torch.linspace(-1, 1, 5, dtype=torch.float64)
A = X + 3


def asinh(x: Tensor, a: Tensor) -> Tensor:
    return torch.asinh(x / a)


def sinh(x: Tensor, a: Tensor) -> Tensor:
    return a * torch.sinh(x / a)


scaled = inverse(lambda y, a: a * y.sinh(), numpy_solver(lambda x, a: np.arcsinh(x / a)))

TRANSFORMS: dict[str, Transform] = {
    "grad": lambda h, i: grad(loss(h), (0, 1))(*i),
    "vmap": lambda h, i: vmap(h)(*i),
    "vmap(grad)": lambda h, i: vmap(grad(h, (0, 1)), in_dims=(None, 0))(i[0][0], i[1]),
    "hessian": lambda h, i: hessian(loss(h), (0, 1))(*i),
    "jacfwd": lambda h, i: jacfwd(h, (0, 1))(*i),
    "jvp": lambda h, i: jvp(h, i, i[::-1]),
}


def explicit_inside_f(x: Tensor, a: Tensor) -> Tensor:
    return inverse(lambda y, a: scaled(y, a) * a, numpy_solver(lambda x, a: a * np.sinh(x / a)))(x, a)


def closed_over_inside_f(x: Tensor, a: Tensor) -> Tensor:
    inner = inverse(lambda y: a * y.sinh(), lambda x: asinh(x, a))
    return inverse(lambda y: inner(y) * a, lambda x: sinh(x, a))(x)


def closed_over_inside_g(x: Tensor, a: Tensor) -> Tensor:
    inner = inverse(lambda y: a * y.sinh(), lambda x: asinh(x, a))
    return inverse(lambda y: a * y.sinh(), lambda x: inner(x))(x)


@pytest.mark.parametrize("transform", [pytest.param(t, id=name) for name, t in TRANSFORMS.items()])
@pytest.mark.parametrize(
    ("ours", "exact"), [(explicit_inside_f, sinh), (closed_over_inside_f, sinh), (closed_over_inside_g, asinh)]
)
def test_an_inverse_inside_another(ours: Any, exact: Any, transform: Transform) -> None:
    assert_same(transform(ours, (X, A)), transform(exact, (X, A)))


def scaled_sinh(y: Tensor, a: Tensor) -> Tensor:
    return a * y.sinh()


def linear(y: Tensor, a: Tensor) -> Tensor:
    return (a @ y[..., None])[..., 0]


def symmetric_root(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    return vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT


def numpy_root(x: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(x)
    return vectors @ (np.sqrt(values)[..., None] * vectors.swapaxes(-1, -2))


SMALL = (X[1:4] / 2, A[1:4] / 4)  # where FixedPoint contracts
WIDE = (
    torch.tensor([1.0, -2.0], dtype=torch.float64),
    torch.tensor([[2.0, 1.0, 0.5], [0.3, -1.0, 2.0]], dtype=torch.float64),
)
off_by_a_little = numpy_solver(lambda x, a: np.arcsinh(x / a) + 1e-5)
OTHERS: dict[str, tuple[Any, Any, tuple[Tensor, ...]]] = {
    "Newton": (inverse(scaled_sinh, Newton(0.0)), asinh, SMALL),
    "Bracket": (inverse(scaled_sinh, Bracket(-9.0, 9.0)), asinh, SMALL),
    "FixedPoint": (inverse(scaled_sinh, FixedPoint()), asinh, SMALL),
    "refine": (inverse(scaled_sinh, off_by_a_little, refine=5), asinh, SMALL),
    "MinimumNorm": (
        inverse(
            linear,
            numpy_solver(lambda x, a: (np.linalg.pinv(a) @ x[..., None])[..., 0]),
            event_dim=1,
            jacobian=Dense(gauge=MinimumNorm()),
        ),
        lambda x, a: linear(x, a.mT @ torch.linalg.inv(a @ a.mT)),
        WIDE,
    ),
    "Constrained": (
        inverse(
            lambda y, a: a * y.sum(-1, keepdim=True),
            numpy_solver(lambda x, a: np.concatenate([0.75 * x / a, 0.25 * x / a], -1)),
            event_dim=1,
            jacobian=Dense(gauge=Constrained(lambda y: y[..., :1] - 3 * y[..., 1:])),
        ),
        lambda x, a: torch.cat([0.75 * x / a, 0.25 * x / a], -1),
        (torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)),
    ),
    "Symmetric": (
        inverse(lambda y: y @ y, numpy_solver(numpy_root), event_dim=2, jacobian=Dense(subspace=Symmetric())),
        lambda x: symmetric_root((x + x.mT) / 2),
        (torch.tensor([[4.0, 1.0], [1.0, 9.0]], dtype=torch.float64),),
    ),
}
SOME = ("grad x", "jvp all", "jacrev", "jacfwd", "hessian", "vmap all, out_dims=1", "vmap(grad) all", "jvp(vmap(grad))")


@pytest.mark.parametrize("transform", SOME)
@pytest.mark.parametrize("name", OTHERS)
def test_other_solvers_and_equations(name: str, transform: str) -> None:
    inv, exact, inputs = OTHERS[name]
    assert_same(OF_X[transform](inv, inputs), OF_X[transform](exact, inputs))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_inside_f(transform: str) -> None:
    """f is the derivative of a potential, as in the flows of convex ones; its closed-over a is read by its product."""

    def ours(x: Tensor, a: Tensor) -> Tensor:
        return inverse(lambda y: grad(lambda y: (a * y.cosh()).sum())(y), lambda x: asinh(x, a))(x)

    assert_same(TRANSFORMS[transform](ours, (X, A)), TRANSFORMS[transform](asinh, (X, A)))


def test_a_tensor_hidden_in_a_transform_inside_f_is_refused() -> None:
    """vmap shows f a wrapper of a that is made anew each time, so that nothing can stand for a later."""

    def ours(a: Tensor) -> Tensor:
        return inverse(lambda y: vmap(scaled_sinh)(y, a), lambda x: asinh(x, a))(X).sum()

    for transform in (grad, jacfwd, hessian):
        with pytest.raises(errors.TransformError, match="a transform of its own"):
            transform(ours)(A)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_an_f_that_draws_numbers(randomness: str) -> None:
    """It is evaluated under vmaps of ours, which leave the decision to the user's."""
    inv = inverse(lambda y: y.sinh() * (1 + 0 * torch.rand_like(y)), lambda x: x.asinh())
    assert_same(vmap(inv, randomness=randomness)(X), X.asinh())
    assert_same(vmap(grad(inv), randomness=randomness)(X), 1 / (1 + X**2).sqrt())
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(inv)(X)
    noisy = inverse(lambda y: y + torch.rand_like(y), lambda x: x)
    with pytest.raises(errors.ResidualError):
        vmap(noisy, randomness=randomness)(X)


class Warp(nn.Module):
    """f and g read the weight of the module."""

    def __init__(self, trainable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(A.clone(), trainable)
        self.invert = inverse(lambda y: self.weight * y.sinh(), lambda x: asinh(x, self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.invert(x)


WARPS = {trainable: Warp(trainable) for trainable in (True, False)}


def call_with(weight: Tensor, x: Tensor = X, *, trainable: bool = True) -> Tensor:
    return functional_call(WARPS[trainable], {"weight": weight}, (x,))


def test_functional_call_in_the_forward_direction() -> None:
    assert_same(vmap(call_with)(torch.stack([A + 1, A])), vmap(lambda w: asinh(X, w))(torch.stack([A + 1, A])))
    assert_same(jacfwd(call_with)(A + 1), jacfwd(lambda w: asinh(X, w))(A + 1))


def test_backward_of_functional_call() -> None:
    """The graph of the call has the weights of the call."""
    ours, exact = ((A + 1).requires_grad_() for _ in range(2))
    loss(call_with)(ours).backward()
    loss(lambda w: asinh(X, w))(exact).backward()
    assert_same(ours.grad, exact.grad)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("change", [0, 1])
def test_gradient_of_functional_call(change: int, trainable: bool) -> None:
    """f has its original weight again when the gradient is taken."""
    got = grad(lambda w: call_with(w, trainable=trainable).sum())(A + change)
    assert_same(got, grad(lambda w: asinh(X, w).sum())(A + change))


def test_a_swapped_weight_without_a_derivative() -> None:
    got = grad(lambda x: call_with(A + 1, x, trainable=False).sum())(X)
    assert_same(got, grad(lambda x: asinh(x, A + 1).sum())(X))


def test_what_f_reads_changes_before_the_derivative() -> None:
    """The graph of the call has the value of the call; a change in place would be seen in it, and is refused."""
    held = [A.clone()]
    x = X[:2]
    pull: Any = vjp(inverse(lambda y: held[0][:2] * y.sinh(), lambda x: asinh(x, held[0][:2])), x)[1]
    expected = vjp(lambda x: asinh(x, A[:2]), x)[1](torch.ones_like(x))
    held[:] = [held[0] * 2]
    assert_same(pull(torch.ones_like(x)), expected)
    pull = vjp(inverse(lambda y: held[0] * y.sinh(), lambda x: asinh(x, held[0])), X)[1]
    held[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pull(torch.ones_like(X))


def test_what_f_reads_changes_before_a_second_derivative() -> None:
    """That is worked out from f as it has become."""
    held = [A.clone()]

    def inside(x: Tensor) -> Tensor:
        y = inverse(lambda y: held[0] * y.sinh(), lambda x: asinh(x, held[0]))(x)
        (slope,) = torch.autograd.grad(loss(lambda y: y)(y), x, create_graph=True)
        held[:] = [held[0] * 2]
        return slope.square().sum()

    with pytest.raises(errors.StructureError, match="another value at the same y"):
        grad(inside)(X)

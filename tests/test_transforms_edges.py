"""Where a transform meets code that runs later, elsewhere or inside of another `Inverse`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vjp, vmap

from backsolve import errors, inverse
from backsolve.solvers import numpy_solver
from tests.test_transforms import assert_same
from tests.transforms import Transform, loss

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


@pytest.mark.parametrize("in_place", [True, False])
def test_what_f_reads_changes_before_the_derivative(in_place: bool) -> None:
    held = [A.clone()]
    pull: Any = vjp(inverse(lambda y: held[0] * y.sinh(), lambda x: asinh(x, held[0])), X)[1]
    held[:] = [held[0].mul_(2) if in_place else held[0] * 2]
    with pytest.raises(errors.StructureError, match="another value at the same y"):
        pull(torch.ones_like(X))

"""Tests of inverse_differentiation_layer, the original module's names on top of backsolve.

The first class keeps the names of the original tests, which ran in float32 to within one per cent. Here they run in
float64, and every gradient is compared with what autograd finds through an explicit inverse, to rounding error.
"""

import unittest
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import gradgradcheck

import inverse_differentiation_layer
from backsolve.errors import ArgumentError, DerivativeError, ResidualError, SingularJacobianError
from inverse_differentiation_layer import (
    ImplicitInverseLayer,
    ImplicitInverseLayerAuto,
    ImplicitInverseLayerAutomatic,
    ImplicitInverseLayerBase,
    batch_jacobian,
    implicit_inverse_layer,
)

# On the domain below neither the Jacobians nor their derivatives magnify a rounding error by more than about 20.
ROUNDING = 64 * torch.finfo(torch.float64).eps

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """f and an explicit inverse of it for y in [0.2, 1.2]^n, inside one branch of either function."""

    f: Function
    g: Function
    n: int

    def points(self, b: int = 64) -> tuple[Tensor, Tensor]:
        """Return `x = f(y)` and y, each of shape (b, n)."""
        generator = torch.Generator().manual_seed(self.n)
        y = 0.2 + torch.rand((b, self.n), generator=generator, dtype=torch.float64)
        return self.f(y), y


PAIRS = {
    "sin": Pair(torch.sin, torch.asin, 1),
    "cos": Pair(torch.cos, torch.acos, 1),
    "x^2": Pair(torch.square, torch.sqrt, 1),
    "sin of five": Pair(torch.sin, torch.asin, 5),
    # J is antidiagonal: rows and columns must not be mixed up.
    "two_angles": Pair(
        lambda y: torch.stack([torch.cos(y[:, 1]), torch.sin(y[:, 0])], dim=-1),
        lambda x: torch.stack([torch.asin(x[:, 1]), torch.acos(x[:, 0])], dim=-1),
        2,
    ),
    # J = [[1, 2 y_1], [0, cosh y_1]] couples the elements and is not symmetric.
    "shear": Pair(
        lambda y: torch.stack([y[:, 0] + y[:, 1] ** 2, torch.sinh(y[:, 1])], dim=-1),
        lambda x: torch.stack([x[:, 0] - torch.asinh(x[:, 1]) ** 2, torch.asinh(x[:, 1])], dim=-1),
        2,
    ),
}
pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def blind(g: Function) -> Function:
    """g as any code outside torch would be: autograd sees nothing of it."""
    return lambda x: g(x.detach()).clone()


def by_function(g: Function, f: Function) -> Function:
    return lambda x: implicit_inverse_layer(x, blind(g), forward_func=f)


def by_jacobian(g: Function, jacobian: Tensor) -> Function:
    return lambda x: implicit_inverse_layer(x, blind(g), forward_jacobian=jacobian)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def loss(y: Tensor) -> Tensor:
    """A loss with another weight for each element of y, so that no two of them can be exchanged unnoticed."""
    return (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()


def gradient(layer: Function, x: Tensor) -> Tensor:
    x = leaf(x)
    return torch.autograd.grad(loss(layer(x)), x)[0]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)


class ImplicitDifferentiation(unittest.TestCase):
    """The original tests: every gradient equals that of an explicit inverse, which real applications do not have."""

    def test_batch_jacobian(self, b: int = 64, max_dim: int = 10) -> None:
        functions: dict[str, tuple[Function, Function]] = {
            "cos": (torch.cos, lambda x: torch.diag_embed(-torch.sin(x))),
            "sum": (lambda x: torch.sum(x, dim=-1), torch.ones_like),
        }
        generator = torch.Generator().manual_seed(0)
        for dim in range(1, max_dim + 1):
            x = torch.rand((b, dim), generator=generator, dtype=torch.float64, requires_grad=True)
            for name, (function, derivative) in functions.items():
                with self.subTest(name, dim=dim):
                    assert_equal(batch_jacobian(function, x), derivative(x.detach()))
                    assert_equal(batch_jacobian(function, x, reduce_with_sum=False), derivative(x.detach()))

    def test_inverse_layer(self, b: int = 64) -> None:
        for name, pair in PAIRS.items():
            x, y = pair.points(b)

            with self.subTest("g by f", name=name):
                layer = by_function(pair.g, pair.f)
                assert_equal(layer(x), y)
                assert_equal(gradient(layer, x), gradient(pair.g, x))

            with self.subTest("f by g, the other way round", name=name):
                assert_equal(gradient(by_function(pair.f, pair.g), y), gradient(pair.f, y))

            with self.subTest("g by the Jacobian of f", name=name):
                layer = by_jacobian(pair.g, batch_jacobian(pair.f, pair.g(x)))
                assert_equal(layer(x), y)
                assert_equal(gradient(layer, x), gradient(pair.g, x))

            with self.subTest("f and g undo each other, x being a result of f", name=name):
                there = leaf(y)
                back = by_jacobian(pair.g, batch_jacobian(pair.f, there))(pair.f(there))
                assert_equal(back, there)
                assert_equal(torch.autograd.grad(loss(back), there)[0], gradient(torch.clone, y))


# ---- the names and their forms --------------------------------------------------------------------------------------


def test_names() -> None:
    names = {"ImplicitInverseLayer", "ImplicitInverseLayerAuto", "ImplicitInverseLayerAutomatic"}
    names |= {"ImplicitInverseLayerBase", "batch_jacobian", "implicit_inverse_layer"}
    assert set(inverse_differentiation_layer.__all__) == names
    assert ImplicitInverseLayerAuto is ImplicitInverseLayerAutomatic
    for layer in (ImplicitInverseLayer, ImplicitInverseLayerAuto):
        assert issubclass(layer, ImplicitInverseLayerBase)
    assert issubclass(ImplicitInverseLayerBase, torch.autograd.Function)


@pairs
def test_apply(pair: Pair) -> None:
    x, y = pair.points()
    jacobian = batch_jacobian(pair.f, y)
    for layer in (
        lambda x: ImplicitInverseLayer.apply(x, blind(pair.g), jacobian),
        lambda x: ImplicitInverseLayerAuto.apply(x, blind(pair.g), pair.f),
    ):
        assert_equal(layer(x), y)
        assert_equal(gradient(layer, x), gradient(pair.g, x))


def test_both_or_neither() -> None:
    x = torch.full((1, 1), 0.5)
    with pytest.raises(ValueError, match=r"both forward_func and forward_jacobian"):
        implicit_inverse_layer(x, torch.asin, forward_func=torch.sin, forward_jacobian=torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match=r"neither forward_func nor forward_jacobian"):
        implicit_inverse_layer(x, torch.asin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_data(dtype: torch.dtype) -> None:
    """The example of the original README, with the gradient that it meant: that of the data."""
    data = torch.linspace(-0.9, 0.9, 15, dtype=dtype).reshape(3, 5).requires_grad_()

    @torch.no_grad()
    def g(x: Tensor) -> Tensor:
        return torch.asin(x)

    y = implicit_inverse_layer(data, g, forward_func=torch.sin)
    (gradient,) = torch.autograd.grad(torch.sum(y), data)
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, 1 / torch.sqrt(1 - data.detach() ** 2), rtol=tolerance, atol=0)


# ---- what the original got wrong ------------------------------------------------------------------------------------


def test_g_runs_once() -> None:
    x, y = PAIRS["sin"].points()
    jacobian = batch_jacobian(torch.sin, y)
    seen: list[Tensor] = []

    def g(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.asin(x)

    for layer in (
        lambda x: implicit_inverse_layer(x, g, forward_func=torch.sin),
        lambda x: implicit_inverse_layer(x, g, forward_jacobian=jacobian),
        lambda x: ImplicitInverseLayer.apply(x, g, jacobian),
        lambda x: ImplicitInverseLayerAuto.apply(x, g, torch.sin),
    ):
        seen.clear()
        gradient(layer, x)
        assert len(seen) == 1
        assert not seen[0].requires_grad


@pairs
def test_second_derivatives_with_f(pair: Pair) -> None:
    start, _ = pair.points(b=3)

    def second(g: Function) -> Tensor:
        x = leaf(start)
        (first,) = torch.autograd.grad(loss(g(x)), x, create_graph=True)
        return torch.autograd.grad(loss(first), x)[0]

    expected = second(pair.g)
    error = (second(by_function(pair.g, pair.f)) - expected).abs()
    # Second derivatives are sums of terms larger than themselves; rounding is relative to the largest.
    assert error.max() <= ROUNDING * expected.abs().max()
    assert gradgradcheck(by_function(pair.g, pair.f), leaf(start))


@pairs
def test_second_derivatives_with_a_jacobian_are_refused(pair: Pair) -> None:
    start, y = pair.points(b=3)
    x = leaf(start)
    layer = by_jacobian(pair.g, batch_jacobian(pair.f, y))
    (first,) = torch.autograd.grad(loss(layer(x)), x, create_graph=True)
    assert_equal(first, gradient(pair.g, start))
    with pytest.raises(DerivativeError, match=r"forward_jacobian is a constant[\s\S]*pass forward_func"):
        torch.autograd.grad(loss(first), x)


def test_a_singular_jacobian_is_an_error() -> None:
    start = torch.tensor([[4.0, 9.0], [0.0, 1.0], [1.0, 4.0]], dtype=torch.float64)  # dg/dx is infinite in row 1
    jacobian = torch.diag_embed(2 * torch.sqrt(start))
    for layer in (by_function(torch.sqrt, torch.square), by_jacobian(torch.sqrt, jacobian)):
        x = leaf(start)
        y = layer(x)
        with pytest.raises(SingularJacobianError, match=r"1 of 3 events singular, the first at index \(1,\)"):
            y.sum().backward()


def test_parameters_that_f_reads_get_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((4, 3), generator=generator, dtype=torch.float64)
    f = torch.nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        f.weight.copy_(torch.eye(3) + 0.3 * torch.rand((3, 3), generator=generator))

    def g(x: Tensor) -> Tensor:
        return torch.linalg.solve(f.weight, (x - f.bias).mT).mT

    given = (f.weight, f.bias)
    implicit = torch.autograd.grad(loss(by_function(g, f)(leaf(x))), given)
    explicit = torch.autograd.grad(loss(g(x)), given)
    for a, b in zip(implicit, explicit, strict=True):
        assert_equal(a, b)


def test_a_wrong_g_is_an_error() -> None:
    x, _ = PAIRS["sin"].points()
    with pytest.raises(ResidualError):
        implicit_inverse_layer(x, torch.acos, forward_func=torch.sin)


@pytest.mark.parametrize("shape", [(64, 2), (64, 1, 2), (63, 2, 2)])
def test_a_jacobian_of_the_wrong_shape_is_an_error(shape: tuple[int, ...]) -> None:
    x, _ = PAIRS["shear"].points()
    with pytest.raises(ArgumentError, match=r"expected: +shape \(b, n, n\) = \(64, 2, 2\)"):
        implicit_inverse_layer(x, PAIRS["shear"].g, forward_jacobian=torch.ones(shape))


# ---- batch_jacobian -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce_with_sum", [True, False])
def test_batch_jacobian_of_coupled_elements(reduce_with_sum: bool) -> None:
    _, y = PAIRS["shear"].points()
    expected = torch.zeros(64, 2, 2, dtype=torch.float64)
    expected[:, 0, 0], expected[:, 0, 1], expected[:, 1, 1] = 1.0, 2 * y[:, 1], torch.cosh(y[:, 1])
    assert_equal(batch_jacobian(PAIRS["shear"].f, y, reduce_with_sum), expected)


@pytest.mark.parametrize("reduce_with_sum", [True, False])
def test_batch_jacobian_of_matrices(reduce_with_sum: bool) -> None:
    """From (b, 2, 3) to (b, 3, 2): the Jacobian of the transpose is a permutation."""
    x = torch.arange(24.0).reshape(4, 2, 3)
    expected = torch.einsum("ik,jl->ijlk", torch.eye(3), torch.eye(2)).expand(4, 3, 2, 2, 3)
    assert torch.equal(batch_jacobian(lambda x: x.mT, x, reduce_with_sum), expected)


def test_batch_jacobian_passes_options_on() -> None:
    y = leaf(PAIRS["sin"].points()[1])
    jacobian = batch_jacobian(torch.sin, y, create_graph=True)
    assert_equal(torch.autograd.grad(jacobian.sum(), y)[0], -torch.sin(y.detach()))
    assert_equal(batch_jacobian(torch.sin, y, vectorize=True), jacobian)

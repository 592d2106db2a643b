"""Derivatives of every problem against three oracles: closed form, finite differences, and an unrolled solver."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from backsolve import Dense, Diagonal, implicit_function, inverse, inverse_of
from tests.problems import BY_NAME, PROBLEMS, Problem

EPS = torch.finfo(torch.float64).eps
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


def derivatives(y: Tensor, inputs: tuple[Tensor, ...], order: int) -> list[Tensor]:
    """y, and derivatives of fixed projections of it: a vector of each order for each input, mixing all inputs."""
    torch.manual_seed(1)
    found, current = [y], y
    for _ in range(order):
        value = (current * torch.randn(current.shape, dtype=current.dtype)).sum()
        grads = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        current = torch.cat([g.flatten() for g in grads])
        found.append(current)
    return found


def assert_close_orders(actual: list[Tensor], expected: list[Tensor], digits_lost: float) -> None:
    """Agreement up to rounding: each order may lose `digits_lost` times eps more, relative to the largest entry."""
    for order, (a, e) in enumerate(zip(actual, expected, strict=True)):
        tolerance = digits_lost * 10**order * EPS * e.abs().max()
        assert (a - e).abs().max() <= tolerance, f"order {order}: {(a - e).abs().max():.2e} > {tolerance:.2e}"


@each_problem
@pytest.mark.parametrize("form", ["explicit", "closed_over"])
def test_first_and_second_derivatives_by_finite_differences(problem: Problem, form: str) -> None:
    inputs = problem.inputs()
    function = problem.explicit() if form == "explicit" else problem.closed_over
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@each_problem
@pytest.mark.parametrize("form", ["explicit", "closed_over", "non_leaf", "module"])
def test_orders_0_to_3_against_closed_form(problem: Problem, form: str) -> None:
    inputs = problem.inputs()
    x, *params = inputs
    if form == "explicit":
        y = problem.explicit()(x, *params)
    elif form == "closed_over":
        y = problem.closed_over(x, *params)
    elif form == "non_leaf":
        y = problem.closed_over(x * 1, *(p * 1 for p in params))
    else:
        y = through_module(problem, x, params)
    expected = derivatives(problem.exact(*inputs), inputs, 3)
    # conditions are a few units: 64 eps for y and a factor 10 for each order
    assert_close_orders(derivatives(y, inputs, 3), expected, 64)


def through_module(problem: Problem, x: Tensor, params: list[Tensor]) -> Tensor:
    """f is a module that holds the params as attributes."""

    class Forward(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = params

        def forward(self, y: Tensor) -> Tensor:
            return problem.f(y, *self.held)

    def g(x: Tensor) -> Tensor:
        return problem.g(x, *(p.detach() for p in params)) if params else torch.as_tensor(problem.g(x.numpy()))

    return inverse(Forward(), g, event_dim=problem.event_dim)(x)


def test_module_parameters_get_their_gradients() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3, dtype=torch.float64)

    def g(x: Tensor) -> Tensor:
        return torch.linalg.solve(layer.weight.detach(), (x - layer.bias.detach())[..., None])[..., 0]

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias)
    y = inverse(layer, g, event_dim=1)(x)
    exact = torch.linalg.solve(layer.weight, (x - layer.bias)[..., None])[..., 0]
    condition = torch.linalg.cond(layer.weight).item()
    assert_close_orders(derivatives(y, inputs, 2), derivatives(exact, inputs, 2), 10 * condition)


def test_arcsin_orders_0_to_4() -> None:
    x = torch.tensor([-0.7, -0.2, 0.0, 0.3, 0.6], dtype=torch.float64, requires_grad=True)
    actual, expected = inverse(torch.sin, np.arcsin)(x), torch.asin(x)
    for _ in range(5):
        torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)
        (actual,) = torch.autograd.grad(actual.sum(), x, create_graph=True)
        (expected,) = torch.autograd.grad(expected.sum(), x, create_graph=True)


def test_third_order_mixed_against_an_unrolled_solver() -> None:
    """Newton steps on a detached y give derivatives up to order 2^k - 1 by plain autograd."""
    torch.manual_seed(0)
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    w = (0.5 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()

    def f(y: Tensor, w: Tensor) -> Tensor:
        return y + 0.5 * torch.tanh(w @ y)

    def newton(x: Tensor, w: Tensor, y: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            jacobian = torch.eye(3, dtype=y.dtype) + 0.5 * torch.diag(1 - torch.tanh(w @ y) ** 2) @ w
            y = y - torch.linalg.solve(jacobian, f(y, w) - x)
        return y

    solver = inverse(f, lambda x, w: newton(x, w, x.clone(), 30), event_dim=1)
    y = solver(x, w)
    expected = derivatives(newton(x, w, y.detach(), 3), (x, w), 3)
    assert_close_orders(derivatives(y, (x, w), 3), expected, 200)


@pytest.mark.parametrize("name", ["arcsin", "cubic, broadcast"])
def test_known_entries_give_the_same_derivatives(name: str) -> None:
    problem = BY_NAME[name]
    inputs = problem.inputs()
    entries = {"arcsin": torch.cos, "cubic, broadcast": lambda y, a, b: a + 3 * b * y**2}[name]
    y = problem.explicit(jacobian=Diagonal(entries=entries))(*inputs)
    assert_close_orders(derivatives(y, inputs, 3), derivatives(problem.exact(*inputs), inputs, 3), 64)


def test_known_dense_entries_give_the_same_derivatives() -> None:
    problem = BY_NAME["mixed sinh"]
    inputs = problem.inputs()
    jacobian = Dense(entries=lambda y, mix, shift: mix * torch.cosh(y)[..., None, :])
    y = problem.explicit(jacobian=jacobian)(*inputs)
    assert_close_orders(derivatives(y, inputs, 3), derivatives(problem.exact(*inputs), inputs, 3), 64)


def test_the_log_determinant_of_an_empty_batch_has_a_graph() -> None:
    """A training step with no events must not fail for want of a gradient."""
    a = torch.eye(2, dtype=torch.float64, requires_grad=True)
    solve = inverse(lambda y, a: y @ a.mT, lambda x, a: torch.linalg.solve(a, x.mT).mT, event_dim=1)
    _, log_det = solve.with_log_det(torch.ones(0, 2, dtype=torch.float64), a)
    log_det.sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, torch.zeros_like(a))


def test_implicit_function() -> None:
    """Kepler's equation as a condition, c(E, M, e) = E - e sin E - M = 0."""

    def solve(mean: Tensor, e: Tensor) -> Tensor:
        y = mean + e * torch.sin(mean)
        for _ in range(50):
            y = y - (y - e * torch.sin(y) - mean) / (1 - e * torch.cos(y))
        return y

    kepler = implicit_function(lambda y, mean, e: y - e * torch.sin(y) - mean, solve)
    mean = torch.linspace(0.3, 3.0, 5, dtype=torch.float64, requires_grad=True)
    e = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(kepler, (mean, e))
    assert gradgradcheck(kepler, (mean, e))
    y = kepler(mean, e)
    (by_mean,) = torch.autograd.grad(y.sum(), mean)
    torch.testing.assert_close(by_mean, 1 / (1 - e * torch.cos(y)), rtol=16 * EPS, atol=0)


def test_decorator_keeps_the_name_and_differentiates() -> None:
    @inverse_of(lambda y, *, scale: scale * y**3)
    def cube_root(x: Tensor, *, scale: Tensor) -> Tensor:
        """The cube root."""
        return (x / scale) ** (1 / 3)

    assert cube_root.__name__ == "cube_root"
    assert cube_root.__doc__ == "The cube root."
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    y = cube_root(torch.tensor(16.0, dtype=torch.float64), scale=scale)
    y.backward()
    assert math.isclose(scale.grad.item(), -2 / 6, rel_tol=16 * EPS)  # y = (x/s)^(1/3): dy/ds = -y / (3 s)


def test_an_f_whose_backward_pass_cannot_be_vectorised() -> None:
    class Branching(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y + y.roll(1) / 2

        @staticmethod
        def backward(ctx: object, v: Tensor) -> Tensor:
            assert v.abs().sum().item() > 0  # vmap refuses: it depends on the data
            return v + v.roll(-1) / 2

    x = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    matrix = torch.eye(3, dtype=torch.float64) + torch.eye(3, dtype=torch.float64).roll(1, 0) / 2
    y = inverse(Branching.apply, lambda x: torch.linalg.solve(matrix, x), event_dim=1)(x)
    v = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(y, x, v)
    torch.testing.assert_close(gradient, torch.linalg.solve(matrix.T, v), rtol=16 * EPS, atol=0)


def test_gradient_penalty_trains_to_the_same_gradient() -> None:
    """A loss of both y and dy/dx: what once_differentiable silently loses."""
    problem = BY_NAME["cubic, broadcast"]
    inputs = problem.inputs()

    def penalised(function: object) -> tuple[Tensor, ...]:
        y = function(*inputs)
        (slope,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(y.sum() + (slope**2).sum(), inputs)

    for actual, expected in zip(penalised(problem.explicit()), penalised(problem.exact), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)


def test_the_wrong_rule_would_be_found() -> None:
    """The oracles themselves can fail: a doubled gradient is seen by each."""
    x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    doubled = torch.asin(x)
    doubled.register_hook(lambda v: 2 * v)
    with pytest.raises(AssertionError):
        assert_close_orders(derivatives(doubled, (x,), 1), derivatives(torch.asin(x), (x,), 1), 64)

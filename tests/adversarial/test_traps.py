"""Eighteen silent errors that were reproduced in other packages, each by name: here they are right, or refused.

Most use f(y; w) = w (y + y^3) at x = 0.3, 1.2, -2. Numbers quoted in the docstrings are what those packages return;
the truth is worked out here, by autograd through the closed form or by finite differences.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from backsolve import Dense, Diagonal, MatrixFree, errors, implicit_function, inverse
from backsolve.solvers import Bracket, numpy_solver
from tests.adversarial.outcome import BLACK_BOX, W, X, compare, cubic, cubic_root, difference, tensor

EPS = torch.finfo(torch.float64).eps


def assert_right(pairs: Any) -> None:
    for pair in pairs:
        assert not difference(*pair)


def matrix_of_condition(n: int, condition: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random orthogonal singular vectors, singular values from 1 down."""
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    return (u * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ v.to(u).mT.to(dtype)


def penalty(function: Any) -> Any:
    """A loss with a gradient penalty, as in Wasserstein critics: needs the second derivative."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        y = function(x, w)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.sum() + (slope**2).sum()

    return run


def test_1_once_differentiable_is_no_guard() -> None:
    """grad of sum(y) + |dy/dx|^2 came out as [.811 .366 .250], with the term of the penalty missing."""
    x = X.clone().requires_grad_()
    w = tensor(1.0)[0]
    ours, exact = (torch.autograd.grad(penalty(f)(x, w), x)[0] for f in (inverse(cubic, BLACK_BOX), cubic_root))
    assert_right([(ours, exact)])
    assert (exact - tensor(0.811, 0.366, 0.250)).abs().min() > 0.04, "the penalty must matter"


def test_2_a_gradient_penalty_by_weights() -> None:
    """1.1968 for -.4366 from a deep equilibrium layer."""
    w = W.clone().requires_grad_()
    x = X.clone().requires_grad_()
    inv = inverse(lambda y: cubic(y, w), lambda x: cubic_root(x, w.detach()))
    ours = torch.autograd.grad(penalty(lambda x, _: inv(x))(x, w), w)[0]
    exact = torch.autograd.grad(penalty(cubic_root)(x, w), w)[0]
    assert_right([(ours, exact)])


def test_3_second_derivatives_by_x_and_by_params() -> None:
    """Wrong numbers by normal equations, a wrong sign of the mixed derivative with saved `.data`."""
    assert_right(compare(inverse(cubic, BLACK_BOX), cubic_root, X, tensor(1.0)[0], order=3))


def test_4_a_0d_x() -> None:
    """The gradient was -0.0 for .3657."""
    assert_right(compare(inverse(cubic, BLACK_BOX), cubic_root, X[1], tensor(1.0)[0]))


@pytest.mark.parametrize("condition", [1e3, 1e4])
@pytest.mark.parametrize("jacobian", [Dense(), MatrixFree(fallback=Dense())], ids=["dense", "matrix-free"])
def test_5_ill_conditioned_in_float32(condition: float, jacobian: Any) -> None:
    """Off by 1.5 % at condition 1e3 and by 85 % at 1e4, by normal equations. LU is off by eps times the condition."""
    a = matrix_of_condition(30, condition).float()
    x = torch.ones(30)
    solver = numpy_solver(lambda x: np.linalg.solve(a.double().numpy(), x.astype(float)))
    x.requires_grad_()
    inverse(lambda y: y @ a.mT, solver, event_dim=1, jacobian=jacobian, residual_tol=1e-2)(x).sum().backward()
    exact = torch.linalg.solve(a.double().mT, torch.ones(30, dtype=torch.float64))
    assert x.grad is not None
    error = (x.grad - exact).norm() / exact.norm()
    assert error < 10 * condition * torch.finfo(torch.float32).eps


def test_5_a_jacobian_far_from_the_identity() -> None:
    """A Neumann series diverges where |J - I| >= 1: 44287 for .250."""
    assert_right(compare(inverse(cubic, BLACK_BOX), cubic_root, 10 * X, W))


def test_6_a_second_derivative_is_never_none() -> None:
    """Results that require a gradient, and whose second derivative was None: backward() then adds nothing."""
    x = X.clone().requires_grad_()
    y = inverse(cubic, BLACK_BOX)(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert slope.requires_grad
    slope.sum().backward()
    (exact,) = torch.autograd.grad(cubic_root(x).sum(), x, create_graph=True)
    assert_right([(x.grad, torch.autograd.grad(exact.sum(), x)[0])])


def test_7_samples_of_a_mixture() -> None:
    """A translation of all components translates the sample: the second derivative was [1.77 -1.83] for 0."""
    weights, means, scales = tensor(0.3, 0.7), tensor(-1.0, 2.0), tensor(0.5, 1.5)

    def cdf(y: Tensor, shift: Tensor) -> Tensor:
        z = (y[..., None] - means - shift) / scales
        return (weights * torch.erfc(-z / math.sqrt(2)) / 2).sum(-1)

    sample = inverse(cdf, Bracket(-50.0, 50.0))
    u, shift = tensor(0.2, 0.6), tensor(0.4)[0].requires_grad_()
    (first,) = torch.autograd.grad(sample(u, shift).sum(), shift, create_graph=True)
    (second,) = torch.autograd.grad(first, shift)
    assert abs(first.item() - 2) < 1e-12
    assert abs(second.item()) < 1e-11


def test_8_closed_over_weights_are_found() -> None:
    """None in five packages, and half of the gradient, .5000 for .2693, where only ladj reached the weights."""

    def ours(x: Tensor, w: Tensor) -> Tensor:
        inv = inverse(lambda y: cubic(y, w), lambda x: cubic_root(x, w.detach()))
        y, log_det = inv.with_log_det(x)
        return y + log_det

    def exact(x: Tensor, w: Tensor) -> Tensor:
        y = cubic_root(x, w)
        return y - torch.log(w * (1 + 3 * y**2))

    assert_right(compare(ours, exact, X, W))


def test_9_a_call_writes_no_grad() -> None:
    """A forward pass that ran autograd.backward for its Jacobian left .grad = -13.19 in a weight."""
    w = W.clone().requires_grad_()
    x = X.clone().requires_grad_()
    y = inverse(lambda y: cubic(y, w), lambda x: cubic_root(x, w.detach()))(x)
    assert w.grad is None
    y.sum().backward()
    assert_right([(w.grad, torch.autograd.grad(cubic_root(X, w).sum(), w)[0])])


def test_10_params_in_a_dict() -> None:
    """Their gradients were dropped."""
    inv = inverse(lambda y, p: cubic(y, p["w"]), lambda x, p: cubic_root(x, p["w"]))
    assert_right(compare(lambda x, w: inv(x, {"w": w}), cubic_root, X, W))


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
def test_10_a_krylov_solve_that_fails_says_so(method: Any) -> None:
    """bicgstab at condition 1e2 returned what looks like the zero vector, with a warning."""
    a = matrix_of_condition(50, 1e2)
    x = torch.ones(50, dtype=torch.float64, requires_grad=True)
    solver = numpy_solver(lambda x: np.linalg.solve(a.numpy(), x))
    y = inverse(lambda y: y @ a.mT, solver, event_dim=1, jacobian=MatrixFree(method=method))(x)
    try:
        y.sum().backward()
    except errors.ConvergenceError:
        return
    exact = torch.linalg.solve(a.mT, torch.ones(50, dtype=torch.float64))
    assert x.grad is not None
    assert (x.grad - exact).norm() < 1e-8 * exact.norm()


@pytest.mark.parametrize("event_dim", [0, 1])
def test_11_a_singular_jacobian_is_an_error(event_dim: int) -> None:
    """An infinite derivative came out as 0.0 by a pseudo-inverse, and as -0.0 by normal equations."""
    x = tensor(0.0).requires_grad_()
    y = inverse(lambda y: y**3, lambda x: x, event_dim=event_dim)(x)
    with pytest.raises(errors.SingularJacobianError, match=r"index \((0,)?\)"):
        y.sum().backward()


def test_12_an_adjoint_that_is_no_contraction() -> None:
    """The forward residual was 3.8e-14 and the gradient off by 2.65: the backward fixed-point iteration diverged."""
    a = torch.tensor([[0.5, -3.0], [3.0, 0.2]], dtype=torch.float64)  # y = x + tanh(a y), |a| > 1

    def f(y: Tensor, a: Tensor) -> Tensor:
        return y - torch.tanh(y @ a.mT)

    def g(x: np.ndarray, a: np.ndarray) -> np.ndarray:
        rows = [scipy.optimize.root(lambda y, r=r: y - np.tanh(a @ y) - r, r, tol=1e-15).x for r in x]
        return np.array(rows)

    x = torch.tensor([[0.3, 1.2], [-0.5, 0.1]], dtype=torch.float64)
    inv = inverse(f, numpy_solver(g), event_dim=1)
    leaf = x.clone().requires_grad_()
    y = inv(leaf, a)
    y.sum().backward()
    jacobians = [np.eye(2) - np.diag(1 - np.tanh(a.numpy() @ r) ** 2) @ a.numpy() for r in y.detach().numpy()]
    exact = torch.tensor(np.array([np.linalg.solve(j.T, np.ones(2)) for j in jacobians]))
    assert_right([(leaf.grad, exact)])


def test_13_the_inverse_of_a_residual_layer() -> None:
    """One step at a detached point gave the gradient 1, off by 3 %, for the input and for the weights."""
    a = 0.3 * torch.tensor([[0.5, -1.0], [1.0, 0.2]], dtype=torch.float64)

    def f(y: Tensor, a: Tensor) -> Tensor:
        return y + torch.tanh(y @ a.mT)

    def unrolled(x: Tensor, a: Tensor) -> Tensor:
        y = x
        for _ in range(200):
            y = x - torch.tanh(y @ a.mT)
        return y

    inv = inverse(f, lambda x, a: unrolled(x, a), event_dim=1)
    assert_right(compare(inv, unrolled, X[:2][None], a, order=2))


def test_14_value_and_log_det_are_both_connected() -> None:
    """A y that requires no gradient beside a log-determinant that does: part of a gradient, without a word."""
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y, log_det = inverse(cubic, BLACK_BOX).with_log_det(x, w)
    z = cubic_root(x, w)
    exact_log_det = -torch.log(w * (1 + 3 * z**2))
    for ours, exact in ((y, z), (log_det, exact_log_det)):
        assert ours.requires_grad
        grads = (torch.autograd.grad(t.sum(), (x, w), retain_graph=True) for t in (ours, exact))
        assert_right(zip(*grads, strict=True))


def test_15_a_root_outside_of_the_bracket_is_an_error() -> None:
    """The end of the bracket came back, y = 10 for 46.4 at x = 1e5, with a gradient."""
    with pytest.raises(errors.BracketError):
        inverse(cubic, Bracket(-10.0, 10.0))(tensor(1e5, 0.5))


def test_15_a_decreasing_f_and_small_roots() -> None:
    """A decreasing f gave the bracket's end; an absolute tolerance of 1e-6 was off by 1.6 % at x = 1e-5."""
    x = tensor(1e-5, 0.3, -2.0)
    assert_right(compare(inverse(lambda y: -cubic(y), Bracket(-10.0, 10.0)), lambda x: cubic_root(-x), x))
    single = inverse(cubic, Bracket(-10.0, 10.0))(x.float())
    assert (single - cubic_root(x)).abs().div(cubic_root(x).abs()).max() < 8 * torch.finfo(torch.float32).eps


def test_16_a_wrong_g_is_an_error() -> None:
    """A gradient at the wrong point without a word: .0132 at y = 5."""
    with pytest.raises(errors.ResidualError, match="3 of 3 elements"):
        inverse(cubic, lambda x: torch.full_like(x, 5.0))(X.clone().requires_grad_())
    with pytest.raises(errors.ResidualError):
        implicit_function(lambda y, w: cubic(y, w) - 1, lambda w: torch.full_like(w, 5.0))(W)


def test_17_fewer_equations_than_unknowns_is_an_error() -> None:
    """f: R^3 -> R^2 does not determine dg; the minimum norm is a guess: 3.0 for 1.4."""
    inv = inverse(lambda y: y[..., :2] + y[..., 1:], lambda x: torch.zeros(3, dtype=x.dtype), event_dim=1)
    with pytest.raises(errors.BacksolveError):
        inv(X[:2].clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("jacobian", [None, Diagonal(), Dense()])
def test_18_a_coupled_batch_is_an_error(jacobian: Any) -> None:
    """[.5; 0] for [.75; -.25]: rows that are not independent."""
    x = torch.tensor([[0.3], [1.2]], dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: 2 * y + (y - y.mean(0)) * 2, lambda x: x / 4 + x.mean(0) / 4, event_dim=1, jacobian=jacobian)(
        x
    )
    with pytest.raises(errors.StructureError, match=r"not (elementwise|independent)"):
        torch.autograd.grad(y[0, 0], x)

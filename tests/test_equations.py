"""Gauges for an f with fewer equations than unknowns; matrix functions by SciPy on the subspaces where they live."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from backsolve import Banded, Dense, errors, implicit_function, inverse
from backsolve.jacobians import Constrained, LowerTriangular, MinimumNorm, Symmetric
from backsolve.solvers import numpy_solver
from tests.test_derivatives import assert_close_orders, derivatives
from tests.test_transforms import assert_same
from tests.transforms import OF_PARAMS, OF_X


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*batch: int, n: int = 3) -> Tensor:
    a = random(*batch, n, n)
    return a @ a.mT + n * torch.eye(n, dtype=a.dtype)


# -------------------------------------------------------------------------------------------------------------- gauges


def test_minimum_norm_of_a_linear_f() -> None:
    """`y = A^T (A A^T)^-1 x`, in x and in A, to third order."""
    x, a = random(2, 2, seed=1).requires_grad_(), random(2, 4).requires_grad_()

    def exact(x: Tensor, a: Tensor) -> Tensor:
        return (a.mT @ torch.linalg.inv(a @ a.mT) @ x[..., None])[..., 0]

    least = inverse(
        lambda y, a: (a @ y[..., None])[..., 0],
        numpy_solver(lambda x, a: np.linalg.lstsq(a, x.T)[0].T),
        event_dim=1,
        jacobian=Dense(gauge=MinimumNorm()),
    )
    expected = derivatives(exact(x, a), (x, a), 3)
    assert_close_orders(derivatives(least(x, a), (x, a), 3), expected, 1e4)


def nearest_on_a_curve(x: Tensor, y: Tensor) -> Tensor:
    """Newton for the stationary points of `|y|^2 / 2 - l (f(y) - x)`, which autograd sees; y is where it starts."""
    for _ in range(2):
        l = y[..., :1] / _slope(y)[..., :1]  # noqa: E741
        state = torch.cat([y, l], -1)

        def residual(state: Tensor) -> Tensor:
            y, l = state[:2], state[2:]  # noqa: E741
            return torch.cat([y - l * _slope(y), _curve(y) - x])

        j = torch.autograd.functional.jacobian(residual, state, create_graph=True)
        y = (state - torch.linalg.inv(j) @ residual(state))[:2]
    return y


def _curve(y: Tensor) -> Tensor:
    return (y[..., :1].exp() + y[..., :1] * y[..., 1:] + y[..., 1:] ** 2) - 1


def _slope(y: Tensor) -> Tensor:
    return torch.cat([y[..., :1].exp() + y[..., 1:], y[..., :1] + 2 * y[..., 1:]], -1)


def test_minimum_norm_of_a_curved_f() -> None:
    """Where `dy = J^+ dx` would be wrong: the curvature of f turns the normal."""

    def g(x: np.ndarray) -> np.ndarray:
        def solve(target: np.ndarray) -> np.ndarray:
            constraint = {"type": "eq", "fun": lambda y: _curve(torch.from_numpy(y)).numpy() - target}
            found = scipy.optimize.minimize(lambda y: y @ y / 2, [0.4, 0.2], constraints=constraint, tol=1e-14)
            return found.x

        return np.stack([solve(t) for t in x])

    x = torch.tensor([[0.8], [1.2]], dtype=torch.float64, requires_grad=True)
    least = inverse(_curve, numpy_solver(g), event_dim=1, jacobian=Dense(gauge=MinimumNorm()), refine=5)
    y = least(x)
    expected = torch.stack([nearest_on_a_curve(t, y0) for t, y0 in zip(x, y.detach(), strict=True)])
    assert_close_orders(derivatives(y, (x,), 2), derivatives(expected, (x,), 2), 1e4)
    pseudo_inverse = _slope(y.detach()) / (_slope(y.detach()) ** 2).sum(-1, keepdim=True)
    found = torch.stack([torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0][:, 0] for i in (0, 1)], -1)
    assert ((found - pseudo_inverse).abs() > 1e-2).any()


def test_a_g_that_is_not_of_minimum_norm_is_refused() -> None:
    a = random(2, 4)
    shifted = torch.linalg.svd(a).Vh[-1] * 1e-3  # f does not see it
    least = inverse(
        lambda y: y @ a.mT,
        lambda x: torch.linalg.lstsq(a, x.mT).solution.mT + shifted,
        event_dim=1,
        jacobian=Dense(gauge=MinimumNorm()),
    )
    with pytest.raises(errors.ResidualError):
        least(random(3, 2, seed=1))


def test_constrained_against_the_square_problem() -> None:
    """A simplex: logits whose sum is zero, from the logarithms of probabilities up to their normalisation."""
    scale = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    x = random(2, 2).requires_grad_()

    def f(y: Tensor) -> Tensor:
        return y[..., 1:].sinh() - y[..., :1]

    def g(x: Tensor) -> Tensor:
        y = torch.zeros(*x.shape[:-1], 3, dtype=x.dtype)
        for _ in range(60):
            j = torch.func.vmap(torch.func.jacrev(square))(y)
            y = (
                y
                - torch.linalg.solve(j, (square(y) - torch.cat([x, torch.zeros_like(x[..., :1])], -1))[..., None])[
                    ..., 0
                ]
            )
        return y

    def square(y: Tensor) -> Tensor:
        return torch.cat([f(y), y.sum(-1, keepdim=True) - scale.detach() * y[..., :1] ** 3], -1)

    gauge = Constrained(lambda y: y.sum(-1, keepdim=True) - scale * y[..., :1] ** 3)
    y = inverse(f, g, event_dim=1, jacobian=Dense(gauge=gauge))(x)
    by_square = inverse(
        lambda y: torch.cat([f(y), y.sum(-1, keepdim=True) - scale * y[..., :1] ** 3], -1),
        lambda x: g(x[..., :2]),
        event_dim=1,
    )(torch.cat([x, torch.zeros_like(x[..., :1])], -1))
    assert_close_orders(derivatives(y, (x, scale), 3), derivatives(by_square, (x, scale), 3), 1e4)


@pytest.mark.parametrize("transform", {**OF_X, **OF_PARAMS})
def test_constrained_under_every_transform(transform: str) -> None:
    shares = torch.tensor([0.75, 0.25], dtype=torch.float64)
    split = inverse(
        lambda y, a: a * torch.sinh(y.sum(-1, keepdim=True)),
        lambda x, a: np.arcsinh(x.numpy() / a.numpy()) * shares.numpy(),
        event_dim=1,
        jacobian=Dense(gauge=Constrained(lambda y: y[..., :1] - 3 * y[..., 1:])),
    )
    inputs = torch.tensor([[0.4], [-0.7]], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    apply = {**OF_X, **OF_PARAMS}[transform]
    assert_same(apply(split, inputs), apply(lambda x, a: torch.asinh(x / a) * shares, inputs))


def test_without_a_gauge_the_error_explains() -> None:
    x = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(errors.ForwardOutputError) as caught:
        inverse(lambda y: y.sum(-1, keepdim=True), lambda x: x.expand(3, 2) / 2, event_dim=1)(x)
    for part in ("J = df/dy is not square", "(2,)", "(1,)", "many g satisfy", "gauge=MinimumNorm()"):
        assert part in str(caught.value)


def test_gauges_that_do_not_fit() -> None:
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    f, g = (lambda y: y.sum(-1, keepdim=True)), (lambda x: x.expand(3) / 3)
    with pytest.raises(errors.ForwardOutputError, match=r"3 equations(.|\n)*1 from f and 1 from the gauge"):
        inverse(f, g, event_dim=1, jacobian=Dense(gauge=Constrained(lambda y: y[..., :1])))(x)
    inv = inverse(f, g, event_dim=1, jacobian=Dense(gauge=MinimumNorm()))
    for use in (inv.with_log_det, inv.jacobian):
        with pytest.raises(errors.DerivativeError, match="no square dy/dx"):
            use(x)
    with pytest.raises(errors.ArgumentError, match="event_dim=1"):
        inverse(f, g, jacobian=Dense(gauge=MinimumNorm()))
    with pytest.raises(errors.ArgumentError, match="event_dim=2"):
        inverse(f, g, event_dim=1, jacobian=Dense(subspace=Symmetric()))
    with pytest.raises(errors.ArgumentError, match="jacobian"):
        implicit_function(f, g, event_dim=1, jacobian=Dense(gauge=MinimumNorm()))
    with pytest.raises(errors.ArgumentError, match="one of them"):
        Dense(gauge=MinimumNorm(), subspace=Symmetric())
    with pytest.raises(errors.ArgumentError, match="no claims"):
        Dense(gauge=MinimumNorm(), symmetric=True)


# ---------------------------------------------------------------------------------------------------- matrix functions


def batched(fn: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A SciPy function of one matrix, over a batch."""
    return np.vectorize(fn, signature="(n,n)->(n,n)")


def of_eigenvalues(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    return vectors @ torch.diag_embed(function(values)) @ vectors.mT


MATRIX_FUNCTIONS = {
    "sqrtm": (lambda y: y @ y, batched(scipy.linalg.sqrtm), lambda x: of_eigenvalues(torch.sqrt, x), Symmetric()),
    "logm": (torch.linalg.matrix_exp, batched(scipy.linalg.logm), lambda x: of_eigenvalues(torch.log, x), Symmetric()),
    "cholesky": (
        lambda y: y @ y.mT,
        lambda x: np.linalg.cholesky((x + x.swapaxes(-1, -2)) / 2),
        lambda x: torch.linalg.cholesky((x + x.mT) / 2),
        LowerTriangular(),
    ),
}


@pytest.mark.parametrize("name", MATRIX_FUNCTIONS)
def test_matrix_functions_on_their_subspaces(name: str) -> None:
    f, g, exact, subspace = MATRIX_FUNCTIONS[name]
    x = positive(2).requires_grad_()
    inv = inverse(f, numpy_solver(g), event_dim=2, jacobian=Dense(subspace=subspace))
    y = inv(x)
    assert_close_orders(derivatives(y, (x,), 2), derivatives(exact(x), (x,), 2), 1e4)
    (by_x,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(by_x, by_x.mT, rtol=0, atol=0)


@pytest.mark.parametrize("name", MATRIX_FUNCTIONS)
def test_their_log_determinants(name: str) -> None:
    """Against the Jacobian of the map between the lower triangles, by the closed form."""
    f, g, exact, subspace = MATRIX_FUNCTIONS[name]
    x = positive()
    rows, columns = torch.tril_indices(3, 3)

    def between_triangles(c: Tensor) -> Tensor:
        lower = torch.zeros(3, 3, dtype=c.dtype).index_put((rows, columns), c)
        return exact(lower + lower.tril(-1).mT)[rows, columns]

    jacobian = torch.autograd.functional.jacobian(between_triangles, x[rows, columns])
    found = inverse(f, numpy_solver(g), event_dim=2, jacobian=Dense(subspace=subspace)).with_log_det(x)[1]
    torch.testing.assert_close(found, torch.linalg.slogdet(jacobian)[1], rtol=1e-11, atol=1e-11)


def test_a_y_outside_of_the_subspace_is_refused() -> None:
    x = positive()
    upper = inverse(lambda y: y @ y.mT, lambda x: torch.linalg.cholesky(x).flip(-1), event_dim=2,
                    jacobian=Dense(subspace=LowerTriangular()))  # fmt: skip
    with pytest.raises(errors.ResidualError):
        upper(x)


def test_sylvester() -> None:
    """A Y + Y B = X by Bartels and Stewart; the derivatives against Kronecker's big matrix."""
    a, b, x = (
        positive().requires_grad_(),
        random(3, 3, seed=2).requires_grad_(),
        random(2, 3, 3, seed=3).requires_grad_(),
    )
    solver = numpy_solver(lambda x, a, b: np.stack([scipy.linalg.solve_sylvester(a, b, one) for one in x]))
    y = inverse(lambda y, a, b: a @ y + y @ b, solver, event_dim=2)(x, a, b)
    identity = torch.eye(3, dtype=a.dtype)
    big = torch.kron(a, identity) + torch.kron(identity, b.mT.contiguous())
    expected = (torch.linalg.inv(big) @ x.reshape(2, 9, 1)).reshape(2, 3, 3)
    assert_close_orders(derivatives(y, (x, a, b), 2), derivatives(expected, (x, a, b), 2), 1e4)


def test_riccati() -> None:
    """A^T Y + Y A - Y S Y + Q = 0; its derivative solves a Lyapunov equation with the closed loop A - S Y."""
    a, s, q = random(3, 3), positive(), positive().requires_grad_()
    solver = numpy_solver(
        lambda q: scipy.linalg.solve_continuous_are(a.numpy(), np.eye(3), (q + q.T) / 2, np.linalg.inv(s))
    )
    inv = inverse(lambda y: y @ s @ y - a.mT @ y - y @ a, solver, event_dim=2, jacobian=Dense(subspace=Symmetric()))
    y, v = inv(q), positive(n=3)
    (by_q,) = torch.autograd.grad(y, q, v, retain_graph=True)
    closed = (a - s @ y.detach()).numpy()
    expected = scipy.linalg.solve_continuous_lyapunov(closed, -v.numpy())  # the adjoint of dQ -> dY
    torch.testing.assert_close(by_q, torch.from_numpy(expected), rtol=1e-9, atol=1e-11)
    assert gradcheck(lambda q: inv((q + q.mT) / 2), (q,))
    assert gradgradcheck(lambda q: inv((q + q.mT) / 2), (q,))


def test_bands_know_no_gauge() -> None:
    with pytest.raises(TypeError):
        Banded(1, 1, gauge=MinimumNorm())

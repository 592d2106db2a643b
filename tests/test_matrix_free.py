"""Krylov methods and the Jacobian that is never formed: right within the tolerance, or an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from backsolve import Dense, MatrixFree, errors, inverse
from backsolve.linalg import Krylov, bicgstab, gmres
from tests.test_derivatives import assert_close_orders, derivatives

EPS = torch.finfo(torch.float64).eps


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def solve(method: str, a: Tensor, b: Tensor, **options: object) -> Krylov:
    settings = {"rtol": 1e-10, "maxiter": 400, "precondition": lambda v: v, **options}
    product = lambda v: (a @ v[..., None])[..., 0]  # noqa: E731
    if method == "gmres":
        return gmres(product, b, **{"restart": 30, **settings})
    return bicgstab(product, b, **settings)


each_method = pytest.mark.parametrize("method", ["gmres", "bicgstab"])


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_what_is_reported_is_true(method: str, dtype: torch.dtype) -> None:
    """Easy, hard and hopeless systems in one batch: each verdict agrees with the residual by definition."""
    verdicts = []
    for seed in range(20):
        n = 2 * seed + 1
        a = random(seed, 4, n, n, dtype=dtype) / n**0.5
        a[0] += 3 * torch.eye(n)
        a[1] += torch.eye(n)
        b = random(seed + 100, 4, n, dtype=dtype)
        b[3] = 0
        eps = torch.finfo(dtype).eps
        found = solve(method, a, b, rtol=eps**0.5, maxiter=30)
        residual = torch.linalg.vector_norm(b - (a @ found.solution[..., None])[..., 0], dim=-1)
        size = torch.linalg.vector_norm(b, dim=-1)
        norm = torch.linalg.matrix_norm(a, 2) * torch.linalg.vector_norm(found.solution, dim=-1)
        good = residual <= eps**0.5 * size + 8 * eps * norm
        assert good[found.converged].all()
        assert found.converged[0]
        assert found.converged[3]
        assert (found.solution[3] == 0).all()
        verdicts.append(found.converged)
    assert not torch.stack(verdicts)[:, 2].all()  # some have to fail, or nothing was tested


@each_method
def test_each_event_converges_by_itself(method: str) -> None:
    """The solution of an event does not depend on its neighbours, however slow or broken they are."""
    easy = 2 * torch.eye(12, dtype=torch.float64) + 0.1 * random(0, 12, 12)
    hopeless, broken = torch.zeros_like(easy), torch.full_like(easy, torch.nan)
    b = random(1, 1, 12)
    alone = solve(method, easy[None], b)
    together = solve(method, torch.stack([hopeless, easy, broken]), b.expand(3, -1))
    assert together.converged.tolist() == [False, True, False]
    torch.testing.assert_close(together.solution[1], alone.solution[0], rtol=1e-9, atol=0)


def test_gmres_ends_after_n_steps_and_restarts() -> None:
    """A cyclic shift is the worst case: no residual falls before step n, so restarts never get anywhere."""
    n = 20
    shift = torch.eye(n, dtype=torch.float64).roll(1, 0)[None]
    b = torch.eye(n, dtype=torch.float64)[:1]
    assert solve("gmres", shift, b, restart=n).converged.all()
    assert not solve("gmres", shift, b, restart=n - 1).converged.any()
    laplacian = (2.5 * torch.eye(100) - torch.eye(100).roll(1, 0) - torch.eye(100).roll(-1, 0)).double()[None]
    b = random(0, 1, 100)
    whole, restarted = (solve("gmres", laplacian, b, restart=k) for k in (100, 7))
    assert whole.converged.all()
    assert restarted.converged.all()
    assert restarted.products > whole.products


def mixing(n: int = 30, strength: float = 0.5) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    return lambda y, w: y + strength * torch.tanh(y @ w.mT), random(0, n, n) / n**0.5


def g_from(f: Callable[..., Tensor], w: Tensor) -> Callable[..., Tensor]:
    def g(x: Tensor, *_: Tensor) -> Tensor:
        y = x.clone()
        for _ in range(200):
            y = y - (f(y, w.detach()) - x)
        return y

    return g


@each_method
def test_module_parameters_to_third_order(method: str) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4, dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    twice = 2 * scale  # a capture with a history

    def f(y: Tensor) -> Tensor:
        return 2 * y + 0.5 * torch.tanh(layer(y)) * twice

    def g(x: Tensor) -> Tensor:
        y = x / 2
        for _ in range(200):
            y = (x - 0.5 * torch.tanh(layer(y)) * twice) / 2
        return y

    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.bias, scale)
    by_krylov, by_lu = (
        inverse(f, g, event_dim=1, jacobian=j)(x) for j in (MatrixFree(method, rtol=1e-15), Dense())
    )  # fmt: skip
    assert_close_orders(derivatives(by_krylov, inputs, 3), derivatives(by_lu, inputs, 3), 200)


def test_products_are_those_of_gmres_and_a_last_look() -> None:
    """One for each step, and one for the residual at the end."""
    f, w = mixing()
    count = 0

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: object, v: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return v

    x = random(1, 30).requires_grad_()
    jacobian = MatrixFree(rtol=1e-8)
    inv = inverse(
        lambda y: f(Counted.apply(y), w), lambda x: g_from(f, w)(x), event_dim=1, jacobian=jacobian, verify=False
    )
    y = inv(x)
    v = random(2, 30)
    torch.autograd.grad(y, x, v)
    j = torch.autograd.functional.jacobian(lambda y: f(y, w), y.detach())
    space, r = v[:, None], v
    steps = 0
    while r.norm() > 1e-8 * v.norm():  # the smallest Krylov space that is large enough, by least squares
        steps += 1
        images = j.mT @ space
        r = v - images @ torch.linalg.lstsq(images, v[:, None]).solution[:, 0]
        space = torch.linalg.qr(torch.cat([v[:, None], images], 1)).Q
    assert count <= steps + 2


@each_method
def test_not_converged_is_an_error_or_the_fallback(method: str) -> None:
    a = torch.stack([2 * torch.eye(40, dtype=torch.float64), random(0, 40, 40)])
    x = random(1, 2, 40).requires_grad_()
    f = lambda y: (a @ y[..., None])[..., 0]  # noqa: E731
    g = lambda x: torch.linalg.solve(a, x[..., None])[..., 0]  # noqa: E731
    options = {"method": method, "maxiter": 20}
    with pytest.raises(errors.ConvergenceError) as caught:
        inverse(f, g, event_dim=1, jacobian=MatrixFree(**options))(x).sum().backward()
    for part in (f"MatrixFree('{method}')", "1 of 2 events not converged", "index (1,)", "fallback=Dense()"):
        assert part in str(caught.value)
    y = inverse(f, g, event_dim=1, jacobian=MatrixFree(**options, fallback=Dense()))(x)
    (found,) = torch.autograd.grad(y.sum(), x)
    expected = torch.linalg.solve(a.mT, torch.ones_like(x)[..., None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_preconditioner_saves_products() -> None:
    scales = torch.logspace(0, 4, 60, dtype=torch.float64)
    a = torch.diag(scales) + 0.1 * random(0, 60, 60)
    used: list[bool] = []

    def jacobi(r: Tensor, y: Tensor, transposed: bool) -> Tensor:
        assert y.shape == r.shape == (60,)
        used.append(transposed)
        return r / scales

    x = random(1, 60).requires_grad_()

    def hessian_vector(jacobian: MatrixFree) -> Tensor:
        used.clear()
        f = lambda y: a @ y + y**3  # noqa: E731
        y0 = random(3, 60)
        y = inverse(f, lambda x: y0.clone(), event_dim=1, jacobian=jacobian, residual_tol=float("inf"))(x)
        (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x)[0]

    with pytest.raises(errors.ConvergenceError):
        hessian_vector(MatrixFree(maxiter=25))
    found = hessian_vector(MatrixFree(maxiter=25, preconditioner=jacobi))
    assert set(used) == {True, False}  # J^T w = v, and J u = b for the derivative of that
    expected = hessian_vector(Dense())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@each_method
@pytest.mark.parametrize("rotated", [False, True])
def test_a_singular_jacobian_does_not_converge(method: str, rotated: bool) -> None:
    """Exactly singular, and up to rounding errors: there is a solution then, of length 1e16."""
    a = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64))
    if rotated:
        q = torch.linalg.qr(random(0, 4, 4)).Q
        a = q @ a @ q.mT
    x = (a @ torch.ones(4, dtype=torch.float64)).requires_grad_()
    inv = inverse(lambda y: a @ y, lambda x: torch.ones_like(x), event_dim=1, jacobian=MatrixFree(method))
    with pytest.raises(errors.ConvergenceError):
        inv(x).sum().backward()


def test_coupled_batches_are_found_and_independent_ones_are_not() -> None:
    for seed in range(100):
        y = random(seed, 5, 3)
        for f, wrong in (
            (lambda y: (y - y.mean(0)) / y.std(0) + y, True),
            (lambda y: y + 1e3 * y.sinh().cumsum(-1), False),
        ):
            x = f(y).requires_grad_()
            result = inverse(f, lambda x, y=y: y.clone(), event_dim=1, jacobian=MatrixFree())(x)
            if wrong:
                with pytest.raises(errors.StructureError, match="independent across the batch"):
                    result.sum().backward()
            else:
                result.sum().backward()


def test_what_needs_all_of_j_is_refused_where_it_is_large() -> None:
    inv = inverse(lambda y: 2 * y, lambda x: x / 2, event_dim=1, jacobian=MatrixFree())
    x = torch.ones(1025, dtype=torch.float64, requires_grad=True)
    inv(x).sum().backward()
    for use in (inv.with_log_det, inv.jacobian):
        with pytest.raises(errors.StructureError, match=r"at most 1024 elements(.|\n)*of 1025 elements"):
            use(x)
    assert inv.with_log_det(x[:3])[1].item() == pytest.approx(-3 * math.log(2), rel=4 * EPS)


@pytest.mark.parametrize(
    "options", [{"method": "minres"}, {"rtol": 0.0}, {"rtol": 2.0}, {"maxiter": 0}, {"restart": 1.5}, {"restart": True}]
)
def test_impossible_options(options: dict[str, object]) -> None:
    with pytest.raises(errors.ArgumentError, match="MatrixFree"):
        MatrixFree(**options)


@each_method
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1,)])
def test_empty_and_small_events(method: str, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    inverse(lambda y: 2 * y, lambda x: x / 2, event_dim=1, jacobian=MatrixFree(method))(x).sum().backward()
    assert (x.grad == 0.5).all()


@pytest.mark.parametrize("method", ["gmres", "bicgstab", "cg"])
def test_a_turning_point_is_found_without_a_matrix(method: Literal["gmres", "bicgstab", "cg"]) -> None:
    """cos(asin(1)) is 6e-17, a rounding error: the solve converges, to 1.6e16."""
    x = torch.linspace(0.1, 0.9, 3 * 7, dtype=torch.float64).reshape(3, 7)
    x[1, 4] = 1.0
    x.requires_grad_()
    with pytest.raises(errors.SingularJacobianError, match=r"index \(1,\)"):
        inverse(torch.sin, torch.asin, event_dim=1, jacobian=MatrixFree(method))(x).sum().backward()
    spoilt = inverse(torch.sin, torch.asin, event_dim=1, jacobian=MatrixFree(method), on_failure="nan")
    (gradient,) = torch.autograd.grad(spoilt(x).sum(), x)
    assert gradient.isnan().tolist() == [[False] * 7, [True] * 7, [False] * 7]


@pytest.mark.parametrize("method", ["gmres", "bicgstab", "cg"])
def test_a_large_solution_is_not_a_turning_point(method: Literal["gmres", "bicgstab", "cg"]) -> None:
    """J is constant, however small it is."""
    slope = torch.tensor([1.0, 1e-12, 1.0], dtype=torch.float64)
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: slope * y, lambda x: x / slope, event_dim=1, jacobian=MatrixFree(method))(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (1 / slope).expand(2, 3), rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", ["gmres", "bicgstab", "richardson"])
@pytest.mark.parametrize("scale", [1e-170, 1e-30, 1.0, 1e160])
def test_the_size_of_a_cotangent_does_not_matter(method: Any, scale: float) -> None:
    """Its square may overflow or vanish; one event beside it is of another size."""
    a = torch.eye(3) + torch.tensor([[0.3, -0.2, 0.1], [0.05, 0.2, -0.3], [0.1, 0.15, 0.25]])
    a, v = a.double(), torch.tensor([[1.0, -2.0, 0.5], [scale, -2 * scale, scale / 2]], dtype=torch.float64)
    inv = inverse(
        lambda y: y @ a.T,
        lambda x: torch.linalg.solve(a, x[..., None])[..., 0],
        event_dim=1,
        jacobian=MatrixFree(method),
    )
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    inv(x).backward(v)
    expected = torch.linalg.solve(a.T, v[..., None])[..., 0]
    size = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(x.grad / size, expected / size, rtol=0, atol=1e-11)  # of rtol = 3e-13 and |J^-1|


def test_an_infinite_cotangent_does_not_converge() -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: 2 * y, lambda x: x / 2, event_dim=1, jacobian=MatrixFree())(x)
    with pytest.raises(errors.ConvergenceError):
        y.backward(torch.tensor([1.0, torch.inf, 1.0], dtype=torch.float64))

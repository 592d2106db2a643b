"""Methods for special Jacobians, and the choice of products by default: right, or an error, or the matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backsolve import Dense, Inverse, MatrixFree, errors, inverse
from backsolve.jacobians import default, matrix_free
from backsolve.linalg import LU, Krylov, cg, gmres, richardson
from tests.test_derivatives import assert_close_orders, derivatives
from tests.test_matrix_free import g_from, mixing, random


def product(a: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: (a @ v[..., None])[..., 0]


def positive_definite(seed: int, n: int, condition: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """Three matrices with eigenvalues from 1 to the condition number."""
    q = torch.linalg.qr(random(seed, 3, n, n)).Q
    values = torch.logspace(0, math.log10(condition), n, dtype=q.dtype)
    return (q * values @ q.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradients(dtype: torch.dtype) -> None:
    """Right where it says so, in about n products, without a false alarm, each event by itself."""
    eps = torch.finfo(dtype).eps
    for seed in range(50):
        n = seed % 12 + 1
        a, b = positive_definite(seed, n, 30.0, dtype), random(seed, 3, n, dtype=dtype)
        b[2] = 0
        found = cg(product(a), b, rtol=eps**0.8, maxiter=4 * n + 8)
        assert found.converged.all()
        assert found.products <= 2 * n + 4
        assert found.indefinite is not None
        assert not found.indefinite.any()
        residual = torch.linalg.vector_norm(b - product(a)(found.solution), dim=-1)
        size, u_size = (torch.linalg.vector_norm(t, dim=-1) for t in (b, found.solution))
        assert (residual <= eps**0.8 * size + 8 * eps * 30 * u_size).all()
        assert (found.solution[2] == 0).all()


def test_no_negative_curvature_in_ill_conditioned_matrices() -> None:
    for seed in range(100):
        a = positive_definite(seed, 20, 1e14)
        found = cg(product(a), random(seed, 3, 20), rtol=1e-12, maxiter=200)
        assert found.indefinite is not None
        assert not found.indefinite.any()


def test_a_preconditioner_of_conjugate_gradients_saves_products() -> None:
    scales = torch.logspace(0, 4, 60, dtype=torch.float64)
    small = random(0, 60, 60)
    a = torch.diag(scales) + 0.01 * (small + small.mT)
    b = random(1, 1, 60)
    plain, jacobi = (
        cg(product(a), b, rtol=1e-10, maxiter=400, precondition=m) for m in (None, lambda r: r / scales)
    )  # fmt: skip
    assert jacobi.converged.all()
    assert jacobi.products < plain.products / 2
    torch.testing.assert_close(jacobi.solution[0], torch.linalg.solve(a, b[0]), rtol=1e-8, atol=1e-10)


def test_richardson_takes_the_products_of_the_iteration_by_hand() -> None:
    a = torch.eye(30, dtype=torch.float64) + 0.2 * random(0, 30, 30) / 30**0.5
    b = random(1, 4, 30)
    u, steps = torch.zeros_like(b), 0
    while ((b - product(a)(u)).norm(dim=-1) > 1e-10 * b.norm(dim=-1)).any():
        u, steps = u + b - product(a)(u), steps + 1
    found = richardson(product(a), b, rtol=1e-10, maxiter=100)
    assert found.converged.all()
    assert found.products == steps
    assert not richardson(product(3 * a), b, rtol=1e-10, maxiter=100).converged.any()


@pytest.mark.parametrize("size", [1.0, 1e8])
def test_no_product_is_lost_where_a_batch_does_not_contract(size: float) -> None:
    """What Richardson's iteration tried before it gave up begins the Krylov space, whatever the size of b."""
    a = torch.eye(40, dtype=torch.float64) + 2 * random(0, 3, 40, 40) / 40**0.5
    b, steps = size * random(1, 3, 40), []
    for matrix, right in zip(a, b, strict=True):
        space, r, count = right[:, None], right, 0
        while r.norm() > 1e-10 * right.norm():  # the smallest Krylov space that is large enough, by least squares
            count += 1
            images = matrix @ space
            r = right - images @ torch.linalg.lstsq(images, right[:, None]).solution[:, 0]
            space = torch.linalg.qr(torch.cat([right[:, None], images], 1)).Q
        steps.append(count)
    found = gmres(product(a), b, rtol=1e-10, maxiter=400, restart=50)
    assert found.converged.all()
    assert found.products <= max(steps) + 1  # and a last look
    assert found.growth is not None
    assert (found.growth <= torch.linalg.matrix_norm(a, 2) * found.solution.norm(dim=-1) / b.norm(dim=-1)).all()


@pytest.mark.parametrize("maxiter", [1, 2, 5])
def test_richardson_that_is_stopped_early_is_an_error(maxiter: int) -> None:
    x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    inv = inverse(lambda y: 1.2 * y, lambda x: x / 1.2, event_dim=1, jacobian=MatrixFree("richardson", maxiter=maxiter))
    with pytest.raises(errors.ConvergenceError, match="3 of 3 events not converged"):
        inv(x).sum().backward()


def convex(y: Tensor, a: Tensor) -> Tensor:
    """The gradient of a convex function: J is symmetric, and positive definite if a is."""
    return (a @ y[..., None])[..., 0] + y**3


def near(x: Tensor, a: Tensor) -> Tensor:
    """Newton's method for `convex`."""
    y = torch.zeros_like(x)
    for _ in range(60):
        y = y - torch.linalg.solve(a + torch.diag_embed(3 * y**2), convex(y, a) - x)
    return y


@pytest.mark.parametrize("method", ["cg", "richardson"])
def test_derivatives_to_third_order(method: str) -> None:
    f, g = (convex, near) if method == "cg" else (mixing(4, 0.2)[0], g_from(*mixing(4, 0.2)))
    param = (positive_definite(0, 4, 8.0)[0] if method == "cg" else mixing(4)[1]).requires_grad_()
    inputs = random(1, 3, 4).requires_grad_(), param
    found, expected = (
        derivatives(inverse(f, g, event_dim=1, jacobian=j, verify=method != "cg")(*inputs), inputs, 3)
        for j in (MatrixFree(method, rtol=1e-15), Dense())
    )
    assert_close_orders(found, expected, 200)


def test_an_asymmetry_is_found_at_every_seed_and_no_false_alarm_is_raised() -> None:
    for seed in range(100):
        a = positive_definite(seed, 6, 10.0)
        y = random(seed, 3, 6)
        for size in (0.0, 1e-6):
            off = a.clone()
            off[1, 4, seed % 4] += size
            x = convex(y, off).requires_grad_()
            inv = inverse(
                lambda y, a=off: convex(y, a), lambda _, y=y: y.clone(), event_dim=1, jacobian=MatrixFree("cg")
            )
            if size:
                with pytest.raises(errors.StructureError, match=r"not symmetric(.|\n)*index \(1,\)"):
                    inv(x).sum().backward()
            else:
                inv(x).sum().backward()


def test_negative_curvature_is_an_error() -> None:
    a = positive_definite(0, 6, 10.0)
    a[1] -= 3 * torch.eye(6, dtype=torch.float64)
    y = random(1, 3, 6)
    inv = inverse(lambda y: (a @ y[..., None])[..., 0], lambda _: y.clone(), event_dim=1, jacobian=MatrixFree("cg"))
    x = (a @ y[..., None])[..., 0].requires_grad_()
    with pytest.raises(errors.StructureError, match=r"not positive definite(.|\n)*index \(1,\)"):
        inv(x).sum().backward()


@pytest.mark.parametrize("strength", [0.5, 1.5], ids=["contraction", "no contraction"])
def test_products_for_a_convolution_are_those_of_gmres(strength: float) -> None:
    kernel = random(0, 1, 1, 3, 3)
    kernel = 2 * strength * kernel / kernel.abs().sum()
    y = random(1, 1024).requires_grad_()
    f = lambda y: y + torch.tanh(torch.conv2d(y.reshape(1, 1, 32, 32), kernel, padding=1)).reshape(y.shape)  # noqa: E731
    x, v = f(y), random(2, 1024)

    def pull(w: Tensor) -> Tensor:
        return torch.autograd.grad(x, y, w, retain_graph=True)[0]

    basis, images, r, steps = v[:, None] / v.norm(), [], v, 0
    while r.norm() > 1e-8 * v.norm():  # Arnoldi's basis and least squares: GMRES as the books have it
        images.append(pull(basis[:, -1]))
        mapped, steps = torch.stack(images, 1), steps + 1
        r = v - mapped @ torch.linalg.lstsq(mapped, v[:, None]).solution[:, 0]
        w = images[-1]
        for _ in range(2):
            w = w - basis @ (basis.mT @ w)
        basis = torch.cat([basis, w[:, None] / w.norm()], 1)
    found = gmres(lambda w: pull(w[0])[None], v[None], rtol=1e-8, maxiter=400, restart=200)
    assert found.converged.all()
    assert steps > 10
    assert found.products <= steps + 2


# ---- by default -----------------------------------------------------------------------------------------------------

EVENTS, N = 64, 64  # 2^18 entries of J


def contraction(strength: float = 0.3, **options: object) -> tuple[Inverse, Tensor, Tensor]:
    f, w = mixing(N, strength)
    y = random(1, EVENTS, N)
    inv = inverse(f, lambda x, _: y[: len(x)].clone(), event_dim=1, **options)
    return inv, f(y, w).requires_grad_(), w.requires_grad_()


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    """Every result of a function from now on."""
    function, results = getattr(owner, name), []

    def counting(*args: object, **kwargs: object) -> object:
        results.append(function(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, counting)
    return results


def gradients(inv: Inverse, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(inv(x, w), (x, w), random(2, *x.shape))


def test_a_contraction_needs_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    inv, x, w = contraction()
    expected = gradients(contraction(jacobian=Dense())[0], x, w)
    factorised = counted(monkeypatch, LU, "factor_and_solve")
    for found, e in zip(gradients(inv, x, w), expected, strict=True):
        torch.testing.assert_close(found, e, rtol=0, atol=1e-11 * e.abs().max().item())
    assert not factorised
    gradients(inv, x[:-1], w)  # fewer entries
    assert len(factorised) == 1


def test_what_does_not_converge_is_solved_with_the_matrix_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "_PAUSE", 3)
    inv, x, w = contraction(2.0)
    expected = gradients(contraction(2.0, jacobian=Dense())[0], x, w)
    tried: list[Krylov] = counted(monkeypatch, matrix_free, "richardson")  # type: ignore[assignment]
    for found, e in zip(gradients(inv, x, w), expected, strict=True):
        torch.testing.assert_close(found, e, rtol=1e-13, atol=1e-13 * e.abs().max().item())
    for _ in range(4):
        gradients(inv, x, w)
    assert [k.products <= 3 for k in tried] == [True, True]  # the first call, three without a trial, the fifth


@pytest.mark.parametrize("use", ["gradient", "log-determinant", "inverse"])
def test_a_singular_event_is_found_by_default(use: str) -> None:
    scales = torch.ones(EVENTS, N, dtype=torch.float64)
    scales[3, 5] = 0.0
    y = random(1, EVENTS, N)
    inv = inverse(lambda y: scales * y, lambda x: y.clone(), event_dim=1)
    x = (scales * y).requires_grad_()
    uses = {
        "gradient": lambda: inv(x).sum().backward(),
        "log-determinant": lambda: inv.with_log_det(x),
        "inverse": lambda: inv.jacobian(x),
    }
    with pytest.raises(errors.SingularJacobianError, match=r"index \(3,\)"):
        uses[use]()


def test_a_coupled_batch_is_found_where_products_are_used() -> None:
    for seed in range(3):
        y = random(seed, EVENTS, N)
        inv = inverse(lambda y: y + 1e-6 * (y - y.mean(0)) / y.std(0), lambda _, y=y: y.clone(), event_dim=1)
        x = (y + 1e-6 * (y - y.mean(0)) / y.std(0)).requires_grad_()
        with pytest.raises(errors.StructureError, match="independent across the batch"):
            inv(x).sum().backward()


@pytest.mark.parametrize(
    ("jacobian", "error"),
    [
        (MatrixFree(), errors.ConvergenceError),
        (MatrixFree(fallback=Dense()), errors.SingularJacobianError),
        (None, errors.SingularJacobianError),
    ],
)
def test_a_singular_event_is_found_under_torch_func(jacobian: MatrixFree | None, error: type[Exception]) -> None:
    scales = torch.tensor([[1.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    x = torch.zeros(2, 2, dtype=torch.float64)
    inv = inverse(lambda y: scales * y, lambda x: x.clone(), event_dim=1, jacobian=jacobian)
    with pytest.raises(error, match=r"index \(1,\)"):
        torch.func.grad(lambda x: inv(x).sum())(x)


def test_a_fallback_judges_solutions_that_are_too_large() -> None:
    """A direction in which J is 1e-10: products give a w of 1e10 with the digits that rtol asks for, LU some more."""
    q = torch.linalg.qr(random(0, 4, 4)).Q
    sizes = torch.tensor([[1.0, 2.0, 3.0, 1e-10], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    a = q * sizes[:, None, :] @ q.mT
    y = random(1, 2, 4)
    x = product(a)(y).requires_grad_()
    by_products, both, by_lu = (
        torch.autograd.grad(inverse(product(a), lambda _: y.clone(), event_dim=1, jacobian=j)(x).sum(), x)[0]
        for j in (MatrixFree(rtol=1e-6), MatrixFree(rtol=1e-6, fallback=Dense()), Dense())
    )
    assert torch.equal(both[0], by_lu[0])
    assert not torch.equal(by_products[0], by_lu[0])
    assert torch.equal(both[1], by_products[1])


def test_log_determinant_and_inverse_by_default() -> None:
    inv, x, w = contraction()
    direct, *_ = contraction(jacobian=Dense())
    for use in (lambda i: i.with_log_det(x, w)[1], lambda i: i.jacobian(x, w)):
        ours, theirs = use(inv), use(direct)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), w)[0] for t in (ours, theirs)))


def test_without_memory_for_the_matrix_an_error_says_what_to_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "_TOO_MANY", 2**18)
    a, y = random(0, 600, 600), random(1, 600)
    inv = inverse(lambda y: a @ y, lambda _: y.clone(), event_dim=1, verify=False)
    with pytest.raises(errors.ConvergenceError, match="fallback=Dense"):
        inv((a @ y).requires_grad_()).sum().backward()

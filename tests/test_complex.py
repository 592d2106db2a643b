"""Complex x: holomorphic f are inverted like real ones, in torch's convention for gradients; others are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap

from backsolve import Banded, Dense, Diagonal, Triangular, errors, inverse
from backsolve.solvers import Bracket, numpy_solver
from tests.test_transforms import assert_same


def numbers(*shape: int, dtype: torch.dtype = torch.complex128) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=dtype, generator=generator)


def matrices(n: int) -> Tensor:
    return numbers(n, n) + 3 * torch.eye(n)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def orders(h: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The first and second derivatives of a real function of h."""
    inputs = leaves(*inputs)
    y = h(*inputs)
    first = torch.autograd.grad((y * y).real.sum() + y.imag.exp().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum((g * g).real.sum() if g.is_complex() else (g**3).sum() for g in first), inputs)
    return [*first, *second]


def cubic(y: Tensor, a: Tensor) -> Tensor:
    return a * y**3


def cube_root(x: Any, a: Any) -> Any:
    return (x / a) ** (1 / 3)


CASES = {
    "exp": (inverse(torch.exp, np.log), torch.log, lambda: (numbers(4),)),
    "complex param": (inverse(cubic, numpy_solver(cube_root)), cube_root, lambda: (numbers(2, 3), numbers(4)[1:])),
    "real param": (inverse(cubic, numpy_solver(cube_root)), cube_root, lambda: (numbers(4), numbers(4).real.abs() + 1)),
    "known entries": (
        inverse(cubic, numpy_solver(cube_root), jacobian=Diagonal(entries=lambda y, a: 3 * a * y**2)),
        cube_root,
        lambda: (numbers(3), numbers(4)[1:]),
    ),
    "dense": (
        inverse(
            lambda y, a: (a @ y.sinh()[..., None])[..., 0],
            lambda x, a: torch.asinh(torch.linalg.solve(a, x[..., None])[..., 0]),
            event_dim=1,
            jacobian=Dense(),
        ),
        lambda x, a: torch.asinh((torch.linalg.inv(a) @ x[..., None])[..., 0]),
        lambda: (numbers(2, 3), matrices(3)),
    ),
    "triangular": (
        inverse(
            lambda y, a: (a.tril() @ y[..., None])[..., 0],
            lambda x, a: torch.linalg.solve(a.tril(), x[..., None])[..., 0],
            event_dim=1,
            jacobian=Triangular(),
        ),
        lambda x, a: (torch.linalg.inv(a.tril()) @ x[..., None])[..., 0],
        lambda: (numbers(2, 3), matrices(3)),
    ),
}


@pytest.mark.parametrize(("inv", "exact", "sample"), CASES.values(), ids=list(CASES))
def test_first_and_second_derivatives(inv: Any, exact: Any, sample: Any) -> None:
    assert_same(orders(inv, sample()), orders(exact, sample()))


@pytest.mark.parametrize(("inv", "exact", "sample"), CASES.values(), ids=list(CASES))
def test_transforms(inv: Any, exact: Any, sample: Any) -> None:
    inputs = sample()
    directions = tuple(t.flip(-1) for t in inputs)
    assert_same(jvp(inv, inputs, directions), jvp(exact, inputs, directions))
    batch = tuple(torch.stack([t, 1.1 * t]) for t in inputs)
    assert_same(vmap(inv)(*batch), vmap(exact)(*batch))


def test_complex64() -> None:
    (x,) = leaves(numbers(5, dtype=torch.complex64))
    (expected,) = leaves(x)
    inverse(torch.exp, np.log)(x).abs().sum().backward()
    torch.log(expected).abs().sum().backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_the_log_determinant_is_real() -> None:
    x, a = numbers(2, 3), matrices(3)
    inv = CASES["dense"][0]
    y, log_det = inv.with_log_det(x, a)
    j = a * y.cosh()[:, None, :]
    torch.testing.assert_close(log_det, -torch.linalg.slogdet(j)[1])
    torch.testing.assert_close(inv.jacobian(x, a), torch.linalg.inv(j))


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("verify", [True, False])
def test_a_function_that_is_not_holomorphic_is_refused(shape: tuple[int, ...], verify: bool) -> None:
    """Of a wrong structure nobody would know without the test: torch returns some gradient."""
    inv = inverse(lambda y: y * y.abs(), lambda x: x / x.abs().sqrt(), verify=verify)
    (x,) = leaves(numbers(*shape))
    with pytest.raises(errors.StructureError, match="not holomorphic"):
        inv(x).abs().sum().backward()
    with pytest.raises(errors.StructureError, match="not holomorphic"):
        torch.func.grad(lambda x: inv(x).abs().sum())(x.detach())
    conjugate = inverse(torch.conj_physical, torch.conj_physical, verify=verify)
    with pytest.raises(errors.StructureError, match="not holomorphic"):
        conjugate(x).abs().sum().backward()


def test_a_small_conjugate_part_is_found() -> None:
    (x,) = leaves(numbers(4))
    inv = inverse(lambda y: y + 1e-9 * y.conj(), lambda x: (x - 1e-9 * x.conj()) / (1 - 1e-18))
    with pytest.raises(errors.StructureError, match="not holomorphic"):
        inv(x).abs().sum().backward()


def test_a_coupling_is_found() -> None:
    (x,) = leaves(numbers(4))
    inv = inverse(lambda y: y + 0.01 * y.sum(), lambda x: x - 0.01 * x.sum() / 1.04)
    with pytest.raises(errors.StructureError, match="not elementwise"):
        inv(x).abs().sum().backward()


STRUCTURES = {
    "Diagonal": (Diagonal(), 0),
    "Dense": (Dense(), 1),
    "Triangular": (Triangular(), 1),
    "Banded": (Banded(1, 1), 1),
}


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize(("jacobian", "event_dim"), STRUCTURES.values(), ids=STRUCTURES.keys())
@pytest.mark.parametrize(("dtype", "largest"), [(torch.complex64, 3.4e38), (torch.complex128, 1.79e308)])
def test_slopes_whose_parts_overflow(n: int, jacobian: Any, event_dim: int, dtype: torch.dtype, largest: float) -> None:
    """torch and LAPACK divide by way of |re| + |im|, and answer 0 where that overflows."""
    for scale in (1e-3, 0.5, 0.6, 0.9):
        slope = scale * largest * (1 + 1j)
        y = torch.full((n,), 1e-3, dtype=dtype)
        x = (y * slope).requires_grad_()
        result = inverse(lambda y, c=slope: y * c, lambda _, y=y: y.clone(), event_dim=event_dim, jacobian=jacobian)(x)
        if scale > 0.5:
            with pytest.raises(errors.SingularJacobianError):
                result.real.sum().backward()
        elif scale < 0.5:
            result.real.sum().backward()
            assert x.grad is not None
            scaled = x.grad * (2 * slope.real)  # subnormal numbers in complex64 have few digits
            assert (scaled - (1 + 1j)).abs().max() <= 1e-2


@pytest.mark.parametrize("n", [1, 2, 40])
def test_numbers_whose_modulus_overflows(n: int) -> None:
    x = torch.full((n,), 1.5e308 * (1 + 1j), dtype=torch.complex128)
    assert torch.equal(inverse(torch.positive, lambda x: x.clone())(x), x)
    with pytest.raises(errors.ResidualError):
        inverse(torch.positive, lambda x: x / 2)(x)
    with pytest.raises(errors.ResidualError):  # a modulus of infinity leaves room for any Newton step
        inverse(lambda y: 1e-3 * y, lambda _: x.clone())(x / 2e3)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_not_a_number(n: int) -> None:
    """The underflow of exp leaves an error behind at which Python's abs(complex(nan, 1)) would raise."""
    y = torch.full((n,), 2000 + 1j, dtype=torch.complex128)
    y[0] = complex(math.nan, 1)
    x = torch.full((n,), 0.5 + 0.1j, dtype=torch.complex128)
    assert inverse(lambda y: torch.exp(-y), lambda _: y.clone(), on_failure="nan")(x).isnan().all()


def test_errors() -> None:
    x = numbers(3)
    with pytest.raises(errors.ResidualError, match="index"):
        inverse(torch.exp, lambda x: x.log() * 1.01)(x)
    with pytest.raises(errors.ArgumentError, match="real"):
        inverse(torch.exp, Bracket(0.0, 1.0))(x)
    (z,) = leaves(torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(errors.SingularJacobianError):
        inverse(lambda y: y**2, torch.sqrt)(z).abs().sum().backward()

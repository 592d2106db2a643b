"""Where J has no inverse: which events are singular, what they do to the others, and what is no singularity."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from backsolve import Banded, Dense, Diagonal, errors, implicit_function, inverse
from backsolve.jacobians import Jacobian
from backsolve.linalg import LU, Factored

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_arcsin_at_its_ends(dtype: torch.dtype, end: float) -> None:
    """cos(asin(1)) is -4.4e-8 in float32: its inverse, -2.3e7, has the wrong sign and no right digit."""
    x = torch.tensor([0.5, end], dtype=dtype, requires_grad=True)
    y = inverse(torch.sin, np.arcsin)(x)
    with pytest.raises(errors.SingularJacobianError) as caught:
        y.sum().backward()
    for part in ("inverse(sin, arcsin)", "1 of 2 elements singular", "index (1,)", "f'(y) = ", "on_failure"):
        assert part in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("n", [2**14, 2**16])
def test_a_turning_point_among_many_elements_of_one_sign(dtype: torch.dtype, sign: int, n: int) -> None:
    """The ranges of y, f' and x tell that all is well with the others, and must not tell it with this one."""
    x = (sign * torch.linspace(0.1, 0.9, n)).to(dtype).requires_grad_()
    inverse(torch.sin, torch.asin)(x).sum().backward()
    torch.testing.assert_close(x.grad, (1 - x.detach() ** 2).rsqrt())
    ended = torch.where(torch.arange(len(x)) == 5000, sign, x.detach()).requires_grad_()
    with pytest.raises(errors.SingularJacobianError, match=rf"1 of {n} elements singular.*index \(5000,\)"):
        inverse(torch.sin, torch.asin)(ended).sum().backward()


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("beside", [1, 100])
def test_a_turning_point_whose_x_is_zero(shift: float, scale: float, beside: int) -> None:
    """scale (sin(y) - 1) = 0, as an inverse at x = 0 and as an implicit function: no x to compare f' with."""
    x = torch.zeros(1 + beside, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([math.pi / 2] + [math.asin(1 - shift)] * beside, dtype=torch.float64)
    target = torch.tensor([1.0] + [1 - shift] * beside, dtype=torch.float64)
    by_inverse = inverse(lambda y: scale * (torch.sin(y) - target), lambda x: y.clone())(x)
    by_condition = implicit_function(lambda y, p: scale * (torch.sin(y) - target - p), lambda p: y.clone())(x)
    for solution in (by_inverse, by_condition):
        with pytest.raises(errors.SingularJacobianError, match=r"index \(0,\)"):
            solution.sum().backward()


def test_an_implicit_function_that_is_not_singular() -> None:
    p = torch.tensor([1e-9, 0.5, 4.0, 1e300], dtype=torch.float64, requires_grad=True)
    implicit_function(lambda y, p: y**2 - p, torch.sqrt)(p).sum().backward()
    torch.testing.assert_close(p.grad, 0.5 / p.detach().sqrt(), rtol=4 * EPS, atol=0)


def test_turning_point_that_y_misses_by_the_rounding_of_x() -> None:
    """Newton for arccosh at 1 stops 1e-8 from 0, where sinh is 1e-8, all of it error."""

    def newton(x: Tensor) -> Tensor:
        y = torch.ones_like(x)
        for _ in range(60):
            y = y - (y.cosh() - x) / y.sinh()
        return y

    x = torch.tensor([2.0, 1.0], dtype=torch.float64, requires_grad=True)
    y = inverse(torch.cosh, newton)(x)
    with pytest.raises(errors.SingularJacobianError, match=r"index \(1,\)"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dense_turning_point(dtype: torch.dtype) -> None:
    """J is far from singular in its entries, but the entry cos(asin(1)) is all rounding error."""
    mix = torch.tensor([[2.0, 1.0], [-1.0, 1.5]], dtype=dtype)
    forwards = (torch.sin, lambda y: torch.sin(y @ mix.T))
    solvers = (torch.asin, lambda x: torch.linalg.solve(mix, torch.asin(x).mT).mT)
    x = torch.tensor([[0.3, 0.5], [1.0, 0.5]], dtype=dtype, requires_grad=True)
    for f, g in zip(forwards, solvers, strict=True):
        with pytest.raises(errors.SingularJacobianError, match=r"index \(1,\)"):
            inverse(f, g, event_dim=1)(x).sum().backward()
        inverse(f, g, event_dim=1)(x[:1]).sum().backward()


def test_a_turning_point_in_a_large_event() -> None:
    """As above, where there are too many elements to look at each."""
    x = torch.linspace(0.1, 0.9, 3 * 40, dtype=torch.float64).reshape(3, 40)
    inverse(torch.sin, torch.asin, event_dim=1)(x.clone().requires_grad_()).sum().backward()
    x[1, 7] = 1.0
    with pytest.raises(errors.SingularJacobianError, match=r"index \(1,\)"):
        inverse(torch.sin, torch.asin, event_dim=1)(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("size", [1e-200, 1e-170, 1.0, 1e170, 1e200])
def test_singular_matrices_of_any_size_are_found(size: float) -> None:
    """Also where squares of their entries are 0 or infinite."""
    a = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a[1, 4] = a[1, :4].sum(0)
    found = Factored(LU(), size * a).singular()
    assert found is not None
    assert found.tolist() == [False, True]
    found = Factored(LU(), size * a[:1]).singular()
    assert found is None or not found.any()


@pytest.mark.parametrize("structure", [Dense(), Banded(1, 1)], ids=str)
def test_a_direction_of_y_that_no_equation_sees(structure: Jacobian) -> None:
    """One column of J is rounding error; each of its rows, and each pivot beside its column, looks well."""
    mix = torch.tensor([[2.0, 1.0], [-1.0, 1.5]], dtype=torch.float64)
    x = torch.tensor([[0.3, 0.5], [1.0, 0.5]], dtype=torch.float64) @ mix.T
    inv = inverse(
        lambda y: torch.sin(y) @ mix.T,
        lambda x: torch.asin(torch.linalg.solve(mix, x.mT).mT.clamp(-1, 1)),
        event_dim=1,
        jacobian=structure,
    )
    with pytest.raises(errors.SingularJacobianError, match=r"index \(1,\)"):
        inv(x.requires_grad_()).sum().backward()
    inv(x[:1]).sum().backward()


@pytest.mark.parametrize("slope", [2.0, 5.0, 11.0])
def test_a_badly_scaled_y_is_no_singularity(slope: float) -> None:
    """A pressure in pascal beside a mole fraction: J is triangular with a unit diagonal."""

    def conditions(y: Tensor, q: Tensor) -> Tensor:
        return torch.stack([y[..., 0] - 1e6 * torch.exp(slope * (y[..., 1] - 1)), y[..., 1] - q], -1)

    def solver(q: Tensor) -> Tensor:
        return torch.stack([1e6 * torch.exp(slope * (q - 1)), q], -1)

    q = torch.tensor(0.9, dtype=torch.float32, requires_grad=True)
    y = implicit_function(conditions, solver, event_dim=1)(q)
    (by_q,) = torch.autograd.grad(y[0], q)
    assert math.isclose(by_q.item(), 1e6 * slope * math.exp(slope * (0.9 - 1)), rel_tol=1e-5)


def test_f_that_raises_outside_its_domain() -> None:
    """The second look at a turning point may step outside; that is no reason to fail the others."""

    def sine(y: Tensor) -> Tensor:
        if (y > math.pi / 2).any():
            raise ValueError("outside")
        return torch.sin(y)

    x = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    y = inverse(sine, torch.asin, on_failure="nan")(x)
    assert torch.autograd.grad(y.sum(), x)[0].isnan().tolist() == [False, True]


def test_opaque_f_with_known_entries_at_a_turning_point() -> None:
    x = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    opaque = inverse(lambda y: y.detach().sin(), np.arcsin, jacobian=Diagonal(entries=torch.cos))
    torch.testing.assert_close(torch.autograd.grad(opaque(x[:1]).sum(), x)[0][0].item(), 1 / math.sqrt(0.75))
    with pytest.raises(errors.SingularJacobianError):
        opaque(x).sum().backward()


def test_policies_for_a_singular_element() -> None:
    x = torch.tensor([0.5, 1.0], requires_grad=True)
    expected = 1 / math.sqrt(0.75)
    y = inverse(torch.sin, np.arcsin, on_failure="nan")(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert slope.isnan().tolist() == [False, True]
    assert torch.autograd.grad(slope.sum(), x)[0].isnan().tolist() == [False, True]
    assert math.isclose(slope[0].item(), expected, rel_tol=1e-6)
    y = inverse(torch.sin, np.arcsin, on_failure="warn")(x)
    with pytest.warns(errors.BacksolveWarning, match="singular"):
        y.sum().backward()


def test_ignored_zero_derivative_is_infinite() -> None:
    x = torch.tensor([0.0, 8.0], dtype=torch.float64, requires_grad=True)
    inverse(lambda y: y**3, torch.sgn, on_failure="ignore")(x).sum().backward()
    assert x.grad[0] == math.inf


@pytest.mark.parametrize("y", [0.0, 1e-18, -1e-18, 3e-10])
def test_a_small_y_is_no_singularity(y: float) -> None:
    """log at 1: y is far smaller than x, yet f'(y) = e^y = 1 is exact."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    offset = torch.tensor([y, 0.0], dtype=torch.float64)
    inverse(torch.exp, lambda x: torch.log(x) + offset)(x).sum().backward()
    torch.testing.assert_close(x.grad, 1 / x.detach(), rtol=4e-10, atol=0)


def test_float32_near_one() -> None:
    x = torch.tensor([1 + 2**-23, 1 - 2**-24, 1.0], requires_grad=True)
    inverse(torch.exp, np.log)(x).sum().backward()
    torch.testing.assert_close(x.grad, 1 / x.detach(), rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def singular_in_the_middle(on_failure: str) -> tuple[Tensor, Tensor, Tensor]:
    """y_1 y_2 = x_1, y_1 + y_2 = x_2: J is singular where y_1 = y_2."""

    def f(y: Tensor) -> Tensor:
        return torch.stack([y[..., 0] * y[..., 1], y.sum(-1)], -1)

    y = torch.tensor([[1.0, 2.0], [0.3, 0.3], [4.0, 1.0]], dtype=torch.float64)
    x = f(y).requires_grad_()
    return x, inverse(f, lambda x: y.clone(), event_dim=1, on_failure=on_failure)(x), y


def test_singular_dense_jacobian_is_refused() -> None:
    _, y, _ = singular_in_the_middle("raise")
    with pytest.raises(errors.SingularJacobianError) as caught:
        y.sum().backward()
    for part in ("1 of 3 events singular", "index (1,)", "singular values of J reach from 1.4", "remedy"):
        assert part in str(caught.value)


def test_a_singular_event_leaves_the_others_unharmed() -> None:
    x, y, exact = singular_in_the_middle("nan")
    v = torch.tensor([[1.0, 2.0], [1.0, 1.0], [-1.0, 0.5]], dtype=torch.float64)
    (by_x,) = torch.autograd.grad(y, x, v, create_graph=True)
    assert by_x.isnan().any(-1).tolist() == [False, True, False]
    for i in (0, 2):
        a, b = exact[i]
        jacobian = torch.stack([torch.stack([b, a]), torch.ones(2, dtype=a.dtype)])
        torch.testing.assert_close(by_x[i], torch.linalg.solve(jacobian.T, v[i]), rtol=16 * EPS, atol=0)
    (second,) = torch.autograd.grad(by_x.sum(), x)
    assert second.isnan().any(-1).tolist() == [False, True, False]


def random_matrices(n: int, batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, n, n, dtype=torch.float64).to(dtype)


def is_singular(matrices: Tensor) -> Tensor:
    found = Factored(LU(), matrices).singular()
    return torch.zeros(len(matrices), dtype=torch.bool) if found is None else found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 64])
def test_rounded_singular_matrices_are_found_and_scaled_good_ones_are_not(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    good = random_matrices(n, 200, dtype)
    condition = torch.linalg.cond(good.double())
    good = good[condition < 0.01 / torch.finfo(dtype).eps]
    rows, columns = (torch.exp(6 * torch.randn(len(good), *shape)).to(dtype) for shape in ((n, 1), (1, n)))
    assert not is_singular(good).any()
    assert not is_singular(rows * good * columns).any()
    if n > 1:
        u, s, v = torch.linalg.svd(random_matrices(n, 200, torch.float64))
        s[:, -1] = 0
        singular = (u * s[:, None] @ v).to(dtype)
        assert is_singular(singular).all()
        assert all(is_singular(one) for one in singular[:20, None])
    broken = good.clone()
    broken[3] = 0
    broken[5, 0, 0] = math.nan
    assert is_singular(broken).nonzero().flatten().tolist() == [3, 5]
    assert [k for k in range(10) if is_singular(broken[k : k + 1])] == [3, 5]


@pytest.mark.parametrize("transposed", [False, True])
def test_lu_is_differentiable_to_second_order(transposed: bool) -> None:
    torch.manual_seed(0)
    a = (torch.randn(2, 3, 3, dtype=torch.float64) + 3 * torch.eye(3)).requires_grad_()
    b = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    solve = lambda a, b: Factored(LU(), a).solve(b, adjoint=transposed)  # noqa: E731
    torch.testing.assert_close((a.mT if transposed else a) @ solve(a, b), b, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(solve, (a, b))
    assert torch.autograd.gradgradcheck(solve, (a, b))
    log_abs_det = lambda a: Factored(LU(), a).log_abs_det()  # noqa: E731
    torch.testing.assert_close(log_abs_det(a), torch.linalg.slogdet(a)[1], rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(log_abs_det, (a,))
    assert torch.autograd.gradgradcheck(log_abs_det, (a,))


@pytest.mark.parametrize("condition", [1e3, 1e8])
def test_ill_conditioned_gradients_are_as_good_as_lu(condition: float) -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(5, 8, 8, dtype=torch.float64))
    a = u * torch.logspace(0, -math.log10(condition), 8, dtype=torch.float64) @ v
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: (a @ y[..., None])[..., 0], lambda x: torch.linalg.solve(a, x), event_dim=1)(x)
    weights = torch.randn(5, 8, dtype=torch.float64)
    (by_x,) = torch.autograd.grad(y, x, weights)
    direct = torch.linalg.solve(a.mT, weights)
    bound = 10 * 8 * EPS * condition * direct.norm(dim=-1)
    assert ((by_x - direct).norm(dim=-1) <= bound).all()

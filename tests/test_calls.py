"""How an Inverse is called: shapes, params, what g may be and return, and the errors for what cannot work."""

import copy
import gc
import math
import operator
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import backsolve
from backsolve import Diagonal, Inverse, errors, implicit_function, inverse, inverse_of
from backsolve.solvers import numpy_solver
from tests.problems import BY_NAME

EPS = torch.finfo(torch.float64).eps
arcsin = inverse(torch.sin, np.arcsin)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ shapes


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 0, 3), (2, 1, 3, 1, 2)])
def test_elementwise_shapes(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.6, dtype=torch.float64, requires_grad=True)
    y = arcsin(x)
    assert y.shape == x.shape
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, torch.full(shape, 1.25, dtype=torch.float64), rtol=8 * EPS, atol=0)
    (second,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(second, torch.full(shape, 0.6 / 0.512, dtype=torch.float64), rtol=16 * EPS, atol=0)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (2, 1, 3)])
def test_batches_of_events(batch: tuple[int, ...]) -> None:
    problem = BY_NAME["mixed sinh"]
    _, mix, shift = problem.inputs()
    x = torch.randn(*batch, 3, dtype=torch.float64, requires_grad=True)
    actual, expected = problem.explicit()(x, mix, shift), problem.exact(x, mix, shift)
    for a, e in zip(torch.autograd.grad(actual.sum(), (x, mix, shift)), grads(expected, x, mix, shift), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


def grads(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.sum(), inputs)


def test_empty_event() -> None:
    x = torch.zeros(3, 0, dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: 2 * y, lambda x: x / 2, event_dim=1)(x)
    assert grads(y, x)[0].shape == (3, 0)


@pytest.mark.parametrize("event_dim", [0, 1])
def test_non_contiguous_and_expanded_inputs(event_dim: int) -> None:
    base = torch.rand(3, 4, dtype=torch.float64)
    for x in (base.T, base[:, ::2], base[0].expand(2, 4), base.T.flip(0)):
        leaf = x.detach().requires_grad_()
        (slope,) = grads(inverse(torch.sin, np.arcsin, event_dim=event_dim)(leaf), leaf)
        torch.testing.assert_close(slope, 1 / (1 - x**2).sqrt(), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("x_shape", "a_shape"), [((), (3,)), ((4, 1), (3,)), ((3,), (2, 3)), ((2, 1, 3), (4, 1))])
def test_broadcasting_with_params(x_shape: tuple[int, ...], a_shape: tuple[int, ...]) -> None:
    x = torch.rand(x_shape, dtype=torch.float64, requires_grad=True)
    a = (torch.rand(a_shape, dtype=torch.float64) + 1).requires_grad_()
    y = inverse(lambda y, a: a * y, lambda x, a: x / a)(x, a)
    assert y.shape == torch.broadcast_shapes(x_shape, a_shape)
    for actual, expected in zip(grads(y, x, a), grads(x / a, x, a), strict=True):
        torch.testing.assert_close(actual, expected, rtol=16 * EPS, atol=0)


def test_one_x_for_a_batch_of_matrices() -> None:
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    a = (torch.rand(5, 3, 3, dtype=torch.float64) + 3 * torch.eye(3)).requires_grad_()
    solve = inverse(lambda y, a: (a @ y[..., None])[..., 0], lambda x, a: a.inverse() @ x, event_dim=1)
    y = solve(x, a)
    assert y.shape == (5, 3)
    exact = torch.linalg.solve(a, x[:, None])[..., 0]
    for actual, expected in zip(grads(y, x, a), grads(exact, x, a), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("event_dim", [0, 1])
def test_low_precision(dtype: torch.dtype, event_dim: int) -> None:
    x = torch.tensor([[0.25, 0.5]], dtype=dtype, requires_grad=True)
    (slope,) = grads(inverse(torch.sin, np.arcsin, event_dim=event_dim)(x), x)
    assert slope.dtype == dtype
    exact = 1 / (1 - x.detach().double() ** 2).sqrt()
    torch.testing.assert_close(slope.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_nothing_of_ours_runs_under_autocast() -> None:
    torch.manual_seed(0)
    w = torch.randn(32, 32) / 8
    x = torch.randn(4, 32, requires_grad=True)

    def fixed_point(x: Tensor) -> Tensor:
        y = x
        for _ in range(60):
            y = x - torch.tanh(y @ w.T) / 2
        return y

    def everything() -> list[Tensor]:
        y, log_det = inv.with_log_det(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return [y, log_det, slope, inv.jacobian(x), *torch.autograd.grad((slope**2).sum(), x)]

    inv = inverse(lambda y: y + torch.tanh(y @ w.T) / 2, fixed_point, event_dim=1)
    expected = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inv = inverse(
            lambda y: y + torch.tanh(y @ w.T) / 2, torch.autocast("cpu", enabled=False)(fixed_point), event_dim=1
        )
        actual = everything()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ params


def test_pytrees_keywords_and_constants() -> None:
    def f(y: Tensor, scale: dict[str, Any], *, power: int, shift: list[Tensor]) -> Tensor:
        return scale["a"] * y**power + shift[0] * shift[1]

    def g(x: Tensor, scale: dict[str, Any], *, power: int, shift: list[Tensor]) -> Tensor:
        return ((x - shift[0] * shift[1]) / scale["a"]) ** (1 / power)

    x, a, b, c = (double(v).requires_grad_() for v in (9.0, 2.0, 0.5, 3.0))
    call = {"scale": {"a": a, "note": "a constant"}, "power": 3, "shift": [b, c]}
    actual = inverse(f, g)(x, **call)
    for i, e in zip(grads(actual, x, a, b, c), grads(g(x, **call), x, a, b, c), strict=True):
        torch.testing.assert_close(i, e, rtol=64 * EPS, atol=0)


def test_integer_params_and_params_without_gradient_are_constants() -> None:
    x = double(9.0).requires_grad_()
    y = inverse(lambda y, n, a: a * y**n, lambda x, n, a: (x / a) ** (1 / n.item()))(x, torch.tensor(3), double(2.0))
    torch.testing.assert_close(grads(y, x)[0], y.detach() / (3 * x.detach()), rtol=16 * EPS, atol=0)


def test_a_param_without_derivative_in_torch_is_no_obstacle() -> None:
    """torch.special.gammaincc has no derivative in its first argument; nobody asks for it here."""
    scipy_special = pytest.importorskip("scipy.special", reason="scipy is part of the test requirements")
    x = double(0.3, 0.7).requires_grad_()
    a = double(2.5).requires_grad_()
    inv = inverse(
        lambda y, a: torch.special.gammaincc(a, y), numpy_solver(lambda x, a: scipy_special.gammainccinv(a, x))
    )
    y = inv(x, a.detach())
    density = y.detach() ** 1.5 * (-y.detach()).exp() / math.gamma(2.5)
    torch.testing.assert_close(grads(y, x)[0], -1 / density, rtol=1e-8, atol=0)
    torch.testing.assert_close(grads(inv(x, a), x)[0], -1 / density, rtol=1e-8, atol=0)


def test_param_used_twice() -> None:
    x, a = double(2.0, 3.0).requires_grad_(), double(1.5).requires_grad_()
    y = inverse(lambda y, a, b: a * b * y, lambda x, a, b: x / (a * b))(x, a, a)
    torch.testing.assert_close(grads(y, a)[0], (-2 * x / a**3).sum().detach()[None], rtol=16 * EPS, atol=0)


def test_no_grad_and_inference_mode() -> None:
    x = double(0.5).requires_grad_()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert not arcsin(x).requires_grad


# ------------------------------------------------------------------------------------------------ solvers


def test_g_runs_once() -> None:
    calls: list[Tensor] = []

    def g(x: Tensor) -> Tensor:
        calls.append(x)
        return torch.asin(x)

    x = double(0.1, 0.5).requires_grad_()
    (slope,) = torch.autograd.grad(inverse(torch.sin, g)(x).sum(), x, create_graph=True)
    slope.sum().backward()
    assert len(calls) == 1
    assert not calls[0].requires_grad


@pytest.mark.parametrize("requires_grad", [True, False])
def test_f_runs_once_in_a_call(requires_grad: bool) -> None:
    calls: list[Tensor] = []

    def f(y: Tensor) -> Tensor:
        calls.append(y)
        return torch.sin(y)

    x = double(0.1, 0.5).requires_grad_(requires_grad)
    y = inverse(f, torch.asin, verify=False)(x)
    if requires_grad:
        y.sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numpy_code_in_every_form(dtype: torch.dtype) -> None:
    x = torch.tensor([0.1, 0.5], dtype=dtype)
    for g in (
        np.arcsin,
        numpy_solver(np.arcsin),
        numpy_solver(lambda x: np.arcsin(x.astype(float))),
        lambda x: np.arcsin(x.numpy()),
    ):
        y = inverse(torch.sin, g)(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, torch.asin(x), rtol=4 * torch.finfo(dtype).eps, atol=0)


def test_numpy_solver_may_write_into_its_arrays_and_reuse_its_buffer() -> None:
    buffer = np.empty(2)

    def g(x: np.ndarray) -> np.ndarray:
        np.arcsin(x, out=buffer)
        x[:] = math.nan
        return buffer

    inv = inverse(torch.sin, numpy_solver(g))
    x = double(0.1, 0.5)
    first = inv(x)
    kept = first.clone()
    inv(double(0.2, 0.3))
    assert torch.equal(first, kept)
    assert x.tolist() == [0.1, 0.5]


@pytest.mark.parametrize("returned", ["x itself", "a view of x", "a param"])
def test_g_that_returns_its_argument(returned: str) -> None:
    x, a = double(1.0, 2.0).requires_grad_(), double(1.0, 2.0)
    g = {"x itself": lambda x, a: x, "a view of x": lambda x, a: x[:], "a param": lambda x, a: a}[returned]
    y = inverse(lambda y, a: y + 0 * a, g)(x, a)
    assert grads(y * y, x)[0].tolist() == [2.0, 4.0]
    with torch.no_grad():
        y.mul_(2)
    assert x.tolist() == a.tolist() == [1.0, 2.0]


def test_g_may_use_autograd_itself() -> None:
    def g(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for _ in range(60):
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                z = y + y.sin() / 2
                (slope,) = torch.autograd.grad(z.sum(), y)
            y = y - (z - x) / slope
        return y

    x = double(0.1, 2.0).requires_grad_()
    y = inverse(lambda y: y + y.sin() / 2, g)(x)
    torch.testing.assert_close(grads(y, x)[0], 1 / (1 + y.detach().cos() / 2), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("holds", ["numpy buffer", "torch buffer", "weight"])
def test_y_does_not_change_with_what_g_holds_on_to(holds: str) -> None:
    array, buffer, weight = np.empty(2), torch.empty(2, dtype=torch.float64), double(0.3, 0.4)
    solvers = {
        "numpy buffer": lambda x: torch.from_numpy(np.arcsin(x.numpy(), out=array)),
        "torch buffer": lambda x: torch.asin(x, out=buffer),
        "weight": lambda _: weight,
    }
    y = inverse(torch.sin, solvers[holds])(weight.sin())
    kept = y.clone()
    array[:] = 0
    buffer.zero_()
    weight.zero_()
    assert torch.equal(y, kept)


BAD_SOLVERS = {
    "a list": (lambda x: x.tolist(), "got: .*of type list"),
    "a float": (lambda x: 0.5, "got: .*0.5 of type float"),
    "None": (lambda x: None, "of type NoneType"),
    "another dtype": (lambda x: x.float().asin(), "expected: dtype torch.float64 on cpu(.|\n)*torch.float32"),
    "integers": (lambda x: x.long(), "torch.int64"),
    "complex": (numpy_solver(lambda x: np.arcsin(x) + 0j), "take .real of a result"),
    "an extra dimension": (lambda x: x.asin()[None], r"expected: the shape of x, \(2,\)(.|\n)*shape \(1, 2\)"),
    "a missing dimension": (lambda x: x.asin().sum(), r"shape \(\)"),
    "another size": (lambda x: x.asin()[:1], r"shape \(1,\)"),
    "another device": (lambda x: x.asin().to("meta"), "expected: dtype torch.float64 on cpu(.|\n)*device meta"),
    "its input, changed": (lambda x: x.asin_(), "changed its argument x in place(.|\n)*x.clone()"),
}


@pytest.mark.parametrize(("g", "message"), BAD_SOLVERS.values(), ids=BAD_SOLVERS.keys())
def test_what_g_must_not_return(g: Any, message: str) -> None:
    with pytest.raises(errors.SolverOutputError, match=message) as caught:
        inverse(torch.sin, g)(double(0.1, 0.5))
    assert "remedy:" in str(caught.value)


def test_g_that_changes_a_param() -> None:
    with pytest.raises(errors.SolverOutputError, match="changed its argument params in place"):
        inverse(lambda y, a: y * a, lambda x, a: x / a.add_(1))(double(1.0), double(2.0))


def test_errors_of_g_pass_through() -> None:
    def g(_: Tensor) -> Tensor:
        raise ZeroDivisionError("from g")

    with pytest.raises(ZeroDivisionError, match="from g"):
        inverse(torch.sin, g)(double(0.5))


BAD_FORWARDS = {
    "a scalar": (lambda y: y.sum(), errors.ForwardOutputError, r"the shape of y, \(2, 3\)(.|\n)*shape \(\)"),
    "a tuple": (lambda y: (y, y), errors.ForwardOutputError, "expected: a torch.Tensor"),
    "another dtype": (lambda y: y.float(), errors.ForwardOutputError, "dtype torch.float64(.|\n)*torch.float32"),
    "fewer equations": (
        lambda y: y[..., :2],
        errors.ForwardOutputError,
        r"J = df/dy is not square(.|\n)*\(3,\)(.|\n)*\(2,\)",
    ),
    "more equations": (lambda y: torch.cat([y, y], -1), errors.ForwardOutputError, "does not determine dg"),
}


@pytest.mark.parametrize(("f", "error", "message"), BAD_FORWARDS.values(), ids=BAD_FORWARDS.keys())
def test_what_f_must_not_return(f: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inverse(f, lambda x: x.clone(), event_dim=1)(torch.ones(2, 3, dtype=torch.float64))


def test_f_must_not_write_into_y() -> None:
    leaky = inverse(torch.nn.LeakyReLU(0.5, inplace=True), lambda x: torch.where(x > 0, x, 2 * x))
    with (
        torch.no_grad(),
        pytest.raises(errors.ForwardOutputError, match=r"changed y or a param in place(.|\n)*inplace=False"),
    ):
        leaky(double(-1.0, 2.0))


@pytest.mark.parametrize("x", [torch.tensor([1, 2]), torch.tensor([True]), 0.5, [0.5], np.ones(2), None])
def test_what_x_must_not_be(x: Any) -> None:
    with pytest.raises(
        errors.ArgumentError, match=r"inverse\(sin, arcsin\): x cannot be inverted(.|\n)*floating-point torch.Tensor"
    ):
        arcsin(x)


def test_x_with_too_few_dimensions() -> None:
    with pytest.raises(errors.ArgumentError, match="at least event_dim = 2 dimensions"):
        BY_NAME["sandwich"].explicit()(torch.ones(2, dtype=torch.float64))


def test_params_on_another_device() -> None:
    with pytest.raises(errors.ArgumentError, match="different devices"):
        inverse(lambda y, a: y * a, lambda x, a: x / a)(double(1.0), torch.ones(1, device="meta"))


BAD_OPTIONS = {
    "event_dim": (-1, 1.0, True),
    "refine": (-1, None, 2.5),
    "on_failure": ("stop", None),
    "jacobian": ("dense", Diagonal),
    "residual_tol": (-1.0, (1e-3, 1e-3, 1e-3), "loose"),
    "param_event_dims": ((-1,), {"a": 1.5}),
    "no_such_option": (1,),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_OPTIONS.items() for v in values])
def test_options_that_make_no_sense(name: str, value: Any) -> None:
    make = implicit_function if name == "no_such_option" else inverse
    with pytest.raises(errors.ArgumentError, match=f"option {name} is not usable(.|\n)*expected"):
        make(torch.sin, torch.asin, **{name: value})


def test_f_and_g_must_be_callable() -> None:
    with pytest.raises(errors.ArgumentError, match="option solver"):
        inverse(torch.sin, 1.0)
    with pytest.raises(errors.ArgumentError, match="option f "):
        inverse(None, torch.sin)


# ------------------------------------------------------------------------------------------------ objects


def test_the_public_face() -> None:
    assert sorted(backsolve.__all__) == [
        "BacksolveError", "Banded", "Dense", "Diagonal", "Inverse", "MatrixFree", "Solution", "Triangular", "diagnose",
        "implicit_function", "inverse", "inverse_of",
    ]  # fmt: skip


def test_every_error_is_a_backsolve_error() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert len(classes) > 8
    assert all(issubclass(c, errors.BacksolveError | Warning) for c in classes)


def test_errors_are_found_where_they_are_public() -> None:
    for kind in (errors.BacksolveError, errors.SampleError, errors.BacksolveWarning):
        assert kind.__module__ == "backsolve.errors"
        assert type(pickle.loads(pickle.dumps(kind("words")))) is kind


def test_repr() -> None:
    assert repr(arcsin) == "inverse(sin, arcsin)"
    assert repr(inverse(torch.sin, torch.asin, refine=2)) == "inverse(sin, asin, refine=2)"


@inverse_of(torch.sin)
def module_level(x: Tensor) -> Tensor:
    return torch.asin(x)


def test_pickle() -> None:
    assert pickle.loads(pickle.dumps(module_level)) is module_level
    again = pickle.loads(pickle.dumps(inverse(torch.sin, np.arcsin, refine=1)))
    assert isinstance(again, Inverse)
    assert repr(again) == "inverse(sin, arcsin, refine=1)"
    torch.testing.assert_close(again(double(0.5)), double(0.5).asin(), rtol=4 * EPS, atol=0)
    root = pickle.loads(pickle.dumps(implicit_function(torch.sub, torch.clone)))
    assert root(double(2.0)).item() == 2.0


def test_deepcopy_copies_the_module_and_keeps_the_mark() -> None:
    layer = torch.nn.Linear(2, 2, dtype=torch.float64)
    original = inverse(layer, lambda x: torch.linalg.solve(layer.weight, (x - layer.bias).mT).mT.detach(), event_dim=1)
    x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    original(x).sum().backward()
    twin = copy.deepcopy(original)
    assert twin._f is not layer
    assert twin._problem.rule.verified == original._problem.rule.verified != {}
    assert not pickle.loads(pickle.dumps(arcsin))._problem.rule.verified


@pytest.mark.parametrize("name", ["cubic, broadcast", "mixed sinh", "polar", "sandwich"])
def test_log_det_and_jacobian(name: str) -> None:
    problem = BY_NAME[name]
    x, *params = problem.inputs()
    inv = problem.explicit()
    y, log_det = inv.with_log_det(x, *params)
    exact_jacobian = batched_jacobian(problem, x, params)
    k = problem.event_dim
    n = math.prod(x.shape[x.dim() - k :])
    matrices = exact_jacobian.reshape(*y.shape[: y.dim() - k], n, n)
    exact = torch.linalg.slogdet(matrices)[1]
    torch.testing.assert_close(log_det, exact, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(inv.jacobian(x, *params).reshape(matrices.shape), matrices, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(inv.solve(x, *params).log_abs_det_jacobian, exact, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *inputs: inv.with_log_det(*inputs), (x, *params))
    assert torch.autograd.gradgradcheck(lambda *inputs: inv.with_log_det(*inputs)[1], (x, *params))
    assert torch.autograd.gradcheck(inv.jacobian, (x, *params))
    with torch.no_grad():
        assert not inv.with_log_det(x, *params)[1].requires_grad


def batched_jacobian(problem: Any, x: Tensor, params: list[Tensor]) -> Tensor:
    """dy/dx of the exact function, batch element by batch element; x broadcast to y first."""
    y = problem.exact(x, *params).detach()
    x = x.detach().expand(y.shape)
    rows = []
    for index in np.ndindex(*y.shape):
        leaf = x.clone().requires_grad_()
        (row,) = torch.autograd.grad(problem.exact(leaf, *params)[index], leaf)
        rows.append(row[index[: y.dim() - problem.event_dim]])
    return torch.stack(rows)


def test_what_needs_no_gradient_gets_none() -> None:
    x = double(0.3, 0.5)
    assert not arcsin.jacobian(x).requires_grad
    assert not arcsin.with_log_det(x)[1].requires_grad


def test_log_det_read_later_is_that_of_the_call() -> None:
    w = double(2.0).requires_grad_()
    x = double(3.0).requires_grad_()
    inv = inverse(lambda y: w * y.sinh(), lambda x: torch.asinh(x / w.detach()))
    solution = inv.solve(x)
    with torch.no_grad():
        _ = repr(solution), solution.log_abs_det_jacobian
    expected = torch.asinh(x / w).sum() + (1 / (w * torch.asinh(x / w).cosh())).log().sum()
    for actual, right in zip(
        grads(solution.y + solution.log_abs_det_jacobian, x, w), grads(expected, x, w), strict=True
    ):
        torch.testing.assert_close(actual, right, rtol=32 * EPS, atol=0)
    stale = inv.solve(x)
    with torch.no_grad():
        w.mul_(5)
    with pytest.raises(errors.StructureError, match="another value"):
        _ = stale.log_abs_det_jacobian


def test_jacobian_of_elementwise_events() -> None:
    x = 0.5 * torch.rand(3, 2, 1, dtype=torch.float64)
    found = inverse(torch.sin, np.arcsin, event_dim=2, jacobian=Diagonal()).jacobian(x)
    assert found.shape == (3, 2, 1, 2, 1)
    dense = inverse(torch.sin, np.arcsin, event_dim=2).jacobian(x)
    torch.testing.assert_close(found, dense, rtol=8 * EPS, atol=0)


def test_inference_mode() -> None:
    p = double(2.0, 3.0)
    with torch.inference_mode():
        root = implicit_function(lambda y, p: y**2 - p, torch.sqrt)(p)
        y, log_det = inverse(torch.sin, lambda x: torch.asin(x) + 1e-5, refine=3).with_log_det(p / 4)
    torch.testing.assert_close(root, p.sqrt(), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(log_det, -y.cos().log(), rtol=8 * EPS, atol=8 * EPS)


def test_decorating_an_inverse() -> None:
    """The decorated solver's own attributes must not become ours."""
    inner = inverse(lambda y: 2 * y.sinh(), lambda x: torch.asinh(x / 2))
    w = double(2.0).requires_grad_()
    y = inverse_of(lambda y: w * y.sinh())(inner)(double(3.0))
    torch.testing.assert_close(grads(y, w)[0], -1.5 / (2 * y.cosh()).detach(), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("event_dim", [0, 1])
def test_vectorised_jacobian_of_autograd(event_dim: int) -> None:
    """Our backward pass runs under vmap here, at its first call as well."""
    x = double(0.1, 0.5, 0.7)
    found = torch.autograd.functional.jacobian(inverse(torch.sin, np.arcsin, event_dim=event_dim), x, vectorize=True)
    torch.testing.assert_close(found, torch.diag(1 / (1 - x**2).sqrt()), rtol=8 * EPS, atol=0)


def test_log_det_of_a_singular_jacobian() -> None:
    x = torch.tensor([0.5, 1.0], requires_grad=True)
    with pytest.raises(errors.SingularJacobianError):
        arcsin.with_log_det(x)


def test_implicit_function_has_no_determinant() -> None:
    with pytest.raises(errors.DerivativeError, match="no x"):
        implicit_function(lambda y, p: y - p, lambda p: p.clone()).solve(double(1.0)).log_abs_det_jacobian  # noqa: B018


# ------------------------------------------------------------------------------------------------ memory


def test_no_cycle_keeps_anything_alive() -> None:
    layer = torch.nn.Linear(3, 3, dtype=torch.float64)

    def g(x: Tensor) -> Tensor:
        return torch.linalg.solve(layer.weight, (x - layer.bias).mT).mT

    gc.disable()
    try:
        for order in (0, 1, 2):
            x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
            inv = inverse(lambda y, s=layer.weight * 1: y @ s.T + layer.bias, g, event_dim=1)
            y = inv(x)
            current = y
            for _ in range(order):
                (current,) = torch.autograd.grad((current**2).sum(), x, create_graph=True)
            watched = [weakref.ref(t) for t in (x, y, current, inv)]
            del x, y, current, inv
            assert [w() for w in watched] == [None] * 4
    finally:
        gc.enable()


def test_backward_frees_the_graph_of_f_unless_it_is_retained() -> None:
    made: list[weakref.ref[Tensor]] = []

    def f(y: Tensor) -> Tensor:
        t = y.exp()
        made.append(weakref.ref(t))
        return t * t

    x = double(0.5).requires_grad_()
    y = inverse(f, lambda x: x.log() / 2)(x)
    y.sum().backward(retain_graph=True)
    assert made[0]() is not None
    y.sum().backward()
    assert made[0]() is None


def test_second_backward_needs_retain_graph_as_in_torch() -> None:
    x = double(0.5).requires_grad_()
    y = arcsin(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    torch.testing.assert_close(x.grad, 2 / (1 - x.detach() ** 2).sqrt(), rtol=8 * EPS, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_private_names_of_torch_are_where_they_were() -> None:
    from backsolve import _functorch, _torch

    x = double(0.5).requires_grad_()
    assert isinstance(_torch.sequence_number(), int)
    assert (x * 1).grad_fn._sequence_nr() == _torch.sequence_number() - 1
    assert isinstance((x * 1).grad_fn.next_functions[0][0], _torch.LEAF_NODE)
    assert _torch.active_transform() is None
    assert all(_torch.is_torch_function(f) for f in (torch.sin, torch.special.ndtr, torch.nn.functional.softplus))
    assert not any(_torch.is_torch_function(f) for f in (x.mul, lambda y: y, torch.nn.Tanh(), np.sin, Tensor.sin))
    assert not any(_torch.is_torch_function(f) for f in (torch.sin_, torch.relu_, operator.imul))  # they write
    with torch.nn.utils.parametrize.cached():
        assert _torch.without_graph(torch.is_grad_enabled)
    assert not _torch.without_graph(torch.is_grad_enabled)
    assert not _functorch.is_functorch_wrapped(x)

    class Doubled(torch.autograd.Function):
        apply_eagerly = _torch.eager_apply

        @staticmethod
        def forward(ctx: object, t: Tensor) -> Tensor:
            return 2 * t

        @staticmethod
        def backward(ctx: object, v: Tensor) -> Tensor:
            return 2 * v

    assert torch.autograd.grad(Doubled.apply_eagerly(x), x)[0] == 2
    with torch.autocast("cpu"), _torch.without_autocast(x.device):
        assert not torch.is_autocast_enabled("cpu")
    view = x.detach()[:]
    assert _torch.owns_its_memory(double(1.0))
    assert not _torch.owns_its_memory(view)
    assert not _torch.owns_its_memory(torch.from_numpy(np.ones(2)))
    kept: list[bool] = []
    z = x * 1
    z.register_hook(lambda v: kept.append(_torch.graph_is_kept()))
    z.sum().backward(retain_graph=True)
    z.sum().backward()
    assert kept == [True, False]

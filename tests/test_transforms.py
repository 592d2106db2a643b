"""Every torch transform of an `Inverse` with an opaque g gives what it gives of the closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from backsolve import errors, inverse
from backsolve.solvers import numpy_solver
from tests.problems import BY_NAME, PROBLEMS, Problem
from tests.transforms import OF_PARAMS, OF_X, Transform, batch, total

TABLE = {**OF_X, **OF_PARAMS}
CASES = [
    pytest.param(problem, transform, id=f"{problem}-{name}")
    for problem in PROBLEMS
    for name, transform in TABLE.items()
    if name in OF_X or len(problem.inputs()) > 1
]


def assert_same(got: Any, expected: Any) -> None:
    """Equal to 1e-10 of the largest entry of each tensor, and of the same shapes."""
    got, expected = ([t.detach() for t in pytree.tree_leaves(tree)] for tree in (got, expected))
    assert len(got) == len(expected)
    for ours, exact in zip(got, expected, strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == exact.dtype
        scale = exact.abs().max() if exact.numel() else 1.0
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10 * float(scale))


def test_the_table_has_31_rows() -> None:
    assert len(TABLE) == 31


@pytest.mark.parametrize(("problem", "transform"), CASES)
def test_explicit(problem: Problem, transform: Transform) -> None:
    inputs = tuple(t.detach() for t in problem.inputs())
    assert_same(transform(problem.explicit(), inputs), transform(problem.exact, inputs))


@pytest.mark.parametrize(("problem", "transform"), [case for case in CASES if len(case.values[0].inputs()) > 1])
def test_closed_over(problem: Problem, transform: Transform) -> None:
    inputs = tuple(t.detach() for t in problem.inputs())
    assert_same(transform(problem.closed_over, inputs), transform(problem.exact, inputs))


# ---- what else must hold under a transform --------------------------------------------------------------------------


class Counting:
    """A solver that counts its calls."""

    def __init__(self, solver: Any) -> None:
        self.solver, self.calls = solver, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.solver(*args)


def test_vmap_calls_an_elementwise_g_once() -> None:
    problem = BY_NAME["cubic, broadcast"]
    g = Counting(problem.g)
    inputs = batch(tuple(t.detach() for t in problem.inputs()))
    vmap(vmap(inverse(problem.f, g), (0, None, 0)), (None, 0, None))(*inputs)
    assert g.calls == 1


def test_vmap_calls_g_once_where_event_dims_are_known() -> None:
    problem = BY_NAME["mixed sinh"]
    inputs = batch(tuple(t.detach() for t in problem.inputs()))
    expected = vmap(problem.exact)(*inputs)
    for options, calls in (({"param_event_dims": (2, 1)}, 1), ({"param_event_dims": {"mix": 2}}, 3), ({}, 3)):
        g = Counting(problem.g)
        assert_same(vmap(inverse(problem.f, g, event_dim=1, **options))(*inputs), expected)
        assert g.calls == calls


def test_wrong_event_dims_are_not_silent() -> None:
    """With the dimensions wrong, folding gives g other problems than the samples': the residual test sees it."""
    problem = BY_NAME["mixed sinh"]
    inputs = batch(tuple(t.detach() for t in problem.inputs()), size=3)
    inv = inverse(problem.f, problem.g, event_dim=1, param_event_dims=(1, 1))
    try:
        y = vmap(inv)(*inputs)
    except (errors.BacksolveError, ValueError, RuntimeError):
        return
    assert_same(y, vmap(problem.exact)(*inputs))


def wrong_at_large_x(x: Any) -> Any:
    return np.where(x > 0.8, 0.0, np.arcsin(x))


@pytest.mark.parametrize("inner", [lambda h: h, lambda h: grad(lambda x: h(x).sum()), lambda h: jacfwd(h)])
def test_the_residual_test_raises_with_its_index(inner: Any) -> None:
    inv = inverse(torch.sin, numpy_solver(wrong_at_large_x))
    x = torch.tensor([[0.1, 0.2], [0.3, 0.9], [0.5, 0.6]], dtype=torch.float64)
    with pytest.raises(errors.ResidualError, match=r"at index \(1, 1\)"):
        vmap(inner(inv))(x)


def test_nan_spoils_the_failed_elements_only() -> None:
    inv = inverse(torch.sin, numpy_solver(wrong_at_large_x), on_failure="nan")
    x = torch.tensor([[0.1, 0.2], [0.3, 0.9]], dtype=torch.float64)
    for value in (vmap(inv)(x), vmap(grad(lambda x: inv(x).sum()))(x), jvp(inv, (x,), (x,))[1]):
        assert value.isnan().tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("transform", [lambda h: grad(lambda x: h(x).sum()), jacrev, jacfwd])
def test_a_singular_j_raises(transform: Any) -> None:
    x = torch.tensor([0.5, 1.0], dtype=torch.float64)
    with pytest.raises(errors.SingularJacobianError, match=r"\(1,\)"):
        transform(inverse(torch.sin, np.arcsin))(x)
    with pytest.raises(errors.SingularJacobianError, match=r"\(0, 1\)"):
        vmap(transform(inverse(torch.sin, np.arcsin)))(x[None])


def test_a_value_alone_may_be_singular() -> None:
    x = torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert_same(vmap(inverse(torch.sin, np.arcsin))(x), torch.asin(x))


def test_a_coupling_is_found_under_vmap() -> None:
    inv = inverse(lambda y: y + 0.1 * y.mean(), lambda x: x - 0.1 * x.mean(-1, keepdim=True) / 1.1)
    with pytest.raises(errors.StructureError, match="not elementwise"):
        vmap(grad(lambda x: inv(x).sum()))(torch.rand(2, 3, dtype=torch.float64))


def test_with_log_det_jacobian_and_solve() -> None:
    problem = BY_NAME["mixed sinh"]
    inv, inputs = problem.explicit(), batch(tuple(t.detach() for t in problem.inputs()))
    assert_same(
        vmap(inv.with_log_det)(*inputs), [torch.stack(r) for r in zip(*map(inv.with_log_det, *inputs), strict=True)]
    )
    assert_same(vmap(inv.jacobian)(*inputs), torch.stack([inv.jacobian(*i) for i in zip(*inputs, strict=True)]))
    one = tuple(t[0] for t in inputs)
    log_det = lambda *i: torch.linalg.inv(inv.jacobian(*i)).logdet().sum()  # noqa: E731 (det > 0 in this problem)
    assert_same(grad(lambda *i: -inv.with_log_det(*i)[1].sum(), (0, 1, 2))(*one), grad(log_det, (0, 1, 2))(*one))
    assert vmap(lambda *i: inv.solve(*i).converged)(*inputs).all()


def test_forward_mode_without_torch_func() -> None:
    x, t = torch.tensor([0.2, 0.6], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    with forward_ad.dual_level():
        dual = inverse(torch.sin, np.arcsin)(forward_ad.make_dual(x, t))
        assert_same(forward_ad.unpack_dual(dual).tangent, t / (1 - x**2).sqrt())


def test_functional_call() -> None:
    linear = torch.nn.Linear(3, 3, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.add_(3 * torch.eye(3))
    inv = inverse(
        linear, lambda x: torch.linalg.solve(linear.weight, (x - linear.bias)[..., None])[..., 0], event_dim=1
    )

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return inv(x)

    module, x = Module(), torch.rand(4, 3, dtype=torch.float64)
    params = {name: 1.1 * p.detach() for name, p in module.named_parameters()}

    def ours(params: Any, x: Any) -> Any:
        return total(torch.func.functional_call(module, params, (x,)))

    def exact(params: Any, x: Any) -> Any:
        return total((x - params["linear.bias"]) @ torch.linalg.inv(params["linear.weight"]).mT)

    assert_same(grad(ours, (0, 1))(params, x), grad(exact, (0, 1))(params, x))
    ensemble = {name: torch.stack([p, 1.2 * p]) for name, p in params.items()}
    assert_same(vmap(grad(ours), (0, None))(ensemble, x), vmap(grad(exact), (0, None))(ensemble, x))


def test_what_torch_func_cannot_follow_is_refused() -> None:
    a = torch.tensor(2.0, dtype=torch.float64)

    @torch.jit.script
    def scripted(y: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return a * y.exp()

    class Hidden:
        value = a

        def f(self, y: torch.Tensor) -> torch.Tensor:
            return scripted(y, self.value)

    holder = Hidden()
    inv = inverse(holder.f, lambda x: (x / 2).log())

    def h(a: torch.Tensor) -> torch.Tensor:
        holder.value = a
        return inv(torch.ones(2, dtype=torch.float64)).sum()

    with pytest.raises(errors.TransformError, match="does not show"):
        grad(h)(a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    """The derivative is off by the rounding of y, times the condition of the derivative: a few eps."""
    eps = torch.finfo(dtype).eps
    x = torch.tensor([0.2, -0.5, 0.7], dtype=dtype)
    inv = inverse(lambda y: y.sinh(), lambda x: x.asinh())
    expected = (1 / (1 + x.double() ** 2).sqrt()).to(dtype)
    for slope in (grad(lambda x: inv(x).sum())(x), vmap(grad(inv))(x), jvp(inv, (x,), (torch.ones_like(x),))[1]):
        torch.testing.assert_close(slope, expected, rtol=8 * eps, atol=0)
    matrix = torch.tensor([[2.0, 0.5], [0.25, 1.0]], dtype=dtype)
    solve = inverse(lambda y: y @ matrix, lambda x: (x.float() @ matrix.float().inverse()).to(dtype), event_dim=1)
    slope = grad(lambda x: solve(x).sum())(x[:2])
    torch.testing.assert_close(slope.double(), matrix.double().inverse().sum(1), rtol=16 * eps, atol=0)


def test_autocast_is_off_in_f() -> None:
    weight = torch.tensor([[2.0, 0.3], [0.1, 1.0]])
    inv = inverse(lambda y: y @ weight, lambda x: torch.linalg.solve(weight.mT, x), event_dim=1)
    x = torch.tensor([1.0, 2.0])
    with torch.autocast("cpu", torch.bfloat16):
        slope = grad(lambda x: inv(x).sum())(x)
        tangent = jvp(inv, (x,), (x,))[1]
    torch.testing.assert_close(slope, torch.linalg.inv(weight).sum(1))
    torch.testing.assert_close(tangent, torch.linalg.solve(weight.mT, x))

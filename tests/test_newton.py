"""Newton and FixedPoint: the inverse of an f that mixes the elements of an event, of which only f is known."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from backsolve import Banded, Dense, Diagonal, MatrixFree, Triangular, errors, implicit_function, inverse
from backsolve.solvers import FixedPoint, Newton
from tests.problems import PROBLEMS, Problem

EPS = torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def contraction(*shape: int, norm: float = 0.9) -> Tensor:
    matrix = torch.randn(*shape, dtype=torch.float64)
    return norm * matrix / torch.linalg.matrix_norm(matrix, 2, keepdim=True)


def residual_block(y: Tensor, weight: Tensor) -> Tensor:
    return y + torch.tanh(y @ weight.mT)


def autoregressive(y: Tensor, weight: Tensor) -> Tensor:
    """f_i depends on y_j for j <= i."""
    return y + y**3 + torch.tanh(y) @ weight.tril(-1).mT


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_table_of_problems(problem: Problem) -> None:
    inputs = problem.inputs()
    start = (
        (lambda x, *_: torch.stack([x.norm(dim=-1), x[..., 1] / x[..., 0]], -1)) if problem.name == "polar" else None
    )
    solved = inverse(problem.f, Newton(start), event_dim=problem.event_dim)
    actual, expected = solved(*inputs), problem.exact(*inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)
    v = torch.randn_like(expected)
    for a, e in zip(torch.autograd.grad(actual, inputs, v), torch.autograd.grad(expected, inputs, v), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("solver", [Newton(), FixedPoint()], ids=["newton", "fixed point"])
def test_batches(solver: Any, batch: tuple[int, ...]) -> None:
    weight, y = contraction(4, 4), torch.randn(*batch, 4, dtype=torch.float64)
    solution = inverse(residual_block, solver, event_dim=1).solve(residual_block(y, weight), weight)
    assert solution.iterations is not None
    assert solution.y.shape == y.shape
    assert solution.iterations.shape == solution.converged.shape == batch
    torch.testing.assert_close(solution.y, y, rtol=1e-13, atol=1e-13)  # the condition number is below 20


@pytest.mark.parametrize("solver", [Newton(), FixedPoint()], ids=["newton", "fixed point"])
def test_events_of_rank_2_and_params_of_the_batch(solver: Any) -> None:
    y, weight = torch.randn(5, 2, 3, dtype=torch.float64), contraction(5, 3, 3)
    x = residual_block(y, weight)
    torch.testing.assert_close(inverse(residual_block, solver, event_dim=2)(x, weight), y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("structure", [Dense(), Triangular(), MatrixFree()], ids=str)
def test_structures(structure: Any) -> None:
    y, weight = torch.randn(20, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    x = autoregressive(y, weight).requires_grad_()
    solution = inverse(autoregressive, Newton(), event_dim=1, jacobian=structure).solve(x, weight)
    torch.testing.assert_close(solution.y, y, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(solution.y.sum(), x)
    j = torch.func.vmap(torch.func.jacrev(lambda y: autoregressive(y, weight)))(y)
    expected = torch.linalg.solve(j.mT, torch.ones(20, 6, 1, dtype=torch.float64))[..., 0]
    torch.testing.assert_close(gradient, expected, rtol=1e-8 if isinstance(structure, MatrixFree) else 1e-11, atol=1e-9)


def test_banded() -> None:
    y = torch.randn(3, 50, dtype=torch.float64)

    def f(y: Tensor) -> Tensor:
        return 3 * y + y**3 + torch.nn.functional.pad(y.sin(), (1, 1))[..., 2:]

    solution = inverse(f, Newton(), event_dim=1, jacobian=Banded(0, 1)).solve(f(y))
    torch.testing.assert_close(solution.y, y, rtol=1e-13, atol=1e-13)


def test_line_search_where_the_full_step_overshoots() -> None:
    x = double(-1.5, 0.3, 1.5, 1.55)
    solution = inverse(torch.atan, Newton(lambda x: 10 * x)).solve(x)  # full steps diverge from |y| > 1.39
    torch.testing.assert_close(solution.y, x.tan(), rtol=1e-12, atol=0)


def test_scale_does_not_matter() -> None:
    """The natural monotonicity test sees a system and the same with its equations scaled alike."""
    scale = double(1.0, 1e-8, 1e8)

    def f(y: Tensor) -> Tensor:
        return torch.stack([y[..., 0] ** 3 + y[..., 1], y[..., 1] + y[..., 2] ** 3, y[..., 2] + y[..., 0] ** 3 / 2], -1)

    x = double(9.0, 9.0, 6.0)
    start = double(3.0, 3.0, 3.0)
    plain = inverse(f, Newton(start), event_dim=1).solve(x)
    scaled = inverse(lambda y: scale * f(y), Newton(start), event_dim=1).solve(scale * x)
    torch.testing.assert_close(scaled.y, plain.y, rtol=1e-13, atol=0)
    assert scaled.iterations is not None
    assert plain.iterations is not None
    assert abs(scaled.iterations.item() - plain.iterations.item()) <= 1


@pytest.mark.parametrize(("history", "share"), [(1, 0.95), (5, 0.6)])
def test_anderson_needs_fewer_steps(history: int, share: float) -> None:
    weight, y = contraction(8, 8), torch.randn(64, 8, dtype=torch.float64)
    solution = inverse(residual_block, FixedPoint(history=history), event_dim=1).solve(
        residual_block(y, weight), weight
    )
    torch.testing.assert_close(solution.y, y, rtol=1e-12, atol=1e-12)
    assert solution.iterations is not None
    plain = inverse(residual_block, FixedPoint(history=0), event_dim=1).solve(residual_block(y, weight), weight)
    assert plain.iterations is not None
    assert solution.iterations.double().mean() < share * plain.iterations.double().mean()


def test_one_linear_event_is_solved_in_n_steps() -> None:
    """For a linear f Anderson's acceleration is GMRES."""
    weight, x = contraction(4, 4, norm=0.95), torch.randn(4, dtype=torch.float64)
    solution = inverse(lambda y: y + y @ weight.mT, FixedPoint(history=6), event_dim=1).solve(x)
    expected = torch.linalg.solve(torch.eye(4, dtype=torch.float64) + weight, x)
    torch.testing.assert_close(solution.y, expected, rtol=1e-12, atol=1e-13)
    assert solution.iterations is not None
    assert solution.iterations <= 12


def test_elementwise() -> None:
    x = torch.linspace(-9, 9, 50, dtype=torch.float64)
    for solver in (Newton(), FixedPoint()):
        y = inverse(lambda y: y + 0.5 * torch.sin(y), solver)(x)
        torch.testing.assert_close(y + 0.5 * torch.sin(y), x, rtol=8 * EPS, atol=8 * EPS)


def test_float32() -> None:
    weight, y = contraction(4, 4).float(), torch.randn(9, 4)
    for solver in (Newton(), FixedPoint()):
        solution = inverse(residual_block, solver, event_dim=1).solve(residual_block(y, weight), weight)
        torch.testing.assert_close(solution.y, y, rtol=1e-4, atol=1e-4)


def test_implicit_function() -> None:
    a = torch.rand(3, 4, dtype=torch.float64).requires_grad_()

    def c(y: Tensor, a: Tensor) -> Tensor:  # the softmax temperature-like normalisation y = a - log sum exp y
        return y + torch.logsumexp(y, -1, keepdim=True) - a

    y = implicit_function(c, Newton(lambda a: torch.zeros_like(a)), event_dim=1)(a)
    expected = a - torch.logsumexp(a, -1, keepdim=True) / 2  # y = a - s, s = lse(a - s) = lse(a) - s
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-15)
    v = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, a, v), torch.autograd.grad(expected, a, v), rtol=1e-12, atol=1e-14
    )


def test_implicit_function_needs_a_start() -> None:
    with pytest.raises(errors.ArgumentError, match="init"):
        implicit_function(lambda y, p: y**2 - p, Newton())(double(2.0))


def test_params_broadcast_y() -> None:
    p = double(2.0, 3.0)
    torch.testing.assert_close(implicit_function(lambda y, p: y**2 - p, Newton(1.0))(p), p.sqrt(), rtol=4 * EPS, atol=0)
    x = double(1.0, 2.0, 3.0)[:, None]
    torch.testing.assert_close(inverse(lambda y, p: p * y, Newton())(x, p), x / p, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("solver", [Newton(), FixedPoint()], ids=["newton", "fixed point"])
def test_each_event_stops_by_itself(solver: Any) -> None:
    """A hard event, or one without a solution, changes no bit of another."""
    weight, y = contraction(4, 4), torch.randn(3, 4, dtype=torch.float64)
    x = residual_block(y, weight)
    bad = torch.cat([x, torch.full((1, 4), torch.nan, dtype=torch.float64)])
    solved = inverse(residual_block, solver, event_dim=1, on_failure="nan")
    alone, together = solved.solve(x, weight), solved.solve(bad, weight)
    assert together.converged.tolist() == [True, True, True, False]
    torch.testing.assert_close(together.y[:3], alone.y, rtol=8 * EPS, atol=8 * EPS)
    assert together.y[3].isnan().all()


@pytest.mark.parametrize(
    ("f", "solver", "message"),
    [
        (
            lambda y: y**2 + 1,
            Newton(lambda x: x + 0.3, maxiter=50),
            "(?s)Newton's method.*2 of 2 elements.*raise maxiter",
        ),
        (lambda y: y**3, Newton(0.0), "singular J"),
        (lambda y: 3 * y, FixedPoint(history=0), "(?s)fixed-point.*h a contraction"),
        (lambda y: y + 0.99 * y.sin(), FixedPoint(maxiter=2), "(?s)after 2 steps.*raise maxiter"),
        (lambda y: y.exp() + 2, Newton(maxiter=30), "did not converge"),
    ],
)
def test_what_does_not_converge(f: Any, solver: Any, message: str) -> None:
    x = double(0.5, 0.1)
    with pytest.raises(errors.ConvergenceError, match=message):
        inverse(f, solver)(x)
    solution = inverse(f, solver, on_failure="nan").solve(x)
    assert not solution.converged.any()
    assert solution.y.isnan().all()


@pytest.mark.parametrize("solver", [Newton(), FixedPoint()], ids=["newton", "fixed point"])
def test_warm_start(solver: Any) -> None:
    weight, y = contraction(4, 4), torch.randn(5, 4, dtype=torch.float64)
    x = residual_block(y, weight).requires_grad_()
    solved = inverse(residual_block, solver, event_dim=1)
    cold = solved.solve(x, weight)
    warm = solved.starting_at(cold).solve(x + 1e-9, weight)
    assert cold.iterations is not None
    assert warm.iterations is not None
    assert warm.iterations.max() < cold.iterations.min()
    torch.testing.assert_close(residual_block(warm.y, weight), x + 1e-9, rtol=1e-13, atol=1e-14)


def test_f_with_a_state_is_frozen() -> None:
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4, dtype=torch.float64))
    block = torch.nn.Sequential(layer, torch.nn.Tanh())
    before = [b.clone() for b in block.buffers()]
    x = torch.randn(5, 4, dtype=torch.float64)

    def f(y: Tensor) -> Tensor:
        return y + 0.5 * block(y)

    for solver in (Newton(), FixedPoint()):
        with torch.no_grad():
            y = inverse(f, solver, event_dim=1, residual_tol=float("inf"))(x)
        for old, now in zip(before, block.buffers(), strict=True):
            assert torch.equal(old, now)
        twin = [b.clone() for b in block.buffers()]
        torch.testing.assert_close(f(y), x, rtol=1e-13, atol=1e-13)
        assert not all(torch.equal(old, now) for old, now in zip(before, block.buffers(), strict=True))
        for buffer, old in zip(block.buffers(), twin, strict=True):
            buffer.copy_(old)


class Holder:
    """No module itself."""

    def __init__(self, block: Any) -> None:
        self.parts = {"block": block}

    def apply(self, y: Tensor) -> Tensor:
        return y + 0.5 * self.parts["block"](y)

    __call__ = apply


def through_a_dict(block: Any) -> Any:
    parts = {"of": [block]}
    return lambda y: y + 0.5 * parts["of"][0](y)


def through_another_function(block: Any) -> Any:
    inner = Holder(block).apply
    return lambda y: inner(y)


def through_a_namespace(block: Any) -> Any:
    namespace = types.ModuleType("namespace")
    namespace.block = block  # type: ignore[attr-defined]
    scope: dict[str, Any] = {"namespace": namespace}
    exec("def f(y):\n    return y + 0.5 * namespace.block(y)", scope)
    return scope["f"]


@pytest.mark.parametrize(
    "reach",
    [
        lambda block: Holder(block),
        lambda block: Holder(block).apply,
        lambda block: functools.partial(Holder.apply, Holder(block)),
        through_a_dict,
        through_another_function,
        through_a_namespace,
    ],
    ids=["object", "method", "partial", "dict", "function", "namespace"],
)
def test_the_state_is_found_wherever_f_keeps_it(reach: Any) -> None:
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4, dtype=torch.float64))
    before = [b.clone() for b in layer.buffers()]
    assert before
    with torch.no_grad():
        inverse(reach(layer), Newton(), event_dim=1, residual_tol=float("inf"))(torch.randn(5, 4, dtype=torch.float64))
    for old, now in zip(before, layer.buffers(), strict=True):
        assert torch.equal(old, now)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Newton(maxiter=0), "maxiter"),
        (lambda: FixedPoint(maxiter=-1), "maxiter"),
        (lambda: FixedPoint(history=-1), "history"),
    ],
)
def test_settings(make: Any, name: str) -> None:
    with pytest.raises(errors.ArgumentError, match=name):
        make()


def test_diagonal_claim_is_used() -> None:
    calls = 0

    def slope(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 1 + 3 * y**2

    y = inverse(lambda y: y + y**3, Newton(), jacobian=Diagonal(entries=slope))(double(2.0, 10.0))
    torch.testing.assert_close(y, double(1.0, 2.0), rtol=4 * EPS, atol=0)
    assert calls

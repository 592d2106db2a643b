"""Every structure of J: derivatives of any order on every problem that has it, and claims that are checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from backsolve import Banded, Dense, Diagonal, MatrixFree, Triangular, errors, inverse
from backsolve._linearize import Linearization
from backsolve.jacobians import Jacobian, factored
from backsolve.solvers import Bracket
from tests.problems import BY_NAME, CLAIMS, Problem
from tests.test_derivatives import assert_close_orders, derivatives
from tests.test_transforms import assert_same
from tests.transforms import OF_PARAMS, OF_X, Transform

EPS = torch.finfo(torch.float64).eps
SEEDS = 400
each_claim = pytest.mark.parametrize(("problem", "structure"), CLAIMS, ids=[f"{p}, {s}" for p, s in CLAIMS])


@each_claim
def test_finite_differences(problem: Problem, structure: Jacobian) -> None:
    function = problem.explicit(jacobian=structure)
    assert gradcheck(function, problem.inputs())
    assert gradgradcheck(function, problem.inputs())


@each_claim
@pytest.mark.parametrize("form", ["explicit", "closed_over"])
def test_orders_0_to_3_against_closed_form(problem: Problem, structure: Jacobian, form: str) -> None:
    inputs = problem.inputs()
    closed = form == "closed_over"
    y = problem.closed_over(*inputs, jacobian=structure) if closed else problem.explicit(jacobian=structure)(*inputs)
    assert_close_orders(derivatives(y, inputs, 3), derivatives(problem.exact(*inputs), inputs, 3), 128)


@each_claim
def test_log_determinant_and_inverse(problem: Problem, structure: Jacobian) -> None:
    inputs = problem.inputs()
    x, *params = inputs
    inv = problem.explicit(jacobian=structure)
    k = problem.event_dim
    event = x.shape[x.dim() - k :]
    n = event.numel()
    y, log_det = inv.with_log_det(*inputs)
    jacobian = torch.stack([
        torch.autograd.functional.jacobian(lambda e: problem.exact(e, *params), one, create_graph=True).reshape(n, n)
        for one in x.reshape(-1, *event)
    ])  # fmt: skip
    expected = torch.linalg.slogdet(jacobian)[1].reshape(y.shape[:-k])
    assert_close_orders(derivatives(log_det, inputs, 2), derivatives(expected, inputs, 2), 512)
    found = inv.jacobian(*inputs).reshape(jacobian.shape)
    torch.testing.assert_close(found, jacobian, rtol=1e-12, atol=1e-13)


@each_claim
def test_batched_cotangents(problem: Problem, structure: Jacobian) -> None:
    inputs = problem.inputs()
    y, exact = problem.explicit(jacobian=structure)(*inputs), problem.exact(*inputs)
    vs = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    found, expected = (torch.autograd.grad(t, inputs, vs, is_grads_batched=True) for t in (y, exact))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@each_claim
def test_second_derivatives_of_batched_cotangents(problem: Problem, structure: Jacobian) -> None:
    def second(h: Callable[..., Tensor]) -> list[Tensor]:
        inputs = problem.inputs()
        y = h(*inputs)
        vs = torch.randn(3, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
        first = torch.autograd.grad(y.cos(), inputs, vs, is_grads_batched=True, create_graph=True)
        return list(torch.autograd.grad(sum((t**2).sum() for t in first), [*inputs, vs]))

    assert_same(second(problem.explicit(jacobian=structure)), second(problem.exact))


TRANSFORMED = [
    pytest.param(problem, structure, transform, id=f"{problem}, {type(structure).__name__}, {name}")
    for problem, structure in CLAIMS
    if structure != MatrixFree("bicgstab", rtol=1e-15)  # see test_products.py
    for name, transform in {**OF_X, **OF_PARAMS}.items()
    if name in OF_X or len(problem.inputs()) > 1
]


@pytest.mark.parametrize(("problem", "structure", "transform"), TRANSFORMED)
def test_every_transform(problem: Problem, structure: Jacobian, transform: Transform) -> None:
    inputs = tuple(t.detach() for t in problem.inputs())
    assert_same(transform(problem.explicit(jacobian=structure), inputs), transform(problem.exact, inputs))


@pytest.mark.parametrize(
    ("problem", "structure", "transform"), [c for c in TRANSFORMED if len(c.values[0].inputs()) > 1]
)
def test_every_transform_where_f_closes_over_params(
    problem: Problem, structure: Jacobian, transform: Transform
) -> None:
    inputs = tuple(t.detach() for t in problem.inputs())
    closed = lambda *i: problem.closed_over(*i, jacobian=structure)  # noqa: E731
    assert_same(transform(closed, inputs), transform(problem.exact, inputs))


ENTRIES = [
    ("elementwise vector", Diagonal(entries=lambda y, a: a * y.cosh())),
    ("elementwise vector", Triangular(entries=lambda y, a: torch.diag_embed(a * y.cosh()))),
    ("elementwise vector", Dense(entries=lambda y, a: torch.diag_embed(a * y.cosh()), positive_definite=True)),
    (
        "tridiagonal",
        Banded(1, 1, entries=lambda y, d, l, u: torch.stack(  # noqa: E741
            [torch.nn.functional.pad(u, (1, 0)), d, torch.nn.functional.pad(l, (0, 1))]
        ) * y.cosh()[..., None, :]),
    ),
    ("triangular", Triangular(entries=lambda y, a: a * y.cosh()[..., None, :])),  # the upper triangle is not read
    ("triangular from above", Triangular(upper=True, entries=lambda y, a: a.mT * y.cosh()[..., None, :])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "structure"), ENTRIES, ids=[f"{n}, {type(s).__name__}" for n, s in ENTRIES])
def test_known_entries_give_the_same_derivatives(name: str, structure: Jacobian) -> None:
    problem = BY_NAME[name]
    inputs = problem.inputs()
    y = problem.explicit(jacobian=structure)(*inputs)
    assert_close_orders(derivatives(y, inputs, 3), derivatives(problem.exact(*inputs), inputs, 3), 128)


# ------------------------------------------------------------------------------------------------- claims are checked


def gradient(f: Callable[[Tensor], Tensor], y: Tensor, jacobian: Jacobian, **options: object) -> Tensor:
    """The gradient of a sum of g(x) at x = f(y)."""
    x = f(y).detach().requires_grad_()
    options = {"event_dim": 1, "residual_tol": float("inf"), **options}
    return torch.autograd.grad(inverse(f, lambda x: y.clone(), jacobian=jacobian, **options)(x).sum(), x)[0]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def band(a: Tensor, lower: int, upper: int) -> Tensor:
    return a.tril(upper).triu(-lower)


def wrong(seed: int) -> list[tuple[Jacobian, Tensor]]:
    """A claim, and a matrix A that contradicts it in 1e-6 of its entries: f(y) = A y + sinh(y)."""
    a, i = random(seed, 7, 7), int(np.random.default_rng(seed).integers(0, 5))
    single = torch.zeros_like(a)
    single[i, i + 2] = 1e-6  # one entry, in the second diagonal above
    return [
        (Diagonal(), 1e-6 * a),
        (Diagonal(), single),
        (Triangular(), a.tril() + single),
        (Triangular(upper=True), a.triu() + single.mT),
        (Banded(1, 1), band(a, 1, 1) + single),
        (Banded(1, 1), band(a, 1, 1) + single.mT),
        (Banded(2, 0), band(a, 2, 1)),
        (Banded(1, 1), band(a, 2, 1)),
        (Dense(symmetric=True), a + a.mT + single),
        (Dense(positive_definite=True), a @ a.mT + single),
    ]


class Counting(TorchDispatchMode):
    """Counts how often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("tol", "evaluations"), [(None, 1), (math.inf, 0)])
def test_with_known_entries_f_is_evaluated_for_the_residual_test_only(tol: float | None, evaluations: int) -> None:
    arcsin = inverse(torch.sin, torch.asin, jacobian=Diagonal(entries=torch.cos), residual_tol=tol, verify=False)
    x = torch.tensor([0.1, 0.6], dtype=torch.float64, requires_grad=True)
    with Counting() as counting:
        arcsin(x).sum().backward()
    assert (counting.names["sin"], counting.names["cos"]) == (evaluations, 1)
    torch.testing.assert_close(x.grad, 1 / (1 - x.detach() ** 2).sqrt(), rtol=4 * EPS, atol=0)
    with pytest.raises(errors.SingularJacobianError):
        arcsin(torch.ones(2, dtype=torch.float64, requires_grad=True)).sum().backward()


def test_known_entries_of_an_untested_f_that_closes_over_a_weight() -> None:
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    entries: Callable[..., Tensor] = lambda y: a.expand_as(y)  # noqa: E731
    inv = inverse(lambda y: a * y, lambda x: x / a, jacobian=Diagonal(entries), residual_tol=math.inf)
    inv(torch.tensor([3.0], dtype=torch.float64, requires_grad=True)).backward()
    assert a.grad is not None
    assert a.grad.item() == -3 / 4


def test_an_f_that_is_not_evaluated_has_derivatives_of_any_order_at_the_y_of_g() -> None:
    """Nobody asks if `f(y) = x`: here it is not, by a tenth, and the derivatives are those of f at that y."""
    y = torch.tensor([0.1, 0.6], dtype=torch.float64)
    rough = inverse(torch.sin, lambda x: y.clone(), jacobian=Diagonal(entries=torch.cos), residual_tol=math.inf)
    x = (1.1 * y.sin()).requires_grad_()
    (first,) = torch.autograd.grad(rough(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, 1 / y.cos(), rtol=4 * EPS, atol=0)
    torch.testing.assert_close(second, y.sin() / y.cos() ** 3, rtol=16 * EPS, atol=0)
    wrong = inverse(torch.sin, torch.asin, jacobian=Diagonal(entries=torch.sinc), residual_tol=math.inf)(x).sum()
    with pytest.raises(errors.StructureError):  # the probe sees f
        wrong.backward()


@pytest.mark.parametrize("case", range(len(wrong(0))), ids=[f"{i}: {c}" for i, (c, _) in enumerate(wrong(0))])
def test_wrong_claims_are_found_at_every_seed(case: int) -> None:
    for seed in range(SEEDS):
        claim, a = wrong(seed)[case]
        y = random(seed + 1000, 2, 7)
        with pytest.raises(errors.StructureError, match=r"f is not elementwise|does not have the declared structure"):
            gradient(lambda y, a=a: y @ a.mT + y.sinh(), y, claim)


def test_batch_norm_is_found_under_every_structure() -> None:
    for structure in (Diagonal(), Banded(1, 1), Triangular(), Dense(), Dense(positive_definite=True)):
        for seed in range(SEEDS):
            y = random(seed, 4, 3)
            with pytest.raises(errors.StructureError):
                gradient(lambda y: (y - y.mean(0)) / y.std(0) + y, y, structure)


def right(seed: int, dtype: torch.dtype) -> list[tuple[Jacobian, Callable[[Tensor], Tensor]]]:
    a = random(seed, 7, 7, dtype=dtype)
    kernel = random(seed, 1, 1, 3, dtype=dtype)
    large = 1e6 if dtype is torch.float64 else 1e2  # with 1e6 float32 leaves no digit of the rest
    return [
        (Triangular(), lambda y: y @ a.tril().mT + 1e3 * y.sinh()),
        (Triangular(), lambda y: (40 * y).cumsum(-1).sinh()),
        (Triangular(upper=True), lambda y: (y @ a.triu().mT) ** 3 + y),
        (Banded(1, 1), lambda y: torch.conv1d(y[:, None], kernel, padding=1)[:, 0] + y.exp()),
        (Banded(2, 1), lambda y: (large * y + y @ band(a, 2, 1).mT) - large * y + y.sinh()),
        (Banded(0, 0), lambda y: (large * y + y.sin()) - large * y + 0.1 * y),
        (Dense(symmetric=True), lambda y: y @ (a + a.mT) + y.sinh()),
        (Dense(positive_definite=True), lambda y: torch.tanh(y @ a) @ a.mT + 2 * y.sinh()),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", range(8), ids=[f"{i}: {c}" for i, (c, _) in enumerate(right(0, torch.float64))])
def test_no_false_alarm(case: int, dtype: torch.dtype) -> None:
    for seed in range(SEEDS):
        claim, f = right(seed, dtype)[case]
        gradient(f, random(seed + 1000, 2, 7, dtype=dtype), claim, on_failure="ignore")


def test_the_message_of_a_wrong_claim() -> None:
    a = torch.eye(4, dtype=torch.float64)
    a[0, 3] = 0.25
    with pytest.raises(errors.StructureError) as caught:
        gradient(lambda y: y @ a.mT, torch.ones(4, dtype=torch.float64), Banded(1, 1))
    for part in ("Banded(lower=1, upper=1", "element 3 of y", "the probe found 0.", "declare a wider structure"):
        assert part in str(caught.value)
    a[3, 0] = 0.5
    with pytest.raises(errors.StructureError) as caught:
        gradient(lambda y: y @ a.mT, torch.ones(4, dtype=torch.float64), Dense(symmetric=True))
    for part in ("J[0, 3] = 0.25", "J[3, 0] = 0.5"):
        assert part in str(caught.value)


def test_an_indefinite_jacobian_that_was_claimed_positive_definite() -> None:
    a = torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64))
    with pytest.raises(errors.StructureError, match=r"not positive definite(.|\n)*from -2 to 2 at index \(1,\)"):
        gradient(
            lambda y: torch.stack([y[0], y[1] @ a]),
            torch.ones(2, 2, dtype=torch.float64),
            Dense(positive_definite=True),
        )


# ------------------------------------------------------------------------------------------------ accuracy and faults


DIRECT = [Dense(), Dense(positive_definite=True), Triangular(), Banded(1, 1)]


def graded(structure: Jacobian, condition: float) -> Tensor:
    """A matrix of the structure with about this condition number."""
    n = 8
    scales = torch.logspace(0, -np.log10(condition), n, dtype=torch.float64)
    a = random(0, n, n)
    q = torch.linalg.qr(a).Q
    if isinstance(structure, Dense):
        return (
            q @ torch.diag(scales) @ q.mT if structure.positive_definite else q @ torch.diag(scales) @ random(1, n, n)
        )
    if isinstance(structure, Triangular):
        return torch.diag(scales) + 0.1 * a.tril(-1) * scales
    return torch.diag(scales) + 0.3 * band(a - torch.diag(a.diagonal()), 1, 1) * scales.sqrt() * scales.sqrt()[:, None]


@pytest.mark.parametrize("structure", DIRECT, ids=str)
@pytest.mark.parametrize("condition", [1e3, 1e8])
def test_gradients_are_as_accurate_as_a_direct_solve(structure: Jacobian, condition: float) -> None:
    """Against 50 digits; the yardstick is torch.linalg.solve in float64."""
    import mpmath

    a, weights = graded(structure, condition), random(2, 8)
    if isinstance(structure, Dense) and structure.positive_definite:
        a = (a + a.mT) / 2
    x = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: a @ y, lambda x: x.clone(), event_dim=1, jacobian=structure)(x)
    (found,) = torch.autograd.grad(y, x, weights)
    with mpmath.workdps(50):
        exact = mpmath.lu_solve(mpmath.matrix(a.T.tolist()), mpmath.matrix(weights.tolist()))
        exact = torch.tensor([float(e) for e in exact], dtype=torch.float64)
    error, yardstick = ((t - exact).norm() / exact.norm() for t in (found, torch.linalg.solve(a.T, weights)))
    assert error <= (1e-12 if condition == 1e3 else max(10 * yardstick, EPS * condition))


@pytest.mark.parametrize(
    "structure", [Triangular(), Banded(1, 1), Banded(2, 1), Dense(positive_definite=True)], ids=str
)
def test_singular_jacobians_are_found_and_spare_their_neighbours(structure: Jacobian) -> None:
    a = torch.diag(torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64))
    scale = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1e-30, 1.0]], dtype=torch.float64)
    f = lambda y: y @ a * scale  # noqa: E731
    y = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(errors.SingularJacobianError, match=r"1 of 3 events singular, the first at index \(1,\)"):
        gradient(f, y, structure)
    found = gradient(f, y, structure, on_failure="nan")
    assert found.isnan().any(-1).tolist() == [False, True, False]
    torch.testing.assert_close(found[::2], (1 / (a.diagonal() * scale))[::2], rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("structure", [Diagonal(), Triangular(), Banded(1, 1), Dense()], ids=str)
def test_turning_points_are_singular(structure: Jacobian) -> None:
    x = torch.tensor([[0.3, 0.5], [1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    inv = inverse(torch.sin, torch.asin, event_dim=1, jacobian=structure)
    with pytest.raises(errors.SingularJacobianError, match=r"index \(1,\)"):
        inv(x).sum().backward()
    inv(x[:1]).sum().backward()


@pytest.mark.parametrize(
    "options", [{"lower": -1, "upper": 1}, {"lower": 1, "upper": 1.0}, {"lower": True, "upper": 1}]
)
def test_impossible_bands(options: dict[str, object]) -> None:
    with pytest.raises(errors.ArgumentError, match="Banded"):
        Banded(**options)


def cotangents_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cotangents each pass from here on takes at once."""
    asked: list[int] = []
    pull_many = Linearization.pull_many

    def counted(self: Linearization, vs: Tensor) -> Tensor:
        asked.append(len(vs))
        return pull_many(self, vs)

    monkeypatch.setattr(Linearization, "pull_many", counted)
    return asked


def test_bands_take_as_many_cotangents_as_there_are_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = cotangents_asked_for(monkeypatch)
    x = torch.ones(1000, requires_grad=True)
    structure = Banded(1, 1)
    inverse(lambda y: 2 * y, lambda x: x / 2, event_dim=1, jacobian=structure, verify=False)(x).sum().backward()
    assert asked == [3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("shape", "event_dim"), [((7,), 1), ((2, 3, 7), 1), ((3, 2, 5), 2)])
def test_a_matrix_by_pieces_is_the_matrix(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], event_dim: int, dtype: torch.dtype
) -> None:
    n = torch.Size(shape[-event_dim:]).numel()
    weight = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=dtype)

    def f(y: Tensor) -> Tensor:
        flat = y.flatten(-event_dim)
        return (3 * flat + (flat @ weight.T).sin() / n).reshape(y.shape)

    y = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    x, v = f(y).requires_grad_(), torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    whole = torch.autograd.grad(inverse(f, lambda _: y.clone(), event_dim=event_dim)(x), x, v)[0]
    asked = cotangents_asked_for(monkeypatch)
    monkeypatch.setattr(factored, "_AT_ONCE", 3 * y.numel())
    monkeypatch.setattr(factored, "_FEWEST", 1)
    inv = inverse(f, lambda _: y.clone(), event_dim=event_dim, verify=False)
    pieces = torch.autograd.grad(inv(x), x, v)[0]
    assert asked == [*[3] * (n // 3), n % 3]
    torch.testing.assert_close(pieces, whole, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("structure", [Dense(), Triangular(), Banded(1, 1), Dense(positive_definite=True)], ids=str)
def test_short_floats(structure: Jacobian, dtype: torch.dtype) -> None:
    found = gradient(lambda y: 2 * y, torch.ones(3, 4, dtype=dtype), structure)
    assert found.dtype == dtype
    assert (found == 0.5).all()


@pytest.mark.parametrize("structure", [Dense(), Triangular(), Banded(1, 1), Dense(positive_definite=True)], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1,)])
def test_empty_and_small_events(structure: Jacobian, shape: tuple[int, ...]) -> None:
    assert gradient(lambda y: 2 * y, torch.ones(shape, dtype=torch.float64), structure).shape == shape


LOSING = {  # entries that are right in value, and detach what they read
    "Diagonal": (Diagonal, 0, lambda y, p: p.detach() + 3 * y**2),
    "Dense": (Dense, 1, lambda y, p: torch.diag_embed(p.detach() + 3 * y**2)),
    "Triangular": (Triangular, 1, lambda y, p: torch.diag_embed(p.detach() + 3 * y**2)),
    "Banded": (partial(Banded, 0, 0), 1, lambda y, p: (p.detach() + 3 * y**2)[..., None, :]),
}


@pytest.mark.parametrize("closed_over", [False, True])
@pytest.mark.parametrize(("structure", "event_dim", "entries"), LOSING.values(), ids=LOSING.keys())
def test_entries_that_hide_a_param(structure: Any, event_dim: int, entries: Any, closed_over: bool) -> None:
    """First derivatives are right; those of second order, and of the log-determinant, would lose a term."""
    x, p = (random(k, 3).abs().add(0.5).requires_grad_() for k in (0, 1))

    def g(x: Tensor, p: Tensor = p) -> Tensor:
        y = x / (1 + x.abs())
        for _ in range(60):
            y = y - (p * y + y**3 - x) / (p + 3 * y**2)
        return y

    f = (lambda y: p * y + y**3) if closed_over else (lambda y, p: p * y + y**3)
    known = (lambda y: entries(y, p)) if closed_over else entries
    params = () if closed_over else (p,)

    def inv(jacobian: Jacobian) -> Any:
        return inverse(f, g, event_dim=event_dim, jacobian=jacobian)

    expected = torch.autograd.grad(inv(structure())(x, *params).sum(), (x, p))
    actual = torch.autograd.grad(inv(structure(entries=known))(x, *params).sum(), (x, p))
    torch.testing.assert_close(actual, expected)
    with pytest.raises(errors.StructureError, match="lose a second derivative"):
        torch.autograd.grad(inv(structure(entries=known))(x, *params).sum(), (x, p), create_graph=True)
    with pytest.raises(errors.StructureError, match="lose a second derivative"):
        torch.autograd.grad(inv(structure(entries=known)).with_log_det(x, *params)[1].sum(), p)
    if not closed_over:
        with pytest.raises(errors.StructureError, match="lose a second derivative"):
            torch.func.jacrev(torch.func.grad(lambda p: inv(structure(entries=known))(x, p).sum()))(p)


def test_entries_that_need_not_be_differentiated() -> None:
    """A param without a gradient may go through NumPy; one of which f stops the gradient, too, is no contradiction."""
    x, p = random(0, 3).requires_grad_(), random(1, 3).abs() + 0.5
    g = lambda x, p: x / p  # noqa: E731
    by_numpy = inverse(
        lambda y, p: p * y, g, jacobian=Diagonal(entries=lambda y, p: torch.from_numpy(p.numpy()) + 0 * y)
    )
    (by_x,) = torch.autograd.grad(by_numpy(x, p).sum(), x, create_graph=True)
    torch.testing.assert_close(by_x, 1 / p)
    stopped = Diagonal(entries=lambda y, p: p.detach() + 0 * y)
    by_stopped = inverse(lambda y, p: p.detach() * y, g, jacobian=stopped)
    (by_x,) = torch.autograd.grad(by_stopped(x, p.requires_grad_()).sum(), x, create_graph=True)
    torch.testing.assert_close(by_x, 1 / p)


def test_entries_that_hide_a_part_of_y() -> None:
    """3 p y^2 as 3 p y' y, y' detached: half of its derivative."""
    inv = inverse(
        lambda y, p: p * y**3,
        lambda x, p: (x / p) ** (1 / 3),
        jacobian=Diagonal(entries=lambda y, p: 3 * p * y.detach() * y),
    )
    x, p = (random(k, 3).abs().add(0.5).requires_grad_() for k in (0, 1))
    torch.testing.assert_close(torch.autograd.grad(inv(x, p).sum(), x)[0], (x / p) ** (1 / 3) / (3 * x))
    with pytest.raises(errors.StructureError, match="second derivatives of f are not those"):
        torch.autograd.grad(inv(x, p).sum(), x, create_graph=True)


def test_entries_that_hide_a_param_under_torch_func() -> None:
    """Where a backward pass is differentiated forwards, or in a level that has ended; for small params, too."""
    x, sum_of = random(0, 3).abs() + 0.5, lambda h: lambda p: h(p).sum()
    for p in (random(1, 3).abs() + 0.5, torch.full((3,), 1e-3, dtype=torch.float32)):

        def h(p: Tensor) -> Tensor:
            entries = lambda y, p: 1 + 3 * p.detach() * y**2  # noqa: E731
            inv = inverse(lambda y, p: y + p * y**3, Bracket(-9.0, 9.0), jacobian=Diagonal(entries=entries))
            return inv(x.to(p), p)

        for second in (torch.func.hessian, lambda h: torch.func.jacrev(torch.func.jacrev(h))):
            with pytest.raises(errors.StructureError, match="lose a second derivative"):
                second(sum_of(h))(p)


def test_entries_of_params_of_many_sizes() -> None:
    """J does not depend on p, but the rounding of autograd's does."""
    p = torch.tensor([1e-6, 1.0, 1e6, 1e3], dtype=torch.float32, requires_grad=True)
    x = torch.linspace(0.5, 2, 4, requires_grad=True)
    inv = inverse(
        lambda y, p: (y / p) ** 3 * p**3 + 0 * p,
        lambda x, p: x ** (1 / 3),
        jacobian=Diagonal(entries=lambda y, p: 3 * y**2),
    )
    (by_x,) = torch.autograd.grad(inv(x, p).sum(), x, create_graph=True)
    torch.testing.assert_close(by_x, x ** (-2 / 3) / 3)

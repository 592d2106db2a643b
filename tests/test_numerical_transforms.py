"""Bracket, Newton and FixedPoint, which need f alone, under every transform and under `torch.compile`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from backsolve import errors, inverse
from backsolve.solvers import Bracket, FixedPoint, Newton
from tests.problems import BY_NAME, Problem
from tests.test_transforms import assert_same
from tests.transforms import OF_PARAMS, OF_X, Inputs, Transform, batch

pytestmark = [  # of torch's own making, while it traces any custom autograd.Function
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning"),
]

TABLE = {**OF_X, **OF_PARAMS}
COMPILED = ("grad params", "jvp all", "vmap(grad) one param")


@dataclass(frozen=True)
class Case:
    """A problem with a closed form, and a solver that is given only f."""

    problem: Problem
    solver: Any
    inputs: Callable[[], Inputs]

    @property
    def inv(self) -> Any:
        """What is tested."""
        return inverse(self.problem.f, self.solver, event_dim=self.problem.event_dim)

    def __str__(self) -> str:
        return type(self.solver).__name__


def near_the_identity() -> Inputs:
    """x, mix and shift such that y -> y - f(y) + x is a contraction."""
    mix = torch.eye(3) + 0.2 * torch.rand(3, 3) - 0.1
    return torch.rand(2, 3) - 0.5, mix, 0.1 * torch.randn(3)


MIXED = BY_NAME["mixed sinh"]
CASES = [
    Case(BY_NAME["cubic, broadcast"], Bracket(), BY_NAME["cubic, broadcast"].inputs),
    Case(MIXED, Newton(), MIXED.inputs),
    Case(MIXED, FixedPoint(), near_the_identity),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs_of(case: Case) -> Inputs:
    return tuple(t.detach().double() for t in case.inputs())


@pytest.mark.parametrize("transform", TABLE.values(), ids=TABLE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_transforms(case: Case, transform: Transform) -> None:
    inputs = inputs_of(case)
    assert_same(transform(case.inv, inputs), transform(case.problem.exact, inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled(case: Case) -> None:
    """Several transforms in one graph."""

    def several(h: Any, inputs: Inputs) -> Any:
        return [h(*inputs), *(TABLE[name](h, inputs) for name in COMPILED)]

    inputs, inv = inputs_of(case), case.inv
    compiled = torch.compile(lambda *i: several(inv, i), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs), several(case.problem.exact, inputs))


def test_compiled_into_machine_code() -> None:
    case = CASES[0]
    inputs, inv = inputs_of(case), case.inv
    gradients = torch.compile(lambda *i: TABLE["grad params"](inv, i), fullgraph=True, backend="inductor")
    assert_same(gradients(*inputs), TABLE["grad params"](case.problem.exact, inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_training_step(case: Case) -> None:
    """Eager backward through a compiled call, for two shapes."""
    inv = case.inv
    compiled = torch.compile(lambda *i: inv(*i).square().sum(), fullgraph=True, backend="aot_eager")
    for size in (1, 2):
        leaves = [t.requires_grad_() for t in inputs_of(case)]
        leaves[0] = torch.cat([leaves[0].detach()] * size).requires_grad_()
        expected = torch.autograd.grad(case.problem.exact(*leaves).square().sum(), leaves)
        assert_same(torch.autograd.grad(compiled(*leaves), leaves), expected)


@pytest.mark.parametrize("inner", [lambda h: h, lambda h: grad(lambda x: h(x).sum())], ids=["vmap", "vmap(grad)"])
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (Bracket(0.0, 1.5), r"(?s)no root between.*1 of 6 elements.*\(1, 1\).*x = 9"),
        (Newton(), r"(?s)Newton's.*1 of 6 elements.*\(1, 1\)"),
        (FixedPoint(), r"(?s)fixed-point.*1 of 6 elements.*\(1, 1\)"),
    ],
    ids=["Bracket", "Newton", "FixedPoint"],
)
def test_failures_are_named_by_their_index(solver: Any, message: str, compile_it: bool, inner: Any) -> None:
    bad = 9.0 if isinstance(solver, Bracket) else torch.nan
    x = torch.tensor([[0.1, 0.2], [0.3, bad], [0.5, 0.6]], dtype=torch.float64)
    function = vmap(inner(inverse(lambda y: y + y**3 / 3, solver)))
    with pytest.raises(errors.BacksolveError, match=message):
        (torch.compile(function, fullgraph=True, backend="aot_eager") if compile_it else function)(x)


def test_warm_start_under_vmap() -> None:
    case = CASES[1]
    inputs = inputs_of(case)
    warm = case.inv.starting_at(case.inv.solve(*inputs))
    batched = batch(inputs)
    assert_same(vmap(warm)(*batched), vmap(case.problem.exact)(*batched))


def by_grad(w: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.func.grad(lambda u: (w * u**2 / 2 + u**4 / 4).sum())(y)


def by_jvp(w: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.func.jvp(lambda u: w * u**2 / 2 + u**4 / 4, (y,), (torch.ones_like(y),))[1]


def by_vmap(w: Tensor) -> Callable[[Tensor], Tensor]:
    def f(y: Tensor) -> Tensor:
        each = torch.func.vmap(lambda u, w: w * u + u**3)
        return each(y.reshape(-1), w.expand(y.shape).reshape(-1)).reshape(y.shape)

    return f


AROUND: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda h, t: torch.func.grad(lambda t: h(t).sin().sum())(t),
    "jvp": lambda h, t: torch.func.jvp(h, (t,), (torch.ones_like(t),))[1],
    "vmap": lambda h, t: torch.func.vmap(h)(torch.stack([t, 2 * t])),
    "hessian": lambda h, t: torch.func.hessian(lambda t: h(t).sin().sum())(t),
    "vmap(grad)": lambda h, t: torch.func.vmap(torch.func.grad(lambda t: h(t).sin().sum()))(torch.stack([t, 2 * t])),
}
INSIDE = [(Bracket(-50.0, 50.0), 0), (Newton(), 1), (FixedPoint(), 1)]


def solution(x: Tensor, w: Tensor) -> Tensor:
    y = x / (1 + x.abs())
    for _ in range(60):
        y = y - (w * y + y**3 - x) / (w + 3 * y**2)
    return y


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
@pytest.mark.parametrize(("solver", "event_dim"), INSIDE, ids=["Bracket", "Newton", "FixedPoint"])
@pytest.mark.parametrize("f", [by_grad, by_jvp, by_vmap])
def test_an_f_that_uses_torch_func(f: Any, solver: Any, event_dim: int, around: Any) -> None:
    """The solver runs f beneath the levels around it, where f opens levels of its own."""
    x, w = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64), torch.tensor([0.7, 1.0, 1.1], dtype=torch.float64)
    torch.testing.assert_close(
        around(inverse(f(w), solver, event_dim=event_dim), x), around(lambda x: solution(x, w), x), rtol=1e-7, atol=1e-7
    )
    try:
        found = around(lambda w: inverse(f(w), solver, event_dim=event_dim)(x), w)
    except errors.ResidualError:  # w was taken for a tensor of f's own level
        return
    torch.testing.assert_close(found, around(lambda w: solution(x, w), w), rtol=1e-7, atol=1e-7)


def test_an_f_that_uses_torch_func_and_no_test() -> None:
    """A tensor from outside can be taken for one of f's own levels: only the residual shows it."""
    x, w = torch.rand(3), torch.rand(3) + 0.5
    for options in ({"residual_tol": math.inf}, {"on_failure": "ignore"}):
        with pytest.raises(errors.TransformError, match="residual is not tested"):
            torch.func.grad(lambda w, o=options: inverse(by_grad(w), Bracket(-50.0, 50.0), **o)(x).sum())(w)


def test_tensors_of_levels_that_g_makes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backsolve._mapped_solver._may_be_own", lambda wrapped: False)
    x = torch.rand(3)
    inv = inverse(by_grad(torch.ones(3)), Bracket(-50.0, 50.0))
    for transform in (torch.func.grad, lambda h: torch.func.jacrev(torch.func.grad(h))):
        with pytest.raises(errors.TransformError, match="makes anew"):
            transform(lambda x: inv(x).sum())(x)

"""An `Inverse` inside `torch.compile(fullgraph=True)`: right derivatives and no graph break, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.autograd import forward_ad

from backsolve import Banded, Dense, Diagonal, MatrixFree, Triangular, errors, implicit_function, inverse
from backsolve.jacobians import Constrained, Jacobian, MinimumNorm
from backsolve.jacobians.equations import Equations
from backsolve.solvers import numpy_solver
from tests.adversarial.situations import log_abs_det
from tests.problems import BY_NAME
from tests.test_transforms import assert_same
from tests.transforms import OF_X, Transform, loss
from tests.transforms_page import COMPILED, PAGE, page

pytestmark = [  # of torch's own making, while it traces any custom autograd.Function
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*_prims_common.check. is deprecated:FutureWarning"),  # inductor, diag_embed
]

x_leaf = torch.linspace(-0.9, 0.9, 5, dtype=torch.float64)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(function, fullgraph=True, backend=backend)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().double().requires_grad_() for t in tensors)


@pytest.mark.parametrize("transform", [pytest.param(t, id=name) for name, t in COMPILED.items()])
@pytest.mark.parametrize("name", ["log", "mixed sinh"])
def test_transforms(name: str, transform: Transform) -> None:
    problem = BY_NAME[name]
    inputs = tuple(t.detach() for t in problem.inputs())
    inv = problem.explicit()
    assert_same(compiled(lambda *i: transform(inv, i))(*inputs), transform(problem.exact, inputs))


@pytest.mark.parametrize("transform", [pytest.param(t, id=n) for n, t in COMPILED.items() if n in OF_X])
@pytest.mark.parametrize("name", ["log", "mixed sinh"])
def test_transforms_where_f_closes_over_params(name: str, transform: Transform) -> None:
    problem = BY_NAME[name]
    x, *params = (t.detach() for t in problem.inputs())
    solver = numpy_solver(lambda x: problem.g(torch.from_numpy(x), *params).numpy())
    inv = inverse(lambda y: problem.f(y, *params), solver, event_dim=problem.event_dim)
    expected = transform(lambda x: problem.exact(x, *params), (x,))
    assert_same(compiled(lambda x: transform(inv, (x,)))(x), expected)


def kepler_by_brentq(mean: np.ndarray, e: np.ndarray) -> np.ndarray:
    """E with E - e sin E = M, one element at a time, by compiled code that nothing can be traced into."""
    solve = np.vectorize(lambda m, e: optimize.brentq(lambda a: a - e * np.sin(a) - m, m - 1, m + 1, xtol=1e-14))
    return solve(mean, e)


def kepler(anomaly: Tensor, e: Tensor) -> Tensor:
    return anomaly - e * anomaly.sin()


def check_backward(inv: Any, exact: Any, *inputs: Tensor, backend: str = "aot_eager") -> None:
    """The compiled gradients of all inputs are those of a differentiable reference."""
    ours, reference = leaves(*inputs), leaves(*inputs)
    loss(compiled(inv, backend))(*ours).backward()
    loss(exact)(*reference).backward()
    assert_same([t.grad for t in ours], [t.grad for t in reference])


G = {"torch builtin": torch.asin, "torch code": lambda x: x.asin(), "ufunc": np.arcsin}


@pytest.mark.parametrize("g", G.values(), ids=list(G))
def test_backward_with_any_g(g: Any) -> None:
    check_backward(inverse(torch.sin, g), torch.asin, x_leaf)


def test_backward_with_scipy() -> None:
    eager = inverse(kepler, numpy_solver(kepler_by_brentq))
    check_backward(inverse(kepler, numpy_solver(kepler_by_brentq)), eager, x_leaf, torch.tensor(0.3))


def known_diagonal(y: Tensor, a: Tensor) -> Tensor:
    return a * y.exp()


def known_matrix(y: Tensor, a: Tensor) -> Tensor:
    return a.tril() @ torch.diag_embed(y.cosh())


STRUCTURES = [
    ("cubic, broadcast", None),
    ("log", Diagonal(entries=known_diagonal)),
    ("linear", None),
    ("triangular", Dense(entries=known_matrix)),
    ("elementwise vector", Dense(symmetric=True)),
    ("elementwise vector", Dense(positive_definite=True)),
    ("triangular", Triangular()),
    ("triangular from above", Triangular(upper=True)),
    ("tridiagonal", Banded(1, 1)),
    ("triangular", MatrixFree(rtol=1e-15)),
]


@pytest.mark.parametrize(("name", "structure"), STRUCTURES, ids=[f"{n}-{s}" for n, s in STRUCTURES])
def test_inductor(name: str, structure: Jacobian | None) -> None:
    problem = BY_NAME[name]
    check_backward(problem.explicit(jacobian=structure), problem.exact, *problem.inputs(), backend="inductor")


@pytest.mark.parametrize("transform", ["vjp", "jvp all", "vmap(grad) all"])
@pytest.mark.parametrize(("name", "structure"), STRUCTURES[3:], ids=[f"{n}-{s}" for n, s in STRUCTURES[3:]])
def test_transforms_of_structures(name: str, structure: Jacobian, transform: str) -> None:
    problem = BY_NAME[name]
    inputs = tuple(t.detach() for t in problem.inputs())
    inv = problem.explicit(jacobian=structure)
    assert_same(compiled(lambda *i: OF_X[transform](inv, i))(*inputs), OF_X[transform](problem.exact, inputs))


class Warp(nn.Module):
    """f closes over a parameter of the module that also holds the inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5, 0.7, 2.0], dtype=torch.float64))
        self.invert = inverse(lambda y: self.weight * y.sinh(), self.solve)

    def solve(self, x: Tensor) -> Tensor:
        return torch.asinh(x / self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.invert(x)


def test_module_parameters() -> None:
    module, x = Warp(), torch.linspace(-1, 1, 3, dtype=torch.float64)
    loss(compiled(module))(x).backward()
    weight = module.weight.detach().clone().requires_grad_()
    loss(lambda w: torch.asinh(x / w))(weight).backward()
    assert_same(module.weight.grad, weight.grad)


def test_implicit_function() -> None:
    root = implicit_function(lambda y, p: y**2 - p, np.sqrt)
    check_backward(root, torch.sqrt, torch.tensor([2.0, 3.0]))


def test_params_in_trees_and_keywords() -> None:
    inv = inverse(lambda y, p, power, scale: scale * p["a"] * y**power, self_power)

    def call(x: Tensor, a: Tensor, scale: Tensor) -> Tensor:
        return inv(x, {"a": a}, 3, scale=scale)

    check_backward(
        call, lambda x, a, s: (x / (s * a)) ** (1 / 3), torch.tensor([1.0, 2.0]), torch.tensor(2.0), torch.tensor(0.5)
    )


def self_power(x: Tensor, p: dict[str, Tensor], power: int, scale: Tensor) -> Tensor:
    return (x / (scale * p["a"])) ** (1 / power)


def test_fourth_derivative_is_right() -> None:
    arcsin = inverse(torch.sin, np.arcsin)

    def fourth(h: Any) -> Any:
        for _ in range(4):
            h = torch.func.grad(h)
        return h

    x = torch.tensor(0.3, dtype=torch.float64)
    assert_same(compiled(fourth(arcsin))(x), fourth(torch.asin)(x))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_backward_of_compiled_grads(depth: int) -> None:
    """The derivative that the backward pass adds to those taken inside is right, too."""

    def nested(h: Any) -> Any:
        for _ in range(depth):
            h = torch.func.grad(h)
        return h

    check_backward(nested(inverse(torch.sin, np.arcsin)), nested(torch.asin), torch.tensor(0.3))


def test_y_keeps_the_bits_of_g() -> None:
    inv = inverse(torch.sin, np.arcsin)
    value = compiled(torch.func.grad_and_value(lambda x: inv(x).sum()))(x_leaf[1])[1]
    assert torch.equal(value, torch.from_numpy(np.arcsin(x_leaf[1].numpy(), out=None)[None])[0])
    assert torch.equal(compiled(inv)(x_leaf), torch.from_numpy(np.arcsin(x_leaf.numpy())))


def test_a_wrong_g_raises_with_its_index() -> None:
    wrong = inverse(torch.sin, numpy_solver(lambda x: np.where(x > 0.8, 0.0, np.arcsin(x))))
    with pytest.raises(errors.ResidualError, match=r"at index \(4,\)"):
        compiled(wrong)(x_leaf)
    with pytest.raises(errors.ResidualError, match=r"at index \(1, 4\)"):
        compiled(torch.vmap(wrong))(torch.stack([x_leaf / 2, x_leaf]))
    with pytest.raises(errors.ResidualError, match=r"at index \(1, 4\)"):
        compiled(torch.vmap(torch.func.grad(lambda x: wrong(x).sum())))(torch.stack([x_leaf / 2, x_leaf]))


def test_nan_spoils_the_failed_elements_only() -> None:
    wrong = inverse(torch.sin, numpy_solver(lambda x: np.where(x > 0.8, 0.0, np.arcsin(x))), on_failure="nan")
    (x,) = leaves(x_leaf)
    y = compiled(wrong)(x)
    y.sum().backward()
    assert y.isnan().tolist() == x.grad.isnan().tolist() == [False] * 4 + [True]
    torch.testing.assert_close(x.grad[:4], 1 / (1 - x_leaf[:4] ** 2).sqrt())


def test_refine() -> None:
    inv = inverse(torch.sin, numpy_solver(lambda x: np.arcsin(x) + 1e-5), refine=3)
    check_backward(inv, torch.asin, x_leaf)


def test_a_singular_j_becomes_nan() -> None:
    (x,) = leaves(torch.tensor([0.5, 1.0]))
    compiled(inverse(torch.sin, np.arcsin))(x).sum().backward()
    assert x.grad.isnan().tolist() == [False, True]
    matrix = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    solve = inverse(lambda y: y @ matrix, lambda x: x / matrix.sum(0), event_dim=1)
    (x,) = leaves(matrix.sum(0))
    compiled(solve)(x).sum().backward()
    assert x.grad.isnan().all()


def test_a_wrong_structure_is_found() -> None:
    coupled = inverse(lambda y: y + y.mean(), lambda x: x - x.mean() / 2)
    with pytest.raises(errors.StructureError, match="not elementwise"):
        compiled(coupled)(x_leaf)


def test_with_log_det_and_jacobian() -> None:
    problem = BY_NAME["mixed sinh"]
    inputs = tuple(t.detach() for t in problem.inputs())
    inv = problem.explicit()
    assert_same(compiled(inv.with_log_det)(*inputs), inv.with_log_det(*inputs))
    assert_same(compiled(inv.jacobian)(*inputs), inv.jacobian(*inputs))


def test_second_derivatives_of_a_log_determinant() -> None:
    """By grad of jvp, too, where torch's own slogdet is wrong; log|det dy/dx| of a sinh(y) = x by elimination."""
    a = 2 * torch.eye(2, dtype=torch.float64) + torch.tensor([[0.1, 0.5], [-0.3, 0.2]], dtype=torch.float64)
    x, t = torch.tensor([0.3, -1.2], dtype=torch.float64), torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    inv = inverse(lambda y, a: a @ torch.sinh(y), lambda x, a: torch.asinh(torch.linalg.solve(a, x)), event_dim=1)

    def exact(a: Tensor) -> Tensor:
        return -(1 + (torch.linalg.inv(a) @ x) ** 2).log().sum() / 2 - log_abs_det(a)

    def mixed(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda a: torch.func.jvp(function, (a,), (t,))[1])

    assert_same(compiled(mixed(lambda a: inv.with_log_det(x, a)[1]))(a), mixed(exact)(a))


def test_known_entries() -> None:
    inv = inverse(torch.sinh, np.arcsinh, jacobian=None)
    check_backward(inv, torch.asinh, x_leaf)
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    known = Dense(entries=lambda y, a: a.expand(*y.shape[:-1], 2, 2))
    solve = inverse(lambda y, a: y @ a.mT, lambda x, a: torch.linalg.solve(a, x.mT).mT, event_dim=1, jacobian=known)
    check_backward(solve, lambda x, a: x @ torch.linalg.inv(a).mT, torch.randn(4, 2), matrix)


def test_values_do_not_recompile() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    inv = inverse(lambda y, a: a * y.sinh(), lambda x, a: (x / a).asinh())
    function = torch.compile(lambda x, a: inv(x, a).sum(), fullgraph=True, backend=counter)
    counts: list[int] = []
    for k in range(4):
        x, a = leaves(x_leaf + k, torch.tensor(1.0 + k))
        function(x, a).backward()
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


def test_an_implicit_event_needs_a_graph_break() -> None:
    h = implicit_function(lambda y, p: y - p, lambda p: p, event_dim=1)
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    torch.compile(lambda p: h(p).sum(), backend="aot_eager")(p).backward()
    assert_same(p.grad, torch.ones(3, dtype=torch.float64))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(lambda p: h(p))(p)


@pytest.mark.parametrize("gauge", [MinimumNorm(), Constrained(lambda y: y[..., :1] - 0.75 * y[..., 1:])])
def test_a_gauge_needs_a_graph_break(gauge: Equations) -> None:
    a = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    inv = inverse(lambda y: y @ a.mT, lambda x: x @ a / 25, event_dim=1, jacobian=Dense(gauge=gauge))
    (x,) = leaves(torch.tensor([5.0]))
    torch.compile(lambda x: inv(x).sum(), backend="aot_eager")(x).backward()
    assert_same(x.grad, a.sum(1) / 25)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"backsolve: .*gauges"):
        compiled(lambda x: inv(x))(x)


def test_an_inverse_made_inside_is_refused() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="backsolve: no Inverse can be made inside"):
        compiled(lambda x: inverse(torch.sin, np.arcsin)(x))(x_leaf)
    assert_same(torch.compile(lambda x: inverse(torch.sin, np.arcsin)(x), backend="aot_eager")(x_leaf), x_leaf.asin())


def test_the_double_backward_is_refused_by_torch() -> None:
    (x,) = leaves(x_leaf)
    (g,) = torch.autograd.grad(compiled(inverse(torch.sin, np.arcsin))(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.transforms_page"


def test_forward_mode_around_a_compiled_function() -> None:
    """Traced inside of a dual level it has tangents; traced before, it refuses."""
    t = torch.ones_like(x_leaf)
    inv = inverse(torch.sin, np.arcsin)
    for function, known in ((compiled(inv), False), (compiled(lambda x: inv(x)), True)):
        if known:
            function(x_leaf)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x_leaf, t)
            try:
                tangent = forward_ad.unpack_dual(function(dual)).tangent
            except errors.TransformError:
                assert known
            else:
                assert_same(tangent, 1 / (1 - x_leaf**2).sqrt())


def test_functional_call_is_refused() -> None:
    """g runs outside of the graph, where the parameters are not swapped: f(y) tells."""
    module, other = Warp(), torch.full((3,), 3.0, dtype=torch.float64)
    call = compiled(lambda w, x: torch.func.functional_call(module, {"weight": w}, (x,)))
    with pytest.raises(errors.TransformError, match="swapped"):
        call(other, torch.linspace(-1, 1, 3, dtype=torch.float64))


@pytest.mark.parametrize("jacobian", [None, Diagonal(), Dense(), Banded(0, 0), MatrixFree()])
def test_a_param_that_changes_before_the_backward_pass(jacobian: Jacobian | None) -> None:
    """As in eager code: an error, or the gradient of the call, if J was at hand before."""
    x, p = leaves(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]))
    f, g = (lambda y, p: p * y.sinh()), (lambda x, p: (x / p).asinh())
    inv = inverse(f, g, event_dim=0 if jacobian in (None, Diagonal()) else 1, jacobian=jacobian)
    y = compiled(inv)(x, p)
    expected = torch.autograd.grad(g(x, p).sum(), (x, p))
    with torch.no_grad():
        p.mul_(3)
    message = ""
    try:
        actual = torch.autograd.grad(y.sum(), (x, p))
    except RuntimeError as error:
        message = str(error)
    else:
        torch.testing.assert_close(actual, expected)
    assert not message or "modified by an inplace operation" in message


def test_a_tensor_that_is_passed_twice() -> None:
    """As x and as a param, or as two params."""
    x, p = leaves(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.0]))
    inv = inverse(lambda y, a, b: (a + b) * y, lambda x, a, b: x / (a + b))
    for arguments in ((x, x, p), (x, p, p), (x, x, x)):
        used = list({id(t): t for t in arguments}.values())
        actual, expected = (torch.autograd.grad(h(*arguments).sum(), used) for h in (compiled(inv), inv))
        torch.testing.assert_close(actual, expected)

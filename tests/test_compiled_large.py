"""Compiled calls for events whose J must not be a matrix: products and bands, and a clear refusal of the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.nn.functional import pad

from backsolve import Banded, Dense, Inverse, MatrixFree, errors, inverse
from backsolve.jacobians import Jacobian
from tests.problems import BY_NAME
from tests.test_matrix_free import g_from, random
from tests.test_products import shifted
from tests.test_transforms import assert_same
from tests.transforms import Transform
from tests.transforms_page import COMPILED

pytestmark = [  # of torch's own making, while it traces any custom autograd.Function
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test compiles anew."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any, backend: Any = "aot_eager", *, fullgraph: bool = True) -> Any:
    return torch.compile(function, fullgraph=fullgraph, backend=backend)


def measuring(sizes: list[int]) -> Any:
    """A backend that runs the graphs of both passes as they are, and keeps how many elements each node has."""

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        values = (n.meta.get("val") for n in graph.graph.nodes)
        sizes.extend(int(v.numel()) for v in values if isinstance(v, Tensor))
        return torch._dynamo.backends.debugging.boxed_nop(graph, _)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def reaction(y: Tensor, a: Tensor) -> Tensor:
    """A tridiagonal J that is not symmetric."""
    return 3 * y + a * torch.tanh(y) - pad(y[..., :-1], (1, 0)) - 0.5 * a * pad(y[..., 1:], (0, 1))


def nearly_three(x: Tensor, a: Tensor) -> Tensor:
    y = x / 3
    for _ in range(150):
        y = y - (reaction(y, a) - x) / 4
    return y


def banded(**options: Any) -> Inverse:
    return inverse(reaction, nearly_three, event_dim=1, jacobian=Banded(1, 1), **options)


def by_products(**options: Any) -> Inverse:
    options = {"jacobian": MatrixFree(), **options}
    return inverse(shifted, lambda x, a: g_from(shifted, a)(x), event_dim=1, **options)


def arguments(n: int, *batch: int) -> tuple[Tensor, Tensor]:
    return random(0, *batch, n).requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


def total(inv: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, a: inv(x, a).cos().sum()


@pytest.mark.parametrize(("make", "n"), [(banded, 100_000), (by_products, 20_000)])
def test_memory_is_linear(make: Callable[[], Inverse], n: int) -> None:
    """No node of either graph is larger than a few diagonals; and 80 GB, or 3, would show when they run."""
    inputs, sizes = arguments(n), list[int]()
    found = torch.autograd.grad(compiled(total(make()), measuring(sizes))(*inputs), inputs)
    assert n <= max(sizes) <= 9 * n
    assert_same(found, torch.autograd.grad(total(make())(*inputs), inputs))


STRUCTURES = [MatrixFree(m) for m in ("gmres", "bicgstab", "richardson")]


@pytest.mark.parametrize("structure", STRUCTURES, ids=[s.method for s in STRUCTURES])
def test_products_are_those_of_eager_code(structure: Jacobian) -> None:
    inv, inputs = by_products(jacobian=structure), arguments(2_000, 3)
    found = torch.autograd.grad(compiled(total(inv))(*inputs), inputs)
    for ours, theirs in zip(found, torch.autograd.grad(total(inv)(*inputs), inputs), strict=True):
        assert torch.equal(ours, theirs)


def test_inductor() -> None:
    for inv in (by_products(), banded()):
        inputs = arguments(3_000, 2)
        found = torch.autograd.grad(compiled(total(inv), "inductor")(*inputs), inputs)
        assert_same(found, torch.autograd.grad(total(inv)(*inputs), inputs))


def test_sizes_that_change() -> None:
    for inv in (by_products(), banded()):
        function = compiled(total(inv))
        for n in (40, 50, 60, 2_000):
            inputs = arguments(n)
            assert_same(
                torch.autograd.grad(function(*inputs), inputs), torch.autograd.grad(total(inv)(*inputs), inputs)
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
@pytest.mark.parametrize("structure", [Banded(2, 1), MatrixFree(rtol=1e-6)], ids=["bands", "products"])
def test_other_dtypes(structure: Jacobian, dtype: torch.dtype) -> None:
    a = (4 * torch.eye(6) + random(0, 6, 6).tril(1).triu(-2)).to(dtype)
    a = a + 0.3j * random(1, 6, 6).tril(1).triu(-2) if dtype.is_complex else a
    x = random(2, 3, 6, dtype=torch.float64).to(dtype).requires_grad_()
    inv = inverse(lambda y: y @ a.mT, lambda x: x @ torch.linalg.inv(a).mT, event_dim=1, jacobian=structure)
    v = random(3, 3, 6).to(dtype)
    (found,) = torch.autograd.grad(compiled(inv)(x), x, v)
    torch.testing.assert_close(found, v @ torch.linalg.inv(a).conj(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [3, 1000])
def test_log_determinants_of_bands(n: int) -> None:
    """In two events, one of which has a triangular J; the gradient is that of entries, which depend on y and a."""
    inv, inputs = banded(), arguments(n, 2)

    def use(x: Tensor, a: Tensor) -> Tensor:
        y, log_det = inv.with_log_det(x, a)
        return (log_det * torch.tensor([1.0, 2.0], dtype=torch.float64)).sum() + y.sum()

    sizes = list[int]()
    found = torch.autograd.grad(compiled(use, measuring(sizes))(*inputs), inputs)
    assert max(sizes) <= 9 * 2 * n
    assert_same(found, torch.autograd.grad(use(*inputs), inputs))


def test_the_inverse_of_bands() -> None:
    inv, inputs = banded(), arguments(5, 2)
    use = lambda x, a: inv.jacobian(x, a).sin().sum()  # noqa: E731
    found = torch.autograd.grad(compiled(use)(*inputs), inputs)
    assert_same(found, torch.autograd.grad(use(*inputs), inputs))


def test_a_singular_band_becomes_nan() -> None:
    scale = torch.ones(3, 50, dtype=torch.float64)
    scale[1, 7] = 0
    inv = inverse(lambda y: scale * y, lambda x: x.clone(), event_dim=1, jacobian=Banded(1, 1))
    x = (scale * random(0, 3, 50)).requires_grad_()
    (found,) = torch.autograd.grad(compiled(lambda x: (inv(x) ** 2).sum())(x), x)
    assert found.isnan().all(-1).tolist() == [False, True, False]
    torch.testing.assert_close(found[::2], 2 * x[::2])


# ---- torch.func inside of the graph ---------------------------------------------------------------------------------

INSIDE: dict[str, Callable[[Inverse], Callable[..., Any]]] = {
    "grad": lambda inv: grad(total(inv), (0, 1)),
    "jvp": lambda inv: lambda x, a: jvp(inv, (x, a), (x, a))[1],
    "jvp(grad)": lambda inv: lambda x, a: jvp(grad(total(inv), (0, 1)), (x, a), (x, a))[1],
    "vmap(grad)": lambda inv: lambda x, a: vmap(grad(total(inv), (0, 1)), (0, None))(torch.stack([x, x / 2]), a),
}


@pytest.mark.parametrize("transform", INSIDE)
@pytest.mark.parametrize("make", [banded, by_products])
def test_torch_func_inside(make: Callable[[], Inverse], transform: str) -> None:
    inputs, sizes = tuple(t.detach() for t in arguments(5_000)), list[int]()
    use = INSIDE[transform](make())
    found = compiled(use, measuring(sizes))(*inputs)
    assert max(sizes) <= 10 * 2 * 5_000
    assert_same(found, use(*inputs))


@pytest.mark.parametrize("transform", [pytest.param(t, id=n) for n, t in COMPILED.items()])
def test_every_transform_of_products(transform: Transform) -> None:
    problem = BY_NAME["mixed sinh"]
    inputs = tuple(t.detach() for t in problem.inputs())
    inv = problem.explicit(jacobian=MatrixFree(rtol=1e-15))
    assert_same(compiled(lambda *i: transform(inv, i))(*inputs), transform(problem.exact, inputs))


@pytest.mark.parametrize("transform", ["hessian", "grad(grad(grad))", "jvp(vmap(grad))"])
@pytest.mark.parametrize("structure", [Banded(1, 1), Banded(2, 1)], ids=str)
def test_transforms_of_bands(structure: Banded, transform: str) -> None:
    problem = BY_NAME["tridiagonal"]
    inputs = tuple(t.detach() for t in problem.inputs())
    inv = problem.explicit(jacobian=structure)
    use = COMPILED[transform]
    assert_same(compiled(lambda *i: use(inv, i))(*inputs), use(problem.exact, inputs))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("make", [banded, by_products])
def test_backward_of_compiled_grads(make: Callable[..., Inverse], depth: int) -> None:
    """The derivative that the backward pass adds to those taken inside is right, too."""

    def nested(h: Any) -> Any:
        for _ in range(depth):
            h = slope(h)
        return lambda x, a: h(x, a).cos().sum()

    def slope(h: Any) -> Any:
        return lambda x, a: grad(lambda x: h(x, a).sin().sum())(x)

    inputs = arguments(6, 2)
    options = {"jacobian": MatrixFree(rtol=1e-15)} if make is by_products else {}
    inv = make(**options)
    found = torch.autograd.grad(compiled(nested(inv))(*inputs), inputs)
    assert_same(found, torch.autograd.grad(nested(inv)(*inputs), inputs))


def test_inside_of_a_dual_level() -> None:
    inv, (x, a) = by_products(), tuple(t.detach() for t in arguments(30))
    t = random(1, 30)
    with forward_ad.dual_level():
        dual = compiled(lambda x: inv(x, a))(forward_ad.make_dual(x, t))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert_same(tangent, jvp(lambda x: inv(x, a), (x,), (t,))[1])


def test_what_f_closes_over() -> None:
    layer = torch.nn.Linear(6, 6, dtype=torch.float64)
    mix = lambda y: y + 0.3 * torch.tanh(layer(y))  # noqa: E731
    inv = inverse(mix, lambda x: g_from(lambda y, _: mix(y), x)(x), event_dim=1, jacobian=MatrixFree(rtol=1e-15))
    x = random(0, 2, 6)
    inputs = (x.requires_grad_(), *layer.parameters())
    use = lambda x: grad(lambda x: inv(x).cos().sum())(x).sin().sum()  # noqa: E731
    assert_same(torch.autograd.grad(compiled(use)(x), inputs), torch.autograd.grad(_by_backward(inv, x), inputs))


def _by_backward(inv: Inverse, x: Tensor) -> Tensor:
    return torch.autograd.grad(inv(x).cos().sum(), x, create_graph=True)[0].sin().sum()


def test_what_fails_inside() -> None:
    scale = torch.ones(3, 50, dtype=torch.float64)
    scale[1, 7] = 0
    x = scale * random(0, 3, 50)
    for structure, error in ((Banded(1, 1), errors.SingularJacobianError), (MatrixFree(), errors.ConvergenceError)):
        for policy in ("raise", "nan"):
            inv = inverse(lambda y: scale * y, lambda x: x.clone(), event_dim=1, jacobian=structure, on_failure=policy)
            torch._dynamo.reset()
            use = compiled(grad(lambda x, inv=inv: inv(x).exp().sum()))
            if policy == "raise":
                with pytest.raises(error, match=r"index \(1,\)"):
                    use(x)
            else:
                assert use(x).isnan().all(-1).tolist() == [False, True, False]


def test_log_determinants_inside() -> None:
    inv, (x, a) = banded(), arguments(30)
    use = grad(lambda x, a: inv.with_log_det(x, a)[1], (0, 1))
    assert_same(compiled(use)(x.detach(), a.detach()), use(x.detach(), a.detach()))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"backsolve: this needs all of J"):
        compiled(use)(arguments(5_000)[0].detach(), a.detach())


# ---- the derivative of a compiled vmap ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure", [None, Banded(1, 1), MatrixFree(rtol=1e-15)], ids=["default", "bands", "products"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_backward_of_a_compiled_vmap(structure: Jacobian | None, nested: bool) -> None:
    """Dynamo takes what a vmap maps for constants, and drops the backward of a custom Function there."""
    inv = inverse(reaction, nearly_three, event_dim=1, jacobian=structure)
    x, a = arguments(4, 2, 3)

    def use(x: Tensor, a: Tensor) -> Tensor:
        inner = vmap(inv, (0, None))
        return (vmap(inner, (0, None)) if nested else inner)(x, a).cos().sum() + x.sum()

    for inputs in ((x,), (x, a)):
        found = torch.autograd.grad(compiled(use)(x, a), inputs)
        assert_same(found, torch.autograd.grad(use(x, a), inputs))


def test_backward_of_a_compiled_vmap_without_params() -> None:
    arcsin = inverse(torch.sin, lambda x: x.detach().asin())
    x = (0.3 * random(0, 2, 3)).requires_grad_()
    use = lambda x: vmap(arcsin)(x).sum() + x.sum()  # noqa: E731
    assert_same(torch.autograd.grad(compiled(use)(x), x), 1 + 1 / (1 - x**2).sqrt())


# ---- what fails -----------------------------------------------------------------------------------------------------


def test_what_does_not_converge_raises_in_the_backward_pass() -> None:
    a = torch.stack([2 * torch.eye(40, dtype=torch.float64), random(0, 40, 40)])
    x = random(1, 2, 40).requires_grad_()

    def use(policy: Any, fallback: Jacobian | None = None) -> Tensor:
        structure = MatrixFree(maxiter=20, fallback=fallback)
        inv = inverse(
            lambda y: (a @ y[..., None])[..., 0], lambda x: torch.linalg.solve(a, x[..., None])[..., 0], event_dim=1,
            jacobian=structure, on_failure=policy,
        )  # fmt: skip
        torch._dynamo.reset()
        return torch.autograd.grad(compiled(lambda x: inv(x).sum())(x), x)[0]

    with pytest.raises(errors.ConvergenceError, match=r"1 of 2 events(.|\n)*index \(1,\)"):
        use("raise")
    assert use("nan").isnan().all(-1).tolist() == [False, True]
    expected = torch.linalg.solve(a.mT, torch.ones_like(x)[..., None])[..., 0]
    torch.testing.assert_close(use("raise", Dense()), expected, rtol=1e-9, atol=1e-9)


def test_weights_that_change_before_the_backward_pass_are_an_error() -> None:
    """The operation reads what f closes over later than the graph did; of a linear f torch saves no weights."""
    w = torch.eye(20, dtype=torch.float64) + 0.1 * random(0, 20, 20)
    inv = inverse(lambda y: y @ w.mT, lambda x: x @ torch.linalg.inv(w).mT, event_dim=1, jacobian=MatrixFree())
    x = random(1, 3, 20).requires_grad_()
    value = compiled(lambda x: inv(x).sum())(x)
    w.mul_(1.5)
    with pytest.raises(errors.StructureError, match="another value"):
        torch.autograd.grad(value, x)


def test_the_default_for_many_entries_is_as_in_eager_code() -> None:
    """Products in an operation, which raises where J is singular."""
    scale = torch.ones(600, dtype=torch.float64)
    inv, sizes = (
        inverse(lambda y, a: scale * shifted(y, a), lambda x, a: g_from(shifted, a)(x / scale), event_dim=1),
        list[int](),
    )
    inputs = arguments(600)
    found = torch.autograd.grad(compiled(total(inv), measuring(sizes))(*inputs), inputs)
    assert max(sizes) < 600**2
    assert_same(found, torch.autograd.grad(total(inv)(*inputs), inputs))
    y = random(1, 600)
    scale[5] = 0
    singular = inverse(lambda y: scale * y, lambda x: y.clone(), event_dim=1)
    x = (scale * y).requires_grad_()
    value = compiled(lambda x: singular(x).sum())(x)
    with pytest.raises(errors.SingularJacobianError):
        torch.autograd.grad(value, x)


def test_the_log_determinant_of_products_is_refused_for_large_events() -> None:
    inv, inputs = by_products(), arguments(2_000)
    use = lambda x, a: inv.with_log_det(x, a)[1]  # noqa: E731
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"backsolve: this needs all of J"):
        compiled(use)(*inputs)
    with pytest.raises(errors.StructureError, match=r"log-determinant(.|\n)*at most 1024 elements(.|\n)*of 2000"):
        compiled(use, fullgraph=False)(*inputs)

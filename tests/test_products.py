"""`MatrixFree` under torch.func and forward mode: right within its tolerance, and J is never formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from backsolve import Dense, Inverse, MatrixFree, errors, inverse
from tests.test_krylov_choices import convex, near, positive_definite
from tests.test_matrix_free import g_from, mixing, random
from tests.test_transforms import assert_same
from tests.transforms import OF_PARAMS, OF_X, Function, Transform, grads_batched, loss

N = 5_000


class Largest(TorchDispatchMode):
    """While active, keeps the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


# ---- all 31, by each method -----------------------------------------------------------------------------------------


def unrolled(f: Function, j: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """Newton's method, unrolled: its last two steps alone have all derivatives up to the third."""

    def exact(x: Tensor, a: Tensor) -> Tensor:
        y = x
        for _ in range(8):
            y = y - (torch.linalg.inv(j(y, a)) @ (f(y, a) - x)[..., None])[..., 0]
        return y

    return exact


def methods() -> dict[str, tuple[MatrixFree, Function, Function, tuple[Tensor, Tensor]]]:
    """For each method f, the exact inverse, x and a param."""
    mix, w = mixing(4, 0.3)
    slope = lambda y, w: torch.eye(4).double() + 0.3 * (1 - torch.tanh(y @ w.mT) ** 2)[..., None] * w  # noqa: E731
    a, x = positive_definite(0, 4, 8.0)[0], random(1, 3, 4)
    hessian = lambda y, a: a + torch.diag_embed(3 * y**2)  # noqa: E731
    found = {
        method: (MatrixFree(method, rtol=1e-15), mix, unrolled(mix, slope), (x, w))
        for method in ("gmres", "bicgstab", "richardson")
    }
    return {**found, "cg": (MatrixFree("cg", rtol=1e-15), convex, unrolled(convex, hessian), (x, a))}


METHODS = methods()


def inverse_by(method: str, form: str) -> Function:
    structure, f, _, _ = METHODS[method]
    g = near if method == "cg" else lambda x, w: g_from(f, w)(x)
    if form == "explicit":
        return inverse(f, g, event_dim=1, jacobian=structure)

    def closed_over(x: Tensor, a: Tensor) -> Tensor:
        constant = a.detach()
        return inverse(lambda y: f(y, a), lambda x: g(x, constant), event_dim=1, jacobian=structure)(x)

    return closed_over


FORMS = [*((method, "explicit") for method in METHODS), ("gmres", "closed over"), ("cg", "closed over")]


@pytest.mark.parametrize(("method", "form"), FORMS)
@pytest.mark.parametrize("transform", [pytest.param(t, id=n) for n, t in {**OF_X, **OF_PARAMS}.items()])
def test_every_transform(method: str, transform: Transform, form: str) -> None:
    _, _, exact, inputs = METHODS[method]
    assert_same(transform(inverse_by(method, form), inputs), transform(exact, inputs))


# ---- large events ---------------------------------------------------------------------------------------------------


def shifted(y: Tensor, a: Tensor) -> Tensor:
    """Neighbours on a ring; neither symmetric nor normal."""
    return y + a * torch.tanh(0.3 * y.roll(1, -1) + 0.1 * y.roll(-1, -1))


def large(n: int = N, **options: Any) -> tuple[Inverse, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An inverse for events of n elements, x and a param, and tangents of both."""
    options = {"jacobian": MatrixFree(), **options}
    inv = inverse(shifted, lambda x, a: g_from(shifted, a)(x), event_dim=1, **options)
    return inv, (random(0, n), torch.tensor(0.5).double()), (random(1, n), torch.tensor(0.7).double())


def hessian_vector_product(h: Function, inputs: Any, t: Any) -> Any:
    return jvp(grad(loss(h), (0, 1)), inputs, t)[1]


def tangent(h: Function, inputs: Any, t: Any) -> Tensor:
    return jvp(h, inputs, t)[1]


def of_two(h: Function, inputs: Any, _: Any) -> Any:
    x, a = inputs
    return vmap(grad(loss(h), (0, 1)), (0, None))(torch.stack([x, x / 2]), a)


def cotangent(h: Function, inputs: Any, t: Any) -> Any:
    return vjp(h, *inputs)[1](t[0])


def forward_mode(h: Function, inputs: Any, t: Any) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(i, j) for i, j in zip(inputs, t, strict=True)]
        return forward_ad.unpack_dual(h(*duals)).tangent


LARGE = {
    "grad": lambda h, inputs, t: grad(loss(h), (0, 1))(*inputs),
    "vjp": cotangent,
    "jvp": tangent,
    "forward mode": forward_mode,
    "vmap(grad)": of_two,
    "jvp(grad)": hessian_vector_product,
    "grad(grad)": lambda h, inputs, t: grad(lambda x, a: grad(loss(h))(x, a) @ t[0], (0, 1))(*inputs),
}


def by_sparse_elimination(inputs: tuple[Tensor, Tensor]) -> Any:
    """J at y in SciPy's sparse format, and y: another way to the derivatives of `shifted`."""
    import numpy as np
    from scipy import sparse

    x, a = inputs
    y = g_from(shifted, a)(x)
    slope = (a * (1 - torch.tanh(0.3 * y.roll(1) + 0.1 * y.roll(-1)) ** 2)).numpy()
    n = len(y)
    i = np.arange(n)
    j = sparse.coo_matrix((0.3 * slope, (i, (i - 1) % n)), (n, n)) + sparse.coo_matrix(
        (0.1 * slope, (i, (i + 1) % n)), (n, n)
    )
    return (sparse.identity(n) + j).tocsc(), y


def test_large_events_against_sparse_elimination() -> None:
    from scipy.sparse.linalg import spsolve

    inv, inputs, t = large()
    j, y = by_sparse_elimination(inputs)
    v = torch.cos(y) - y * torch.sin(y)  # of y cos(y)
    w = torch.from_numpy(spsolve(j.T.tocsc(), v.numpy()))
    f_a = torch.tanh(0.3 * y.roll(1) + 0.1 * y.roll(-1))
    u = torch.from_numpy(spsolve(j, (t[0] - f_a * t[1]).numpy()))
    by_x, by_a = LARGE["grad"](inv, inputs, t)
    torch.testing.assert_close(by_x, w, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(by_a, -(w @ f_a), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(LARGE["jvp"](inv, inputs, t), u, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("method", ["gmres", "bicgstab", "richardson"])
def test_large_events(method: Any, name: str) -> None:
    """As backward passes of eager calls have it, and without a tensor of n^2 elements, or of n^2 / 8."""
    inv, inputs, t = large(jacobian=MatrixFree(method))
    with Largest() as largest:
        found = LARGE[name](inv, inputs, t)
    assert 2 * N <= largest.elements <= 2 * 2 * 50 * N < N**2 / 20  # GMRES keeps 50 directions and images
    leaves = [i.clone().requires_grad_() for i in inputs]
    y = inv(*leaves)
    by_hand = {
        "grad": lambda: torch.autograd.grad(loss(inv)(*leaves), leaves),
        "vjp": lambda: torch.autograd.grad(y, leaves, t[0]),
        "jvp": lambda: pushed(y, leaves, t),
        "forward mode": lambda: pushed(y, leaves, t),
        "vmap(grad)": lambda: [torch.stack(g) for g in zip(gradients(inv, leaves), gradients(
            inv, [leaves[0] / 2, leaves[1]]), strict=True)],
        "jvp(grad)": lambda: pushed(
            torch.cat([g.reshape(-1) for g in gradients(inv, leaves)]), leaves, t
        ).split([N, 1]),
        "grad(grad)": lambda: torch.autograd.grad(gradients(inv, leaves)[0] @ t[0], leaves),
    }  # fmt: skip
    expected = by_hand[name]()
    for ours, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        theirs = theirs.detach().reshape(ours.shape)
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-10 * float(theirs.abs().max()))


def gradients(inv: Inverse, inputs: Any) -> Any:
    leaves = [i.detach().requires_grad_() if i.grad_fn is not None else i for i in inputs]
    return torch.autograd.grad(loss(inv)(*leaves), leaves, create_graph=True)


def pushed(y: Tensor, leaves: Any, t: Any) -> Tensor:
    """`J t` by the transpose of `v -> J^T v`."""
    v = torch.zeros_like(y).requires_grad_()
    pulled = torch.autograd.grad(y, leaves, v, create_graph=True)
    return torch.autograd.grad(pulled, v, t)[0]


def test_as_many_products_as_eager() -> None:
    """No more than an eager backward pass takes; the count does not grow with n."""
    counts = []
    for n in (50, 500):
        calls = 0

        class Counted(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(y: Tensor) -> Tensor:
                return y.clone()

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                pass

            @staticmethod
            def backward(ctx: Any, v: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return v.clone()

        def f(y: Tensor, a: Tensor) -> Tensor:
            return shifted(Counted.apply(y), a)

        inv = inverse(f, lambda x, a: g_from(shifted, a)(x), event_dim=1, jacobian=MatrixFree(), verify=False)
        grad(loss(inv))(random(0, n), torch.tensor(0.5).double())
        under_func, calls = calls, 0
        loss(inv)(random(0, n).requires_grad_(), torch.tensor(0.5).double()).backward()
        assert under_func <= calls
        counts.append(under_func)
    assert counts[1] <= counts[0] + 4 < 50


def test_the_default_is_as_in_eager_code() -> None:
    """Products for many entries, the matrix where they do not converge, which is remembered for the next calls."""
    inv, inputs, t = large(600, jacobian=None)
    direct, *_ = large(600, jacobian=Dense())
    with Largest() as largest:
        found = hessian_vector_product(inv, inputs, t)
    assert largest.elements < 600**2
    assert_same(found, hessian_vector_product(direct, inputs, t))
    hard = inverse(lambda y, a: a * y.roll(1, -1), lambda x, a: x.roll(-1, -1) / a, event_dim=1)
    with Largest() as largest:
        found = hessian_vector_product(hard, inputs, t)
    assert largest.elements >= 600**2
    assert_same(found, hessian_vector_product(lambda x, a: x.roll(-1, -1) / a, inputs, t))


def test_modules() -> None:
    """functional_call over an f that closes over a convolution."""
    torch.manual_seed(0)
    layer = torch.nn.Conv1d(1, 1, 5, padding=2, dtype=torch.float64)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def residual(self, y: Tensor) -> Tensor:
            return y + 0.3 * torch.tanh(self.layer(y[..., None, :]))[..., 0, :]

        def forward(self, x: Tensor) -> Tensor:
            def g(x: Tensor) -> Tensor:
                y = x.clone()
                for _ in range(100):
                    y = y - (self.residual(y) - x)
                return y

            return inverse(self.residual, g, event_dim=1, jacobian=MatrixFree())(x)

    block, x, t = Block(), random(0, 2, N), random(1, 2, N)
    params = {name: p.detach() for name, p in block.named_parameters()}

    def total(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(block, params, (x,)).cos().sum()

    with Largest() as largest:
        by_params, by_x = grad(total, (0, 1))(params, x)
        second = jvp(lambda x: grad(total)(params, x), (x,), (t,))[1]
    assert largest.elements <= 100 * x.numel()
    leaf = x.clone().requires_grad_()
    first = torch.autograd.grad(block(leaf).cos().sum(), (*block.parameters(), leaf), create_graph=True)
    assert_same([*by_params.values(), by_x], first)
    v = [torch.zeros_like(f).requires_grad_() for f in first[:-1]]
    pulled = torch.autograd.grad(first[:-1], leaf, v, create_graph=True)[0]
    assert_same(list(second.values()), torch.autograd.grad(pulled, v, t))


# ---- what fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["grad", "jvp", "backward"])
def test_what_does_not_converge_raises_with_its_index(inner: str) -> None:
    """The event (1, 0) is a cyclic shift: no residual falls before step n."""
    scale = torch.ones(3, 2, 1, dtype=torch.float64)
    scale[1, 0] = 0

    def f(y: Tensor, s: Tensor) -> Tensor:
        return s * y + (1 - s) * y.roll(1, -1)

    def g(x: Tensor, s: Tensor) -> Tensor:
        return torch.where(s == 1, x, x.roll(-1, -1))

    x = random(0, 3, 2, 30)

    def use(policy: str, fallback: Dense | None = None) -> Tensor:
        options: Any = {"event_dim": 1, "param_event_dims": (1,), "on_failure": policy, "verify": False}
        inv = inverse(f, g, jacobian=MatrixFree(maxiter=20, restart=10, fallback=fallback), **options)
        if inner == "grad":
            return vmap(grad(lambda x, s: (inv(x, s) ** 2).sum()))(x, scale)
        if inner == "jvp":
            return vmap(lambda x, s: jvp(lambda x: inv(x, s), (x,), (x,))[1])(x, scale)
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad((vmap(inv)(leaf, scale) ** 2).sum(), leaf)[0]

    expected = torch.where(scale == 1, x, x.roll(-1, -1)) if inner == "jvp" else 2 * x
    with pytest.raises(errors.ConvergenceError, match=r"1 of 6 events(.|\n)*index \(1, 0\)"):
        use("raise")
    with pytest.warns(errors.BacksolveWarning, match=r"index \(1, 0\)"):
        warned = use("warn")
    for found in (warned, use("nan"), use("ignore")):
        assert found.isnan().all(-1).tolist() == [[False, False], [True, False], [False, False]]
        good = ~found.isnan()
        torch.testing.assert_close(found[good], expected[good])
    torch.testing.assert_close(use("raise", Dense()), expected)


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
def test_a_turning_point_is_found(method: Any) -> None:
    x = torch.linspace(0.1, 0.9, 3 * 7, dtype=torch.float64).reshape(3, 7)
    x[1, 4] = 1.0
    inv = inverse(torch.sin, torch.asin, event_dim=1, jacobian=MatrixFree(method))
    for use in (grad(lambda x: inv(x).sum()), lambda x: jvp(inv, (x,), (torch.ones_like(x),))[1]):
        with pytest.raises(errors.SingularJacobianError, match=r"index \(1,\)"):
            use(x)
    spoilt = inverse(torch.sin, torch.asin, event_dim=1, jacobian=MatrixFree(method), on_failure="nan")
    found = hessian_of(spoilt)(x)
    assert found[0].isnan().tolist() == found[1].isnan().tolist() == [[False] * 7, [True] * 7, [False] * 7]


def hessian_of(inv: Inverse) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The gradient, and the Hessian times ones."""
    first = grad(lambda x: inv(x).sum())
    return lambda x: jvp(first, (x,), (torch.ones_like(x),))


def test_a_singular_event_in_a_log_determinant() -> None:
    scales = torch.tensor([[1.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    inv = inverse(lambda y: scales * y, lambda x: x.clone(), event_dim=1, jacobian=MatrixFree())
    with pytest.raises(errors.SingularJacobianError, match=r"index \(1,\)"):
        grad(lambda x: inv.with_log_det(x)[1].sum())(torch.zeros(2, 2, dtype=torch.float64))


def test_negative_curvature_and_asymmetry_are_errors() -> None:
    a = positive_definite(0, 6, 10.0)
    y = random(1, 3, 6)
    for wrong, match in ((3 * torch.eye(6).double(), "not positive definite"), (a.triu(1), "not symmetric")):
        matrix = a.clone()
        matrix[1] -= wrong if wrong.dim() == 2 else wrong[1]
        inv = inverse(
            lambda y, m=matrix: (m @ y[..., None])[..., 0], lambda _: y.clone(), event_dim=1, jacobian=MatrixFree("cg")
        )
        with pytest.raises(errors.StructureError, match=rf"{match}(.|\n)*index \(1,\)"):
            grad(lambda x, inv=inv: inv(x).sum())((matrix @ y[..., None])[..., 0])


def test_a_coupled_batch_is_found() -> None:
    y = random(0, 5, 3)
    f = lambda y: (y - y.mean(0)) / y.std(0) + y  # noqa: E731
    inv = inverse(f, lambda x: y.clone(), event_dim=1, jacobian=MatrixFree())
    with pytest.raises(errors.StructureError, match="independent across the batch"):
        grad(lambda x: inv(x).sum())(f(y))


def test_an_f_that_changes_is_found() -> None:
    """Between the call and the solve: the value at y is compared where f is evaluated anew."""
    scale = [2.0]
    inv = inverse(lambda y: scale[0] * y, lambda x: x / 2, event_dim=1, jacobian=MatrixFree())
    x, v = random(0, 4), random(1, 4)
    _, pull = vjp(inv, x)
    _, pull_twice = vjp(grad(lambda x: inv(x).sin().sum()), x)
    scale[0] = 3.0
    assert_same(pull(v), (v / 2,))  # by the graph of the f that was called
    with pytest.raises(errors.StructureError, match="another value"):
        pull_twice(v)


# ---- options and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["vjp", "jvp all", "jvp(grad)", "vmap(grad) all", "vmap(hessian)"])
def test_a_preconditioner(transform: str) -> None:
    """It gets y as the residual is batched, and says by `transposed` which inverse it stands for."""
    a = torch.diag(torch.logspace(0, 4, 60, dtype=torch.float64)) + 0.1 * random(0, 60, 60)
    seen = set()

    def nearly(r: Tensor, y: Tensor, transposed: bool) -> Tensor:
        seen.add(transposed)
        assert r.shape == y.shape
        assert not torch._C._functorch.is_functorch_wrapped_tensor(r)
        j = a.triu() + torch.diag_embed(3 * y**2)  # a lower triangle is missing: its transpose is not itself
        return torch.linalg.solve(j.mT if transposed else j, r[..., None])[..., 0]

    def f(y: Tensor, s: Tensor) -> Tensor:
        return y @ a.mT + s * y**3

    def newton(x: Tensor, s: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for _ in range(100):
            y = y - torch.linalg.solve(a + torch.diag_embed(3 * s * y**2), (f(y, s) - x)[..., None])[..., 0]
        return y

    inputs = (random(1, 2, 60), torch.tensor(1.0).double())
    direct = OF_X[transform](inverse(f, newton, event_dim=1, jacobian=Dense()), inputs)
    plain, with_help = (
        inverse(f, newton, event_dim=1, jacobian=MatrixFree(maxiter=25, rtol=1e-13, preconditioner=p))
        for p in (None, nearly)
    )
    with pytest.raises(errors.ConvergenceError):
        OF_X[transform](plain, inputs)
    found = OF_X[transform](with_help, inputs)
    for ours, theirs in zip(pytree.tree_leaves(found), pytree.tree_leaves(direct), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9 * float(theirs.abs().max()))
    assert seen == {"vjp": {True}, "vmap(grad) all": {True}, "jvp all": {False}}.get(transform, {True, False})


@pytest.mark.parametrize("transform", ["vjp", "jvp x", "jvp all", "vmap(grad) all", "is_grads_batched"])
def test_complex(transform: str) -> None:
    a = 2 * torch.eye(4, dtype=torch.complex128) + 0.3 * random(0, 4, 4, dtype=torch.complex128)
    inv, direct = (
        inverse(
            lambda y, a: torch.sinh(y) @ a.mT, lambda x, a: torch.asinh(x @ torch.linalg.inv(a).mT), event_dim=1,
            jacobian=j, param_event_dims=(2,),
        )
        for j in (MatrixFree(rtol=1e-15), Dense())
    )  # fmt: skip
    inputs = (0.5 * random(1, 3, 4, dtype=torch.complex128), a)

    def use(h: Function) -> Any:
        if transform == "vmap(grad) all":
            return vmap(grad(lambda x, a: h(x, a).abs().sum(), (0, 1)))(*(torch.stack([t, 1.1 * t]) for t in inputs))
        if transform == "is_grads_batched":
            return grads_batched(h, inputs)
        t = tuple(random(k, *i.shape, dtype=i.dtype) for k, i in enumerate(inputs))
        if transform == "vjp":
            return vjp(h, *inputs)[1](t[0])
        return jvp(h, inputs, t)[1] if transform == "jvp all" else jvp(lambda x: h(x, a), inputs[:1], t[:1])[1]

    assert_same(use(inv), use(direct))


def test_float32() -> None:
    """Within the default tolerance, eps^0.8 = 3e-6 of |v|; |J^-1| < 3."""
    f, w = mixing(30, 0.3)
    x, t = random(1, 3, 30), random(2, 3, 30)
    exact = inverse(f, lambda x, w: g_from(f, w)(x), event_dim=1, jacobian=Dense())
    inv = inverse(f, lambda x, w: g_from(f, w)(x), event_dim=1, jacobian=MatrixFree())
    for use in (
        lambda h, *i: vjp(h, *i[:2])[1](i[2])[0],
        lambda h, *i: jvp(lambda x: h(x, i[1]), i[:1], i[2:])[1],
        lambda h, *i: jvp(grad(loss(h)), i[:2], (i[2], i[1]))[1],
    ):
        found, expected = use(inv, x.float(), w.float(), t.float()), use(exact, x, w, t)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1,)])
def test_empty_and_small_events(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.float64)
    inv = inverse(lambda y: 2 * y, lambda x: x / 2, event_dim=1, jacobian=MatrixFree())
    assert (grad(lambda x: inv(x).sum())(x) == 0.5).all()
    assert (jvp(inv, (x,), (x,))[1] == 0.5).all()
    assert jacrev(inv)(x).shape == shape * 2


def test_second_backward_of_a_vmap() -> None:
    """Outside of the level whose samples f has on the left by now."""
    _, _, exact, (x, a) = METHODS["gmres"]

    def second(h: Function) -> Any:
        leaves = [torch.stack([x, x / 2]).requires_grad_(), torch.stack([a, 0.9 * a]).requires_grad_()]
        first = torch.autograd.grad(vmap(h)(*leaves).cos().sum(), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum((t**2).sum() for t in first), leaves)]

    assert_same(second(inverse_by("gmres", "explicit")), second(exact))


def test_batched_cotangents_of_what_was_made_under_a_transform() -> None:
    """`is_grads_batched` is a vmap of its own, older than torch.func; second derivatives included."""
    _, _, exact, (x, a) = METHODS["gmres"]

    def second(h: Function) -> Any:
        leaves = [torch.stack([x, x / 2]).requires_grad_(), a.clone().requires_grad_()]
        y = vmap(h, (0, None))(*leaves).cos()
        cotangents = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
        first = torch.autograd.grad(y, leaves, cotangents, is_grads_batched=True, create_graph=True)
        return [*first, *torch.autograd.grad(sum((t**2).sum() for t in first), leaves)]

    assert_same(second(inverse_by("gmres", "explicit")), second(exact))

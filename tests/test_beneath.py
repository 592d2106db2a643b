"""Calls that are made beneath the levels of torch.func: every stack of levels, over every way in which f gets tensors.

Each is compared with the closed form, and so are the gradients of the result in an eager graph around it, in which x,
the param and the weights that f closes over may all take part.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from backsolve import Diagonal, MatrixFree, _functional, errors, inverse
from backsolve.solvers import numpy_solver
from tests.test_transforms import assert_same

Function = Callable[[Tensor, Tensor], Tensor]

X = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
A = torch.tensor([1.5, 0.8, 2.0], dtype=torch.float64)
M = torch.tensor([[2.0, 0.3, -0.5], [0.1, -1.5, 0.4], [0.6, 0.2, 1.8]], dtype=torch.float64)
WEIGHT = torch.tensor([0.9, 1.3, 1.7], dtype=torch.float64, requires_grad=True)


def asinh(x: Tensor, a: Tensor) -> Tensor:
    return torch.asinh(x / a)


def linear(x: Tensor, a: Tensor) -> Tensor:
    return (x / a) @ torch.linalg.inv(M).T


class Scaled(nn.Module):
    """A module as f, whose weight is trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(WEIGHT.detach().clone())

    def forward(self, y: Tensor, a: Tensor) -> Tensor:
        return self.scale * a * y.sinh()


MODULE = Scaled()
by_param = inverse(lambda y, a: a * y.sinh(), numpy_solver(lambda x, a: np.arcsinh(x / a)))
by_entries = inverse(
    lambda y, a: a * y.sinh(),
    numpy_solver(lambda x, a: np.arcsinh(x / a)),
    jacobian=Diagonal(entries=lambda y, a: a * y.cosh()),
)
alone = inverse(torch.sinh, np.arcsinh)
by_matrix = inverse(
    lambda y, a: a * (y @ M.T),
    numpy_solver(lambda x, a: (x / a) @ np.linalg.inv(M.numpy()).T),
    event_dim=1,
    param_event_dims=(1,),
)
by_constant_matrix = inverse(lambda y: y @ M.T, numpy_solver(lambda x: x @ np.linalg.inv(M.numpy()).T), event_dim=1)
of_module = inverse(MODULE, lambda x, a: torch.asinh(x / (MODULE.scale * a)))

FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "no param": (lambda x, a: alone(x) * a, lambda x, a: x.asinh() * a),
    "param": (by_param, asinh),
    "keyword": (lambda x, a: by_keyword(x, a=a), asinh),
    "entries": (by_entries, asinh),
    "closure": (lambda x, a: inverse(lambda y: a * y.sinh(), lambda x: asinh(x, a))(x), asinh),
    "closure over x": (
        lambda x, a: inverse(lambda y: a * y.sinh() + x, lambda z: asinh(z - x, a))(2 * x),
        asinh,
    ),
    "weight": (
        lambda x, a: inverse(lambda y: WEIGHT * a * y.sinh(), lambda x: asinh(x, WEIGHT * a))(x),
        lambda x, a: asinh(x, WEIGHT * a),
    ),
    "weight with a history": (
        lambda x, a: _with_history(WEIGHT**2, x, a),
        lambda x, a: asinh(x, WEIGHT**2 * a),
    ),
    "module": (of_module, lambda x, a: asinh(x, MODULE.scale * a)),
    "functional_call": (
        lambda x, a: functional_call(_Inverted(), {"inner.scale": a}, (x,)),
        asinh,
    ),
    "matrix": (by_matrix, linear),
    "constant matrix": (lambda x, a: by_constant_matrix(x) * a, lambda x, a: linear(x, torch.ones_like(x)) * a),
    "matrix, closure": (
        lambda x, a: inverse(lambda y: a * (y @ M.T), lambda x: linear(x, a), event_dim=1)(x),
        linear,
    ),
}
by_keyword = inverse(lambda y, *, a: a * y.sinh(), lambda x, *, a: asinh(x, a))
TRAINABLE = (WEIGHT, MODULE.scale)
TRAINED = ("weight", "weight with a history", "module")


class _Inverted(nn.Module):
    """A module that inverts another one, in which `functional_call` puts the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()
        self.invert = inverse(lambda y: self.inner(y, 1.0), lambda x: torch.asinh(x / self.inner.scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.invert(x)


def _with_history(weight: Tensor, x: Tensor, a: Tensor) -> Tensor:
    return inverse(lambda y: weight * a * y.sinh(), lambda x: asinh(x, weight * a))(x)


def total(y: Tensor) -> Tensor:
    return (y * y.cos()).sum()


def loss(h: Function) -> Function:
    return lambda x, a: total(h(x, a))


def by_autograd(h: Function, x: Tensor, a: Tensor, order: int) -> Any:
    """Inside of a level of grad, derivatives by torch.autograd."""

    def inside(x: Tensor, a: Tensor) -> Tensor:
        y = total(h(x, a))
        for _ in range(order):
            slopes = torch.autograd.grad(y, (x, a), create_graph=True)
            y = sum(total(s) for s in slopes)
        return y

    return grad(inside, (0, 1))(x, a)


def pulled_twice(h: Function, x: Tensor, a: Tensor) -> Any:
    """The backward of a level that has ended, more than once."""
    pull: Any = vjp(h, x, a)[1]
    return pull(x), pull(a), vmap(pull)(torch.stack([x, a]))


def pulled_inside(h: Function, x: Tensor, a: Tensor) -> Any:
    """The backward of a level that has ended, under further ones."""
    pull: Any = vjp(h, x, a)[1]
    return grad(lambda v: total(pull(v)[0]))(x), jvp(lambda v: pull(v)[1], (x,), (a,))


def two(t: Tensor) -> Tensor:
    return torch.stack([t, 0.8 * t])


FIRST: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "grad": lambda h, x, a: grad(loss(h), (0, 1))(x, a),
    "grad x": lambda h, x, a: grad(loss(h))(x, a),
    "grad a": lambda h, x, a: grad(loss(h), 1)(x, a),
    "jvp": lambda h, x, a: jvp(h, (x, a), (a, x)),
    "jvp x": lambda h, x, a: jvp(lambda x: h(x, a), (x,), (a,)),
    "jvp a": lambda h, x, a: jvp(lambda a: h(x, a), (a,), (x,)),
    "vjp, twice": pulled_twice,
    "vjp, inside": pulled_inside,
    "jacrev": lambda h, x, a: jacrev(h, (0, 1))(x, a),
    "jacfwd": lambda h, x, a: jacfwd(h, (0, 1))(x, a),
    "vmap": lambda h, x, a: vmap(h)(two(x), two(a)),
    "vmap x": lambda h, x, a: vmap(h, (0, None))(two(x), a),
    "vmap a": lambda h, x, a: vmap(h, (None, 0))(x, two(a)),
    "vmap, last dim": lambda h, x, a: vmap(h, (1, 0), 1)(two(x).T, two(a)),
    "vmap(vmap)": lambda h, x, a: vmap(vmap(h, (0, None)), (None, 0))(two(x), two(a)),
    "vmap(grad)": lambda h, x, a: vmap(grad(loss(h), (0, 1)))(two(x), two(a)),
    "vmap(grad), a shared": lambda h, x, a: vmap(grad(loss(h), (0, 1)), (0, None))(two(x), a),
    "vmap(grad), x shared": lambda h, x, a: vmap(grad(loss(h), (0, 1)), (None, 0))(x, two(a)),
    "grad(vmap)": lambda h, x, a: grad(lambda x, a: total(vmap(h)(two(x), two(a))), (0, 1))(x, a),
    "grad(vmap), a shared": lambda h, x, a: grad(lambda x, a: total(vmap(h, (1, None))(two(x).T, a)), (0, 1))(x, a),
    "vmap(grad(vmap))": lambda h, x, a: vmap(grad(lambda x, a: total(vmap(h, (0, None))(two(x), a)), (0, 1)))(
        two(x), two(a)
    ),
    "jvp(vmap)": lambda h, x, a: jvp(vmap(h, (0, None)), (two(x), a), (two(a), x)),
    "vmap(jvp)": lambda h, x, a: vmap(lambda x, a: jvp(h, (x, a), (a, x)), (0, None))(two(x), a),
    "vmap of tangents": lambda h, x, a: vmap(lambda t: jvp(h, (x, a), (t, a)))(two(a)),
    "vmap of a and tangents": lambda h, x, a: vmap(lambda t, a: jvp(h, (x, a), (t, a)), (0, 0))(two(a), two(a)),
    "vmap(jacrev)": lambda h, x, a: vmap(jacrev(h, (0, 1)), (0, None))(two(x), a),
    "vmap(jacfwd)": lambda h, x, a: vmap(jacfwd(h, (0, 1)), (None, 0))(x, two(a)),
    "grad beside": lambda h, x, a: grad(lambda b: (b * h(x, a)).sum())(a),
    "jvp beside grad": lambda h, x, a: grad(lambda x, a, b: total(b * jvp(lambda x: h(x, a), (x,), (a,))[1]), 2)(
        x, a, x
    ),
    "jacfwd beside grad": lambda h, x, a: grad(lambda x, a, b: total(jacfwd(h)(x, a) @ b), 2)(x, a, x),
    "grad beside jvp": lambda h, x, a: jvp(lambda b: grad(lambda x: total(b) * total(h(x, a)))(x), (x,), (a,)),
    "no_grad": lambda h, x, a: grad(lambda x: total(x * torch.no_grad()(h)(x, a)))(x),
}
SECOND: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "hessian": lambda h, x, a: hessian(loss(h), (0, 1))(x, a),
    "hessian x": lambda h, x, a: hessian(loss(h))(x, a),
    "jacfwd(jacrev)": lambda h, x, a: jacfwd(jacrev(h))(x, a),
    "jvp(grad)": lambda h, x, a: jvp(grad(loss(h), (0, 1)), (x, a), (a, x)),
    "jvp(grad), of a": lambda h, x, a: jvp(lambda a: grad(loss(h))(x, a), (a,), (x,)),
    "jvp(grad), x by a": lambda h, x, a: jvp(lambda x: grad(loss(h), 1)(x, a), (x,), (a,)),
    "jacfwd(grad)": lambda h, x, a: jacfwd(grad(loss(h), (0, 1)), (0, 1))(x, a),
    "vmap(hessian)": lambda h, x, a: vmap(hessian(loss(h), (0, 1)), (0, None))(two(x), a),
    "vmap(jvp(grad))": lambda h, x, a: vmap(lambda x, t: jvp(grad(loss(h), (0, 1)), (x, a), (t, x)))(two(x), two(a)),
    "jvp(vmap(grad))": lambda h, x, a: jvp(vmap(grad(loss(h), (0, 1)), (0, None)), (two(x), a), (two(a), x)),
    "jvp(grad(vmap))": lambda h, x, a: jvp(
        grad(lambda x, a: total(vmap(h, (0, None))(two(x), a)), (0, 1)), (x, a), (a, x)
    ),
    "jvp(jacrev)": lambda h, x, a: jvp(jacrev(h, (0, 1)), (x, a), (a, x)),
    "vmap of tangents and cotangents": lambda h, x, a: vmap(lambda v: jvp(lambda x: vjp(h, x, a)[1](v), (x,), (v,)))(
        two(a)
    ),
    "grad(grad)": lambda h, x, a: grad(lambda x: total(grad(loss(h), 1)(x, a)))(x),
    "jacrev(jacfwd)": lambda h, x, a: jacrev(jacfwd(loss(h), (0, 1)), (0, 1))(x, a),
    "jvp(jvp)": lambda h, x, a: jvp(lambda x: jvp(h, (x, a), (a, x)), (x,), (a,)),
    "autograd in grad": lambda h, x, a: by_autograd(h, x, a, 1),
}
THIRD = {"autograd twice in grad": lambda h, x, a: by_autograd(h, x, a, 2)}
ALL = {**FIRST, **SECOND, **THIRD}


ONCE = ("functional_call", "grad beside jvp")  # f is evaluated again, with the original weight: refused


@pytest.mark.parametrize(("name", "stack"), [(n, s) for n in FUNCTIONS for s in ALL if (n, s) != ONCE])
def test_every_stack_of_levels(name: str, stack: str) -> None:
    ours, exact = (ALL[stack](h, X, A) for h in FUNCTIONS[name])
    assert_same(ours, exact)


def connected(h: Function, stack: str) -> list[Tensor | None]:
    """The gradients of a stack's result in the eager graph around it."""
    x, a = X.clone().requires_grad_(), A.clone().requires_grad_()
    number = sum(total(r) for r in tree_leaves(ALL[stack](h, x, a)) if r.requires_grad)
    return list(torch.autograd.grad(number, (x, a, *TRAINABLE), allow_unused=True))


AROUND = (*FIRST, "hessian", "jvp(grad)", "grad(grad)", "autograd in grad")


@pytest.mark.parametrize(("name", "stack"), [(n, s) for n in FUNCTIONS for s in AROUND if (n, s) != ONCE])
def test_an_eager_graph_around_every_stack(name: str, stack: str) -> None:
    for ours, exact in zip(*(connected(h, stack) for h in FUNCTIONS[name]), strict=True):
        assert ours is None or exact is None or ours.shape == exact.shape
        ours, exact = (torch.zeros((), dtype=X.dtype) if t is None else t for t in (ours, exact))
        assert (ours - exact).abs().max() <= 1e-10 * exact.abs().max() + 1e-13  # where it is 0, one may not exist


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_eager_derivative_around_a_level(name: str) -> None:
    def curvatures(h: Function) -> list[Tensor]:
        x, a = X.clone().requires_grad_(), A.clone().requires_grad_()
        slope = grad(loss(h), (0, 1))(x, a)
        first = torch.autograd.grad(total(slope[0]) + total(slope[1]), (x, a), create_graph=True)
        return list(torch.autograd.grad(total(first[0]) + total(first[1]), (x, a)))

    ours, exact = map(curvatures, FUNCTIONS[name])
    assert_same(ours, exact)


COMPOSING = ("grad(grad)", "jacrev(jacfwd)", "jvp(jvp)", "vjp, inside", "autograd in grad", "autograd twice in grad")
MIXED = (
    "jvp(grad), of a",
    "grad beside jvp",
    "vmap of tangents and cotangents",
)  # where only some of x, y and v have tangents


@pytest.mark.parametrize(
    ("name", "stack"),
    [
        (name, stack)
        for name in FUNCTIONS
        for stack in ALL
        if stack not in COMPOSING + MIXED and not (stack in SECOND and name in TRAINED)
    ],
)
def test_none_of_them_is_made_of_rules_that_compose(name: str, stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are take twice as long."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("made of rules that compose")

    for rule in ("solve", "vjp"):
        monkeypatch.setattr(_functional, rule, refuse)
    ALL[stack](FUNCTIONS[name][0], X, A)


@torch.jit.script
def scripted(y: Tensor, a: Tensor) -> Tensor:
    return a * y.exp()


class Hidden:
    """What only compiled code reads."""

    value = A

    def last(self, y: Tensor) -> Tensor:
        return scripted(y, self.value)

    def amid(self, y: Tensor) -> Tensor:
        return scripted(y, self.value) * 1.0

    def without_y(self, y: Tensor) -> Tensor:
        return scripted(torch.zeros_like(X), self.value) * y.exp()


@pytest.mark.parametrize("where", ["last", "amid", "without_y"])
@pytest.mark.parametrize("transform", [lambda h: grad(h), lambda h: jacfwd(h), lambda h: lambda a: vmap(h)(a[None])])
def test_what_no_torch_function_reads_is_refused(where: str, transform: Any) -> None:
    holder = Hidden()
    inv = inverse(getattr(holder, where), lambda x: (x / A).log())

    def h(a: Tensor) -> Tensor:
        holder.value = a
        return inv(torch.ones_like(X)).sum()

    with pytest.raises((errors.TransformError, RuntimeError)):
        transform(h)(A)


def test_a_weight_that_changes_in_place_before_the_derivative() -> None:
    weight = A.clone()
    inv = inverse(lambda y: weight * y.sinh(), lambda x: asinh(x, weight))
    pull: Any = vjp(inv, X)[1]
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pull(torch.ones_like(X))


def test_y_changed_in_place_before_the_derivative() -> None:
    def spoiled(x: Tensor) -> Tensor:
        y = by_param(x, A)
        z = y * 1
        y.mul_(2)
        return (z + y).sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(spoiled)(X)


def test_a_backward_of_f_that_is_not_differentiable() -> None:
    """A tangent of a param would be the transpose of that of a backward that numpy works out."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(y: Tensor, a: Tensor) -> Tensor:
            return y * a

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
            y, a = ctx.saved_tensors
            return grads[0] * a, torch.from_numpy(grads[0].detach().numpy() * y.detach().numpy())

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            raise NotImplementedError

    inv = inverse(lambda y, a: Product.apply(y, a) + a * y, lambda x, a: x / (2 * a))
    assert_same(grad(loss(inv), (0, 1))(X, A), grad(loss(lambda x, a: x / (2 * a)), (0, 1))(X, A))
    for transform in (lambda: jvp(inv, (X, A), (A, X)), lambda: hessian(loss(inv), (0, 1))(X, A)):
        with pytest.raises(RuntimeError, match=r"jvp function|numpy"):
            transform()


def test_tensors_of_inference_mode() -> None:
    with torch.inference_mode():
        x, a = X.clone(), A.clone()
        assert_same(vmap(by_param)(x, a), asinh(X, A))
    assert_same(grad(loss(by_param), (0, 1))(x, a), grad(loss(asinh), (0, 1))(X, A))
    assert_same(vmap(grad(by_param, (0, 1)))(x, a), vmap(grad(asinh, (0, 1)))(X, A))
    assert_same(jvp(by_param, (x, a), (a, x)), jvp(asinh, (X, A), (A, X)))


def test_a_singular_event_in_a_log_determinant_by_rules_that_compose() -> None:
    scales = torch.tensor([[1.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    inv = inverse(lambda y: scales * y, lambda x: x.clone(), event_dim=1, jacobian=MatrixFree())
    with pytest.raises(errors.SingularJacobianError, match=r"index \(1,\)"):
        grad(lambda x: inv.with_log_det(x)[1].sum())(torch.zeros(2, 2, dtype=torch.float64))


def test_f_is_evaluated_once() -> None:
    """At the call; a tensor of a level that vmap maps, or that has a tangent, costs one more evaluation."""
    calls = []

    def counted(y: Tensor, a: Tensor) -> Tensor:
        calls.append(1)
        return a * y.sinh()

    inv = inverse(counted, lambda x, a: asinh(x, a), verify=False)
    for stack in ("grad", "jvp", "vmap", "vmap(grad)", "jacrev", "jacfwd", "hessian"):
        calls.clear()
        ALL[stack](inv, X, A)
        assert len(calls) == 1, stack


class Unseen(torch.autograd.Function):
    """y + q y, by code that no mode sees where no level is active."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, q: Tensor) -> Tensor:
        return y + q * y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        y, q = ctx.saved_tensors
        return v * (1 + q), v * y


def test_a_function_that_is_given_what_a_level_made_of_a_weight() -> None:
    q = torch.tensor([0.5, 0.8], dtype=torch.float64, requires_grad=True)

    def by_inverse(x: Tensor) -> Tensor:
        p = q * 2  # a tensor of the level
        return inverse(lambda y: Unseen.apply(y, p), lambda x: x / (1 + p))(x).sum()

    def exact(x: Tensor) -> Tensor:
        return (x / (1 + q * 2)).sum()

    x = torch.tensor([0.7, 1.3], dtype=torch.float64)
    found, expected = (torch.autograd.grad((grad(h)(x) ** 2).sum(), q) for h in (by_inverse, exact))
    torch.testing.assert_close(found, expected)


def test_what_another_thread_makes_is_refused() -> None:
    """It has neither the levels nor the modes of this one."""
    with ThreadPoolExecutor(1) as executor:

        def by_inverse(q: Tensor) -> Tensor:
            return inverse(lambda y: executor.submit(lambda: y + q * y).result(), lambda x: x / (1 + q))(x).sum()

        x = torch.tensor([0.7, 1.3], dtype=torch.float64)
        with pytest.raises(errors.TransformError, match="does not show which tensors"):
            grad(by_inverse)(torch.tensor([0.5, 0.8], dtype=torch.float64))

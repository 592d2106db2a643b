"""What outlives a call, what may run at the same time, and what a copy is."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backsolve import Banded, Dense, Inverse, MatrixFree, errors, inverse, inverse_of
from backsolve._solve import _problems
from backsolve.solvers import numpy_solver
from tests.test_compiled import compiled, pytestmark  # noqa: F401  (its filters of warnings)

SOLVER = numpy_solver(lambda x, a: np.arcsinh(x / a))


def scaled_sinh(y: Tensor, a: Tensor) -> Tensor:
    return a * y.sinh()


def exact(x: Tensor, a: Tensor) -> Tensor:
    return (x / a).asinh()


@inverse_of(scaled_sinh)
def decorated(x: Tensor, a: Tensor) -> Tensor:
    return (x / a).asinh()


def gradients(h: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(h(*leaves).sum(), leaves)


def func_gradients(h: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.func.grad(lambda *i: h(*i).sum(), tuple(range(len(inputs))))(*inputs)


def per_sample(h: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Summed again where the input is shared."""
    x, a = inputs
    of_x, of_a = torch.vmap(torch.func.grad(lambda x, a: h(x, a), (0, 1)), (0, None))(x, a)
    return of_x, of_a.sum()


def compiled_gradients(h: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    return gradients(compiled(h), *inputs)


WAYS = {"eager": gradients, "torch.func": func_gradients, "vmap": per_sample, "compiled": compiled_gradients}
by_each_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.linspace(-2, 3, 5, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)


def assert_right(way: Callable[..., Any], inv: Callable[..., Tensor], *at: Tensor) -> None:
    for ours, right in zip(way(inv, *at), gradients(exact, *at), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------------ memory


class Scaled(nn.Module):
    """Owns the tensor that its f closes over."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(inputs()[1])
        a = self.a
        self.inverse = inverse(
            lambda y: scaled_sinh(y, a), numpy_solver(lambda x: np.arcsinh(x / a.detach().double().numpy()))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.inverse(x)


@by_each_way
def test_nothing_of_a_call_survives_it(way: Callable[..., Any]) -> None:
    """With the garbage collector off: not even a cycle."""
    inv = inverse(scaled_sinh, SOLVER)
    way(inv, *inputs())  # what torch keeps of the first compilation is its own
    watched: list[weakref.ref[Any]] = []

    def call(x: Tensor, a: Tensor) -> Tensor:
        return inv(x, a)

    function = compiled(call) if way is compiled_gradients else call
    way = gradients if way is compiled_gradients else way
    way(function, *inputs())
    gc.collect()
    gc.disable()
    try:
        x, a = inputs()
        leaves = [x.requires_grad_(), a.requires_grad_()]
        y = function(*leaves)
        found = torch.autograd.grad(y.sum(), leaves) if way is gradients else way(function, x.detach(), a.detach())
        watched += map(weakref.ref, (x, a, y, *found))
        del x, a, y, leaves, found
        assert [w() for w in watched] == [None] * len(watched)
    finally:
        gc.enable()


@pytest.mark.parametrize("way", [gradients, func_gradients], ids=["eager", "torch.func"])
def test_a_module_and_its_inverse_die_together(way: Callable[..., Any]) -> None:
    gc.collect()
    gc.disable()
    try:
        module = Scaled()
        name = module.inverse._problem.name
        way(module, inputs()[0])
        watched = [weakref.ref(t) for t in (module, module.a, module.inverse)]
        del module
        assert [w() for w in watched] == [None] * 3
        assert name not in _problems
    finally:
        gc.enable()


def test_a_compiled_inverse_dies_when_the_compiler_forgets_it() -> None:
    inv = inverse(scaled_sinh, SOLVER)
    name = inv._problem.name
    function = compiled(inv)
    assert_right(gradients, function, *inputs())
    watched = weakref.ref(inv)
    del inv, function
    torch._dynamo.reset()
    gc.collect()
    assert watched() is None
    assert name not in _problems
    with pytest.raises(errors.TransformError, match="does not exist any more"):
        torch.ops.backsolve.solve(name, "((), {})", True, [], [inputs()[0]])


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("ways", [(gradients, gradients), (func_gradients, func_gradients), (gradients, per_sample)])
def test_two_threads_at_once(ways: tuple[Callable[..., Any], ...]) -> None:
    """Both are inside of g at the same time, each with its own numbers."""
    both = threading.Barrier(2, timeout=60)

    def g(x: np.ndarray, a: np.ndarray) -> np.ndarray:
        both.wait()
        return np.arcsinh(x / a)

    inv = inverse(scaled_sinh, numpy_solver(g))
    failures: list[BaseException] = []

    def work(way: Callable[..., Any], k: int) -> None:
        try:
            for turn in range(10):
                x, a = inputs()
                assert_right(way, inv, x + k + turn, a * (1 + k + turn))
        except BaseException as failure:  # noqa: BLE001
            both.abort()
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(way, k)) for k, way in enumerate(ways)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ------------------------------------------------------------------------------------------------ copies


def pickled(inv: Inverse) -> Inverse:
    return pickle.loads(pickle.dumps(inv))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled], ids=["copy", "deepcopy", "pickle"])
@by_each_way
def test_a_copy_is_right(copied: Callable[[Inverse], Inverse], way: Callable[..., Any]) -> None:
    for original in (inverse(scaled_sinh, exact), decorated):
        assert_right(way, copied(original), *inputs())


def test_a_deepcopy_is_another_problem() -> None:
    """A compiled graph that holds its name must not find the original, whose weights are others."""
    original = Scaled()
    twin = copy.deepcopy(original)
    assert twin.inverse._problem.name != original.inverse._problem.name
    assert _problems[twin.inverse._problem.name] is twin.inverse._problem


class Weighted(nn.Module):
    """f is itself a module: a deepcopy of this has an inverse of the copied f."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        nn.init.orthogonal_(self.layer.weight)
        self.inverse = inverse(self.layer, Solver(self.layer), event_dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inverse(x)


class Solver:
    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.layer.weight, (x - self.layer.bias).mT).mT.contiguous()


@pytest.mark.parametrize("wrap", [lambda h: h, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copied_module_reads_its_own_weights(wrap: Any, copied: Any) -> None:
    torch.manual_seed(0)
    original = Weighted()
    x = torch.randn(4, 3, dtype=torch.float64)
    wrap(original)(x).sum().backward()
    before = original.layer.weight.grad.clone()
    twin = copied(original)
    with torch.no_grad():
        twin.layer.weight.mul_(2)
    twin.zero_grad()
    y = wrap(twin)(x)
    y.sum().backward()
    weight = twin.layer.weight.detach().clone().requires_grad_()
    expected = (x - twin.layer.bias.detach()) @ torch.linalg.inv(weight).mT
    expected.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(twin.layer.weight.grad, weight.grad, rtol=1e-12, atol=1e-12)
    assert torch.equal(original.layer.weight.grad, before)


JACOBIANS = {
    "elementwise": (None, 0),
    "default": (None, 1),
    "Dense": (Dense(), 1),
    "Banded": (Banded(0, 0), 1),
    "MatrixFree": (MatrixFree(), 1),
}


def f_of_a_sum(y: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return y + y**3 + (p + w)


def through_params(inv: Callable[..., Tensor], x: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return inv(x, p, w)


def through_a_closure(inv: Any, x: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return inverse(lambda y: f_of_a_sum(y, p, w), lambda x: inv(x, p, w).detach(), **inv._options)(x)


def through_vmap(inv: Callable[..., Tensor], x: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return torch.func.vmap(inv, (0, None, None))(x, p, w)


def through_the_log_determinant(inv: Any, x: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return inv.with_log_det(x, p, w)[1]


@pytest.mark.parametrize("way", [through_params, through_a_closure, through_vmap, through_the_log_determinant])
@pytest.mark.parametrize(("jacobian", "event_dim"), JACOBIANS.values(), ids=JACOBIANS.keys())
@pytest.mark.parametrize("hooked", [False, True])
def test_each_leaf_accumulates_in_its_own_memory(way: Any, jacobian: Any, event_dim: int, hooked: bool) -> None:
    """The derivatives of f by p and w are one tensor; autograd takes what it is given for .grad, and adds to it."""

    def g(x: Tensor, p: Tensor, w: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for _ in range(60):
            y = y - (f_of_a_sum(y, p, w) - x) / (1 + 3 * y**2)
        return y

    inv = inverse(f_of_a_sum, g, event_dim=event_dim, jacobian=jacobian)
    x = torch.linspace(-2, 3, 15, dtype=torch.float64).reshape(5, 3)
    leaves = [torch.linspace(0, 1, 3, dtype=torch.float64).requires_grad_() for _ in range(2)]
    if hooked:
        for leaf in leaves:
            leaf.register_hook(lambda v: v)
    once = torch.autograd.grad(way(inv, x, *leaves).sum(), leaves)
    for _ in range(3):
        way(inv, x, *leaves).sum().backward()
    for leaf, grad in zip(leaves, once, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, 3 * grad)


def test_the_cotangent_is_not_accumulated_into() -> None:
    """J is the identity, so that its product with v is v; x.grad must not be that tensor."""
    shift = inverse(lambda y, p: y - p, lambda x, p: x + p, event_dim=1, jacobian=MatrixFree("richardson"))
    x, v = torch.rand(3, requires_grad=True), torch.ones(3)
    for _ in range(3):
        shift(x, torch.rand(3)).backward(v)
    assert torch.equal(v, torch.ones(3))
    assert x.grad is not None
    assert torch.equal(x.grad, 3 * v)

"""Tensors that f closes over: found, or refused loudly. Each way of holding one is a row.

Every row is the same function, f(y) = w (y + y^3), whose g is NumPy; the truth comes from an explicit param and
from the closed form of the first derivative.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from backsolve import Diagonal, errors, implicit_function, inverse
from backsolve.solvers import numpy_solver

EPS = torch.finfo(torch.float64).eps
Forward = Callable[[Tensor], Tensor]


def cubic(y: Tensor, w: Tensor) -> Tensor:
    return w * (y + y**3)


def cubic_root(x: Any, w: Any = 2.0) -> Any:
    """Invert w (y + y^3) in closed form."""
    return 2 / np.sqrt(3) * np.sinh(np.arcsinh(1.5 * np.sqrt(3) * x / w) / 3)


SOLVER = numpy_solver(cubic_root)


class OldStyle(torch.autograd.Function):
    """w (y + y^3) as a Function without setup_context: torch.func refuses it, and it hides w from function modes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(y, w)
        return cubic(y, w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        y, w = ctx.saved_tensors
        return grads[0] * w * (1 + 3 * y**2), (grads[0] * (y + y**3)).sum()


@torch.library.custom_op("backsolve_tests::cubic", mutates_args=())
def custom_cubic(y: Tensor, w: Tensor) -> Tensor:
    return cubic(y, w)


custom_cubic.register_autograd(
    lambda ctx, v: (v * ctx.saved[1] * (1 + 3 * ctx.saved[0] ** 2), (v * (ctx.saved[0] + ctx.saved[0] ** 3)).sum()),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "saved", inputs),
)


class Attribute(torch.nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = w

    def forward(self, y: Tensor) -> Tensor:
        return cubic(y, self.w)


class Holder:
    def __init__(self, w: Tensor) -> None:
        self.table = {"weights": [w]}

    def __call__(self, y: Tensor) -> Tensor:
        return cubic(y, self.table["weights"][0])

    def method(self, y: Tensor) -> Tensor:
        return self(y)


WEIGHT: Tensor


def reads_a_global(y: Tensor) -> Tensor:
    return cubic(y, WEIGHT)


def held_by_a_global(w: Tensor) -> Forward:
    global WEIGHT
    WEIGHT = w
    return lambda y: reads_a_global(y)


def in_place(w: Tensor) -> Forward:
    def f(y: Tensor) -> Tensor:
        z = y + y**3
        z.mul_(w)
        return z

    return f


def indexed_writes(w: Tensor) -> Forward:
    def f(y: Tensor) -> Tensor:
        z = torch.empty_like(y)
        z[0], z[1:] = cubic(y[0], w), cubic(y[1:], w)
        return z

    return f


def gradient_of_a_potential(w: Tensor) -> Forward:
    def f(y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            return torch.autograd.grad((w * (y**2 / 2 + y**4 / 4)).sum(), y, create_graph=True)[0]

    return f


def lazy_cache(w: Tensor) -> Forward:
    store: dict[str, Tensor] = {}

    def f(y: Tensor) -> Tensor:
        if "w" not in store:
            store["w"] = w * 1
        return cubic(y, store["w"])

    return f


def inner_inverse(w: Tensor) -> Forward:
    scale = inverse(lambda y: y / w, lambda x: x * w.detach())
    return lambda y: scale(y + y**3)


def inner_inverse_with_param(w: Tensor) -> Forward:
    scale = inverse(lambda y, w: y / w, lambda x, w: x * w)
    return lambda y: scale(y + y**3, w)


HOLDS = {
    "cell": lambda w: lambda y: cubic(y, w),
    "global, through a helper": held_by_a_global,
    "module attribute": Attribute,
    "default argument": lambda w: lambda y, w=w: cubic(y, w),
    "partial": lambda w: functools.partial(cubic, w=w),
    "nested lists": lambda w: (lambda held: lambda y: cubic(y, held[0][0]))([[w]]),
    "callable object": Holder,
    "bound method": lambda w: Holder(w).method,
    "in-place operation in f": in_place,
    "indexed writes in f": indexed_writes,
    "list argument of a torch function": lambda w: lambda y: torch.stack([w, w]).mean() * (y + y**3),
    "expanded view": lambda w: lambda y: w.expand(3) * (y + y**3),
    "checkpoint": lambda w: lambda y: checkpoint(cubic, y, w, use_reentrant=False),
    "vmap in f": lambda w: lambda y: torch.func.vmap(lambda t: cubic(t, w))(y),
    "func.grad in f": lambda w: lambda y: torch.func.vmap(torch.func.grad(lambda t: w * (t**2 / 2 + t**4 / 4)))(y),
    "autograd.grad in f": gradient_of_a_potential,
    "custom op": lambda w: lambda y: custom_cubic(y, w),
    "inverse inside f": inner_inverse,
    "inverse inside f, as its param": inner_inverse_with_param,
    "old-style Function": lambda w: lambda y: OldStyle.apply(y, w),
    "a cache of its own": lazy_cache,
}
ONLY_LEAVES = {"old-style Function"}


def leaves() -> tuple[Tensor, Tensor]:
    x = torch.tensor([0.3, 1.2, -2.0], dtype=torch.float64, requires_grad=True)
    return x, torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


def first_and_second(y: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    first = torch.autograd.grad((y**2).sum(), inputs, create_graph=True)
    return [*first, *torch.autograd.grad(sum((g**2).sum() for g in first), inputs)]


def truth() -> list[Tensor]:
    x, w = leaves()
    return first_and_second(2 / 3**0.5 * torch.sinh(torch.asinh(1.5 * 3**0.5 * x / w) / 3), (x, w))


def assert_right(actual: list[Tensor]) -> None:
    for a, e in zip(actual, truth(), strict=True):
        torch.testing.assert_close(a, e, rtol=200 * EPS, atol=200 * EPS)


@pytest.mark.parametrize("event_dim", [0, 1])
@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS.keys())
def test_a_leaf_is_found(hold: Callable[[Tensor], Forward], event_dim: int) -> None:
    """With event_dim = 1 all rows of J come from one vectorised pass through whatever f is made of."""
    x, w = leaves()
    assert_right(first_and_second(inverse(hold(w), SOLVER, event_dim=event_dim)(x), (x, w)))


@pytest.mark.parametrize("name", HOLDS)
def test_a_tensor_with_a_history_is_found_or_refused(name: str) -> None:
    x, w = leaves()
    solver = inverse(HOLDS[name](w * 1), SOLVER)
    if name in ONLY_LEAVES:
        with pytest.raises(
            errors.StructureError, match=r"computed outside f by MulBackward0[^$]*pass the tensor explic"
        ):
            solver(x)
    else:
        assert_right(first_and_second(solver(x), (x, w)))


def test_a_leaf_and_its_descendant_are_not_counted_twice() -> None:
    x, w = leaves()
    half = w * 0.5
    assert_right(first_and_second(inverse(lambda y: (half + 0.5 * w) * (y + y**3), SOLVER)(x), (x, w)))


def test_the_gradient_reaches_the_tensor_itself() -> None:
    """Not only the leaves that it was made of: c may carry hooks, or be asked for."""
    x, w = leaves()
    c = w * 1
    y = inverse(lambda y: cubic(y, c), SOLVER)(x)
    torch.testing.assert_close(torch.autograd.grad((y**2).sum(), c)[0], truth()[1].detach(), rtol=64 * EPS, atol=0)


def test_a_bound_method_of_a_tensor_closes_over_it() -> None:
    """It is a builtin like torch.sin, of which one need not ask what it closes over."""
    x, w = leaves()
    y = inverse(w.mul, lambda x: x / 2)(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), w)[0], -(x / w**2).sum().detach(), rtol=8 * EPS, atol=0)


def test_several_outputs_of_one_node() -> None:
    x, w = leaves()
    first, second = torch.stack([w, 3 * w]).unbind(0)
    assert_right(first_and_second(inverse(lambda y: (first + second) / 4 * (y + y**3), SOLVER)(x), (x, w)))


class Counting(torch.nn.Module):
    """Changes its own state in place at each call, as batch normalisation counts its batches."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.held = [w]
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, y: Tensor) -> Tensor:
        self.calls += 1
        return cubic(y, self.held[0])


@pytest.mark.parametrize("history", [False, True])
def test_f_that_changes_its_state_in_place(history: bool) -> None:
    x, w = leaves()
    module = Counting(w * 1 if history else w)
    assert_right(first_and_second(inverse(module, SOLVER)(x), (x, w)))
    assert module.calls > 0


def test_the_same_tensor_as_x_param_and_closure() -> None:
    """f(y, x) = x^2 y with x closed over as well: y = x / x^2 = 1 / x."""
    x, _ = leaves()
    y = inverse(lambda y, p: x * p * y, numpy_solver(lambda x, p: x / p**2))(x, x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], -1 / x.detach() ** 2, rtol=8 * EPS, atol=0)


class Scripted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, y: Tensor) -> Tensor:
        return self.w * (y + y**3)


def test_scripted_module() -> None:
    """torch.jit runs outside of every function mode; the graph still shows the leaf."""
    x, _ = leaves()
    module = torch.jit.script(Scripted())
    assert_right(first_and_second(inverse(module, SOLVER)(x), (x, *module.parameters())))


def test_scripted_function_with_a_history_is_refused() -> None:
    @torch.jit.script
    def scaled(y: Tensor, w: Tensor) -> Tensor:
        return w * (y + y**3)

    x, w = leaves()
    assert_right(first_and_second(inverse(lambda y: scaled(y, w), SOLVER)(x), (x, w)))
    with pytest.raises(errors.StructureError, match="computed outside f"):
        inverse(lambda y, w=w * 1: scaled(y, w), SOLVER)(x)


class Doubled(torch.nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


@pytest.mark.parametrize("solver_reads_the_weight", [False, True])
def test_cached_parametrisation(solver_reads_the_weight: bool) -> None:
    """The first to read the weight fills the cache; the solver must not fill it without a graph."""
    module = Scripted()
    parametrize.register_parametrization(module, "w", Doubled())
    original = module.parametrizations.w.original

    def solver(x: Tensor) -> Tensor:
        if solver_reads_the_weight:
            module(x)
        return SOLVER(x, 2 * original.detach())

    x, _ = leaves()
    with parametrize.cached():
        y = inverse(module, solver)(x)
    actual = torch.autograd.grad((y**2).sum(), (x, original))
    expected = leaves()
    y = 2 / 3**0.5 * torch.sinh(torch.asinh(1.5 * 3**0.5 * expected[0] / (2 * expected[1])) / 3)
    for a, e in zip(actual, torch.autograd.grad((y**2).sum(), expected), strict=True):
        torch.testing.assert_close(a, e, rtol=64 * EPS, atol=0)


@pytest.mark.parametrize("hold", [HOLDS["cell"], HOLDS["checkpoint"]])
def test_gradient_hooks_of_a_leaf_run_once(hold: Callable[[Tensor], Forward]) -> None:
    x, w = leaves()
    calls: list[Tensor] = []
    w.register_hook(lambda v: calls.append(v) or 3 * v)
    (by_w,) = torch.autograd.grad((inverse(hold(w), SOLVER)(x) ** 2).sum(), w)
    assert len(calls) == 1
    torch.testing.assert_close(by_w, 3 * truth()[1].detach(), rtol=64 * EPS, atol=0)


def test_a_hook_registered_after_the_call_is_refused() -> None:
    x, w = leaves()
    y = inverse(HOLDS["cell"](w), SOLVER)(x)
    w.register_hook(lambda v: 3 * v)
    with pytest.raises(errors.StructureError, match="hook was registered after the call"):
        y.sum().backward()


def test_hook_on_a_leaf_that_cannot_be_replaced_is_refused() -> None:
    x, w = leaves()
    w.register_hook(lambda v: 3 * v)
    with pytest.raises(errors.StructureError, match="leaf with gradient hooks"):
        inverse(HOLDS["old-style Function"](w), SOLVER)(x)


def test_only_read_without_a_graph_stops_the_gradient_as_in_torch() -> None:
    x, w = leaves()

    def f(y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = w * 1
        return scale * (y + y**3)

    y = inverse(f, SOLVER)(x)
    assert torch.autograd.grad(y.sum(), w, allow_unused=True) == (None,)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("held", ["param", "closure", "module buffer", "y"])
def test_change_in_place_before_backward_is_autograds_error(held: str, create_graph: bool) -> None:
    x, w = leaves()
    w = w.detach() if held == "module buffer" else w
    y = inverse(cubic, SOLVER)(x, w) if held == "param" else inverse(lambda y: cubic(y, w), SOLVER)(x)
    with torch.no_grad():
        (y if held == "y" else w).mul_(1.5)
    allowed = (RuntimeError, errors.StructureError)  # the second if f(y) is seen to have changed first
    with pytest.raises(allowed, match=r"modified by an inplace operation|gave another value at the same y"):
        torch.autograd.grad(y.sum(), x, create_graph=create_graph)


def test_f_that_changed_before_a_second_derivative_is_refused() -> None:
    x, _ = leaves()
    scale = [2.0]
    y = inverse(lambda y: scale[0] * (y + y**3), SOLVER)(x)
    scale[0] = 2.5
    with pytest.raises(errors.StructureError, match="gave another value at the same y"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_another_leaf_before_a_second_derivative_is_refused() -> None:
    x, w = leaves()
    held = [w]
    y = inverse(lambda y: cubic(y, held[0]), SOLVER)(x)
    held[0] = w.detach().clone().requires_grad_()
    with pytest.raises(errors.StructureError, match="another leaf than in the call"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("count", [0, 50])
def test_a_tensor_made_in_another_thread(count: int) -> None:
    """Each thread numbers its own autograd nodes, so a closure can look newer than f."""
    x, w = leaves()
    for _ in range(count):
        torch.exp(w)
    c = w * 1
    solved: list[Tensor] = []
    worker = threading.Thread(target=lambda: solved.append(inverse(lambda y: cubic(y, c), SOLVER)(x)))
    worker.start()
    worker.join()
    (by_c,) = torch.autograd.grad((solved[0] ** 2).sum() + c, c)
    torch.testing.assert_close(by_c, 1 + truth()[1].detach(), rtol=64 * EPS, atol=0)


@pytest.mark.parametrize("same_leaf", [False, True])
def test_entries_may_close_over_other_tensors_than_f(same_leaf: bool) -> None:
    """f reads exp(l), entries a tensor made of it before: second derivatives need both."""
    x, _ = leaves()
    q = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    log_scale = q if same_leaf else q * 1
    scale = log_scale.exp()
    jacobian = Diagonal(entries=lambda y: scale.expand(y.shape))
    y = inverse(lambda y: log_scale.exp() * y, lambda x: x / scale.detach(), jacobian=jacobian)(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (mixed,) = torch.autograd.grad(slope.sum(), q)
    torch.testing.assert_close(mixed, -3 / scale.detach(), rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_constant_changed_in_place_where_f_is_zero(create_graph: bool) -> None:
    """At y = 0 the value of f = k y does not tell that k has changed."""
    k = torch.tensor([3.0, 3.0], dtype=torch.float64)
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: k * y, lambda x: x / k)(x)
    k.mul_(10)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x, create_graph=create_graph)


def test_a_small_element_that_changed_beside_a_large_one_is_noticed() -> None:
    k = [torch.tensor([1e9, 3.0], dtype=torch.float64)]
    x = torch.tensor([1e9, 1.0], dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: k[0] * y, lambda x: x / k[0])(x)
    k[0] = torch.tensor([1e9, 30.0], dtype=torch.float64)
    with pytest.raises(errors.StructureError, match="another value"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_changed_matrix_with_the_same_row_sums_is_noticed() -> None:
    """Neither f(y) nor J^T 1 tell."""
    held = [2 * torch.eye(2, dtype=torch.float64)]
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y = inverse(lambda y: y @ held[0].T, lambda x: x / 2, event_dim=1)(x)
    held[0] = torch.tensor([[1.5, 0.5], [0.5, 1.5]], dtype=torch.float64)
    with pytest.raises(errors.StructureError, match="another value"):
        torch.autograd.grad((y**2).sum(), x, create_graph=True)


def test_a_changed_derivative_by_a_param_is_noticed() -> None:
    x, p = leaves()
    held = [1.0]
    y = inverse(lambda y, p: 2 * y + held[0] * (p - 2), lambda x, p: x / 2)(x, p)
    held[0] = 5.0
    with pytest.raises(errors.StructureError, match="another value"):
        torch.autograd.grad(y.sum(), p, create_graph=True)


def test_rounding_that_differs_between_evaluations_is_no_change() -> None:
    """As of sums whose order is not fixed on a GPU, where the condition is 0 but for rounding."""
    torch.manual_seed(0)
    terms = torch.randn(1000, dtype=torch.float64)

    def c(y: Tensor, p: Tensor) -> Tensor:
        return y * (1 + terms[torch.randperm(1000)].sum() ** 2) - p

    scale = 1 + terms.sum().item() ** 2
    p = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    for _ in range(10):
        (slope,) = torch.autograd.grad(implicit_function(c, lambda p: p / scale)(p).sum(), p, create_graph=True)
        torch.testing.assert_close(slope, torch.full_like(p, 1 / scale), rtol=1e-12, atol=0)


def test_known_entries_are_those_of_the_call() -> None:
    k = torch.tensor(3.0, dtype=torch.float64)
    x, _ = leaves()
    jacobian = Diagonal(entries=lambda y: k * torch.ones_like(y))
    inv = inverse(lambda y: k * y, lambda x: x / k, jacobian=jacobian, verify=False)
    y = inv(x)
    k.mul_(10)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 1 / 3).double(), rtol=1e-7, atol=0)


def test_under_a_device_context() -> None:
    """torch.device(...) is a function mode too."""
    x, w = leaves()
    with torch.device("cpu"):
        assert_right(first_and_second(inverse(HOLDS["cell"](w), SOLVER)(x), (x, w)))
        assert_right(first_and_second(inverse(HOLDS["old-style Function"](w), SOLVER)(x), (x, w)))


def test_nothing_but_a_closure_needs_a_gradient() -> None:
    x, w = leaves()
    y = inverse(HOLDS["cell"](w), SOLVER)(x.detach())
    torch.testing.assert_close(torch.autograd.grad((y**2).sum(), w)[0], truth()[1].detach(), rtol=64 * EPS, atol=0)

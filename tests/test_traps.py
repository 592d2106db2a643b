"""What torch itself gets wrong or refuses, and backsolve goes around: one probe for each trap, about torch alone.

Each probe asserts the present bad behaviour. When it goes red, this torch has mended the trap or changed it, and the
message says which part of backsolve can be made simpler, or has to be looked at again.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from scipy import special
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable
from torch.func import grad, jacfwd, jvp, vmap

pytestmark = [  # of torch's own making, while it traces any custom autograd.Function
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
]

x = torch.tensor(0.7, dtype=torch.float64)
one = torch.ones_like(x)


def still(trap: bool | Tensor, way_out: str) -> None:
    assert trap, f"torch {torch.__version__} has mended or changed this trap; look at: {way_out}"


@contextmanager
def still_refused(error: type[Exception], words: str, way_out: str) -> Iterator[None]:
    try:
        yield
    except error as found:
        still(words in str(found), way_out)
    else:
        still(False, way_out)


def compiled(function: Callable[..., Any], backend: str = "eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


class Sevenfold(Function):
    """A clone whose backward is 7 v, so that it can be told from the derivative of its forward."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return 7 * v


class Sine(Function):
    """With everything that torch asks of a Function that composes."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        return v * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return t * ctx.saved_tensors[0].cos()


# ------------------------------------------------------------------------------------------------ compiler


@pytest.mark.parametrize("transform", [grad, lambda h: lambda x: vmap(grad(h))(x[None])[0]], ids=["grad", "vmap(grad)"])
def test_compiled_func_grad_drops_the_backward_of_a_function(transform: Any) -> None:
    """Silently (pytorch #193279, #192985): the result is the derivative of the forward."""
    found = compiled(transform(lambda x: Sevenfold.apply(x)))(x)
    still(found == 1, "_compiled.py: one Function could replace the connected Newton steps")
    assert grad(Sevenfold.apply)(x) == 7  # and it is the compiler that drops it


def test_compiled_vmap_drops_the_backward_of_a_function() -> None:
    """As silently, in a graph for a backward pass alone: what vmap maps does not seem to require a gradient."""
    leaf = x[None].clone().requires_grad_()
    value = compiled(lambda x: vmap(lambda x: Sevenfold.apply(x))(x) + x)(leaf)
    still(torch.autograd.grad(value, leaf, one[None])[0] != 8, "_compiled.py: `Call.attached` under a lone vmap")


def test_compile_refuses_a_function_with_a_jvp() -> None:
    way_out = "_compiled.py: `_Attached` could be traced, and `_Straight` would not be needed"
    with still_refused(torch._dynamo.exc.Unsupported, "custom jvp", way_out):
        compiled(lambda x: Sine.apply(x))(x.clone().requires_grad_())


def test_compile_refuses_the_double_backward() -> None:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(compiled(torch.sin, "aot_eager")(leaf), leaf, create_graph=True)
    way_out = "_compiled.py, `Call.attached`: one derivative is not enough any more; docs/transforms.md"
    with still_refused(RuntimeError, "double backward", way_out):
        torch.autograd.grad(first, leaf)


def test_compile_refuses_calls_of_autograd() -> None:
    way_out = "tests/transforms_page.py, AUTOGRAD_IN_GRAPH; Functional could pull by autograd when compiled"
    with still_refused(torch._dynamo.exc.Unsupported, "autograd.grad", way_out):
        compiled(lambda x: torch.autograd.grad(x.sin(), x)[0])(x.clone().requires_grad_())


NESTED = """
import torch
from torch.func import hessian, jacfwd, jvp, vmap
x, c = torch.full((3, 2), 0.3), torch.tensor(2.0)

def slope(h):
    return lambda x: jvp(h, (x,), (torch.ones_like(x),))[1]

try:
    torch.compile({}, fullgraph=True, backend="eager")(x)
except torch._dynamo.exc.TorchRuntimeError:
    print("refused")
"""


@pytest.mark.parametrize(
    "transformed",
    [
        "vmap(hessian(lambda x: x.sin().sum()))",
        "vmap(jacfwd(lambda x: (x.sin() * 2).cos()))",
        "slope(slope(lambda x: x * c))",
    ],
    ids=["vmap(hessian)", "vmap(jacfwd)", "jvp(jvp)"],
)
def test_compile_fails_at_nested_forward_mode(transformed: str) -> None:
    """A product with a constant is enough. In processes of their own: later compilations there may fail as well."""
    program = [sys.executable, "-c", NESTED.format(transformed)]
    run = subprocess.run(program, capture_output=True, text=True, check=True)
    still(run.stdout == "refused\n", "tests/transforms_page.py, NESTED_FORWARD, and its footnote: the row may be right")


# ------------------------------------------------------------------------------------------------ torch.func


def test_nested_forward_mode_through_a_function_is_zero() -> None:
    """Silently (pytorch #197867): forward mode is off inside of a Function's jvp."""

    def slope(h: Any) -> Any:
        return lambda x: jvp(h, (x,), (one,))[1]

    still(slope(slope(Sine.apply))(x) == 0, "_torch.py, `tangents_of_tangents`, and its two callers")
    assert slope(slope(torch.sin))(x) == -x.sin()


def test_forward_mode_does_not_nest_outside_of_torch_func() -> None:
    way_out = "_functional.py, `push_inputs`: a jvp instead of the transpose of the vjp"
    with forward_ad.dual_level(), still_refused(RuntimeError, "Nested forward mode AD", way_out):
        jvp(torch.sin, (forward_ad.make_dual(x, one),), (one,))


def matrices(n: int) -> Tensor:
    """Well conditioned, none of them symmetric."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, 3, dtype=torch.float64, generator=generator) + 3 * torch.eye(3, dtype=torch.float64)


def test_linalg_solve_under_vmap_of_jacfwd_is_wrong() -> None:
    a = matrices(4)
    b = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    found = vmap(jacfwd(torch.linalg.solve, 1))(a, b)
    still((found - torch.linalg.inv(a)).abs().max() > 0.1, "linalg/: torch's own solve")


def test_lu_solve_under_nested_vmap_is_wrong() -> None:
    def solve(b: Tensor, a: Tensor) -> Tensor:
        return torch.linalg.lu_solve(*torch.linalg.lu_factor(a), b)

    a = matrices(4)
    b = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3, 1)
    found = vmap(vmap(solve, (0, None)), (None, 0))(b, a)
    expected = torch.linalg.inv(a)[:, None] @ b
    still((found - expected).abs().max() > 0.1, "linalg/dense.py: torch's own lu_solve")


@pytest.mark.parametrize("name", ["det", "slogdet", "solve"])
def test_linalg_under_grad_of_jvp_is_wrong(name: str) -> None:
    """Silently; the other order, jvp of grad, is right."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    h = {
        "det": torch.linalg.det,
        "slogdet": lambda a: torch.linalg.slogdet(a)[1],
        "solve": lambda a: torch.linalg.solve(a, ones)[0, 0],
    }[name]
    a = 2 * ones
    wrong, right = grad(lambda a: jvp(h, (a,), (ones,))[1])(a), jvp(grad(h), (a,), (ones,))[1]
    still((wrong - right).abs() > 0.1, "linalg/factored.py: torch's own slogdet and solve")


def test_a_custom_op_has_no_func_grad_and_a_jvp_of_zero() -> None:
    with torch.library._scoped_library("backsolve_probe", "FRAGMENT"):
        sine = torch.library.custom_op("backsolve_probe::sine", lambda x: x.sin(), mutates_args=(), schema=SCHEMA)
        sine.register_autograd(lambda ctx, v: v * ctx.x.cos(), setup_context=_keep)
        assert torch.autograd.functional.vjp(sine, x)[1] == x.cos()
        with still_refused(RuntimeError, "setup_context", "_operations.py: autograd rules on the operations"):
            grad(sine)(x)
        still(jvp(sine, (x,), (one,))[1] == 0, "_operations.py: autograd rules on the operations")


SCHEMA = "(Tensor x) -> Tensor"


def _keep(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001
    (ctx.x,) = inputs


# ------------------------------------------------------------------------------------------------ autograd


def test_once_differentiable_guards_nothing() -> None:
    class Square(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, v: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * v

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(Square.apply(leaf) + leaf**3, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf)
    still(second == 6 * x, "it could refuse second derivatives where there are none; the 2 of x^2 is missing")


def test_a_saved_output_leads_back_into_its_own_node() -> None:
    """A partial derivative taken inside of backward wanders through y back to the param."""

    class Logarithm(Function):
        entered = 0

        @staticmethod
        def forward(ctx: Any, p: Tensor) -> Tensor:
            y = p.log()
            ctx.save_for_backward(y, p)
            return y

        @staticmethod
        def backward(ctx: Any, v: Tensor) -> Tensor:
            Logarithm.entered += 1
            if Logarithm.entered == 5:
                raise RecursionError
            y, p = ctx.saved_tensors
            with torch.enable_grad():
                return torch.autograd.grad(y.exp() - p, p, -v / p)[0]

    p = x.clone().requires_grad_()
    with still_refused(RecursionError, "", "_attach.py, `_OnLeaves`: the partial derivative could be taken in place"):
        torch.autograd.grad(Logarithm.apply(p), p)


def test_a_derivative_that_nobody_needs_may_not_exist() -> None:
    a = x.clone().requires_grad_()
    with still_refused(NotImplementedError, "igammac", "_torch.py, `wanted_gradients`; the derivatives in `a`"):
        torch.autograd.grad(torch.special.gammaincc(a, one), a)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_there_is_no_lu_of_half_precision(dtype: torch.dtype) -> None:
    with still_refused(NotImplementedError, "lu_cpu", "linalg/: J need not be float32 for half precision"):
        torch.linalg.lu_factor(torch.eye(2, dtype=dtype))


def test_a_newton_step_makes_a_correctly_rounded_y_worse() -> None:
    """Not torch's fault, but the arithmetic's: the residual has the rounding of f."""
    w = torch.linspace(1, 6, 1001, dtype=torch.float64)
    x32 = (w + 0.5 * w.sin()).float()
    for _ in range(9):
        w = w - (w + 0.5 * w.sin() - x32.double()) / (1 + 0.5 * w.cos())
    y = w.float()
    stepped = y - (y + 0.5 * y.sin() - x32) / (1 + 0.5 * y.cos())
    still((stepped - w).abs().max() > 1.2 * (y - w).abs().max(), "_solve.py, `refine`: every step may be kept")


def test_ndtr_is_coarse_in_its_tail() -> None:
    at = torch.tensor([-8.0, -21.0], dtype=torch.float64)
    exact = 0.5 * torch.special.erfc(-at / math.sqrt(2))
    error = (torch.special.ndtr(at) / exact - 1).abs()
    still(error[0] > 0.01 and error[1] == 1, "what diagnose says of coarse functions; the normal distribution")


def test_gammainc_is_coarse_from_20_on() -> None:
    a = torch.tensor([25.0, 50.0, 100.0], dtype=torch.float64)
    exact = torch.from_numpy(special.gammainc(a.numpy(), a.numpy()))
    error = (torch.special.gammainc(a, a) / exact - 1).abs()
    still((error > 1e-10).all(), "an incomplete gamma function of our own")


def test_maximum_halves_twice_at_a_tie() -> None:
    """The mean of the second derivatives 2 and 0 of `max(x, c)^2` on the two sides is 1; torch's is a quarter of 2."""
    found = grad(grad(lambda z: torch.maximum(z, x.clone()) ** 2))(x)
    still(found == 0.5, "`where` in the place of maximum, in every f of ours")


def test_where_lets_the_nan_of_the_other_branch_through() -> None:
    found = grad(lambda z: torch.where(z > 0, z.sqrt(), z))(torch.zeros(()))
    still(found.isnan(), "the safe arguments on both sides of `where`")


def test_contiguous_arrays_have_a_dimension() -> None:
    still(np.ascontiguousarray(np.zeros(())).shape == (1,), "solvers/foreign.py, where arrays keep their shape")


def test_batch_norm_mixes_the_batch() -> None:
    """One cotangent for all samples gives the sum of the blocks of J in a column: not the block on the diagonal."""
    batch = torch.linspace(-1, 2, 5, dtype=torch.float64)[:, None]
    norm = torch.nn.BatchNorm1d(1, affine=False, track_running_stats=False, dtype=torch.float64)
    pulled = grad(lambda z: norm(z).sum())(batch)[:, 0]
    diagonal = torch.func.jacrev(norm)(batch)[:, 0, :, 0].diagonal()
    still((pulled - diagonal).abs().min() > 0.1, "the probe for couplings, `verify`")


def test_modules_move_their_buffers_at_every_call() -> None:
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(1, dtype=torch.float64)
    linear = torch.nn.Linear(16, 16, dtype=torch.float64)  # so large that its 15 first power iterations do not converge
    spectral = torch.nn.utils.parametrizations.spectral_norm(linear).parametrizations["weight"][0]
    before = norm.running_mean.clone(), spectral._u.clone()
    norm(torch.linspace(0, 2, 5, dtype=torch.float64)[:, None])
    linear(torch.ones(16, dtype=torch.float64))
    way_out = "numerical solvers, which call f many times"
    still(not torch.equal(norm.running_mean, before[0]), way_out)
    still(not torch.equal(spectral._u, before[1]), way_out)
